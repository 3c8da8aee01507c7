"""MI-FGSM (Dong et al. 2018, arXiv 1710.06081) and what is put on its gradient to make images that fool other models.

    v_{k+1} = mu v_k + g_k / ||g_k||_1,    x_{k+1} = P(x_k + alpha sign(v_{k+1}))

The gradient g is asked through a chain of transforms, the first one outermost:

    NI   at x + alpha mu v n instead of x: a look ahead (Lin et al. 2020, arXiv 1908.06281; n pixels, since the
         published code divides by the mean of |g| and not by its sum)
    SI   mean over copies of x divided by 1, 2, 4, ... (the same paper)
    DI   at x made smaller and padded at random, in a share of the samples (Xie et al. 2019, arXiv 1803.06978)
    TI   convolved with a Gaussian (Dong et al. 2019, arXiv 1904.02884)
    VMI  plus what the last step's gradient differed from the mean of its neighbours' (Wang & He 2021, arXiv 2103.15571)

From the same draws the images are torchattacks' (MI, NI + SI, VMI). TI-FGSM there, and in papers that use it as a
black-box attack, is transforms=("ti", "di").
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rvlm import ops, profiling
from rvlm.attacks.ball import Ball, Noise, rowwise
from rvlm.attacks.checks import check_radius
from rvlm.attacks.cycle import Cycle
from rvlm.attacks.engines import FIXED
from rvlm.attacks.kept import Kept, Roll
from rvlm.attacks.objective import AttackResult, Objective, Passes, Scores
from rvlm.attacks.runs import left_over
from rvlm.attacks.search import Attack, check_choices, check_count, search

__all__ = ["DI", "MIFGSM", "NI", "SI", "TI", "VMI", "mifgsm"]

Ask = Callable[..., tuple[Scores, Tensor]]
DRAWS = 64  # of one step


@dataclasses.dataclass
class Now:
    """What a transform may look at: the attack's state before a step. `noise(like)` has new numbers at every call."""

    ball: Ball
    velocity: Tensor
    alpha: Tensor
    mu: float
    noise: Callable[[Tensor], Tensor]
    memory: dict


class Transform:
    """Makes a gradient from other gradients."""

    draws = False
    asks = 1  # times that it asks
    images = False  # needs [B, C, H, W]
    moves = False  # scores are of another image than it was given

    def __call__(self, ask: Ask, x: Tensor, now: Now) -> tuple[Scores, Tensor]:
        """Scores and gradient at x; `ask(x)` has those of the transforms further in, and at last the model's.

        ask(x, f) puts a differentiable map f, from pixels to pixels, in front of the model.
        """
        raise NotImplementedError


class NI(Transform):
    """Nesterov: the gradient where the velocity alone would lead (Lin et al. 2020)."""

    moves = True

    def __call__(self, ask: Ask, x: Tensor, now: Now) -> tuple[Scores, Tensor]:
        ahead = rowwise(now.alpha, x) * (now.mu * x[0].numel()) * now.velocity
        return ask(x + ahead)


@dataclasses.dataclass
class SI(Transform):
    """Scale invariance: the mean gradient of x / 2^k, k < copies (Lin et al. 2020)."""

    copies: int = 5

    def __post_init__(self) -> None:
        check_count("copies", self.copies, 1)
        self.asks = self.copies

    def __call__(self, ask: Ask, x: Tensor, now: Now) -> tuple[Scores, Tensor]:
        scores, total = ask(x)
        for k in range(1, self.copies):
            total = total + ask(x / 2**k)[1] / 2**k  # the derivative of x / 2^k
        return scores, total / self.copies


