"""Pages that are made from the package and its results, so that nothing public is without one.

- ``api/``: a page for each public module, and under ``api/generated`` one for each public class, exception and
  function, each object once, where it is found first. Constants stand on the page of their module.
- ``api/commands.rst``: the help of every command.
- ``results/``: the files of ``benchmarks/results``, with links that work within the site.

A module is public if no part of its path starts with an underscore; its public names are those of its ``__all__``, or
without one the classes and functions that it defines. All of it is written anew at each build, and ignored by git.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import anomalib_gen

DOCS = Path(__file__).parents[1]
RESULTS = DOCS.parent / "benchmarks" / "results"
PACKAGE = "anomalib_gen"

ORDER = (
    *("calibration", "selection", "explain", "heatmaps", "inspection", "images"),
    *("persistence", "monitoring", "datasets", "benchmark"),
)
"""Of the modules after the package itself; the parts that detectors are made of come next, and others last."""
PARTS = ("anomaly", "objectives", "models", "paths", "samplers", "networks")
GROUPS = ("Classes", "Functions", "Exceptions", "Constants")


def public_modules() -> list[str]:
    """Names of the public modules that have public names, the package first."""
    found = {info.name for info in pkgutil.iter_modules(anomalib_gen.__path__) if info.name[0] != "_"}
    ordered = [name for name in (*ORDER, *PARTS) if name in found]
    ordered += sorted(found - set(ordered))
    names = [PACKAGE, *(f"{PACKAGE}.{name}" for name in ordered)]
    return [name for name in names if name == f"{PACKAGE}.cli" or public_names(importlib.import_module(name))]


def public_names(module: ModuleType) -> list[str]:
    """Public names of a module, in the order of `__all__` or of the alphabet."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = sorted(
            name
            for name, value in vars(module).items()
            if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__
        )
    return [name for name in names if name[0] != "_"]


def group_of(value: Any) -> str:
    """Heading under which an object stands."""
    if inspect.isclass(value):
        return "Exceptions" if issubclass(value, BaseException) else "Classes"
    return "Functions" if callable(value) and hasattr(value, "__qualname__") else "Constants"


