"""Auto-PGD: the same points as AutoAttack's implementation in float64, and what its options mean."""

import math

import pytest
import torch
from torch import nn

from rvlm.attacks import APGD, apgd, pgd
from rvlm.ops import losses as loss_ops

EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 5.0}
THEIRS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
ORDER = {"linf": torch.inf, "l2": 2, "l1": 1, "Linf": torch.inf, "L2": 2}


def fixed(seed=0):
    return torch.Generator().manual_seed(seed)


class Recorder(nn.Module):
    """Keeps the images that the model is shown with a gradient."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        if torch.is_grad_enabled() and x.requires_grad:
            self.seen.append(x.detach().clone())
        return self.model(x)


@pytest.fixture
def start(batch):
    """Starts near the edge of each ball."""

    def make(norm, scale=1.0):
        x, _ = batch()
        noise = torch.randn(x.shape, generator=fixed(5), dtype=x.dtype)
        length = noise.flatten(1).norm(ORDER[norm], dim=1).view(-1, 1, 1, 1)
        return (x + 0.9 * scale * EPS[norm] * noise / length).clamp(0, 1)

    return make


@pytest.fixture
def doubles(monkeypatch):
    """The original keeps step sizes, flags and its L1 projection in float32 whatever the images are, and adds 1e-12 to
    the norms it divides by, which shows where a gradient is small."""
    base = pytest.importorskip("pyautoattack.autopgd_base", reason="install rvlm[oracles]")
    unit = lambda self, t: t / t.flatten(1).norm(ORDER[self.norm], dim=1).view(-1, 1, 1, 1).clamp(min=1e-300)  # noqa: E731
    monkeypatch.setattr(base.APGDAttack, "normalize", unit)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def original(model, norm, steps, loss, **settings):
    from pyautoattack import autopgd_base as base

    name = "APGDAttack_targeted" if loss == "dlr-targeted" else "APGDAttack"
    settings |= {} if loss == "dlr-targeted" else {"loss": loss}
    return getattr(base, name)(model, n_iter=steps, norm=THEIRS[norm], eps=EPS[norm], device="cpu", **settings)


@pytest.mark.parametrize("steps", [10, 60])
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_points_are_autoattacks(model, batch, start, monkeypatch, doubles, norm, loss, steps):
    """Every point that is evaluated, so every step size, halving and return; then the best point and the verdicts."""
    close = 1e-7 if norm == "l2" else 1e-9  # norms are summed in another order, and 60 steps make it grow
    (x, _), begin = batch(), start(norm)
    y = model(x).argmax(1)
    theirs, ours = Recorder(model), Recorder(model)
    if norm == "l1":  # from a start that is given, the original sets its share of pixels otherwise: let it draw
        from pyautoattack import autopgd_base

        monkeypatch.setattr(autopgd_base, "L1_projection", once_else(begin - x, autopgd_base.L1_projection))
        monkeypatch.setattr(torch, "randn", lambda shape: torch.zeros(shape, dtype=torch.float64))
    attack = original(theirs, norm, steps, loss)
    attack.init_hyperparam(x)
    if loss == "dlr-targeted":
        attack.y_target = model(x).sort(dim=1)[1][:, -3]
    best, survives, best_loss, adversarial = attack.attack_single_run(x, y, x_init=None if norm == "l1" else begin)
    settings = dict(eps=EPS[norm], steps=steps, norm=norm, loss=loss, return_info=True)
    if loss == "dlr-targeted":
        monkeypatch.setattr("rvlm.attacks.objective.Objective.runners_up", lambda *_: attack.y_target[:, None])
    found = apgd(ours, x, y, x_init=begin, best="loss", **settings)
    assert len(ours.seen) == len(theirs.seen) == steps + 1
    for mine, wanted in zip(ours.seen, theirs.seen, strict=True):
        assert (mine - wanted).abs().max() < close
    assert (found.x_adv - best).abs().max() < close and (found.loss - best_loss).abs().max() < close
    fooled = apgd(model, x, y, x_init=begin, **settings)
    assert torch.equal(fooled.success, survives == 0)
    rows = fooled.success
    assert not rows.any() or (fooled.x_adv[rows] - adversarial[rows]).abs().max() < close


def once_else(first, function):
    """Returns `first` once, then what the function returns."""
    answers = [first]
    return lambda *args: answers.pop() if answers else function(*args)


def test_larger_radii_in_l1_are_autoattacks(build, batch, start, monkeypatch, doubles):
    model, (x, _), begin = build("conv"), batch(), start("l1", scale=3.0)
    y = model(x).argmax(1)
    theirs, ours = Recorder(model), Recorder(model)
    monkeypatch.setattr(torch, "randn_like", lambda t: begin - x)
    attack = original(theirs, "l1", 41, "ce", use_largereps=True)
    attack.init_hyperparam(x)
    counts = [math.ceil(0.3 * 41)] * 2
    best, survives, _, _ = attack.decr_eps_pgd(x, y, [15.0, 10.0, 5.0], [*counts, 41 - sum(counts)])
    settings = dict(eps=5.0, steps=41, norm="l1", larger_eps=True, x_init=begin, best="loss", return_info=True)
    found = apgd(ours, x, y, **settings)
    assert len(ours.seen) == len(theirs.seen) == 44
    for mine, wanted in zip(ours.seen, theirs.seen, strict=True):
        assert (mine - wanted).abs().max() < 1e-9
    assert (found.x_adv - best).abs().max() < 1e-9
    assert torch.equal(apgd(model, x, y, **settings | {"best": "adv"}).success, survives == 0)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "dlr-targeted", "ce-targeted"])
def test_ball_box_and_verdict(model, batch, norm, loss):
    x, _ = batch()
    y = model(x).argmax(1)
    found = apgd(model, x, y, eps=EPS[norm], norm=norm, steps=20, loss=loss, generator=fixed(), return_info=True)
    delta = (found.x_adv - x).flatten(1)
    length = delta.norm(ORDER[norm], dim=1)
    assert (length <= EPS[norm] + 1e-9).all() and found.x_adv.min() >= 0 and found.x_adv.max() <= 1
    assert torch.equal(found.pred, model(found.x_adv).argmax(1))
    assert torch.equal(found.success, found.pred != y)
    weak = pgd(model, x, y, eps=EPS[norm] / 4, norm=norm, steps=1, random_start=False, return_info=True)
    assert found.success.sum() >= weak.success.sum()


def test_targets_and_restarts_go_to_survivors_alone(build, batch):
    """Every wrong class is aimed at, in the order of its logit, and only samples that nobody has fooled go on."""
    model, (x, _) = build("mlp"), batch()
    y = model(x).argmax(1)
    recorder = Recorder(model)
    settings = dict(eps=1e-4, steps=3, loss="dlr-targeted", generator=fixed(), return_info=True)
    hopeless = apgd(recorder, x, y, restarts=2, **settings)
    assert not hopeless.success.any() and len(recorder.seen) == 4 * 2 * 4
    assert hopeless.forwards == 6 + len(recorder.seen) * 6 and hopeless.backwards == len(recorder.seen) * 6
    assert hopeless.steps_used.tolist() == [4 * 2 * 3] * 6
    mixed = torch.where(torch.arange(6) < 4, y, (y + 1) % 5)  # two are wrong from the start
    recorder.seen.clear()
    apgd(recorder, x, mixed, **settings | {"targets": 3})
    assert [len(seen) for seen in recorder.seen] == [6] * 4 + [4] * 8
    aims = []
    patched = loss_ops.attack_loss

    def spy(logits, labels, kind, target=None):
        aims.append(target.clone())
        return patched(logits, labels, kind, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rvlm.ops.attack_loss", spy)
        apgd(model, x, y, **settings)
    order = model(x).argsort(1, descending=True)
    for rank in range(1, 5):
        assert torch.equal(aims[4 * (rank - 1)], order[:, rank])


def test_results_do_not_depend_on_the_batch(model, batch):
    x, _ = batch()
    y, ids = model(x).argmax(1), torch.tensor([5, 3, 2**40, 1, 0, 9])
    run = lambda rows: apgd(  # noqa: E731
        model, x[rows], y[rows], eps=EPS["linf"], steps=12, generator=fixed(), sample_ids=ids[rows], restarts=2
    )
    whole = run(torch.arange(6))
    for k in range(6):
        assert (run(torch.tensor([k])) - whole[k : k + 1]).abs().max() < 1e-9


@pytest.mark.parametrize("norm, eps", [("linf", 0.08), ("l2", 1.2), ("l1", 12.0)])
@pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
def test_compact_says_the_same_for_less(model, batch, norm, eps, loss):
    x, _ = batch()
    y = model(x).argmax(1)
    settings = dict(eps=eps * torch.linspace(1.5, 0.05, 6), norm=norm, steps=30, loss=loss, return_info=True)
    settings |= {"larger_eps": norm == "l1"}
    full = apgd(model, x, y, generator=torch.Generator().manual_seed(0), **settings)
    found = apgd(model, x, y, early_stop="compact", generator=torch.Generator().manual_seed(0), **settings)
    assert found.success.any() and torch.equal(found.success, full.success)
    left = ~found.success
    assert (found.x_adv - full.x_adv)[left].abs().sum() < 1e-7
    assert torch.equal(model(found.x_adv).argmax(1) != y, found.success)
    assert found.backwards < full.backwards and (found.steps_used <= full.steps_used).all()
    assert torch.equal(found.steps_used[left], full.steps_used[left])


@pytest.mark.parametrize("slots", [4, 40])
@pytest.mark.parametrize("kind", ["conv", "vit"])
@pytest.mark.parametrize("norm, eps", [("linf", 0.08), ("l2", 1.2), ("l1", 12.0)])
@pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
def test_slots_say_the_same_as_run_after_run(build, batch, kind, norm, eps, loss, slots):
    model, (x, _) = build(kind), batch()
    y = model(x).argmax(1)
    settings = dict(eps=eps * torch.linspace(1.5, 0.05, 6), norm=norm, steps=20, loss=loss, restarts=2)
    settings |= dict(early_stop="compact", return_info=True)
    turns = apgd(model, x, y, generator=fixed(), **settings)
    recorder = Recorder(model)
    found = apgd(recorder, x, y, slots=slots, generator=fixed(), **settings)
    assert max(map(len, recorder.seen)) <= slots
    assert turns.success.any() and not turns.success.all() and torch.equal(found.success, turns.success)
    left = ~found.success
    assert (found.loss - turns.loss)[left].abs().max() < 1e-7
    assert torch.equal(found.steps_used[left], turns.steps_used[left])
    assert torch.equal(found.pred, model(found.x_adv).argmax(1)) and torch.equal(found.pred != y, found.success)
    assert ((found.x_adv - x).flatten(1).norm(ORDER[norm], dim=1) <= settings["eps"] * (1 + 1e-6)).all()
    if norm == "linf":  # in L2 last bits grow; in L1 two runs may end with one loss
        assert (found.x_adv - turns.x_adv)[left].abs().max() < 1e-9


@pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
def test_no_batch_is_larger_than_slots(build, batch, loss):
    """Nor the one whose predictions are the labels, nor the verdict's."""
    (x, _), model, sizes = batch(torch.float32, n=7), build("mlp", torch.float32), []
    counted = lambda v: sizes.append(len(v)) or model(v)  # noqa: E731
    settings = dict(steps=3, loss=loss, early_stop="compact", precision="bf16", return_info=True)
    found = apgd(counted, x, slots=3, generator=fixed(), **settings)
    assert sorted(set(sizes)) == [1, 3] and torch.equal(found.pred, model(found.x_adv).argmax(1))
    turns = apgd(model, x, generator=fixed(), **settings)
    assert torch.equal(found.success, turns.success)


