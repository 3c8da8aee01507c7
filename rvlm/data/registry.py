"""Data sets by name: what is known of each (registry.yaml), where it lies on disk, and whether it is what it should be.

    load_registered("caltech101@coop:/data", "test", 224)     # ROOT: $RVLM_DATA or ./data where none is given

A set may lie in several layouts, which are tried in the registry's order or named after @. They differ in their samples
(Caltech-101 has three test sets), so that the layout is a part of the data's name. ROOT/datasets.yaml may describe more
sets in the registry's format. Nothing is downloaded.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rvlm.data import listed
from rvlm.data.base import Data
from rvlm.data.files import load_folder
from rvlm.data.images import Fit
from rvlm.data.parquet import load_parquet
from rvlm.data.torchvision_sets import load_torchvision
from rvlm.data.wds import load_wds

__all__ = [
    "Entry",
    "Found",
    "Layout",
    "complaints",
    "data_root",
    "entries",
    "find",
    "load_registered",
    "located",
    "where",
]

LISTED = {"coop": listed.load_coop, "aircraft": listed.load_aircraft, "tiny": listed.load_tiny}
# By layout: the settings that it must have, and those that it may have.
SETTINGS: dict[str, tuple[set[str], set[str]]] = {
    "wds": ({"name"}, {"templates"}), "folder": ({"at"}, {"names"}), "torchvision": ({"name", "at"}, set()),
    "parquet": ({"at"}, set()), "karpathy": ({"at", "list", "images"}, set()),
    "coop": ({"at", "list", "images"}, set()), "aircraft": ({"at", "list"}, set()), "tiny": ({"at", "list"}, set()),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way in which a set may lie on disk.

    Attributes:
        kind: see registry.yaml.
        at: folders below the root where it is looked for.
        classes, counts: what it must hold, samples by split; None is unknown.
        settings: what is particular to its kind.
    """

    kind: str
    at: tuple[str, ...]
    classes: int | None
    counts: dict[str, int | None]
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known of a set; None is unknown."""

    name: str
    title: str
    layouts: tuple[Layout, ...]
    classes: int | None = None
    licence: str | None = None
    page: str | None = None
    dead: tuple[str, ...] = ()
    note: str | None = None
    prompt: str | None = None
    pixels: int | None = None

    @property
    def captions(self) -> bool:
        """Whether it has captions and no classes."""
        return any(layout.kind == "karpathy" for layout in self.layouts)


@dataclasses.dataclass(frozen=True)
class Found:
    """A layout of a set that is on disk, at `path`."""

    entry: Entry
    layout: Layout
    root: Path
    path: Path

    def open(self, split: str, size: int | Fit | None) -> Data:
        """The data as it is, whether or not it is what it should be."""
        kind, settings = self.layout.kind, self.layout.settings
        if self.entry.captions:
            raise ValueError(f"{self.entry.name} holds images with captions, no classes: it goes with rvlm eval alone")
        if kind == "wds":
            data = load_wds(str(self.path), split, size)
        elif kind == "folder":
            if split not in self.layout.counts:
                splits = ", ".join(self.layout.counts)
                raise ValueError(f"{self.entry.name} in {self.path} has the split {splits}, got {split!r}")
            data = load_folder(str(self.path), split, size)
            data = _called_by_imagenet(data) if settings.get("names") == "imagenet" else data
        elif kind == "torchvision":
            data = load_torchvision(settings["name"], str(self.root), split, size)
        elif kind == "parquet":
            data = load_parquet(str(self.path), split, size)
        else:
            images = {"images": settings["images"]} if "images" in settings else {}
            data = LISTED[kind](self.path, split, size, settings["list"], **images)
        template = data.template if data.template != "plain" else self.entry.prompt or "plain"
        return dataclasses.replace(data, name=f"{self.entry.name}@{kind}", template=template)


def data_root() -> Path:
    """Where data sets lie: $RVLM_DATA, or ./data."""
    return Path(os.environ.get("RVLM_DATA") or "data")


def entries(root: Path | None = None) -> dict[str, Entry]:
    """All sets by name, those of ROOT/datasets.yaml last."""
    bundled = _bundled()
    own = (root or data_root()) / "datasets.yaml"
    if not own.is_file():
        return bundled
    more = _read(own)
    if both := set(more) & set(bundled):
        raise ValueError(f"{own} describes {', '.join(sorted(both))}, which rvlm knows: give another name")
    return bundled | more


def find(entry: Entry, root: Path, kind: str | None = None) -> list[Found]:
    """The layouts that are there, in the registry's order; those of one kind if it is given."""
    return [
        Found(entry, layout, root, root / at)
        for layout in entry.layouts
        if kind in (None, layout.kind)
        for at in layout.at
        if _is_there(layout, root / at)
    ]


def load_registered(spec: str, split: str, size: int | Fit | None = None) -> Data:
    """NAME[@LAYOUT][:ROOT], with as many samples and classes as are known of it.

    Raises:
        FileNotFoundError: not there; says where it may lie and where it comes from. ValueError: unknown name or
        layout, or not what it should be.
    """
    found = located(spec)
    data = found.open(split, size)
    if wrong := complaints(found, data):
        raise ValueError(f"{spec} ({found.path}) is not what it should be: {'; '.join(wrong)}")
    return data


