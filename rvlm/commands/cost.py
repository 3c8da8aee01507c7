"""What eval says before it runs: passes and time, and with --dry-run nothing else."""

import dataclasses
import sys
from collections.abc import Callable, Sequence

from rvlm.arguments import EvalArgs
from rvlm.commands.shared import device_of
from rvlm.ranks import Ranks

__all__ = ["show", "with_times"]

WORTH = 0.01  # of the passes that a run takes at most, for what timing takes


def with_times(args: EvalArgs, ranks: Ranks, costs: Sequence, data, model: Callable, source: Callable | None) -> list:
    """Costs (`rvlm.evaluation.cost.Cost`) of evaluations of one model, with seconds where timing a batch is worth it.

    All processes time at once, as they will run, and the slowest one counts.
    """
    from rvlm.evaluation.cost import WARM_UP, Speed, measure_speed

    x = min(args.batch_size, len(data))
    if not costs or not (args.dry_run or WARM_UP * x <= WORTH * sum(cost.most.units for cost in costs)):
        return list(costs)
    mine = measure_speed(model, data.batch(slice(0, x))[0].to(device_of(args.device)), source)
    speeds = [dataclasses.astuple(speed) for speed in ranks.gather(mine)]
    slowest = Speed(*(max(column) for column in zip(*speeds, strict=True)))
    return [cost.timed(slowest, ranks.size) for cost in costs]


def show(args: EvalArgs, ranks: Ranks, costs: Sequence, title: str) -> None:
    """By the first process: on a terminal before the run, and with --dry-run in any case."""
    from rvlm.evaluation.cost import describe

    if ranks.first and (args.dry_run or sys.stderr.isatty()):
        said = describe(costs, title) if costs else f"cost of {title}: nothing, there is no evaluation left"
        print(said, file=sys.stdout if args.dry_run else sys.stderr)
