"""A batch of slots that is kept full: runs of an attack, (sample, restart or target), that need not stand at one step.

    waiting runs, in order -> slots of the batch -> one evaluation of all -> runs that are over make room for the next

A run is over when its steps are made, when it has returned to an earlier image, or when its sample is fooled, by it or
by another run; then nothing that waits for the sample is begun. Runs of one sample go side by side only where no other
sample waits, and only until the batch is full enough. What a run finds does not depend on its neighbours, so the
verdicts are those of one run after the other; which run is the first to fool a sample, and so its image, may differ.

With static shapes the model still sees batches of one size alone (`Objective`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvlm.attacks.ball import Ball
from rvlm.attacks.climb import Climb
from rvlm.attacks.kept import Kept
from rvlm.attacks.objective import Objective, Scores
from rvlm.attacks.work import work_queue

__all__ = ["in_slots"]

FULL = 32  # rows from which on, on a CPU, an image costs about the same in a larger batch


def in_slots(
    run: Any,
    objective: Objective,
    ball: Ball,
    start_of: Callable[[int, Tensor], Tensor],
    aim: Callable[[Tensor, Tensor], Tensor] | None,
    runs: int,
    *,
    stop: bool,
    judge: Callable[[Objective, Kept, Tensor], Kept] | None = None,
) -> tuple[Kept, Tensor]:
    """The best run of each sample, and its steps [N] in all of them.

    Args:
        run: `run.begin(objective, ball, start)` is a Climb.
        objective, ball: of all N samples; objective.slots is the largest batch.
        start_of: start_of(number of the run, samples) is where they start.
        aim: aim(samples, numbers) are the classes that runs aim at.
        runs: of each sample.
        stop: a fooled sample is done with.
        judge: judge(objective, kept, samples) is what runs have kept of these samples, with the scores that count.
    """
    device, slots, queue = ball.x.device, objective.slots, work_queue()
    for number in range(runs):
        for sample in range(len(ball.x)):
            queue.push(sample, number)
    full = slots if objective.static or ball.x.is_cuda else min(slots, FULL)
    none = torch.full((len(ball.x),), -1, device=device)
    chosen = Kept(ball.x.clone(), Scores(torch.full((len(none),), torch.nan, device=device), none == 0, none))
    used = torch.zeros_like(none)

    def part(items: list[tuple[int, int]]) -> tuple[Objective, Ball]:
        samples, numbers = torch.tensor(items, device=device).unbind(1)
        of_items = objective.at(samples)
        if aim is not None:
            of_items.target = aim(samples, numbers)
        return of_items, ball.at(samples)

    def begun(items: list[tuple[int, int]]) -> Climb:
        samples = {number: [sample for sample, its in items if its == number] for _, number in items}
        starts = [start_of(number, torch.tensor(its, device=device)) for number, its in samples.items()]
        return run.begin(*part(items), torch.cat(starts))

    def settle(items: list[tuple[int, int]], kept: Kept) -> None:
        """Merges what runs that are over have kept; those of one sample in turn."""
        chosen.scores.loss = chosen.scores.loss.to(kept.scores.loss.dtype)
        for number in dict.fromkeys(number for _, number in items):
            rows = torch.tensor([row for row, (_, its) in enumerate(items) if its == number])
            samples = torch.tensor([items[row][0] for row in rows.tolist()], device=device)
            mine, its = chosen.at(samples), kept.at(rows)
            first = mine.scores.pred < 0
            mine.merge(its, objective).take(first, its.x_adv, its.scores)
            chosen.put(samples, mine)

    items, climb, looks = [], None, 0
    while (fresh := queue.take(slots - len(items), full)) or items:
        if fresh:
            fresh.sort(key=lambda item: item[1])
            climb, items = climb.join(begun(fresh)) if items else begun(fresh), items + fresh
        of_items, around = part(items)
        while True:
            climb.look(of_items, around)
            steps = [number * climb.steps + k for (_, number), k in zip(items, climb.k, strict=True)]
            of_items.note(steps, climb.scores)
            looks += 1
            over = _true(climb.ended)
            # asking a GPU waits for it
            if climb.done is not None and (not ball.x.is_cuda or looks % 8 == 0 or over):
                done = _true(climb.done.tolist())
                if over or 8 * len(done) >= len(items):
                    over |= done
            if over:
                break
            climb.move(around)
        those = [items[row] for row in sorted(over)]
        kept = climb.at(torch.tensor(sorted(over))).kept()
        if judge is not None:
            kept = judge(part(those)[0], kept, torch.tensor([sample for sample, _ in those], device=device))
        settle(those, kept)
        gone = {those[row][0] for row in _true(kept.fooled.tolist())} if stop else set()
        for sample in gone:
            queue.drop(sample)
        stay = [row for row, (sample, _) in enumerate(items) if row not in over and sample not in gone]
        leave = sorted(set(range(len(items))).difference(stay))
        for row in leave:
            queue.end(items[row][0])
        samples = torch.tensor([items[row][0] for row in leave], device=device)
        used.index_add_(0, samples, climb.moved[torch.tensor(leave)])
        climb, items = climb.at(torch.tensor(stay, dtype=torch.int64)), [items[row] for row in stay]
        if items:
            climb.move(part(items)[1])
    return chosen, used


def _true(flags: list[bool]) -> set[int]:
    return {row for row, flag in enumerate(flags) if flag}