@dataclasses.dataclass
class DI(Transform):
    """Input diversity: shrunk and moved at random (Xie et al. 2019).

    smallest: the shortest side, as a share; share: of the samples that are changed. What is left over is 0.
    """

    smallest: float = 0.9
    share: float = 0.5
    draws = images = moves = True

    def __post_init__(self) -> None:
        if not (0 < self.smallest <= 1 and 0 <= self.share <= 1):
            raise ValueError(f"smallest and share must be shares, got {self.smallest} and {self.share}")

    def __call__(self, ask: Ask, x: Tensor, now: Now) -> tuple[Scores, Tensor]:
        size, across, down, coin = now.noise(x.flatten(1)[:, :4]).add(1).div(2).unbind(1)
        size = torch.where(coin < self.share, self.smallest + (1 - self.smallest) * size, 1.0)
        spare = (1 - size) / size  # the padding, in half sides of the smaller image
        affine = torch.zeros(len(x), 2, 3, dtype=x.dtype, device=x.device)
        affine[:, 0, 0] = affine[:, 1, 1] = 1 / size
        affine[:, 0, 2], affine[:, 1, 2] = spare * (1 - 2 * across), spare * (1 - 2 * down)
        grid = F.affine_grid(affine, list(x.shape), align_corners=False)
        return ask(x, lambda v: F.grid_sample(v, grid, align_corners=False))


@dataclasses.dataclass
class TI(Transform):
    """Translation invariance: the gradient blurred by a Gaussian (Dong et al. 2019).

    side: of the kernel in pixels, odd; deviations: how many standard deviations it reaches to each side.
    """

    side: int = 15
    deviations: float = 3.0
    images = True

    def __post_init__(self) -> None:
        if self.side < 1 or self.side % 2 == 0:
            raise ValueError(f"side must be an odd number of pixels, got {self.side}")

    def __call__(self, ask: Ask, x: Tensor, now: Now) -> tuple[Scores, Tensor]:
        scores, grad = ask(x)
        reach, like = self.deviations, {"dtype": torch.float64, "device": grad.device}
        line = torch.exp(-0.5 * torch.linspace(-reach, reach, self.side, **like) ** 2)
        line = (line / line.sum()).to(grad.dtype).expand(grad.shape[1], 1, 1, -1)
        blurred = F.conv2d(grad, line, padding="same", groups=grad.shape[1])
        return scores, F.conv2d(blurred, line.mT, padding="same", groups=grad.shape[1])


@dataclasses.dataclass
class VMI(Transform):
    """Variance: adds how far the mean gradient around the last iterate was from its own (Wang & He 2021).

    neighbours: how many; beta: how far away, in eps.
    """

    neighbours: int = 5
    beta: float = 1.5
    draws = True

    def __post_init__(self) -> None:
        check_count("neighbours", self.neighbours, 1)
        self.asks = 1 + self.neighbours
        if self.neighbours >= DRAWS - 1:
            raise ValueError(f"neighbours must be below {DRAWS - 1}, got {self.neighbours}")

    def __call__(self, ask: Ask, x: Tensor, now: Now) -> tuple[Scores, Tensor]:
        scores, grad = ask(x)
        reach = rowwise(self.beta * now.ball.eps, x)
        around = sum(ask(x + reach * now.noise(x))[1] for _ in range(self.neighbours)) / self.neighbours
        before = now.memory.get("variance", 0.0)
        now.memory["variance"] = around - grad
        return scores, grad + before


NAMES: dict[str, type[Transform]] = {"ni": NI, "si": SI, "di": DI, "ti": TI, "vmi": VMI}


