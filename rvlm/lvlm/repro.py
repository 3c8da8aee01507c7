"""Whether a record of answers holds, by the rule of `rvlm.evaluation.repro`.

A verdict is an answer: where every verdict must be the same, every answer must be, word by word.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from rvlm.evaluation.compare import read_any, run_of
from rvlm.evaluation.records import ANSWERS
from rvlm.evaluation.repro import Reproduction, judged
from rvlm.lvlm.evaluate import AnswerScores, evaluate_answers, white_adapter
from rvlm.lvlm.model import Lvlm
from rvlm.lvlm.questions import Questions, load_questions
from rvlm.lvlm.records import answers_environment
from rvlm.models import Adapter
from rvlm.models.weights import differing, weights_sha
from rvlm.units import Eps

__all__ = ["RecordedAnswers", "read_recorded_answers"]

# What answers were made with where neither a record nor its config.yaml says so: frozen, whatever the defaults are now.
SETTINGS = {"attack": "pgd-10", "aim": None, "max_tokens": 20, "batch_size": 8, "seed": 0, "quantize": None}


@dataclasses.dataclass(frozen=True)
class RecordedAnswers:
    """A record of answers with what it needs to be run again.

    Attributes:
        path: of the record. record: its content.
        result: what it found.
        model, data, adapter: specs, as the record and its run folder's config.yaml tell them; adapter is None for
            records of the model without one.
        settings: as `evaluate_answers` was given them.
    """

    path: Path
    record: dict[str, Any]
    result: AnswerScores
    model: str
    data: str
    adapter: str | None
    settings: dict[str, Any]

    def samples(self, spec: str) -> Questions:
        """The recorded questions out of a data set.

        Raises:
            ValueError: some are not there, or they have other images, words or answers than the recorded ones.
        """
        about = self.record["data"]
        data = load_questions(spec, about["size"]).numbered([row["index"] for row in self.result.rows])
        if about.get("fingerprint") not in (None, data.fingerprint):
            raise ValueError(
                f"{spec} is not the recorded data: it has the fingerprint {data.fingerprint}, recorded is "
                f"{about['fingerprint']}"
            )
        return data

    def adapted(self, lvlm: Lvlm, spec: str | None) -> Adapter | None:
        """The recorded adapter; also checks the model's weights.

        Raises:
            ValueError: model or adapter are not the recorded ones, by their weights or what stands beside them.
        """
        adapter = None
        if spec is not None:
            adapter = white_adapter(lvlm) if spec == "white" else Adapter.load(spec)
        for role, module in (("model", lvlm), ("adapter", adapter)):
            recorded, sha = self.record.get(f"{role}_sha"), module and weights_sha(module)
            if recorded not in (None, sha):
                raise ValueError(
                    f"the {role} is not the recorded one: its weights have the hash {sha}, recorded is {recorded}"
                )
        if differs := differing(self.record.get("model_settings", {}), lvlm):
            raise ValueError(f"the model is not the recorded one: {'; '.join(differs)}")
        return adapter

    def run(self, lvlm: Lvlm, data: Questions, adapter: Adapter | None) -> AnswerScores:
        """The evaluation again."""
        found = evaluate_answers(
            lvlm, data, eps=float(Eps(self.record["eps"])), adapter=adapter, score=self.result.score,
            keep_images=False, **self.settings,
        )  # fmt: skip
        wanted = self.result.name, self.result.target
        return next(one for one in found if (one.name, one.target) == wanted)

    def compare(self, found: AnswerScores) -> Reproduction:
        """Both results beside each other."""
        index = torch.tensor([row["index"] for row in found.rows])
        keys = {"clean": ("clean", "score_clean"), "robust": ("adv", "score_adv")}
        pairs = list(zip(self.result.rows, found.rows, strict=True))
        changed = {
            what: index[torch.tensor([old[answer] != new[answer] for old, new in pairs])]
            for what, (answer, _) in keys.items()
        }
        return judged(
            self.record["env"], answers_environment(), [], {what: len(pairs) for what in keys}, changed,
            {what: self.result.mean(score) for what, (_, score) in keys.items()},
            {what: found.mean(score) for what, (_, score) in keys.items()},
            {what: list(self.result.interval(score)) for what, (_, score) in keys.items()},
        )  # fmt: skip


def read_recorded_answers(path: str | Path) -> RecordedAnswers:
    """A record of `rvlm lvlm` with its answers.

    Raises:
        FileNotFoundError: no such record, or no answers beside it. ValueError: it is of another kind.
    """
    import yaml

    path = Path(path)
    record, run = read_any(path), run_of(path)
    if record["schema"] != ANSWERS:
        raise ValueError(f"{path} is a record {record['schema']}: expected {ANSWERS}")
    file = run / record["rows"]
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: the record's answers lie beside its result/ folder")
    told = yaml.safe_load((run / "config.yaml").read_text()) if (run / "config.yaml").is_file() else {}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    settings = {name: record.get(name, told.get(name, usual)) for name, usual in SETTINGS.items()}
    adapter = None if record["adapter"] is None else told.get("adapter") or record["adapter"]["source"]
    name = record["data"]["name"]
    data = f"{name}:{told['root']}" if told.get("protocol") and told.get("root") else told.get("data") or name
    result = AnswerScores(record["name"], record["target"], record["score"], rows)
    return RecordedAnswers(path, record, result, record["model"], data, adapter, settings)
