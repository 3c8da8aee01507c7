"""What every op promises about memory: any layout, expanded inputs, empty batches, no element left unwritten."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from rvlm import ops
from rvlm.ops.distill import KINDS as DIVERGENCES
from rvlm.ops.losses import KINDS as LOSSES


@dataclass(frozen=True)
class Case:
    """An op on tensors of these shapes.

    written: how many of the first tensors it updates. batch: the axis of each tensor that is the batch, or None.
    learns: the tensors that get gradients.
    """

    call: Callable
    shapes: list[tuple[int, ...]]
    written: int = 0
    batch: tuple[int | None, ...] | None = None
    learns: tuple[int, ...] = ()

    def axes(self) -> tuple[int | None, ...]:
        return self.batch or (0,) * len(self.shapes)

    def tensors(self, device) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.rand(shape, generator=generator).to(device) for shape in self.shapes]

    def results(self, tensors, layout=lambda t: t) -> list[torch.Tensor]:
        """What it returns or writes, and the gradients of what it got before the layout."""
        leaves = [t.clone().requires_grad_(k in self.learns) for k, t in enumerate(tensors)]
        moved = [layout(leaf) for leaf in leaves]
        returned = self.call(*moved)
        got = moved[: self.written] or ([returned] if isinstance(returned, torch.Tensor) else list(returned))
        ways = [t for t in got if t.requires_grad]
        slopes = [torch.arange(t.numel(), device=t.device).view_as(t).to(t.dtype) for t in ways]
        asked = [leaves[k] for k in self.learns]
        return [t.detach() for t in (*got, *(torch.autograd.grad(ways, asked, slopes) if asked else ()))]


def step(op, *numbers, flags="active"):
    """With the third of four rows switched off."""

    def call(*tensors):
        on = torch.tensor([True, True, False, True], device=tensors[0].device)[: len(tensors[0])]
        return op(*tensors, *numbers, **{flags: on})

    return call


def loss(kind):
    def call(z, *y):
        rows = torch.arange(len(z), device=z.device)
        return ops.attack_loss(z, *(y or [rows]), kind, target=rows + 1 if kind == "dlr-targeted" else None)

    return call


def divergence(kind):
    return lambda student, teachers, weights: ops.multi_teacher_kl(student, teachers, weights, 2.0, kind, True)


IMAGES, LOGITS, HEADS, STREAM = (4, 3, 6, 5), (4, 7), (4, 2, 5, 3), (4, 5, 6)
CASES = {
    "linf_step": Case(lambda *t: ops.linf_step(*t, 0.02, 0.05), [IMAGES] * 3),
    "linf_step_": Case(step(ops.linf_step_, 0.02, 0.05), [IMAGES] * 3, written=1),
    "l2_step_": Case(step(ops.l2_step_, 0.2, 0.5), [IMAGES] * 3, written=1),
    "l1_step_": Case(step(ops.l1_step_, 2.0, 3.0), [IMAGES] * 3, written=1),
    "momentum_step_ mi": Case(step(ops.momentum_step_, 0.02, 0.05, 0.9, "mi"), [IMAGES] * 4, written=2),
    "momentum_step_ sign": Case(step(ops.momentum_step_, 0.02, 0.05, 0.9, "sign"), [IMAGES] * 4, written=2),
    "apgd_step_": Case(step(ops.apgd_step_, 0.02, 0.05), [IMAGES] * 4, written=1),
    "keep_best_": Case(step(ops.keep_best_, flags="flag"), [IMAGES] * 2, written=1),
    "uniform_start": Case(lambda x: ops.uniform_start(x, 0.1, None, 7), [IMAGES]),
    "l1_project": Case(lambda *t: ops.l1_project(*t, 2.0), [IMAGES] * 2),
    "gaussian_filter": Case(lambda x: ops.gaussian_filter(x, 2.0), [IMAGES], learns=(0,)),
    **{
        f"attack_loss {kind}": Case(loss(kind), [LOGITS] * (2 if kind == "soft-ce" else 1), learns=(0,))
        for kind in LOSSES
    },
    "clip_head_loss": Case(
        lambda e, head: ops.clip_head_loss(e, head, torch.arange(len(e), device=e.device)),
        [LOGITS, (7, 9)],
        batch=(0, None),
    ),
    **{
        f"multi_teacher_kl {kind}": Case(
            divergence(kind), [LOGITS, (3, *LOGITS), (3, 4)], batch=(0, 1, 1), learns=(0, 1)
        )
        for kind in DIVERGENCES
    },
    "fold_teachers": Case(lambda *t: ops.fold_teachers(*t, 2.0), [(3, *LOGITS), (3, 4)], batch=(1, 1)),
    "anchored_residual": Case(
        lambda x0, o, anchor, *norm: ops.anchored_residual(x0, o, anchor, 0.5, "lerp", *norm),
        [STREAM, STREAM, STREAM[1:], (6,), (6,)],
        batch=(0, 0, None, None, None),
        learns=(0, 1, 2, 3, 4),
    ),
    "anchored_attention map": Case(
        lambda *t: ops.anchored_attention(*t, 0.3),
        [HEADS] * 3 + [(2, 5, 5)],
        batch=(0, 0, 0, None),
        learns=(0, 1, 2, 3),
    ),
    "anchored_attention heads": Case(
        lambda *t: ops.anchored_attention(*t, 0.3, site="heads", mix="lerp"),
        [HEADS] * 3 + [(2, 5, 3)],
        batch=(0, 0, 0, None),
        learns=(0, 1, 2, 3),
    ),
    "prefix_attention": Case(
        lambda *t: ops.prefix_attention(*t),
        [HEADS] * 3 + [(2, 2, 3)] * 2,
        batch=(0, 0, 0, None, None),
        learns=(0, 1, 2, 3, 4),
    ),
}
LAYOUTS = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
    "rows apart": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], 1)[:, 0],
    "behind others": lambda t: torch.cat([torch.full_like(t[:1], torch.nan), t])[1:],
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
}

every_op = pytest.mark.parametrize("name", CASES)


def same(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@every_op
def test_any_layout_gives_the_same(backend, device, name):
    case = CASES[name]
    tensors = case.tensors(device)
    expected = case.results(tensors)
    for layout in LAYOUTS.values():
        same(case.results(tensors, lambda t, layout=layout: layout(t) if t.dim() > 1 else t), expected)


PER_SAMPLE = {  # images a, g, x; a number, a flag and a class for each
    "linf_step": lambda a, g, x, v, on, k: ops.linf_step(a, g, x, v, v, active=on),
    "linf_step_": lambda a, g, x, v, on, k: ops.linf_step_(a, g, x, v, v, active=on),
    "l2_step_": lambda a, g, x, v, on, k: ops.l2_step_(a, g, x, 5 * v, 9 * v, active=on),
    "l1_step_": lambda a, g, x, v, on, k: ops.l1_step_(a, g, x, 50 * v, 90 * v, active=on, top=v),
    "momentum_step_": lambda a, g, x, v, on, k: ops.momentum_step_(a, g.clone(), g, x, v, v, active=on),
    "apgd_step_": lambda a, g, x, v, on, k: ops.apgd_step_(a.clone(), a, g, x, v, v, active=on),
    "keep_best_": lambda a, g, x, v, on, k: ops.keep_best_(a, g, on),
    "uniform_start": lambda a, g, x, v, on, k: ops.uniform_start(x, v, k, 7),
    "l1_project": lambda a, g, x, v, on, k: ops.l1_project(a, x, 90 * v),
    "attack_loss": lambda a, g, x, v, on, k: ops.attack_loss(a.flatten(1)[:, :7], k, "dlr-targeted", 6 - k)[0],
    "multi_teacher_kl": lambda a, g, x, v, on, k: ops.multi_teacher_kl(a[:, 0, 0], torch.stack([g[:, 0, 0]]), v[None])[
        0
    ],
}
NUMBERS = {
    "every second": lambda t: torch.stack([t, torch.ones_like(t)], 1)[:, 0],
    "one for all": lambda t: t[2:3].expand(len(t)),
}


@pytest.mark.parametrize("layout", NUMBERS)
@pytest.mark.parametrize("name", PER_SAMPLE)
def test_numbers_per_sample_in_any_layout(backend, device, name, layout):
    images = CASES["linf_step"].tensors(device)
    numbers = [
        torch.tensor([0.01, 0.02, 0.03, 0.04], device=device),
        torch.tensor([True, False, True, False], device=device),
        torch.tensor([0, 1, 2, 5], device=device),
    ]
    apart = [NUMBERS[layout](t) for t in numbers]
    assert not any(t.is_contiguous() for t in apart)
    got, expected = (
        PER_SAMPLE[name](*(t.clone() for t in images), *given) for given in (apart, [t.contiguous() for t in apart])
    )
    assert torch.equal(got, expected)


@every_op
def test_one_row_for_the_whole_batch(backend, device, name):
    case = CASES[name]
    for which, axis in list(enumerate(case.axes()))[case.written :]:
        if axis is not None:
            expanded, copied = case.tensors(device), case.tensors(device)
            expanded[which] = copied[which].narrow(axis, 0, 1).expand_as(copied[which])
            copied[which] = expanded[which].contiguous()
            returned = [case.call(*tensors) for tensors in (expanded, copied)]
            same(*(t if isinstance(t, tuple) else [t] for t in returned))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.written])
def test_rows_that_share_memory_are_not_written_to(backend, device, name):
    tensors = CASES[name].tensors(device)
    with pytest.raises(RuntimeError, match="single memory location"):
        CASES[name].call(tensors[0][:1].expand_as(tensors[0]), *tensors[1:])


@every_op
def test_an_empty_batch(backend, device, name):
    case = CASES[name]
    tensors = case.tensors(device)
    empty = [t if axis is None else t.narrow(axis, 0, 0) for t, axis in zip(tensors, case.axes(), strict=True)]
    for ours, full in zip(case.results(empty), case.results(tensors), strict=True):
        assert ours.dtype == full.dtype and not ours.any()
        assert ours.dim() == full.dim() and all(a in (0, b) for a, b in zip(ours.shape, full.shape, strict=True))


@every_op
def test_every_element_is_written(backend, device, name):
    """Fresh memory holds NaN here, in Python and in C++."""
    case = CASES[name]
    tensors = case.tensors(device)
    expected, before = case.results(tensors), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(8, device=device).isnan().all()
        same(case.results(tensors), expected)
    finally:
        torch.use_deterministic_algorithms(before)


def test_no_public_op_is_missing():
    functions = {name for name in ops.__all__ if name not in ("backends", "use_backend")}
    assert functions == {name.split()[0] for name in CASES}
