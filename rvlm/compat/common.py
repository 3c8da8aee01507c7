"""What the replacements share: draws in the order of other libraries, starts, losses that return one number."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rvlm.attacks.ball import Noise, rowwise
from rvlm.attacks.contract import untouched

__all__ = [
    "Draws", "GlobalDraws", "Preprocessed", "SquareDraws", "l2_start", "linf_start", "per_sample_loss", "predicted",
    "within",
]  # fmt: skip


class Draws(Noise):
    """Numbers that torch.manual_seed(seed) and torch.rand would give, without touching the global generator.

    Stands where an attack takes a generator, and hands itself out as the noise of every run.
    """

    def __init__(self, seed: float) -> None:
        self.source, self.run = torch.Generator().manual_seed(int(seed)), 0

    def noise(self, run: int, sample_ids: Tensor) -> "Draws":
        self.run = run
        return self

    def at(self, rows: Tensor | None) -> "Draws":
        return self

    def uniform(self, *shape: int) -> Tensor:
        return 2 * torch.rand(shape, generator=self.source) - 1

    def around(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Numbers uniform in [-1, 1) like x, which is zeros."""
        return self.uniform(*x.shape).to(x)

    def normal(self, zeros: Tensor) -> Tensor:
        return torch.randn(zeros.shape, generator=self.source).to(zeros)


class SquareDraws(Draws):
    """In the order of AutoAttack's Square: windows and pattern are shared by the batch; for L2 and L1 signs are not."""

    def __init__(self, seed: float, linf: bool) -> None:
        super().__init__(seed)
        self.linf = linf

    def around(self, x: Tensor, *_: Any, draw: int = 0, **__: Any) -> Tensor:
        if draw == 0 and self.linf:  # stripes
            return super().around(x)
        if draw == 0:  # tiles [B, rows, columns, turn and signs]
            tiles = [self._tile(len(x), x.shape[-1] - 1) for _ in range(x.shape[1] * x.shape[2])]
            return torch.stack(tiles, 1).view(x.shape).to(x)
        places, channels = 2 if self.linf else 4, (x.shape[1] - 4) // 3
        shared = torch.cat([self.uniform(1) for _ in range(places)]).expand(len(x), -1)
        last = self.uniform(channels).expand(len(x), -1) if self.linf else self._tile(len(x), channels)
        return nn.functional.pad(torch.cat([shared, last], 1), (0, x.shape[1] - places - last.shape[1])).to(x)

    def _tile(self, batch: int, channels: int) -> Tensor:
        turn = self.uniform(1).expand(batch, 1)
        return torch.cat([turn, self.uniform(batch, channels)], 1)


class GlobalDraws(Draws):
    """Numbers of the global generator of x's device, drawn as torchattacks draws neighbours."""

    def __init__(self) -> None:
        self.run = 0

    def around(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.randn_like(x).uniform_(-1, 1)


class Preprocessed(nn.Module):
    """A model behind a fixed map of its pixels."""

    def __init__(self, model: Callable[[Tensor], Any], before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.before = model, before

    def forward(self, x: Tensor) -> Any:
        return self.model(self.before(x))


def linf_start(x: Tensor, eps: float) -> Tensor:
    """x plus uniform noise, cut to [0, 1]; torchattacks' and TeCoA's call."""
    return (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)


def l2_start(x: Tensor, eps: float) -> Tensor:
    """x plus a uniform direction times a radius uniform in [0, eps), cut to [0, 1]; torchattacks' and TeCoA's calls."""
    delta = torch.empty_like(x).normal_()
    length = rowwise(delta.flatten(1).norm(dim=1), x)
    return (x + delta * (torch.zeros_like(length).uniform_(0, 1) / length * eps)).clamp(0, 1)


def within(x: Tensor, x_adv: Tensor, eps: Tensor | float, order: float) -> Tensor:
    """x_adv with its perturbation shortened to eps in the norm of that order."""
    delta, eps = x_adv - x, rowwise(torch.as_tensor(eps, dtype=x.dtype, device=x.device).expand(len(x)), x)
    if order == torch.inf:
        return x + delta.clamp(-eps, eps)
    length = rowwise(delta.flatten(1).norm(order, dim=1), x).clamp(min=1e-12)
    return x + delta * (eps / length).clamp(max=1)


def predicted(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Classes of x by the model in the mode that it is in, which is left as it was."""
    with untouched(model, "keep"), torch.no_grad():
        return model(x).argmax(1)


def per_sample_loss(loss: Callable[[Any, Any], Tensor] | None, y: Any) -> str | Callable[[Any, Any], Tensor]:
    """A loss of (outputs, y) that returns one number or [B], as one that returns [B] whose sum has the same gradient.

    None and, for labels y, a plain nn.CrossEntropyLoss become "ce", summed over the batch whatever the reduction is: a
    mean differs by a factor that no direction feels, but that underflows in fp16.
    """
    plain = type(loss) is nn.CrossEntropyLoss and loss.weight is None and loss.label_smoothing == 0
    if loss is None or (plain and isinstance(y, Tensor) and not y.is_floating_point()):
        return "ce"

    def per_sample(output: Any, y: Any) -> Tensor:
        value, batch = loss(output, y), len(output)
        return value if value.shape == (batch,) else value.reshape(1).expand(batch) / batch

    return per_sample
