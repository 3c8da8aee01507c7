"""CW and DeepFool: foolbox's images in float64, known distances, and what their options mean."""

import pytest
import torch
from torch import nn

from rvlm.attacks import CW, DeepFool, cw, deepfool, fmn

ORDER = {"linf": torch.inf, "l2": 2}


@pytest.fixture
def plane(batch):
    """A linear model of two classes, images away from the walls, and the distance to its boundary in each norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).double()
    x = 0.3 + 0.4 * batch()[0]
    z, w = model(x).detach(), model[1].weight.detach()
    gap = (z[:, 0] - z[:, 1]).abs()
    return model, x, z.argmax(1), {"l2": gap / (w[0] - w[1]).norm(), "linf": gap / (w[0] - w[1]).norm(1)}


def lengths(x_adv, x, norm):
    return (x_adv - x).flatten(1).norm(ORDER[norm], dim=1)


@pytest.mark.parametrize("targeted, confidence", [(False, 0.0), (True, 0.0), (False, 0.3)])
def test_cw_l2_is_foolbox(model, batch, targeted, confidence):
    foolbox = pytest.importorskip("foolbox", reason="install rvlm[oracles]")
    x, _ = batch()
    y = model(x).argmax(1)
    target = (y + 1) % 5
    goal = foolbox.criteria.TargetedMisclassification(target) if targeted else foolbox.criteria.Misclassification(y)
    # Weights that float32, which foolbox keeps them in, holds exactly.
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=4, steps=30, initial_const=1.0, confidence=confidence, abort_early=False
    )
    theirs = attack.run(foolbox.PyTorchModel(model, bounds=(0, 1)), x, goal)
    found = cw(
        model, x, target if targeted else y, targeted=targeted, rounds=4, steps=30, const=1.0, confidence=confidence,
        abort_early=False, return_info=True,
    )  # fmt: skip
    crossed = found.loss.isfinite()
    assert crossed.any()
    assert (found.x_adv[crossed] - theirs[crossed]).abs().max() < 1e-8


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_deepfool_is_foolbox(model, batch, norm):
    foolbox = pytest.importorskip("foolbox", reason="install rvlm[oracles]")
    x, _ = batch()
    y = model(x).argmax(1)
    cls = {"l2": foolbox.attacks.L2DeepFoolAttack, "linf": foolbox.attacks.LinfDeepFoolAttack}[norm]
    theirs = cls(steps=20, loss="logits").run(
        foolbox.PyTorchModel(model, bounds=(0, 1)), x, foolbox.criteria.Misclassification(y)
    )
    found = deepfool(model, x, y, norm=norm, steps=20, return_info=True)
    assert found.success.all()
    assert (found.x_adv - theirs).abs().max() < 1e-9
    torch.testing.assert_close(-found.loss, lengths(theirs, x, norm))


@pytest.mark.parametrize("norm, near", [("l2", 1.01), ("linf", 1 / 0.9 + 0.01)])
def test_the_distance_to_a_plane(plane, norm, near):
    model, x, y, shortest = plane
    settings = {"l2": {"steps": 200}, "linf": {"steps": 100}}[norm]
    found = cw(model, x, y, norm=norm, return_info=True, **settings)
    assert found.success.all()
    torch.testing.assert_close(-found.loss, lengths(found.x_adv, x, norm))
    assert (-found.loss >= shortest[norm] - 1e-9).all()
    assert (-found.loss <= near * shortest[norm]).all()
    straight = deepfool(model, x, y, norm=norm, overshoot=0.0, return_info=True)
    assert (straight.steps_used == 1).all()
    torch.testing.assert_close(-straight.loss, shortest[norm] + 1e-4, rtol=1e-6, atol=0)


def test_cw_linf_is_near_other_attacks(build, batch):
    model, (x, _) = build("mlp"), batch()
    y = model(x).argmax(1)
    found = cw(model, x, y, norm="linf", steps=60, return_info=True)
    other = fmn(model, x, y, norm="linf", steps=200, return_info=True)
    assert found.success.all()
    assert (-found.loss < 1.3 * -other.loss + 1 / 256).all()
    target = (y + 1) % 5
    aimed = cw(model, x, target, norm="linf", targeted=True, steps=60, return_info=True)
    assert torch.equal(aimed.success, model(aimed.x_adv).argmax(1) == target) and aimed.success.any()


@pytest.mark.parametrize("attack", [cw, deepfool])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_with_a_radius_and_alone(build, batch, attack, norm):
    model, (x, _) = build("mlp"), batch()
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 5  # wrong when clean
    eps = {"linf": 8 / 255, "l2": 0.5}[norm]
    steps = {"steps": 40} | ({"rounds": 6} if attack is cw else {})
    free = attack(model, x, y, norm=norm, return_info=True, **steps)
    assert free.loss[0] == 0 and torch.equal(free.x_adv[0], x[0]) and free.success[0]
    held = attack(model, x, y, norm=norm, eps=eps, return_info=True, **steps)
    assert (lengths(held.x_adv, x, norm) <= eps + 1e-9).all()
    assert torch.equal(held.success, model(held.x_adv).argmax(1) != y)
    if attack is deepfool or norm == "l2":
        assert torch.equal(held.loss, free.loss), "the radius decides at the end alone"
    for k in range(6):
        alone = attack(model, x[k : k + 1], y[k : k + 1], norm=norm, return_info=True, **steps)
        assert (alone.x_adv - free.x_adv[k : k + 1]).abs().max() < 1e-9
        assert alone.steps_used == free.steps_used[k]


def test_a_sample_that_stalls_sits_out(build, batch):
    model, (x, _) = build("linear"), batch()
    y = model(x).argmax(1)
    whole = cw(model, x, y, steps=100, rounds=3, abort_early=False, return_info=True)
    early = cw(model, x, y, steps=100, rounds=3, return_info=True)
    assert (early.steps_used <= whole.steps_used).all() and (early.steps_used < whole.steps_used).any()


def test_few_classes_box_and_class(build, batch):
    model, (x, _) = build("mlp"), batch()
    y = model(x).argmax(1)
    two = deepfool(lambda v: model(v)[:, :2], x, y % 2, candidates=2, return_info=True)
    assert two.success.all()
    assert torch.equal(DeepFool(model, steps=3)(x, y), deepfool(model, x, y, steps=3))
    assert torch.equal(CW(model, steps=5, rounds=1)(x, y), cw(model, x, y, steps=5, rounds=1))
    moved = cw(lambda v: model((v + 1) / 2), 2 * x - 1, y, const=1.0, steps=20, rounds=6, bounds=(-1.0, 1.0))
    assert moved.min() >= -1 and moved.max() <= 1 and (moved != 2 * x - 1).any()


@pytest.mark.parametrize("attack, change, message", [
    (cw, dict(norm="l1"), "norm must be one of 'l2', 'linf'"),
    (cw, dict(steps=0), "steps must be an integer >= 1"),
    (cw, dict(rounds=0), "rounds must be an integer >= 1"),
    (cw, dict(const=0.0), "const must be a number above 0"),
    (cw, dict(lr=-1.0), "lr must be a number above 0"),
    (cw, dict(confidence=-1.0), "confidence must be at least 0"),
    (deepfool, dict(norm="l1"), "norm must be one of 'l2', 'linf'"),
    (deepfool, dict(candidates=1), "candidates must be an integer >= 2"),
    (deepfool, dict(overshoot=-0.1), "overshoot must be at least 0"),
])  # fmt: skip
def test_bad_input(build, batch, attack, change, message):
    x, y = batch()
    with pytest.raises(ValueError, match=message):
        attack(build("mlp"), x, y, **change)