@pytest.mark.parametrize("settings", [dict(early_stop="compact"), dict(best="loss"), dict(best="loss", targeted=True)])
def test_one_run_in_slots_is_itself(build, batch, settings):
    """Bit for bit, wherever it stands in a batch and whoever was there before; images of fooled samples, too."""
    model, (x, _) = build("mlp"), batch()
    y = (model(x).argmax(1) + settings.get("targeted", False)) % 5
    given = dict(eps=0.05 * torch.linspace(1.5, 0.05, 6), steps=25, return_info=True, **settings)
    turns = apgd(model, x, y, generator=fixed(), **given)
    for slots in (1, 2, 4):
        found = apgd(model, x, y, slots=slots, generator=fixed(), **given)
        assert (found.x_adv - turns.x_adv).abs().max() < 1e-12 and torch.equal(found.success, turns.success)
        assert torch.equal(found.steps_used, turns.steps_used) and found.backwards <= turns.backwards


def test_slots_are_refilled(build, batch):
    """Few runs last to the end: the batch is full as long as work waits, and so there are fewer of them."""
    model, (x, _) = build("mlp"), batch(n=6)
    x = x.repeat(8, 1, 1, 1)
    y = model(x).argmax(1)
    eps = torch.where(torch.arange(48) % 8 == 0, 1e-3, 0.2)
    settings = dict(eps=eps, steps=20, early_stop="compact", generator=fixed(), return_info=True)
    recorder = Recorder(model)
    found = apgd(recorder, x, y, slots=8, **settings)
    sizes = [len(seen) for seen in recorder.seen]
    chunks = Recorder(model)
    for rows in torch.arange(48).split(8):
        apgd(chunks, x[rows], y[rows], sample_ids=rows, **settings | dict(eps=eps[rows], generator=fixed()))
    assert found.success.sum() >= 40 and not found.success.all()
    assert sizes[0] == 8 and len(sizes) < len(chunks.seen) / 2


