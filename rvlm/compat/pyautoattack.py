"""pyautoattack (0.2.0, a package of AutoAttack) on rvlm's engine: `from rvlm.compat.pyautoattack import AutoAttack`.

`rvlm.compat.autoattack` under the other signature: settings by keyword, labels always returned, lines to the logger
"auto-attack".
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rvlm.compat import autoattack

__all__ = ["AutoAttack"]


class AutoAttack(autoattack.AutoAttack):
    """See `rvlm.compat.autoattack.AutoAttack`; `attacks` goes with version="custom"."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        *,
        attacks: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
        eps: float = 0.3,
        norm: str = "Linf",
        seed: float | None = None,
        version: str = "standard",
    ) -> None:
        self.logger = logging.getLogger("auto-attack")
        super().__init__(model, norm, eps, seed, False, attacks or (), version, device=device)
        self.verbose = True

    def run_standard_evaluation(
        self, x_orig: Tensor, y_orig: Tensor, /, *, batch_size: int = 250, state_path: Path | None = None
    ) -> tuple[Tensor, Tensor]:
        """Adversarial images and their predicted classes."""
        return super().run_standard_evaluation(x_orig, y_orig, batch_size, True, state_path)

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, /, *, batch_size: int = 250
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """{name: (images, predicted classes)} of every attack on all images."""
        return super().run_standard_evaluation_individual(x_orig, y_orig, batch_size, True)

    def _log(self, line: str) -> None:
        if self.verbose:
            self.logger.debug(line)
