"""What an attack does to an LVLM's answers, before and after an adapter.

    relative score = 100 * mean score of the answers / mean score of the undefended model's answers to clean images

The attack raises the loss of a correct answer (or lowers that of a target) through the whole model: of the one that
most annotators gave, the first of several. An adapter is attacked white-box, through filter and anchor, and by
transfer, with images that were made on the model without it.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rvlm.attacks import apgd, pgd
from rvlm.attacks.contract import scoring
from rvlm.attacks.losses import given
from rvlm.evaluation.metrics import clustered_interval, clustered_share
from rvlm.evaluation.resume import State
from rvlm.lvlm.model import AnswerLoss, Lvlm, what_answers
from rvlm.lvlm.questions import Questions
from rvlm.lvlm.scores import HIGHEST, SCORES, without_articles
from rvlm.methods.r_adapt import STRENGTH, RAdaptConfig
from rvlm.models import Adapter
from rvlm.models.adapter import AdapterConfig
from rvlm.models.towers import attention_output

__all__ = ["RESULTS", "AnswerScores", "evaluate_answers", "white_adapter"]

RESULTS = (("before", "white-box"), ("after", "white-box"), ("after", "transfer"))  # all but the first with an adapter
ATTACKS = {"pgd": pgd, "apgd": apgd}


@dataclasses.dataclass
class AnswerScores:
    """One model under one attack.

    Attributes:
        name: "before", without the adapter, or "after".
        target: "white-box" or "transfer".
        score: name in SCORES.
        rows: for each sample its image, question, references, answers (clean, adv), their scores (score_clean,
            score_adv) and the attacked loss of both images (loss_clean, loss_adv); with an aim, whether they contain
            its words (aim_clean, aim_adv).
        x_adv: for each sample its image [3, S, S], on the CPU; empty if they were not kept.
        undefended: mean score of the undefended model on clean images, which relative scores are a share of.
        seconds: that all results of the evaluation took together, in all attempts.
    """

    name: str
    target: str
    score: str = "f1"
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    x_adv: list[Tensor] = dataclasses.field(default_factory=list)
    undefended: float = 0.0
    seconds: float = 0.0

    def mean(self, key: str) -> float:
        return sum(row[key] for row in self.rows) / len(self.rows)

    def interval(self, key: str) -> tuple[float, float]:
        """95 % interval of a mean score, which knows that questions about one image stand together: Wilson's at their
        effective number for scores up to 1, the normal one for CIDEr."""
        order: dict[str, int] = {}
        image = torch.tensor([order.setdefault(row["image"], len(order)) for row in self.rows])
        values = torch.tensor([row[key] for row in self.rows], dtype=torch.float64)
        if HIGHEST[self.score] > 1:
            return clustered_interval(values, image, HIGHEST[self.score])
        return clustered_share(values, image)[1]

    def relative(self, key: str) -> float | None:
        """100 * mean / undefended; None if that is 0."""
        return 100 * self.mean(key) / self.undefended if self.undefended else None


def evaluate_answers(
    lvlm: Lvlm, data: Questions, *, attack: str = "pgd-10", eps: float = 4 / 255, adapter: Adapter | None = None,
    score: str = "f1", aim: str | None = None, max_tokens: int = 20, batch_size: int = 8, seed: int = 0,
    quantize: int | None = None, progress: bool = True, keep_images: bool = True, state: str | Path | None = None,
) -> list[AnswerScores]:  # fmt: skip
    """Attacks a model's answers and scores them before and after; with an adapter, those of the adapted model too.

    Args:
        lvlm: without an adapter; it is as it was afterwards.
        attack: pgd-STEPS or apgd-STEPS, Linf.
        eps: radius in pixel units.
        score: name in SCORES.
        aim: an answer that the attack makes likelier, instead of making a correct one less likely.
        max_tokens: of an answer.
        seed: of the random starts, which are keyed by the data's index.
        quantize: 255 for images that survive being saved as PNG.
        keep_images: keep x_adv, 12 S^2 bytes a sample and result, in memory.
        state: file to save progress in, at every batch (at most once a second); an evaluation that finds one goes on
            there, with the same result. Delete it when it is no longer needed. It holds no images.

    Returns:
        before; with an adapter also after (white-box) and after (transfer).

    Raises:
        ValueError: an unknown attack or score, a model with an adapter, or a state file of another evaluation.
    """
    found = re.fullmatch(r"(pgd|apgd)-([1-9]\d*)", attack)
    if found is None or score not in SCORES:
        known = ", ".join(SCORES)
        raise ValueError(
            f"expected attack pgd-STEPS or apgd-STEPS and a score of {known}, got {attack!r} and {score!r}"
        )
    if lvlm.adapter is not None:
        raise ValueError(f"{lvlm.name} has an adapter: pass it as adapter= to compare the model with it and without")
    if state is not None and keep_images:
        raise ValueError("keep_images holds images, which a state file does not save: choose one")
    began = time.perf_counter()
    results = [AnswerScores(*names, score) for names in (RESULTS if adapter is not None else RESULTS[:1])]
    saved = state and State(state, {
        "attack": attack, "eps": float(eps), "aim": aim, "max_tokens": max_tokens, "batch_size": batch_size,
        "seed": seed, "quantize": quantize, "data": data.name, "fingerprint": data.fingerprint,
        **what_answers(lvlm, adapter),
    })  # fmt: skip
    if saved and (stored := saved.read()) is not None:
        known, _ = stored
        began -= known["seconds"]
        for result, rows in zip(results, known["rows"], strict=True):
            result.rows = rows
    settings = {
        "eps": eps, "steps": int(found[2]), "targeted": aim is not None, "loss": given, "best": "loss",
        "quantize": quantize,
    }  # fmt: skip
    from tqdm import tqdm

    batches = torch.arange(len(data)).split(batch_size)
    done = math.ceil(len(results[0].rows) / batch_size)
    left = batches[done:]
    for rows in tqdm(left, total=len(batches), initial=done, disable=None if progress else True, unit="batch"):
        batch = _Batch(lvlm, data, rows, aim, max_tokens)
        x_adv = batch.attacked(ATTACKS[found[1]], settings, seed)
        seen = [(batch.clean, batch.look(x_adv), x_adv)]
        if adapter is not None:
            adapter.attach(lvlm)
            try:
                clean, on_adapted = batch.look(batch.x), batch.attacked(ATTACKS[found[1]], settings, seed)
                seen += [(clean, batch.look(on_adapted), on_adapted), (clean, batch.look(x_adv), x_adv)]
            finally:
                adapter.detach(lvlm)
        for result, (clean, adv, images) in zip(results, seen, strict=True):
            batch.keep(result, clean, adv)
            if keep_images:
                result.x_adv.extend(images.cpu())
        if saved and (saved.due or rows is batches[-1]):
            saved.write({"rows": [result.rows for result in results], "seconds": time.perf_counter() - began})
    for result in results:
        references = [row["references"] for row in result.rows]
        for which in ("clean", "adv"):
            scores = SCORES[score]([row[which] for row in result.rows], references)
            for row, value in zip(result.rows, scores, strict=True):
                row[f"score_{which}"] = value
        result.undefended = results[0].mean("score_clean")
        result.seconds = time.perf_counter() - began
    return results


class _Batch:
    """Some of the questions, and the answers that are attacked: where there are none, what the model says at first.

    Attributes:
        clean: what the model without an adapter says of the clean images, as `look` gives it.
    """

    def __init__(self, lvlm: Lvlm, data: Questions, rows: Tensor, aim: str | None, max_tokens: int) -> None:
        self.lvlm, self.aim, self.max_tokens = lvlm, aim, max_tokens
        self.x, self.index = data.pixels(rows).to(lvlm.device), data.index[rows]
        self.images, self.questions, answers = (
            [column[i] for i in rows.tolist()] for column in (data.images, data.questions, data.answers)
        )
        own = self._answers(self.x)
        self.references = [correct or [said] for correct, said in zip(answers, own, strict=True)]
        self.loss = AnswerLoss(
            lvlm, self.questions, [max(r, key=r.count) if aim is None else aim for r in self.references]
        )
        self.clean = own, self._losses(self.x)

    def attacked(self, attack: Callable, settings: dict[str, Any], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)  # for every batch: noise is keyed by the index too
        return attack(self.loss, self.x, sample_ids=self.index, generator=generator, **settings)

    def look(self, images: Tensor) -> tuple[list[str], list[float]]:
        """What the model, as it is now, says of images, and the attacked loss."""
        return self._answers(images), self._losses(images)

    def keep(self, result: AnswerScores, clean: tuple, adv: tuple) -> None:
        """Adds rows of what was said of the clean and of the adversarial images."""
        columns: dict[str, list] = {
            "index": self.index.tolist(), "image": self.images, "question": self.questions,
            "references": self.references,
        }  # fmt: skip
        for name, (answers, losses) in (("clean", clean), ("adv", adv)):
            columns[name] = answers
            columns[f"loss_{name}"] = losses
            if self.aim is not None:
                columns[f"aim_{name}"] = [_phrase(self.aim) in _phrase(answer) for answer in answers]
        result.rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _answers(self, images: Tensor) -> list[str]:
        with scoring(self.lvlm):
            return self.lvlm.answer(images, self.questions, self.max_tokens)

    def _losses(self, images: Tensor) -> list[float]:
        with scoring(self.loss):
            return self.loss(images).tolist()


def white_adapter(lvlm: Lvlm) -> Adapter:
    """R-Adapt without training: its filter, and the response of the first block's attention to a white image."""
    settings = RAdaptConfig(anchor="white")
    cutoff = settings.cutoff * lvlm.size / settings.cutoff_at
    white = torch.ones(1, 3, lvlm.size, lvlm.size, device=lvlm.device)
    config = AdapterConfig(
        base=lvlm.name, size=lvlm.size, cutoff=cutoff, alpha=STRENGTH["white"], mix=settings.mix, source="white"
    )
    return Adapter(config, attention_output(lvlm, white)[0])


def _phrase(text: str) -> str:
    return f" {' '.join(without_articles(text))} "
