"""The frame of every attack in a ball: checks, a frozen model, an objective, runs from their starts, and the verdict.

An attack is a run, a callable that takes a start to the iterate that it keeps (`rvlm.attacks.runs`). What else makes an
attack stands here once.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rvlm.attacks.ball import NORMS, Ball, Noise, whole_box
from rvlm.attacks.checks import AttackWarning, check_grid, check_images, check_radius
from rvlm.attacks.contract import MODEL_MODES, arithmetic, untouched
from rvlm.attacks.engines import ENGINES, FIXED, engine_for
from rvlm.attacks.losses import AIMED
from rvlm.attacks.objective import AttackResult, Objective, Passes
from rvlm.attacks.runs import Disagreement, Judge, Run, Runs, Starts
from rvlm.attacks.trace import Trace

__all__ = [
    "PRECISIONS",
    "Attack",
    "check_choices",
    "check_count",
    "check_slots",
    "check_stop",
    "drawn_seed",
    "empty_result",
    "search",
]

MAX_RUNS = 2048  # that have noise of their own
PRECISIONS = (None, "fp32", "tf32", "bf16", "cascade")


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
    x_first: bool = False,
    draws: bool = False,
    on_sphere: bool = False,
    start_scale: float = 1.0,
    restarts: int = 1,
    x_init: Tensor | None = None,
    survivors: bool = False,
    slots: int | None = None,
    queue: bool = False,
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
        x_first: the first run (for each class) starts from x, whatever the others do.
        draws: a run needs noise, whatever its start.
        on_sphere: random starts touch the ball's surface.
        start_scale: starts lie in a ball that many times as large.
        survivors: a later run is for the samples that no earlier one has fooled.
        slots: how many samples or runs go through the model at once, at most; with an engine of FIXED always as many.
            None: all samples.
        queue: with slots, runs need not stand at one step (`rvlm.attacks.slots`); the run must have `begin`. Else one
            run after the other.
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
    if slots is not None:
        check_count("slots", slots, 1)
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
        own_noise = getattr(generator, "noise", None)
        disagreement = Disagreement(x.device)
        with (
            arithmetic(model, x.device, precision) as in_float32,
            drawn_seed(generator, draws and own_noise is None) as seed,
        ):
            with in_float32() if cascade else nullcontext():  # the model's own predictions may be the labels
                how = engine_for(engine, model, x), slots, engine in FIXED
                objective = Objective(model, x, y, loss, targeted, eot, *how)
            objective.watched = return_info
            objective.trace = Trace(len(x), x.device) if return_info else None
            if survivors and objective.labels is None:
                raise ValueError("early_stop needs labels or targets y: int64 [B]")
            if cascade and objective.labels is None:
                raise ValueError("precision='cascade' needs labels or targets y, int64 [B]: what is not fooled goes on")
            aims = objective.runners_up(x, targets) if aimed else None
            runs = restarts * (aims.shape[1] if aimed else 1)
            if runs + 2 * cascade > MAX_RUNS:
                raise ValueError(f"restarts times target classes must be at most {MAX_RUNS - 2 * cascade}, got {runs}")
            starts = Starts(
                ball, ids=torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids.to(x.device),
                noise_of=(own_noise or functools.partial(Noise, seed)) if draws else None,
                x_init=None if x_init is None else x_init.detach(), random=random_start and not own_start,
                restarts=restarts, x_first=x_first, on_sphere=on_sphere, scale=start_scale,
            )  # fmt: skip
            work = Runs(
                run, objective, ball, starts, runs=runs, restarts=restarts, aims=aims,
                judge=Judge(in_float32, disagreement, objective) if cascade else None,
                survivors=survivors, queued=queue, scored=return_info or runs > 1 or cascade,
            )  # fmt: skip
            chosen, steps_used = work.in_slots() if queue else work.in_turn()
            if cascade:
                with in_float32():
                    work.go_on(chosen, steps_used)
        if not return_info:
            return chosen.x_adv
        verdict = chosen.scores
        if precision is not None and not cascade:
            if aims is not None:
                objective.target = aims[:, -1]  # of a run in turn it is already; in slots each has its own
            with arithmetic(model, x.device, "fp32"):  # also where the caller's is another one
                verdict = objective.score(chosen.x_adv)
            if distances:
                verdict.loss = chosen.scores.loss
            if precision == "bf16":
                disagreement.settle(chosen, verdict)
        counts = objective.count.forwards, objective.count.backwards, int(objective.count.zeros)
        return AttackResult(
            chosen.x_adv, verdict.fooled, verdict.loss, verdict.pred, steps_used, *counts, *disagreement.counts(),
            None if objective.trace.last < 0 else objective.trace,
        )  # fmt: skip


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
        self.__dict__.update(self._completed(settings))

    def __call__(self, x: Tensor, y: Any = None, **overrides: Any) -> Tensor | AttackResult:
        settings = {name: getattr(self, name) for name in self.defaults}
        return type(self).function(self.model, x, y, **(settings | overrides))

    @classmethod
    def passes(cls, classes: int, norm: str = "linf", **settings: Any) -> Passes:
        """What one image costs that nothing fools, and none beside it in the batch, with return_info=True: the most.

        Args:
            classes: of the model's outputs.
            norm: of the ball.
            settings: keywords of the function that are not at their defaults.
        """
        return cls._passes(classes, norm, cls._completed(settings))

    @classmethod
    def _completed(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """All keywords of the function, of which some are given."""
        if unknown := set(settings) - set(cls.defaults):
            known = ", ".join(cls.defaults)
            raise TypeError(f"unknown argument(s) {', '.join(sorted(unknown))}; {cls.__name__} takes {known}")
        return cls.defaults | settings

    @staticmethod
    def _passes(classes: int, norm: str, given: dict[str, Any]) -> Passes:
        raise NotImplementedError

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
    if early_stop is None or "compact" not in early_stop:
        return
    if engine in FIXED:
        raise ValueError(
            f"early_stop={early_stop!r} changes the batch size, for which engine={engine!r} begins anew: not both, or "
            "with slots"
        )
    if callable(loss):
        raise ValueError(f"early_stop={early_stop!r} needs a loss by name: one of your own may know the whole batch")


def check_slots(loss: Any, callback: Any = None) -> None:
    """Raises where the batch cannot be cut, or runs cannot stand at different steps."""
    if callable(loss):
        raise ValueError("slots needs a loss by name: one of your own may know the whole batch")
    if callback is not None:
        raise ValueError("slots has no callback: its batches hold runs at different steps")


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
