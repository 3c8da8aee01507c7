"""An attack of a user's file keeps what rvlm's own promise, however it is written, and is told apart by its file."""

import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from rvlm.attacks.ball import Ball, outside
from rvlm.attacks.stages import parse_attack

from .test_contract import CALLERS, Counting, assert_same, state

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "attack.md"
SLOPPY = """
import torch

def sloppy(model, x, y, eps, steps=3, **more):
    "Trains, changes modes, draws, and writes to its inputs."
    x_adv = x + eps * (2 * torch.rand_like(x) - 1)
    model.train()
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        torch.nn.functional.cross_entropy(model(x_adv), y).backward()
        x_adv = (x + (x_adv + eps * x_adv.grad.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    x.zero_(), y.zero_()
    return x_adv

def torchs(model, x, y, *, eps):
    return (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)

def keyed(model, x, y, *, eps, generator):
    return (x + eps * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)

def far(model, x, y, *, eps):
    return (x + 2 * eps).clamp(0, 1)

def outside(model, x, y, *, eps):
    return x - x.min() - eps

def delta(model, x, y, *, eps):
    return x[:1]

def nan(model, x, y, *, eps):
    return x / 0 * 0

def nothing(model, x, y, *, eps):
    pass

def blind(x, eps):
    return x

partial = __import__("functools").partial(far)

def needs(model, x, y, *, eps, steps, alpha=None):
    return x

def still(model, x, y, *, eps, norm="linf", when=torch.tensor(1), loss="ce", precision="fp32", spec=None):
    leaf = x.requires_grad_()
    torch.autograd.grad((0 * model(leaf)).sum(), leaf)
    return x.detach()
"""


@pytest.fixture
def own(tmp_path):
    """own(name) -> the stage of the page's attack, or of a function above."""
    code = re.search(r"```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)[1]
    (tmp_path / "cosine_pgd.py").write_text(code)
    (tmp_path / "mine.py").write_text(SLOPPY)
    file = {"cosine_pgd": "cosine_pgd.py"}
    return lambda name, norm="linf": parse_attack(f"{tmp_path}/{file.get(name, 'mine.py')}:{name}", norm)[0]


def call(stage, model, x, y, seed=0, **more):
    draws = torch.Generator().manual_seed(seed)
    given = {"eps": 4 / 255, "norm": "linf", "generator": draws, "sample_ids": torch.arange(len(x))} | more
    return stage(model, x, y, **given)


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("fail_at", [None, 1, 3])
@pytest.mark.parametrize("name", ["cosine_pgd", "sloppy"])
def test_no_trace(own, name, caller, fail_at, batch):
    x, y = batch(torch.float32)
    model = Counting(fail_at)
    with CALLERS[caller]():
        before, kept = state(model), (x.clone(), y.clone())
        if fail_at:
            with pytest.raises(RuntimeError, match="the model broke"):
                call(own(name), model, x, y)
        else:
            x_adv = call(own(name), model, x, y).x_adv
            assert not x_adv.requires_grad and x_adv.dtype == x.dtype and (x_adv != x).any()
        assert_same(before, state(model))
        assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])


def test_the_result_and_what_it_cost(own, build, batch):
    (x, y), model = batch(torch.float32), build("mlp", torch.float32)
    found = call(own("cosine_pgd"), model, x, y)
    assert ((found.x_adv - x).abs() <= 4 / 255 + 1e-6).all() and found.x_adv.min() >= 0 and found.x_adv.max() <= 1
    assert torch.equal(found.success, model(found.x_adv).argmax(1) != y) and (found.loss > 0).equal(found.success)
    assert (found.forwards, found.backwards, found.zero_gradients) == (20 * 6, 20 * 6, 0)
    assert call(own("still"), model, x, y).zero_gradients == 6
    closure = functools.partial(lambda weights, v: v.flatten(1) @ weights, torch.randn(192, 5))
    assert call(own("cosine_pgd"), closure, x, y).forwards == 0  # what is no module cannot be watched