def test_slots_keep_their_shape_when_compiled(build, batch, compiled_sizes):
    """Idle ones repeat a row, and change nothing."""
    model, (x, _) = build("mlp"), batch()
    y = model(x).argmax(1)
    settings = dict(eps=0.05 * torch.linspace(1.5, 0.05, 6), steps=20, loss="dlr-targeted", restarts=2)
    settings |= dict(early_stop="compact", slots=5, return_info=True)
    found = apgd(model, x, y, engine="compile", generator=fixed(), **settings)
    assert len(compiled_sizes) > 20 and set(compiled_sizes) == {5}
    eager = apgd(model, x, y, generator=fixed(), **settings)
    assert torch.equal(found.success, eager.success) and found.success.any() and not found.success.all()
    left = ~found.success
    assert (found.x_adv - eager.x_adv)[left].abs().max() < 1e-9
    assert torch.equal(found.steps_used[left], eager.steps_used[left])


def test_slots_of_a_cascade(build, batch):
    """What a search in bf16 has found counts if it does in fp32: else other runs of the sample go on."""
    model, (x, _) = build("conv", torch.float32), batch(torch.float32)
    y = model(x).argmax(1)
    settings = dict(eps=0.06 * torch.linspace(1.5, 0.05, 6), steps=15, loss="dlr-targeted", restarts=2)
    settings |= dict(early_stop="compact", precision="cascade", return_info=True)
    turns = apgd(model, x, y, generator=fixed(), **settings)
    found = apgd(model, x, y, slots=4, generator=fixed(), **settings)
    assert torch.equal(found.success, turns.success) and found.success.any() and not found.success.all()
    assert torch.equal(model(found.x_adv).argmax(1) != y, found.success)