def homes() -> dict[str, str]:
    """Where each public name is documented: the name itself, or the first name of the same object."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for module_name in public_modules():
        if module_name == f"{PACKAGE}.cli":
            continue
        module = importlib.import_module(module_name)
        for name in public_names(module):
            value, full = getattr(module, name), f"{module_name}.{name}"
            found[full] = full if group_of(value) == "Constants" else first.setdefault(id(value), full)
    return found


def opening(value: Any) -> str:
    """The mathematics at the head of the module that defines an object; empty where there is none."""
    module = importlib.import_module(value.__module__)
    text = inspect.getdoc(module) or ""
    return "" if hasattr(module, "__path__") or text.count("\n") < 2 else text


def _heading(text: str, line: str) -> list[str]:
    return [text, line * len(text), ""]


def _literal(text: str) -> list[str]:
    return [".. code-block:: text", "", *(f"   {line}".rstrip() for line in text.splitlines()), ""]


def _prose(text: str) -> list[str]:
    """The opening of a module as reStructuredText: paragraphs and lists, with indented formulas as they stand.

    Openings are written for people who read the file, so whatever might be markup is taken for what it says, but for
    ``code`` and single *words*; those that are reStructuredText say so by a role.
    """
    if ":math:`" in text:
        return [*text.splitlines(), ""]
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        rows = block.splitlines()
        # A formula may follow its sentence, or be followed by one, without a blank line between them.
        for indented, group in itertools.groupby(rows, lambda row: row.startswith("    ") or not row.strip()):
            part = list(group)
            if indented:
                lines += [".. code-block:: text", "", *(f"   {row}".rstrip() for row in part), ""]
            else:
                # (The rest of a list's item after a formula is indented, and stands by itself here.)
                rest = list(itertools.takewhile(lambda row: row.startswith(" "), part))
                lines += [*map(_escape, textwrap.dedent("\n".join(rest)).splitlines()), ""]
                lines += [*map(_escape, part[len(rest) :]), ""]
    return lines


def _escape(line: str) -> str:
    start = "- " if line.startswith("- ") else ""
    parts = re.split(
        r"(``[^`]+``|`[^`]+`|(?<![\w*])\*[A-Za-z][\w .,'-]*\*(?![\w*]))", line.removeprefix("- ")
    )
    # (What stands between single backticks is a name, or else code.)
    parts = [
        re.sub(r"^`([^`]*[^\w.`][^`]*)`$", r"``\1``", part) if k % 2 else part for k, part in enumerate(parts)
    ]
    escaped = [part if k % 2 else re.sub(r"[\\*`|_]", r"\\\g<0>", part) for k, part in enumerate(parts)]
    return start + "".join(escaped)


def _object_page(full: str, value: Any) -> str:
    kind = {"Classes": "class", "Functions": "function", "Exceptions": "exception"}[group_of(value)]
    lines = [*_heading(full.rpartition(".")[2], "="), f".. auto{kind}:: {full}", ""]
    if kind == "class":
        lines[-1:] = ["   :members:", "   :inherited-members:", ""]
    text = opening(value)
    if text and value.__module__.startswith(PACKAGE):
        lines += [f".. rubric:: The opening of {value.__module__}", "", *_prose(text)]
    return "\n".join(lines)


def _constant(full: str, value: Any) -> list[str]:
    lines = [f".. autodata:: {full}", "   :no-value:", ""]
    if isinstance(value, Mapping) and value and all(map(inspect.isclass, value.values())):
        rows = [
            f'   * ``"{key}"``: :class:`~{part.__module__}.{part.__name__}`' for key, part in value.items()
        ]
        return [*lines, *rows, ""]
    if isinstance(value, Mapping):
        return [*lines, "   Keys: " + ", ".join(f'``"{key}"``' for key in value) + ".", ""]
    if isinstance(value, tuple) and value and all(hasattr(item, "name") for item in value):
        return [*lines, "   " + ", ".join(f"``{item.name}``" for item in value) + ".", ""]
    return [*lines, f"   ``{value!r}``", ""]


def write_api(folder: Path) -> None:
    """Write a page for each module and for each public class and function."""
    where = homes()
    generated = folder / "generated"
    generated.mkdir(parents=True, exist_ok=True)
    written = {folder / "commands.rst"}
    entries = []
    for module_name in public_modules():
        if module_name == f"{PACKAGE}.cli":
            continue
        module = importlib.import_module(module_name)
        groups: dict[str, list[str]] = {group: [] for group in GROUPS}
        for name in public_names(module):
            groups[group_of(getattr(module, name))].append(f"{module_name}.{name}")
        lines = [*_heading(module_name, "="), f".. module:: {module_name}", ""]
        summary, _, rest = (inspect.getdoc(module) or "").partition("\n\n")
        lines += [_escape(" ".join(summary.split())), ""]
        lines += _prose(rest)
        pages = []
        for group, names in groups.items():
            if not names:
                continue
            lines += _heading(group, "-")
            if group == "Constants":
                for full in names:
                    lines += _constant(full, getattr(module, full.rpartition(".")[2]))
                continue
            lines += [".. autosummary::", "   :nosignatures:", ""]
            lines += [f"   {full.rpartition('.')[2]}" for full in names] + [""]
            pages += [full for full in names if where[full] == full]
        if pages:
            lines += [".. toctree::", "   :hidden:", "", *(f"   generated/{full}" for full in pages), ""]
        for full in pages:
            path = generated / f"{full}.rst"
            _write(path, _object_page(full, getattr(module, full.rpartition(".")[2])))
            written.add(path)
        path = folder / f"{module_name}.rst"
        _write(path, "\n".join(lines))
        written.add(path)
        entries.append(
            (module_name, _escape(" ".join(summary.split()).partition(". ")[0].rstrip(".:") + "."))
        )
    index = [
        *_heading("API reference", "="),
        "A name is public if it stands in the ``__all__`` of a module without an underscore in its path, or, in a",
        "module without ``__all__``, if it is a class or function defined there. Everything that is public is here,",
        "and nothing else is promised to stay. Classes and functions end with the opening of their module, which is",
        "where the mathematics of a method is written down.",
        "",
        *(line for name, summary in entries for line in (f":doc:`{name} <{name}>`", f"   {summary}")),
        ":doc:`commands`",
        "   The help of every command.",
        "",
        ".. toctree::",
        "   :hidden:",
        "",
        *(f"   {name}" for name, _ in entries),
        "   commands",
        "",
    ]
    _write(folder / "index.rst", "\n".join(index))
    written.add(folder / "index.rst")
    for path in [*folder.glob("*.rst"), *generated.glob("*.rst")]:
        if path not in written:
            path.unlink()


def write_commands(path: Path) -> None:
    """Write the help of every command."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from anomalib_gen.cli import app

    def walk(command: Any, name: tuple[str, ...]) -> Any:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name
            return
        for key in inner:
            yield from walk(inner[key], (*name, key))

    lines = [
        *_heading("Commands", "="),
        "What ``anomalib-gen COMMAND --help`` prints. The guide to them is :doc:`/guide/operations`.",
        "",
    ]
    for words in walk(get_command(app), ()):
        result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "84", "TERMINAL_WIDTH": "84"})
        text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
        lines += [*_heading(" ".join(["anomalib-gen", *words]), "-"), *_literal(text.strip("\n"))]
    _write(path, "\n".join(lines))


def write_results(folder: Path) -> None:
    """Copy the recorded results; links to anything but a result's page become plain text."""
    folder.mkdir(exist_ok=True)
    pages = sorted(RESULTS.glob("*.md"))
    names = {page.name for page in pages}

    def link(match: re.Match[str]) -> str:
        target = match[2].partition("#")[0]
        return match[0] if "://" in target or target in names else match[1]

    kept = {folder / "index.md"}
    for page in pages:
        text = re.sub(r"\[([^\]]*)\]\(([^)]*)\)", link, page.read_text(encoding="utf-8"))
        if not text.startswith("# "):
            words = page.stem.replace("-", " ").capitalize()
            text = f"# {words.replace('Ebm', 'EBM').replace('Vae', 'VAE')}\n\n{text}"
        # Some files have several headings of the first order, or begin their sections at the second.
        first, _, rest = text.partition("\n")
        _write(folder / page.name, first + "\n" + re.sub(r"^# ", "## ", rest, flags=re.MULTILINE))
        kept.add(folder / page.name)
    index = ["# Recorded results", "", "The files of `benchmarks/results`, as they were recorded.", ""]
    index += ["```{toctree}", ":maxdepth: 1", "", *(page.stem for page in pages), "```", ""]
    _write(folder / "index.md", "\n".join(index))
    for path in folder.glob("*.md"):
        if path not in kept:
            path.unlink()


def _write(path: Path, text: str) -> None:
    """Write a page if it changed, so that Sphinx reads again only what is new."""
    text = text.rstrip("\n") + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_pages() -> None:
    """Write all of them."""
    write_api(DOCS / "api")
    write_commands(DOCS / "api" / "commands.rst")
    write_results(DOCS / "results")
