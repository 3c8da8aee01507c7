"""What the replacements share, without any other library."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rvlm.attacks import apgd, square
from rvlm.compat import foolbox as fb
from rvlm.compat import torchattacks
from rvlm.compat.advertorch.attacks import LinfPGDAttack
from rvlm.compat.autoattack import AutoAttack
from rvlm.compat.cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent
from rvlm.compat.common import Draws, SquareDraws, per_sample_loss, within


def test_draws_are_those_of_a_seed_and_leave_the_generator():
    torch.manual_seed(7)
    expected = [2 * torch.rand(3, 4) - 1, torch.randn(2, 5), 2 * torch.rand(2) - 1]
    state, draws = torch.get_rng_state(), Draws(7.9)
    zeros = torch.zeros
    found = [draws.around(zeros(3, 4)), draws.normal(zeros(2, 5)), draws.noise(3, zeros(0)).at(None).around(zeros(2))]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)) and draws.run == 3
    assert torch.equal(state, torch.get_rng_state())


def test_windows_are_shared_by_the_batch():
    """Linf: two places and three signs; L2 and L1: four places and a turn, and signs of their own."""
    for linf in (True, False):
        numbers = SquareDraws(0, linf).around(torch.zeros(5, 13), draw=4)
        assert (numbers[:, :5] == numbers[:1, :5]).all() and (numbers[0, :5].diff() != 0).all()
        own = numbers[:, 5:8]
        assert (own == 0).all() if linf else (own != own[:1])[1:].all()
        assert (numbers[:, 8:] == 0).all()


def test_attacks_take_them_for_a_generator(model_and_batch):
    model, x, y = model_and_batch
    for attack in (apgd, square):
        settings = {"eps": 0.02, "steps" if attack is apgd else "queries": 3, "model_mode": "keep"}
        draws = (lambda: Draws(1)) if attack is apgd else (lambda: SquareDraws(1, True))
        state = torch.get_rng_state()
        first, again = (attack(model, x, y, generator=draws(), **settings) for _ in range(2))
        assert torch.equal(first, again) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("loss", [
    nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(weight=torch.arange(1.0, 6)), nn.MultiMarginLoss(),
    lambda logits, y: F.cross_entropy(logits, y, reduction="none"), lambda logits, y: logits.square().sum(),
])  # fmt: skip
def test_losses_per_sample_have_the_same_gradient(loss):
    logits, y = torch.randn(4, 5, dtype=torch.float64).requires_grad_(), torch.arange(4)
    given = loss(logits.float(), y)
    ours = per_sample_loss(loss, y)(logits.float(), y)
    assert ours.shape == (4,)
    (one,), (other,) = (torch.autograd.grad(t.sum(), logits, retain_graph=True) for t in (given, ours))
    assert torch.equal(one, other)


def test_plain_cross_entropies_are_ours():
    assert per_sample_loss(None, None) == per_sample_loss(nn.CrossEntropyLoss(), torch.arange(3)) == "ce"
    assert callable(per_sample_loss(nn.CrossEntropyLoss(), torch.rand(3, 5))), "distributions"


@pytest.mark.parametrize("attack", [
    lambda m, x, y: fb.attacks.LinfPGD(steps=2)(fb.PyTorchModel(m, (0, 1), "cpu"), x, y, epsilons=0.1),
    lambda m, x, y: fb.attacks.L2DeepFoolAttack(steps=2)(fb.PyTorchModel(m, (0, 1), "cpu"), x, y, epsilons=0.1),
    lambda m, x, y: LinfPGDAttack(m, nb_iter=2).perturb(x),
    lambda m, x, y: projected_gradient_descent(m, x, 0.1, 0.05, 2, torch.inf),
    lambda m, x, y: AutoAttack(
        m, eps=0.1, version="custom", attacks_to_run=["apgd-ce"], device="cpu"
    ).run_standard_evaluation(x, y, bs=3),
    lambda m, x, y: AutoAttack(m, device="cpu").clean_accuracy(x, y),
    lambda m, x, y: torchattacks.TPGD(m, steps=2)(x),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:the model is in training mode")
def test_batch_norm_in_training_mode_keeps_its_statistics(attack):
    """Also where the clean images and the verdict are looked at, which is no attack yet or any more."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(100, 6)).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    attack(model, torch.rand(6, 3, 12, 12), torch.arange(6))
    assert model[1].training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_within():
    x, far = torch.zeros(2, 3, 1, 1), torch.tensor([[3.0, 4.0, 0.0], [0.1, 0.0, 0.0]]).view(2, 3, 1, 1)
    assert torch.equal(within(x, far, 1.0, 2).flatten(1).norm(dim=1), torch.tensor([1.0, 0.1]))
    assert torch.equal(
        within(x, far, torch.tensor([2.0, 0.05]), torch.inf).flatten(1).amax(1), torch.tensor([2.0, 0.05])
    )
