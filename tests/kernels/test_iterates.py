"""The kernels of steps that look back: rows over several programs, guarded outputs, mutations that must be noticed."""

import pytest
import torch

from rvlm.kernels import _launch, iterates
from rvlm.ops import iterates as iterate_ops

from .conftest import assert_guarded, guarded


@pytest.fixture
def case(make_case):
    """Three rows, the last inactive; gradients with zeros, a NaN and a row without length."""
    case = make_case((4, 3, 7, 9))
    case.grad[0, 0, 0, :2] = torch.nan
    case.grad[1] = 0.0
    case.x[2, 0], case.x_adv[2, 0], case.grad[2, 0] = 0.0, 0.004, -1.0  # a step out of the box
    return case.changed(active=torch.tensor([True, True, True, False], device=case.x.device))


def copied(like):
    out = guarded(like)
    return out.copy_(like)


def check(case, module=iterates):
    scalars = (case.alpha, case.eps)
    x_prev = copied((case.x + 0.4 * (case.x_adv - case.x)).contiguous())
    expected = x_prev.clone()
    for a in (1.0, 0.75):
        module.apgd_step(x_prev, case.x_adv, case.grad, case.x, *scalars, a, 0.0, 1.0, case.active)
        iterate_ops._apgd_step_(expected, case.x_adv, case.grad, case.x, *scalars, a, 0.0, 1.0, case.active)
        assert_guarded(x_prev)
        assert torch.equal(x_prev, expected)
    for kind in (0, 1):
        x_adv, velocity = copied(case.x_adv), copied(0.01 * torch.cos(37 * case.x))
        expected, v = x_adv.clone(), velocity.clone()
        for mu in (0.9, 0.5):
            arguments = (case.grad, case.x, *scalars, mu, kind, 0.0, 1.0, case.active)
            module.momentum_step(x_adv, velocity, *arguments)
            iterate_ops._momentum_step_(expected, v, *arguments)
        assert_guarded(x_adv), assert_guarded(velocity)
        torch.testing.assert_close(velocity, v, rtol=1e-6, atol=1e-9)
        assert ((x_adv - expected).abs() > 1e-6).float().mean() < 0.005
    best = copied(case.x)
    module.keep_best(best, case.x_adv, case.active)
    assert_guarded(best)
    assert torch.equal(best, torch.where(case.active.view(-1, 1, 1, 1), case.x_adv, case.x))


@pytest.mark.parametrize("block", [4, 64, 65536])
def test_rows_over_several_programs(case, block):
    with _launch.forced_block(block):
        check(case)


MUTATIONS = {
    "momentum of the wrong sign": ("(x_adv - x_prev) * (1 - A)", "(x_prev - x_adv) * (1 - A)"),
    "new direction at full weight": ("(z - x_adv) * A", "(z - x_adv)"),
    "no second projection": ("_clip(_clip(y, x - eps, x + eps), LO, HI)", "_clip(y, LO, HI)"),
    "no box in the first projection": ("x - eps, x + eps), LO, HI)\n    y =", "x - eps, x + eps), -9, 9)\n    y ="),
    "inactive rows keep the older iterate": ("tl.store(x_prev_ptr + start + offset, x_adv, mask=inside)", "pass"),
    "NaN in the norm": ("tl.where(g == g, tl.abs(g), 0.0)", "tl.abs(g)"),
    "sum of one part": ("mask=part < parts", "mask=part < 1"),
    "no decay": ("velocity = MU * velocity + tl.where", "velocity = velocity + tl.where"),
    "sign form forgets the past": ("_sign(MU * velocity + _sign(grad))", "_sign(grad)"),
    "step along the gradient": ("alpha * _sign(velocity)", "alpha * _sign(grad)"),
    "velocity not stored": ("tl.store(velocity_ptr + start + offset, velocity, mask=inside)", "pass"),
    "every row kept": ("if tl.load(flag_ptr + row):", "if tl.load(flag_ptr):"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_is_noticed(case, mutant, name):
    module = mutant(*MUTATIONS[name], "iterates")
    with pytest.raises(AssertionError), _launch.forced_block(64):
        check(case, module)
