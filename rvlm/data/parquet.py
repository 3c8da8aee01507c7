"""Parquet files as Hugging Face's hub stores data sets of images; needs pyarrow (pip install "rvlm[parquet]")."""

import bisect
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from rvlm.data.base import Data
from rvlm.data.files import split_folder
from rvlm.data.images import Fit, Reader

__all__ = ["load_parquet"]

LARGEST_GROUP, FEW = 1 << 26, 16  # bytes of a group of rows that is held whole, and rows that are held of a larger one
IMAGES, LABELS = ("image", "img"), ("label", "labels", "fine_label", "cls")


def load_parquet(path: str, split: str, size: int | Fit | None = None) -> Data:
    """ROOT/**/SPLIT-*.parquet or ROOT/**/SPLIT/*.parquet, in the order of their names; or one file, whatever the split.
    Of files called ...-K-of-N.parquet all N must be there.

    Columns: image or img, the bytes of an image file, plain or as a struct with the field `bytes`; label (or labels,
    fine_label, cls), integers. Names of classes stand in the files' metadata; without, they are called "0", "1", ...

    Raises:
        FileNotFoundError: no files there. ValueError: a split or a column that is not as expected. ImportError: no
        pyarrow.
    """
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ImportError('parquet:PATH needs pyarrow: pip install "rvlm[parquet]"') from None

    root = Path(path)
    files = _files(root, split)
    labels, starts, groups = [], [0], []
    for file in files:
        try:
            table = ParquetFile(file)
        except ArrowInvalid as error:
            raise ValueError(f"{file} is no whole Parquet file ({error}). Fetch it again.") from None
        image, label = (_column(file, table.schema_arrow.names, names) for names in (IMAGES, LABELS))
        labels += table.read([label])[label].to_pylist()
        for group in range(table.num_row_groups):
            about = table.metadata.row_group(group)
            groups.append((file, group, image, about.total_byte_size > LARGEST_GROUP))
            starts.append(starts[-1] + about.num_rows)
    if not labels:
        raise ValueError(f"{root} holds no samples for {split}")
    if None in labels or not all(isinstance(c, int) for c in labels):
        wrong = next(i for i, c in enumerate(labels) if not isinstance(c, int))
        raise ValueError(f"{root}: the label of sample {wrong} is {labels[wrong]!r}; expected the number of a class")
    y = torch.tensor(labels)
    names = _class_names(table.schema_arrow, label) or [str(c) for c in range(int(y.max()) + 1)]
    reader = Reader(_Rows(groups, starts), root, size=size)
    return Data(f"parquet:{root.name}", split, names, y, torch.arange(len(y)), reader, "plain", len(y))


class _Rows:
    """number of a sample -> its bytes. The group of rows that was read last is kept, of a large one a few of its rows
    that follow each other: ask for samples in their order.
    """

    def __init__(self, groups: list[tuple[Path, int, str, bool]], starts: list[int]) -> None:
        self.groups, self.starts = groups, starts
        self.forget()

    def forget(self) -> None:
        self.number, self.first, self.rows, self.following = -1, 0, [], iter(())

    def __call__(self, i: int) -> bytes:
        number = bisect.bisect_right(self.starts, i) - 1
        row = i - self.starts[number]
        if number != self.number or row < self.first:
            self._open(number)
        while row >= self.first + len(self.rows):
            self.first += len(self.rows)
            self.rows = next(self.following)
        found = self.rows[row - self.first].as_py()
        return found["bytes"] if isinstance(found, dict) else found

    def _open(self, number: int) -> None:
        from pyarrow.parquet import ParquetFile

        self.forget()
        file, group, column, large = self.groups[number]
        if large:  # its pages are read one after the other
            pages = ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
            parts = pages.iter_batches(FEW, row_groups=[group], columns=[column], use_threads=False)
            self.following = (part.column(0) for part in parts)
        else:
            self.rows = ParquetFile(file).read_row_group(group, columns=[column])[column]
        self.number = number

    def __getstate__(self) -> dict[str, Any]:
        return {"groups": self.groups, "starts": self.starts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def _files(root: Path, split: str) -> list[Path]:
    if root.is_file():
        return [root]
    files = sorted(root.rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"no Parquet files in {root}: expected {root}/data/{split}-00000-of-00001.parquet ...")
    of = {file: _split_of(file, root) for file in files}
    folder = split_folder(split, {name for name in of.values() if name}, root)
    chosen = [file for file in files if of[file] == folder]
    _check_whole(chosen)
    return chosen


def _check_whole(files: list[Path]) -> None:
    """Raises ValueError if one of NAME-00000-of-0000N.parquet ... is not there; old ones have a hash before the dot."""
    there: dict[tuple[str, int], set[int]] = defaultdict(set)
    for file in files:
        if match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)(-[0-9a-f]+)?\.parquet", str(file)):
            there[match[1], int(match[3])].add(int(match[2]))
    for (name, n), numbers in there.items():
        if absent := sorted(set(range(n)) - numbers):
            raise ValueError(
                f"{len(absent)} of {n} files {name}-*.parquet are missing, the first is number {absent[0]}. Fetch them."
            )


def _split_of(file: Path, root: Path) -> str:
    """train, test or val, from the file's name or a folder's; "" where neither says so."""
    words = [file.name.split("-")[0].split(".")[0], *file.relative_to(root).parts[:-1]]
    found = [{"validation": "val"}.get(word, word) for word in words]
    return next((word for word in found if word in ("train", "test", "val")), "")


def _column(file: Path, there: list[str], names: tuple[str, ...]) -> str:
    for name in names:
        if name in there:
            return name
    raise ValueError(f"{file} has no column {' or '.join(names)}: it has {', '.join(there)}")


def _class_names(schema, label: str) -> list[str] | None:
    """What Hugging Face's metadata call the classes."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return about.get("info", {}).get("features", {}).get(label, {}).get("names")
