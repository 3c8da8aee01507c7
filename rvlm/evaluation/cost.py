"""What an evaluation costs, before it runs: images x survivors x passes of each stage.

    passes   N (1 + sum over stages of s_k (p_k + 1)),   s_k the share of images that enter stage k, p_k its passes;
             without the 1 where an evaluation takes the pass over clean images from another one
    seconds  (forwards x t_f + backwards x t_b) / processes,   t_f and t_b timed on the model at the real batch size

p_k is what an image costs that is never fooled (`rvlm.attacks.search.Attack.passes`), and one pass more scores what
came of it. The most is s_k = 1: every image survives every stage. What is expected stands on records of the same
attack, or on the assumption that half of the images do. Not foreseen: a stage that is repeated on the margin loss, what
a search in another precision than fp32 goes on with or is re-scored by, and what happens in an attack of one's own.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rvlm.attacks.contract import scoring, untouched
from rvlm.attacks.objective import BACKWARD, Passes
from rvlm.attacks.stages import Stage

__all__ = ["WARM_UP", "Cost", "Forecast", "Speed", "describe", "earlier_shares", "estimate", "measure_speed"]

HALF = 0.5
WARM_UP = 4 + 2 * BACKWARD  # forward passes of a batch that `measure_speed` takes as long as (with a source two more)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds an image takes: forward through the classifier, forward and backward through what is attacked."""

    score: float
    forward: float
    backward: float

    def seconds(self, scored: Passes, attacked: Passes) -> float:
        return scored.forwards * self.score + attacked.forwards * self.forward + attacked.backwards * self.backward


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one evaluation.

    Attributes:
        images: N. attack: its name.
        stages: name of each stage in turn and what an image costs in it; a name may stand there twice.
        extra: passes beside, on the first chunk.
        shares: of the images that are expected to enter each stage. assumes: where they come from, in words.
        speed: None while nothing was timed. processes: that share the work.
        shared: passes over clean images that another evaluation of the same images makes.
    """

    images: int
    attack: str
    stages: tuple[tuple[str, Passes], ...]
    extra: int
    shares: tuple[float, ...]
    assumes: str
    speed: Speed | None = None
    processes: int = 1
    shared: int = 0

    def attacked(self, shares: Sequence[float]) -> Passes:
        """Passes of the stages, if such shares of the images enter them."""
        parts = (passes.times(share * self.images) for (_, passes), share in zip(self.stages, shares, strict=True))
        return sum(parts, Passes())

    def scored(self, shares: Sequence[float]) -> Passes:
        """Passes that score clean images and what comes of each stage."""
        return Passes(self.clean - self.shared + sum(round(share * self.images) for share in shares))

    @property
    def clean(self) -> int:
        """Passes over clean images."""
        return self.images + self.extra

    @property
    def most(self) -> Passes:
        return self.scored(self._all) + self.attacked(self._all)

    @property
    def expected(self) -> Passes:
        return self.scored(self.shares) + self.attacked(self.shares)

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Expected, and at most."""
        if self.speed is None:
            return None
        both = (self.speed.seconds(self.scored(shares), self.attacked(shares)) for shares in (self.shares, self._all))
        expected, most = (seconds / self.processes for seconds in both)
        return expected, most

    def timed(self, speed: Speed | None, processes: int = 1) -> "Cost":
        return dataclasses.replace(self, speed=speed, processes=processes)

    def sharing(self) -> "Cost":
        """Of the same evaluation after another one of the same images."""
        return dataclasses.replace(self, shared=self.clean)

    def record(self) -> dict[str, Any]:
        """What was predicted, in a record."""
        return {
            "most": {"forward_images": self.most.forwards, "backward_images": self.most.backwards},
            "expected": {"forward_images": self.expected.forwards, "backward_images": self.expected.backwards},
            "assumes": self.assumes,
            "seconds": self.seconds and dict(zip(("expected", "most"), self.seconds, strict=True)),
        }

    @property
    def _all(self) -> tuple[float, ...]:
        return (1.0,) * len(self.stages)


def estimate(
    images: int, attack: str, stages: Sequence[Stage], classes: int, norm: str = "linf", *, batch_size: int = 100,
    shares: Sequence[float] | None = None,
) -> Cost:  # fmt: skip
    """The cost of an evaluation by `rvlm.evaluation.evaluate`.

    Args:
        images: how many. attack: what its record calls it.
        stages: of the attack. classes: of the model. norm: of the ball.
        batch_size: of the first chunk, which is shown to the model twice.
        shares: of the images that enter each stage, known from elsewhere (`earlier_shares`).
    """
    passes = tuple((stage.name, stage.passes(classes, norm)) for stage in stages if stage.classes <= classes)
    known = shares is not None and len(shares) == len(passes)
    assumes = "as many survive as in earlier records" if known else f"{HALF:.0%} of the images survive every stage"
    shares = tuple(shares) if known else (HALF,) * len(passes)
    return Cost(images, attack, passes, min(batch_size, images), shares, assumes)


