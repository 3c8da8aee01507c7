"""AutoAttack: verdicts against the original's, who broke what, and the rules that it shares with every attack."""

import warnings

import pytest
import torch
from torch import nn

from rvlm.attacks import AttackWarning, AutoAttack, autoattack
from rvlm.attacks.stages import parse_attack

ORDER = {"linf": torch.inf, "l2": 2, "l1": 1}
THEIRS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
QUICK = ["apgd-ce-10", "apgd-t-10", "fab-t-5", "square-30"]


def fixed(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def sixty():
    """A small network and 60 images that it is more or less sure of."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 12), nn.ReLU(), nn.Linear(12, 6)
    )
    model = model.double().eval()
    x = torch.rand(60, 3, 8, 8, generator=fixed(1), dtype=torch.float64)
    y = model(x).argmax(1)
    y[:5] = (y[:5] + 1) % 6
    return model, x, y


@pytest.mark.parametrize("norm, eps", [
    ("linf", 2 / 255),
    pytest.param("linf", 4 / 255, marks=pytest.mark.slow),
    pytest.param("l2", 0.08, marks=pytest.mark.slow),
    pytest.param("l1", 0.7, marks=pytest.mark.slow),
])  # fmt: skip
def test_verdicts_are_the_originals(sixty, monkeypatch, norm, eps):
    """Other random numbers, the same settings: at most one sample of 60 may end otherwise."""
    pyautoattack = pytest.importorskip("pyautoattack", reason="install rvlm[oracles]")
    model, x, y = sixty
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    original = pyautoattack.AutoAttack(model, eps=eps, norm=THEIRS[norm], seed=0, version="standard")
    original.apgd_targeted.n_target_classes = original.fab.n_target_classes = 5
    torch.set_default_dtype(torch.float64)
    try:
        theirs, _ = original.run_standard_evaluation(x, y, batch_size=60)
    finally:
        torch.set_default_dtype(torch.float32)
    robust = model(theirs).argmax(1) == y
    found = autoattack(model, x, y, eps=eps, norm=norm, generator=fixed(), return_info=True)
    assert 0.1 < robust.double().mean() < 0.9, "otherwise this shows nothing"
    assert (found.success != ~robust).sum() <= 1
    assert found.robust["apgd-ce"] < found.robust["clean"] == 55


@pytest.mark.parametrize("norm, eps", [("linf", 3 / 255), ("l2", 0.1), ("l1", 1.0)])
def test_result_and_record(sixty, norm, eps):
    model, x, y = sixty
    seen = []
    settings = dict(eps=eps, norm=norm, version="custom", attacks=QUICK)
    found = autoattack(
        model, x, y, generator=fixed(), return_info=True, callback=lambda *args: seen.append(args), **settings
    )
    assert torch.equal(found.pred, model(found.x_adv).argmax(1)) and torch.equal(found.success, found.pred != y)
    assert ((found.x_adv - x).flatten(1).norm(ORDER[norm], dim=1) <= eps + 1e-9).all()
    assert torch.equal(found.broken_by == -1, ~found.success) and (found.broken_by[:5] == -2).all()
    untouched = found.broken_by < 0
    assert torch.equal(found.x_adv[untouched], x[untouched]) and (found.steps_used[:5] == 0).all()
    assert found.stages == QUICK and list(found.robust) == ["clean", *QUICK] and seen == list(found.robust.items())[1:]
    left = 55
    for number, name in enumerate(QUICK):
        left -= int((found.broken_by == number).sum())
        assert found.robust[name] == left
    assert torch.equal(AutoAttack(model, **settings)(x, y, generator=fixed()), found.x_adv)
    alone = autoattack(model, x[9:10], y[9:10], generator=fixed(), sample_ids=torch.tensor([9]), **settings)
    assert (alone - found.x_adv[9:10]).abs().max() < 1e-8


def test_stages_see_survivors_alone(sixty):
    model, x, y = sixty
    sizes = []
    counted = lambda v: sizes.append(len(v)) or model(v)  # noqa: E731
    found = autoattack(
        counted, x, y, eps=3 / 255, version="custom", attacks=QUICK[:2], generator=fixed(), return_info=True
    )
    assert sum(sizes) == found.forwards
    assert sizes[1] == 55 and sizes[12] == found.robust["apgd-ce-10"]


def test_no_batch_is_larger_than_slots(sixty):
    model, x, y = sixty
    sizes = []
    counted = lambda v: sizes.append(len(v)) or model(v)  # noqa: E731
    settings = dict(eps=3 / 255, version="custom", attacks=["pgd-3", "apgd-ce-5", "apgd-t-5", "square-20"])
    found = autoattack(counted, x, y, slots=8, generator=fixed(), return_info=True, **settings)
    assert max(sizes) == 8 and 0 < found.success.sum() < 60
    whole = autoattack(model, x, y, generator=fixed(), return_info=True, **settings)
    assert torch.equal(whole.broken_by, found.broken_by)


def test_eps_per_sample_and_own_labels(sixty):
    model, x, _ = sixty
    eps = torch.full((60,), 8 / 255, dtype=torch.float64)
    eps[::2] = 0.0
    found = autoattack(model, x, eps=eps, version="custom", attacks=["apgd-ce-10"], generator=fixed(), return_info=True)
    assert not found.success[::2].any() and found.success[1::2].any() and found.robust["clean"] == 60


@pytest.mark.parametrize("classes, left", [(2, ["apgd-ce-3", "fab-t-2"]), (3, ["apgd-ce-3", "apgd-dlr-3", "fab-t-2"])])
def test_stages_that_need_more_classes_are_named(classes, left):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, classes)).double()
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=fixed())
    names = ["apgd-ce-3", "apgd-dlr-3", "apgd-t-3", "fab-t-2"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = autoattack(model, x, version="custom", attacks=names, return_info=True, generator=fixed())
    assert found.stages == left and len(found.refused) == len(said) == 4 - len(left)
    assert f"apgd-t-3 needs 4 classes, there are {classes}" in str(said[-1].message)
    assert said[-1].category is AttackWarning
    with pytest.raises(ValueError, match="apgd-t needs 4 classes"):
        autoattack(model, x, version="custom", attacks=["apgd-t"])


def test_no_trace(sixty):
    model, x, y = sixty
    model.train()
    before = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    autoattack(model, x[:8], y[:8], eps=2 / 255, version="custom", attacks=QUICK, generator=fixed())
    assert torch.equal(state, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old) and p.grad is None and p.requires_grad
    with pytest.raises(RuntimeError, match="broken"):
        autoattack(Failing(model, 4), x, y, eps=2 / 255)
    assert torch.equal(state, torch.get_rng_state()), "an error winds the default generator back"


class Failing(nn.Module):
    def __init__(self, model, calls):
        super().__init__()
        self.model, self.left = model, calls

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("broken")
        return self.model(x)


@pytest.mark.parametrize("engine", ["eager", "compile"])
@pytest.mark.parametrize("name", ["fgsm", "pgd-3", "apgd-ce-3", "fab-t-3", "square-5", "mifgsm-3"])
def test_a_stage_takes_an_empty_batch(name, engine, sixty):
    model, x, y = sixty
    (stage,) = parse_attack(name)
    with pytest.warns(AttackWarning, match="empty batch"):
        assert not len(stage(model, x[:0], y[:0], eps=0.1, engine=engine).x_adv)


def test_an_empty_batch(sixty):
    model, x, y = sixty
    with pytest.warns(AttackWarning, match="empty batch"):
        found = autoattack(model, x[:0], y[:0], return_info=True)
    assert found.x_adv.shape == (0, 3, 8, 8) and found.stages == []


@pytest.mark.parametrize("change, error, message", [
    (dict(version="best"), ValueError, "'standard', 'plus', 'rand', 'custom'"),
    (dict(attacks=["apgd-ce"]), ValueError, "goes with version='custom'"),
    (dict(version="custom"), ValueError, "goes with version='custom'"),
    (dict(version="custom", attacks=["apgd"]), ValueError, "unknown attack 'apgd'"),
    (dict(eps=8.0), ValueError, "did you mean 8/255"),
    (dict(slots=0), ValueError, "slots must be an integer >= 1"),
    (dict(model=3), TypeError, "model must be callable"),
    (dict(y=torch.tensor([9] * 60)), ValueError, "labels must lie in 0 .. 5"),
    (dict(x=torch.zeros(60, 3, 8, 8, dtype=torch.uint8)), TypeError, "uint8 images"),
])  # fmt: skip
def test_bad_input(sixty, change, error, message):
    model, x, y = sixty
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=message):
            autoattack(**dict(model=model, x=x, y=y) | change)
