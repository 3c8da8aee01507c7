"""What grows with the number of samples, kept small: rows of arrays that stay on disk, and numbers that are hashed.

An npz may hold its arrays as they are (numpy.savez), then rows are read where they lie; or compressed, then an array is
unpacked once, piece by piece, into a temporary file (in $TMPDIR) that goes with the object.
"""

import hashlib
import json
import math
import os
import struct
import tempfile
import weakref
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Places", "StoredRows", "npz_rows", "number_text", "safetensors_rows", "short_sha"]

PIECE = 1 << 22  # bytes that are unpacked at once
NUMBERS = 4096  # that are turned into text at once
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "U8": "|u1", "I32": "<i4", "I64": "<i8"}  # safetensors' names


class StoredRows:
    """index [B] -> rows [B, ...] of an array in a file; nothing is held.

    Args:
        path: the file.
        offset: where the first row begins, in bytes; the others follow.
        shape, dtype: of the array.
    """

    def __init__(self, path: str | Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.path, self.offset, self.shape, self.dtype = Path(path), offset, tuple(shape), np.dtype(dtype)
        self.row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __call__(self, index: Tensor | np.ndarray) -> np.ndarray:
        index = np.asarray(index, dtype=np.int64)
        if len(index) and not (0 <= index.min() and index.max() < len(self)):
            raise IndexError(f"rows 0 .. {len(self) - 1} of {self.path.name}, got {index.min()} .. {index.max()}")
        found = np.empty((len(index), *self.shape[1:]), self.dtype)
        whole = memoryview(found.reshape(-1).view(np.uint8))
        ends = [*(np.flatnonzero(np.diff(index) != 1) + 1).tolist(), len(index)]
        with self.path.open("rb") as file:
            begin = 0
            for end in ends if len(index) else ():
                file.seek(self.offset + int(index[begin]) * self.row_bytes)
                part = whole[begin * self.row_bytes : end * self.row_bytes]
                if file.readinto(part) != len(part):
                    raise OSError(f"{self.path.name} was cut off after it was opened")
                begin = end
        return found

    def pieces(self) -> Iterator[np.ndarray]:
        """All rows, a few at a time."""
        step = max(1, PIECE // max(self.row_bytes, 1))
        for first in range(0, len(self), step):
            yield self(np.arange(first, min(first + step, len(self))))


def npz_rows(path: str | Path, name: str) -> StoredRows:
    """The array `name` of an npz; KeyError if there is none."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as member:
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            version = np.lib.format.read_magic(member)
            if version not in read:
                raise ValueError(f"{path}: {name} is written in numpy's format {version}, expected 1.0 or 2.0")
            shape, columns_first, dtype = read[version](member)
            if dtype.hasobject:
                raise ValueError(f"{path}: {name} holds Python objects; expected numbers")
            if columns_first and len(shape) > 1:
                with np.load(path, allow_pickle=False) as arrays:
                    return _unpacked([np.ascontiguousarray(arrays[name]).tobytes()], shape, dtype)
            if info.compress_type != zipfile.ZIP_STORED:
                return _unpacked(iter(lambda: member.read(PIECE), b""), shape, dtype)
            header = member.tell()
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)
            names = sum(struct.unpack("<HH", file.read(4)))  # file name and extra field, which follow 30 bytes
    return StoredRows(path, info.header_offset + 30 + names + header, shape, dtype)


def safetensors_rows(path: str | Path) -> tuple[dict[str, StoredRows], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata."""
    with open(path, "rb") as file:
        head = file.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= size <= os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path} is no safetensors file: write it again")
        header = json.loads(file.read(size))
    facts, found = header.pop("__metadata__", {}), {}
    for name, about in header.items():
        if about["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is of {about['dtype']}, expected one of {', '.join(DTYPES)}")
        place, dtype = 8 + size + about["data_offsets"][0], np.dtype(DTYPES[about["dtype"]])
        found[name] = StoredRows(path, place, about["shape"], dtype)
    return found, facts


def _unpacked(pieces: Iterable[bytes], shape: tuple[int, ...], dtype: np.dtype) -> StoredRows:
    handle, place = tempfile.mkstemp(prefix="rvlm-rows-")
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in pieces:
                file.write(piece)
    except BaseException:
        os.unlink(place)
        raise
    rows = StoredRows(place, 0, shape, dtype)
    weakref.finalize(rows, os.unlink, place)
    return rows


class Places:
    """Where numbers stand in a list of different ones: int64 [B] -> rows [B], -1 for those that are not in it."""

    def __init__(self, numbers: Tensor) -> None:
        self.order = numbers.argsort()
        self.sorted = numbers[self.order]

    def __call__(self, wanted: Tensor) -> Tensor:
        if not len(self.order):
            return torch.full_like(wanted, -1)
        place = torch.searchsorted(self.sorted, wanted).clamp(max=len(self.order) - 1)
        return torch.where(self.sorted[place] == wanted, self.order[place], -1)


def number_text(numbers: Tensor) -> Iterator[bytes]:
    """What json.dumps(numbers.tolist()) is, in pieces: a list of a million numbers takes 100 MB."""
    yield b"["
    for first in range(0, len(numbers), NUMBERS):
        yield ((", " if first else "") + ", ".join(map(str, numbers[first : first + NUMBERS].tolist()))).encode()
    yield b"]"


def number_sha(numbers: Tensor) -> str:
    """Hash of a list of numbers, as records and protocols hold it."""
    return short_sha(number_text(numbers))


def short_sha(pieces: Iterable[bytes]) -> str:
    """16 digits of the SHA-256 of all pieces together."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:16]
