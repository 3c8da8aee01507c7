"""Square attack (Andriushchenko et al. 2020, arXiv 1912.00049; in L1, Croce & Hein 2021): random search, no gradients.

    Linf    start: x + eps * random signs per channel and column (stripes)
            query: a square window, moved by 2 eps along a random sign per channel, projected
    L2, L1  start: 5 x 5 tiles of a fixed pattern (two pyramids of opposite sign), random signs, stretched to eps
            query: one window is cleared, and its norm, with what is left up to eps, goes to another one, which takes
            its old shape plus the pattern with random signs; then stretched to eps and cut (L1: projected)

A proposal is kept if the loss rises or the model is fooled. The side of a window is sqrt(p H W) with p = p_init for the
first 10 queries, and halved after 10, 50, 200, 500, 1,000, 2,000, 4,000, 6,000 and 8,000.

The steps are those of AutoAttack's implementation, which places windows in 0 .. H - side - 1, one place short. There
the samples of a batch share windows and channel signs; here every one has its own, so that no result depends on the
batch.
"""

import bisect
import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm import profiling
from rvlm.attacks.ball import NORMS, ORDER, Ball, Noise, rowwise
from rvlm.attacks.kept import Kept
from rvlm.attacks.objective import AttackResult, Objective, Passes
from rvlm.attacks.runs import left_over
from rvlm.attacks.search import Attack, check_choices, check_count, check_slots, search

__all__ = ["Square", "square"]

HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries
TINY = 1e-12


