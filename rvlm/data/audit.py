"""Looking through data sets on disk: what is there, how much of it, and which images cannot be read."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from rvlm.data.base import Data
from rvlm.data.captions import load_captions
from rvlm.data.images import Reader
from rvlm.data.load import is_plain, load_data
from rvlm.data.registry import SETTINGS, complaints, data_root, entries, find

__all__ = ["Audit", "audit"]


@dataclasses.dataclass(frozen=True)
class Audit:
    """One line of what was found.

    Attributes:
        name: the set and its layout, or the spec.
        status: ok, partly (there, but not as it should be), or missing.
        samples, expected: None is unknown.
        problems: sentences.
    """

    name: str
    status: str
    path: str = ""
    samples: int | None = None
    expected: int | None = None
    problems: tuple[str, ...] = ()


def audit(spec: str, split: str = "test", images: bool = True) -> list[Audit]:
    """Every layout of NAME[@LAYOUT][:ROOT] that is there, or the one set of another data spec.

    Args:
        spec: as for `load_data`.
        split: of the data.
        images: decode every image.

    Raises:
        ValueError: a spec that names nothing.
    """
    head, _, place = spec.partition(":")
    name, _, kind = head.partition("@")
    root = Path(place) if place else data_root()
    if is_plain(spec) or head == "captions":
        load = load_captions if head == "captions" else load_data
        return [_looked_through(spec, "", None, functools.partial(load, spec, split), lambda data: [], images)]
    if "+classes=" in spec:
        raise ValueError(f"{spec}: whole sets are looked through, leave +classes= out")
    if (entry := entries(root).get(name)) is None:
        load_data(spec)  # says what is wrong with the name
    if kind and kind not in SETTINGS:
        raise ValueError(f"unknown layout {kind!r}: expected {', '.join(SETTINGS)}")
    audits = []
    for found in find(entry, root, kind or None):
        line, expected = f"{name}@{found.layout.kind}", found.layout.counts.get(split)
        load, complain = functools.partial(found.open, split, None), functools.partial(complaints, found)
        if entry.captions:  # which check their number when they are loaded
            load, complain = functools.partial(load_captions, f"{line}:{root}", split), lambda data: []
        audits.append(_looked_through(line, str(found.path), expected, load, complain, images))
    return audits or [Audit(head, "missing", str(root))]


def _looked_through(
    name: str, path: str, expected: int | None, load: Callable[[], Data], complain: Callable[[Data], list[str]],
    images: bool,
) -> Audit:  # fmt: skip
    try:
        data = load()
    except FileNotFoundError as error:
        return Audit(name, "partly" if path else "missing", path, None, expected, (str(error),))
    except (ValueError, ImportError) as error:
        return Audit(name, "partly", path, None, expected, (str(error),))
    problems = complain(data) + (_broken(data, name) if images else [])
    return Audit(name, "partly" if problems else "ok", path, len(data), expected, tuple(problems))


def _broken(data: Data, name: str) -> list[str]:
    """Images that cannot be decoded, counted, the first ones named."""
    from tqdm import tqdm

    if not isinstance(data.read, Reader):
        return []
    broken = []
    for i in tqdm(data.index.tolist(), desc=f"reading {name}", disable=None, leave=False, unit="image"):
        try:
            data.read.image(i)
        except ValueError as error:
            broken.append((data.read.name(i), error.__cause__))
    if not broken:
        return []
    named = "; ".join(f"{image} ({why})" for image, why in broken[:5])
    return [f"{len(broken)} images cannot be decoded: {named}{' ...' if len(broken) > 5 else ''}"]
