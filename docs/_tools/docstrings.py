"""Docstrings on the site. They are plain text: `name` is code, what is indented or set in columns stands as it is, and
no character but the backtick means anything. `as_rest` says that in reStructuredText; napoleon reads the sections.
"""

import re

__all__ = ["as_rest", "on_docstring"]

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Warns|Yields):$")
COLUMNS = re.compile(r"\S {3,}\S")
NAME = re.compile(r"[A-Za-z_][\w.]*(\(\))?$")


def on_docstring(app, what, name, obj, options, lines) -> None:
    """Handler of Sphinx's autodoc-process-docstring, before napoleon's."""
    if what == "data":  # what Python says of a dictionary is about dictionaries
        lines[:] = ["Keys: " + ", ".join(f"``{key}``" for key in obj) + ".", ""]
    lines[:] = as_rest(lines)


def as_rest(lines: list[str]) -> list[str]:
    """A docstring's lines as reStructuredText that shows them as they were meant, sections left to napoleon."""
    written, inside = [], False
    for block in re.split(r"\n(?:[ \t]*\n)+", "\n".join(lines).strip("\n")):
        rows = block.split("\n")
        inside = bool(SECTION.match(rows[0])) or (inside and rows[0].startswith(" "))
        literal = rows[0].startswith("    ") or any(map(COLUMNS.search, rows))
        if literal and not inside:
            written += ["::", "", *("    " + row for row in rows), ""]
        else:
            written += [*_inline(block).split("\n"), ""]
    return written


def _inline(text: str) -> str:
    """Backticks around a name are a link to it, around anything else code; nothing else is markup."""
    parts = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL)
    for k, part in enumerate(parts):
        if not k % 2:
            parts[k] = re.sub(r"[\\*|]|(?<=\w)_(?!\w)", r"\\\g<0>", part)
            if k and re.match(r"\w", part):  # "`Thing`s"
                parts[k] = "\\ " + parts[k]
        elif not part.startswith("``") and not NAME.match(part[1:-1]):
            parts[k] = f"`{part}`"
    return "".join(parts)
