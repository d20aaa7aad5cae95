"""The package as a whole: imports run one way and disturb nothing, and what is public is documented."""

import ast
import doctest
import importlib
import inspect
import json
import subprocess
import sys
import textwrap
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import anomalib_gen
import anomalib_gen.calibration
import anomalib_gen.datasets
import anomalib_gen.explain
import anomalib_gen.features
import anomalib_gen.heatmaps
import anomalib_gen.images
import anomalib_gen.inspection
import anomalib_gen.monitoring
import anomalib_gen.selection

PACKAGE = Path(anomalib_gen.__file__).parent
NAME = "anomalib_gen"

# A module imports from its own layer and from those before it.
LAYERS = [
    {"_warnings"},
    {"_runtime", "_recording", "_component", "networks", "paths", "samplers"},
    {"models"},
    {"objectives", "anomaly"},
    {"_training"},
    {"_scaling"},
    {"persistence"},
    {"_inputs", "_outlier", "_scoring"},
    {"_base"},
    {"detectors"},
    {"calibration", "explain", "features", "heatmaps", "images", "inspection", "selection"},
    {"monitoring"},
    {"datasets", "benchmark", "scoring", "cli", "__main__"},
]
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
BORDER = LAYER["_scaling"]
DATA_PACKAGES = {"numpy", "pandas", "sklearn"}
# The one module below the border that borrows from these: for repr, clone and get_params.
EXCUSED = {"_component": {"sklearn"}}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imported_modules(name, path):
    """Full names of all that a module imports, at its top or within functions."""
    package = [NAME, *name.split(".")] if name else [NAME]
    if path.stem != "__init__":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}".removeprefix(f"{NAME}.")
                # `from anomalib_gen import _runtime` imports a module, `from anomalib_gen import FlowDetector` a name.
                yield f"{NAME}.{inner}" if inner in MODULES else origin


def part_of(name):
    return name.split(".")[0]


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_run_one_way(name):
    part = part_of(name)
    assert part in LAYER, f"{part} has no layer yet: give it one"
    for imported in imported_modules(name, MODULES[name]):
        if imported.split(".")[0] != NAME:
            continue
        assert imported != NAME, f"{name} imports the package itself, which imports everything"
        other = part_of(imported.removeprefix(f"{NAME}."))
        assert other in LAYER, f"{other} has no layer yet: give it one"
        assert LAYER[other] <= LAYER[part], f"{name} imports {imported}, which stands above it"


def test_every_layer_is_walked():
    assert {"networks.resnet", "models.flow", "detectors.flow", "datasets._adbench", "cli"} <= MODULES.keys()
    imported = {other for name, path in MODULES.items() for other in imported_modules(name, path)}
    # Absolute, of a module from its package, and relative imports are all seen.
    assert {f"{NAME}.networks", f"{NAME}._runtime", f"{NAME}.benchmark.runner"} <= imported


@pytest.mark.parametrize("name", [name for name in MODULES if part_of(name) == "datasets"])
def test_datasets_stand_alone(name):
    for imported in imported_modules(name, MODULES[name]):
        assert not imported.startswith(NAME) or imported.startswith(f"{NAME}.datasets")


def test_only_the_flow_models_know_nflows():
    users = {
        name
        for name, path in MODULES.items()
        if any(part_of(imported) == "nflows" for imported in imported_modules(name, path))
    }
    assert users == {"models.flow", "models.glow"}


@pytest.mark.parametrize("name", [name for name in MODULES if name and LAYER.get(part_of(name), 99) < BORDER])
def test_below_the_border_everything_is_torch(name):
    used = {part_of(imported) for imported in imported_modules(name, MODULES[name])} & DATA_PACKAGES
    assert used <= EXCUSED.get(part_of(name), set())


def test_scaling_is_numpy_without_estimators():
    used = {part_of(imported) for imported in imported_modules("_scaling", MODULES["_scaling"])}
    assert used & DATA_PACKAGES == {"numpy"}


