"""How the site is built; `make docs` does it, strictly: a broken reference is an error."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.nodes import make_refnode

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
# Pages are made by one process: threads of the libraries under torch would only stand in its way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pages  # noqa: E402

import anomalib_gen  # noqa: E402

pages.write_pages()

project = "anomalib_gen"
author = "The anomalib_gen developers"
project_copyright = "The anomalib_gen developers, BSD 3-Clause"
release = anomalib_gen.__version__
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_copybutton",
    "sphinx_design",
    "mathml",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # recorded results skip levels of headings
exclude_patterns = ["_build", "examples"]
templates_path = []

# Docstrings -----------------------------------------------------------------------------------------------

autosummary_generate = False  # pages.write_api writes the pages
autodoc_typehints = "none"  # numpydoc sections state the types
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_show_inherited_class_members = False
numpydoc_class_members_toctree = False
numpydoc_attributes_as_param_list = True
add_module_names = False
toc_object_entries_show_parents = "hide"
default_role = "py:obj"
nitpicky = True
# `single backticks` in docstrings may be parameters or names of other libraries; `_resolve` decides.

# The page -------------------------------------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_title = "anomalib_gen"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "anomalib_gen"},
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "header_links_before_dropdown": 5,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
# Pages without pages below them have nothing to show at the side.
_ALONE = (
    "index",
    "getting_started",
    "choosing",
    "notebooks",
    "benchmark",
    "extending",
    "faq",
    "glossary",
    "references",
)
html_sidebars = {name: [] for name in _ALONE}
copybutton_exclude = ".linenos, .gp, .go"
linkcheck_anchors = False
linkcheck_timeout = 20

# References -----------------------------------------------------------------------------------------------

_HOMES = pages.homes()
_BARE: dict[str, set[str]] = {}
for _full, _home in _HOMES.items():
    _BARE.setdefault(_full.rpartition(".")[2], set()).add(_home)


def _home_of(target: str) -> str | None:
    """Documented name of what a docstring calls `target`: a bare public name, or any import path of the object."""
    name, _, member = target.partition(".") if not target.startswith("anomalib_gen") else (target, "", "")
    found = _BARE.get(name, set())
    if len(found) == 1:
        return f"{next(iter(found))}.{member}".rstrip(".")
    module, _, attribute = target.rpartition(".")
    if module.startswith("anomalib_gen"):
        try:
            value = getattr(importlib.import_module(module), attribute)
        except (AttributeError, ImportError):
            home = _home_of(module)  # of a class, whose member this is
            return None if home is None else f"{home}.{attribute}"
        same = [home for home in _HOMES.values() if _value(home) is value]
        return same[0] if same else None
    return None


def _value(full: str) -> Any:
    module, _, name = full.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _resolve(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Link names to where they are documented; leave words in backticks that are no names of ours as they are.

    What starts with "anomalib_gen" must be found, or exist as a module; anything else may be a parameter, an
    attribute, or belong to another library.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    home = _home_of(target)
    objects = env.get_domain("py").objects
    if home in objects:
        entry = objects[home]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, home)
    if not target.startswith("anomalib_gen") or _is_internal(target):
        return nodes.literal("", contnode.astext())
    return None


def _is_internal(target: str) -> bool:
    """Whether a path within the package exists, though it has no page."""
    parts = target.split(".")
    for n in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        for part in parts[n:]:
            value = getattr(value, part, None)
        return value is not None
    return False


def _skip(app: Any, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Document no members that come from other libraries, nor those that say nothing."""
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    module = getattr(function, "__module__", None)
    doc = getattr(value, "__doc__", None) or ""
    if what == "class" and module is not None and not str(module).startswith("anomalib_gen"):
        return True
    if doc.startswith("Alias for field number") or module is None:
        return True
    return None


def _escape_shapes(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Shapes such as ``(B, *E)`` and ``(n, n_components_)`` mean what they say; to docutils they are markup."""
    for number, line in enumerate(lines):
        if " of shape " in line and "``" not in line:
            lines[number] = re.sub(r"\*(?=[A-Z])|_(?=[,)])", r"\\\g<0>", line)


def _leave_docs(app: Any, docname: str, source: list[str]) -> None:
    """Links out of the folder of documents, right in the repository, lead to the site's copies or become text."""
    inner = "../" * docname.count("/")
    outer = re.escape(inner + "../")
    source[0] = re.sub(rf"\[([^\]]*)\]\(({outer}[^)]+\.ipynb)\)", r"{download}`\1 <\2>`", source[0])
    source[0] = re.sub(rf"\]\({outer}benchmarks/results/([^)]+\.md)\)", rf"]({inner}results/\1)", source[0])
    source[0] = re.sub(rf"\[([^\]]*)\]\({outer}[^)]*\)", r"\1", source[0])


def setup(app: Any) -> None:
    """Connect the above."""
    app.connect("missing-reference", _resolve)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-docstring", _escape_shapes, priority=400)  # before numpydoc
    app.connect("source-read", _leave_docs)
