"""Writing files so that a reader never sees half of one. A leaf that every layer may use."""

import os
import tempfile
from pathlib import Path

__all__ = ["cache_root", "write_bytes"]


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Writes a whole file, or leaves the old one: a kill, an error or a full disk never leaves half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def cache_root() -> Path:
    """Where things that are made once are kept: $RVLM_CACHE, or ~/.cache/rvlm."""
    return Path(os.environ.get("RVLM_CACHE") or Path.home() / ".cache" / "rvlm")