def square(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Any = None,
    *,
    eps: float | Tensor = 8 / 255,
    queries: int = 5000,
    norm: str = "linf",
    targeted: bool = False,
    loss: str | Callable[[Any, Any], Tensor] = "margin",
    p_init: float = 0.8,
    rescale: bool = False,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
    slots: int | None = None,
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
    """Square attack: black-box, needs only what the loss is computed from. What is not listed is as in `pgd`.

    Args:
        x: images [B, C, H, W]; L2 and L1 need sides of five pixels or more.
        queries: proposals per run, after the start; below 2^20.
        loss: "margin" (for targeted attacks, too), "ce", "dlr" or a callable.
        p_init: share of an image that the first windows cover, in (0, 1].
        rescale: stretch the schedule of window sizes, made for 10,000 queries, to `queries`.
        restarts: with a named loss a later run is for the samples that no earlier one has fooled.
        slots: the largest batch that goes through the model; None: all of x. All samples are at one query, and at every
            one those that are left are cut anew into batches, of which all but the last are full: x may be as large as
            memory allows. With "compile" and "cudagraph" all batches have that size. For a loss by name. A sample's
            proposals do not depend on it.
        callback: called as callback(query, proposals, loss), for the samples that are not fooled yet, in one call
            whatever `slots` is.

    Returns:
        As `pgd`: the first image that fooled the model, else the one with the best loss. `steps_used` counts queries.

    Raises:
        As `pgd`; ValueError: images that are not [B, C, H, W] or too small.
    """
    check_count("queries", queries, 1)
    check_choices(norm=(norm, NORMS))
    if queries >= 2**20 - 2:
        raise ValueError(f"queries must be below 2^20 - 2, got {queries}")
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init must be a share of the image, in (0, 1], got {p_init}")
    if isinstance(x, Tensor) and (x.dim() != 4 or (norm != "linf" and min(x.shape[2:]) < 5)):
        least = "" if norm == "linf" else " with sides of at least 5"
        raise ValueError(f"square needs images [B, C, H, W]{least}, got {list(x.shape)}")
    if slots is not None:
        check_slots(loss)
    run = _Squares(queries, p_init, rescale, callback)
    return search(
        "square", run, model, x, y, eps=eps, norm=norm, loss=loss, bounds=bounds, targeted=targeted, own_start=True,
        restarts=restarts, survivors=isinstance(loss, str), slots=slots, generator=generator, sample_ids=sample_ids,
        precision=precision, strict_eps=strict_eps, quantize=quantize, model_mode=model_mode, engine=engine,
        return_info=return_info,
    )  # fmt: skip


class Square(Attack):
    """`square` with its settings fixed: `Square(model, eps=4/255, queries=1000)(x, y)`. Its keywords are attributes."""

    function = square

    @staticmethod
    def _passes(classes: int, norm: str, given: dict[str, Any]) -> Passes:
        """Every run: the start and each query."""
        return Passes(given["restarts"] * (given["queries"] + 1))


class _Squares:
    """One run."""

    def __init__(self, queries: int, p_init: float, rescale: bool, callback) -> None:
        self.queries, self.p_init, self.rescale, self.callback = queries, p_init, rescale, callback
        self.planned, self.spent, self.begun = queries, 0, False  # spent: of the schedule of sizes

    def continued(self, whole: bool) -> "_Squares":
        """From the start that is given: the whole schedule of sizes, or a quarter more of its smallest windows."""
        run = copy.copy(self)
        run.queries, run.spent, run.begun = left_over(self.queries, whole), 0 if whole else self.planned, True
        return run

    def __call__(self, objective: Objective, ball: Ball, x: Tensor, scored: bool, noise: Noise) -> tuple[Kept, Tensor]:
        moves = _Stripes() if ball.norm == "linf" else _Tiles(ORDER[ball.norm])
        seen = ball.as_seen(x if self.begun else moves.start(ball, noise))
        kept = Kept(seen.clone(), objective.score(seen))
        objective.note(0, kept.scores)
        used = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        rows, part, target, draws = None, ball, objective, noise
        every = 1 if not x.is_cuda else 32  # asking a GPU who is left waits for it; a fooled sample does not change
        compact = objective.named and objective.labels is not None
        for query in range(self.queries):
            if compact and query % every == 0:
                left = (~kept.fooled).nonzero().flatten()
                if not len(left):
                    break
                if len(left) < len(part.x):
                    rows, part, target, draws = left, ball.at(left), objective.at(left), noise.at(left)
            mine = kept if rows is None else kept.at(rows)
            with profiling.phase("step", len(part.x)):
                draw = draws.around(part.x.new_zeros(len(part.x), 4 + 3 * x.shape[1]), draw=2 + query)
                proposal = part.as_seen(moves.propose(part, mine.x_adv, self._side(self.spent + query, x), draw))
            scores = target.score(proposal)
            if self.callback is not None:
                self.callback(query, proposal, scores.loss)
            take = target.better(scores.loss, mine.scores.loss)
            if mine.fooled is not None:
                take = (take | scores.fooled) & ~mine.fooled
                alive = ~mine.fooled
            else:
                alive = torch.ones_like(take)
            if rows is None:
                used += alive
                kept.take(take, proposal, scores)
            else:
                used[rows] += alive.to(used.dtype)
                mine.take(take, proposal, scores)
                kept.put(rows, mine)
            target.note(query + 1, mine.scores)
        return kept, used

    def _side(self, query: int, x: Tensor) -> float:
        """Side of a window before it is rounded."""
        at = int(query / self.planned * 10000) if self.rescale else query
        return math.sqrt(self.p_init / 2 ** bisect.bisect_left(HALVED_AFTER, at) * x[0, 0].numel())


class _Stripes:
    """Starts and proposals in Linf."""

    def start(self, ball: Ball, noise: Noise) -> Tensor:
        rows, channels, _, width = ball.x.shape
        signs = noise.around(ball.x.new_zeros(rows, channels, 1, width)).sign()
        return ball.nearest_(ball.x + rowwise(ball.eps, ball.x) * signs)

    def propose(self, ball: Ball, best: Tensor, side: float, draw: Tensor) -> Tensor:
        channels, height, width = best.shape[1:]
        side = min(max(round(side), 1), height, width)
        top, left = _place(draw[:, 0], height, side), _place(draw[:, 1], width, side)
        down, along = (_inside(start, side, n) for start, n in ((top, height), (left, width)))
        window = (down[:, :, None] & along[:, None, :])[:, None]
        move = 2 * rowwise(ball.eps, best) * draw[:, 2 : 2 + channels].sign()[:, :, None, None]
        return ball.nearest_(best + torch.where(window, move, 0.0))


class _Tiles:
    """Starts and proposals in L2 (order 2) and L1 (order 1)."""

    def __init__(self, order: int) -> None:
        self.order = order

    def start(self, ball: Ball, noise: Noise) -> Tensor:
        rows, channels, height, width = ball.x.shape
        side = height // 5
        first = (height - 5 * side) // 2
        draws = noise.around(ball.x.new_zeros(rows, height // side, width // side, 1 + channels))
        delta = torch.zeros_like(ball.x)
        for i in range(height // side):
            for j in range(width // side):
                window = delta[:, :, first + i * side :, first + j * side :][:, :, :side, :side]
                tile = self._tile(side, draws[:, i, j, 0], draws[:, i, j, 1:])
                window += tile[:, :, : window.shape[2], : window.shape[3]]
        return self._stretch(ball, delta)

    def propose(self, ball: Ball, best: Tensor, side: float, draw: Tensor) -> Tensor:
        channels, height, width = best.shape[1:]
        side = min(max(round(side), 3) | 1, height, width)
        delta = best - ball.x
        here = self._window(best, side, draw[:, 0], draw[:, 1])
        there = self._window(best, side, draw[:, 2], draw[:, 3])
        old = delta[here]
        both = torch.zeros_like(best, dtype=torch.bool)
        both[here], both[there] = True, True
        held = self._length(torch.where(both, delta, 0.0))
        spare = (rowwise(ball.eps, best) ** self.order - self._whole(delta) ** self.order).clamp(min=0)
        new = self._tile(side, draw[:, 4], draw[:, 5 : 5 + channels]) + old / (TINY + self._length(old))
        budget = (spare / channels + held**self.order) ** (1 / self.order)
        new = new / (TINY + self._length(new)) * (budget if self.order == 2 else channels * budget)
        delta[there] = 0.0
        delta[here] = new
        return self._stretch(ball, delta)

    def _stretch(self, ball: Ball, delta: Tensor) -> Tensor:
        lo, hi = ball.bounds
        if self.order == 2:
            delta = delta / (self._whole(delta) + TINY) * rowwise(ball.eps, delta)
            moved = (ball.x + delta).clamp(lo, hi)
            return ball.nearest_(moved) if ball.strict_eps else moved
        return ball.scaled(1 - 1e-6).nearest_(ball.x + delta)

    def _tile(self, side: int, turn: Tensor, signs: Tensor) -> Tensor:
        """The pattern, turned where a number is positive, with a sign for each channel: [B, C, side, side]."""
        tile = _pattern(side, self.order, signs.device, signs.dtype)
        tile = torch.where((turn > 0)[:, None, None], tile.T, tile)
        return tile[:, None] * signs.sign()[:, :, None, None]

    def _window(self, x: Tensor, side: int, down: Tensor, along: Tensor) -> tuple[Tensor, ...]:
        """Index of a window per sample in all channels."""
        batch, channels, height, width = x.shape
        offset = torch.arange(side, device=x.device)
        rows = _place(down, height, side)[:, None] + offset
        columns = _place(along, width, side)[:, None] + offset
        samples, planes = torch.arange(batch, device=x.device), torch.arange(channels, device=x.device)
        return samples[:, None, None, None], planes[:, None, None], rows[:, None, :, None], columns[:, None, None, :]

    def _length(self, t: Tensor) -> Tensor:
        return torch.linalg.vector_norm(t, self.order, dim=(2, 3), keepdim=True)

    def _whole(self, t: Tensor) -> Tensor:
        return torch.linalg.vector_norm(t, self.order, dim=(1, 2, 3), keepdim=True)


def _place(draw: Tensor, n: int, side: int) -> Tensor:
    """Numbers in [-1, 1) as places of a window along n pixels: 0 .. n - side - 1, or 0 if there is one place only."""
    return ((draw + 1) / 2 * (n - side)).long()


def _inside(start: Tensor, side: int, n: int) -> Tensor:
    """bool [B, n]: the pixels of a window."""
    place = torch.arange(n, device=start.device) - start[:, None]
    return (place >= 0) & (place < side)


@functools.lru_cache(maxsize=64)
def _pattern(side: int, order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Two pyramids of opposite sign, one above the other, of norm 1: [side, side]."""
    above = _pyramid(side // 2, side, order)
    pattern = torch.cat([above, -_pyramid(side - side // 2, side, order)])
    return (pattern / torch.linalg.vector_norm(pattern, order)).to(device, dtype)


def _pyramid(height: int, width: int, order: int) -> Tensor:
    """At distance d (the larger of rows and columns) from the middle: sum over k > d of k^-2 (L2) or k^-4 (L1)."""
    levels = max(height // 2 + 1, width // 2 + 1)
    powers = torch.arange(1, levels + 1, dtype=torch.float64) ** (-2.0 if order == 2 else -4.0)
    sums = powers.flip(0).cumsum(0).flip(0)
    down, along = ((torch.arange(n) - n // 2).abs() for n in (height, width))
    pyramid = sums[torch.maximum(down[:, None], along)]
    length = torch.linalg.vector_norm(pyramid, order)
    return pyramid / length if height else pyramid
