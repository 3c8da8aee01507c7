"""WebDataset shards on disk, in the layout of CLIP_benchmark: tars that hold KEY.webp and KEY.cls (or, for captions,
KEY.txt), side by side.

Shards are made to be streamed. Here every tar is indexed once, so that samples can be read in any order, as from any
other data set. Nothing is downloaded.
"""

import re
import tarfile
from pathlib import Path

import numpy as np
import torch

from rvlm.data.base import Data
from rvlm.data.files import SPLITS, split_folder
from rvlm.data.images import Fit, Reader

__all__ = ["NAMES", "TEMPLATES", "indexed", "load_wds"]

IMAGES = ("jpg", "jpeg", "png", "webp")
NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
KINDS = {"cls": ("label", "the number of its class"), "txt": ("caption", "a caption on each line")}
CLASS = re.compile(rb"\s*\d{1,7}\s*")


def load_wds(path: str, split: str, size: int | Fit | None = None) -> Data:
    """ROOT/<split>/0.tar ... with ROOT/<split>/nshards.txt, their number; or a folder of tars; or one tar.

    A folder without nshards.txt is read whole, in the order of its tars' names. Where there are no folders called
    train, test or val, the tars are one split, whatever `split` says. KEY.cls holds the number of the class. Keys end
    at the first dot and are unique in their tar. Class names are the lines of ROOT/classnames.txt, or the folder's;
    without, classes are called "0", "1", ... Prompts are those of zeroshot_classification_templates.txt beside it.

    Raises:
        FileNotFoundError: no tars there. ValueError: a split, a tar, a sample or a label that is not as expected.
    """
    root = Path(path)
    folder, names, labels, get = indexed(root, split, "cls")
    y = torch.tensor([int(label) for label in labels])
    class_names = _class_names(folder) or [str(c) for c in range(int(y.max()) + 1)]
    reader = Reader(get, root, names, size)
    template = f"file:{told}" if (told := _beside(folder, TEMPLATES)) else "plain"
    return Data(f"wds:{root.name}", split, class_names, y, torch.arange(len(y)), reader, template, len(y))


def indexed(root: Path, split: str, beside: str) -> tuple[Path, list[str], list[bytes], "_Members"]:
    """The folder with the tars of a split; of its samples the names, what KEY.`beside` holds, and how to get them."""
    from tqdm import tqdm

    folder, tars = _tars(root, split)
    names, told, places = [], [], []
    for number, tar in enumerate(tqdm(tars, desc=f"indexing {root.name}", disable=None, leave=False, unit="tar")):
        for name, content, offset, length in _index(tar, beside):
            names.append(f"{tar.name}/{name}")
            told.append(content)
            places.append((number, offset, length))
    if not names:
        raise ValueError(f"{root} holds no samples: expected KEY.{', .'.join(IMAGES)} and KEY.{beside} in the tars")
    return folder, names, told, _Members(tars, np.array(places))


class _Members:
    """number of a sample -> its bytes. A tar is opened for each: that is 2 us of the 150 that decoding takes."""

    def __init__(self, tars: list[Path], places: np.ndarray) -> None:
        self.tars, self.places = tars, places  # int64 [N, 3]: number of the tar, offset, length

    def __call__(self, i: int) -> bytes:
        number, offset, length = self.places[i].tolist()
        with self.tars[number].open("rb") as file:
            file.seek(offset)
            found = file.read(length)
        if len(found) != length:
            raise OSError(f"{self.tars[number].name} was cut off after it was indexed")
        return found


def _tars(root: Path, split: str) -> tuple[Path, list[Path]]:
    """The folder with the tars of the split, and the tars in order."""
    if root.is_file():
        split_folder(split, [], root)
        return root.parent, [root]
    folder = root / split_folder(split, [name for name in SPLITS if (root / name).is_dir()], root)
    tars = [tar for tar in folder.glob("*.tar") if not tar.name.startswith(".")]
    tars = sorted(tars, key=lambda tar: (len(tar.name), tar.name))  # 2.tar before 10.tar
    count = folder / "nshards.txt"
    if not tars and not count.is_file():
        raise FileNotFoundError(
            f"no tars in {folder}: expected {root}/{split}/nshards.txt and {root}/{split}/0.tar ..., a folder of tars, "
            "or a tar"
        )
    if count.is_file():
        _check_count(count, [tar.name for tar in tars])
    return folder, tars


def _check_count(count: Path, there: list[str]) -> None:
    text = count.read_text().strip()
    if not text.isdecimal():
        raise ValueError(f"{count} holds {text[:40]!r}: expected the number of tars beside it")
    n = int(text)
    if len(there) != n or there != [f"{k}.tar" for k in range(n)]:
        missing = next((f"{k}.tar" for k in range(n) if f"{k}.tar" not in there), None)
        raise ValueError(
            f"{count} says {n}, but beside it are {len(there)} tars{f', without {missing}' if missing else ''}: "
            f"expected 0.tar ... {n - 1}.tar. Complete the tars, or correct the number."
        )


def _index(tar: Path, beside: str) -> list[tuple[str, bytes, int, int]]:
    """File name, what stands beside it, offset and length of every image of a tar, in its order."""
    images, told = _parts(tar, beside)
    what, expected = KINDS[beside]
    for key in (*images, *told):
        if key not in told:
            raise ValueError(f"{tar}: {images[key][0]} has no {what}; expected {key}.{beside} with {expected}")
        if key not in images:
            raise ValueError(f"{tar}: {key}.{beside} has no image; expected {key}.{', .'.join(IMAGES)} in the same tar")
        if beside == "cls" and not CLASS.fullmatch(told[key]):
            raise ValueError(f"{tar}: {key}.cls holds {told[key][:40]!r}; expected the number of a class: 0, 1, ...")
    return [(name, told[key], offset, length) for key, (name, offset, length) in images.items()]


def _parts(tar: Path, beside: str) -> tuple[dict[str, tuple[str, int, int]], dict[str, bytes]]:
    """By key: file name, offset and length of the images, and what the files beside them hold."""
    images, told = {}, {}
    try:
        with tarfile.open(tar, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile keeps all that it has seen
                folder, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = folder + slash + stem, suffix.lower()
                if not member.isfile() or not stem or suffix not in (*IMAGES, beside):
                    continue
                if key in (told if suffix == beside else images):
                    what = f"{KINDS[beside][0]}s" if suffix == beside else "images"
                    raise ValueError(f"{tar}: {key} has two {what} ({member.name}). Keys must be unique; rename one.")
                if suffix == beside:
                    told[key] = archive.extractfile(member).read()
                else:
                    images[key] = member.name, member.offset_data, member.size
            # tarfile takes garbage, and a file that was cut off between two members, for the end.
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end-of-archive mark")
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{tar} is not a whole, uncompressed tar ({error}). Fetch or write it again.") from error
    return images, told


def _class_names(folder: Path) -> list[str] | None:
    if (file := _beside(folder, NAMES)) is None:
        return None
    names = [name.strip() for name in file.read_text(encoding="utf-8").rstrip().split("\n")]
    if "" in names:
        raise ValueError(f"{file}: line {names.index('') + 1} is empty; expected the name of a class on each")
    return names


def _beside(folder: Path, name: str) -> Path | None:
    """The file of that name in the folder, or beside it where it is the folder of a split."""
    places = (folder, folder.parent) if folder.name in SPLITS else (folder,)
    return next((place / name for place in places if (place / name).is_file()), None)
