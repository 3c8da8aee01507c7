"""Whether a record holds: its evaluation again, on the same samples and weights, beside what it says.

On a CPU, with the versions, the threads and the attack that the record names, every verdict must be the same. Elsewhere
sums are rounded in another order and samples on the border change sides: there every figure must lie in the record's
95 % interval. Records of classification, of retrieval and of transfer matrices are rerun here, those of answers in
`rvlm.lvlm.repro` by the same rule.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rvlm.data import Data, Fit, load_data
from rvlm.data.captions import load_captions
from rvlm.data.load import rooted
from rvlm.data.registry import data_root
from rvlm.evaluation.compare import read_any, run_of
from rvlm.evaluation.evaluate import Evaluation, evaluate
from rvlm.evaluation.metrics import wilson
from rvlm.evaluation.records import (
    RETRIEVAL,
    SCHEMA,
    TRANSFER,
    environment,
    recorded_settings,
    write_evaluation,
    write_retrieval,
    write_transfer,
)
from rvlm.evaluation.retrieval import KS, Retrieval, retrieve
from rvlm.evaluation.transfer import TransferMatrix, transfer_matrix
from rvlm.models import Clip, ZeroShotClassifier
from rvlm.models.weights import differing, weights_of
from rvlm.plugins import is_own

__all__ = ["Recorded", "Reproduction", "judged", "read_recorded"]


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """What came of it; mappings are by measure, such as "clean" and "robust".

    Attributes:
        holds: the verdict. exact: whether every verdict had to be the same.
        differs: sentences on what is not as it was, in the machine or in the attack's definition.
        n: verdicts.
        changed: those that changed. samples: the numbers of their samples.
        recorded, again: figures; interval: those of the record.
    """

    holds: bool
    exact: bool
    differs: list[str]
    n: dict[str, int]
    changed: dict[str, int]
    samples: dict[str, list[int]]
    recorded: dict[str, float]
    again: dict[str, float]
    interval: dict[str, list[float]]


def judged(
    then: dict[str, Any], now: dict[str, Any], differs: list[str], n: dict[str, int], changed: Mapping[str, Tensor],
    recorded: dict[str, float], again: dict[str, float], interval: dict[str, list[float]],
) -> Reproduction:  # fmt: skip
    """The rule of this module.

    Args:
        then, now: environments.
        differs: what else is not as it was.
        n, recorded, again, interval: as in `Reproduction`.
        changed: by measure, the numbers of the samples whose verdict changed.
    """
    now = json.loads(json.dumps(now))
    differs = differs + [
        f"{key} was {was}, is {now.get(key)}"
        for key, was in then.items()
        if was != now.get(key)  # older ones say less
    ]
    exact = not differs and not torch.cuda.is_available()
    inside = all(low <= again[what] <= high for what, (low, high) in interval.items())
    holds = not any(map(len, changed.values())) if exact else inside
    samples = {what: numbers.tolist() for what, numbers in changed.items()}
    counts = {what: len(numbers) for what, numbers in samples.items()}
    return Reproduction(holds, exact, differs, n, counts, samples, recorded, again, interval)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A record of a classification with what it needs to be run again.

    Attributes:
        path: of the record. record: its content.
        right: by measure, which samples are right, bool [N].
        index: numbers of the samples.
        models: specs by role, as the record and its run folder's config.yaml tell them: "model", and for transfer
            "source".
        data: spec of the data.
        told: the settings in config.yaml.
    """

    path: Path
    record: dict[str, Any]
    right: dict[str, Tensor]
    index: Tensor
    models: dict[str, str]
    data: str
    told: dict[str, Any]

    load = staticmethod(load_data)

    @property
    def resolution(self) -> list[int]:
        return self.record["input"]["attack_res"]

    def samples(self, spec: str) -> Data:
        """The recorded samples out of a data set.

        Raises:
            ValueError: some are not there, or they have other names, labels or pixels than the recorded ones.
        """
        about, side = self.record["data"], self.resolution
        size = Fit(**about["resized"]) if about["resized"] else None
        takes_any = is_own(spec) or spec.partition(":")[0].partition("+")[0] in ("digits", "npz")
        if size is None and takes_any and side[0] == side[1]:
            size = side[0]
        data = self.load(spec, about["split"], size=size).numbered(self.index, about["index_rule"])
        if data.fingerprint != about["fingerprint"]:
            raise ValueError(
                f"{spec} is not the recorded data: {data.name}, {data.split} has the fingerprint {data.fingerprint}, "
                f"{about['name']}, {about['split']} had {about['fingerprint']}"
            )
        if about.get("file_sha") != data.file_sha:
            raise ValueError(
                f"{spec} is not the recorded data: the file that reads it has the hash {data.file_sha}, recorded is "
                f"{about.get('file_sha')}"
            )
        if about.get("first_image") not in (None, data.first_image):
            raise ValueError(f"{spec} is not the recorded data: its first image is another one")
        return data

    def described(self, role: str) -> dict[str, Any]:
        """What the record says of a model: its sections "model" and, of classifiers, "text"."""
        return self.record if role == "model" else self.record | {"model": self.record["source"]}

    def classifier(
        self, loaded: Clip | Callable[[Tensor], Tensor], data: Data, role: str = "model"
    ) -> Callable[[Tensor], Tensor]:
        """The recorded model from the one that was loaded, with the recorded prompts.

        Raises:
            ValueError: it has other weights, or other settings beside them (normalisation, size, prompts, ...).
        """
        about, sha = self.described(role), weights_of(loaded)
        if sha != about["model"]["sha256"]:
            raise ValueError(
                f"the {role} is not the recorded one: its weights have the hash {sha}, recorded is "
                f"{about['model']['sha256']}"
            )
        model = self.prompted(loaded, data, about) if isinstance(loaded, Clip) else loaded
        if differs := differing(self.settings(role), model):
            raise ValueError(f"the {role} is not the recorded one: {'; '.join(differs)}")
        return model

    def settings(self, role: str) -> dict[str, Any]:
        """What was recorded of a model beside its weights."""
        return recorded_settings(self.record, role)

    def prompted(self, clip: Clip, data: Data, about: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        own = self.told.get("templates", "auto")
        return ZeroShotClassifier(
            clip, data.class_names, about["text"].get("templates", data.template if own == "auto" else own)
        ).eval()

    def run(self, models: Mapping[str, Callable], data: Data, device: str | torch.device = "cpu") -> Evaluation:
        """The evaluation again."""
        attack, threat = self.record["attack"], self.record["threat"]
        return evaluate(
            models["model"], data, attack=attack["name"], eps=threat["eps_str"], norm=threat["norm"],
            source=models.get("source"), batch_size=attack["batch"], seed=attack["seed"], device=device,
            quantize=attack.get("quantize"), precision=attack.get("precision", "fp32"),
        )  # fmt: skip

    def write(self, folder: Path, found, data: Data, models: Mapping[str, Callable], processes: int) -> list[dict]:
        """A record of the rerun; its summary rows."""
        mark = self.record["protocol"] and self.record["protocol"] | {"status": self.record["status"]}
        model = self.record["model"]
        about = {"method": model["method"], "processes": processes, "source": models.get("source")}
        about |= {"method_sha": model["method_sha"]} if model.get("method_sha") else {}
        return [self.writer(folder, self.record["name"], found, data, models["model"], protocol=mark, **about)]

    writer = staticmethod(write_evaluation)

    def verdicts(self, found: Evaluation) -> dict[str, Tensor]:
        """By measure, which samples are right now."""
        return {"clean": found.broken_by != -2, "robust": found.broken_by == -1}

    def recorded(self) -> dict[str, dict[str, Any]]:
        """By measure, {"v", "ci95"}."""
        return {what: self.record["metrics"][f"{what}_acc"] for what in self.right}

    def numbers(self, what: str) -> Tensor:
        """The numbers of the samples of a measure."""
        return self.index

    def changed_stages(self, found: Evaluation) -> list[str]:
        stages = json.loads(json.dumps(found.stage_records()))
        same = stages == self.record["attack"]["stages"]
        return [] if same else ["the stages of the attack are other ones, or have other settings"]

    def compare(self, found) -> Reproduction:
        """Both results beside each other."""
        now, metrics = self.verdicts(found), self.recorded()
        return judged(
            self.record["env"], environment(), self.changed_stages(found),
            {what: len(right) for what, right in now.items()},
            {what: self.numbers(what)[(now[what] != self.right[what]).nonzero().flatten()] for what in now},
            {what: metric["v"] for what, metric in metrics.items()},
            {what: share.double().mean().item() for what, share in now.items()},
            {what: metric["ci95"] for what, metric in metrics.items()},
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RecordedRetrieval(Recorded):
    """The same of retrieval: measures are "clean text_r@1" to "robust image_r@10"."""

    load = staticmethod(load_captions)
    writer = staticmethod(write_retrieval)

    def prompted(self, clip: Clip, data: Data, about: dict[str, Any]) -> Clip:
        return clip

    def run(self, models: Mapping[str, Clip], data: Data, device: str | torch.device = "cpu") -> Retrieval:
        attack, threat = self.record["attack"], self.record["threat"]
        return retrieve(
            models["model"], data, attack=attack["name"], eps=threat["eps_str"], norm=threat["norm"],
            source=models.get("source"), batch_size=attack["batch"], seed=attack["seed"], device=device,
        )  # fmt: skip

    def verdicts(self, found: Retrieval) -> dict[str, Tensor]:
        return _recalled(vars(found))

    def recorded(self) -> dict[str, dict[str, Any]]:
        return {what: self.record["metrics"][which][kind] for what in self.right for which, kind in [what.split()]}

    def numbers(self, what: str) -> Tensor:
        """Of images; for measures of captions, places in the list of captions."""
        return torch.arange(self.record["data"]["captions"]) if "image" in what else self.index

    def changed_stages(self, found: Retrieval) -> list[str]:
        return []


@dataclasses.dataclass(frozen=True)
class RecordedTransfer(Recorded):
    """The same of a transfer matrix: measures are "TARGET, clean" and "TARGET, images of SOURCE"."""

    @property
    def resolution(self) -> list[int]:
        return next(iter(self.record["models"].values()))["input"]["attack_res"]

    def described(self, role: str) -> dict[str, Any]:
        return self.record["models"][role] | {"schema": SCHEMA}

    def settings(self, role: str) -> dict[str, Any]:
        return recorded_settings(self.described(role))

    def run(self, models: Mapping[str, Callable], data: Data, device: str | torch.device = "cpu") -> TransferMatrix:
        attack, threat = self.record["attack"], self.record["threat"]
        sources, targets = ({name: models[name] for name in self.record[key]} for key in ("sources", "targets"))
        return transfer_matrix(
            sources, targets, data, attack=attack["name"], eps=threat["eps_str"], norm=threat["norm"],
            batch_size=attack.get("batch", self.told.get("batch_size", 100)), seed=attack["seed"], device=device,
        )  # fmt: skip

    def write(self, folder: Path, found, data: Data, models: Mapping[str, Callable], processes: int) -> list[dict]:
        return write_transfer(folder, found, data, models)

    def verdicts(self, found: TransferMatrix) -> dict[str, Tensor]:
        return {what: t for what, t in _cells(self.record, found.right, found.correct).items() if what in self.right}

    def recorded(self) -> dict[str, dict[str, Any]]:
        n, clean, robust = len(self.index), self.record["clean_acc"], self.record["robust_acc"]
        shares = _cells(self.record, clean, robust)
        return {what: {"v": shares[what], "ci95": wilson(round(shares[what] * n), n)} for what in self.right}

    def changed_stages(self, found: TransferMatrix) -> list[str]:
        return super().changed_stages(found) if "stages" in self.record["attack"] else []  # not in the first records


def read_recorded(path: str | Path) -> Recorded:
    """A record of `rvlm eval`, `attack`, `train` or `analyze transfer` with its per-sample file.

    Raises:
        FileNotFoundError: no such record or file. ValueError: it is of another kind.
    """
    import yaml

    path = Path(path)
    record = read_any(path)
    kinds = {SCHEMA: Recorded, RETRIEVAL: RecordedRetrieval, TRANSFER: RecordedTransfer}
    kind = kinds.get(record["schema"])
    if kind is None:
        raise ValueError(f"{path} is a record {record['schema']}: only {', '.join(kinds)} can be rerun")
    if record.get("images"):
        raise ValueError(f"{path} is of images that were saved before: score those again, rvlm eval --images FILE")
    run = run_of(path)
    file = run / record["samples"]
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: the record's samples lie beside its result/ folder")
    with np.load(file) as columns:
        arrays = {name: torch.from_numpy(columns[name]) for name in columns.files}
    try:
        if kind is RecordedTransfer:
            right = _cells(record, arrays.get("right"), arrays["correct"])
        elif kind is RecordedRetrieval:
            right = _recalled(arrays)
        else:
            right = {"clean": arrays["broken_by"] != -2, "robust": arrays["broken_by"] == -1}
    except KeyError as error:
        raise ValueError(f"{file} is not of a record {record['schema']}: it lacks {error}") from None
    if kind is not RecordedTransfer and record["threat"]["target"] == "transfer" and not record["source"]:
        raise ValueError(f"{path} is of transfer, but does not say from which model: it cannot be rerun")
    file = run / "config.yaml"
    told = yaml.safe_load(file.read_text()) if file.is_file() else {}
    return kind(path, record, right, arrays["index"], *_specs(record, told, run), told)


def _recalled(ranks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By measure of retrieval, which images or captions are right."""
    columns = {"clean text": "text_clean", "clean image": "image_clean", "robust text": "text_adv",
               "robust image": "image_adv"}  # fmt: skip
    return {f"{what}_r@{k}": ranks[column] < k for what, column in columns.items() for k in KS}


def _cells(record: Mapping[str, Any], clean: Any, robust: Any) -> dict[str, Any]:
    """By measure of a transfer matrix, what clean [T, ...] and robust [S, T, ...] hold; old records lack clean."""
    found = {}
    for t, target in enumerate(record["targets"]):
        found |= {} if clean is None else {f"{target}, clean": clean[t]}
        found |= {f"{target}, images of {source}": robust[s][t] for s, source in enumerate(record["sources"])}
    return found


def _specs(record: Mapping[str, Any], told: Mapping[str, Any], run: Path) -> tuple[dict[str, str], str]:
    """Of the models and the data. A record names data without its place, which the run's settings know."""
    name = record["data"]["name"]
    if told.get("protocol"):
        data = rooted(name, told.get("root") or data_root())
    else:
        data = told.get("eval_data") or told.get("data") or name
    if record["schema"] == TRANSFER:
        return {role: role for role in record["models"]}, data
    model, source = record["model"], record["source"]
    models = {"model": record["name"] if model["source"] == "callable" else model["name"]}
    if "student" in told and model["method"]:
        models["model"] = str(run)
    return models | ({"source": told.get("source") or source["name"]} if source else {}), data
