"""APGD and momentum steps, and the book-keeping: every backend against oracles, invariants, layouts, bad input."""

import pytest
import torch

from rvlm import ops
from rvlm.ops.iterates import MOMENTA

SHAPES = [(5, 3, 17, 19), (1, 1, 1, 1), (2, 7), (3, 3, 8, 8), (4, 20000)]
EPS = 8 / 255


def project(u, x, eps, lo=0.0, hi=1.0):
    return torch.clamp(torch.min(torch.max(u, x - eps), x + eps), lo, hi)


def apgd_oracle(x_prev, x_adv, grad, x, step, eps, a):
    """AutoAttack's two projections, in float64."""
    x_prev, x_adv, grad, x = (t.double() for t in (x_prev, x_adv, grad, x))
    z = project(x_adv + step * grad.nan_to_num(0.0).sign(), x, eps)
    return project(x_adv + (z - x_adv) * a + (x_adv - x_prev) * (1 - a), x, eps)


def momentum_oracle(x_adv, velocity, grad, x, alpha, eps, mu, kind):
    x_adv, velocity, grad, x = (t.double() for t in (x_adv, velocity, grad.nan_to_num(0.0), x))
    rows = (-1, *[1] * (x.dim() - 1))
    if kind == "mi":
        length = grad.abs().flatten(1).sum(1).view(rows)
        v = mu * velocity + torch.where(length > 0, grad / length.clamp(min=1e-300), 0.0)
    else:
        v = (mu * velocity + grad.sign()).sign()
    return project(x_adv + alpha * v.sign(), x, eps), v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("a", [1.0, 0.75])
def test_apgd_step_equals_the_oracle(backend, batch, shape, dtype, a):
    x, x_adv, grad = batch(shape, dtype)
    x_prev = batch(shape, dtype, seed=1)[1].clamp(x - EPS, x + EPS).clamp(0, 1)
    expected = apgd_oracle(x_prev, x_adv, grad, x, 4 / 255, EPS, a)
    before = x_adv.clone()
    assert ops.apgd_step_(x_prev, x_adv, grad, x, 4 / 255, EPS, a) is x_prev
    atol = 2e-7 if dtype == torch.float32 else 1e-15
    torch.testing.assert_close(x_prev.double(), expected, rtol=0, atol=atol)
    assert torch.equal(x_adv, before)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_apgd_step_is_bitwise_the_reference(backend, batch, grad_dtype, memory_format):
    x, x_adv, grad = batch(memory_format=memory_format)
    grad = grad.to(grad_dtype)
    grad[0, 1, 2, 3] = torch.nan
    prev = batch(memory_format=memory_format, seed=1)[1]
    eps = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], device=x.device) / 255
    active = torch.tensor([True, False, True, True, False], device=x.device)
    expected = prev.clone()
    with ops.use_backend("reference"):
        ops.apgd_step_(expected, x_adv, grad, x, eps / 2, eps, active=active)
    got = ops.apgd_step_(prev.clone(), x_adv, grad, x, eps / 2, eps, active=active)
    assert torch.equal(got, expected) and got.stride() == x_adv.stride()
    assert torch.equal(got[~active], x_adv[~active])
    contiguous = prev.contiguous()  # another layout than x_adv's
    assert torch.equal(ops.apgd_step_(contiguous, x_adv, grad, x, eps / 2, eps, active=active), expected)


def test_apgd_stays_in_ball_and_box(backend, batch):
    x, x_adv, grad = batch()
    x_adv = x_adv.clamp(x - EPS, x + EPS)
    x_prev = x_adv.clone()
    for k in range(5):
        ops.apgd_step_(x_prev, x_adv, torch.sin(grad * k), x, 2 * EPS, EPS, 1.0 if k == 0 else 0.75)
        x_prev, x_adv = x_adv, x_prev
        assert (x_adv - x).abs().max() <= EPS + 1e-7 and x_adv.min() >= 0 and x_adv.max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MOMENTA)
def test_momentum_steps_equal_the_oracle(backend, batch, shape, dtype, kind):
    x, x_adv, grad = batch(shape, dtype)
    velocity = torch.zeros_like(x)
    expected, v = x_adv, velocity
    mu = 1.0 if kind == "mi" else 0.9
    for k in range(3):
        slope = grad * (1 + k) - 0.3 * k
        slope.view(-1)[0] = torch.nan
        expected, v = momentum_oracle(expected, v, slope, x, 2 / 255, EPS, mu, kind)
        assert ops.momentum_step_(x_adv, velocity, slope, x, 2 / 255, EPS, mu, kind) is x_adv
    torch.testing.assert_close(velocity.double(), v, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-9)
    off = (x_adv.double() - expected).abs() > 1e-6  # where v is a rounding error its sign is anyone's
    assert not (off & (v.abs() > 1e-7)).any()


