"""Writing files so that a reader never sees half of one. A leaf that every layer may use."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["cache_root", "whole_file", "write_bytes"]


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Writes a whole file, or leaves the old one: a kill, an error or a full disk never leaves half of it."""
    with whole_file(path) as file:
        file.write(content)
    return Path(path)


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """The same for what is written piece by piece: the file takes its place when the block has ended."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(temporary, 0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def cache_root() -> Path:
    """Where things that are made once are kept: $RVLM_CACHE, or ~/.cache/rvlm."""
    return Path(os.environ.get("RVLM_CACHE") or Path.home() / ".cache" / "rvlm")
