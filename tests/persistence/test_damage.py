"""Folders that were damaged, changed or made by hand: each is refused with one clear error, and nothing runs."""

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anomalib_gen import load, persistence
from anomalib_gen.monitoring import Summariser, load_reference, reference_of
from anomalib_gen.persistence import ModelFolderError
from anomalib_gen.persistence._document import canonical, content_hash

FOLDERS = Path(__file__).parent / "folders"
SOURCES = {
    name: {path.name: path.read_bytes() for path in (FOLDERS / name).iterdir()}
    for name in ("format-1-composed", "format-1-pipeline", "format-4-images")
}
WHOLE = SOURCES["format-1-pipeline"]
pytestmark = pytest.mark.filterwarnings("ignore:The folder's transformers were written")

# Nothing of the kind may happen while a folder is read. (A hook cannot be removed, so it has a switch.)
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.",
    "pickle.find_class",
)
watched = {"on": False}
happened = []


def watch(event, arguments):
    if watched["on"]:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if event.startswith(FORBIDDEN) or writes:
            happened.append((event, arguments))


sys.addaudithook(watch)


def write(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def rehash(files, document):
    """A folder whose hashes are right, as somebody who knows the format would make it."""
    document = copy.deepcopy(document)
    document["files"] = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
        if name not in ("model.json", "MODEL_CARD.md")
    }
    document["hash"] = content_hash(document)
    return {**files, "model.json": canonical(document)}


def reference_bytes():
    """A training reference of numbers and categories."""
    random = np.random.default_rng(0)
    summary = Summariser()
    summary.add(pd.DataFrame({"amount": random.normal(size=50), "kind": random.choice(["a", "b"], 50)}))
    return reference_of(summary.columns(), random.normal(size=50), threshold=-2.0, held_out=True).to_bytes()


def document_of(files):
    return json.loads(files["model.json"])


def refused(folder, match=None):
    happened.clear()
    watched["on"] = True
    try:
        with pytest.raises(ModelFolderError, match=match):
            load(folder)
    finally:
        watched["on"] = False
    assert not happened


def refused_or_read(folder):
    """Load what may or may not be sound; anything but a model or a clear refusal fails."""
    happened.clear()
    watched["on"] = True
    try:
        load_reference(folder)
        return load(folder)
    except ModelFolderError:
        return None
    finally:
        watched["on"] = False
        assert not happened


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bombed",)


# By accident -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.json", "tensors.safetensors", "part-0.skops"])
def test_a_file_that_is_gone_cut_or_changed(name, tmp_path):
    data = WHOLE[name]
    others = {key: value for key, value in WHOLE.items() if key != name}
    refused(write(tmp_path / "m", others), match="has no model.json|do not have the same files")
    for part in (b"", data[:10], data[:-1], data + b"\n"):
        refused(
            write(tmp_path / "m", {**others, name: part}),
            match="truncated or was changed|cannot be read|hash",
        )
    for place in range(0, len(data), max(1, len(data) // 40)):
        flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        refused(write(tmp_path / "m", {**others, name: flipped}))


def test_no_folder_at_all(tmp_path):
    for path in (tmp_path / "absent", __file__):
        with pytest.raises(FileNotFoundError, match="no folder"):
            load(path)
    refused(tmp_path, match=r"has no model\.json")


# By intent -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.pkl", "weights.pt", "part-0.joblib", "__init__.py", "part-x.skops", ".hidden"]
)
def test_other_files_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(write(tmp_path / "m", {**WHOLE, name: pickle.dumps(Bomb())}), match=f"holds '{name}'")
    assert not Path("bombed").exists()


@pytest.mark.parametrize("name", ["model.json", "tensors.safetensors", "part-0.skops"])
def test_pickles_under_our_names_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {**WHOLE, name: pickle.dumps(Bomb())}
    refused(write(tmp_path / "m", files))
    if name != "model.json":
        refused(write(tmp_path / "m", rehash(files, document_of(WHOLE))))
    assert not Path("bombed").exists()


@pytest.mark.parametrize("name", ["model.json", "tensors.safetensors", "part-0.skops", "MODEL_CARD.md"])
def test_links_folders_and_devices_are_refused(name, tmp_path):
    folder = write(tmp_path / "m", WHOLE)
    (tmp_path / "elsewhere").write_bytes(WHOLE[name])
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "elsewhere")
    refused(folder, match="no plain file")
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, match="no plain file")
    (folder / name).rmdir()
    os.mkfifo(folder / name)
    refused(folder, match="no plain file")


