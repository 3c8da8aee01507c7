"""Several classifiers as one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Ensemble"]


class Ensemble(nn.Module):
    """The mean of several classifiers' log-probabilities, [B, C]: what the geometric mean of their probabilities says.

    It needs no training; HPT-GPD's tables have one of a target and its proxy beside the methods that train. Attacked
    white-box, it is differentiated as a whole. The mean of probabilities would hide gradients: while one model is sure,
    the other's hardly count, and PGD-20 leaves 28 % where AutoAttack leaves none (the digits' CLIPs, Linf 8/255).

    Args:
        models: callables from pixels [B, 3, H, W] in [0, 1] to logits [B, C] of the same classes.

    Raises:
        ValueError: no models, or logits of different shapes (when called).
    """

    def __init__(self, models: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        if not models:
            raise ValueError("an ensemble needs at least one model")
        self.models = list(models)
        self.seen = nn.ModuleList(model for model in models if isinstance(model, nn.Module))

    def forward(self, x: Tensor) -> Tensor:
        logits = [model(x) for model in self.models]
        if len({tuple(each.shape) for each in logits}) > 1:
            shapes = ", ".join(str(list(each.shape)) for each in logits)
            raise ValueError(f"the models of an ensemble must have the same classes, got logits {shapes}")
        return torch.stack([each.log_softmax(1) for each in logits]).mean(0)
