"""Mathematics as MathML, written when the site is built.

Sphinx's usual renderer, MathJax, is fetched from a network when a page is opened, so formulas of an offline copy are
raw TeX; images of formulas need a TeX installation, and do not scale or follow the text's colour. All browsers of today
draw MathML by themselves, and docutils, on which Sphinx rests, turns LaTeX into it: no further dependency, no script.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError

# Browsers set no space after the name of a function; TeX does, but not before a bracket.
_FUNCTION = re.compile(r"<mo>&ApplyFunction;</mo>(\s*<mo[^>]*>[(\[{])?")


def _mathml(node: nodes.Element, *, block: bool) -> str:
    try:
        return _FUNCTION.sub(
            lambda match: match[1] or '<mspace width="0.17em"></mspace>',
            str(tex2mathml(node.astext(), as_block=block)),
        )
    except (MathError, SyntaxError) as error:
        raise ExtensionError(f"{node.source}: {node.astext()!r} cannot become MathML: {error}") from error


def _inline(translator: Any, node: nodes.Element) -> None:
    translator.body.append(_mathml(node, block=False))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.Element) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="math-block"))
    translator.body.append(_mathml(node, block=True))
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Register the renderer under the name "mathml"."""
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
