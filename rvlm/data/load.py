"""How a spec becomes a data set."""

from rvlm.data.base import Data
from rvlm.data.digits import load_digits
from rvlm.data.files import load_folder, load_npz

__all__ = ["load_data"]


def load_data(spec: str, split: str = "test", *, size: int | None = None, limit: int | None = None) -> Data:
    """Loads `digits`, `npz:PATH` or `folder:PATH`.

    Args:
        spec: which data set.
        split: "train" or "test"; for folders also "val". An npz file is one split, whatever this says.
        size: resize the shorter side to `size` pixels (bicubic) and crop the centre. Needed for folders whose images
            differ in size.
        limit: this many samples, drawn with a fixed seed.

    Raises:
        FileNotFoundError: nothing there; says which layout is expected. ValueError: bad spec, split or content.
    """
    kind, _, path = spec.partition(":")
    if spec == "digits":
        data = load_digits(split, size or 32)
    elif kind == "npz" and path:
        data = load_npz(path, split, size)
    elif kind == "folder" and path:
        data = load_folder(path, split, size)
    else:
        raise ValueError(f"unknown data {spec!r}: expected digits, npz:PATH or folder:PATH")
    low, high = data.y.min().item(), data.y.max().item()
    if low < 0 or high >= len(data.class_names):
        raise ValueError(f"{spec}: labels span {low} .. {high}, but there are {len(data.class_names)} class names")
    return data.limited(limit)
