"""Models around models, for any attack: other gradients, or several models at once.

    pgd(BPDA(defence, model), x, y)                  a defence without a useful gradient in front of a model
    pgd(LowFrequency(model, 40), x, y)               gradients low-passed before they are stepped along
    joint = Joint([target, proxy])
    pgd(joint, x, y, loss=joint.loss, best="loss")   images against several models, as an adaptive attack uses them

They change what an attack sees; accuracy is measured on the model itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rvlm import ops
from rvlm.attacks.losses import ce, wide

__all__ = ["BPDA", "Joint", "LowFrequency"]


class BPDA(nn.Module):
    """model(defence(x)) whose gradient passes the defence as if it were a substitute (Athalye et al. 2018).

    Args:
        defence: callable from pixels to pixels, differentiable or not: quantisation, JPEG, a purifier.
        model: callable on its results.
        substitute: differentiable stand-in for the defence in the backward pass; None means the identity.
    """

    def __init__(
        self,
        defence: Callable[[Tensor], Tensor],
        model: Callable[[Tensor], Any],
        substitute: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.defence, self.model, self.substitute = defence, model, substitute

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            defended = self.defence(x.detach())
        stand_in = x if self.substitute is None else self.substitute(x)
        if stand_in.shape != defended.shape:
            raise ValueError(
                f"the defence returns {list(defended.shape)} and its substitute {list(stand_in.shape)}: give a "
                "substitute that returns what the defence returns"
            )
        return self.model(defended + (stand_in - stand_in.detach()))


class LowFrequency(nn.Module):
    """A model whose gradients with respect to pixels are low-passed (`ops.gaussian_filter`): the same outputs.

    Steps follow smooth directions, but random starts and signs keep high frequencies in the images; for a change that
    has none of them see `pgd`'s low_frequency.

    Args:
        model: callable on images [B, C, H, W].
        cutoff: standard deviation of the response in DFT bins; above 0.
    """

    def __init__(self, model: Callable[[Tensor], Any], cutoff: float) -> None:
        super().__init__()
        if not cutoff > 0:
            raise ValueError(f"cutoff must be above 0, got {cutoff}")
        self.model, self.cutoff = model, cutoff

    def forward(self, x: Tensor) -> Any:
        return self.model(_FilteredGradient.apply(x, self.cutoff))


class Joint(nn.Module):
    """Several models on the same pixels; `loss` adds up their losses, or their gradients made equally long.

    Args:
        models: callables to logits [B, C], which may differ in C if the losses do not mind.
        weights: of each model; None means 1.
        losses: one callable (logits, y) -> [B] for all models, or one for each; cross-entropy by default. The attack
            that knows a teacher gives it a divergence here.
        gradients: "sum" adds losses; "unit" divides every model's gradient by its L1 norm per sample before they are
            added, so that no model drowns the others.

    As an attack's model it needs loss=joint.loss. Its outputs are a list, so an attack knows no success: choose
    best="loss" and measure each model by itself.
    """

    def __init__(
        self,
        models: Sequence[Callable[[Tensor], Tensor]],
        weights: Sequence[float] | None = None,
        losses: Callable[[Tensor, Any], Tensor] | Sequence[Callable[[Tensor, Any], Tensor]] | None = None,
        gradients: str = "sum",
    ) -> None:
        super().__init__()
        if not models:
            raise ValueError("Joint needs at least one model")
        if gradients not in ("sum", "unit"):
            raise ValueError(f"gradients must be 'sum' or 'unit', got {gradients!r}")
        self.weights = [1.0] * len(models) if weights is None else list(weights)
        self.losses = list(losses) if isinstance(losses, Sequence) else [losses or _cross_entropy] * len(models)
        if len(self.weights) != len(models) or len(self.losses) != len(models):
            raise ValueError(
                f"{len(models)} models need as many weights and losses, got {len(self.weights)} and {len(self.losses)}"
            )
        self.models = list(models)
        self.seen = nn.ModuleList(model for model in models if isinstance(model, nn.Module))  # so that they are frozen
        self.unit = gradients == "unit"

    def forward(self, x: Tensor) -> list[Tensor]:
        return [model(_UnitGradient.apply(x) if self.unit else x) for model in self.models]

    def loss(self, outputs: list[Tensor], y: Any) -> Tensor:
        """sum_i weight_i * loss_i(output_i, y): [B]."""
        parts = zip(self.weights, self.losses, outputs, strict=True)
        return sum(weight * loss(output, y) for weight, loss, output in parts)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return ce(wide(logits), y)


class _FilteredGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cutoff):
        ctx.cutoff = cutoff
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ops.gaussian_filter(grad, ctx.cutoff, clamp=False), None


class _UnitGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        length = grad.flatten(1).norm(1, dim=1).view(-1, *[1] * (grad.dim() - 1))
        return torch.where(length > 0, grad / length, 0.0)
