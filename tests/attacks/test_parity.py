"""The same images from the same start as torchattacks and foolbox."""

import pytest
import torch

from rvlm.attacks import fgsm, pgd

EPS, ALPHA = 8 / 255, 2 / 255


@pytest.fixture
def start(batch):
    x, _ = batch()
    return (x + (torch.rand(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype) - 0.5) * EPS).clamp(
        0, 1
    )


def torchattacks_from(start, model, x, y, steps, targeted=False):
    """torchattacks.PGD has no x_init: its own uniform_ draw is replaced by the start we inject."""
    torchattacks = pytest.importorskip("torchattacks", reason="install rvlm[oracles]")
    attack = torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=steps, random_start=True)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", lambda self, *bounds: self.copy_(start - x))
        return attack(x, y)


@pytest.mark.parametrize("steps", [10, 40])
@pytest.mark.parametrize("targeted", [False, True])
def test_float64_trajectories_equal_torchattacks(model, batch, start, steps, targeted):
    x, y = batch()
    theirs = torchattacks_from(start, model, x, y, steps, targeted)
    ours = pgd(model, x, y, eps=EPS, alpha=ALPHA, steps=steps, x_init=start, targeted=targeted)
    assert (ours - theirs).abs().max() <= 1e-12
    assert (ours - x).abs().max() > 0.9 * EPS


def test_fgsm_equals_torchattacks(model, batch):
    torchattacks = pytest.importorskip("torchattacks", reason="install rvlm[oracles]")
    x, y = batch()
    assert (fgsm(model, x, y, eps=EPS) - torchattacks.FGSM(model, eps=EPS)(x, y)).abs().max() <= 1e-12


@pytest.mark.parametrize("steps", [10, 40])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_float64_trajectories_equal_foolbox(model, batch, start, steps, norm):
    foolbox = pytest.importorskip("foolbox", reason="install rvlm[oracles]")
    x, y = batch()
    eps, alpha = (EPS, ALPHA) if norm == "linf" else (0.3, 0.05)
    base = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD

    class FromStart(base):
        def get_random_start(self, x0, epsilon):
            return x0.__class__(start)  # the same start, as an eagerpy tensor

    attack = FromStart(abs_stepsize=alpha, steps=steps, random_start=True)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    if norm == "l2":
        start = x + (start - x) / (start - x).flatten(1).norm(dim=1).view(-1, 1, 1, 1) * 0.9 * eps
    theirs = attack(wrapped, x, y, epsilons=eps)[1]
    ours = pgd(model, x, y, eps=eps, alpha=alpha, steps=steps, x_init=start, norm=norm)
    assert (ours - theirs).abs().max() <= 1e-12


def test_float32_on_sign_safe_pixels(build, batch):
    """In fp32 a pixel may differ only where its gradient is so small that its sign is a matter of rounding."""
    pytest.importorskip("torchattacks", reason="install rvlm[oracles]")
    wide, narrow = build("mlp"), build("mlp", torch.float32)
    x, y = batch()
    smallest = torch.full_like(x, torch.inf)

    def watch(step, x_adv, loss):
        leaf = x_adv.clone().requires_grad_()
        (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(wide(leaf), y, reduction="sum"), leaf)
        torch.minimum(smallest, grad.abs(), out=smallest)

    pgd(wide, x, y, eps=EPS, alpha=ALPHA, random_start=False, callback=watch)
    safe = smallest > 1e-4 * smallest[smallest.isfinite()].max()
    ours = pgd(narrow, x.float(), y, eps=EPS, alpha=ALPHA, random_start=False)
    theirs = torchattacks_from(x.float(), narrow, x.float(), y, 10)
    assert safe.float().mean() > 0.95
    assert (ours - theirs)[safe].abs().max() <= 1e-6
