"""A report card for a model that somebody wants to attack or defend: the mistakes that make robustness figures wrong.

Each check looks for one of them on a batch of data: pixels in another range, dropout left on, randomness, a softmax,
gradients that are cut, zero or saturated. Then small attacks are compared with each other: steps must raise the loss,
many steps must beat one, gradients must beat a black box, and a huge eps must break everything (Athalye et al. 2018,
arXiv 1802.00420; Pintor et al. 2022, arXiv 2106.09947). A model that fails one can look robust without being so.
"""

import dataclasses
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rvlm.attacks.checks import AttackWarning, are_probabilities
from rvlm.attacks.contract import untouched
from rvlm.attacks.fgsm import fgsm
from rvlm.attacks.pgd import pgd
from rvlm.attacks.square import square

__all__ = ["Finding", "check"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the card: what was looked at, whether it is fine, and what to do if it is not."""

    id: str
    ok: bool
    message: str


EPS, HUGE = 8 / 255, 0.5  # radii of the attacks that are compared
LARGER = 0.05  # share of the samples by which a weaker attack may be the better one


def check(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, attacks: bool = True) -> list[Finding]:
    """Runs all checks on pixels x [B, 3, H, W] in [0, 1] with labels y [B]. The model is left as it was.

    attacks: run the small attacks, too, unless the model's gradient is unusable; about 160 passes over the batch.
    """
    findings = [_eval_mode(model)]
    with untouched(model, "keep"), torch.inference_mode(False):
        with torch.no_grad():
            first, second = model(x), model(x)
        shape = _shape(first, x, y)
        findings.append(shape)
        if not shape.ok:
            return findings
        findings.append(_determinism(first, second))
        with untouched(model, "eval"):
            with torch.no_grad():
                logits, alone = model(x).float(), model(x[:1]).float()
                findings += [_batch(logits, alone), _probabilities(logits), _saturation(logits, y)]
                findings.append(_value_range(model, x, y, logits))
            findings.append(_gradient(model, x, y))
    cut = any(not finding.ok for finding in findings if finding.id in ("gradient", "value_range"))
    if not attacks or cut:
        return findings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)  # what they say stands on the card already
        return findings + _attacks(model, x, y)


def _eval_mode(model: Callable) -> Finding:
    active = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    training = (
        [name or type(m).__name__ for name, m in model.named_modules() if m.training and isinstance(m, active)]
        if isinstance(model, nn.Module)
        else []
    )
    if not isinstance(model, nn.Module):
        return Finding("eval_mode", True, "not a module, so its mode cannot be seen; `determinism` would show dropout")
    if training:
        return Finding(
            "eval_mode", False, f"{training[0]} and {len(training) - 1} others are in train mode: call model.eval()"
        )
    return Finding("eval_mode", True, "no dropout or batch norm in train mode")


def _shape(output, x: Tensor, y: Tensor) -> Finding:
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(x):
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        return Finding("output", False, f"expected logits [{len(x)}, C], got {got}: return one row of logits per image")
    if (output.isnan() | (output == torch.inf)).any():  # -inf is a masked class, and fine
        return Finding("output", False, "the logits contain NaN or +infinity on clean images: look for 0/0 or overflow")
    if output.shape[1] <= y.max():
        return Finding(
            "output", False, f"{output.shape[1]} classes, but labels go up to {int(y.max())}: check the data"
        )
    return Finding("output", True, f"logits [{len(x)}, {output.shape[1]}]")


def _determinism(first: Tensor, second: Tensor) -> Finding:
    gap = (first.float() - second.float()).abs().max().item()
    if gap > 1e-4 * max(1.0, first.float().abs().max().item()):
        return Finding("determinism", False, f"two passes differ by {gap:.2g}: a random defence needs an attack on its "
                       "expectation (EOT), else it looks robust without being so")  # fmt: skip
    return Finding("determinism", True, f"two passes differ by {gap:.1g}")


def _batch(logits: Tensor, alone: Tensor) -> Finding:
    gap = (logits[:1] - alone).abs().max().item()
    if gap > 1e-3 * max(1.0, logits.abs().max().item()):
        return Finding("per_sample", False, f"an image's logits change by {gap:.2g} with the batch it is in: results "
                       "will depend on the batch size")  # fmt: skip
    return Finding("per_sample", True, "an image's logits do not depend on its batch")


def _probabilities(logits: Tensor) -> Finding:
    if are_probabilities(logits):
        return Finding("logits", False, "outputs are probabilities (they sum to 1): return logits, a softmax inside "
                       "the model hides gradients from the attack")  # fmt: skip
    return Finding("logits", True, "outputs are not probabilities")


def _saturation(logits: Tensor, y: Tensor) -> Finding:
    certain = (F.cross_entropy(logits, y, reduction="none") == 0).float().mean().item()
    if certain > 0.1:
        return Finding("saturation", False, f"cross-entropy is exactly 0 for {certain:.0%} of the images, so its "
                       "gradient is too: attack with loss='margin'")  # fmt: skip
    return Finding("saturation", True, f"cross-entropy is exactly 0 for {certain:.0%} of the images")


def _value_range(model: Callable, x: Tensor, y: Tensor, logits: Tensor) -> Finding:
    if x.min() < 0 or x.max() > 1:
        return Finding("value_range", False, f"the images given span [{x.min():.3g}, {x.max():.3g}], not [0, 1]")
    here = (logits.argmax(1) == y).float().mean().item()
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    others = {"[0, 255]": x * 255, "[-1, 1]": x * 2 - 1, "normalised by mean and std": (x - mean) / std}
    for name, moved in others.items():
        there = (model(moved).float().argmax(1) == y).float().mean().item()
        if there > here + 0.2:
            return Finding("value_range", False, f"accuracy is {here:.0%} on pixels in [0, 1] but {there:.0%} on "
                           f"pixels {name}: put that conversion inside the model")  # fmt: skip
    return Finding("value_range", True, f"accuracy {here:.0%} on pixels in [0, 1], no better in other ranges")


def _gradient(model: Callable, x: Tensor, y: Tensor) -> Finding:
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = model(leaf)
        if not output.requires_grad:
            return Finding(
                "gradient", False, "the output carries no gradient: remove detach(), no_grad(), .data or numpy"
            )
        rest = output.float().scatter(1, y[:, None], -torch.inf).logsumexp(1)
        margin = rest - output.float().gather(1, y[:, None]).squeeze(1)
        (grad,) = torch.autograd.grad(margin.sum(), leaf, allow_unused=True)
    if grad is None:
        return Finding("gradient", False, "the gradient does not reach the pixels: the model works on a detached copy")
    if not grad.isfinite().all():
        return Finding("gradient", False, "the gradient contains NaN or infinity: look for sqrt(0), log(0) or 0/0")
    dead = (grad.flatten(1) == 0).all(1).float().mean().item()
    if dead > 0.1:
        return Finding("gradient", False, f"the gradient is exactly zero for {dead:.0%} of the images: rounding, "
                       "thresholds or saturation hide it (use BPDA or a black-box attack)")  # fmt: skip
    return Finding("gradient", True, f"non-zero for {1 - dead:.0%} of the images")


def _attacks(model: Callable, x: Tensor, y: Tensor) -> list[Finding]:
    """What attacks of different strength find on the samples that are right when clean."""
    with untouched(model, "eval"), torch.no_grad():
        right = model(x).argmax(1) == y
    if not right.any():
        return [Finding("attacks", False, "no sample is classified correctly, so there is nothing to attack")]
    x, y, losses = x[right], y[right], []
    settings = {"loss": "margin", "return_info": True}
    seed = torch.Generator().manual_seed(0)
    one = fgsm(model, x, y, eps=EPS, **settings).success
    ten = pgd(
        model, x, y, eps=EPS, steps=10, best="adv", generator=seed,
        callback=lambda k, x_adv, loss: losses.append(loss.detach().clone()), **settings,
    ).success  # fmt: skip
    left, searched = ~ten, torch.zeros_like(ten)
    if left.any():
        searched[left] = square(model, x[left], y[left], eps=EPS, queries=100, generator=seed, return_info=True).success
    far = pgd(model, x, y, eps=HUGE, steps=20, best="adv", generator=seed, **settings).success
    rising = torch.stack(losses).amax(0) > losses[0]
    rose, first, many, share, robust = (flags.float().mean().item() for flags in (rising, one, ten, searched, ~far))
    return [
        _judged("loss_rises", rose >= 0.9, f"ten steps raise the loss of {rose:.0%} of the images",
                "the gradient does not point uphill"),
        _judged("many_steps", first <= many + LARGER, f"one step fools {first:.0%}, ten steps {many:.0%}",
                "the gradient holds at the clean image alone"),
        _judged("black_box", share <= LARGER, f"random search fools {share:.0%} of the images that ten steps did not",
                "gradients are hidden or mislead; use Square, transfer or BPDA"),
        _judged("eps_sweep", robust <= LARGER, f"at eps {HUGE}, where nothing can be robust, {robust:.0%} are",
                "the attack fails, not the perturbation"),
    ]  # fmt: skip


def _judged(id: str, ok: bool, said: str, otherwise: str) -> Finding:
    return Finding(id, ok, said if ok else f"{said}: {otherwise}")
