"""MI-FGSM and its transforms: torchattacks' images from the same draws, what each transform does, how they compose."""

import pytest
import torch
from torch.nn import functional as F

from rvlm.attacks import DI, MIFGSM, NI, SI, TI, VMI, mifgsm
from rvlm.attacks.ball import Noise

EPS, ALPHA = 8 / 255, 2 / 255


def fixed(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name, chain, settings", [
    ("MIFGSM", (), {"decay": 0.9}),
    ("NIFGSM", ("ni",), {"decay": 1.0}),
    ("SINIFGSM", ("ni", "si"), {"decay": 1.0, "m": 5}),
    ("VMIFGSM", ("vmi",), {"decay": 1.0, "N": 3, "beta": 1.5}),
])  # fmt: skip
def test_images_are_torchattacks(model, batch, monkeypatch, name, chain, settings, targeted):
    torchattacks = pytest.importorskip("torchattacks", reason="install rvlm[oracles]")
    x, y = batch()
    draws, numbers = [], fixed(7)

    def uniform_(self, low, high):
        draws.append(2 * torch.rand(self.shape, generator=numbers, dtype=self.dtype) - 1)
        return self.copy_(draws[-1] * high)

    attack = getattr(torchattacks, name)(model, eps=EPS, alpha=ALPHA, steps=6, **settings)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", uniform_)
        theirs = attack(x, y)
    queue = iter(draws)
    monkeypatch.setattr(Noise, "around", lambda *_, **__: next(queue))
    chain = [VMI(neighbours=3) if t == "vmi" else t for t in chain]
    ours = mifgsm(model, x, y, eps=EPS, alpha=ALPHA, steps=6, mu=settings["decay"], transforms=chain, targeted=targeted)
    assert (ours - theirs).abs().max() < 1e-12 and not list(queue)
    assert (ours - x).abs().max() > 0.9 * EPS


def test_ti_is_a_gaussian(build, batch):
    """Against the convolution written out, with torchattacks' kernel; edges see zeros."""
    torchattacks = pytest.importorskip("torchattacks", reason="install rvlm[oracles]")
    model, (x, y) = build("conv"), batch()
    kernel = torch.from_numpy(torchattacks.TIFGSM(model).gkern(15, 3))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    blurred = F.conv2d(grad, kernel.expand(3, 1, 15, 15), padding="same", groups=3)
    assert torch.equal((mifgsm(model, x, y, steps=1, transforms=["ti"]) - x).sign(), _inside(x, blurred.sign()))


def _inside(x, sign):
    """The step's sign where the box lets it act."""
    return torch.where((x + 1e-9 * sign).clamp(0, 1) == x, torch.zeros_like(x), sign)


def test_di_shrinks_and_pads_some(build, batch):
    """Seen from the model: of each sample its mean falls by what the padding takes, or nothing has changed."""
    seen, model, (x, y) = [], build("mlp"), batch()
    ones = torch.full_like(x, 0.5)
    recorded = lambda v: seen.append(v.detach().clone()) or model(v)  # noqa: E731
    mifgsm(recorded, ones, y, steps=40, eps=1e-4, transforms=[DI(0.6, 0.5)], generator=fixed())
    means = torch.stack([v.mean((1, 2, 3)) for v in seen[:40]])
    changed = means < 0.49
    assert 0.35 < changed.double().mean() < 0.65
    assert means.min() > 0.5 * 0.6**2 * 0.8 and means[changed].std() > 0.02
    assert all(v.shape == x.shape for v in seen)
    corners = torch.stack([v[:, 0, ::7, ::7].flatten(1) for v in seen[:40]])  # each corner is padded now and then
    assert ((corners < 0.1).flatten(0, 1).double().mean(0) > 0.1).all()
    same = mifgsm(model, x, y, transforms=[DI(1.0, 1.0)], generator=fixed())
    assert (same - mifgsm(model, x, y)).abs().max() < 1e-9, "nothing is shrunk"


@pytest.mark.parametrize("chain", [["ti", "di"], ["vmi", "ni", "si", "di", "ti"], [TI(3), NI()], [SI(2), VMI(2)]])
def test_ball_and_batch(build, batch, chain):
    model, (x, y) = build("conv"), batch()
    ids = torch.tensor([5, 3, 2**40, 1, 0, 9])
    run = lambda rows: mifgsm(  # noqa: E731
        model, x[rows], y[rows], eps=EPS, steps=4, transforms=chain, generator=fixed(), sample_ids=ids[rows]
    )
    whole = run(torch.arange(6))
    assert (whole - x).abs().max() <= EPS + 1e-12 and whole.min() >= 0 and whole.max() <= 1
    for k in range(6):
        assert (run(torch.tensor([k])) - whole[k : k + 1]).abs().max() < 1e-9
    loss = lambda v: F.cross_entropy(model(v), y, reduction="none")  # noqa: E731
    assert (loss(whole) > loss(x)).double().mean() > 0.8