@pytest.mark.parametrize("kind", MOMENTA)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_momentum_steps_equal_the_reference(backend, batch, kind, grad_dtype, memory_format):
    x, x_adv, grad = batch(memory_format=memory_format)
    grad = grad.to(grad_dtype)
    grad[0, 1, 2, 3] = torch.nan
    velocity = torch.randn_like(x) * 1e-4
    active = torch.tensor([True, False, True, True, False], device=x.device)
    expected, v = x_adv.clone(), velocity.clone()
    with ops.use_backend("reference"):
        ops.momentum_step_(expected, v, grad, x, 0.01, EPS, 0.9, kind, active=active)
    before, old = x_adv.clone(), velocity.clone()
    ops.momentum_step_(x_adv, velocity, grad, x, 0.01, EPS, 0.9, kind, active=active)
    torch.testing.assert_close(velocity, v, rtol=2e-6, atol=1e-10)
    if kind == "sign":
        assert torch.equal(x_adv, expected)
    assert ((x_adv - expected).abs() > 1e-6).float().mean() < 1e-3
    assert torch.equal(x_adv[~active], before[~active]) and torch.equal(velocity[~active], old[~active])
    assert not torch.equal(velocity[active], old[active])


def test_a_gradient_without_length_adds_nothing(backend, batch):
    x, x_adv, grad = batch()
    velocity = torch.ones_like(x)
    grad[1] = 0.0
    grad[2, 0, 0, 0] = torch.inf
    ops.momentum_step_(x_adv, velocity, grad, x, 0.01, EPS, 0.5)
    assert (velocity[1] == 0.5).all() and (velocity[2] == 0.5).all() and not (velocity[0] == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3, 17, 19), (5,), (5, 1), (0, 3)])
def test_keep_best_copies_flagged_rows(backend, device, dtype, shape):
    best, src = (torch.randint(0, 2, shape, device=device).to(dtype) for _ in range(2))
    flag = torch.tensor([True, False, False, True, True], device=device)[: shape[0]]
    expected = best.clone()
    expected[flag] = src[flag]
    assert ops.keep_best_(best, src, flag) is best and torch.equal(best, expected)


def test_keep_best_in_any_layout(backend, batch):
    x, x_adv, _ = batch(memory_format=torch.channels_last)
    flag = torch.tensor([True, False, False, True, True], device=x.device)
    expected = torch.where(flag.view(-1, 1, 1, 1), x_adv, x)
    assert torch.equal(ops.keep_best_(x.clone(), x_adv.contiguous(), flag), expected)
    assert torch.equal(ops.keep_best_(x.transpose(2, 3).clone().transpose(2, 3), x_adv, flag), expected)
    assert torch.equal(ops.keep_best_(x[..., ::2], x_adv[..., ::2], flag), expected[..., ::2])


@pytest.mark.parametrize("call, error, message", [
    (lambda x: ops.apgd_step_(x, x, x, x.clone(), 0.1, 0.1), ValueError, "x_prev and x_adv share memory"),
    (lambda x: ops.apgd_step_(x[:1].clone(), x, x, x.clone(), 0.1, 0.1), ValueError, "x_prev must be like x_adv"),
    (lambda x: ops.apgd_step_(x.clone(), x, x, x, 0.1, 0.1), ValueError, "x_adv and x share memory"),
    (lambda x: ops.apgd_step_(x, x.clone(), x, x, 0.1, 0.1), ValueError, "x_prev and x share memory"),
    (lambda x: ops.momentum_step_(x.clone(), x, x, x, 0.1, 0.1), ValueError, "velocity and x share memory"),
    (lambda x: ops.momentum_step_(x, x, x, x.clone(), 0.1, 0.1), ValueError, "velocity and x_adv share memory"),
    (lambda x: ops.keep_best_(x, x.clone(), [True, False]), ValueError, r"flag must be bool \[2\] on cpu, got list"),
    (lambda x: ops.momentum_step_(x, x[:1], x, x.clone(), 0.1, 0.1), ValueError, "velocity must be like x_adv"),
    (lambda x: ops.momentum_step_(x, x, x, x.clone(), 0.1, 0.1, kind="nesterov"), ValueError, "'mi', 'sign'"),
    (lambda x: ops.momentum_step_(x.half(), x, x, x, 0.1, 0.1), TypeError, "x_adv must be float32 or float64"),
    (lambda x: ops.keep_best_(x, x[:1], torch.ones(2).bool()), ValueError, "src must be like best"),
    (lambda x: ops.keep_best_(x, x.clone(), torch.ones(2)), ValueError, r"flag must be bool \[2\]"),
])  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.rand(2, 3))
