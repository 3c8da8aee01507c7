"""The frame of every attack in a ball: checks, a frozen model, starts, runs, and the best run of each sample.

    for every target class, for every restart:   start -> run -> kept iterate and its scores
    merged per sample: the run that fools the model wins, then the one with the better loss

An attack is a run: a callable that takes a start to the iterate that it keeps. What else makes an attack stands here
once.
"""

import dataclasses
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from rvlm import ops
from rvlm.attacks.ball import NORMS, Ball, Noise, whole_box
from rvlm.attacks.checks import AttackWarning, check_grid, check_images, check_radius
from rvlm.attacks.contract import MODEL_MODES, arithmetic, untouched
from rvlm.attacks.engines import ENGINES, FIXED, engine_for
from rvlm.attacks.losses import AIMED
from rvlm.attacks.objective import AttackResult, Objective, Scores

__all__ = [
    "PRECISIONS",
    "Attack",
    "Disagreement",
    "Kept",
    "Roll",
    "Run",
    "check_choices",
    "check_count",
    "check_stop",
    "drawn_seed",
    "empty_result",
    "left_over",
    "search",
]

MAX_RUNS = 2048  # that have noise of their own
PRECISIONS = (None, "fp32", "tf32", "bf16", "cascade")


@dataclasses.dataclass
class Kept:
    """The iterate that a run returns so far, with its scores (None while nobody has asked for them)."""

    x_adv: Tensor
    scores: Scores | None

    @property
    def fooled(self) -> Tensor | None:
        return None if self.scores is None else self.scores.fooled

    def take(self, rows: Tensor, x_adv: Tensor, scores: Scores) -> None:
        """Replaces the rows that are True."""
        ops.keep_best_(self.x_adv, x_adv, rows)
        old = self.scores
        self.scores = Scores(
            torch.where(rows, scores.loss, old.loss),
            None if scores.fooled is None else torch.where(rows, scores.fooled, old.fooled),
            None if scores.pred is None else torch.where(rows, scores.pred, old.pred),
        )

    def at(self, rows: Tensor) -> "Kept":
        return Kept(self.x_adv[rows], self.scores.at(rows))

    def put(self, rows: Tensor, part: "Kept") -> None:
        """Replaces the rows of that index by a part's."""
        self.x_adv[rows] = part.x_adv
        self.scores.put(rows, part.scores)

    def merge(self, other: "Kept", objective: Objective) -> "Kept":
        """The better of two runs, per sample: success first, then loss."""
        rows = objective.better(other.scores.loss, self.scores.loss)
        if self.fooled is not None:
            rows = torch.where(self.fooled == other.fooled, rows, other.fooled)
        self.take(rows, other.x_adv, other.scores)
        return self


class Roll:
    """The samples that a run still works on, and what it has kept of those that it is done with.

    Attributes:
        rows: index of the former in the batch; a slice as long as nobody has left.
    """

    def __init__(self) -> None:
        self.rows: Tensor | slice = slice(None)
        self.kept: Kept | None = None

    def call(self, done: Tensor, k: int) -> Tensor | None:
        """The rows to go on with, once an eighth of those that are left is done; None: all of them.

        Asking waits for the device, so on a GPU it is done at every eighth step k.
        """
        if done.is_cuda and k % 8 != 7:
            return None
        left = (~done).nonzero().flatten()
        return left if len(left) <= len(done) * 7 // 8 else None

    def dismiss(self, kept: Kept, left: Tensor) -> bool:
        """Notes what is kept of all that were left; `left` of them stay. Returns whether there are any."""
        self.close(kept)
        self.rows = left if isinstance(self.rows, slice) else self.rows[left]
        return len(left) > 0

    def close(self, kept: Kept) -> Kept:
        """What the run keeps of everybody, given what it keeps of those that are left."""
        if self.kept is None:
            self.kept = kept
        else:
            self.kept.put(self.rows, kept)
        return self.kept


