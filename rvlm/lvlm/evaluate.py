"""What an attack does to an LVLM's answers, before and after an adapter.

    relative score = 100 * mean score of the answers / mean score of the undefended model's answers to clean images

The attack raises the loss of a correct answer (or lowers that of a target) through the whole model: of the one that
most annotators gave, the first of several. An adapter is attacked white-box, through filter and anchor, and by
transfer, with images that were made on the model without it.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm.attacks import apgd, pgd
from rvlm.attacks.contract import scoring
from rvlm.attacks.losses import given
from rvlm.evaluation.metrics import clustered_interval, effective_size, wilson
from rvlm.lvlm.model import AnswerLoss, Lvlm
from rvlm.lvlm.questions import Questions
from rvlm.lvlm.scores import HIGHEST, SCORES, without_articles
from rvlm.methods.r_adapt import STRENGTH, RAdaptConfig
from rvlm.models import Adapter
from rvlm.models.adapter import AdapterConfig
from rvlm.models.towers import attention_output

__all__ = ["AnswerScores", "evaluate_answers", "white_adapter"]

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
        x_adv: for each sample its image [3, S, S], on the CPU.
        undefended: mean score of the undefended model on clean images, which relative scores are a share of.
    """

    name: str
    target: str
    score: str = "f1"
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    x_adv: list[Tensor] = dataclasses.field(default_factory=list)
    undefended: float = 0.0

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
        size = effective_size(values, image)
        return wilson(min(self.mean(key), 1.0) * size, size)

    def relative(self, key: str) -> float | None:
        """100 * mean / undefended; None if that is 0."""
        return 100 * self.mean(key) / self.undefended if self.undefended else None


def evaluate_answers(
    lvlm: Lvlm, data: Questions, *, attack: str = "pgd-10", eps: float = 4 / 255, adapter: Adapter | None = None,
    score: str = "f1", aim: str | None = None, max_tokens: int = 20, batch_size: int = 8, seed: int = 0,
    quantize: int | None = None, progress: bool = True,
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

    Returns:
        before; with an adapter also after (white-box) and after (transfer).

    Raises:
        ValueError: an unknown attack or score, or a model with an adapter.
    """
    found = re.fullmatch(r"(pgd|apgd)-([1-9]\d*)", attack)
    if found is None or score not in SCORES:
        known = ", ".join(SCORES)
        raise ValueError(
            f"expected attack pgd-STEPS or apgd-STEPS and a score of {known}, got {attack!r} and {score!r}"
        )
    if lvlm.adapter is not None:
        raise ValueError(f"{lvlm.name} has an adapter: pass it as adapter= to compare the model with it and without")
    before, after, transfer = (
        AnswerScores(*names, score)
        for names in (("before", "white-box"), ("after", "white-box"), ("after", "transfer"))
    )
    settings = {
        "eps": eps, "steps": int(found[2]), "targeted": aim is not None, "loss": given, "best": "loss",
        "quantize": quantize,
    }  # fmt: skip
    from tqdm import tqdm

    for rows in tqdm(torch.arange(len(data)).split(batch_size), disable=None if progress else True, unit="batch"):
        batch = _Batch(lvlm, data, rows, aim, max_tokens)
        x_adv = batch.attacked(ATTACKS[found[1]], settings, seed)
        batch.keep(before, batch.clean, batch.look(x_adv), x_adv)
        if adapter is None:
            continue
        adapter.attach(lvlm)
        try:
            clean, on_adapted = batch.look(batch.x), batch.attacked(ATTACKS[found[1]], settings, seed)
            batch.keep(after, clean, batch.look(on_adapted), on_adapted)
            batch.keep(transfer, clean, batch.look(x_adv), x_adv)
        finally:
            adapter.detach(lvlm)
    results = [before] if adapter is None else [before, after, transfer]
    for result in results:
        references = [row["references"] for row in result.rows]
        for which in ("clean", "adv"):
            scores = SCORES[score]([row[which] for row in result.rows], references)
            for row, value in zip(result.rows, scores, strict=True):
                row[f"score_{which}"] = value
        result.undefended = before.mean("score_clean")
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

    def keep(self, result: AnswerScores, clean: tuple, adv: tuple, x_adv: Tensor) -> None:
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
        result.x_adv.extend(x_adv.cpu())

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
