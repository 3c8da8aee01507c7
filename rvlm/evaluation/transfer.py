"""Who is fooled by whose images: attacks crafted on every source and scored on every target."""

import dataclasses
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rvlm.attacks.stages import Stage, parse_attack, usable
from rvlm.data import Data
from rvlm.evaluation.evaluate import logits_of, predictions, progress_bar
from rvlm.markdown import markdown_table
from rvlm.ranks import Ranks
from rvlm.units import Eps

__all__ = ["TransferMatrix", "transfer_matrix"]

STRONGER = 0.02  # share of the samples by which transfer may beat the white box


@dataclasses.dataclass
class TransferMatrix:
    """What `transfer_matrix` found.

    Attributes:
        sources, targets: names.
        clean: accuracy of each target on clean images [T].
        robust: accuracy of target t on the images of source s [S, T]: right when clean and on those of every stage.
        right, correct: the same per sample, bool [T, N] and [S, T, N].
        attack, eps, norm, seed, batch_size, samples: what was run.
        seconds: what it took.
        stages: of the attack.
    """

    sources: list[str]
    targets: list[str]
    clean: Tensor
    robust: Tensor
    right: Tensor
    correct: Tensor
    attack: str
    eps: str
    norm: str
    seed: int
    batch_size: int
    samples: int
    seconds: float
    stages: list[Stage]

    def stage_records(self) -> list[dict]:
        """The stages in a record."""
        return [stage.record() for stage in self.stages]

    @property
    def checks(self) -> list[dict]:
        """For the record: a model's own images must fool it best, else its gradients mislead."""
        worse = [
            f"{target} by images of {source} ({self.robust[s, t]:.1%}, by its own "
            f"{self.robust[self.sources.index(target), t]:.1%})"
            for t, target in enumerate(self.targets)
            for s, source in enumerate(self.sources)
            if target in self.sources and self.robust[s, t] < self.robust[self.sources.index(target), t] - STRONGER
        ]
        detail = "no model is fooled by another's images more than by its own" if not worse else "; ".join(worse)
        return [{"id": "white_box_is_strongest", "ok": not worse, "detail": detail}]

    def markdown(self) -> str:
        """A table in per cent: a row per source, a column per target."""
        rows = [("(clean)", self.clean), *zip(self.sources, self.robust, strict=True)]
        return markdown_table(
            [f"{self.attack}, {self.norm} {self.eps}: images of", *self.targets],
            [[name, *(f"{100 * share:.1f}" for share in row.tolist())] for name, row in rows],
        )


def transfer_matrix(
    sources: Mapping[str, Callable[[Tensor], Tensor]],
    targets: Mapping[str, Callable[[Tensor], Tensor]],
    data: Data,
    *,
    attack: str = "pgd-10",
    eps: str | float = "8/255",
    norm: str = "linf",
    batch_size: int = 100,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> TransferMatrix:
    """Crafts every sample's images once on each source, whatever the targets say, and scores them on all targets.

    A source that is among the targets gives the white-box cell, for the images that it finds worst itself.

    Args:
        sources, targets: classifiers by name, pixels [B, 3, H, W] in [0, 1] -> logits [B, C].
        data: what to attack. In a process group (see `rvlm.ranks`) every process takes its share of the chunks.
        attack: see `rvlm.attacks.stages`.
        eps, norm, batch_size, seed, device, progress: as in `evaluate`.

    Raises:
        ValueError: nothing to evaluate, a bad attack or eps, or a classifier with fewer outputs than classes.
    """
    if not (sources and targets and len(data)):
        raise ValueError(f"{len(sources)} sources, {len(targets)} targets, {len(data)} samples: all must be some")
    stages, eps = parse_attack(attack, norm), Eps(eps).check(norm)
    n, classes = len(data), len(data.class_names)
    clean = torch.zeros(len(targets), n, dtype=torch.bool)
    correct = torch.zeros(len(sources), len(targets), n, dtype=torch.bool)
    cost = sum(stage.passes(classes, norm).units for stage in stages)
    ranks, began = Ranks(), time.perf_counter()
    mine = torch.arange(n).split(batch_size)[ranks.rank :: ranks.size]
    total = sum(map(len, mine)) * len(sources) * cost
    with progress_bar(progress and ranks.first, total, f"transfer, {attack}") as bar:
        for rows in mine:
            x, y, index = data.batch(rows)
            x, y = x.to(device), y.to(device)
            for t, target in enumerate(targets.values()):
                clean[t, rows] = predictions(logits_of(target, x, classes))[0] == y.cpu()
            correct[:, :, rows] = clean[:, rows]
            for s, source in enumerate(sources.values()):
                usable_here, _ = usable(stages, logits_of(source, x[:1], classes).shape[1])
                for stage in usable_here:
                    draws = torch.Generator().manual_seed(seed * 1000 + stage.restart)
                    x_adv = stage(
                        source, x, y, transfer=True, eps=float(eps), norm=norm, generator=draws, sample_ids=index
                    ).x_adv
                    for t, target in enumerate(targets.values()):
                        correct[s, t, rows] &= predictions(logits_of(target, x_adv, classes))[0] == y.cpu()
                bar.update(len(rows) * cost)
    for their_clean, their_correct in ranks.gather((clean, correct)):
        clean, correct = clean | their_clean, correct | their_correct
    shares = clean.double().mean(1), correct.double().mean(2)
    names = list(sources), list(targets)
    run = attack, str(eps), norm, seed, batch_size, n
    return TransferMatrix(*names, *shares, clean, correct, *run, time.perf_counter() - began, stages)
