"""What is kept of an attack's iterates: the step that fooled each sample first, and the loss at every step."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rvlm.attacks import apgd, fmn, mifgsm, pgd, square
from rvlm.attacks.kept import Kept
from rvlm.attacks.objective import Scores
from rvlm.attacks.runs import Disagreement, Judge
from rvlm.attacks.trace import Trace


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def batch():
    x = torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    model = Net().eval()
    return model, x, model(x).argmax(1).detach()


def test_steps_are_those_that_a_callback_sees(batch):
    model, x, y = batch
    losses, fooled = [], []

    def see(step, x_adv, loss):
        losses.append(loss.double().clone())
        fooled.append(model(x_adv).argmax(1) != y)

    given = dict(eps=0.12, steps=6, generator=torch.Generator().manual_seed(2))
    found = pgd(model, x, y, best="last", callback=see, return_info=True, **given)
    losses.append(F.cross_entropy(model(found.x_adv), y, reduction="none").double())
    fooled.append(model(found.x_adv).argmax(1) != y)
    first = torch.stack(fooled).int().argmax(0)
    never = ~torch.stack(fooled).any(0)
    assert 0 < never.sum() < len(x) and first.unique().numel() > 2, "the example shows nothing"
    assert torch.equal(found.trace.fooled_at, torch.where(never, -1, first))
    stops = torch.where(never, 6, first)
    for step in range(7):
        kept = torch.stack(losses)[stops.clamp(max=step), torch.arange(len(x))]
        assert found.trace.sums()[step].item() == pytest.approx(kept.sum().item(), rel=1e-6)
    assert found.trace.last == 6


@pytest.mark.parametrize("attack, settings", [(pgd, {}), (pgd, {"restarts": 3}), (apgd, {}), (apgd, {"norm": "l2"})])
def test_leaving_the_batch_changes_nothing(batch, attack, settings):
    model, x, y = batch
    eps = 0.4 if settings.get("norm") == "l2" else 0.12
    given = dict(eps=eps, steps=8, best="adv", return_info=True) | settings
    whole, compact = (
        attack(model, x, y, early_stop=stop, generator=torch.Generator().manual_seed(2), **given)
        for stop in ("freeze" if attack is pgd else None, "compact")
    )
    assert torch.equal(whole.trace.fooled_at, compact.trace.fooled_at)
    assert torch.equal(whole.trace.fooled_at >= 0, whole.success) and whole.success.any() and not whole.success.all()
    last = 8 * settings.get("restarts", 1)
    assert whole.trace.last == last and whole.trace.fooled_at.max() <= last
    sums = compact.trace.sums()
    assert torch.allclose(sums, whole.trace.sums()[: len(sums)], rtol=1e-5)


def test_larger_balls_do_not_count(batch):
    model, x, y = batch
    found = apgd(
        model, x, y, eps=1.5, norm="l1", steps=20, larger_eps=True, best="adv", return_info=True,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    assert found.trace.last == 20
    assert torch.equal(found.trace.fooled_at >= 0, found.success) and found.success.any()
    assert found.trace.fooled_at[found.success].min() >= 12, "0.3 + 0.3 of 20 steps are in larger balls"


@pytest.mark.parametrize("settings", [
    {}, {"norm": "l2", "eps": 0.5}, {"transforms": ("ti",)}, {"transforms": ("si",)}, {"transforms": ("vmi",)},
])  # fmt: skip
def test_steps_with_momentum_are_those_that_a_callback_sees(batch, settings):
    model, x, y = batch
    seen = []
    given = dict(eps=0.12, steps=6, generator=torch.Generator().manual_seed(2), return_info=True) | settings
    found = mifgsm(model, x, y, callback=lambda k, x_adv, loss: seen.append((x_adv.clone(), loss.clone())), **given)
    fooled = torch.stack([*(model(x_adv).argmax(1) != y for x_adv, _ in seen), found.success])
    first = torch.where(fooled.any(0), fooled.int().argmax(0), -1)
    assert torch.equal(found.trace.fooled_at, first) and first.unique().numel() > 2 and found.trace.last == 6
    losses = torch.stack([*(loss for _, loss in seen), found.loss]).double()
    for step in range(7):
        kept = losses[torch.where(first < 0, 6, first).clamp(max=step), torch.arange(len(x))]
        assert found.trace.sums()[step].item() == pytest.approx(kept.sum().item(), rel=1e-6)
    twice = mifgsm(model, x, y, random_start=True, restarts=2, **given)
    assert twice.trace.last == 12 and (twice.trace.fooled_at >= 0)[twice.success].all()


def test_samples_whose_momentum_repeats_leave_with_their_trace(batch):
    model, x, y = batch
    given = dict(eps=0.05, alpha=0.02, steps=40, velocity="sign", return_info=True)
    whole, cycle = (mifgsm(model, x, y, early_stop=stop, **given) for stop in (None, "cycle"))
    assert cycle.steps_used.min() < 40, "the example shows nothing"
    assert torch.equal(whole.trace.fooled_at, cycle.trace.fooled_at) and whole.trace.last == cycle.trace.last == 40


def test_square_and_attacks_without_a_trace(batch):
    model, x, y = batch
    given = dict(eps=0.12, return_info=True)
    found = square(model, x, y, queries=40, generator=torch.Generator().manual_seed(2), **given)
    assert torch.equal(found.trace.fooled_at >= 0, found.success) and found.success.any()
    assert torch.equal(found.trace.fooled_at[found.success], found.steps_used[found.success])
    assert fmn(model, x, y, steps=3, **given).trace is None
    for name in ("ni", "di"):
        assert mifgsm(model, x, y, steps=3, transforms=(name,), **given).trace is None, "others are scored"
    assert isinstance(pgd(model, x, y, eps=0.12), torch.Tensor)


@pytest.mark.parametrize("restarts", [1, 2])
def test_a_search_in_bf16_is_corrected_by_fp32(batch, restarts):
    model, x, y = batch
    changed = 0
    for seed in range(8):
        found = pgd(
            model, x, y, eps=0.1, steps=6, best="adv", precision="cascade", restarts=restarts, return_info=True,
            generator=torch.Generator().manual_seed(seed), early_stop="compact",
        )  # fmt: skip
        changed += found.fooled_in_bf16_only
        only_fp32 = found.success & (found.trace.fooled_at < 0)
        assert only_fp32.sum() <= found.fooled_in_fp32_only
        assert (found.trace.fooled_at[~found.success] < 0).all()
        assert found.trace.last <= 6 * restarts + 6 + 2, "in fp32 all of the steps again, or a quarter"
    assert changed, "the example shows nothing"


@pytest.mark.parametrize("slots", [3, 7, 24])
def test_runs_in_slots_stand_at_steps_of_their_own(batch, slots):
    model, x, y = batch
    given = dict(eps=0.12, steps=8, early_stop="compact", return_info=True)
    alone, shared = (
        apgd(model, x, y, generator=torch.Generator().manual_seed(2), slots=n, **given) for n in (None, slots)
    )
    assert torch.equal(alone.trace.fooled_at, shared.trace.fooled_at) and shared.trace.last == 8
    assert torch.allclose(alone.trace.sums(), shared.trace.sums(), rtol=1e-5)
    twice = apgd(model, x, y, generator=torch.Generator().manual_seed(2), slots=slots, restarts=2, **given)
    assert torch.equal(twice.trace.fooled_at >= 0, twice.success) and twice.trace.last == 16


def test_what_bf16_alone_calls_fooled_is_taken_back():
    """Of two runs of the first sample one fools the model in fp32, too; the second sample's only run does not."""
    trace, fooled, rows = Trace(2, torch.device("cpu")), torch.tensor([True, True, True]), torch.tensor([0, 0, 1])
    trace.note(rows, [3, 5, 4], torch.zeros(3), fooled)
    assert trace.fooled_at.tolist() == [3, 4]
    in_fp32 = Scores(torch.zeros(3), torch.tensor([False, True, False]), torch.zeros(3, dtype=torch.int64))
    objective = SimpleNamespace(trace=trace, labels=torch.zeros(2, dtype=torch.int64), score=lambda x: in_fp32)
    judge = Judge(contextlib.nullcontext, Disagreement(torch.device("cpu")), objective)
    judge(objective, Kept(torch.zeros(3, 1), Scores(torch.zeros(3), fooled, torch.ones(3, dtype=torch.int64))), rows)
    assert trace.fooled_at.tolist() == [3, -1]
    assert judge.cut.tolist() == [True, True]
    wrongly = Kept(torch.zeros(1, 1), Scores(torch.zeros(1), fooled[:1], torch.ones(1, dtype=torch.int64)))
    in_fp32 = Scores(torch.zeros(1), ~fooled[:1], torch.zeros(1, dtype=torch.int64))
    judge(objective, wrongly, rows[:1])
    assert trace.fooled_at.tolist() == [3, -1], "an earlier run of the sample has fooled the model"