def test_a_file_that_becomes_a_link_is_refused(tmp_path, monkeypatch):
    """Between the listing of the folder and the reading of the file."""
    folder = write(tmp_path / "m", WHOLE)
    real = persistence.list_folder

    def list_then_link(path):
        names = real(path)
        (folder / "tensors.safetensors").unlink()
        (folder / "tensors.safetensors").symlink_to("/dev/zero")
        return names

    monkeypatch.setattr(persistence, "list_folder", list_then_link)
    refused(folder, match="is a link")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path):
    pipe = tmp_path / "model.json"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(persistence.read_file, pipe, size=None, limit=10)
        try:
            with pytest.raises(ModelFolderError, match="no plain file"):
                future.result(timeout=20)
        finally:
            with contextlib.suppress(OSError):  # who still waits may go
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "..\\secret", "sub/part-0.skops", "part-9.skops"]
)
def test_paths_that_lead_elsewhere_are_refused(name, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    document = document_of(WHOLE)
    document["files"][name] = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    document["hash"] = content_hash(document)
    refused(write(tmp_path / "m", {**WHOLE, "model.json": canonical(document)}), match="same files")


def test_sizes_are_checked_before_anything_is_read(tmp_path):
    folder = write(tmp_path / "m", WHOLE)
    with pytest.raises(ModelFolderError, match="max_bytes=100"):
        load(folder, max_bytes=100)
    # Files of a hundred gigabytes that take no place on the disk.
    for name, message in (("model.json", "more than the"), ("tensors.safetensors", "should have")):
        folder = write(tmp_path / "m", WHOLE)
        os.truncate(folder / name, 10**11)
        refused(folder, match=message)
    document = document_of(WHOLE)
    document["files"]["tensors.safetensors"]["bytes"] = 10**11
    document["hash"] = content_hash(document)
    folder = write(tmp_path / "m", {**WHOLE, "model.json": canonical(document)})
    os.truncate(folder / "tensors.safetensors", 10**11)
    refused(folder, match="max_bytes")


def tensors(header, data=b""):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        (2**62).to_bytes(8, "little"),
        tensors(b"[" * 10_000),
        tensors({"0": {"dtype": "F64", "shape": [10**12], "data_offsets": [0, 8 * 10**12]}}),
        tensors({"0": {"dtype": "F64", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
        tensors({"0": {"dtype": "F64", "shape": [1], "data_offsets": [-8, 0]}}, bytes(8)),
        tensors({"0": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}, bytes(16)),
        tensors({}),
    ],
)
def test_hand_made_tensors(data, tmp_path):
    files = rehash({**WHOLE, "tensors.safetensors": data}, document_of(WHOLE))
    refused(write(tmp_path / "m", files))


def array_header(shape, descr="<f8"):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue()


def archive_of(**changes):
    """The transformer's archive with other parts; `compression` is that of all parts."""
    compression = changes.pop("compression", zipfile.ZIP_STORED)
    with zipfile.ZipFile(io.BytesIO(WHOLE["part-0.skops"])) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    schema = json.loads(parts["schema.json"])
    if "schema" in changes:
        parts["schema.json"] = json.dumps(changes.pop("schema")(schema)).encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, part in {**parts, **changes}.items():
            archive.writestr(name, part)
    return out.getvalue()


def call(module, name, *arguments):
    """Description by which skops would call something."""
    listed = [
        {
            "__class__": "str",
            "__module__": "builtins",
            "__loader__": "JsonNode",
            "content": json.dumps(argument),
        }
        for argument in arguments
    ]
    content = {"__class__": "tuple", "__module__": "builtins", "__loader__": "TupleNode", "content": listed}
    return {
        "__class__": name,
        "__module__": module,
        "__loader__": "ConstructorFromReduceNode",
        "content": content,
        "protocol": 2,
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (archive_of(compression=zipfile.ZIP_DEFLATED), "compressed"),
        (archive_of(**{"0.npy": array_header((10**12,))}), "another size"),
        (archive_of(**{"0.npy": array_header((3,), "|O") + pickle.dumps(Bomb())}), "another size"),
        (archive_of(**{"0.npz": b"PK"}), "only plain arrays"),
        (archive_of(**{"../0.txt": b"x"}), "only plain arrays"),
        (
            archive_of(schema=lambda schema: {**call("os", "system", "touch bombed")}),
            "posix.system|os.system|cannot",
        ),
        (archive_of(schema=lambda schema: {**call("builtins", "eval", "1")}), "builtins.eval|cannot"),
        (archive_of(schema=lambda schema: {**schema, "__id__": 1}), "by number"),
        (archive_of(schema=lambda schema: {**schema, "__module__": "sklearn.tree._tree"}), "not trusted"),
        (archive_of(schema=lambda schema: [[[]]]), "cannot be read"),
        (archive_of(**{"schema.json": b"[" * 100_000}), "cannot be read"),
    ],
)
def test_hand_made_transformers(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = rehash({**WHOLE, "part-0.skops": data}, document_of(WHOLE))
    refused(write(tmp_path / "m", files), match=message)
    assert not Path("bombed").exists()


def deep(depth):
    node = 1
    for _ in range(depth):
        node = {"is": "tuple", "items": [node]}
    return node


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"is": "callable", "path": "os:system"}, "neither of anomalib_gen"),
        ({"is": "callable", "path": "builtins:eval"}, "neither of anomalib_gen"),
        (
            {"is": "callable", "path": "anomalib_gen.models.flow:torch.hub.load"},
            "no class or function of that module",
        ),
        (
            {"is": "callable", "path": "anomalib_gen.models.flow:importlib.import_module"},
            "no class|not installed",
        ),
        (
            {"is": "callable", "path": "anomalib_gen.benchmark.runner:run_benchmark"},
            "neither of anomalib_gen",
        ),
        (
            {"is": "callable", "path": "torch.nn.functional:warnings.warn"},
            "no class or function of that module",
        ),
        ({"is": "callable", "path": "torch.serialization:load"}, "neither of anomalib_gen"),
        ({"is": "callable", "path": "../../evil:run"}, "no import path"),
        ({"is": "callable", "path": ["os", "system"]}, "no import path"),
        ({"is": "object", "id": 1, "class": "subprocess:Popen", "state": {}}, "neither of anomalib_gen"),
        ({"is": "object", "id": 1, "class": "torch.nn.modules.linear:Linear", "state": {}}, "must not have"),
        ({"is": "module", "id": 1, "class": "anomalib_gen.paths:EDM", "state": {}}, "no class or function"),
        ({"is": "object", "id": 1, "class": "anomalib_gen.nowhere:X", "state": {}}, "neither|not installed"),
        ({"is": "same", "id": 7}, "not described"),
        ({"is": "estimator", "number": "../../x"}, "do not fit together"),
        ({"is": "estimator", "number": 5}, "do not fit together"),
        ({"is": "array", "key": "0", "dtype": "|V100000", "order": [0]}, "has the type"),
        ({"is": "array", "dtype": "<U9999999", "shape": [20], "items": ["x"] * 20}, "malformed"),
        ({"is": "array", "dtype": "|O", "shape": [10**12], "items": []}, "malformed"),
        ({"is": "partial", "items": [3, [], {"is": "dict", "items": []}]}, "do not fit|malformed"),
        ({"is": "float", "value": "1e999"}, "malformed"),
        ({"is": "dtype", "of": "torch", "name": "load"}, "names a type"),
        ({"is": "requests", "of": {}}, "holds a MetadataRequest"),
        *(
            ({"is": "requests", "of": of}, "request of metadata .* is malformed")
            for of in (
                None,
                [["fit", {}]],
                {"fit": ["sample_weight"]},
                {"owner": {"sample_weight": True}},
                {"__init__": {"sample_weight": True}},
                {"fit": {"sample_weight": 1}},
                {"fit": {"sample_weight": {"is": "callable", "path": "os:system"}}},
                {"fit": {"sample_weight": "a.b"}},
                {"fit": {"": True}},
            )
        ),
        ({"is": "no such kind"}, "unknown kind"),
        ({"is": ["tuple"]}, "unknown kind"),
        (deep(150), "deeper"),
        (3, "holds a int"),
        ({"is": "tuple", "items": []}, "holds a tuple"),
    ],
)
def test_hand_made_trees(node, message, tmp_path):
    document = document_of(WHOLE)
    document["model"] = node
    refused(write(tmp_path / "m", rehash(WHOLE, document)), match=message)


