"""Nothing in the loop of an attack waits for the device: what asks for a tensor's value is counted per step.

A GPU raises at the question itself (the test at the end). Anywhere else the operations that would wait are counted,
with tensors that say that they are on a GPU, so that attacks take the path that they take there.
"""

import collections

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rvlm.attacks import apgd, fab, mifgsm, pgd, square
from rvlm.attacks.rows import on_device

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.is_nonzero.default, aten._unique2.default, aten.unique_consecutive.default,
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts operations whose result the host must know before it can go on."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func in WAITING or by_mask:
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Uploads(TorchFunctionMode):
    """Counts tensors made of numbers that the host has, which waits for the device that they are for unless they leave
    pinned memory without blocking, and lists made of tensors."""

    def __init__(self, seen):
        super().__init__()
        self.seen, self.pinned = seen, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            if kwargs.pop("pin_memory", False):
                self.pinned.append(func(*args, **kwargs))
                return self.pinned[-1]
            self.seen[func.__name__] += 1
        blocks = func is torch.Tensor.to and not kwargs.get("non_blocking")
        if func is torch.Tensor.tolist or (blocks and any(args[0] is t for t in self.pinned)):
            self.seen[func.__name__] += 1
        return func(*args, **kwargs)


def waits(attack, model, x, y, **settings) -> collections.Counter:
    with Waits() as mode, Uploads(mode.seen):
        attack(model, x, y, generator=torch.Generator().manual_seed(0), **settings)
    return mode.seen


# Attack, settings, the name of its number of steps, and after how many of them it may ask who is left.
LOOPS = [
    (pgd, {}, "steps", None),
    (pgd, {"best": "adv", "restarts": 2}, "steps", None),
    (pgd, {"best": "loss", "norm": "l2", "quantize": 255}, "steps", None),
    (pgd, {"norm": "l1"}, "steps", None),
    (pgd, {"eot": 2, "return_info": True}, "steps", None),
    (pgd, {"precision": "bf16"}, "steps", None),
    (pgd, {"early_stop": "freeze"}, "steps", 8),
    (pgd, {"early_stop": "compact", "best": "adv"}, "steps", 8),
    (pgd, {"early_stop": "cycle"}, "steps", 8),
    (pgd, {"early_stop": "compact", "slots": 4, "restarts": 2, "return_info": True}, "steps", 8),
    (pgd, {"early_stop": "compact+cycle", "slots": 4, "restarts": 2}, "steps", 8),
    (apgd, {}, "steps", None),
    (apgd, {"norm": "l2", "best": "loss"}, "steps", None),
    (apgd, {"norm": "l1", "larger_eps": True}, "steps", None),
    (apgd, {"early_stop": "compact"}, "steps", 8),
    (apgd, {"early_stop": "compact", "slots": 4, "return_info": True}, "steps", 8),
    (apgd, {"early_stop": "compact", "slots": 4, "norm": "l1"}, "steps", 8),
    (fab, {}, "steps", None),
    (fab, {"norm": "l2", "aimed": False}, "steps", None),
    (fab, {"early_stop": "compact", "targets": 1}, "steps", 8),
    (mifgsm, {"transforms": ["ni", "di", "ti", "vmi"]}, "steps", None),
    (mifgsm, {"norm": "l2"}, "steps", None),
    (square, {}, "queries", 32),
    (square, {"norm": "l2"}, "queries", 32),
    (square, {"norm": "l1"}, "queries", 32),
    (square, {"slots": 4, "restarts": 2, "return_info": True}, "queries", 32),
]
NAMES = [f"{attack.__name__}-{'-'.join(map(str, given.values())) or 'plain'}" for attack, given, *_ in LOOPS]


@pytest.mark.parametrize("attack, given, count, every", LOOPS, ids=NAMES)
def test_what_waits_does_not_grow_with_the_steps(attack, given, count, every, build, batch, monkeypatch):
    model, (x, y) = build("conv", torch.float32), batch(torch.float32)
    y = model(x).argmax(1)
    if "slots" in given:  # those that are wrong make room for runs that are then some steps behind
        y[:2] = (y[:2] + 1) % 5
    given = {"eps": 0.5 / 255, **given}
    if given.get("norm") == "l2":
        given["eps"] = 0.01
    if given.get("norm") == "l1":
        given["eps"] = 0.1
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    short, long = (waits(attack, model, x, y, **given, **{count: n}) for n in (64, 128))
    assert sum(short.values()) > 0, "the checks before the loop ask, so the count works"
    more = sum(long.values()) - sum(short.values())
    assert more <= (0 if every is None else 2 * 64 // every), long - short


def test_a_loop_that_waits_is_caught(build, batch, monkeypatch):
    model, (x, y) = build("conv", torch.float32), batch(torch.float32)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    seen = [waits(pgd, model, x, y, steps=n, callback=lambda k, x_adv, loss: loss.sum().item()) for n in (4, 8)]
    assert sum(seen[1].values()) - sum(seen[0].values()) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ["eager", "cudagraph"])
@pytest.mark.parametrize("attack, given, count, every", LOOPS, ids=NAMES)
def test_a_gpu_is_not_waited_for(attack, given, count, every, engine, build, batch):
    """From the second step on: the first look at the model's output asks about it."""
    if every is not None or (engine == "cudagraph" and attack is not pgd):
        pytest.skip("asks at its intervals" if every is not None else "its loop is the eager one")
    model, (x, y) = build("conv", torch.float32).cuda(), [t.cuda() for t in batch(torch.float32)]
    seen = []

    def watch(step, x_adv, loss):
        seen.append(step)
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")
        elif step == 9:
            torch.cuda.set_sync_debug_mode("default")

    try:
        attack(model, x, y, engine=engine, callback=watch, **{count: 40}, **given)  # a third at a time with larger_eps
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 9 in seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_not_waited_for_by_uploads():
    like = torch.zeros(1, device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        numbers = [on_device(like, [k, k + 1, k + 2]) for k in range(50)]  # memory that is used again must be free
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [t.tolist() for t in numbers] == [[k, k + 1, k + 2] for k in range(50)]
