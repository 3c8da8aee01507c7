"""APGD, FAB and Square as AutoAttack's implementation and torchattacks run them.

They attack the samples that the model gets right (targeted: that it does not yet take for the target), one restart
after the other on those that are left, with draws from a seed; all other images come back clean.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm.attacks.apgd import apgd
from rvlm.attacks.fab import fab
from rvlm.attacks.square import square
from rvlm.compat.common import Draws, SquareDraws

__all__ = ["NORMS", "attacked"]

NORMS = {"Linf": "linf", "L2": "l2", "L1": "l1"}
FUNCTIONS = {"apgd": apgd, "fab": fab, "square": square}


def attacked(
    name: str,
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor | None,
    *,
    norm: str,
    seed: float,
    targeted: bool = False,
    early_stop: str | None = None,
    **settings: Any,
) -> Tensor:
    """Adversarial images like x, clean where the attack found none.

    Args:
        name: "apgd", "fab" or "square".
        y: labels [B], or targets; None: the model's own predictions.
        norm: "Linf", "L2" or "L1", as there.
        seed: of the draws; its integer part counts, as there.
        early_stop: "compact" lets samples leave apgd and fab once they are fooled: the same verdicts for less, other
            images.
        settings: of `apgd`, `fab` or `square`.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
    with torch.no_grad():
        pred = model(x).argmax(1)
    y = pred if y is None else y
    rows = ((pred == y) != targeted).nonzero().flatten()
    x_adv = x.detach().clone()
    if not len(rows):
        return x_adv
    draws = SquareDraws(seed, norm == "Linf") if name == "square" else Draws(seed)
    settings |= {} if name == "fab" else {"targeted": targeted}
    settings |= {} if name == "square" else {"early_stop": early_stop}
    found = FUNCTIONS[name](
        model, x[rows], y[rows], norm=NORMS[norm], generator=draws, model_mode="keep", return_info=True, **settings
    )
    hit = found.success
    x_adv[rows[hit]] = found.x_adv[hit]
    return x_adv
