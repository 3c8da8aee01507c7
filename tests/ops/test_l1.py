"""Steps in L1 ball and box: every backend against sorts in float64 and a quadratic program, invariants, bad input."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from rvlm import ops

SHAPES = [(5, 3, 17, 19), (1, 1, 1, 1), (2, 7), (2, 6000)]
STEPS = [(4, 3, 5, 7), *SHAPES[1:3], (2, 600)]


def exact(x_adv, x, eps, lo=0.0, hi=1.0):
    """One row: the threshold from all places where the length bends, sorted, by interpolation in between."""
    u = x_adv - x
    size, room = np.abs(u), np.where(u > 0, hi - x, x - lo)

    def length(mu):
        return np.minimum(np.maximum(size - mu, 0), room).sum()

    mu = 0.0
    if length(0.0) > eps:
        bends = np.unique(np.concatenate([[0.0], size, np.maximum(size - room, 0)]))
        first, last = 0, len(bends) - 1
        while last - first > 1:
            middle = (first + last) // 2
            first, last = (middle, last) if length(bends[middle]) > eps else (first, middle)
        above, below = length(bends[first]), length(bends[last])
        mu = bends[first] + (bends[last] - bends[first]) * (above - eps) / (above - below)
    return np.clip(x + np.sign(u) * np.maximum(size - mu, 0), lo, hi)


def points(device, shape, dtype=torch.float32, spread=0.3):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.rand(shape, generator=generator, dtype=dtype)
    x.view(-1)[::7] = 0.0
    x_adv = x + spread * torch.randn(shape, generator=generator, dtype=dtype)
    return x.to(device), x_adv.to(device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 2.0])
def test_equals_the_sorted_solution(backend, device, shape, dtype, share):
    x, x_adv = points(device, shape, dtype)
    eps = share * (x_adv - x).abs().flatten(1).sum(1)
    got = ops.l1_project(x_adv, x, eps)
    rows = zip(*(t.double().cpu().flatten(1).numpy() for t in (x_adv, x)), eps.tolist(), strict=True)
    expected = np.stack([exact(*row) for row in rows]).reshape(shape)
    atol = 3e-7 if dtype == torch.float32 or backend == "triton" else 1e-12
    np.testing.assert_allclose(got.double().cpu().numpy(), expected, rtol=0, atol=atol)
    assert got.dtype == dtype and got.min() >= 0 and got.max() <= 1
    length = (got.double() - x.double()).abs().flatten(1).sum(1)
    assert (length <= eps.double() * (1 + 1e-5) + 1e-6).all()


def test_is_the_nearest_point(backend, device):
    """Against a general solver in five dimensions; clipping in turn gives another point."""
    x = torch.tensor([[0.1, 0.9, 0.5, 0.0, 0.3]], device=device, dtype=torch.float64)
    x_adv = x + torch.tensor([[-0.8, 0.7, 0.4, -0.3, 0.5]], device=device, dtype=torch.float64)
    eps = 0.6
    got = ops.l1_project(x_adv, x, eps)[0].cpu().numpy()
    a, c = x_adv[0].cpu().numpy(), x[0].cpu().numpy()
    # delta = plus - minus with both non-negative makes the ball a linear constraint.
    solved = minimize(
        lambda d: ((c + d[:5] - d[5:] - a) ** 2).sum(),
        np.full(10, 0.01),
        bounds=[*((0, 1 - v) for v in c), *((0, v) for v in c)],
        constraints={"type": "ineq", "fun": lambda d: eps - d.sum()},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(got, c + solved.x[:5] - solved.x[5:], atol=1e-5)
    assert abs(np.abs(got - c).sum() - eps) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_inside_keep_their_bits(backend, device, dtype):
    x, x_adv = points(device, (4, 3, 8, 8), dtype, spread=0.001)
    once = ops.l1_project(x_adv, x, 1.0)
    assert torch.equal(once, x_adv.clamp(0, 1))
    assert torch.equal(ops.l1_project(x, x, 0.5), x)
    assert torch.equal(ops.l1_project(x, x.clone(), 0.0), x)


def test_projecting_twice_changes_almost_nothing(backend, device):
    x, x_adv = points(device, (4, 3, 16, 16))
    once = ops.l1_project(x_adv, x, 12.0)
    torch.testing.assert_close(ops.l1_project(once, x, 12.0), once, rtol=0, atol=1e-6)


def test_rows_bounds_and_layouts(backend, device):
    x, x_adv = points(device, (3, 3, 8, 8))
    eps = torch.tensor([1.0, 5.0, 0.0], device=device)
    whole = ops.l1_project(x_adv, x, eps)
    for k in range(3):
        assert torch.equal(ops.l1_project(x_adv[k : k + 1], x[k : k + 1], eps[k]), whole[k : k + 1])
    last = ops.l1_project(x_adv.to(memory_format=torch.channels_last), x, eps)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-6)
    wide = ops.l1_project(2 * x_adv - 1, 2 * x - 1, 2 * eps, -1.0, 1.0)
    torch.testing.assert_close(wide, 2 * whole - 1, rtol=0, atol=1e-6)


def test_pixels_that_are_not_finite_break_their_sample_alone(backend, device):
    x, x_adv = points(device, (4, 3, 8, 8))
    expected = ops.l1_project(x_adv, x, 2.0)
    x_adv[1, 0, 0, 0], x_adv[2, 2, 7, 7] = torch.nan, torch.inf
    got = ops.l1_project(x_adv, x, 2.0)
    assert got[1].isnan().all() and got[2].isnan().all()
    assert torch.equal(got[[0, 3]], expected[[0, 3]])


def test_an_empty_batch(backend, device):
    assert ops.l1_project(torch.zeros(0, 3, device=device), torch.zeros(0, 3, device=device), 1.0).shape == (0, 3)


def stepped(x_adv, grad, x, alpha, eps, still):
    """One row of l1_step_: the pixels after the `still` smallest gradients move, and those as large as the first."""
    size = np.abs(np.nan_to_num(grad, nan=0.0))
    moves = (size >= np.sort(size)[still]) & (size > 0)
    return exact(x_adv + np.where(moves, np.sign(grad), 0.0) * (alpha / max(moves.sum(), 1)), x, eps)


@pytest.mark.parametrize("shape", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top", [1e-6, 0.05, 0.4, 1.0])
def test_step_equals_the_sorted_solution(backend, batch, shape, dtype, top):
    x, x_adv, grad = batch(shape, dtype)
    n = x[0].numel()
    if n > 100:
        grad.view(len(x), -1)[-1, ::3] = 0.25  # many equal ones
        grad.view(len(x), -1)[0, 5] = torch.nan
    eps = 0.03 * n
    rows = zip(*(t.double().cpu().flatten(1).numpy() for t in (x_adv, grad, x)), strict=True)
    still = min(int((1 - top) * n), n - 1)
    expected = np.stack([stepped(*row, 2.0, eps, still) for row in rows]).reshape(shape)
    got = x_adv.clone()
    assert ops.l1_step_(got, grad, x, 2.0, eps, top=top) is got
    atol = 5e-7 if dtype == torch.float32 or backend == "triton" else 1e-12
    np.testing.assert_allclose(got.double().cpu().numpy(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sparse_step_is_bitwise_the_reference(backend, batch, grad_dtype, memory_format):
    x, x_adv, grad = batch(memory_format=memory_format)
    grad = grad.to(grad_dtype)
    grad[1, 1, 2, 3], grad[1, 0, 0, 0] = torch.nan, torch.inf
    top = torch.tensor([0.2, 0.01, 1.0, 0.3, 0.5], device=x.device)
    alpha = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0], device=x.device)
    far = 1e6  # the projection does nothing but the box
    expected = x_adv.clone()
    with ops.use_backend("reference"):
        ops.l1_step_(expected, grad, x, alpha, far, top=top)
    assert torch.equal(ops.l1_step_(x_adv, grad, x, alpha, far, top=top), expected)


@pytest.mark.slow
def test_rows_that_are_not_active_and_gradients_of_zero(backend, batch):
    x, x_adv, grad = batch()
    active = torch.tensor([True, False, True, True, False], device=x.device)
    got = ops.l1_step_(x_adv.clone(), grad, x, 5.0, 3.0, active=active)
    assert torch.equal(got[~active], x_adv[~active])
    whole = ops.l1_step_(x_adv.clone(), grad, x, 5.0, 3.0)
    assert torch.equal(got[active], whole[active])
    assert torch.equal(whole[3], ops.l1_project(x_adv, x, 3.0)[3]), "a row without a gradient is projected"
    strict = ops.l1_step_(x_adv.clone(), grad, x, 5.0, 3.0, strict_eps=True)
    assert ((strict.double() - x.double()).abs().flatten(1).sum(1) <= 3.0).all()
    onto = ops.l1_step_(x_adv.clone(), grad, x, 5.0, 3.0, quantize=255)
    assert torch.equal((onto * 255).round() / 255, onto) and (onto != x).any()
    assert ((onto.double() - x.double()).abs().flatten(1).sum(1) <= 3.0 + 1e-6).all()


@pytest.mark.parametrize("top, message", [
    (0.0, r"in \(0, 1\], got 0"),
    (1.5, "got 1.5"),
    (torch.rand(3), r"tensor \[2\], one share per sample"),
])  # fmt: skip
def test_bad_share(top, message):
    with pytest.raises(ValueError, match=message):
        ops.l1_step_(torch.rand(2, 8), torch.rand(2, 8), torch.rand(2, 8), 0.1, 1.0, top=top)


@pytest.mark.parametrize("args, error, message", [
    ((torch.rand(2, 3).half(), torch.rand(2, 3).half(), 1.0), TypeError, "float32 or float64"),
    ((torch.rand(2, 3), torch.rand(2, 4), 1.0), ValueError, "must be like x_adv"),
    ((torch.rand(2, 3), torch.rand(2, 3), torch.ones(3)), ValueError, r"eps must be a float or a tensor \[2\]"),
    ((torch.rand(2, 3), torch.rand(2, 3), 1.0, 1.0, 0.0), ValueError, "lo < hi"),
])  # fmt: skip
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        ops.l1_project(*args)