def measure_speed(
    classifier: Callable[[Tensor], Tensor], x: Tensor, source: Callable[[Tensor], Tensor] | None = None
) -> Speed:
    """Times passes of a batch x [B, 3, H, W], which lies on the model's device, each after one that is not timed.

    source: what is attacked, if that is another model.
    """
    with torch.random.fork_rng([x.device] if x.is_cuda else []):  # a model that draws numbers draws the same ones after
        score = _timed(lambda: _forward(classifier, x))
        forward = score if source is None else _timed(lambda: _forward(source, x))
        there_and_back = _timed(lambda: _gradient(source or classifier, x))
    return Speed(*(seconds / len(x) for seconds in (score, forward, max(there_and_back - forward, 0.0))))


def earlier_shares(folder: str | Path | None, name: str, attack: str, target: str = "white-box") -> list[float] | None:
    """The shares of images that entered each stage of an attack, mean over the records of a model in a run folder."""
    found = []
    for file in Path(folder).glob("result/*.json") if folder is not None else ():
        record = json.loads(file.read_text())
        if "per_stage" not in record.get("metrics", {}):
            continue
        if (record["name"], record["attack"]["name"], record["threat"]["target"]) != (name, attack, target):
            continue
        clean, shares = record["metrics"]["clean_acc"], []
        left = clean["v"]
        for broken in record["metrics"]["per_stage"].values():
            shares.append(left)
            left -= broken / clean["n"]
        found.append(shares)
    same = [shares for shares in found if len(shares) == len(found[0])]
    return [sum(column) / len(same) for column in zip(*same, strict=True)] if same else None


def describe(costs: Sequence[Cost], title: str) -> str:
    """The costs of several evaluations of one model in a few lines."""
    lines = [
        f"cost of {title}: {len(costs)} evaluation{'s' * (len(costs) > 1)}, {sum(c.images for c in costs):,} images"
    ]
    for attack in dict.fromkeys(cost.attack for cost in costs):
        stages = next(cost.stages for cost in costs if cost.attack == attack)
        lines.append(f"  {attack}: an image that survives costs")
        lines += [f"    {name:<24}{p.forwards:>8,} forward {p.backwards:>8,} backward" for name, p in stages]
    most, expected = (sum((getattr(c, which) for c in costs), Passes()) for which in ("most", "expected"))
    timed = [cost.seconds for cost in costs]
    times = ["", ""] if None in timed else [f", {duration(sum(each))}" for each in zip(*timed, strict=True)]
    assumes = " or ".join(dict.fromkeys(cost.assumes for cost in costs))
    for which, passes, seconds in (("expected", expected, times[0]), ("at most", most, times[1])):
        why = f" (if {assumes})" if which == "expected" else " (if all survive)"
        lines.append(f"  {which:<9} {passes.forwards:,} forward and {passes.backwards:,} backward passes{seconds}{why}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """In the two largest units: 3 h 05 min."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 1 else "less than a second"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if hours < 100 else f"{hours // 24} d {hours % 24} h"


class Forecast:
    """Passes that are left of a run, as forward ones (`Passes.units`): a stage goes on as it went so far, and the same
    share of its images survives; stages that have not begun cost the most.

    Args:
        costs: units of an image in every stage, the pass over clean images first.
    """

    def __init__(self, costs: Sequence[int]) -> None:
        self.costs = list(costs)

    def begin(self, stage: int, images: int, survived: int = 0) -> None:
        """Of a stage there are so many images left; others are known to have survived it."""
        self.stage, self.images, self.survived = stage, images, survived
        self.seen = self.spent = self.kept = 0

    def saw(self, images: int, units: int, survived: int) -> None:
        """So many images of the stage took so much, and so many of them survived."""
        self.seen, self.spent, self.kept = self.seen + images, self.spent + units, self.kept + survived

    @property
    def left(self) -> float:
        share = self.kept / self.seen if self.seen else 1.0
        each = self.spent / self.seen if self.seen else self.costs[self.stage]
        alive = self.survived + self.images * share
        return (self.images - self.seen) * each + alive * sum(self.costs[self.stage + 1 :])


def _forward(model: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with scoring(model):
        model(x)


def _gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with untouched(model), torch.enable_grad():
        leaf = x.clone().requires_grad_()
        output = model(leaf).float().logsumexp(1).sum()
        if output.requires_grad:  # else it can be attacked as a black box alone
            torch.autograd.grad(output, leaf, allow_unused=True)


def _timed(work: Callable[[], None]) -> float:
    """Of the second time: at the first one kernels are loaded, forward and backward ones, and memory is taken."""
    work()
    _settle()
    began = time.perf_counter()
    work()
    _settle()
    return time.perf_counter() - began


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
