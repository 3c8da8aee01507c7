"""The kernels of the L1 ball: rows over several programs and several blocks a program, guarded outputs, mutations."""

import pytest
import torch

from rvlm.kernels import _launch, l1
from rvlm.ops import l1 as l1_ops

from .conftest import assert_guarded, guarded


@pytest.fixture
def case(device):
    """x_adv, x, gradient, alpha, still and eps for four rows of 140 pixels in float64.

    Gradients: with equal ones at the threshold, with zeros, NaN and infinity, all zero, and of one size only.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 140, generator=generator, dtype=torch.float64)
    x_adv = x + 0.4 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    grad = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    grad[0, ::5] = 1.0
    grad[1, :100], grad[1, 120], grad[1, 130] = 0.0, torch.nan, torch.inf
    grad[2] = 0.0
    grad[3] = -0.5
    alpha = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    still, eps = torch.tensor([120, 110, 5, 0]), torch.tensor([6.0, 99.0, 0.0, 3.0], dtype=torch.float64)
    return [t.to(device) for t in (x_adv, x, grad, alpha, still, eps)]


def check(case, monkeypatch, module=l1):
    monkeypatch.setattr(module, "MAX_PARTS", 2)  # so that a program walks over several blocks
    x_adv, x, grad, alpha, still, eps = case
    out = guarded(x)
    for steps, grads in ((alpha, grad), (alpha[:1], grad), (alpha, grad.bfloat16())):
        for places in (still, torch.full_like(still, 70)):
            module.sparse_step(out, x_adv, grads, steps, places)
            assert_guarded(out)
            assert torch.equal(out, l1_ops._sparse_step(x_adv, grads, steps, places))
    module.l1_project(out, x_adv, x, eps, 0.0, 1.0)
    assert_guarded(out)
    torch.testing.assert_close(out, l1_ops._l1_project(x_adv, x, eps, 0.0, 1.0), rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("block", [16, 256])
def test_rows_over_several_programs(case, monkeypatch, block):
    with _launch.forced_block(block):
        check(case, monkeypatch)


MUTATIONS = {
    "NaN moves": ("key = tl.where(g == g, g, 0.0)", "key = g"),
    "other prefixes counted": ("inside & ((key >> SHIFT >> DIGIT) == prefix)", "inside"),
    "padding counted": ("chosen = inside & (", "chosen = ("),
    "one too many stay": ("smaller <= tl.load(still_ptr + row)", "smaller < tl.load(still_ptr + row)"),
    "counts of one part": ("    while part < parts:\n        counts", "    while part < 1:\n        counts"),
    "digits lost": ("tl.load(prefix_ptr + row) * (1 << DIGIT) + found", "found"),
    "zeros share the step": ("moving -= tl.where(least == 0,", "moving -= tl.where(least == -1,"),
    "equal ones stay": ("_key(grad, WIDE) >= least", "_key(grad, WIDE) > least"),
    "every pixel moves alpha": ("alpha / tl.where(moving > 0, moving, 1).to(tl.float64)", "alpha"),
    "pixels without room": ("left > room[:, None], room[:, None], left", "left > 9, room[:, None], left"),
    "no line in the bracket": ("(high - low) * share", "(high - low)"),
    "shrunk though inside": ("tl.where(length_low > eps, shrunk, x_adv)", "shrunk"),
    "lengths of one part": ("    while part < parts:\n        length", "    while part < 1:\n        length"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_is_noticed(case, mutant, monkeypatch, name):
    module = mutant(*MUTATIONS[name], "l1")
    with pytest.raises(AssertionError), _launch.forced_block(32):
        check(case, monkeypatch, module)
