"""Somebody's own attack among ours: FILE.py:NAME, a callable (model, x, y, *, eps, ...) -> x_adv.

It is passed x [B, 3, H, W] in [0, 1], labels y [B], eps, and of `norm`, `generator`, `sample_ids` (and the rest of
`ASSUMED`) what its signature has; the other keywords keep their defaults, which are recorded. It returns adversarial
images like x, or an AttackResult.

Around it stands the contract of all attacks: the model is frozen, in eval mode and afterwards as it was; torch's
generators are seeded by the evaluation's seed and the samples' numbers, and afterwards as they were; forward passes are
in the precision that was asked for; images outside ball or box are an error. Images through a module, and gradients of
zero that came back, are counted.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rvlm.attacks.ball import outside
from rvlm.attacks.contract import arithmetic, scoring, untouched
from rvlm.attacks.losses import margin
from rvlm.attacks.objective import AttackResult

__all__ = ["own_settings", "run_own"]

# Keywords of all attacks, with the value for which an attack stands that does not take them.
ASSUMED = {
    "norm": "linf", "bounds": (0.0, 1.0), "strict_eps": False, "quantize": None, "model_mode": "eval",
    "engine": "auto",
}  # fmt: skip
DRAWS = ("generator", "sample_ids")


def own_settings(function: Callable[..., Any], spec: str, norm: str) -> dict[str, Any]:
    """Keywords of an attack of one's own with their defaults, those that are numbers, words or nothing.

    Raises:
        ValueError: the callable cannot be an attack, or not one in this norm.
    """
    named = list(_parameters(function).values())
    given = {"eps", *ASSUMED, *DRAWS}
    if len(named) < 3 or "eps" not in _parameters(function):
        raise ValueError(
            f"{spec} takes {', '.join(p.name for p in named) or 'nothing'}: expected (model, x, y, *, eps, ...)"
        )
    if lacking := [p.name for p in named[3:] if p.default is p.empty and p.name not in given]:
        raise ValueError(f"{spec} must have a default for {', '.join(lacking)}: it is passed eps")
    _refuse(function, spec, {"norm": norm})
    return {
        p.name: p.default
        for p in named[3:]
        if p.name not in given and isinstance(p.default, bool | int | float | str | None)
    }


def run_own(
    function: Callable[..., Any],
    spec: str,
    settings: dict[str, Any],
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    generator: torch.Generator,
    sample_ids: Tensor,
    precision: str | None = None,
    **more: Any,
) -> AttackResult:
    """Runs it; `spec` names it in messages, settings are its own keywords.

    Raises:
        ValueError: it does not take a keyword that matters, or does not return images like x in ball and box.
    """
    _refuse(function, spec, more)
    takes = _parameters(function)
    offered = more | dict(zip(DRAWS, (generator, sample_ids), strict=True))
    passed = settings | {name: value for name, value in offered.items() if name in takes}
    seed = (generator.initial_seed() * 1_000_003 + int(sample_ids[0])) % 2**63
    devices = [x.device] if x.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        _frozen(model),
        _watched(model) as spent,
        arithmetic(model, x.device, precision),
    ):
        torch.manual_seed(seed)
        found = function(model, x.clone(), y.clone(), eps=eps, **passed)
    x_adv = found.x_adv if isinstance(found, AttackResult) else found
    _check(spec, x_adv, x, eps, *(more.get(name, ASSUMED[name]) for name in ("norm", "bounds")))
    if isinstance(found, AttackResult):
        return found
    x_adv = x_adv.detach()
    with scoring(model), arithmetic(model, x.device, precision and "fp32"):
        logits = model(x_adv).float()
    pred = logits.argmax(1)
    steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return AttackResult(x_adv, pred != y, margin(logits, y), pred, steps, **spent)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The named parameters of an attack."""
    stars = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    every = inspect.signature(function).parameters
    return {name: p for name, p in every.items() if p.kind not in stars}


def _refuse(function: Callable[..., Any], spec: str, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name in ASSUMED and value != ASSUMED[name] and name not in _parameters(function):
            raise ValueError(f"{spec} takes no {name}, so it cannot be asked for {name}={value!r}")


@contextmanager
def _frozen(model: Callable) -> Iterator[None]:
    """The contract, also for an attack that calls backward(): no parameter's `.grad` is another one afterwards."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        with torch.inference_mode(False), torch.enable_grad(), untouched(model):
            yield
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad


@contextmanager
def _watched(model: Callable) -> Iterator[dict[str, int]]:
    """Counts images through a module, there and back; other callables cannot be watched."""
    spent = {"forwards": 0, "backwards": 0, "zero_gradients": 0}

    def back(gradient: Tensor) -> None:
        spent["backwards"] += len(gradient)
        spent["zero_gradients"] += int((gradient.flatten(1) == 0).all(1).sum())

    def forward(module: nn.Module, inputs: tuple) -> tuple:
        x = inputs[0]
        spent["forwards"] += len(x)
        if x.requires_grad and torch.is_grad_enabled():
            x = x.view_as(x)  # of this pass alone
            x.register_hook(back)
        return x, *inputs[1:]

    handle = model.register_forward_pre_hook(forward) if isinstance(model, nn.Module) else None
    try:
        yield spent
    finally:
        if handle is not None:
            handle.remove()


def _check(spec: str, x_adv: Any, x: Tensor, eps: float | Tensor, norm: str, bounds: tuple[float, float]) -> None:
    want = f"expected images {list(x.shape)} {x.dtype} on {x.device}"
    if not isinstance(x_adv, Tensor):
        raise ValueError(f"{spec}: {want}, it returned {type(x_adv).__name__}")
    if (x_adv.shape, x_adv.dtype, x_adv.device) != (x.shape, x.dtype, x.device):
        raise ValueError(f"{spec}: {want}, it returned {list(x_adv.shape)} {x_adv.dtype} on {x_adv.device}")
    if not x_adv.isfinite().all():
        raise ValueError(f"{spec}: it returned NaN or infinite pixels")
    found = outside(x_adv.detach(), x, eps, norm, bounds)
    if found.ball.any():
        raise ValueError(
            f"{spec}: {int(found.ball.sum())} of {len(x)} images are outside the ball, by up to "
            f"{found.excess.max():.3g}: clip x_adv - x to eps"
        )
    if found.box:
        low, high = bounds
        raise ValueError(f"{spec}: pixels in [{found.low:.4g}, {found.high:.4g}]: clamp them to [{low:g}, {high:g}]")
