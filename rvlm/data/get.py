"""How to come by a data set: what is known of its source and licence, where to put it, and what torchvision fetches."""

import inspect
from pathlib import Path

from rvlm.data.registry import Entry, find, where
from rvlm.data.torchvision_sets import arguments

__all__ = ["fetch", "fetchable", "instructions"]

HUB = "https://huggingface.co/datasets/clip-benchmark"


def instructions(entry: Entry, root: Path) -> str:
    """What to do, in words. Addresses stand as they were published; whether they answer today is not known."""
    lines = [
        f"{entry.name}: {entry.title}",
        f"  classes   {entry.classes or 'unknown'}",
        *([f"  pixels    {entry.pixels} x {entry.pixels}"] if entry.pixels else []),
        f"  licence   {entry.licence or 'unknown'}",
        f"  source    {entry.page or 'unknown'}",
        *(f"  dead      {address}" for address in entry.dead),
        *([f"  note      {entry.note}"] if entry.note else []),
        "  put it at one of",
    ]
    for layout in entry.layouts:
        counts = ", ".join(f"{split} {n or 'unknown'}" for split, n in layout.counts.items()) or "unknown"
        lines += [f"    {place} (samples: {counts})" for place in where(entry, root, layout.kind)]
        if layout.kind == "wds":
            lines.append(f"      from {HUB}/wds_{layout.settings['name'].replace('/', '-')}")
        if "templates" in layout.settings:
            n, sha = layout.settings["templates"]
            lines.append(f"      templates of CLIP_benchmark: {n}, hash {sha}")
    there = [f"{found.layout.kind} {found.path}" for found in find(entry, root)]
    return "\n".join([*lines, f"  found     {', '.join(there) or 'nothing yet'}"])


def fetchable(entry: Entry) -> str | None:
    """The class of torchvision that downloads the set, if there is one and its address answers as far as is known."""
    from torchvision import datasets

    for layout in entry.layouts:
        if layout.kind == "torchvision" and not entry.dead:
            kind = getattr(datasets, layout.settings["name"], None)
            if kind is not None and "download" in inspect.signature(kind).parameters:
                return layout.settings["name"]
    return None


def fetch(entry: Entry, root: Path) -> None:
    """Lets torchvision download all splits of the set into `root`.

    Raises:
        FileNotFoundError: it cannot, or it could not.
    """
    from torchvision import datasets

    if (name := fetchable(entry)) is None:
        raise FileNotFoundError(f"torchvision does not fetch {entry.name}: put it where rvlm data get says")
    layout = next(layout for layout in entry.layouts if layout.kind == "torchvision")
    root.mkdir(parents=True, exist_ok=True)
    for split in layout.counts:
        try:
            getattr(datasets, name)(str(root), **arguments(name, split) | {"download": True})
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(f"torchvision could not fetch {name} ({split}): {error}") from error
