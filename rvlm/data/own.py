"""Somebody's own data set among ours: FILE.py:NAME, a callable (split, size) -> Data.

It is passed of `split` and `size` (pixels of a side, a `Fit`, or None) what its signature has. Without `split` it is
one split, whatever is asked for. What it returns is checked here: labels, numbers and first image.
"""

import dataclasses
import inspect

import torch

from rvlm.data.base import Data
from rvlm.data.images import Fit
from rvlm.plugins import file_sha, from_file

__all__ = ["load_own"]


def load_own(spec: str, split: str, size: int | Fit | None) -> Data:
    """Loads it, and notes the hash of its file.

    Raises:
        FileNotFoundError: no such file. ValueError: no such callable, a size that it does not take, or what it returns
            is no data set.
    """
    function = from_file(spec)
    takes = inspect.signature(function).parameters
    data = function(**{name: value for name, value in (("split", split), ("size", size)) if name in takes})
    if not isinstance(data, Data):
        raise ValueError(f"{spec} must return an rvlm.data.Data, it returned {type(data).__name__}")
    for name in ("y", "index"):
        rows = getattr(data, name)
        if not isinstance(rows, torch.Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
            raise ValueError(f"{spec}: {name} must be int64 [N]")
    if not len(data) or len(data.y) != len(data.index) or len(data.index.unique()) != len(data.index):
        raise ValueError(
            f"{spec}: {len(data.y)} labels, {len(data.index)} numbers, {len(data.index.unique())} different ones; "
            "expected a number of its own for every sample"
        )
    x = data.read(data.index[:1])
    if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[:2] != (1, 3):
        raise ValueError(f"{spec}: read(index [B]) must return uint8 [B, 3, H, W], it returned {x.dtype} {[*x.shape]}")
    side = size.size if isinstance(size, Fit) else size
    if side is not None and "size" not in takes and x.shape[2:] != (side, side):
        raise ValueError(f"{spec} takes no size, and its images have {x.shape[2]} x {x.shape[3]} pixels, not {side}")
    return dataclasses.replace(data, n_total=data.n_total or len(data), file_sha=file_sha(function))
