"""Whether a record holds: its evaluation again, on the same samples and weights, beside what it says.

On a CPU, with the versions, the threads and the attack that the record names, every verdict must be the same. Elsewhere
sums are rounded in another order and samples on the border change sides: there both accuracies must lie in the record's
95 % intervals.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rvlm.data import Data, Fit, load_data
from rvlm.data.load import rooted
from rvlm.data.registry import data_root
from rvlm.evaluation.compare import read_record, right_samples
from rvlm.evaluation.evaluate import Evaluation, evaluate
from rvlm.evaluation.records import SCHEMA, environment, recorded_settings
from rvlm.models import Clip, ZeroShotClassifier
from rvlm.models.weights import differing, weights_of
from rvlm.plugins import is_own

__all__ = ["Recorded", "Reproduction", "read_recorded"]


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """What came of it.

    Attributes:
        holds: the verdict. exact: whether every verdict had to be the same.
        differs: sentences on what is not as it was, in the machine or in the attack's definition.
        n: samples.
        changed: verdicts that changed, clean and robust.
        recorded, again: accuracies, clean and robust; interval: those of the record.
    """

    holds: bool
    exact: bool
    differs: list[str]
    n: int
    changed: dict[str, int]
    recorded: dict[str, float]
    again: dict[str, float]
    interval: dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A record with what it needs to be run again.

    Attributes:
        path: of the record. record: its content.
        right: by "clean" and "robust", which samples are right, bool [N].
        index: numbers of the samples.
        model, source, data: specs, as the record and its run folder's config.yaml tell them; source is None but for
            transfer.
        templates: id of the prompts of a source beside a model without prompts, or auto for the data's own.
    """

    path: Path
    record: dict[str, Any]
    right: dict[str, Tensor]
    index: Tensor
    model: str
    source: str | None
    data: str
    templates: str

    def samples(self, spec: str) -> Data:
        """The recorded samples out of a data set.

        Raises:
            ValueError: some are not there, or they have other names, labels or pixels than the recorded ones.
        """
        about, side = self.record["data"], self.record["input"]["attack_res"]
        size = Fit(**about["resized"]) if about["resized"] else None
        takes_any = is_own(spec) or spec.partition(":")[0].partition("+")[0] in ("digits", "npz")
        if size is None and takes_any and side[0] == side[1]:
            size = side[0]
        data = load_data(spec, about["split"], size=size).numbered(self.index, about["index_rule"])
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

    def classifier(self, model: Clip | Callable[[Tensor], Tensor], data: Data, role: str = "model"):
        """The recorded model, or its source, from the one that was loaded.

        Raises:
            ValueError: it has other weights, or other settings beside them (normalisation, size, prompts, ...).
        """
        sha, recorded = weights_of(model), self.record[role]["sha256"]
        if sha != recorded:
            raise ValueError(
                f"the {role} is not the recorded one: its weights have the hash {sha}, recorded is {recorded}"
            )
        if isinstance(model, Clip):
            told = data.template if self.templates == "auto" else self.templates
            model = ZeroShotClassifier(model, data.class_names, self.record["text"].get("templates", told)).eval()
        if differs := differing(recorded_settings(self.record, role), model):
            raise ValueError(f"the {role} is not the recorded one: {'; '.join(differs)}")
        return model

    def run(self, classifier, data: Data, source=None, device: str | torch.device = "cpu") -> Evaluation:
        """The evaluation again."""
        attack, threat = self.record["attack"], self.record["threat"]
        return evaluate(
            classifier, data, attack=attack["name"], eps=threat["eps_str"], norm=threat["norm"], source=source,
            batch_size=attack["batch"], seed=attack["seed"], device=device, quantize=attack.get("quantize"),
            precision=attack.get("precision", "fp32"),
        )  # fmt: skip

    def compare(self, found: Evaluation) -> Reproduction:
        """Both results beside each other."""
        then, now = self.record["env"], json.loads(json.dumps(environment()))
        differs = [
            f"{key} was {then.get(key)}, is {now.get(key)}" for key in then | now if then.get(key) != now.get(key)
        ]
        stages = json.loads(json.dumps(found.stage_records()))
        if stages != self.record["attack"]["stages"]:
            differs.append("the stages of the attack are other ones, or have other settings")
        exact = not differs and not torch.cuda.is_available()
        right = {"clean": found.broken_by != -2, "robust": found.broken_by == -1}
        changed = {what: int((right[what] != self.right[what]).sum()) for what in right}
        metrics = {what: self.record["metrics"][f"{what}_acc"] for what in right}
        again = {what: share.double().mean().item() for what, share in right.items()}
        interval = {what: metric["ci95"] for what, metric in metrics.items()}
        inside = all(interval[what][0] <= again[what] <= interval[what][1] for what in right)
        holds = not any(changed.values()) if exact else inside
        recorded = {what: metric["v"] for what, metric in metrics.items()}
        return Reproduction(holds, exact, differs, len(found), changed, recorded, again, interval)


def read_recorded(path: str | Path) -> Recorded:
    """A record of `rvlm eval`, `attack` or `train` with its per-sample file.

    Raises:
        FileNotFoundError: no such record or file. ValueError: it is of another kind.
    """
    import yaml

    path = Path(path)
    record = read_record(path)
    if record["schema"] != SCHEMA:
        raise ValueError(f"{path} is a record {record['schema']}: only {SCHEMA}, of a classification, can be rerun")
    if record.get("images"):
        raise ValueError(f"{path} is of images that were saved before: score those again, rvlm eval --images FILE")
    if record["threat"]["target"] == "transfer" and not record["source"]:
        raise ValueError(f"{path} is of transfer, but does not say from which model: it cannot be rerun")
    right, index = right_samples(record, path)
    file = path.parents[1] / "config.yaml"
    told = yaml.safe_load(file.read_text()) if file.is_file() else {}
    right = {what: torch.from_numpy(which) for what, which in right.items()}
    specs = _specs(record, told, path.parents[1])
    return Recorded(path, record, right, torch.from_numpy(index), *specs, told.get("templates", "auto"))


def _specs(record: Mapping[str, Any], told: Mapping[str, Any], run: Path) -> tuple[str, str | None, str]:
    """Of the model, the source and the data. A record names data without its place, which the run's settings know."""
    model, source, name = record["model"], record["source"], record["data"]["name"]
    spec = record["name"] if model["source"] == "callable" else model["name"]
    if "student" in told and model["method"]:
        spec = str(run)
    if told.get("protocol"):
        data = rooted(name, told.get("root") or data_root())
    else:
        data = told.get("eval_data") or told.get("data") or name
    return spec, source and (told.get("source") or source["name"]), data
