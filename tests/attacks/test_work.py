"""The queue of runs: what it hands out, and that the compiled one and its twin in Python are one thing."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rvlm.attacks import work
from rvlm.attacks.work import PyWorkQueue

SAMPLES = st.integers(0, 4)
CALLS = st.one_of(
    st.tuples(st.just("push"), SAMPLES, st.integers(0, 3)),
    st.tuples(st.just("take"), st.integers(0, 6), st.integers(0, 8)),
    st.tuples(st.just("end"), SAMPLES),
    st.tuples(st.just("drop"), SAMPLES),
)
ALL = ("take", 99, 99)  # that waits


def answer(queue, name, *args):
    try:
        return getattr(queue, name)(*args)
    except RuntimeError as error:
        return str(error)


@given(st.lists(CALLS, max_size=40))
def test_the_compiled_queue_is_its_twin(calls):
    if work.WorkQueue is None:
        pytest.skip("rvlm._host is not built")
    compiled, twin = work.WorkQueue(), PyWorkQueue()
    for call in [*calls, ALL]:
        assert answer(compiled, *call) == answer(twin, *call), call


@given(st.lists(CALLS, max_size=40))
def test_what_is_pushed_is_taken_or_dropped_once(calls):
    queue = PyWorkQueue()
    waiting = Counter()
    for name, *args in [*calls, ALL]:
        got = answer(queue, name, *args)
        if name == "push":
            waiting[tuple(args)] += 1
        elif name == "take":
            assert len(got) <= args[0] and Counter(got) <= waiting
            waiting -= Counter(got)
        elif name == "drop":
            waiting = Counter({item: n for item, n in waiting.items() if item[0] != args[0]})
    assert not waiting


def test_samples_that_have_nothing_running_come_first():
    queue = work.work_queue()
    for run in range(2):
        for sample in range(3):
            queue.push(sample, run)
    assert queue.take(2, 2) == [(0, 0), (1, 0)]
    assert queue.take(9, 2) == [(2, 0)], "the batch is full of two runs: no second run of a sample beside its first"
    assert queue.take(2, 9) == [(0, 1), (1, 1)]
    queue.drop(2)
    assert queue.take(9, 9) == []
    queue.push(0, 2)
    assert queue.take(9, 5) == [] and queue.take(9, 6) == [(0, 2)], "five run, and now six"
    queue.end(2)
    with pytest.raises(RuntimeError, match="nothing running"):
        queue.end(2)
