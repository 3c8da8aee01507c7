"""Formulas as MathML, which browsers show by themselves: no script, and nothing to fetch."""

from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert

__all__ = ["RENDERER", "as_mathml"]

MATHML = "http://www.w3.org/1998/Math/MathML"
ElementTree.register_namespace("", MATHML)


def as_mathml(latex: str, display: str = "inline") -> str:
    """MathML of a formula in LaTeX; ValueError for a command that has none."""
    written = convert(latex.replace(r"\arg", r"\operatorname{arg}"), display=display)
    if "<mi>\\" in written or "<mo>\\" in written:
        raise ValueError(f"a command of this formula is unknown: {latex}")
    tree = ElementTree.fromstring(written)
    for over in tree.iter(f"{{{MATHML}}}mover"):
        if over[1].text == "\u2015":  # a line over all of it, which needs a font for formulas; a border does not
            over.tag = f"{{{MATHML}}}mrow"
            over.set("class", "overline")
            over.remove(over[1])
    return ElementTree.tostring(tree, encoding="unicode")


def _inline(translator, node) -> None:
    translator.body.append(as_mathml(node.astext()))
    raise nodes.SkipNode


def _block(translator, node) -> None:
    translator.body.append(f'<div class="formula">{as_mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


RENDERER = "mathml", (_inline, None), (_block, None)  # as Sphinx's add_html_math_renderer takes them