class Run(Protocol):
    """One run of an attack, from a start (which it may overwrite) to what it keeps and the steps [B] it took.

    scored: the scores of what it keeps are needed. noise: None for an attack that draws nothing. A run that can go on
    from any point has `continued(whole) -> Run`, the run of as many steps, or of a quarter, that does.
    """

    def __call__(
        self, objective: Objective, ball: Ball, start: Tensor, scored: bool, noise: Noise | None
    ) -> tuple[Kept, Tensor]: ...


def search(
    name: str,
    run: Run,
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Any,
    *,
    eps: float | Tensor | None,
    norm: str,
    loss: str | Callable[[Any, Any], Tensor],
    bounds: tuple[float, float],
    targeted: bool = False,
    aimed: bool = False,
    targets: int | None = None,
    distances: bool = False,
    random_start: bool = True,
    own_start: bool = False,
    draws: bool = False,
    on_sphere: bool = False,
    start_scale: float = 1.0,
    restarts: int = 1,
    x_init: Tensor | None = None,
    survivors: bool = False,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
    precision: str | None = None,
    strict_eps: bool = False,
    quantize: int | None = None,
    low_frequency: float | None = None,
    model_mode: str = "eval",
    engine: str = "auto",
    eot: int = 1,
    return_info: bool = False,
) -> Tensor | AttackResult:
    """Runs an attack; the arguments that `pgd` has too mean what they mean there.

    Args:
        name: of the attack, for messages.
        eps: None means the whole box.
        run: see Run.
        aimed: all restarts are repeated for each of the likeliest wrong classes on x, which is the objective's target.
        targets: how many of them; None: nine, or all.
        distances: the loss of what a run keeps is minus a distance, and stays so when the verdict is re-scored.
        own_start: a run is handed x, and makes its own random start from the noise.
        draws: a run needs noise, whatever its start.
        on_sphere: random starts touch the ball's surface.
        start_scale: starts lie in a ball that many times as large.
        survivors: a later run is for the samples that no earlier one has fooled.
        generator: one that has a method `noise(run, sample_ids) -> Noise` hands out the noise of every run itself
            (`rvlm.compat`, where draws are those of other libraries).
        eot: gradients of each iterate, averaged.
    """
    check_choices(norm=(norm, NORMS), precision=(precision, PRECISIONS))
    check_choices(model_mode=(model_mode, MODEL_MODES), engine=(engine, ENGINES))
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    check_images(x, bounds)
    if eps is not None:
        check_radius("eps", eps, len(x), norm, bounds)
    check_count("restarts", restarts, 1)
    check_count("eot", eot, 1)
    if isinstance(loss, str) and loss in AIMED and (targeted or not aimed):
        raise ValueError(f"loss={loss!r} aims at one wrong class after another: for untargeted apgd only")
    if targets is not None and not aimed:
        raise ValueError(f"targets={targets} needs a loss that aims at classes, {' or '.join(map(repr, AIMED))}")
    if restarts > 1 and not (random_start or draws):
        raise ValueError("restarts > 1 repeat the same run without random_start=True")
    if x_init is not None and (x_init.shape != x.shape or x_init.dtype != x.dtype):
        raise ValueError(f"x_init must be like x, {list(x.shape)} {x.dtype}, got {list(x_init.shape)} {x_init.dtype}")
    if quantize is not None and len(x):
        check_grid(x, quantize, strict_eps)
    cascade = precision == "cascade"
    if cascade and not hasattr(run, "continued"):
        raise ValueError(
            f"precision='cascade' is for attacks that can go on from the best point so far, which {name} cannot: use "
            "'bf16', whose verdict is re-scored, or 'fp32'"
        )
    if precision == "tf32" and not x.is_cuda:
        warnings.warn(f"TF32 is arithmetic of CUDA devices: on {x.device} it is fp32", AttackWarning, stacklevel=3)
    if len(x) == 0:
        warnings.warn(f"{name} got an empty batch and returns it unchanged", AttackWarning, stacklevel=3)
        return empty_result(x) if return_info else x.detach().clone()

    with untouched(model, model_mode, compiled=engine == "compile"), torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone() if x.is_inference() else x.detach()
        radius = whole_box(x, norm, bounds) if eps is None else eps
        ball = Ball(x, radius, norm, bounds, strict_eps, quantize, low_frequency)
        draws = draws or (random_start and (x_init is None or restarts > 1 or aimed))
        chosen: Kept | None = None
        steps_used = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        own_noise = getattr(generator, "noise", None)
        with (
            arithmetic(model, x.device, precision) as in_float32,
            drawn_seed(generator, draws and own_noise is None) as seed,
        ):
            noise_of = own_noise or functools.partial(Noise, seed)
            with in_float32() if cascade else nullcontext():  # the model's own predictions may be the labels
                objective = Objective(model, x, y, loss, targeted, eot, engine_for(engine, model, x))
            objective.watched = return_info
            if survivors and objective.labels is None:
                raise ValueError("early_stop needs labels or targets y: int64 [B]")
            if cascade and objective.labels is None:
                raise ValueError("precision='cascade' needs labels or targets y, int64 [B]: what is not fooled goes on")
            disagreement, cut = Disagreement(x.device), torch.zeros(len(x), dtype=torch.bool, device=x.device)
            aims = objective.runners_up(x, targets) if aimed else None
            runs = restarts * (aims.shape[1] if aimed else 1)
            if runs + 2 * cascade > MAX_RUNS:
                raise ValueError(f"restarts times target classes must be at most {MAX_RUNS}, got {runs}")
            ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids.to(x.device)
            for number in range(runs):
                rows = None
                if survivors and chosen is not None:
                    left = (~chosen.fooled).nonzero().flatten()
                    if not len(left):
                        break
                    if len(left) < len(x) and objective.named and engine not in FIXED:
                        rows = left
                part = ball.at(rows)
                around = part.scaled(start_scale)
                if aimed:
                    objective.target = aims[:, number // restarts]
                noise = noise_of(number, ids if rows is None else ids[rows]) if draws else None
                if x_init is not None and number == 0:
                    start = around.project(x_init.detach())
                elif random_start and not own_start:
                    start = around.random_start(noise, on_sphere)
                else:
                    start = part.x.clone()
                scored = return_info or runs > 1 or cascade
                asked = objective if rows is None else objective.at(rows)
                kept, steps = run(asked, part, start, scored, noise)
                if cascade:
                    with in_float32():
                        cut[slice(None) if rows is None else rows] |= disagreement.settle(kept, asked.score(kept.x_adv))
                if rows is None:
                    steps_used += steps
                    chosen = kept if chosen is None else chosen.merge(kept, objective)
                else:
                    steps_used[rows] += steps
                    chosen.put(rows, chosen.at(rows).merge(kept, objective))
            # Whom bf16 took for fooled has not had all of its steps.
            for whole in (True, False) if cascade else ():
                left = (~chosen.fooled & (cut == whole)).nonzero().flatten()
                if not len(left):
                    continue
                noise = noise_of(runs + whole, ids) if draws else None
                with in_float32():
                    if aimed:
                        objective.target = objective.runners_up(chosen.x_adv, 1)[:, 0]
                    go_on = run.continued(whole)
                    if objective.named and engine not in FIXED:
                        kept, steps = go_on(
                            objective.at(left), ball.at(left), chosen.x_adv[left], True, noise and noise.at(left)
                        )
                    else:
                        kept, steps = go_on(objective, ball, chosen.x_adv.clone(), True, noise)
                        kept, steps = kept.at(left), steps[left]
                steps_used[left] += steps
                chosen.put(left, chosen.at(left).merge(kept, objective))
        if not return_info:
            return chosen.x_adv
        verdict = chosen.scores
        if precision is not None and not cascade:
            verdict = objective.score(chosen.x_adv)  # reference precision
            if distances:
                verdict.loss = chosen.scores.loss
            if precision == "bf16":
                disagreement.settle(chosen, verdict)
        counts = objective.count.forwards, objective.count.backwards, int(objective.count.zeros)
        return AttackResult(
            chosen.x_adv, verdict.fooled, verdict.loss, verdict.pred, steps_used, *counts, *disagreement.counts()
        )


class Disagreement:
    """How many images fool the model in bf16 only, and in fp32 only; on the device."""

    def __init__(self, device: torch.device) -> None:
        self.both = torch.zeros(2, dtype=torch.int64, device=device)

    def settle(self, kept: Kept, scores: Scores) -> Tensor:
        """Gives what was kept in bf16 its scores in fp32; returns who [B] fools the model in bf16 only."""
        narrow, kept.scores = kept.fooled, scores
        if narrow is None:
            return torch.zeros_like(scores.loss, dtype=torch.bool)
        self.both += torch.stack([(narrow & ~scores.fooled).sum(), (scores.fooled & ~narrow).sum()])
        return narrow & ~scores.fooled

    def counts(self) -> list[int]:
        return self.both.tolist()


def left_over(steps: int, whole: bool) -> int:
    """Steps in fp32 of a run that goes on where a search in bf16 has ended: a quarter, or all of them again."""
    return steps if whole else math.ceil(steps / 4)


class Attack:
    """Base of the classes: a function's settings fixed, `PGD(model, eps=4/255)(x, y)`.

    Takes every keyword of the function, with the same defaults, as attributes that may be changed later. A call may
    override them: `attack(x, y, steps=100)`.
    """

    function: Callable

    def __init_subclass__(cls) -> None:
        parameters = inspect.signature(cls.function).parameters.items()
        cls.defaults = {name: p.default for name, p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def __init__(self, model: Callable[[Tensor], Any], **settings: Any) -> None:
        self.model = model
        unknown = set(settings) - set(self.defaults)
        if unknown:
            name, known = type(self).__name__, ", ".join(self.defaults)
            raise TypeError(f"unknown argument(s) {', '.join(sorted(unknown))}; {name} takes {known}")
        self.__dict__.update(self.defaults | settings)

    def __call__(self, x: Tensor, y: Any = None, **overrides: Any) -> Tensor | AttackResult:
        settings = {name: getattr(self, name) for name in self.defaults}
        return type(self).function(self.model, x, y, **(settings | overrides))

    def __repr__(self) -> str:
        changed = [f"{k}={getattr(self, k)!r}" for k, usual in self.defaults.items() if getattr(self, k) is not usual]
        return f"{type(self).__name__}({', '.join([type(self.model).__name__, *changed])})"


def check_choices(**given: tuple[Any, tuple]) -> None:
    """Raises unless each value is among those allowed: check_choices(norm=(norm, NORMS))."""
    for name, (value, allowed) in given.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_stop(early_stop: str | None, engine: str, loss: Any = None) -> None:
    """Raises where samples cannot leave the batch."""
    if early_stop == "compact" and engine in FIXED:
        raise ValueError(
            f"early_stop='compact' changes the batch size, for which engine={engine!r} begins anew: not both"
        )
    if early_stop == "compact" and callable(loss):
        raise ValueError("early_stop='compact' needs a loss by name: one of your own may know the whole batch")


def check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


@contextmanager
def drawn_seed(generator: torch.Generator | None, draws: bool) -> Iterator[int | None]:
    """One 64-bit seed from the generator, which an error in the block winds back."""
    source = torch.default_generator if generator is None else generator
    state = source.get_state() if draws else None
    try:
        yield int(torch.randint(-(2**63), 2**63 - 1, (), generator=source, device=source.device)) if draws else None
    except BaseException:
        if draws:
            source.set_state(state)
        raise


def empty_result(x: Tensor) -> AttackResult:
    none = torch.zeros(0, dtype=torch.int64, device=x.device)
    return AttackResult(x.detach().clone(), none.bool(), none.to(x.dtype), none, none.clone(), 0, 0)