@pytest.mark.parametrize("name", ["__class__", "__dict__", "a.b", "", "_parameters"])
def test_attributes_that_are_not_an_objects_own(name, tmp_path):
    document = document_of(WHOLE)

    def poison(node):
        if isinstance(node, dict):
            if node.get("is") == "module":
                node["state"][name] = 1
                return True
            return any(poison(part) for part in node.values())
        return isinstance(node, list) and any(poison(part) for part in node)

    assert poison(document["model"])
    refused(write(tmp_path / "m", rehash(WHOLE, document)), match="attribute")


@pytest.mark.parametrize("value", [None, 1, "fit", {"is": "dict", "items": []}, {"is": "same", "id": 1}])
def test_requests_of_metadata_that_are_something_else(value, tmp_path):
    document = document_of(SOURCES["format-1-composed"])
    document["model"]["state"]["_metadata_request"] = value
    files = rehash(SOURCES["format-1-composed"], document)
    refused(write(tmp_path / "m", files), match="for metadata are something else")


def test_a_document_that_is_none(tmp_path):
    for data in (
        b"[" * 200_000,
        b"{}",
        b"null",
        b'{"a":1,"a":2}',
        b'{"format":NaN}',
        b"\xff\xfe",
        b'{"format":"anomalib_gen model folder","version":true}',
        b'{"format":"anomalib_gen model folder","version":' + b"9" * 5000 + b"}",
    ):
        refused(write(tmp_path / "m", {**WHOLE, "model.json": data}), match=r"model\.json|cannot be read")