STATE = """
import json, random, sys, warnings
import numpy as np, scipy.stats, sklearn.utils.validation, sklearn.utils._param_validation, torch, tqdm

def state():
    name, keys, *rest = np.random.get_state()
    return {
        "python": hash(random.getstate()),
        "numpy": [name, hash(keys.tobytes()), *map(str, rest)],
        "torch": hash(torch.get_rng_state().numpy().tobytes()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "grad": torch.is_grad_enabled(),
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic],
        "tf32": [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32],
        "print": str(np.get_printoptions()),
        "numpy errors": np.geterr(),
        "warnings": [str(f[:3]) for f in warnings.filters],
        "CUDA": torch.cuda.is_initialized(),
    }

modules, before = set(sys.modules), state()
import anomalib_gen
after = state()
print(json.dumps([before, after, sorted(set(sys.modules) - modules)]))
"""


def test_import_is_light_and_changes_nothing_global():
    result = subprocess.run([sys.executable, "-c", STATE], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    before, after, new = json.loads(result.stdout)
    assert before == after
    heavy = {"matplotlib", "pandas", "polars", "pyod", "tensorboard", "typer", "rich", "joblib", "pooch"}
    # (Some of these come with scikit-learn or scipy: only those that come with us count.)
    assert not {part_of(name) for name in new} & heavy
    assert "nflows.flows" not in new
    ours = {part_of(name.removeprefix(f"{NAME}.")) for name in new if name.startswith(f"{NAME}.")}
    assert not ours & {"datasets", "benchmark", "cli"}


# Documentation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if ">>>" in path.read_text()])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"{NAME}.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def is_function(value):
    """Functions, and methods of classes."""
    return inspect.isfunction(value) or inspect.ismethod(value)


def public_objects():
    for module in (
        anomalib_gen,
        anomalib_gen.calibration,
        anomalib_gen.datasets,
        anomalib_gen.explain,
        anomalib_gen.features,
        anomalib_gen.heatmaps,
        anomalib_gen.images,
        anomalib_gen.inspection,
        anomalib_gen.monitoring,
        anomalib_gen.selection,
    ):
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            if not hasattr(module, "__all__") and value.__module__ != module.__name__:
                continue
            yield f"{module.__name__}.{name}"
            if inspect.isclass(value):
                for member, function in inspect.getmembers(value, is_function):
                    # Not what comes from scikit-learn's mixins.
                    if not member.startswith("_") and function.__module__.startswith(NAME):
                        yield f"{module.__name__}.{name}.{member}"


# A docstring is there, has a summary, and lists the parameters and results there are, in their order, with types.
RESULTS = {"FeatureContributions", "NormalRows", "TailFit", "TailGoodness", "TypicalityResult"} | {
    name for name in anomalib_gen.monitoring.__all__ if is_dataclass(getattr(anomalib_gen.monitoring, name))
}
CHECKS = {"GL08", "SS01", "SS03", "SS04", "PR01", "PR02", "PR03", "PR04", "PR05", "RT01", "RT04", "YD01"}


@pytest.mark.parametrize("name", list(public_objects()))
def test_docstrings_are_complete(name):
    validate = pytest.importorskip("numpydoc.validate", reason="the dev extra is not installed").validate
    # The fields of results are their attributes, and documented as such.
    checks = CHECKS - {"PR01"} if name.rpartition(".")[2] in RESULTS else CHECKS
    errors = [f"{code}: {text}" for code, text in validate(name)["errors"] if code in checks]
    assert not errors


@pytest.mark.parametrize("name", list(public_objects()))
def test_docstrings_say_what_is_raised(name):
    value = anomalib_gen
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    if inspect.isclass(value):
        return
    lines, _ = inspect.getsourcelines(value)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    abstract = any(isinstance(node.exc, ast.Name) and node.exc.id == "NotImplementedError" for node in raised)
    assert not raised or abstract or "Raises\n" in inspect.getdoc(value)


def test_public_methods_are_found():
    found = set(public_objects())
    methods = ("fit", "partial_fit", "score_samples", "decision_function", "predict", "log_prob", "sample")
    assert {f"{NAME}.FlowDetector.{method}" for method in methods} <= found
    assert {f"{NAME}.VAEDetector.{method}" for method in ("elbo", "transform", "interpolate")} <= found
    assert f"{NAME}.typicality_test" in found
    assert f"{NAME}.inspection.LandscapeDisplay.from_estimator" in found
