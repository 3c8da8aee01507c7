"""The kernels on rows of logits: tiles of every size, guarded outputs, and mutations that must be noticed."""

import pytest
import torch

from rvlm.kernels import _launch, distill, losses
from rvlm.ops import distill as distill_ops
from rvlm.ops import losses as loss_ops

from .conftest import assert_guarded, guarded

MASK = -float("inf")


@pytest.fixture
def divergence(device):
    """Two students, three teachers, 37 classes of which some are masked on one or both sides."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(2, 3, 37, generator=generator, dtype=torch.float64)
    teachers = 3 * torch.randn(3, 3, 37, generator=generator, dtype=torch.float64)
    student[:, 1, 5] = teachers[:, 1, 5] = MASK
    student[0, 2, 7] = teachers[1, 0, 3] = MASK
    weights = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    tau = torch.tensor([1.0, 2.0, 0.7], dtype=torch.float64)
    return [t.to(device) for t in (student, teachers, weights, tau)]


def check_divergence(arguments, kind, module=distill):
    student, teachers, weights, _ = arguments
    expected = distill_ops._reference(*arguments, 0b0001_0000_0001, kind, True, True)
    out = [guarded(like) for like in (weights[0], weights, student, teachers)]
    module.multi_teacher_kl(*out, *arguments, 0b0001_0000_0001, kind)
    for got, wanted in zip(out, expected, strict=True):
        assert_guarded(got)
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    mean = guarded(teachers[0])
    module.fold_teachers(mean, *arguments[1:])
    assert_guarded(mean)
    torch.testing.assert_close(mean, distill_ops._fold_reference(*arguments[1:]), rtol=1e-11, atol=1e-12)


@pytest.fixture
def logits(device):
    """Rows with the label on top, second, third, fourth and far below, a tie, masked classes and a NaN."""
    generator = torch.Generator().manual_seed(1)
    z = 3 * torch.randn(8, 37, generator=generator, dtype=torch.float64)
    order = z.argsort(dim=1, descending=True)
    y = torch.tensor([int(order[k, place]) for k, place in enumerate((0, 1, 2, 3, 20, 0, 1, 0))])
    target = torch.tensor([int(order[k, place]) for k, place in enumerate((1, 0, 3, 2, 0, 36, 5, 4))])
    z[5, 20:22], y[5] = 50.0, 20
    z[6, order[6, 30:]] = MASK
    z[7, 3] = torch.nan
    soft = torch.rand(8, 37, generator=generator, dtype=torch.float64)
    soft[6, order[6, 30:]] = 0.0
    return [t.to(device) for t in (z, y, target, soft)]


def check_loss(arguments, kind, module=losses):
    z, y, target, soft = arguments
    labels, target = (soft if kind == 4 else y), (target if kind == 3 else None)
    expected = loss_ops._reference(z, labels, target, kind)
    loss, grad = guarded(z[:, 0]), guarded(z)
    correct = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    module.attack_loss(loss, correct, grad, z, labels, target, kind)
    assert_guarded(loss), assert_guarded(grad)
    for got, wanted in zip((loss, correct, grad), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("block", [4, 16, 64])
@pytest.mark.parametrize("kind", range(3))
def test_divergences_in_tiles_of_any_size(divergence, block, kind):
    with _launch.forced_block(block):
        check_divergence(divergence, kind)


@pytest.mark.parametrize("block", [4, 16, 64])
@pytest.mark.parametrize("kind", range(5))
def test_losses_in_blocks_of_any_size(logits, block, kind):
    with _launch.forced_block(block):
        check_loss(logits, kind)


DISTILL_MUTATIONS = {
    "normaliser not rescaled": ("total = total * tl.exp(high - shift)", "total = total"),
    "temperature left out of the gradient": ("scale = (weight / tau)[:, None]", "scale = weight[:, None]"),
    "masked classes counted": ('tl.where(log_q != -float("inf"), p, 0.0)', "p"),
    "infinite terms kept": ('(log_second != -float("inf")) & (first > 0)', "first > 0"),
    "wrong student": (">> (4 * t)) & 15", ">> (4 * t)) & 0"),
    "wrong sign of a teacher's gradient": ("grad_p = p * total[:, None] - q * counts", "grad_p = q * counts - p"),
    "js not halved": ("kl = 0.5 * (of_p + of_q)", "kl = of_p + of_q"),
    "padding weighs": ("tl.where(real, weight * kl, 0.0)", "weight + kl"),
}
LOSS_MUTATIONS = {
    "a later one of equal logits": (
        "tl.min(tl.where(allowed & (z == here), column, 2147483647)",
        "tl.max(tl.where(allowed & (z == here), column, -1)",
    ),
    "best over the label too": ("_best(z_ptr, classes, label,", "_best(z_ptr, classes, NOBODY,"),
    "second instead of third": ("classes, at_top, at_second, NOBODY", "classes, at_top, NOBODY, NOBODY"),
    "wrong sign at the third": (
        "grad += tl.where(column == at_third, bent, 0.0)",
        "grad -= tl.where(column == at_third, bent, 0.0)",
    ),
    "NaN ignored": ("return count > 0", "return count > 1000"),
    "label's own share lost": ("grad += tl.where(column == label, one, 0.0)", "grad += 0.0"),
    "weights not summed": ("slope += tl.sum(weight, axis=0)", "slope = 1.0 + 0 * slope"),
}


@pytest.mark.parametrize("name", DISTILL_MUTATIONS)
def test_a_wrong_divergence_is_noticed(divergence, mutant, name):
    module = mutant(*DISTILL_MUTATIONS[name], "distill")
    with pytest.raises(AssertionError), _launch.forced_block(16):
        for kind in range(3):
            check_divergence(divergence, kind, module)


@pytest.mark.parametrize("name", LOSS_MUTATIONS)
def test_a_wrong_loss_is_noticed(logits, mutant, name):
    module = mutant(*LOSS_MUTATIONS[name], "losses")
    with pytest.raises(AssertionError), _launch.forced_block(16):
        for kind in range(5):
            check_loss(logits, kind, module)