def test_precision_is_the_frames(own, build, batch):
    (x, y), model, seen = batch(torch.float32), build("mlp", torch.float32), []
    model[1].register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    call(own("cosine_pgd"), model, x, y, precision="bf16")
    assert seen == [torch.bfloat16] * 20 + [torch.float32], "the verdict is in the model's own precision"
    seen.clear()
    call(own("cosine_pgd"), model, x, y, precision="cascade")
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("name", ["torchs", "keyed"])
def test_draws_follow_the_seed(own, name, build, batch):
    (x, y), model = batch(torch.float32), build("mlp", torch.float32)
    first, again, other = (call(own(name), model, x, y, seed).x_adv for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_noise_by_sample_does_not_depend_on_the_batch(own, build, batch):
    (x, y), model = batch(torch.float32), build("mlp", torch.float32)
    together = call(own("cosine_pgd"), model, x, y).x_adv
    alone = call(own("cosine_pgd"), model, x[4:5], y[4:5], sample_ids=torch.tensor([4])).x_adv
    assert (alone - together[4:5]).abs().max() < 1e-6


@pytest.mark.parametrize(
    "name, said",
    [
        ("far", "6 of 6 images are outside the ball, by up to 0.0157"),
        ("outside", "outside the ball|clamp them"),
        ("delta", r"expected images \[6, 3, 8, 8\] torch.float32 on cpu, it returned \[1, 3, 8, 8\]"),
        ("nan", "NaN"),
        ("nothing", "returned NoneType"),
    ],
)
def test_what_it_returns_is_checked(own, name, said, build, batch):
    with pytest.raises(ValueError, match=f"mine.py:{name}: .*({said})"):
        call(own(name), build("mlp", torch.float32), *batch(torch.float32))


def test_what_cannot_be_an_attack(own, build, batch, tmp_path):
    with pytest.raises(ValueError, match=r"mine.py:blind takes x, eps: expected \(model, x, y, \*, eps, ...\)"):
        own("blind")
    with pytest.raises(ValueError, match="must have a default for steps"):
        own("needs")
    with pytest.raises(ValueError, match="mine.py:far takes no norm, so it cannot be asked for norm='l2'"):
        own("far", "l2")
    with pytest.raises(ValueError, match="takes no quantize"):
        call(own("still"), build("mlp"), *batch(torch.float32), quantize=255)
    with pytest.raises(ValueError, match="has no callable 'farr'; it has "):
        own("farr")
    with pytest.raises(FileNotFoundError, match="expected FILE.py:NAME"):
        parse_attack(f"{tmp_path}/no.py:attack")
    (tmp_path / "bad.py").write_text("def attack(:\n")
    with pytest.raises(ValueError, match="bad.py, line 1: invalid syntax"):
        parse_attack(f"{tmp_path}/bad.py:attack")


def test_a_stage_is_its_file_and_its_settings(own, tmp_path):
    stage = own("still", "l2")
    assert (
        stage.record()["settings"] == {"loss": "ce", "precision": "fp32", "spec": None}
        and len(stage.record()["sha256"]) == 16
    )
    assert own("cosine_pgd").every_setting() == {"steps": 20, "first": 1.0}
    assert own("cosine_pgd").passes(10).units == 60 and stage.passes(10).units == 3
    (tmp_path / "mine.py").write_text(SLOPPY + "# changed\n")
    changed = parse_attack(stage.attack, "l2")[0]
    assert changed.sha256 != stage.sha256 and "sha256" not in parse_attack("pgd-10")[0].record()
    x = torch.rand(2, 3, 8, 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    for each in (stage, changed):  # a version that ran goes on, whatever becomes of the file
        assert torch.equal(call(each, model, x, torch.tensor([0, 1]), norm="l2").x_adv, x)


def test_what_a_file_imports_or_makes_is_its_own(own, build, batch, tmp_path):
    assert own("partial").sha256 == own("far").sha256
    (tmp_path / "again.py").write_text("from mine import still\n")
    assert parse_attack(f"{tmp_path}/again.py:still")[0].sha256 not in (None, own("far").sha256)


def test_in_a_list_with_others(own):
    name = own("cosine_pgd").name
    assert [stage.name for stage in parse_attack(f"pgd-10, {name}, square")] == ["pgd-10", name, "square"]


@pytest.mark.parametrize("side", [6, 32, 224])
@pytest.mark.parametrize("norm, eps", [("linf", 8 / 255), ("l2", 0.5), ("l2", 3.0), ("l1", 12.0)])
def test_rounding_is_no_place_outside(norm, eps, side):
    torch.manual_seed(0)
    x = torch.rand(4, 3, side, side)
    on = Ball(x, eps, norm, (-9.0, 9.0)).nearest_(x + torch.randn_like(x))
    found = outside(on, x, eps, norm)
    assert not found.ball.any() and found.excess.abs().max() < 1e-4 * eps
    assert outside(x + 1.01 * (on - x), x, eps, norm).ball.all()
    assert found.box and (found.low, found.high) == (on.min(), on.max()) and not outside(x, x, eps, norm).box
