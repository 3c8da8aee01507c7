"""The set that an attack searches: an Lp ball around each image, cut with the pixel box."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rvlm import ops
from rvlm.attacks.checks import ROUNDING

__all__ = [
    "DUAL", "NORMS", "ORDER", "Ball", "Noise", "Outside", "normal", "outside", "rounding", "rowwise", "whole_box",
]  # fmt: skip

_STEPS = {"linf": ops.linf_step_, "l2": ops.l2_step_, "l1": ops.l1_step_}
NORMS = tuple(_STEPS)
ORDER = {"linf": torch.inf, "l2": 2, "l1": 1}  # of a norm, and of its dual
DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}


class Ball:
    """Steps, projections and starts around clean images.

    Args:
        x: clean images [B, ...], float32 or float64.
        eps: radius, a float or [B].
        norm: "linf", "l2" or "l1".
        bounds: pixel range.
        strict_eps, quantize, low_frequency: as in `pgd`.
    """

    def __init__(
        self,
        x: Tensor,
        eps,
        norm: str,
        bounds: tuple[float, float],
        strict_eps: bool = False,
        quantize: int | None = None,
        low_frequency: float | None = None,
    ) -> None:
        self.x, self.norm, self.bounds, self.rows = x, norm, bounds, None
        # A float or [B] of these samples, and as [1] or [B] like x.
        self.radius, self.eps = eps.to(x.device) if isinstance(eps, Tensor) else eps, self.like(eps)
        self.strict_eps, self.quantize, self.low_frequency = strict_eps, quantize, low_frequency
        self.still = torch.zeros((), dtype=x.dtype, device=x.device).expand_as(x)  # a gradient that moves nothing

    def at(self, rows: Tensor | None) -> "Ball":
        """The balls of some samples; None means all of them."""
        if rows is None:
            return self
        radius = self.radius[rows] if self.eps.numel() > 1 else self.radius
        part = self._with(self.x[rows], radius)
        part.rows = rows if self.rows is None else self.rows[rows]
        return part

    def scaled(self, factor: float) -> "Ball":
        """Balls with other radii around the same images."""
        if factor == 1:
            return self
        part = self._with(self.x, factor * self.radius)
        part.rows = self.rows
        return part

    def _with(self, x: Tensor, radius) -> "Ball":
        return Ball(x, radius, self.norm, self.bounds, self.strict_eps, self.quantize, self.low_frequency)

    def like(self, value: float | Tensor) -> Tensor:
        """A float, or a tensor over these samples, as one or B elements like x."""
        if isinstance(value, Tensor):
            return value.to(self.x.device, self.x.dtype).reshape(-1)
        return torch.full((1,), value, dtype=self.x.dtype, device=self.x.device)  # a copy from the host would wait

    def per_sample(self, value: float | Tensor) -> Tensor:
        """A float, or a tensor over the whole batch that the attack was given, as one or B elements like x."""
        value = self.like(value)
        return value if self.rows is None or value.numel() == 1 else value[self.rows]

    def step(self, x_adv: Tensor, grad: Tensor, alpha: float | Tensor, active: Tensor | None = None, **more) -> Tensor:
        """One step of length alpha along the gradient, in place, projected."""
        lo, hi = self.bounds
        step = _STEPS[self.norm]
        return step(x_adv, grad, self.x, alpha, self.eps, lo, hi, active, strict_eps=self.strict_eps, **more)

    def as_seen(self, x_adv: Tensor) -> Tensor:
        """The iterate as the model sees it: itself, with its change low-passed, its grid point under quantize."""
        if self.low_frequency is not None:
            x_adv = self.nearest_(self.x + ops.gaussian_filter(x_adv - self.x, self.low_frequency, clamp=False))
        if self.quantize is None:
            return x_adv
        lo, hi = self.bounds
        step = _STEPS[self.norm]
        return step(x_adv.clone(), self.still, self.x, 0.0, self.eps, lo, hi, quantize=self.quantize)

    def of_iterate(self, grad: Tensor) -> Tensor:
        """The gradient with respect to the iterate, from that with respect to what the model sees; projections and
        rounding are passed straight through. The filter is its own adjoint."""
        return grad if self.low_frequency is None else ops.gaussian_filter(grad, self.low_frequency, clamp=False)

    def nearest_(self, x_adv: Tensor) -> Tensor:
        """The projection, in place."""
        return self.step(x_adv, self.still, 0.0)

    def project(self, start: Tensor) -> Tensor:
        """The start moved into ball and box; pixels (L2, L1: samples) that are inside keep their bits."""
        lo, hi = self.bounds
        start = torch.empty_like(self.x).copy_(start)
        inside = self.nearest_(start.clone())
        moved = (inside - start).abs()
        if self.norm != "linf":
            moved = rowwise(moved.flatten(1).amax(1), start)
        return torch.where(moved > ROUNDING * (hi - lo) if not self.strict_eps else moved > 0, inside, start)

    def distance(self, x_adv: Tensor) -> Tensor:
        """How far images are from the clean ones, in the norm: [B]."""
        return (x_adv - self.x).flatten(1).norm(ORDER[self.norm], dim=1)

    def random_start(self, noise: "Noise", on_sphere: bool = False) -> Tensor:
        """A start that is uniform in the Linf ball, in L2 has a uniform direction and a radius uniform in [0, eps), and
        in L1 is Gaussian noise of one pixel range's standard deviation, projected.

        on_sphere: the noise is stretched until it touches the ball's surface (Linf, L2).
        """
        lo, hi = self.bounds
        if self.norm == "linf" and not on_sphere:
            return noise.around(self.x, self.eps, lo, hi, strict_eps=self.strict_eps)
        zeros = torch.zeros_like(self.x, memory_format=torch.contiguous_format)
        if self.norm == "linf":
            uniform = noise.around(zeros)
            largest = uniform.abs().flatten(1).amax(1).clamp(min=1e-12)
            return self.project(self.x + uniform * rowwise(self.eps / largest, self.x))
        direction = noise.normal(zeros)
        if self.norm == "l1":
            return self.project(self.x + (hi - lo) * direction)
        length = self.eps / direction.flatten(1).norm(dim=1)
        if not on_sphere:
            length = length * (noise.around(zeros.flatten(1)[:, :1], draw=1).squeeze(1) + 1) / 2
        return self.project(self.x + direction * rowwise(length, self.x))


class Noise:
    """Random numbers that depend on a seed, the number of a run and a sample's id alone (`ops.uniform_start`).

    Args:
        seed: 64 bits.
        run: number of the run, below 2048.
        sample_ids: int64 [B].
    """

    def __init__(self, seed: int, run: int, sample_ids: Tensor) -> None:
        self.seed, self.run, self.sample_ids = seed, run, sample_ids

    def at(self, rows: Tensor | None) -> "Noise":
        return self if rows is None else Noise(self.seed, self.run, self.sample_ids[rows])

    def around(self, x: Tensor, radius=1.0, lo=-1.0, hi=1.0, draw: int = 0, **more) -> Tensor:
        """x plus numbers uniform in [-radius, radius), cut to [lo, hi]; each draw (below 2^20) has its own numbers."""
        stream = 2 * self.run + draw if draw < 2 else 2**31 + self.run * 2**20 + draw
        return ops.uniform_start(x, radius, self.sample_ids, self.seed, lo, hi, stream=stream, **more)

    def normal(self, zeros: Tensor) -> Tensor:
        """Standard normal numbers like `zeros`, made of draw 0."""
        return normal(self.around(zeros))


def normal(uniform: Tensor) -> Tensor:
    """Standard normal numbers from numbers uniform in [-1, 1), by the inverse error function."""
    edge = 1 - torch.finfo(torch.float32).eps
    return 2**0.5 * torch.erfinv(uniform.clamp(-edge, edge))


def rowwise(value: Tensor, x: Tensor) -> Tensor:
    """value [B] in a shape that broadcasts against x [B, ...]."""
    return value.view(-1, *[1] * (x.dim() - 1))


def whole_box(x: Tensor, norm: str, bounds: tuple[float, float]) -> float:
    """A radius that holds the whole box."""
    width = bounds[1] - bounds[0]
    return width * {"linf": 1.0, "l2": x[:1].numel() ** 0.5, "l1": float(x[:1].numel())}[norm]


def rounding(norm: str, pixels: int) -> float:
    """How far ||x_adv - x|| may exceed eps in fp32, for images of so many values (3 H W) in [0, 1].

    A pixel is rounded by half an ulp, 3e-8, and n of them by n^(1/p) times as much in an Lp norm (for L2 by the
    Cauchy-Schwarz inequality). As much again is for the scaling of a perturbation, which is off by a few ulps of eps, a
    small part of the box's diameter n^(1/p). In Linf it is what a pixel may be off in every check of images.
    """
    ulp = torch.finfo(torch.float32).eps / 2  # of a pixel below 1
    return {"linf": ROUNDING, "l2": ulp * math.sqrt(pixels), "l1": ulp * pixels}[norm]


class Outside(NamedTuple):
    """Images against ball and box, whose limits rounding may exceed.

    Attributes:
        excess: float64 [B], ||x_adv - x|| - eps.
        ball: bool [B], outside the ball.
        box: whether any pixel is outside the box.
        low, high: the least and the largest pixel.
    """

    excess: Tensor
    ball: Tensor
    box: bool
    low: float
    high: float


def outside(
    x_adv: Tensor, x: Tensor, eps: float | Tensor, norm: str, bounds: tuple[float, float] = (0.0, 1.0)
) -> Outside:
    """Where images x_adv [B, ...] lie, which are finite and at least one."""
    excess = (x_adv.double() - x.double()).flatten(1).norm(ORDER[norm], dim=1) - eps
    low, high = (v.item() for v in torch.aminmax(x_adv))
    box = low < bounds[0] - ROUNDING or high > bounds[1] + ROUNDING
    return Outside(excess, excess > rounding(norm, x[0].numel()), box, low, high)