def test_the_queue_in_python_does_the_same(build, batch, monkeypatch):
    model, (x, _) = build("conv"), batch()
    y = model(x).argmax(1)
    settings = dict(eps=0.06, steps=15, loss="dlr-targeted", early_stop="compact", slots=4, return_info=True)
    found = apgd(model, x, y, generator=fixed(), **settings)
    monkeypatch.setattr("rvlm.attacks.work.WorkQueue", None)
    twin = apgd(model, x, y, generator=fixed(), **settings)
    assert torch.equal(found.x_adv, twin.x_adv) and found.forwards == twin.forwards


def test_targeted_attack_reaches_its_class(build, batch):
    model, (x, _) = build("linear"), batch()
    target = (model(x).argmax(1) + 1) % 5
    found = apgd(model, x, target, eps=0.3, steps=20, targeted=True, generator=fixed(), return_info=True)
    assert torch.equal(found.pred, target) and found.success.all()


def test_a_random_model_is_judged_by_most_draws(build, batch):
    model, (x, _) = build("mlp"), batch()
    y = model(x).argmax(1)

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.draws = fixed(1)

        def forward(self, x):
            wrong = torch.rand(len(x), 1, generator=self.draws, dtype=x.dtype) < 0.3
            return model(x) + 1e3 * wrong * nn.functional.one_hot((y + 1) % 5, 5)

    settings = dict(eps=1e-5, steps=5, generator=fixed(), return_info=True)
    assert apgd(Noisy(), x, y, **settings).success.any(), "one lucky draw is enough without eot"
    assert not apgd(Noisy(), x, y, eot=25, **settings).success.any()


def test_quantized_and_strict(build, batch):
    model, (x, _) = build("conv", torch.float32), batch(torch.float32)
    y = model(x).argmax(1)
    found = apgd(model, x, y, steps=20, quantize=255, generator=fixed(), return_info=True)
    stored = (found.x_adv * 255).round().to(torch.uint8)
    assert torch.equal(stored.float() / 255, found.x_adv) and torch.equal(model(found.x_adv).argmax(1), found.pred)
    for norm, order in (("linf", torch.inf), ("l2", 2), ("l1", 1)):
        x_adv = apgd(model, x, y, eps=EPS[norm], norm=norm, steps=10, strict_eps=True, generator=fixed())
        assert ((x_adv.double() - x.double()).flatten(1).norm(order, dim=1) <= EPS[norm]).all()


