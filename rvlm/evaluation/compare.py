"""Two records side by side: what differs on the same samples, and whether chance explains it.

McNemar (1947), exact: of the d samples that one model gets right and the other wrong, b go one way. If both were
equally good, b would be binomial(d, 1/2); p is the chance of a split at least as uneven, on either side.

The captions of an image are no independent samples. For image recall, with d_i the difference of image i (captions that
A alone gets right less those that B alone does), z = sum_i d_i / sqrt(sum_i d_i^2) is about normal if both are equally
good (Obuchowski 1998); where every image has one caption this is McNemar's test without its continuity correction.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rvlm.evaluation.metrics import clustered_share
from rvlm.evaluation.records import RETRIEVAL

__all__ = ["Comparison", "compare", "mcnemar", "read_any", "read_record", "right_samples", "run_of", "setting"]

ALIKE = {
    "protocol": ("protocol",), "schema": ("schema",), "data": ("data", "fingerprint"),
    "first image": ("data", "first_image"), "data file": ("data", "file_sha"),
    "resizing": ("data", "resized"), "size": ("input", "attack_res"), "norm": ("threat", "norm"),
    "eps": ("threat", "eps"), "target": ("threat", "target"), "source": ("source", "sha256"),
    "attack": ("attack", "name"), "stages": ("attack", "stages"), "seed": ("attack", "seed"),
    "quantize": ("attack", "quantize"), "precision": ("attack", "precision"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One measure of two records.

    Attributes:
        what: clean or robust, accuracy or recall.
        n: samples.
        a, b: shares, with their Wilson intervals; of image recall at the effective number of captions.
        only_a, only_b: samples that one gets right and the other does not.
        p: of McNemar's exact test; of image recall of the test clustered by image.
    """

    what: str
    n: int
    a: float
    a_ci: tuple[float, float]
    b: float
    b_ci: tuple[float, float]
    only_a: int
    only_b: int
    p: float


def compare(a: str | Path, b: str | Path) -> list[Comparison]:
    """Compares two records that `rvlm eval` wrote, by their per-sample files.

    Raises:
        FileNotFoundError: no such record, or no such per-sample file. ValueError: they differ in more than the model,
        so that their numbers say nothing about it; all that differs is named.
    """
    records = [read_record(Path(path)) for path in (a, b)]
    here, there = (setting(record) for record in records)
    differ = [
        f"{name} is {_short(here[name])} and {_short(there[name])}" for name in ALIKE if here[name] != there[name]
    ]
    if differ:
        raise ValueError(f"{a} and {b} cannot be compared: {'; '.join(differ)}. Only the model may differ.")
    right = [right_samples(record, Path(path))[0] for record, path in zip(records, (a, b), strict=True)]
    owner = _owner(records[0], Path(a))
    return [_compared(what, *(each[what] for each in right), owner if "image" in what else None) for what in right[0]]


def setting(record: dict[str, Any]) -> dict[str, Any]:
    """All of a record that must be the same in another one if the two are to say something about their models."""
    return {name: _at(record, keys) for name, keys in ALIKE.items()}


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(log - n * math.log(2)) for log in logs))


def _compared(what: str, a: np.ndarray, b: np.ndarray, owner: np.ndarray | None) -> Comparison:
    n, only_a, only_b, sides = len(a), int((a & ~b).sum()), int((b & ~a).sum()), []
    for side in (a, b):
        sides += clustered_share(torch.from_numpy(side), None if owner is None else torch.from_numpy(owner))[:2]
    p = mcnemar(only_a, only_b) if owner is None else _clustered(a, b, owner)
    return Comparison(what, n, *sides, only_a, only_b, p)


def _clustered(a: np.ndarray, b: np.ndarray, owner: np.ndarray) -> float:
    """p of two models on samples that come in clusters."""
    _, place = np.unique(owner, return_inverse=True)
    differences = np.bincount(place, a.astype(float) - b)
    spread = math.sqrt((differences**2).sum())
    return math.erfc(abs(differences.sum()) / spread / math.sqrt(2)) if spread else 1.0


def _owner(record: dict[str, Any], path: Path) -> np.ndarray | None:
    """Of retrieval, the image that each caption is of."""
    if record["schema"] != RETRIEVAL:
        return None
    with np.load(run_of(path) / record["samples"]) as columns:
        return columns["owner"]


def run_of(path: str | Path) -> Path:
    """The run folder of a record RUN/result/NAME.json, from whatever folder the path is told."""
    return Path(path).absolute().parent.parent


def read_any(path: Path) -> dict[str, Any]:
    """A record of any kind, by its schema.

    Raises:
        FileNotFoundError: no such file. ValueError: it is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no record {path}: expected a file RUN/result/NAME.json")
    record = json.loads(path.read_text())
    if not isinstance(record, dict) or not str(record.get("schema")).startswith("rvlm."):
        raise ValueError(f"{path} is no record: expected a file RUN/result/NAME.json")
    return record


def read_record(path: Path) -> dict[str, Any]:
    """A record of an evaluation.

    Raises:
        As `read_any`.
    """
    record = read_any(path)
    if "samples" not in record or "threat" not in record:
        raise ValueError(f"{path} is no record of an evaluation: expected a file RUN/result/NAME.json")
    return record


def right_samples(record: dict[str, Any], path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """By measure, which samples are right, bool [N], from the file beside the record at `path`; and their numbers."""
    file = run_of(path) / record["samples"]
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: the record's samples lie beside its result/ folder")
    with np.load(file) as columns:
        if record["schema"] == RETRIEVAL:
            names = {"text_clean": "clean text_r@1", "text_adv": "robust text_r@1"}
            names |= {"image_clean": "clean image_r@1", "image_adv": "robust image_r@1"}
            return {what: columns[column] < 1 for column, what in names.items()}, columns["index"]
        broken, index = columns["broken_by"], columns["index"]
    return {"clean": broken != -2, "robust": broken == -1}, index


def _at(record: dict[str, Any], keys: tuple[str, ...]) -> Any:
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
