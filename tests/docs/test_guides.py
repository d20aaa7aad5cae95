"""What the guides say works: their code runs, their links lead somewhere, and nothing public is without a page.

References within the site are checked when it is built, which is strict (`make docs`, in `.ci/run`). Here stands what a
build does not see: that code runs, and that links work in the repository too.
"""

import importlib
import re
import shlex
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
# Not those that a build has made.
GUIDES = [path for path in sorted(DOCS.rglob("*.md")) if path.parent in (DOCS, DOCS / "guide")]
PAGES = [ROOT / "README.md", *GUIDES, *sorted((ROOT / "benchmarks").rglob("*.md"))]
FENCE = re.compile(r"^(`{3,}|:{3,}).*?^\1\s*$", flags=re.MULTILINE | re.DOTALL)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def python_blocks(path):
    """Line numbers and texts of the Python blocks of a page."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start()) + 1, match[1]


WITH_CODE = [path for path in GUIDES if any(python_blocks(path))]


@pytest.mark.parametrize("path", WITH_CODE, ids=name_of)
def test_code_runs(path, monkeypatch, tmp_path):
    """The blocks of a page run as they stand, one after the other in one namespace: a page is read from its top."""
    if "inspection" in path.read_text(encoding="utf-8"):
        pyplot = pytest.importorskip("matplotlib.pyplot", reason="the benchmark extra is not installed")
        monkeypatch.setattr(pyplot, "show", lambda: None)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "guide"}
    try:
        for line, block in python_blocks(path):
            # Line numbers of a traceback are those of the page.
            exec(compile("\n" * line + block, name_of(path), "exec"), namespace)
    finally:
        if "matplotlib" in sys.modules:
            importlib.import_module("matplotlib.pyplot").close("all")


def test_there_is_code():
    assert len(WITH_CODE) >= 12
    assert sum(len(list(python_blocks(path))) for path in WITH_CODE) >= 30


def slug(heading):
    """Anchor of a heading, by the rule of GitHub, which is also the site's."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    found = {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}
    return found | set(re.findall(r"^\(([\w-]+)\)=$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue  # `make linkcheck` lists these
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), f"{name_of(path)} links to {target}, which is not there"
        assert ROOT in other.parents, f"{name_of(path)} links out of the repository: {target}"
        if anchor:
            assert anchor in anchors(other), f"{name_of(path)} links to {target}: there is no such heading"


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page.write_text("# One\n\n[fine](#one), [also](page.md#one)\n")
    test_links_lead_somewhere(page)
    for target in ("#two", "other.md", "page.md#two"):
        page.write_text(f"# One\n\n[broken]({target})\n")
        with pytest.raises(AssertionError):
            test_links_lead_somewhere(page)


@pytest.fixture(scope="module")
def pages():
    pytest.importorskip("typer")
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        yield importlib.import_module("pages")
    finally:
        sys.path.remove(str(DOCS / "_ext"))


def test_every_public_name_has_a_page(pages, tmp_path):
    pages.write_api(tmp_path)
    homes = pages.homes()
    modules = {name for name in pages.public_modules() if name != "anomalib_gen.cli"}
    assert {f"anomalib_gen.{part}" for part in ("anomaly", "calibration", "datasets", "models")} <= modules
    assert {"anomalib_gen.FlowDetector", "anomalib_gen.images.ImageReader"} <= homes.keys()
    index = (tmp_path / "index.rst").read_text()
    for name in modules:
        module = importlib.import_module(name)
        text = (tmp_path / f"{name}.rst").read_text()
        assert f"\n   {name}\n" in index
        for public in getattr(module, "__all__", []):
            if public.startswith("_"):
                continue
            home = homes[f"{name}.{public}"]
            page = tmp_path / "generated" / f"{home}.rst"
            if page.exists():
                assert re.search(rf"^\.\. auto\w+:: {re.escape(home)}$", page.read_text(), flags=re.MULTILINE)
                assert f"\n   {public}\n" in text
            else:
                assert f".. autodata:: {home}\n" in text


def test_pages_of_what_is_gone_are_removed(pages, tmp_path):
    (tmp_path / "generated").mkdir()
    gone = tmp_path / "generated" / "anomalib_gen.Gone.rst"
    gone.write_text("gone")
    pages.write_api(tmp_path)
    assert not gone.exists()


def test_every_command_is_listed(pages, tmp_path):
    pages.write_commands(tmp_path / "commands.rst")
    text = (tmp_path / "commands.rst").read_text()
    work = ("fit", "calibrate", "score", "monitor", "report", "explain", "evaluate", "models verify")
    for command in ("demo", "benchmark", *work):
        assert f"\nanomalib-gen {command}\n" in text
    assert "--max-bad-rows" in text
    assert "\x1b" not in text


def command_lines(path):
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^ {4}anomalib-gen (.+)$", text, flags=re.MULTILINE)


def check_command(line):
    """A line of the shell names a command and options that there are."""
    from typer.main import get_command

    from anomalib_gen.cli import app

    words = shlex.split(line)
    command = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {flag for option in command.params for flag in option.opts}
    assert {word for word in words if word.startswith("-")} <= known, line


WITH_COMMANDS = [path for path in (ROOT / "README.md", *GUIDES) if command_lines(path)]


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=name_of)
def test_commands_have_these_options(path):
    pytest.importorskip("typer")
    for line in command_lines(path):
        check_command(line)


