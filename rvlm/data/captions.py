"""Images with captions, for retrieval: Flickr30k and COCO, split by Karpathy's JSON files or as CLIP_benchmark's tars.

Nothing is downloaded.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from rvlm.data.base import Data
from rvlm.data.images import Fit, Reader
from rvlm.data.listed import Files, read_json
from rvlm.data.load import is_plain
from rvlm.data.registry import data_root, entries, located
from rvlm.data.wds import indexed

__all__ = ["Captions", "holds_captions", "load_captions"]


@dataclasses.dataclass(frozen=True)
class Captions(Data):
    """A split whose images have captions and no classes: y is 0 everywhere, class_names is empty.

    texts: T captions, image by image. owner: int64 [T], the number (see `index`) of the image whose caption each is.
    """

    texts: list[str] = dataclasses.field(default_factory=list)
    owner: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def subset(self, rows: Tensor, rule: str) -> "Captions":
        """The images at `rows`, which keep their numbers, and their captions alone."""
        kept = torch.isin(self.owner, self.index[rows])
        texts = [self.texts[t] for t in kept.nonzero().flatten().tolist()]
        return dataclasses.replace(super().subset(rows, rule), texts=texts, owner=self.owner[kept])

    @property
    def rows(self) -> Tensor:
        """int64 [T], the row of each caption's image."""
        order = self.index.argsort()
        return order[torch.searchsorted(self.index[order], self.owner)]

    @property
    def fingerprint(self) -> str:
        """Hash of names, captions and sample numbers: equal for equal evaluations."""
        text = json.dumps([self.name, self.split, self.index.tolist(), self.texts, self.owner.tolist()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def holds_captions(spec: str) -> bool:
    """Whether a data spec names images with captions."""
    kind, _, place = spec.partition(":")
    if kind == "captions" or is_plain(spec):
        return kind == "captions"
    entry = entries(Path(place) if place else data_root()).get(kind.partition("@")[0])
    return entry is not None and entry.captions


def load_captions(
    spec: str, split: str = "test", *, size: int | Fit | None = None, limit: int | None = None
) -> Captions:
    """Loads `captions:FILE.json`, whose images lie beside it, or a set of the registry, `flickr30k[:ROOT]`.

    Args:
        spec: as above.
        split: "train" (COCO's restval, too), "val" or "test".
        size: see `load_data`.
        limit: this many images, drawn with a fixed seed; the gallery is smaller then, and recall higher.

    Raises:
        FileNotFoundError: nothing there. ValueError: another format or split, images that are missing, named twice or
        without a caption, or another number of images than is known of the set.
    """
    kind, _, place = spec.partition(":")
    if kind == "captions" and place:
        file = Path(place)
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}: expected one of Karpathy's dataset_*.json")
        return _read(file, [file.parent], f"captions:{file.name}", split, size).limited(limit)
    found = located(spec)
    settings, expected = found.layout.settings, found.layout.counts.get(split)
    name = f"{found.entry.name}@{found.layout.kind}"
    if found.layout.kind == "wds":
        data = _read_wds(found.path, name, split, size)
    else:
        folders = [found.path / folder for folder in settings["images"]]
        data = _read(found.path / settings["list"], folders, name, split, size)
    if expected is not None and len(data) != expected:
        raise ValueError(f"{spec} ({found.path}) has {len(data)} images for {split}, expected {expected}")
    return data.limited(limit)


def _read(file: Path, folders: list[Path], name: str, split: str, size: int | Fit | None) -> Captions:
    told = read_json(file)
    images = told.get("images") if isinstance(told, dict) else None
    wanted = {"train": ("train", "restval")}.get(split, (split,))
    try:
        chosen = [image for image in images if image["split"] in wanted]
        paths = [str(Path(image.get("filepath", "")) / image["filename"]) for image in chosen]
        sentences = [[sentence["raw"].strip() for sentence in image["sentences"]] for image in chosen]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file}: expected images with filename, split and sentences with raw, as Karpathy's files have ({error!r})"
        ) from None
    if not chosen:
        splits = ", ".join(sorted({image["split"] for image in images}))
        raise ValueError(f"{file} has no images for {split!r}: it has {splits or 'none at all'}")
    if twice := [path for path, times in Counter(paths).items() if times > 1]:
        raise ValueError(f"{file} lists {len(twice)} images twice for {split}: {', '.join(twice[:5])}")
    folder = next((folder for folder in folders if (folder / paths[0]).is_file()), folders[0])
    if absent := [path for path in paths if not (folder / path).is_file()]:
        raise FileNotFoundError(f"{len(absent)} of {len(paths)} images are not in {folder}, the first is {absent[0]}")
    return _captions(file, name, split, sentences, Reader(Files(folder, paths), folder, paths, size))


def _read_wds(root: Path, name: str, split: str, size: int | Fit | None) -> Captions:
    """CLIP_benchmark's tars: KEY.txt holds a caption on each line."""
    _, names, told, get = indexed(root, split, "txt")
    sentences = [[line.strip() for line in content.decode().splitlines()] for content in told]
    return _captions(root, name, split, sentences, Reader(get, root, names, size))


def _captions(where: Path, name: str, split: str, sentences: list[list[str]], reader: Reader) -> Captions:
    if mute := [reader.name(i) for i, texts in enumerate(sentences) if not any(texts)]:
        raise ValueError(f"{where}: {len(mute)} images have no caption, the first is {mute[0]}")
    texts = [(i, text) for i, own in enumerate(sentences) for text in own if text]
    index = torch.arange(len(sentences))
    return Captions(
        name, split, [], torch.zeros_like(index), index, reader, n_total=len(index),
        texts=[text for _, text in texts], owner=torch.tensor([i for i, _ in texts]),
    )  # fmt: skip
