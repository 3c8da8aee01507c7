"""Low-rank corrections of attention projections (Hu et al. 2022, arXiv 2106.09685): W + (alpha / r) B A.

They are parametrizations of `in_proj_weight` (or `qkv.weight`) and the output projection's weight in every attention of
a tower. A starts from a normal distribution, B from 0, so that nothing changes at first. `merge` writes the sum into
the weights and takes the parametrizations away: the tower has its old parameters, names and all.

Dropout acts on the input of A, in training mode. A parametrization sees weights and no inputs, so one mask of input
features holds for a whole forward pass, where the original draws one for each token; adversarial and clean images of
one pass share it.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

__all__ = ["attach", "merge", "plain_state"]


class LowRank(nn.Module):
    """W -> W + scale B A, for a weight [out, in]."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        out, width = weight.shape
        if rank > min(out, width):
            raise ValueError(f"lora_rank {rank} is more than a weight of {out} x {width} has")
        given = {"dtype": weight.dtype, "device": weight.device}
        self.a = nn.Parameter(torch.randn(rank, width, **given) / math.sqrt(width))
        self.b = nn.Parameter(torch.zeros(out, rank, **given))
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, weight: Tensor) -> Tensor:
        a = self.a
        if self.training and self.dropout:
            # Drawn on the CPU, whose generator's state a run saves.
            a = a * F.dropout(torch.ones(1, a.shape[1]), self.dropout).to(a)
        return weight + self.scale * self.b @ a


def attach(tower: nn.Module, rank: int, alpha: float, dropout: float = 0.0, targets: str = "all") -> None:
    """Adds corrections to all attentions of a tower.

    Args:
        targets: "qkv" and "out" correct one of the two projections, "all" both.

    Raises:
        ValueError: the tower has no attention, or has corrections already.
    """
    projections = [(module, name) for kind, module, name in _projections(tower) if targets in ("all", kind)]
    if not projections:
        raise ValueError(f"{type(tower).__name__} has no attention to correct: low-rank training needs a ViT")
    for module, name in projections:
        if parametrize.is_parametrized(module, name):
            raise ValueError("the tower has low-rank corrections already: merge them first")
        parametrize.register_parametrization(module, name, LowRank(getattr(module, name), rank, alpha, dropout))


def merge(tower: nn.Module) -> None:
    """Writes corrections into the weights and removes them; nothing to do where there are none."""
    for module in list(tower.modules()):
        for name in list(getattr(module, "parametrizations", ())):
            module.parametrizations[name].eval()  # without dropout
            parametrize.remove_parametrizations(module, name)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model would have after `merge`; the model stays as it is."""
    state = model.state_dict()
    for path, module in model.named_modules():
        for name in list(getattr(module, "parametrizations", ())) if parametrize.is_parametrized(module) else ():
            inside = f"{path}.parametrizations.{name}."
            state = {key: value for key, value in state.items() if not key.startswith(inside)}
            state[f"{path}.{name}"] = getattr(module, name).detach()
    return state


def _projections(tower: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """The attention weights [out, in] of a tower: "qkv" or "out", module, name."""
    found: list[tuple[str, nn.Module, str]] = []
    for module in list(tower.modules()):
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found += [("qkv", module, "in_proj_weight"), ("out", module.out_proj, "weight")]
        elif isinstance(getattr(module, "qkv", None), nn.Linear) and isinstance(
            getattr(module, "proj", None), nn.Linear
        ):
            found += [("qkv", module.qkv, "weight"), ("out", module.proj, "weight")]
    return found
