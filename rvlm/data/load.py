"""How a spec becomes a data set."""

import difflib
from pathlib import Path

from rvlm.data.base import Data
from rvlm.data.digits import load_digits
from rvlm.data.files import load_folder, load_npz
from rvlm.data.images import Fit
from rvlm.data.parquet import load_parquet
from rvlm.data.registry import entries, load_registered
from rvlm.data.torchvision_sets import load_torchvision
from rvlm.data.wds import load_wds

__all__ = ["is_plain", "load_data", "rooted"]

LOADERS = {"npz": load_npz, "folder": load_folder, "wds": load_wds, "parquet": load_parquet}


def is_plain(spec: str) -> bool:
    """Whether a spec says itself how the data is to be read, instead of naming a set of the registry."""
    return spec == "digits" or spec.partition(":")[0] in (*LOADERS, "torchvision")


def rooted(spec: str, root: str | Path) -> str:
    """The spec of a set of the registry, with the folder where it lies; others as they are."""
    spec, halved, part = spec.partition("+classes=")
    named = not (is_plain(spec) or spec.startswith("captions:"))
    return f"{spec}:{root}{halved}{part}" if named else f"{spec}{halved}{part}"


def load_data(spec: str, split: str = "test", *, size: int | Fit | None = None, limit: int | None = None) -> Data:
    """Loads `digits`, `npz:PATH`, `folder:PATH`, `wds:PATH`, `parquet:PATH`, `torchvision:NAME:ROOT`, or a set of the
    registry, `NAME[@LAYOUT][:ROOT]` (see `rvlm.data.registry`). Nothing is ever downloaded.

    Args:
        spec: which data set. `wds` are WebDataset shards; torchvision's NAME is a class of torchvision.datasets, in any
            case. After it `+classes=base` or `+classes=new`, for one half of the classes (`Data.of_classes`).
        split: "train" or "test"; where there is one also "val", and what torchvision's class accepts. An npz file,
            and folders and tars outside of folders called like a split, are one split, whatever this says. What
            torchvision has without splits (Caltech101, SUN397, EuroSAT, ...) is "test", and any other split an error.
        size: resize the shorter side to `size` pixels (bicubic) and crop the centre; a `Fit` says it in detail. Needed
            where images differ in size.
        limit: this many samples, drawn with a fixed seed.

    Raises:
        FileNotFoundError: nothing there; says which layout is expected. ValueError: bad spec, split or content.
    """
    spec, halved, part = spec.partition("+classes=")
    kind, _, path = spec.partition(":")
    if spec == "digits":
        data = load_digits(split, size.size if isinstance(size, Fit) else size or 32)
    elif kind in LOADERS and path:
        data = LOADERS[kind](path, split, size)
    elif kind == "torchvision" and all(path.partition(":")):
        name, _, root = path.partition(":")
        data = load_torchvision(name, root, split, size)
    elif kind.partition("@")[0] in (known := entries(Path(path) if path else None)):
        data = load_registered(spec, split, size)
    else:
        close = difflib.get_close_matches(kind.partition("@")[0], known, 1)
        raise ValueError(
            f"unknown data {spec!r}{f'; did you mean {close[0]}?' if close else ''}: expected digits, npz:PATH, "
            "folder:PATH, wds:PATH, parquet:PATH, torchvision:NAME:ROOT or a name of rvlm ls datasets"
        )
    low, high = data.y.min().item(), data.y.max().item()
    if low < 0 or high >= len(data.class_names):
        raise ValueError(
            f"{spec}: labels span {low} .. {high}, but there are {len(data.class_names)} class names. Labels count "
            "from 0; correct them, or the names."
        )
    return (data.of_classes(part) if halved else data).limited(limit)
