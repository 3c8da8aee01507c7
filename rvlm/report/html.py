"""A report as one HTML file: nothing is fetched, pictures are inside, it reads on a phone and in the dark."""

import base64
from pathlib import Path

from rvlm.files import write_bytes
from rvlm.report.tables import Table, cell

__all__ = ["write_html"]

# Columns of words; the others are of numbers and stand at the right.
WORDS = {
    "architecture", "attack", "authors", "checks", "data", "footnote", "link", "name", "says", "target", "title",
    "trust", "venue",
}  # fmt: skip
LEGEND = (
    'Accuracies in per cent with their 95 % Wilson interval. "white-box": the attack sees all of the model that is '
    'scored; "transfer": its images were made on another model.'
)


def write_html(
    path: str | Path,
    *,
    title: str,
    intro: str,
    tables: list[Table],
    figures: list[tuple[str, Path]],
    facts: dict[str, str],
    legend: str = LEGEND,
) -> Path:
    """Writes the page, whole or not at all.

    Args:
        path: where to.
        title, intro: heading and the paragraph under it.
        tables: one after the other, each can be sorted by its columns.
        figures: (caption, PNG file); the pictures are copied into the page. The caption is the text for those who do
            not see them, and the heading as far as its first colon.
        facts: what the numbers depend on, as a list at the end.
        legend: what the columns mean, under the tables.
    """
    from jinja2 import Environment, PackageLoader

    template = Environment(loader=PackageLoader("rvlm.report", "."), autoescape=True).get_template("report.html")
    page = template.render(
        title=title,
        intro=intro,
        tables=[
            {
                "title": table.title,
                "note": table.note,
                "headings": [(heading, column in WORDS) for column, heading in table.columns.items()],
                "rows": [[(cell(row, column), column in WORDS) for column in table.columns] for row in table.rows],
            }
            for table in tables
        ],
        figures=[
            (caption.partition(":")[0], caption, base64.b64encode(Path(png).read_bytes()).decode())
            for caption, png in figures
        ],
        facts=facts,
        legend=legend,
    )
    return write_bytes(path, page.encode())
