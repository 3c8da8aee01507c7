"""FMN: foolbox's images in float64, known distances, and what its options mean."""

import pytest
import torch
from torch import nn

from rvlm.attacks import FMN, fab, fmn

ORDER = {"linf": torch.inf, "l2": 2, "l1": 1}
EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 5.0}


@pytest.fixture
def middle(batch):
    """Images far from the walls of the box, where foolbox's projection in L1 is the exact one."""
    x, _ = batch()
    return 0.4 + 0.2 * x


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm, name, alpha", [("linf", "LInf", 1.0), ("l2", "L2", 0.5), ("l1", "L1", 0.5)])
def test_images_are_foolbox(model, middle, monkeypatch, norm, name, alpha, targeted):
    foolbox = pytest.importorskip("foolbox", reason="install rvlm[oracles]")
    x, y = middle, model(middle).argmax(1)
    cls = getattr(foolbox.attacks, f"{name}FMNAttack")
    if norm == "l2":  # foolbox 3.3.4 divides the norm by itself there, and so does not project

        def project(self, x, x0, epsilon):
            d = (x - x0).raw
            length = d.flatten(1).norm(dim=1)
            return x0 + (x - x0) * x.__class__((epsilon.raw / length.clamp(min=1e-12)).clamp(max=1).view(-1, 1, 1, 1))

        monkeypatch.setattr(cls, "project", project)
    target = (y + 1) % 5
    criterion = (
        foolbox.criteria.TargetedMisclassification(target) if targeted else foolbox.criteria.Misclassification(y)
    )
    attack = cls(steps=25, max_stepsize=alpha, gamma=0.05)
    theirs = attack.run(foolbox.PyTorchModel(model, bounds=(0, 1)), x, criterion)
    found = fmn(
        model, x, target if targeted else y, norm=norm, steps=25, alpha=alpha, targeted=targeted, return_info=True
    )
    crossed = found.loss.isfinite()
    assert crossed.any()
    if norm == "linf":
        assert (found.x_adv[crossed] - theirs[crossed]).abs().max() < 1e-9
    else:  # iterates that aim at the boundary land on it, and rounding says on which side
        length = (theirs - x).flatten(1).norm(ORDER[norm], dim=1)
        torch.testing.assert_close(-found.loss[crossed], length[crossed], rtol=0.02, atol=0)


@pytest.mark.parametrize("norm, dual", [("linf", 1), ("l2", 2)])
def test_the_distance_to_a_plane(batch, norm, dual):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).double()
    x = 0.3 + 0.4 * batch()[0]
    y, w = model(x).argmax(1), model[1].weight.detach()
    z = model(x).detach()
    shortest = (z[:, 0] - z[:, 1]).abs() / (w[0] - w[1]).norm(dual)
    found = fmn(model, x, y, norm=norm, steps=300, alpha=0.5, return_info=True)
    assert found.success.all() and (-found.loss >= shortest - 1e-9).all()
    assert (-found.loss < 1.03 * shortest).all()
    rough = fab(model, x, y, norm=norm, eps=None, return_info=True)
    assert (found.loss >= rough.loss - 0.03 * shortest).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_with_a_radius(model, batch, norm):
    x, _ = batch()
    y = model(x).argmax(1)
    free = fmn(model, x, y, norm=norm, steps=30, return_info=True)
    assert free.success[free.loss.isfinite()].all() and torch.equal(free.x_adv[~free.success], x[~free.success])
    held = fmn(model, x, y, norm=norm, steps=30, eps=EPS[norm], return_info=True)
    assert torch.equal(held.loss, free.loss), "the radius decides at the end alone"
    assert ((held.x_adv - x).flatten(1).norm(ORDER[norm], dim=1) <= EPS[norm] + 1e-9).all()
    assert torch.equal(held.success, model(held.x_adv).argmax(1) != y)
    assert held.success[-free.loss <= EPS[norm]].all()
    for k in range(6):
        alone = fmn(model, x[k : k + 1], y[k : k + 1], norm=norm, steps=30, return_info=True)
        torch.testing.assert_close(alone.loss, free.loss[k : k + 1], rtol=0.02, atol=0)


def test_nothing_is_drawn_and_class(build, batch):
    model, (x, y) = build("mlp"), batch()
    state = torch.get_rng_state()
    attack = FMN(model, steps=5, norm="l2")
    assert torch.equal(attack(x, y), fmn(model, x, y, steps=5, norm="l2"))
    assert torch.equal(state, torch.get_rng_state())
    stored = fmn(model, x, y, steps=20, eps=16 / 255, quantize=255)
    assert ((stored * 255).round() / 255 - stored).abs().max() < 1e-12
    assert (fab(model, x, y, eps=None, steps=5, return_info=True).loss <= 0).all()


@pytest.mark.parametrize("attack, change, message", [
    (fmn, dict(steps=0), "steps must be an integer >= 1"),
    (fmn, dict(alpha=0.0), "alpha must be above 0"),
    (fmn, dict(gamma=-1.0), "gamma must be above 0"),
    (fmn, dict(eps=8.0), "did you mean 8/255"),
    (fab, dict(eps=None, restarts=2), "give eps"),
])  # fmt: skip
def test_bad_input(build, batch, attack, change, message):
    x, y = batch()
    with pytest.raises(ValueError, match=message):
        attack(build("mlp"), x, y, **change)
