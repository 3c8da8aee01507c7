"""Somebody's own PGD: is it correct, and how fast is it beside `pgd` on the same model.

What is asked of it is the contract of rvlm's attacks: the result lies in ball and box, is a new detached tensor like x,
and the model is as it was. It is compared with `pgd` at equal settings; strength where that can be told apart, at the
radius among eps, eps/2, eps/4 and eps/8 at which `pgd` fools nearest to half of the samples. Times are taken in turns.
"""

import dataclasses
import functools
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rvlm.attacks.ball import outside
from rvlm.attacks.contract import scoring
from rvlm.attacks.pgd import pgd
from rvlm.evaluation.check import LARGER, Finding

__all__ = ["Comparison", "compare"]

NAMES = {  # of the settings in other people's code
    "eps": ("eps", "epsilon"),
    "alpha": ("alpha", "step_size", "stepsize", "eps_iter"),
    "steps": ("steps", "num_steps", "n_steps", "iters", "n_iter", "nb_iter", "attack_iters", "iterations"),
}
SHARES = (1.0, 0.5, 0.25, 0.125)  # of eps


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        findings: what is asked of an attack, and whether it holds.
        passed: settings that the attack takes; it must have the others inside.
        fooled, fooled_by_ours, at_eps, samples: strength, where it was compared.
        seconds, seconds_of_ours: medians of a call; ratio: median of seconds / seconds_of_ours over the pairs, and
            ratio_min, ratio_max.
        forwards, forwards_of_ours: images that went through the model in a call.
    """

    findings: list[Finding]
    passed: list[str]
    fooled: int
    fooled_by_ours: int
    at_eps: float
    samples: int
    seconds: float
    seconds_of_ours: float
    ratio: float
    ratio_min: float
    ratio_max: float
    forwards: int
    forwards_of_ours: int

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)


def compare(
    attack: Callable[..., Tensor],
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    alpha: float | None = None,
    steps: int = 10,
    norm: str = "linf",
    rounds: int = 5,
    seed: int = 0,
) -> Comparison:
    """Compares an attack with `pgd`.

    Args:
        attack: callable (model, x, y, ...) -> adversarial images like x. Of eps, alpha and steps it is passed what its
            signature has, also under other libraries' names (NAMES).
        model: callable from pixels [B, 3, H, W] in [0, 1] to logits; put back after every call if it was changed.
        x, y: images and labels [B], of which those count that the model gets right.
        eps, alpha, steps, norm: of both attacks; alpha None: 2.5 eps / steps, as in `pgd`.
        rounds: pairs of calls that are timed.
        seed: of both attacks' random numbers.

    Raises:
        ValueError: nothing is classified correctly, or the attack does not return images like x.
    """
    alpha = 2.5 * eps / steps if alpha is None else alpha
    with scoring(model):
        right = model(x).argmax(1) == y
    if not right.any():
        raise ValueError("no sample is classified correctly, so there is nothing to attack")
    x, y = x[right], y[right]
    theirs, passed = _bound(attack, model)
    ours = functools.partial(pgd, model, norm=norm)

    def call(which: Callable[..., Tensor], images: Tensor, labels: Tensor, share: float = 1.0) -> Tensor:
        torch.manual_seed(seed)
        return which(images, labels, eps=share * eps, alpha=share * alpha, steps=steps)

    given = x.clone(), y.clone()
    with _put_back(model) as before:
        result = call(theirs, *given)
        after = _state(model)
    findings = [_result(result, x)]
    if not findings[0].ok:
        raise ValueError(findings[0].message)
    findings += [_detached(result), *_places(result.detach(), x, eps, norm), _inputs(*given, x, y)]
    findings += [*_left_as_it_was(before, after), _modes(lambda: call(theirs, x[:2].clone(), y[:2].clone()), model)]

    shares = SHARES if {"eps", "alpha"} <= set(passed) else SHARES[:1]
    by_ours = {share: _fooled(model, call(ours, x, y, share), y) for share in shares}
    share = min(shares, key=lambda s: abs(by_ours[s] - len(x) / 2))
    with _put_back(model):
        weaker = call(theirs, x.clone(), y.clone(), share).detach()
    fooled = _fooled(model, weaker, y)
    findings.append(_strength(fooled, by_ours[share], len(x), share * eps))

    sides = [functools.partial(call, which, x.clone(), y.clone()) for which in (theirs, ours)]
    with _put_back(model):
        counts = [_forwards(model, side) for side in sides]
        pairs = []
        for number in range(rounds):
            turns = (0, 1) if number % 2 == 0 else (1, 0)
            seconds = {k: _seconds(sides[k], x.device) for k in turns}
            pairs.append((seconds[0], seconds[1]))
    ratios = sorted(mine / other for mine, other in pairs)
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return Comparison(
        findings, passed, fooled, by_ours[share], share * eps, len(x), *medians, statistics.median(ratios), ratios[0],
        ratios[-1], *counts,
    )  # fmt: skip


def _bound(attack: Callable[..., Tensor], model: Callable) -> tuple[Callable[..., Tensor], list[str]]:
    """attack(model, x, y, **settings) as (x, y, eps, alpha, steps), and which of the three it takes."""
    parameters = inspect.signature(attack).parameters
    takes = {ours: next((name for name in names if name in parameters), None) for ours, names in NAMES.items()}

    def call(x: Tensor, y: Tensor, **given: Any) -> Tensor:
        return attack(model, x, y, **{takes[name]: value for name, value in given.items() if takes[name]})

    return call, [name for name, theirs in takes.items() if theirs]


@contextmanager
def _put_back(model: Callable) -> Iterator[dict[str, list]]:
    """Restores what an attack has changed of a module; yields its state before."""
    before = _state(model)
    try:
        yield before
    finally:
        if isinstance(model, nn.Module):
            for m, training in zip(model.modules(), before["training"], strict=True):
                m.training = training
            tensors = [*model.parameters(), *model.buffers()]
            with torch.no_grad():
                for t, value in zip(tensors, before["parameters"] + before["buffers"], strict=True):
                    if not torch.equal(t, value):
                        t.copy_(value)
            for p, flag, grad in zip(model.parameters(), before["requires_grad"], before["grad"], strict=True):
                p.requires_grad_(flag)
                p.grad = grad


def _state(model: Callable) -> dict[str, list]:
    if not isinstance(model, nn.Module):
        return dict.fromkeys(("parameters", "buffers", "grad", "requires_grad", "training"), [])
    parameters = list(model.parameters())
    return {
        "parameters": [p.detach().clone() for p in parameters],
        "buffers": [b.detach().clone() for b in model.buffers()],
        "grad": [None if p.grad is None else p.grad.clone() for p in parameters],
        "requires_grad": [p.requires_grad for p in parameters],
        "training": [m.training for m in model.modules()],
    }


def _result(result: Any, x: Tensor) -> Finding:
    want = f"expected images {list(x.shape)} {x.dtype} on {x.device}"
    if not isinstance(result, Tensor):
        return Finding("result", False, f"{want}, the attack returned {type(result).__name__}")
    if (result.shape, result.dtype, result.device) != (x.shape, x.dtype, x.device):
        return Finding(
            "result", False, f"{want}, the attack returned {list(result.shape)} {result.dtype} on {result.device}"
        )
    return Finding("result", True, f"images {list(result.shape)} like x")


def _detached(result: Tensor) -> Finding:
    if result.requires_grad:
        return Finding("detached", False, "the result is part of a graph, which keeps memory: return x_adv.detach()")
    return Finding("detached", True, "the result is detached")


def _places(result: Tensor, x: Tensor, eps: float, norm: str) -> list[Finding]:
    if not result.isfinite().all():
        return [Finding("ball", False, "the result has NaN or infinite pixels: look for 0/0, as in g / g.norm()")]
    found = outside(result, x, eps, norm)
    longest = 1 + found.excess.max() / eps
    ball = Finding("ball", True, f"the longest perturbation is {longest:.4f} eps")
    if found.ball.any():
        hint = ": does it return the perturbation? return x + delta" if result.abs().max() <= eps * 1.01 else ""
        ball = Finding("ball", False, f"{found.ball.sum()} of {len(x)} images are outside the ball, up to "
                       f"{longest:.3g} eps{hint}")  # fmt: skip
    said = f"pixels in [{found.low:.4g}, {found.high:.4g}]"
    return [ball, Finding("box", not found.box, f"{said}: clamp to [0, 1] after every step" if found.box else said)]


def _inputs(x: Tensor, y: Tensor, x_kept: Tensor, y_kept: Tensor) -> Finding:
    same = torch.equal(x, x_kept) and torch.equal(y, y_kept)
    left = x.requires_grad or x.grad is not None
    if not same or left:
        what = "requires a gradient" if same else "was changed"
        return Finding("inputs", False, f"x or y {what}: work on x.detach().clone()")
    return Finding("inputs", True, "x and y are as they were")


def _left_as_it_was(before: dict[str, list], after: dict[str, list]) -> list[Finding]:
    def changed(name: str) -> int:
        return sum(not _same(a, b) for a, b in zip(before[name], after[name], strict=True))

    said = {
        "parameters": ("parameters", "an attack must not train: is an optimiser at work"),
        "buffers": ("buffers", "batch norm has learned from adversarial images: call model.eval() first"),
        "grad": ("parameters' gradients", "use torch.autograd.grad(loss, x_adv), not loss.backward(): they would be "
                 "added to the next training step, and computing them costs time"),
        "requires_grad": ("requires_grad flags", "restore them in a finally block"),
    }  # fmt: skip
    return [
        Finding(name, not changed(name), f"{changed(name)} of {len(before[name])} {what} changed" + (
            f": {cure}" if changed(name) else ""))
        for name, (what, cure) in said.items()
    ]  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b


def _modes(attack: Callable[[], Tensor], model: Callable) -> Finding:
    """Whether flags that differ between modules survive."""
    if not isinstance(model, nn.Module):
        return Finding("modes", True, "not a module, so its modes cannot be seen")
    modules = list(model.modules())
    with _put_back(model):
        model.train()
        modules[-1].eval()
        before = [m.training for m in modules]
        attack()
        changed = sum(m.training != flag for m, flag in zip(modules, before, strict=True))
    if changed:
        said = (
            f"{changed} of {len(modules)} modules came back in another mode from a model of which one is in eval mode"
        )
        return Finding("modes", False, f"{said}, the others in train mode: restore m.training of every module")
    return Finding("modes", True, f"{len(modules)} modules came back in their modes")


def _fooled(model: Callable, x_adv: Tensor, y: Tensor) -> int:
    with scoring(model):
        return int((model(x_adv).argmax(1) != y).sum())


def _strength(fooled: int, by_ours: int, samples: int, eps: float) -> Finding:
    said = f"fools {fooled} of {samples} at eps {eps * 255:.3g}/255, rvlm's PGD {by_ours}"
    if fooled < by_ours - max(1, LARGER * samples):
        return Finding("strength", False, f"{said}: look for a wrong sign, steps that are too short, or a mode or "
                       "normalisation that differs from the model's")  # fmt: skip
    return Finding("strength", True, said)


def _forwards(model: Callable, call: Callable[[], Any]) -> int:
    """Images through a module in a call; 0 for other callables, which cannot be watched."""
    if not isinstance(model, nn.Module):
        return 0
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        call()
    finally:
        handle.remove()
    return sum(seen)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - began