def mifgsm(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Any = None,
    *,
    eps: float | Tensor = 8 / 255,
    alpha: float | Tensor | None = None,
    steps: int = 10,
    norm: str = "linf",
    mu: float = 1.0,
    velocity: str = "l1",
    transforms: Sequence[str | Transform] = (),
    targeted: bool = False,
    loss: str | Callable[[Any, Any], Tensor] = "ce",
    random_start: bool = False,
    restarts: int = 1,
    eot: int = 1,
    x_init: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    early_stop: str | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
    precision: str | None = None,
    strict_eps: bool = False,
    quantize: int | None = None,
    model_mode: str = "eval",
    engine: str = "auto",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    return_info: bool = False,
) -> Tensor | AttackResult:
    """MI-FGSM with transforms of its gradient. What is not listed means what it means in `pgd`.

    Args:
        x: images [B, ...]; "di" and "ti" need [B, C, H, W].
        alpha: step size; None means eps / steps, the papers' choice.
        norm: "linf", or "l2" and "l1" with the steps of `pgd` along the velocity.
        mu: decay of the velocity.
        velocity: "l1", the paper's; or "sign", v_{k+1} = sign(mu v_k + sign(g_k)), for Linf: RobustVLM's PGD, which
            differs from plain PGD only where a gradient is exactly 0 and the pixel goes on as it went.
        early_stop: "cycle" takes a sample out of the batch when its trajectory has returned to an earlier state, with
            the result of the full run (`rvlm.attacks.cycle`). For norm="linf" with velocity="sign" or mu=0, transforms
            that draw nothing, a loss by name, and models that draw nothing.
        transforms: names ("ni", "si", "di", "ti", "vmi") or objects of those classes, outermost first.

    Returns:
        As `pgd`: the last iterate, since this model's verdict decides nothing about the model that will see it. With
        "ni" and "di" there is no trace: under them no iterate but the last is scored itself.
    """
    check_count("steps", steps, 1)
    check_choices(velocity=(velocity, ("l1", "sign")))
    if velocity == "sign" and norm != "linf":
        raise ValueError(f"velocity='sign' is for norm='linf', got {norm!r}")
    if alpha is not None and isinstance(x, Tensor):
        check_radius("alpha", alpha, len(x), norm, bounds)
    chain = [_transform(t) for t in transforms]
    if isinstance(x, Tensor) and x.dim() != 4 and (picky := [type(t).__name__ for t in chain if t.images]):
        raise ValueError(f"{', '.join(picky)}: needs images [B, C, H, W], got {list(x.shape)}")
    check_choices(early_stop=(early_stop, (None, "cycle")))
    if early_stop is not None:
        _check_cycle(norm, velocity, mu, chain, loss, engine, eot)
    run = _Momentum(alpha, steps, mu, "mi" if velocity == "l1" else "sign", chain, early_stop, callback)
    return search(
        "mifgsm", run, model, x, y, eps=eps, norm=norm, loss=loss, bounds=bounds, targeted=targeted,
        random_start=random_start, draws=any(t.draws for t in chain), restarts=restarts, x_init=x_init,
        generator=generator, sample_ids=sample_ids, precision=precision, strict_eps=strict_eps, quantize=quantize,
        model_mode=model_mode, engine=engine, eot=eot, return_info=return_info,
    )  # fmt: skip


def _check_cycle(norm, velocity, mu, chain, loss, engine, eot) -> None:
    """Raises where a return would not mean a cycle, or would not come."""
    random = [type(t).__name__ for t in chain if t.draws]
    if norm != "linf":
        raise ValueError("early_stop='cycle' is exact for norm='linf' only")
    if velocity == "l1" and mu != 0:
        raise ValueError(f"early_stop='cycle' needs velocity='sign' or mu=0: with mu={mu} the velocity does not repeat")
    if random or eot > 1:
        raise ValueError(f"early_stop='cycle' is for what draws nothing, got {', '.join([*random, f'eot={eot}'])}")
    if callable(loss) or engine in FIXED:
        raise ValueError("early_stop='cycle' changes the batch size: for a loss by name and engine='eager'")


class MIFGSM(Attack):
    """`mifgsm` with its settings fixed: `MIFGSM(model, eps=4/255, transforms=("ti", "di"))(x, y)`."""

    function = mifgsm

    @staticmethod
    def _passes(classes: int, norm: str, given: dict[str, Any]) -> Passes:
        """Every run: for each step as many gradients as the transforms ask for, and the verdict."""
        asks = math.prod(_transform(t).asks for t in given["transforms"])
        runs, gradients = given["restarts"] * given["eot"], given["steps"] * asks
        return Passes(runs * (gradients + 1), runs * gradients)


