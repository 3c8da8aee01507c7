"""Models around models: what the attack sees through them, and that it leaves no trace on what is inside."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rvlm.attacks import BPDA, Joint, LowFrequency, apgd, losses, mifgsm, pgd, square
from rvlm.ops import gaussian_filter

EPS = 8 / 255


def fixed(seed=0):
    return torch.Generator().manual_seed(seed)


def levels(x):
    return (x * 16).round() / 16


def gradient_of(model, x, y):
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    return grad


def test_bpda_breaks_a_quantised_input(build, batch):
    model, (x, _) = build("conv"), batch()
    y = model(levels(x)).argmax(1)
    defended = lambda v: model(levels(v))  # noqa: E731
    found = apgd(BPDA(levels, model), x, y, eps=24 / 255, steps=30, generator=fixed(), return_info=True)
    assert torch.equal(found.pred, defended(found.x_adv).argmax(1)), "outputs are the defence's"
    blind = pgd(defended, x, y, eps=24 / 255, steps=30, generator=fixed(), return_info=True)
    assert blind.zero_gradients == blind.backwards and found.zero_gradients == 0
    assert found.success.sum() > blind.success.sum()


def test_bpda_with_a_substitute(build, batch):
    model, (x, y) = build("mlp"), batch()
    double = BPDA(lambda v: torch.zeros_like(v) + 2 * v, model, lambda v: 2 * v)
    assert (gradient_of(double, x, y) - gradient_of(lambda v: model(2 * v), x, y)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="give a substitute"):
        BPDA(lambda v: v[:, :, ::2], model)(x)


def test_low_frequency_filters_the_gradient_alone(build, batch):
    model, (x, y) = build("conv"), batch()
    wrapped = LowFrequency(model, 1.5)
    assert torch.equal(wrapped(x), model(x))
    expected = gaussian_filter(gradient_of(model, x, y), 1.5, clamp=False)
    assert (gradient_of(wrapped, x, y) - expected).abs().max() < 1e-12
    x_adv = pgd(wrapped, x, y, eps=EPS, generator=fixed())
    assert (F.cross_entropy(model(x_adv), y, reduction="none") > F.cross_entropy(model(x), y, reduction="none")).all()
    with pytest.raises(ValueError, match="above 0"):
        LowFrequency(model, 0.0)


def test_joint_adds_losses(build, batch):
    one, two, (x, y) = build("mlp"), build("conv"), batch()
    joint = Joint([one, two], [1.0, 0.5])
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(joint.loss(joint(leaf), y).sum(), leaf)
    assert (grad - gradient_of(one, x, y) - 0.5 * gradient_of(two, x, y)).abs().max() < 1e-12
    x_adv = pgd(joint, x, y, loss=joint.loss, best="loss", eps=EPS, generator=fixed())
    for model in (one, two):
        assert F.cross_entropy(model(x_adv), y) > F.cross_entropy(model(x), y)
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_unit_gradients_weigh_the_same(build, batch):
    one, (x, y) = build("mlp"), batch()
    loud = lambda v: 1e3 * build("conv")(v)  # noqa: E731
    joint = Joint([one, loud], gradients="unit")
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(joint.loss(joint(leaf), y).sum(), leaf)
    unit = lambda g: g / g.flatten(1).abs().sum(1).view(-1, 1, 1, 1)  # noqa: E731
    expected = unit(gradient_of(one, x, y))
    rows = gradient_of(loud, x, y).flatten(1).abs().sum(1) > 0
    expected[rows] += unit(gradient_of(loud, x, y))[rows]
    assert (grad - expected).abs().max() < 1e-12


def test_a_teacher_that_is_known(build, batch):
    """The adaptive attack on a student and the divergence to its teacher: any loss for any of the models."""
    student, teacher, (x, y) = build("mlp"), build("conv"), batch()
    with torch.no_grad():
        soft = teacher(x).softmax(1)
    away = lambda logits, _: F.kl_div(logits.log_softmax(1), soft, reduction="none").sum(1)  # noqa: E731
    joint = Joint([student, student], losses=[losses.ce, away])
    x_adv = pgd(joint, x, y, loss=joint.loss, best="loss", eps=EPS, generator=fixed())
    assert joint.loss(joint(x_adv), y).gt(joint.loss(joint(x), y)).all()


@pytest.mark.parametrize("args, settings, message", [
    (([],), {}, "at least one model"),
    (([nn.Identity()], [1.0, 2.0]), {}, "1 models need as many weights and losses, got 2 and 1"),
    (([nn.Identity()],), {"gradients": "mean"}, "'sum' or 'unit'"),
])  # fmt: skip
def test_bad_joints(args, settings, message):
    with pytest.raises(ValueError, match=message):
        Joint(*args, **settings)


@pytest.mark.parametrize("loss", [losses.squared_l2, losses.cosine])
@pytest.mark.parametrize("attack", [pgd, apgd])
def test_attacks_on_embeddings(build, batch, loss, attack):
    model, (x, _) = build("mlp")[:3], batch()
    reference = model(x).detach()
    found = attack(model, x, reference, loss=loss, eps=EPS, best="loss", generator=fixed(), return_info=True)
    assert found.success is None and torch.allclose(found.loss, loss(model(found.x_adv), reference))
    noise = (x + EPS * torch.randn(x.shape, generator=fixed(), dtype=x.dtype).sign()).clamp(0, 1)
    assert (found.loss > loss(model(noise), reference)).all()
    back = attack(
        model, noise, reference, loss=loss, targeted=True, eps=EPS, best="loss", generator=fixed(), return_info=True
    )
    assert (back.loss < loss(model(noise), reference)).all(), "targeted: toward the reference"


@pytest.mark.parametrize("attack", [pgd, apgd, mifgsm, square])
@pytest.mark.parametrize("targeted", [False, True])
def test_models_that_return_a_loss_per_image(build, batch, attack, targeted):
    """As a captioner does: pixels to the loss of a caption, for a whole batch."""
    model, (x, y) = build("vit"), batch()
    captioner = lambda v: F.cross_entropy(model(v), y, reduction="none")  # noqa: E731
    more = {"queries": 60} if attack is square else {"steps": 8}
    more |= {"best": "loss"} if attack in (pgd, apgd) else {}
    found = attack(captioner, x, loss=losses.given, targeted=targeted, generator=fixed(), return_info=True, **more)
    assert found.success is None and found.pred is None
    moved = captioner(found.x_adv) - captioner(x)
    assert (moved < 0).all() if targeted else (moved > 0).all()
    assert torch.allclose(found.loss, captioner(found.x_adv))
    whole = attack(captioner, x, loss=losses.given, targeted=targeted, generator=fixed(), **more)
    assert torch.equal(whole, found.x_adv)
