"""FAB: the points of AutoAttack's implementation in float64, projections against solvers, what its options mean."""

import collections

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import nn

from rvlm.attacks import FAB, apgd, fab
from rvlm.attacks.fab import to_plane
from rvlm.attacks.nearest import Nearest
from rvlm.attacks.stages import parse_attack

EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 5.0}
THEIRS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
ORDER = {"linf": torch.inf, "l2": 2, "l1": 1}


def fixed(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def doubles(monkeypatch):
    """The original computes in float32 whatever the images are."""
    pytest.importorskip("pyautoattack.fab_pt", reason="install rvlm[oracles]")
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Recorder(nn.Module):
    """Keeps the images that the model is shown with a gradient."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        if torch.is_grad_enabled() and x.requires_grad:
            self.seen.append(x.detach().clone())
        return self.model(x)


@pytest.mark.parametrize("aimed", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_points_are_autoattacks(model, batch, monkeypatch, doubles, norm, aimed):
    from pyautoattack.fab_pt import FABAttack_PT

    (x, _) = batch()
    y = model(x).argmax(1)
    theirs, ours = Recorder(model), Recorder(model)
    attack = FABAttack_PT(theirs, norm=THEIRS[norm], n_iter=12, eps=EPS[norm], device="cpu")
    attack.target_class = 3
    nearest = attack.attack_single_run(x, y, is_targeted=aimed)
    target = model(x).sort(dim=-1)[1][:, -3]
    monkeypatch.setattr("rvlm.attacks.objective.Objective.runners_up", lambda *_: target[:, None])
    found = fab(ours, x, y, eps=EPS[norm], norm=norm, steps=12, aimed=aimed, return_info=True)
    assert len(ours.seen) == len(theirs.seen) == 12
    for mine, wanted in zip(ours.seen, theirs.seen, strict=True):
        assert (mine - wanted).abs().max() < 1e-8
    length = (nearest - x).flatten(1).norm(ORDER[norm], dim=1)
    crossed = model(nearest).argmax(1) != y
    assert torch.equal(found.loss.isfinite(), crossed) and crossed.any()
    assert torch.allclose(-found.loss[crossed], length[crossed], atol=1e-8)
    inside = crossed & (length <= EPS[norm])
    assert found.success[inside].all() and torch.allclose(found.x_adv[inside], nearest[inside], atol=1e-8)
    assert torch.equal(found.success, model(found.x_adv).argmax(1) != y), "one from outside may still fool, projected"


def test_targets_and_verdicts_are_autoattacks(build, batch, doubles):
    from pyautoattack.fab_pt import FABAttack_PT

    for kind in ("mlp", "conv", "vit"):
        model, (x, _) = build(kind), batch()
        y = model(x).argmax(1)
        for eps in (2 / 255, 8 / 255, 32 / 255):
            attack = FABAttack_PT(model, n_iter=10, eps=eps, targeted=True, n_target_classes=4, device="cpu")
            robust = model(attack.perturb(x, y)).argmax(1) == y
            found = fab(model, x, y, eps=eps, steps=10, return_info=True)
            assert torch.equal(found.success, ~robust)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("share", [0.2, 0.8, 1.5])
def test_the_way_to_a_plane_is_the_shortest(norm, share):
    """Against linear programs (Linf, L1) and a quadratic one (L2); beyond the box every pixel goes all the way."""
    generator = fixed(2)
    t, w = torch.rand(8, 6, generator=generator).double(), torch.randn(8, 6, generator=generator).double()
    w[0, 2] = w[1, :3] = 0.0
    t[2, 0], t[2, 1] = 0.0, 1.0
    reach = torch.where(w > 0, t, 1 - t).mul(w.abs()).sum(1)
    b = (w * t).sum(1) - share * reach * torch.tensor([1.0] * 7 + [0.0], dtype=torch.float64)
    d = to_plane(t, w, b, norm, 0.0, 1.0)
    assert (t + d).min() >= -1e-12 and (t + d).max() <= 1 + 1e-12 and (d[7] == 0).all()
    left = (w * (t + d)).sum(1) - b
    if share > 1:
        assert torch.allclose(left[:7], (share - 1) * reach[:7])
        return
    assert left.abs().max() < 1e-12
    for point, weight, level, found in zip(t.numpy(), w.numpy(), b.numpy(), d.numpy(), strict=True):
        box = np.stack([-point, 1 - point], 1)
        if norm == "l2":
            plane = {"type": "eq", "fun": lambda v, p=point, q=weight, c=level: q @ (p + v) - c}
            solved = minimize(lambda v: v @ v, np.zeros(6), bounds=box, constraints=plane, options={"ftol": 1e-14})
            assert abs(np.sqrt(solved.fun) - np.linalg.norm(found)) < 1e-5
        else:  # |d_i| <= s_i, or all of them below one s
            many = 1 if norm == "linf" else 6
            bound = np.ones((6, 1)) if norm == "linf" else np.eye(6)
            rows = np.block([[np.eye(6), -bound], [-np.eye(6), -bound]])
            equal = np.concatenate([weight, np.zeros(many)])[None]
            cost = np.concatenate([np.zeros(6), np.ones(many)])
            limits = [*map(tuple, box), *[(0, None)] * many]
            solved = linprog(cost, rows, np.zeros(12), equal, [level - weight @ point], limits)
            assert abs(solved.fun - np.linalg.norm(found, np.inf if norm == "linf" else 1)) < 1e-9


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("aimed", [True, False])
def test_ball_box_verdict_and_batch(model, batch, norm, aimed):
    (x, _), ids = batch(), torch.tensor([5, 3, 2**40, 1, 0, 9])
    y = model(x).argmax(1)
    run = lambda rows, **more: fab(  # noqa: E731
        model, x[rows], y[rows], eps=EPS[norm], norm=norm, aimed=aimed, steps=8, restarts=2, generator=fixed(),
        sample_ids=ids[rows], **more
    )  # fmt: skip
    found = run(torch.arange(6), return_info=True)
    assert ((found.x_adv - x).flatten(1).norm(ORDER[norm], dim=1) <= EPS[norm] + 1e-9).all()
    assert found.x_adv.min() >= 0 and found.x_adv.max() <= 1
    assert torch.equal(found.pred, model(found.x_adv).argmax(1)) and torch.equal(found.success, found.pred != y)
    for k in range(6):
        assert (run(torch.tensor([k])) - found.x_adv[k : k + 1]).abs().max() < 1e-8


def test_a_linear_model_is_crossed_at_the_shortest_distance(batch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).double()
    x, _ = batch()
    y = model(x).argmax(1)
    z = model(x).detach()
    w = model[1].weight.detach()
    for norm, dual in (("linf", 1), ("l2", 2)):
        shortest = (z[:, 0] - z[:, 1]).abs() / (w[0] - w[1]).norm(dual)
        found = fab(model, x, y, norm=norm, eps=0.9, steps=10, return_info=True)
        assert found.success.all() and (-found.loss >= shortest - 1e-9).all()
        assert (-found.loss < 1.06 * shortest).all(), "eta = 1.05 beyond the plane"


def test_what_is_wrong_already_costs_nothing(build, batch):
    model, (x, _) = build("mlp"), batch()
    y = (model(x).argmax(1) + 1) % 5
    found = fab(model, x, y, steps=3, return_info=True)
    assert found.success.all() and torch.equal(found.x_adv, x) and (found.loss == 0).all()


def test_quantized_and_class(build, batch):
    model, (x, _) = build("conv", torch.float32), batch(torch.float32)
    y = model(x).argmax(1)
    found = fab(model, x, y, steps=10, quantize=255, return_info=True)
    assert torch.equal((found.x_adv * 255).round() / 255, found.x_adv)
    assert torch.equal(found.success, model(found.x_adv).argmax(1) != y)
    attack = FAB(model, steps=3)
    assert torch.equal(attack(x, y), fab(model, x, y, steps=3)) and repr(attack) == "FAB(Sequential, steps=3)"


def test_the_distance_survives_another_precision(build, batch):
    model, (x, _) = build("conv", torch.float32), batch(torch.float32)
    y = model(x).argmax(1)
    found = fab(model, x, y, steps=5, eps=0.5, precision="bf16", return_info=True)
    assert (found.loss <= 0).all() and torch.equal(found.success, model(found.x_adv).argmax(1) != y)


def ladder(model, batch, norm, dtype=torch.float64):
    """Images, labels, and radii of which the first are large and the last small."""
    x, _ = batch(dtype, 12)
    return x, model(x).argmax(1), EPS[norm] * torch.linspace(2.5, 0.05, 12, dtype=dtype)


@pytest.mark.parametrize("more", [{}, {"strict_eps": True}, {"quantize": 255}], ids=["plain", "strict", "grid"])
@pytest.mark.parametrize("aimed", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_stopping_early_and_slots_say_the_same(build, batch, norm, aimed, more):
    """But where rounding undoes what the nearest candidate does: there the first that counts is fooled, too."""
    model = build("conv")
    x, y, eps = ladder(model, batch, norm)
    settings = dict(eps=eps, norm=norm, aimed=aimed, steps=15, restarts=2, return_info=True, **more)
    full = fab(model, x, y, generator=fixed(), **settings)
    assert more or (full.success.any() and not full.success.all())
    for slots in (None, 5, 40):
        recorder = Recorder(model)
        found = fab(recorder, x, y, early_stop="compact", slots=slots, generator=fixed(), **settings)
        assert torch.equal(found.success, model(found.x_adv).argmax(1) != y)
        if "quantize" in more:
            assert (found.success >= full.success).all() and found.success.any() and not found.success.all()
            assert torch.equal((found.x_adv * 255).round() / 255, found.x_adv)
        else:
            assert torch.equal(found.success, full.success)
            distance = (found.x_adv - x).flatten(1).norm(ORDER[norm], dim=1)
            assert (distance <= eps * (1 + 1e-9)).all()
            inside = -found.loss <= eps
            assert inside[found.success].any() and (distance + found.loss)[inside].abs().max() < 1e-12
        left = ~found.success
        assert (found.x_adv - full.x_adv)[left].abs().max() < 1e-9
        assert (found.loss - full.loss)[left & full.loss.isfinite()].abs().sum() < 1e-9
        assert torch.equal(found.steps_used[left], full.steps_used[left])
        assert found.backwards < full.backwards and max(map(len, recorder.seen)) <= (slots or 12)


def test_an_image_that_rounding_mends_does_not_end_a_search(build, batch, monkeypatch):
    """On a coarse grid candidates within eps come and go; who has left is fooled, and who is not has made all steps."""
    model, scored, kept = build("linear"), collections.Counter(), Nearest.kept
    monkeypatch.setattr(
        Nearest, "kept", lambda self, *given: scored.update(self.distance.tolist()) or kept(self, *given)
    )
    x, y, eps = ladder(model, batch, "l2")
    x = (x * 15).round() / 15
    y = model(x).argmax(1)
    settings = dict(eps=2 * eps, norm="l2", steps=12, targets=2, quantize=15, return_info=True)
    found = fab(model, x, y, early_stop="compact", **settings)
    assert max(n for distance, n in scored.items() if distance < torch.inf) <= 2, "when it is new, and in the end"
    full = fab(model, x, y, **settings)
    assert torch.equal(found.success, model(found.x_adv).argmax(1) != y) and (found.success >= full.success).all()
    undone = ~found.success & (-found.loss <= 2 * eps)
    assert undone.any() and (found.steps_used[undone] == 2 * 12).all()
    lost = (found.success & ~full.success).nonzero().flatten()
    assert len(lost)
    for row in lost:  # alone it does not leave, and is not asked about again
        scored.clear()
        others = torch.where(torch.arange(12) == row, settings["eps"], 1e-6)
        again = fab(model, x, y, early_stop="compact", **settings | {"eps": others})
        assert again.success[row] and again.steps_used[row] == 2 * 12 and scored[-again.loss[row].item()] == 1


def test_slots_are_refilled(build, batch):
    model, (x, _) = build("mlp"), batch()
    x = x.repeat(8, 1, 1, 1)
    y = model(x).argmax(1)
    eps = torch.where(torch.arange(48) % 8 == 0, 1e-3, 0.2)
    recorder, turns = Recorder(model), Recorder(model)
    found = fab(recorder, x, y, eps=eps, steps=20, early_stop="compact", slots=8, return_info=True)
    for rows in torch.arange(48).split(8):
        fab(turns, x[rows], y[rows], eps=eps[rows], steps=20, early_stop="compact")
    assert found.success.sum() >= 40 and not found.success.all()
    assert len(recorder.seen[0]) == 8 and len(recorder.seen) < len(turns.seen) / 2


def test_slots_keep_their_shape_when_compiled(build, batch, compiled_sizes):
    model = build("mlp")
    x, y, eps = ladder(model, batch, "linf")
    settings = dict(eps=eps, steps=10, restarts=2, early_stop="compact", slots=5, return_info=True)
    found = fab(model, x, y, engine="compile", generator=fixed(), **settings)
    assert len(compiled_sizes) > 20 and set(compiled_sizes) == {5}
    eager = fab(model, x, y, generator=fixed(), **settings)
    assert torch.equal(found.success, eager.success) and found.success.any() and not found.success.all()
    assert (found.x_adv - eager.x_adv)[~found.success].abs().max() < 1e-9


@pytest.mark.parametrize("slots", [None, 3])
def test_the_first_run_of_a_class_starts_from_x_and_others_from_noise(build, batch, slots):
    model, (x, _) = build("mlp"), batch()
    y = model(x).argmax(1)
    recorder = Recorder(model)
    fab(recorder, x, y, eps=1e-3, steps=1, targets=2, restarts=2, slots=slots, generator=fixed())
    far = [(seen[:, None] - x[None]).flatten(2).abs().amax(2).amin(1) for seen in recorder.seen]
    far = torch.cat(far)
    assert (far == 0).sum() == 12 and ((far - 5e-4).abs() < 1e-9).sum() == 12 and len(far) == 24


@pytest.mark.parametrize("slots", [None, 4])
def test_a_noisy_start_that_fools_the_model_counts(batch, slots):
    """Where one pixel has grown the model is wrong, and its gradient leads away from there."""
    x, _ = batch(n=8)
    pixel = x[:, 0, 0, 0]

    def model(v):
        home = (v.detach()[:, None] - x[None]).flatten(2).abs().amax(2).argmin(1)
        grown = v[:, 0, 0, 0] - pixel[home]
        sign = torch.where(grown.detach() > 1e-6, 1.0, -1.0)
        return torch.stack([torch.zeros_like(grown), sign + 100 * sign * (grown - grown.detach())], 1)

    y = torch.zeros(8, dtype=torch.int64)
    settings = dict(eps=0.02, steps=3, slots=slots, return_info=True)
    assert not fab(model, x, y, early_stop="compact", **settings).success.any()
    found = fab(model, x, y, early_stop="compact", restarts=2, generator=fixed(), **settings)
    assert found.success.any() and not found.success.all()
    assert (found.x_adv[found.success] - x[found.success]).flatten(1).abs().amax(1).sub(0.01).abs().max() < 1e-9
    assert torch.equal(found.trace.fooled_at, torch.where(found.success, 3, -1))


def test_what_was_looked_at_is_told(build, batch):
    """Steps, the nearest candidates so far, and when the first of them was within eps."""
    model = build("vit")
    x, y, eps = ladder(model, batch, "linf")
    seen = []
    settings = dict(eps=eps, steps=12, aimed=False, return_info=True)
    found = fab(model, x, y, callback=lambda *given: seen.append(given), **settings)
    assert [k for k, *_ in seen] == list(range(12))
    distances = torch.stack([distance for *_, distance in seen])
    assert (distances[1:] <= distances[:-1]).all() and torch.equal(distances[-1], -found.loss)
    first = (distances <= eps).int().argmax(0) + 1
    within = found.loss >= -eps
    assert torch.equal(found.trace.fooled_at, torch.where(within, first, -1)) and found.trace.last == 12
    stopped = fab(model, x, y, early_stop="compact", **settings)
    assert torch.equal(stopped.trace.fooled_at[within], first[within])
    assert (stopped.steps_used[within] < 12).any()


@pytest.mark.parametrize("name", ["fab-8", "fab-t-8"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_stages_say_the_same(build, batch, norm, name):
    model, (stage,) = build("vit"), parse_attack(name)
    x, y, eps = ladder(model, batch, norm)
    full = fab(model, x, y, eps=eps, norm=norm, return_info=True, **stage.settings)
    found = stage(model, x, y, eps=eps, norm=norm, slots=4)
    assert stage.refills and torch.equal(found.success, full.success) and found.backwards < full.backwards
    moved = stage(model, x, y, eps=eps, norm=norm, slots=4, transfer=True)
    assert torch.equal(moved.success, full.success) and (moved.loss >= found.loss - 1e-9).all()
    assert (moved.loss > found.loss + 1e-3).any(), "the nearest images, since this model's verdict decides nothing"


@pytest.mark.parametrize("change, message", [
    (dict(early_stop="cycle"), "early_stop must be one of None, 'compact'"),
    (dict(early_stop="compact", eps=None), "give eps"),
    (dict(early_stop="compact", engine="compile"), "not both"),
    (dict(slots=0), "slots must be an integer >= 1"),
    (dict(slots=4, callback=print), "slots has no callback"),
    (dict(steps=0), "steps must be an integer >= 1"),
    (dict(targets=0), "targets must be an integer >= 1"),
    (dict(targets=5), "the model has 5"),
    (dict(targets=2, aimed=False), "needs a loss that aims at classes"),
    (dict(beta=1.5), r"beta must be in \[0, 1\]"),
    (dict(norm="l0"), "'linf', 'l2', 'l1'"),
])  # fmt: skip
def test_bad_input(build, batch, change, message):
    x, y = batch()
    with pytest.raises(ValueError, match=message):
        fab(build("mlp"), x, y, **change)


def test_a_model_without_gradients_is_named(batch):
    x, y = batch()
    for attack in (fab, apgd):
        with pytest.raises(ValueError, match="carries no gradient"):
            attack(lambda v: v.detach().flatten(1)[:, :5], x, y, steps=1)