COLUMN = {"name": "x", "type": "float", "missing": False, "min": 0.0, "max": 1.0}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("schema", {}),
        ("schema", {"named": 1, "n_rows": 3, "columns": None}),
        ("schema", {"named": True, "n_rows": "3", "columns": None}),
        ("schema", {"named": True, "n_rows": 3, "columns": {}}),
        ("schema", {"named": True, "n_rows": 3}),
        *(
            ("schema", {"named": True, "n_rows": 3, "columns": [{**COLUMN, **change}]})
            for change in (
                {"name": None},
                {"type": "pickle"},
                {"min": "0"},
                {"max": 10**400},
                {"missing": "no"},
                {"categories": "abc"},
            )
        ),
        ("training", [1]),
        ("training", [{}]),
        ("training", [{"path": "", "class": "A", "parameters": []}]),
    ],
)
def test_what_a_folder_says_of_itself_has_its_form(part, value, tmp_path):
    """Cards, scoring and monitoring read it, without loading the model."""
    document = {**document_of(WHOLE), part: value}
    folder = write(tmp_path / "m", rehash(WHOLE, document))
    refused(folder, match=f"no proper '{part}'")
    with pytest.raises(ModelFolderError, match=f"no proper '{part}'"):
        persistence.inspect(folder)


# By chance -------------------------------------------------------------------------------------------------

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
KINDS = sorted(persistence._tree.Decoder._makers)
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["is", "items", "id", "class", "state", "key", "order", "dtype", "path", "of", "shape", "fit"]
            ),
            inner | st.sampled_from(KINDS),
            max_size=5,
        )
    ),
    max_leaves=6,
)