class _Momentum:
    """One run."""

    def __init__(self, alpha, steps, mu, kind, chain, early_stop, callback) -> None:
        self.alpha, self.steps, self.mu, self.kind = alpha, steps, mu, kind
        self.chain, self.early_stop, self.callback = chain, early_stop, callback
        self.planned = steps
        self.notes = not any(t.moves for t in chain)

    def continued(self, whole: bool) -> "_Momentum":
        """Steps of the same size, with a velocity that begins anew."""
        run = copy.copy(self)
        run.steps = left_over(self.steps, whole)
        return run

    def __call__(
        self, objective: Objective, ball: Ball, x_adv: Tensor, scored: bool, noise: Noise | None
    ) -> tuple[Kept, Tensor]:
        alpha = ball.like(ball.radius / self.planned) if self.alpha is None else ball.per_sample(self.alpha)
        alpha = -alpha if objective.targeted else alpha
        now = Now(ball, torch.zeros_like(x_adv), alpha, self.mu, None, {})
        used = torch.zeros(len(x_adv), dtype=torch.int64, device=x_adv.device)
        cycle = Cycle.of(self.steps, *self._state(x_adv, now)) if self.early_stop == "cycle" else None
        asked, roll, active = objective, Roll(), None
        for k in range(self.steps):
            if cycle is not None:
                active = cycle.last_step > k
                if (left := roll.call(~active, k)) is not None:
                    some = roll.dismiss(Kept(x_adv, None), left)
                    asked, cycle, x_adv, active = asked.at(left), cycle.at(left), x_adv[left], active[left]
                    now.ball, now.velocity = now.ball.at(left), now.velocity[left]
                    now.alpha = now.alpha[left] if now.alpha.numel() > 1 else now.alpha
                    if not some:
                        break
            seen = now.ball.as_seen(x_adv)
            now.noise = _numbers(noise, k)
            scores, grad = self._ask(asked, now, 0)(seen)
            if self.notes:
                asked.note(k, scores)
            if self.callback is not None:
                self.callback(k, seen, scores.loss)
            used[roll.rows] += 1 if active is None else active
            with profiling.phase("step", len(x_adv)):
                self._step(x_adv, grad, now, active)
            if cycle is not None:
                cycle.look([k + 1] * len(x_adv), *self._state(x_adv, now))
        x_adv = roll.close(Kept(x_adv, None)).x_adv
        seen = ball.as_seen(ball.nearest_(x_adv) if ball.strict_eps else x_adv)
        last = objective.score(seen) if scored else None
        if self.notes and last is not None:
            objective.note(self.steps, last)
        return Kept(seen, last), used

    def _state(self, x_adv: Tensor, now: Now) -> tuple[Tensor, ...]:
        """All that the next step depends on."""
        return (x_adv,) if self.mu == 0 else (x_adv, now.velocity)

    def _step(self, x_adv: Tensor, grad: Tensor, now: Now, active: Tensor | None) -> None:
        ball, alpha, (lo, hi) = now.ball, now.alpha, now.ball.bounds
        if ball.norm == "linf":
            ops.momentum_step_(x_adv, now.velocity, grad, ball.x, alpha, ball.eps, self.mu, self.kind, lo, hi, active)
            return
        length = rowwise(grad.flatten(1).norm(1, dim=1), grad)
        now.velocity.mul_(self.mu).add_(torch.where(length > 0, grad / length, 0.0))
        ball.step(x_adv, now.velocity, alpha)

    def _ask(self, objective: Objective, now: Now, place: int) -> Ask:
        """The gradient as the transforms from `place` on make it; a map given with x goes in front of the model."""
        if place == len(self.chain):
            return lambda x, before=None: objective.gradient(x, before)
        inner = self._ask(objective, now, place + 1)

        def ask(x: Tensor, before: Callable[[Tensor], Tensor] | None = None) -> tuple[Scores, Tensor]:
            return self.chain[place](lambda v, after=None: inner(v, _chained(before, after)), x, now)

        return ask


def _chained(first, second):
    return second if first is None else first if second is None else lambda v: second(first(v))


def _numbers(noise: Noise | None, step: int) -> Callable[[Tensor], Tensor]:
    """New numbers uniform in [-1, 1) at every call."""
    draws = iter(range(2 + DRAWS * step, 2 + DRAWS * (step + 1)))
    return lambda like: noise.around(torch.zeros_like(like, memory_format=torch.contiguous_format), draw=next(draws))


def _transform(given: str | Transform) -> Transform:
    if isinstance(given, str) and given in NAMES:
        return NAMES[given]()
    if isinstance(given, Transform):
        return given
    raise ValueError(f"transforms are {', '.join(map(repr, NAMES))} or objects of their classes, got {given!r}")
