"""Links between Markdown files, on the site.

They work where the repository is read. Here those to files that the site does not hold become the file's name, and
those to files that it shows a copy of lead to the copy.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["relinked"]

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
PAGES = (".md", ".rst", ".ipynb")


def relinked(text: str, file: Path, page: Path, docs: Path, copies: Mapping[Path, Path]) -> str:
    """The Markdown of `file` as that of `page`.

    Args:
        text: of the file.
        file: where it lies in the repository, absolute, as all paths here.
        page: where it is shown.
        docs: the folder of the site.
        copies: pages by the files outside `docs` that they show.
    """

    def link(match: re.Match) -> str:
        said, path, anchor = match.groups(default="")
        target = (file.parent / path).resolve()
        shown = target if target.is_relative_to(docs) and target.suffix in PAGES else copies.get(target)
        if shown is None:
            name = os.path.relpath(target, docs.parent)
            return said if name in said else f"{said} (`{name}`)"
        return f"[{said}]({os.path.relpath(shown, page.parent)}{anchor})"

    fences = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if k % 2 else LINK.sub(link, part) for k, part in enumerate(fences))
