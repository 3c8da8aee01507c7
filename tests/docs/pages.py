"""What tests take out of pages of documentation: code and command lines."""

import re
import shlex
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def files(page: str | Path) -> dict[str, str]:
    """The Python files that a page shows, by name: a name in backticks on a line of its own, then the code."""
    return dict(re.findall(r"^`(\w+\.py)`\n\n```python\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S))


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `rvlm` in the page's bash blocks, torchrun's too."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index("rvlm") + 1 :] for line in words if "rvlm" in line]