def test_a_wrong_command_is_found():
    pytest.importorskip("typer")
    assert {"README.md", "docs/guide/operations.md"} <= {name_of(path) for path in WITH_COMMANDS}
    with pytest.raises(KeyError):
        check_command("scores incoming/ -m model")
    with pytest.raises(AssertionError):
        check_command("score incoming/ -m model --keys id")


def test_configurations_have_these_keys(tmp_path):
    from anomalib_gen.scoring.config import read_config

    text = (DOCS / "guide" / "operations.md").read_text(encoding="utf-8")
    blocks = [
        block
        for block in re.findall(r"(?:^ {4}.*\n|^\n)+", text, flags=re.MULTILINE)
        if "    [score]" in block
    ]
    assert len(blocks) == 1
    path = tmp_path / "job.toml"
    path.write_text(textwrap.dedent(blocks[0]))
    assert set(read_config(path)) == {"score", "monitor"}


def test_openings_say_what_they_said(pages):
    text = "A path, x_t = |y|:\n\n    a * b\n\n- *Tails.* As ``c``, `d`\n  and _e.\n\n  The rest* of it."
    assert [line for line in pages._prose(text) if line] == [
        "A path, x\\_t = \\|y\\|:",
        ".. code-block:: text",
        "       a * b",
        "- *Tails.* As ``c``, `d`",
        "  and \\_e.",
        "The rest\\* of it.",
    ]


def test_links_of_results_lead_to_results_alone(pages, monkeypatch, tmp_path):
    results = tmp_path / "recorded"
    results.mkdir()
    (results / "one.md").write_text(
        "## Part\n\n[two](two.md#x), [data](one.csv), [out](https://example.org)\n"
    )
    (results / "two.md").write_text("# Two\n\n# Three\n")
    monkeypatch.setattr(pages, "RESULTS", results)
    pages.write_results(tmp_path / "site")
    assert "[two](two.md#x), data, [out](https://example.org)" in (tmp_path / "site" / "one.md").read_text()
    assert (tmp_path / "site" / "one.md").read_text().startswith("# One\n")
    assert (tmp_path / "site" / "two.md").read_text() == "# Two\n\n## Three\n"


@pytest.fixture(scope="module")
def mathml():
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        yield importlib.import_module("mathml")
    finally:
        sys.path.remove(str(DOCS / "_ext"))


def test_functions_are_set_apart_from_letters_and_not_from_brackets(mathml):
    from docutils import nodes

    assert "<mspace" in mathml._mathml(nodes.math(r"\log p", r"\log p"), block=False)
    assert "<mspace" not in mathml._mathml(nodes.math(r"\log(p)", r"\log(p)"), block=False)
    with pytest.raises(Exception, match="cannot become MathML"):
        mathml._mathml(nodes.math(r"\no", r"\nosuchcommand"), block=False)


def test_formulas_become_mathml():
    converter = pytest.importorskip(
        "docutils.utils.math.latex2mathml", reason="the docs extra is not installed"
    )
    formulas = []
    for path in GUIDES:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        formulas += re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", text, flags=re.DOTALL)
    assert len(formulas) > 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block, inline in formulas:
            assert converter.tex2mathml(block or inline, as_block=bool(block)).startswith("<math")