@pytest.mark.parametrize("norm, loss, kernels", [
    ("linf", "dlr", {"apgd_step_": 7, "attack_loss": 8, "keep_best_": 7 * 3}),
    ("l2", "ce", {"l2_step_": 7 * 2, "keep_best_": 7 * 3}),
    ("l1", "ce", {"sparse_step": 7, "l1_project": 7}),
])  # fmt: skip
def test_steps_are_the_fused_ones(build, batch, norm, loss, kernels):
    """A loss, a step and the book-keeping, one op each per step; starts and checkpoints add a few."""
    model, (x, y) = build("mlp", torch.float32), batch(torch.float32)
    with torch.profiler.profile() as profile:
        apgd(model, x, y, eps=EPS[norm], norm=norm, steps=7, loss=loss, generator=fixed())
    calls = {event.key: event.count for event in profile.key_averages()}
    for name, least in kernels.items():
        assert least <= calls[f"rvlm::{name}"] <= least + 20, (name, calls[f"rvlm::{name}"])


def test_class(build, batch):
    model, (x, y) = build("mlp"), batch()
    attack = APGD(model, eps=4 / 255, steps=5, loss="dlr")
    assert torch.equal(
        attack(x, y, generator=fixed()), apgd(model, x, y, eps=4 / 255, steps=5, loss="dlr", generator=fixed())
    )
    assert repr(attack).startswith("APGD(Sequential, eps=")
    with pytest.raises(TypeError, match="alpha"):
        APGD(model, alpha=0.1)


@pytest.mark.parametrize("change, message", [
    (dict(early_stop="freeze"), "early_stop must be one of None, 'compact'"),
    (dict(early_stop="compact", best="loss"), "for best='adv'"),
    (dict(early_stop="compact", engine="compile"), "changes the batch size"),
    (dict(slots=0, early_stop="compact"), "slots must be an integer >= 1"),
    (dict(slots=4), "slots with best='adv' needs early_stop='compact'"),
    (dict(slots=4, best="loss", loss=lambda out, y: out.sum(1)), "slots needs a loss by name"),
    (dict(slots=4, best="loss", norm="l1", larger_eps=True), "slots is not for larger_eps=True"),
    (dict(slots=4, best="loss", callback=print), "slots has no callback"),
    (dict(steps=0), "steps must be an integer >= 1"),
    (dict(best="last"), "'adv', 'loss'"),
    (dict(rho=1.5), "rho must be a share"),
    (dict(eot=0), "eot must be an integer >= 1"),
    (dict(targets=2), "needs a loss that aims at classes"),
    (dict(targets=5, loss="dlr-targeted"), "targets=5 needs more than 5 classes, the model has 5"),
    (dict(targets=0, loss="dlr-targeted"), "targets must be an integer >= 1"),
    (dict(targeted=True, loss="ce-targeted"), "for untargeted apgd only"),
    (dict(larger_eps=True), "for norm='l1'"),
    (dict(loss="ces"), "unknown loss 'ces'"),
])  # fmt: skip
def test_bad_input(build, batch, change, message):
    x, y = batch()
    with pytest.raises(ValueError, match=message):
        apgd(build("mlp"), x, y, **change)


def test_pgd_does_not_aim(build, batch):
    x, y = batch()
    with pytest.raises(ValueError, match="for untargeted apgd only"):
        pgd(build("mlp"), x, y, loss="dlr-targeted")


@pytest.mark.parametrize("classes, loss", [(2, "dlr"), (3, "dlr-targeted")])
def test_too_few_classes(batch, classes, loss):
    x, y = batch()
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, classes)).double()
    with pytest.raises(ValueError, match=f"at least {4 if 'targeted' in loss else 3} classes"):
        apgd(model, x, y % classes, loss=loss)


@pytest.mark.parametrize("norm, usual", [("linf", 2.0), ("l2", 2.0), ("l1", 1.0)])
def test_the_first_step(build, batch, norm, usual):
    """In radii; what it is unless told otherwise, and how far it goes."""
    model, (x, _) = build("mlp"), batch()
    y = model(x).argmax(1)
    settings = dict(eps=EPS[norm], norm=norm, steps=9, random_start=False)
    assert torch.equal(apgd(model, x, y, **settings), apgd(model, x, y, first_step=usual, **settings))
    short = apgd(model, x, y, first_step=0.1, best="loss", **settings | {"steps": 1})
    length = (short - x).flatten(1).norm(ORDER[norm], dim=1)
    assert (length - 0.1 * EPS[norm]).abs().max() < 1e-9
    with pytest.raises(ValueError, match="first_step must be a number of radii above 0, got 0"):
        apgd(model, x, y, first_step=0, **settings)
