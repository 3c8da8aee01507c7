"""What `rvlm profile infer` measures: what a defence adds to the time and memory of a batch.

Every defended model is timed in pairs with the plain one, in turn and in changing order, so that a machine that slows
down slows both: the overhead is the median of the ratios of pairs. Nothing is timed before every model has returned
finite logits of the right shape. Times on a CUDA device are those of events on its stream. A ZeroShotClassifier's time
is also split: pixels (resize, filter, normalisation), tower (with whatever was put into it) and head (unit norm,
logits).
"""

import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from rvlm import profiling
from rvlm.attacks import scoring
from rvlm.evaluation.evaluate import logits_of
from rvlm.models import ZeroShotClassifier

__all__ = ["measure"]

WHOLE, PHASES = "whole", ("pixels", "tower", "head")
MEGABYTE = 2**20


def measure(
    models: Mapping[str, Callable[[Tensor], Tensor]],
    x: Tensor,
    classes: int,
    batch_sizes: list[int],
    rounds: int,
) -> list[dict[str, Any]]:
    """Times forward passes without gradients, in eval mode.

    Args:
        models: classifiers by name, pixels [B, 3, H, W] in [0, 1] -> logits [B, C]; the first one is the plain one.
        x: pixels to take batches from, on the device to measure.
        classes: fewest columns of the logits.
        batch_sizes: images of a pass.
        rounds: how often each defended model and the plain one are timed, in turn; at least 2.

    Returns:
        A row per batch size and model: name, batch, latency_ms (median of the passes; _q1 and _q3 are quartiles),
        images_per_s (at the median), peak_mb (most that a pass allocates), weights_mb, ratio (to the plain model,
        with quartiles; of the plain one None) and phases_ms (medians; empty for other callables).

    Raises:
        ValueError: logits of another shape or not finite, fewer images than a batch, or a number that cannot be.
    """
    if rounds < 2 or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"expected batch sizes of at least 1 and 2 rounds or more, got {batch_sizes} and {rounds}")
    if max(batch_sizes) > len(x):
        raise ValueError(f"a batch of {max(batch_sizes)} needs as many images, got {len(x)}: raise --limit")
    for name, model in models.items():
        if not logits_of(model, x[: max(batch_sizes)], classes).isfinite().all():
            raise ValueError(f"{name} returns logits that are not finite, so its speed means nothing")
    from tqdm import tqdm

    plain, *defended = models
    rows = []
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(scoring(model))
        bar = stack.enter_context(tqdm(total=len(batch_sizes) * rounds, desc="inference", disable=None, unit="round"))
        for size in batch_sizes:
            batch = x[:size]
            peaks = {name: _peak(model, batch) for name, model in models.items()}
            spent: dict[str, list[dict[str, float]]] = {name: [] for name in models}
            ratios: dict[str, list[float]] = {name: [] for name in models}
            for k in range(rounds):
                if not defended:
                    spent[plain].append(_seconds(models[plain], batch))
                for name in defended:
                    pair = (plain, name) if k % 2 else (name, plain)
                    times = {each: _seconds(models[each], batch) for each in pair}
                    for each in pair:
                        spent[each].append(times[each])
                    ratios[name].append(times[name][WHOLE] / times[plain][WHOLE])
                bar.update()
            rows += [_row(name, model, size, peaks[name], spent[name], ratios[name]) for name, model in models.items()]
    return rows


def _peak(model: Callable[[Tensor], Tensor], x: Tensor) -> int:
    model(x)  # what is slow, or kept, once
    return profiling.peak_bytes(lambda: model(x), x.device)


def _seconds(model: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, float]:
    """Of one pass: the whole, and its phases."""
    with profiling.record(x.device) as timer, ExitStack() as hooks:
        split = isinstance(model, ZeroShotClassifier)
        if split:

            def turn_to(phase: str) -> None:
                timer.stop()
                timer.start(phase)

            tower = model.clip.visual
            hooks.callback(tower.register_forward_pre_hook(lambda *_: turn_to(PHASES[1])).remove)
            hooks.callback(tower.register_forward_hook(lambda *_: turn_to(PHASES[2])).remove)
        timer.start(WHOLE)
        if split:
            timer.start(PHASES[0])
        model(x)
        if split:
            timer.stop()
        timer.stop()
        return {phase: seconds for phase, (seconds, _) in timer.totals().items()}


def _row(name: str, model: Any, size: int, peak: int, spent: list[dict[str, float]], ratios: list[float]) -> dict:
    held = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    low, middle, high = statistics.quantiles((times[WHOLE] for times in spent), n=4, method="inclusive")
    row = {
        "name": name, "batch": size, "latency_ms": 1e3 * middle, "latency_ms_q1": 1e3 * low,
        "latency_ms_q3": 1e3 * high, "images_per_s": size / middle, "peak_mb": peak / MEGABYTE,
        "weights_mb": sum(t.numel() * t.element_size() for t in held) / MEGABYTE,
        "passes": len(spent), "ratio": None, "ratio_q1": None, "ratio_q3": None,
    }  # fmt: skip
    if ratios:
        row["ratio_q1"], row["ratio"], row["ratio_q3"] = statistics.quantiles(ratios, n=4, method="inclusive")
    phases = [phase for phase in PHASES if phase in spent[0]]
    return row | {"phases_ms": {p: 1e3 * statistics.median(times[p] for times in spent) for p in phases}}