def located(spec: str) -> Found:
    """The first layout of NAME[@LAYOUT][:ROOT] that is there."""
    head, _, place = spec.partition(":")
    name, _, kind = head.partition("@")
    root = Path(place) if place else data_root()
    entry = entries(root)[name]
    kinds = [layout.kind for layout in entry.layouts]
    if kind and kind not in kinds:
        raise ValueError(f"{name} has the layouts {', '.join(kinds)}, got {kind!r}")
    if not (found := find(entry, root, kind or None)):
        gone = f" These addresses are known to be dead: {', '.join(entry.dead)}." if entry.dead else ""
        places = ", ".join(where(entry, root, kind or None))
        raise FileNotFoundError(
            f"{entry.title} is not in {root}: expected one of {places}. It comes from {entry.page or 'unknown'} "
            f"(licence: {entry.licence or 'unknown'}).{gone} See rvlm data get {name}."
        )
    return found[0]


def where(entry: Entry, root: Path, kind: str | None = None) -> list[str]:
    """Where a set may lie, as "LAYOUT PATH"."""
    return [
        f"{layout.kind} {root / at}{'/' + layout.settings['list'] if 'list' in layout.settings else ''}"
        for layout in entry.layouts
        if kind in (None, layout.kind)
        for at in layout.at
    ]


def complaints(found: Found, data: Data) -> list[str]:
    """What is wrong with the numbers of samples and classes."""
    expected, classes = found.layout.counts.get(data.split), found.layout.classes
    wrong = []
    if expected is not None and len(data) != expected:
        wrong.append(f"{len(data)} samples, expected {expected}")
    if classes is not None and len(data.class_names) != classes:
        wrong.append(f"{len(data.class_names)} classes, expected {classes}{_absent(found, data)}")
    outside = int(((data.y < 0) | (data.y >= len(data.class_names))).sum())
    if outside:
        wrong.append(f"{outside} labels outside 0 .. {len(data.class_names) - 1}")
        return wrong
    bare = (data.y.bincount(minlength=len(data.class_names)) == 0).nonzero().flatten().tolist()
    if bare and (wrong or expected is None):  # a set that is whole may have classes that a split lacks
        named = ", ".join(data.class_names[c] for c in bare[:5])
        wrong.append(f"{len(bare)} classes without samples: {named}{' ...' if len(bare) > 5 else ''}")
    return wrong


def _absent(found: Found, data: Data) -> str:
    """Which of all ImageNet classes have no folder."""
    if found.layout.settings.get("names") != "imagenet" or found.layout.classes != 1000:
        return ""
    import open_clip

    absent = [name for name in open_clip.IMAGENET_CLASSNAMES if name not in set(data.class_names)]
    return f" (without {', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''})" if absent else ""


@functools.cache
def _bundled() -> dict[str, Entry]:
    return _read(Path(__file__).with_name("registry.yaml"))


def _read(file: Path) -> dict[str, Entry]:
    import yaml

    told = yaml.safe_load(file.read_text())
    if not isinstance(told, dict):
        raise ValueError(f"{file} must map names of data sets to what is known of them")
    return {name: _entry(file, name, dict(known)) for name, known in told.items()}


def _entry(file: Path, name: str, known: dict[str, Any]) -> Entry:
    layouts = dict(known.pop("layouts", {}))
    layouts |= {} if "karpathy" in layouts else {"parquet": {"at": [f"parquet/{name}"]}}
    fields = {field.name for field in dataclasses.fields(Entry)} - {"name"}
    if unknown := set(known) - fields:
        raise ValueError(f"{file}: {name} has {', '.join(sorted(unknown))}, expected {', '.join(sorted(fields))}")
    for kind, settings in layouts.items():
        if kind not in SETTINGS:
            raise ValueError(f"{file}: {name} has the layout {kind!r}, expected {', '.join(SETTINGS)}")
        must, may = SETTINGS[kind]
        if not must <= set(settings) <= must | may | {"classes", "counts"}:
            raise ValueError(f"{file}: {name}, {kind} has {sorted(settings)}: expected {sorted(must)} and of counts, "
                             f"classes, {sorted(may)}")  # fmt: skip
    known["dead"] = tuple(known.get("dead", ()))
    kinds = tuple(_layout(kind, dict(settings), known.get("classes")) for kind, settings in layouts.items())
    return Entry(name=name, layouts=kinds, **{"title": name} | known)


def _layout(kind: str, settings: dict[str, Any], classes: int | None) -> Layout:
    if kind == "wds":
        at = [f"wds_{settings['name'].replace('/', '-')}", f"wds/{settings['name']}"]
    else:
        at = settings.pop("at")
    at = (at,) if isinstance(at, str) else tuple(at)
    return Layout(kind, at, settings.pop("classes", classes), settings.pop("counts", {}), settings)


def _is_there(layout: Layout, path: Path) -> bool:
    if layout.kind == "wds":
        return any(path.glob("*.tar")) or any(path.glob("*/*.tar"))
    if layout.kind == "parquet":
        return any(path.rglob("*.parquet"))
    return (path / layout.settings["list"]).is_file() if "list" in layout.settings else path.is_dir()


def _called_by_imagenet(data: Data) -> Data:
    """Class folders that are synsets (n01440764) or numbers of ImageNet's classes, under the names that CLIP uses."""
    import open_clip
    from timm.data import ImageNetInfo

    number: Callable[[str], int] | None = None
    synsets = {synset: c for c, synset in enumerate(ImageNetInfo().label_names())}
    if all(name in synsets for name in data.class_names):
        number = synsets.__getitem__
    elif all(name.isdecimal() and int(name) < len(synsets) for name in data.class_names):
        number = int
    if number is None:  # they have names of their own already, from a file beside them
        return data
    called = [number(name) for name in data.class_names]
    order = sorted(range(len(called)), key=called.__getitem__)  # "10" stands before "2" where folders are sorted
    place = torch.tensor(order).argsort()
    return dataclasses.replace(
        data, y=place[data.y], class_names=[open_clip.IMAGENET_CLASSNAMES[called[c]] for c in order]
    )
