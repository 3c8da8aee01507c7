"""A report as one HTML file: nothing is fetched, pictures are inside, it reads on a phone and in the dark."""

import base64
from pathlib import Path
from typing import Any

from rvlm.files import write_bytes
from rvlm.report.tables import COLUMNS, cell

__all__ = ["write_html"]


def write_html(
    path: str | Path,
    *,
    title: str,
    intro: str,
    rows: list[dict[str, Any]],
    figures: list[tuple[str, Path]],
    facts: dict[str, str],
) -> Path:
    """Writes the page, whole or not at all.

    Args:
        path: where to.
        title, intro: heading and the paragraph under it.
        rows: summary rows for the table.
        figures: (caption, PNG file); the pictures are copied into the page.
        facts: what the numbers depend on, as a list at the end.
    """
    from jinja2 import Environment, PackageLoader

    template = Environment(loader=PackageLoader("rvlm.report", "."), autoescape=True).get_template("report.html")
    page = template.render(
        title=title,
        intro=intro,
        headings=list(COLUMNS.values()),
        rows=[[cell(row, column) for column in COLUMNS] for row in rows],
        figures=[(caption, base64.b64encode(Path(png).read_bytes()).decode()) for caption, png in figures],
        facts=facts,
    )
    return write_bytes(path, page.encode())
