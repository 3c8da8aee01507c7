"""An attack leaves no trace: on success, on failure, in every grad mode and under autocast."""

import copy
import functools
import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rvlm.attacks import AttackWarning, apgd, pgd, scoring


class Counting(nn.Module):
    """A model with everything that could be disturbed: batch norm, dropout, a buffer it writes, mixed requires_grad."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.Flatten(), nn.Linear(144, 5)
        )
        self.register_buffer("calls", torch.zeros(()))
        self.fail_at, self.seen = fail_at, 0
        self.body[0].weight.requires_grad_(False)
        self.body[4].weight.grad = torch.ones_like(self.body[4].weight)
        self.train()
        self.body[1].eval()

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        if self.seen == self.fail_at:
            raise RuntimeError("the model broke")
        return self.body(x)


def state(model):
    return dict(
        parameters={n: p.detach().clone() for n, p in model.named_parameters()},
        identities=[id(p) for p in model.parameters()] + [p.data_ptr() for p in model.parameters()],
        dtypes=[p.dtype for p in model.parameters()],
        grads={n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        trained=[p.requires_grad for p in model.parameters()],
        buffers={n: b.clone() for n, b in model.named_buffers()},
        modes=[m.training for m in model.modules()],
        grad_mode=torch.is_grad_enabled(),
        inference=torch.is_inference_mode_enabled(),
        autocast=torch.is_autocast_enabled("cpu"),
        fast_path=torch.backends.mha.get_fastpath_enabled(),
        rng=torch.get_rng_state(),
    )


def assert_same(before, after, but=()):
    for key in before:
        if key in but:
            continue
        a, b = before[key], after[key]
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), key
        elif isinstance(a, dict):
            for name in a:
                assert (a[name] is None and b[name] is None) or torch.equal(a[name], b[name]), (key, name)
        else:
            assert a == b, key


CALLERS = {
    "plain": lambda: torch.enable_grad(),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
@pytest.mark.parametrize("fail_at", [None, 1, 4])
def test_no_trace(caller, mode, fail_at, batch):
    x, y = batch(torch.float32)
    model = Counting(fail_at)
    with CALLERS[caller]():
        before, kept = state(model), (x.clone(), y.clone())
        drawn = {"generator": torch.Generator().manual_seed(0)}
        if fail_at:
            with pytest.raises(RuntimeError, match="the model broke"):
                pgd(model, x, y, model_mode=mode, steps=5, **drawn)
        else:
            x_adv = pgd(model, x, y, model_mode=mode, steps=5, **drawn)
            assert not x_adv.requires_grad and x_adv.grad_fn is None and x_adv.dtype == x.dtype
            assert (x_adv != x).any()
        # Dropout in train mode draws from the global generator: that is the model's doing.
        assert_same(before, state(model), but=() if mode == "eval" else ("rng",))
        assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])


def test_tensors_made_in_inference_mode(build, batch):
    model = build()
    expected = pgd(model, *batch(), random_start=False)
    with torch.inference_mode():
        x, y = batch()
        inside = pgd(model, x, y, random_start=False)
    assert torch.equal(inside, expected) and not inside.is_inference()
    assert torch.equal(pgd(model, x, y, random_start=False), expected)


def test_one_draw_from_the_global_generator_and_none_after_an_error(build, batch):
    (x, y), model = batch(), build()
    torch.manual_seed(5)
    torch.randint(-(2**63), 2**63 - 1, ())
    one_draw = torch.get_rng_state()
    torch.manual_seed(5)
    pgd(model, x, y)
    assert torch.equal(torch.get_rng_state(), one_draw)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="labels"):
        pgd(model, x, y + 5)
    assert torch.equal(torch.get_rng_state(), before)
    pgd(model, x, y, random_start=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_any_callable(build, batch):
    model = build()
    x, y = batch()
    settings = dict(random_start=False, steps=3)
    expected = pgd(model, x, y, **settings)
    for call in (
        model.forward,
        functools.partial(model.forward),
        lambda v: model(v),
        torch.compile(model, backend="eager"),
    ):
        assert torch.equal(pgd(call, x, y, **settings), expected)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_no_weight_gradients_are_computed(build, batch):
    """Parameters are frozen during the attack: the model sees none that wants a gradient."""
    model, (x, y) = build(), batch()
    seen = []
    model.register_forward_hook(lambda m, args, out: seen.append(any(p.requires_grad for p in m.parameters())))
    pgd(model, x, y, steps=2)
    assert seen and not any(seen)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "transposed"])
def test_memory_format_and_input_layouts(build, batch, layout):
    x, y = batch()
    expected = pgd(build(), x, y, random_start=False)
    if layout == "channels_last":
        given = x.contiguous(memory_format=torch.channels_last)
    elif layout == "expanded":
        given, expected = x[:1].expand(6, -1, -1, -1), pgd(build(), x[:1].repeat(6, 1, 1, 1), y, random_start=False)
    else:
        given = x.transpose(2, 3).contiguous().transpose(2, 3) if layout == "transposed" else x
    result = pgd(build(), given, y, random_start=False)
    assert (result - expected).abs().max() < 1e-12
    if layout == "channels_last":
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_batches_in_slots_keep_the_memory_format(build, batch, attack):
    model, (x, y) = build("conv"), batch()
    seen = []

    def spy(x):
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return model(x)

    attack(spy, x.contiguous(memory_format=torch.channels_last), y, early_stop="compact", restarts=2, slots=2)
    assert all(seen)


class Casts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.weights = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].dim() == 2 and args[0].shape == (16, 192):
            self.weights += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["ambient", "precision"])
def test_weights_are_cast_once_under_autocast(build, batch, how):
    model, (x, y) = build("mlp", torch.float32), batch(torch.float32)
    if how == "ambient":
        with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
            ours = pgd(model, x, y, random_start=False, steps=6)
    else:
        with Casts() as casts:
            ours = pgd(model, x, y, random_start=False, steps=6, precision="bf16")
    assert casts.weights == 1
    plain = copy.deepcopy(model).requires_grad_(True)  # a closure cannot be seen, so autocast does its own casting
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours, pgd(lambda v: plain(v), x, y, random_start=False, steps=6)), "bitwise the same"
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_weight_that_two_kinds_of_layers_share_is_not_cast(batch):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 192), nn.Linear(192, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            assert self.table.weight.dtype == torch.float32
            return self.head(x.flatten(1))

    x, y = batch(torch.float32)
    pgd(Tied(), x, y, precision="bf16", steps=2)


def test_nothing_is_kept_alive(build, batch):
    model, (x, y) = build(), batch()
    for _ in range(3):
        pgd(model, x, y, best="adv", early_stop="cycle", return_info=True)
    gc.collect()
    count = sum(type(o) is torch.Tensor for o in gc.get_objects())
    for _ in range(20):
        pgd(model, x, y, best="adv", early_stop="cycle", return_info=True)
    gc.collect()
    assert sum(type(o) is torch.Tensor for o in gc.get_objects()) <= count + 5


def test_scoring_restores_everything(batch):
    x, _ = batch(torch.float32)
    model = Counting()
    before = state(model)
    with scoring(model):
        assert not model.training and not torch.is_grad_enabled() and not torch.backends.mha.get_fastpath_enabled()
        first = model(x)
        assert torch.equal(first, model(x)), "dropout is off"
    assert_same(before, state(model))


def test_an_empty_batch_warns_and_comes_back(build):
    with pytest.warns(AttackWarning, match="empty batch"):
        assert pgd(build(), torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 8, 8)
    with pytest.warns(AttackWarning, match="empty batch"):
        assert pgd(build(), torch.zeros(0, 3, 8, 8), return_info=True).success.shape == (0,)
