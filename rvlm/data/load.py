"""How a spec becomes a data set."""

import dataclasses
import difflib
from pathlib import Path

from rvlm.data.base import Data
from rvlm.data.coop_shots import coop_few_shot
from rvlm.data.digits import load_digits
from rvlm.data.files import load_folder, load_npz
from rvlm.data.images import Fit
from rvlm.data.own import load_own
from rvlm.data.parquet import load_parquet
from rvlm.data.registry import entries, load_registered
from rvlm.data.torchvision_sets import load_torchvision
from rvlm.data.wds import load_wds
from rvlm.plugins import is_own

__all__ = ["is_plain", "load_data", "rooted"]

DRAWS = ("rvlm", "coop")
LOADERS = {"npz": load_npz, "folder": load_folder, "wds": load_wds, "parquet": load_parquet}


def is_plain(spec: str) -> bool:
    """Whether a spec says itself how the data is to be read, instead of naming a set of the registry."""
    return spec == "digits" or is_own(spec) or spec.partition(":")[0] in (*LOADERS, "torchvision")


def rooted(spec: str, root: str | Path) -> str:
    """The spec of a set of the registry, with the folder where it lies; others as they are."""
    spec, halved, part = spec.partition("+classes=")
    named = not (is_plain(spec) or spec.startswith("captions:"))
    return f"{spec}:{root}{halved}{part}" if named else f"{spec}{halved}{part}"


def load_data(
    spec: str, split: str = "test", *, size: int | Fit | None = None, limit: int | None = None,
    shots: int | None = None, seed: int = 0, draw: str = "rvlm",
) -> Data:  # fmt: skip
    """Loads `digits`, `npz:PATH`, `folder:PATH`, `wds:PATH`, `parquet:PATH`, `torchvision:NAME:ROOT`, `FILE.py:NAME`
    (your own, see `rvlm.data.own`), or a set of the registry, `NAME[@LAYOUT][:ROOT]` (see `rvlm.data.registry`).
    Nothing is ever downloaded.

    Args:
        spec: which data set. `wds` are WebDataset shards; torchvision's NAME is a class of torchvision.datasets, in any
            case. After it `+classes=base` or `+classes=new`, for one half of the classes (`Data.of_classes`).
        split: "train" or "test"; where there is one also "val", and what torchvision's class accepts. An npz file,
            and folders and tars outside of folders called like a split, are one split, whatever this says. What
            torchvision has without splits (Caltech101, SUN397, EuroSAT, ...) is "test", and any other split an error.
        size: resize the shorter side to `size` pixels (bicubic) and crop the centre; a `Fit` says it in detail. Needed
            where images differ in size.
        limit: this many samples, drawn with a fixed seed.
        shots, seed: this many samples of every class instead, drawn with the seed.
        draw: "rvlm" (`Data.few_shot`), or "coop", the samples that CoOp draws with this seed from its own lists, before
            it halves the classes (`rvlm.data.coop_shots`); of a set in its layout, split train or val.

    Raises:
        FileNotFoundError: nothing there; says which layout is expected. ValueError: bad spec, split or content.
    """
    if None not in (limit, shots):
        raise ValueError("limit and shots both choose the samples: give one of them")
    if draw not in DRAWS:
        raise ValueError(f"draw must be {' or '.join(DRAWS)}, got {draw!r}")
    if draw != "rvlm" and shots is None:
        raise ValueError(f"draw={draw!r} draws so many samples of every class: say how many, as shots")
    spec, halved, part = spec.partition("+classes=")
    kind, _, path = spec.partition(":")
    if spec == "digits":
        data = load_digits(split, size.size if isinstance(size, Fit) else size or 32)
    elif is_own(spec):
        data = load_own(spec, split, size)
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
            "folder:PATH, wds:PATH, parquet:PATH, torchvision:NAME:ROOT, FILE.py:NAME or a name of rvlm ls datasets"
        )
    low, high = data.y.min().item(), data.y.max().item()
    if low < 0 or high >= len(data.class_names):
        raise ValueError(
            f"{spec}: labels span {low} .. {high}, but there are {len(data.class_names)} class names. Labels count "
            "from 0; correct them, or the names."
        )
    chosen = data.of_classes(part) if halved else data
    if shots is None:
        return chosen.limited(limit)
    if draw == "rvlm":
        return chosen.few_shot(shots, seed)
    few = coop_few_shot(data, data if split == "train" else load_data(spec, "train", size=size), shots, seed)
    return dataclasses.replace(few.of_classes(part), n_total=chosen.n_total) if halved else few