def test_one_kernel_per_step(build, batch):
    model, (x, y) = build("mlp", torch.float32), batch(torch.float32)
    with torch.profiler.profile() as profile:
        mifgsm(model, x, y, steps=7)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["rvlm::momentum_step_"] == 7


@pytest.mark.parametrize("mu, velocity, chain", [
    (0.0, "l1", ()), (0.0, "l1", ("ti", "si")), (0.9, "sign", ()), (0.5, "sign", ("ni",)),
])  # fmt: skip
@pytest.mark.parametrize("settings", [{}, {"targeted": True}, {"quantize": 255}, {"random_start": True}])
def test_cycle_is_exact_and_cheaper(build, batch, mu, velocity, chain, settings):
    """On a model that takes one sample after the other, so that no bit depends on who is still in the batch."""
    inner, (x, y) = build("mlp"), batch()
    model = lambda v: torch.cat([inner(row[None]) for row in v])  # noqa: E731
    given = dict(eps=EPS, alpha=ALPHA, steps=77, mu=mu, velocity=velocity, transforms=chain, return_info=True)
    full = mifgsm(model, x, y, generator=fixed(), **given | settings)
    short = mifgsm(model, x, y, early_stop="cycle", generator=fixed(), **given | settings)
    assert torch.equal(short.x_adv, full.x_adv) and torch.equal(short.pred, full.pred)
    assert short.backwards < full.backwards and (short.steps_used < 77).any() and (full.steps_used == 77).all()


def test_the_velocity_is_part_of_the_state():
    """Between two slopes the gradient is 0 and the pixel goes on as it went: back at an image, it may go elsewhere."""

    def trough(v):
        v = v.flatten(1)
        return torch.cat([-F.relu(v - 0.6) - F.relu(0.3 - v), 0 * v], 1)

    x, y = torch.full((1, 1, 1, 1), 0.25, dtype=torch.float64), torch.tensor([1])
    for steps in range(1, 60):
        given = dict(eps=0.75, alpha=1 / 8, mu=0.9, velocity="sign", steps=steps, return_info=True)
        short, full = mifgsm(trough, x, y, early_stop="cycle", **given), mifgsm(trough, x, y, **given)
        assert torch.equal(short.x_adv, full.x_adv), steps
    assert short.backwards < full.backwards / 1.5


def test_class_and_options(build, batch):
    model, (x, y) = build("mlp"), batch()
    attack = MIFGSM(model, steps=3, transforms=("si",))
    assert torch.equal(attack(x, y), mifgsm(model, x, y, steps=3, transforms=[SI()]))
    for norm, order, eps in (("l2", 2, 0.4), ("l1", 1, 4.0)):
        found = mifgsm(model, x, y, norm=norm, eps=eps, return_info=True)
        assert ((found.x_adv - x).flatten(1).norm(order, dim=1) <= eps + 1e-9).all()
        assert (found.loss > F.cross_entropy(model(x), y, reduction="none")).all()
    strict = mifgsm(model.float(), x.float(), y, strict_eps=True)
    assert (strict.double() - x.float().double()).abs().max() <= EPS
    result = mifgsm(model.double(), x, y, transforms=["si"], steps=3, return_info=True)
    assert result.backwards == 3 * 5 * 6 and result.forwards == result.backwards + 6
    state = torch.get_rng_state()
    mifgsm(model, x, y, steps=1)
    assert torch.equal(state, torch.get_rng_state()), "nothing is drawn where nothing is random"


@pytest.mark.parametrize("change, message", [
    (dict(transforms=["mi"]), "'ni', 'si', 'di', 'ti', 'vmi' or objects"),
    (dict(steps=0), "steps must be an integer >= 1"),
    (dict(restarts=2), "same run"),
    (dict(alpha=-1.0), "alpha must be finite and not negative"),
    (dict(early_stop="compact"), "early_stop must be one of None, 'cycle'"),
    (dict(early_stop="cycle"), "the velocity does not repeat"),
    (dict(early_stop="cycle", mu=0.0, norm="l2"), "exact for norm='linf' only"),
    (dict(early_stop="cycle", mu=0.0, transforms=["di"]), "draws nothing, got DI, eot=1"),
    (dict(early_stop="cycle", mu=0.0, eot=2), "draws nothing, got eot=2"),
    (dict(early_stop="cycle", mu=0.0, engine="compile"), "for a loss by name and engine='eager'"),
    (dict(transforms=["ti"], x=torch.rand(6, 12)), r"TI: needs images \[B, C, H, W\]"),
])  # fmt: skip
def test_bad_input(build, batch, change, message):
    x, y = batch()
    with pytest.raises(ValueError, match=message):
        mifgsm(build("mlp"), **dict(x=x, y=y) | change)


@pytest.mark.parametrize("make", [lambda: SI(0), lambda: DI(0.0), lambda: TI(4), lambda: VMI(0), lambda: VMI(64)])
def test_bad_transforms(make):
    with pytest.raises(ValueError):
        make()