def places(value, path=()):
    """Paths to all parts of a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def put(value, path, part):
    if not path:
        return part
    value = copy.copy(value)
    value[path[0]] = put(value[path[0]], path[1:], part)
    return value


def get(value, path):
    for key in path:
        value = value[key]
    return value


@st.composite
def changed_bytes(draw, data):
    kind = draw(st.sampled_from(["flip", "cut", "insert", "copy", "replace"]))
    start = draw(st.integers(0, len(data)))
    length = draw(st.integers(0, 40))
    if kind == "cut":
        return data[:start] + data[start + length :]
    if kind == "insert":
        return data[:start] + draw(st.binary(min_size=1, max_size=40)) + data[start:]
    if kind == "copy":
        other = draw(st.integers(0, len(data)))
        return data[:start] + data[other : other + length] + data[start + length :]
    if kind == "replace":
        part = draw(st.binary(max_size=40))
        return data[:start] + part + data[start + len(part) :]
    place = min(start, len(data) - 1)
    return data[:place] + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]


@st.composite
def changed_json(draw, value):
    """A JSON value with one to three parts replaced: by anything, by another part, or by nothing."""
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(value))
        path = paths[draw(st.integers(0, len(paths) - 1))]
        if draw(st.booleans()):
            part = get(value, paths[draw(st.integers(0, len(paths) - 1))])
        else:
            part = draw(VALUES | st.sampled_from(KINDS))
        value = put(value, path, part)
    return value


@st.composite
def folders(draw):
    """Files of a folder with something wrong with it, with right hashes or without."""
    files = dict(SOURCES[draw(st.sampled_from(sorted(SOURCES)))])
    document = document_of(files)
    what = draw(
        st.sampled_from(
            ["bytes", "tensors", "header", "part", "schema", "tree", "tree", "document", "reference"]
        )
    )
    if what == "bytes":
        name = draw(st.sampled_from([name for name in files if name != "MODEL_CARD.md"]))
        files[name] = draw(changed_bytes(files[name]))
        return files
    if what in ("tensors", "header"):
        data = files["tensors.safetensors"]
        if what == "header":
            size = int.from_bytes(data[:8], "little")
            data = tensors(draw(changed_json(json.loads(data[8 : 8 + size]))), data[8 + size :])
        else:
            data = draw(changed_bytes(data))
        return rehash({**files, "tensors.safetensors": data}, document)
    if what in ("part", "schema"):
        document = document_of(WHOLE)
        if what == "part":
            data = draw(changed_bytes(WHOLE["part-0.skops"]))
        else:
            data = archive_of(schema=lambda schema: draw(changed_json(schema)))
        return rehash({**WHOLE, "part-0.skops": data}, document)
    if what == "reference":
        data = reference_bytes()
        if draw(st.booleans()):
            data = draw(changed_bytes(data))
        else:
            data = json.dumps(draw(changed_json(json.loads(data)))).encode()
        return rehash({**files, "reference.json": data}, document)
    if what == "tree":
        return rehash(files, {**document, "model": draw(changed_json(document["model"]))})
    changed = draw(changed_json({key: part for key, part in document.items() if key != "model"}))
    if not isinstance(changed, dict):
        return {**files, "model.json": json.dumps(changed).encode()}
    changed = {**changed, "model": document["model"]}
    return {**files, "model.json": canonical({**changed, "hash": content_hash(changed)})}


QUIET = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.function_scoped_fixture,
    HealthCheck.large_base_example,
]


def test_a_training_reference_is_read_or_refused(tmp_path):
    """A folder with a sound one is read: what the examples below change is not refused already."""
    document, data = document_of(WHOLE), reference_bytes()
    folder = write(tmp_path / "m", rehash({**WHOLE, "reference.json": data}, document))
    assert load_reference(folder).n_scored == 50
    assert refused_or_read(folder) is not None
    for broken in (b"", b"[]", data[:-1], data.replace(b'"held_out"', b'"held"'), b"[" * 100_000):
        write(folder, rehash({**WHOLE, "reference.json": broken}, document))
        with pytest.raises(ModelFolderError, match="training reference cannot be read"):
            load_reference(folder)


@given(folders())
@settings(max_examples=60, deadline=None, suppress_health_check=QUIET)
def test_any_folder_is_read_or_refused(tmp_path, files):
    refused_or_read(write(tmp_path / "m", files))


@pytest.mark.slow
def test_any_folder_is_read_or_refused_for_ten_minutes(tmp_path):
    """The same, for as long as FUZZ_SECONDS says, or ten minutes; none takes longer than ten seconds."""
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "600"))
    slowest, count, read = 0.0, 0, 0

    @given(folders())
    @settings(max_examples=500, deadline=None, suppress_health_check=QUIET, database=None)
    def round_of_examples(files):
        nonlocal slowest, count, read
        if time.monotonic() > end:
            return
        folder = write(tmp_path / "m", files)
        start = time.perf_counter()
        read += refused_or_read(folder) is not None
        slowest = max(slowest, time.perf_counter() - start)
        count += 1

    while time.monotonic() < end:
        round_of_examples()
    print(f"{count} folders, {read} of them read, the slowest in {slowest:.2f} s")
    assert slowest < 10
