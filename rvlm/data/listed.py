"""Data sets whose samples stand in a list beside the images: CoOp's splits, FGVC-Aircraft and Tiny-ImageNet."""

import json
from collections import Counter
from pathlib import Path

import torch

from rvlm.data.base import Data
from rvlm.data.files import SPLITS, load_folder
from rvlm.data.images import Fit, Reader

__all__ = ["Files", "load_aircraft", "load_coop", "load_tiny", "read_json"]


def load_coop(root: Path, split: str, size: int | Fit | None, listing: str, images: str) -> Data:
    """ROOT/`listing`, CoOp's split_zhou_*.json: {split: [[path below ROOT/`images`, label, class name], ...]}.

    Raises:
        ValueError: a split, a label, a name or a path that is not as expected, named.
    """
    file = root / listing
    splits = read_json(file)
    if not isinstance(splits, dict) or split not in splits:
        has = ", ".join(splits) if isinstance(splits, dict) else type(splits).__name__
        raise ValueError(f"{file} has no split {split!r}: expected lists train, val and test, has {has}")
    try:
        parts = {part: [(str(path), int(c), str(name)) for path, c, name in of] for part, of in splits.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected samples [path, label, class name] ({error})") from None
    names: dict[int, str] = {}
    for path, label, name in (sample for part in parts.values() for sample in part):
        if names.setdefault(label, name) != name:
            raise ValueError(f"{file}: {path} calls class {label} {name!r}, others {names[label]!r}")
    if sorted(names) != [*range(len(names))]:
        raise ValueError(f"{file}: labels must count from 0 without a gap, got {sorted(names)[:5]} ...")
    class_names = [names[c].replace("_", " ") for c in range(len(names))]
    samples = [(path, label) for path, label, _ in parts[split]]
    return _listed(file, root / images, samples, class_names, split, size)


def load_aircraft(root: Path, split: str, size: int | Fit | None, listing: str) -> Data:
    """ROOT/variants.txt, the classes; ROOT/images_variant_SPLIT.txt, "NUMBER CLASS"; ROOT/images/NUMBER.jpg."""
    class_names = [line.strip() for line in (root / listing).read_text().splitlines() if line.strip()]
    number = {name: c for c, name in enumerate(class_names)}
    file = root / f"images_variant_{split}.txt"
    if not file.is_file():
        raise FileNotFoundError(f"no list {file}: expected those of the archive's data/ folder")
    lines = [line.strip().partition(" ") for line in file.read_text().splitlines() if line.strip()]
    unknown = [line for line in lines if line[2] not in number]
    if unknown:
        raise ValueError(f"{file}: {unknown[0][0]} is of class {unknown[0][2]!r}, which {root / listing} does not name")
    samples = [(f"{image}.jpg", number[name]) for image, _, name in lines]
    return _listed(file, root / "images", samples, class_names, split, size)


def load_tiny(root: Path, split: str, size: int | Fit | None, listing: str) -> Data:
    """ROOT/train/SYNSET/images/*.JPEG; ROOT/val/images/*.JPEG with ROOT/val/val_annotations.txt, "FILE\tSYNSET\t...".

    The test split of the archive has no labels, so test is val. Classes are the sorted synsets, called by the first of
    their words in ROOT/words.txt.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected {', '.join(SPLITS)}")
    words = dict(line.split("\t")[:2] for line in (root / "words.txt").read_text().splitlines() if "\t" in line)
    if split == "train":
        data = load_folder(str(root), split, size)
        data.class_names[:] = [words.get(name, name).split(",")[0] for name in data.class_names]
        return data
    lines = [line.split("\t") for line in (root / listing).read_text().splitlines() if line.strip()]
    if short := [line[0] for line in lines if len(line) < 2]:
        raise ValueError(f"{root / listing}: {short[0]!r} has no synset; expected FILE, tab, SYNSET on each line")
    synsets = sorted({line[1] for line in lines})
    number = {synset: c for c, synset in enumerate(synsets)}
    samples = [(line[0], number[line[1]]) for line in lines]
    class_names = [words.get(synset, synset).split(",")[0] for synset in synsets]
    return _listed(root / listing, root / "val" / "images", samples, class_names, split, size)


class Files:
    """number of a sample -> its bytes."""

    def __init__(self, folder: Path, paths: list[str]) -> None:
        self.folder, self.paths = folder, paths

    def __call__(self, i: int) -> bytes:
        return (self.folder / self.paths[i]).read_bytes()


def _listed(
    file: Path, images: Path, samples: list[tuple[str, int]], class_names: list[str], split: str,
    size: int | Fit | None,
) -> Data:  # fmt: skip
    if not samples:
        raise ValueError(f"{file} lists no samples for {split}")
    paths = [path for path, _ in samples]
    twice = [path for path, times in Counter(paths).items() if times > 1]
    if twice:
        raise ValueError(f"{file} lists {len(twice)} images twice for {split}: {', '.join(twice[:5])}")
    y = torch.tensor([label for _, label in samples])
    reader = Reader(Files(images, paths), images, paths, size)
    return Data(f"listed:{file.name}", split, class_names, y, torch.arange(len(y)), reader, "plain", len(y))


def read_json(file: Path):
    """What a JSON file holds; ValueError names the file that is none."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}). Fetch it again.") from None
