"""The queue of an attack's runs, from which a batch is kept full (`rvlm.attacks.slots`)."""

from collections import Counter

try:
    from rvlm._host import WorkQueue
except ImportError:  # not compiled: same interface, same order
    WorkQueue = None

__all__ = ["PyWorkQueue", "work_queue"]


class PyWorkQueue:
    """Runs, (sample, run), that wait for a slot, in the order in which they were pushed. Twin of csrc/host.cpp."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int]] = []
        self._running_of: Counter[int] = Counter()
        self._running = 0

    def push(self, sample: int, run: int) -> None:
        self._waiting.append((sample, run))

    def take(self, n: int, full: int) -> list[tuple[int, int]]:
        """Up to n items: first of samples that have nothing running, then, while fewer than `full` run, of any."""
        taken: list[tuple[int, int]] = []
        for beside in (False, True):
            left = []
            for item in self._waiting:
                fits = self._running < full if beside else self._running_of[item[0]] == 0
                if len(taken) >= n or not fits:
                    left.append(item)
                    continue
                self._running_of[item[0]] += 1
                self._running += 1
                taken.append(item)
            self._waiting = left
        return taken

    def end(self, sample: int) -> None:
        """One run of the sample is over."""
        if not self._running_of[sample]:
            raise RuntimeError("WorkQueue.end() of a sample that has nothing running")
        self._running_of[sample] -= 1
        self._running -= 1

    def drop(self, sample: int) -> None:
        """Forgets what waits of the sample."""
        self._waiting = [item for item in self._waiting if item[0] != sample]


def work_queue():
    """An empty queue, the compiled one where it was built."""
    return (WorkQueue or PyWorkQueue)()
