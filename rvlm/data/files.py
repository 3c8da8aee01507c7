"""Data sets on disk: npz arrays, and trees of class folders or zip archives of them. Nothing is downloaded."""

import json
import os
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from rvlm.data.base import Data
from rvlm.data.images import Fit, Reader, fit
from rvlm.data.rows import StoredRows, npz_rows

__all__ = ["SPLITS", "load_folder", "load_npz", "split_folder"]

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
SPLITS = {"train": ("train",), "test": ("test", "val"), "val": ("val", "test")}


def load_npz(path: str, split: str, size: int | Fit | None = None) -> Data:
    """Arrays `x` (uint8 or floats in [0, 1]; NHWC, NCHW, or NHW for grey) and `y` (integers), optionally `class_names`.

    Pixels are read when they are asked for (see `rvlm.data.rows`). Without `class_names`, a `classes.json` beside the
    file is read, else classes are called "0", "1", ...
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: expected an npz with arrays x [N, H, W, 3] uint8 and y [N]")
    with np.load(file, allow_pickle=False) as arrays:
        missing = {"x", "y"} - set(arrays.files)
        if missing:
            raise ValueError(f"{file} lacks {sorted(missing)}: expected x [N, H, W, 3] and y [N], has {arrays.files}")
        y = torch.as_tensor(arrays["y"].astype(np.int64))
        names = [str(name) for name in arrays["class_names"]] if "class_names" in arrays.files else None
    read = _Pixels(npz_rows(file, "x"), file, size)
    if y.shape != (len(read.rows),):
        raise ValueError(f"{file}: y must have shape [{len(read.rows)}] like x, got {list(y.shape)}")
    if not len(y):
        raise ValueError(f"{file} holds no samples")
    names = names or _names_beside(file, None) or [str(c) for c in range(int(y.max()) + 1)]
    return Data(f"npz:{file.name}", split, names, y, torch.arange(len(y)), read, "plain", len(y))


def load_folder(path: str, split: str, size: int | Fit | None = None) -> Data:
    """A tree ROOT/<class>/<image> or ROOT/<split>/<class>/<image>, or a .zip of one. Images are decoded when read.

    Classes are the sorted folder names; a `classes.json` in ROOT or beside the zip may hold their names (a list in that
    order, a mapping from folder name to words, or ImageNet's list of {"wnid", "words"}).
    """
    root = Path(path)
    if root.is_file() and zipfile.is_zipfile(root):
        archive = zipfile.ZipFile(root)
        names = [name for name in archive.namelist() if not name.endswith("/")]
        open_bytes: Callable[[str], bytes] = archive.read
    elif root.is_dir():
        names = _files_below(root)
        open_bytes = lambda name: (root / name).read_bytes()  # noqa: E731
    else:
        raise FileNotFoundError(
            f"no folder or zip {root}: expected {root}/<class>/<image> or {root}/{split}/<class>/<image>"
        )
    files = sorted(name for name in names if PurePosixPath(name).suffix.lower() in IMAGES)
    if not files:
        raise ValueError(f"{root} holds no images ({', '.join(sorted(IMAGES))}): expected {root}/<class>/<image>")
    folder = split_folder(split, {name.split("/")[0] for name in files}, root)
    prefix = f"{folder}/" if folder else ""
    files = [name for name in files if name.startswith(prefix)]
    labels = [PurePosixPath(name[len(prefix) :]).parts for name in files]
    if any(len(parts) < 2 for parts in labels):
        stray = files[[len(parts) < 2 for parts in labels].index(True)]
        raise ValueError(f"{root}: {stray} is in no class folder; expected {prefix}<class>/<image>")
    classes = sorted({parts[0] for parts in labels})
    empty = _empty_classes(root, prefix, classes)
    if empty:
        raise ValueError(f"{root}: class folder(s) without images: {', '.join(empty)}. Remove or fill them.")
    number = {name: c for c, name in enumerate(classes)}
    y = torch.tensor([number[parts[0]] for parts in labels])
    reader = Reader(lambda i: open_bytes(files[i]), root, files, size)
    class_names = _names_beside(root, classes) or [name.replace("_", " ") for name in classes]
    return Data(f"folder:{root.name}", split, class_names, y, torch.arange(len(y)), reader, "plain", len(y))


def _files_below(root: Path) -> list[str]:
    """Paths relative to root, with slashes; behind links, too, as people lay out large sets."""
    names = []
    for folder, _, found in os.walk(root, followlinks=True):
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        names += [f"{prefix}{name}".removeprefix("./") for name in found]
    return names


class _Pixels:
    """index [B] -> uint8 pixels [B, 3, H, W], out of an array of uint8 or floats in [0, 1] in any of the shapes."""

    def __init__(self, rows: StoredRows, file: Path, size: int | Fit | None) -> None:
        self.rows, shape = rows, rows.shape if len(rows.shape) != 3 else (*rows.shape, 1)
        if len(shape) != 4:
            raise ValueError(f"{file}: x must be [N, H, W, 3], [N, 3, H, W] or [N, H, W], got shape {list(shape)}")
        if np.issubdtype(rows.dtype, np.floating):
            _check_range(rows, file)
        elif rows.dtype != np.uint8:
            raise ValueError(f"{file}: x must be uint8 or floats in [0, 1], got {rows.dtype}")
        self.last = shape[-1] in (1, 3)  # where the channels are
        if not self.last and shape[1] not in (1, 3):
            raise ValueError(f"{file}: x has no axis of 1 or 3 channels, shape {list(shape)}")
        sides = shape[1:3] if self.last else shape[2:]
        self.size = size if isinstance(size, Fit) or (size is not None and sides != (size, size)) else None

    def __call__(self, index: Tensor) -> Tensor:
        x = self.rows(index)
        if x.dtype != np.uint8:
            x = np.round(x * 255).astype(np.uint8)
        pixels = torch.from_numpy(x if x.ndim == 4 else x[..., None])
        pixels = (pixels.permute(0, 3, 1, 2) if self.last else pixels).expand(-1, 3, -1, -1)
        if self.size is None:
            return pixels
        from PIL import Image

        fitted = [fit(Image.fromarray(each.permute(1, 2, 0).numpy()), self.size) for each in pixels]
        side = self.size.size if isinstance(self.size, Fit) else self.size
        return torch.stack(fitted) if fitted else torch.zeros(0, 3, side, side, dtype=torch.uint8)


def _check_range(rows: StoredRows, file: Path) -> None:
    for x in rows.pieces():
        if not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
            raise ValueError(f"{file}: float pixels must lie in [0, 1], got [{x.min():.4g}, {x.max():.4g}]")


def split_folder(split: str, there: Collection[str], root: Path) -> str:
    """Which of the folders `there` holds the split; "" where no folder is called like a split: then all of it does.

    "test" may be called val, and "val" test.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected train, test or val")
    splits = sorted(set(there) & set(SPLITS))
    if not splits:
        return ""
    for candidate in SPLITS[split]:
        if candidate in splits:
            return candidate
    raise ValueError(f"{root} has no split {split!r}, only {', '.join(splits)}: choose one of those")


def _empty_classes(root: Path, prefix: str, classes: list[str]) -> list[str]:
    if not root.is_dir():
        return []
    return sorted({p.name for p in (root / prefix).iterdir() if p.is_dir()} - set(classes))


def _names_beside(path: Path, folders: list[str] | None) -> list[str] | None:
    file = (path if path.is_dir() else path.parent) / "classes.json"
    if not file.is_file():
        return None
    names = json.loads(file.read_text())
    if isinstance(names, list) and names and isinstance(names[0], dict):  # ImageNet's lists: [{"wnid", "words"}, ...]
        names = {entry["wnid"]: entry["words"] for entry in names}
    if isinstance(names, dict):
        if folders is None or not set(folders) <= set(names):
            return None
        names = [names[folder] for folder in folders]
    elif folders is not None and len(names) != len(folders):
        raise ValueError(f"{file} names {len(names)} classes, but there are {len(folders)} class folders")
    elif folders is not None and set(names) == set(folders):
        return folders  # a list of the folder names in another order: labels follow the sorted folders
    return [name if isinstance(name, str) else name[0] for name in names]
