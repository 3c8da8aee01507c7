"""The step ops: every backend against a float64 oracle and the reference, invariants, mutations that must be caught."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rvlm import ops
from rvlm.ops import steps

SHAPES = [(5, 3, 17, 19), (1, 1, 1, 1), (2, 7), (3, 3, 8, 8), (2, 3, 2, 5, 5)]
EPS = 8 / 255


def linf_oracle(x_adv, grad, x, alpha, eps, lo, hi):
    """The formula in numpy float64, with the clips in the documented order."""
    x_adv, grad, x = (t.double().cpu().numpy() for t in (x_adv, grad, x))
    delta = np.clip(x_adv + alpha * np.nan_to_num(np.sign(grad)) - x, -eps, eps)
    return np.clip(x + delta, lo, hi)


def l2_oracle(x_adv, grad, x, alpha, eps, lo, hi):
    out = []
    for a, g, c in zip(*(t.double().cpu().numpy() for t in (x_adv, grad, x)), strict=True):
        norm = np.sqrt((g**2).sum())
        delta = a - c + (alpha * g / norm if 0 < norm < np.inf else 0.0)
        length = np.sqrt((delta**2).sum())
        out.append(np.clip(c + delta * (min(1.0, eps / length) if length else 1.0), lo, hi))
    return np.stack(out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linf_step_equals_the_float64_oracle(backend, batch, shape, dtype):
    x, x_adv, grad = batch(shape, dtype)
    expected = linf_oracle(x_adv, grad, x, 2 / 255, EPS, 0, 1)
    ops.linf_step_(x_adv, grad, x, 2 / 255, EPS)
    np.testing.assert_allclose(x_adv.cpu().numpy(), expected, rtol=0, atol=1e-7 if dtype == torch.float32 else 1e-15)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.05, 50.0])
def test_l2_step_equals_the_float64_oracle(backend, batch, shape, dtype, eps):
    x, x_adv, grad = batch(shape, dtype)
    expected = l2_oracle(x_adv, grad, x, 0.02, eps, 0, 1)
    ops.l2_step_(x_adv, grad, x, 0.02, eps)
    np.testing.assert_allclose(x_adv.cpu().numpy(), expected, rtol=0, atol=2e-7 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("quantize", [None, 255])
def test_linf_step_is_bitwise_the_reference(backend, batch, grad_dtype, memory_format, quantize):
    x, x_adv, grad = batch(memory_format=memory_format)
    grad = grad.to(grad_dtype)
    grad[0, 1, 2, 3] = float("nan")
    eps = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], device=x.device) / 255
    active = torch.tensor([True, False, True, True, False], device=x.device)
    with ops.use_backend("reference"):
        expected = ops.linf_step(x_adv, grad, x, eps / 4, eps, active=active, quantize=quantize)
    functional = ops.linf_step(x_adv, grad, x, eps / 4, eps, active=active, quantize=quantize)
    before = x_adv.clone()
    result = ops.linf_step_(x_adv, grad, x, eps / 4, eps, active=active, quantize=quantize)
    assert result is x_adv and x_adv.stride() == before.stride()
    assert torch.equal(x_adv, expected) and torch.equal(functional, expected)
    assert torch.equal(x_adv[~active], before[~active]), "inactive rows must keep their bits"
    assert not torch.equal(x_adv[active], before[active])


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", [None, 255])
def test_l2_step_equals_the_reference(backend, batch, grad_dtype, quantize):
    x, x_adv, grad = batch()
    active = torch.tensor([True, True, False, True, True], device=x.device)
    expected, before = x_adv.clone(), x_adv.clone()
    with ops.use_backend("reference"):
        ops.l2_step_(expected, grad.to(grad_dtype), x, 0.3, 0.6, active=active, quantize=quantize)
    ops.l2_step_(x_adv, grad.to(grad_dtype), x, 0.3, 0.6, active=active, quantize=quantize)
    torch.testing.assert_close(x_adv, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(x_adv[2], before[2])


def test_any_layout_gives_the_same_pixels(backend, batch):
    x, x_adv, grad = batch((4, 3, 6, 5))
    expected = ops.linf_step(x_adv, grad, x, 0.01, 0.03)
    transposed = x_adv.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)  # dense, but no sample is one block
    ops.linf_step_(transposed, grad.transpose(2, 3).contiguous().transpose(2, 3), x, 0.01, 0.03)
    assert torch.equal(transposed, expected)
    one = x[:1].expand_as(x)  # one image against many iterates
    assert torch.equal(ops.linf_step(x_adv, grad, one, 0.01, 0.03), ops.linf_step(x_adv, grad, one.clone(), 0.01, 0.03))


def test_a_nan_pixel_stays_nan_and_a_nan_gradient_moves_nothing(backend, batch):
    x, x_adv, grad = batch((2, 3, 4, 4))
    x_adv[0, 0, 0, 0] = float("nan")
    grad[1] = float("nan")
    linf, l2 = x_adv.clone(), x_adv.clone()
    ops.linf_step_(linf, grad, x, 0.01, 0.5)
    ops.l2_step_(l2[1:], grad[1:], x[1:], 0.01, 50.0)
    assert linf[0, 0, 0, 0].isnan() and not linf[1].isnan().any()
    torch.testing.assert_close(linf[1], x_adv[1], rtol=0, atol=1e-7)
    torch.testing.assert_close(l2[1], x_adv[1], rtol=0, atol=1e-7)


def test_a_vanishing_gradient_gives_no_direction(backend, batch):
    """alpha / ||g|| can overflow fp32 where the norm does not vanish; the row then stays, without NaN."""
    x, x_adv, _ = batch((2, 3, 4, 4))
    grad = torch.full_like(x, 1e-42)
    result = ops.l2_step_(x_adv.clone(), grad, x, 10.0, 50.0)
    torch.testing.assert_close(result, x_adv, rtol=0, atol=1e-6)


def test_an_empty_batch_gives_empty_outputs(backend, device):
    empty = torch.zeros(0, 3, 4, 4, device=device)
    assert ops.linf_step(empty, empty.clone(), empty.clone(), 0.1, 0.1).shape == empty.shape
    assert ops.l2_step_(empty.clone(), empty.clone(), empty.clone(), 0.1, 0.1).shape == empty.shape
    assert ops.uniform_start(empty, 0.1, None, 0).shape == empty.shape


def test_noise_is_numbered_by_sample_and_pixel(backend, batch):
    x, _, _ = batch((4, 3, 7, 5))
    ids = torch.tensor([7, 2**40 + 3, 0, 7], device=x.device)
    noise = ops.uniform_start(x, EPS, ids, seed=2**63 + 11, stream=5)
    with ops.use_backend("reference"):
        assert torch.equal(noise, ops.uniform_start(x, EPS, ids, seed=2**63 + 11, stream=5))
    order = torch.tensor([2, 0, 3, 1], device=x.device)
    assert torch.equal(ops.uniform_start(x[order], EPS, ids[order], 2**63 + 11, stream=5), noise[order])
    assert torch.equal(ops.uniform_start(x[1:2], EPS, ids[1:2], 2**63 + 11, stream=5), noise[1:2])
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(ops.uniform_start(last, EPS, ids, 2**63 + 11, stream=5), noise)
    for change in (dict(seed=12), dict(stream=6), dict(sample_ids=ids + 1)):
        other = ops.uniform_start(x, EPS, **(dict(sample_ids=ids, seed=2**63 + 11, stream=5) | change))
        assert (other != noise).float().mean() > 0.5
    wide = ops.uniform_start(x.double(), EPS, ids, 2**63 + 11, stream=5)
    torch.testing.assert_close(wide.float(), noise, rtol=0, atol=1e-7)


def test_noise_is_uniform(backend, device):
    half = torch.full((3, 3, 32, 32), 0.5, device=device)
    u = ((ops.uniform_start(half, 0.25, None, 3) - 0.5) / 0.25).flatten()
    assert -1 <= u.min() < -0.99 and 0.99 < u.max() < 1
    assert abs(u.mean()) < 4 / (3 * len(u)) ** 0.5 and abs(u.var() - 1 / 3) < 0.02


def test_philox_known_answers():
    """Random123's published vectors for Philox4x32-10."""
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    assert steps.philox(zero, zero, zero, zero, 0).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert steps.philox(ones, ones, ones, ones, 2**64 - 1).tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


PIXELS = st.integers(0, 255)
SLOPES = st.floats(-9, 9, width=32)
BALLS = st.sampled_from([0.5 / 255, 1 / 255, 4 / 255, 8 / 255, 0.031, 0.3])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(PIXELS, st.floats(-1, 2, width=32), SLOPES), min_size=1, max_size=40), BALLS)
def test_linf_invariants(backend, device, pixels, eps):
    x, x_adv, grad = (torch.tensor(column, device=device)[None] for column in zip(*pixels, strict=True))
    x, x_adv, grad = x.float() / 255, x_adv.float(), grad.float()
    y = ops.linf_step(x_adv, grad, x, eps / 3, eps, strict_eps=True)
    assert (y >= 0).all() and (y <= 1).all()
    assert ((y.double() - x.double()).abs() <= eps).all(), "strict_eps holds in exact arithmetic"
    plain = ops.linf_step(x_adv, grad, x, eps / 3, eps)
    assert ((plain.double() - x.double()).abs() <= eps + 1e-7).all()
    again = ops.linf_step(plain, grad, x, 0.0, eps)
    torch.testing.assert_close(again, plain, rtol=0, atol=6e-8)  # a projection is idempotent, up to an ulp
    assert torch.equal(ops.linf_step(x_adv, grad, x, 0.7, 0.0), x), "eps = 0 gives the clean image"
    grid = ops.linf_step(x_adv, grad, x, eps / 3, eps, quantize=255)
    levels = (grid * 255).round()
    assert torch.equal(levels / 255, grid), "a valid uint8 image"
    assert ((levels - (x * 255).round()).abs() <= int(255 * eps + 1e-4)).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(PIXELS, st.floats(0, 1, width=32), SLOPES), min_size=1, max_size=40),
    st.sampled_from([0.01, 0.1, 0.5, 3.0]),
)
def test_l2_invariants(backend, device, pixels, eps):
    x, x_adv, grad = (torch.tensor(column, device=device)[None] for column in zip(*pixels, strict=True))
    x, x_adv, grad = x.float() / 255, x_adv.float(), grad.float()
    y = ops.l2_step_(x_adv.clone(), grad, x, eps / 3, eps, strict_eps=True)
    assert (y >= 0).all() and (y <= 1).all()
    assert (y.double() - x.double()).norm() <= eps
    grid = ops.l2_step_(x_adv.clone(), grad, x, eps / 3, eps, quantize=255)
    assert torch.equal((grid * 255).round() / 255, grid)
    assert (grid.double() - x.double()).norm() <= eps * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("mutation", ["alpha sign", "box before ball", "no ball"])
def test_the_comparison_catches_mutations(batch, monkeypatch, mutation):
    x, x_adv, grad = batch()

    def mutant(x_adv, grad, x, alpha, eps, lo, hi, active, levels):
        moved = x_adv + (-alpha if mutation == "alpha sign" else alpha) * grad.sign()
        if mutation == "alpha sign":
            return torch.clamp(x + torch.clamp(moved - x, -eps, eps), lo, hi)
        if mutation == "box before ball":
            return x + torch.clamp(torch.clamp(moved, lo, hi) - x, -eps, eps)
        return torch.clamp(moved, lo, hi)

    bounds = (0.2, 0.8)  # inside x's range, where the order of the clips shows
    expected = linf_oracle(x_adv, grad, x, 0.02, EPS, *bounds)
    monkeypatch.setattr(steps._linf_op, "reference", mutant)
    with ops.use_backend("reference"):
        result = ops.linf_step(x_adv, grad, x, 0.02, EPS, *bounds)
    assert np.abs(result.cpu().numpy() - expected).max() > 1e-3


@pytest.mark.parametrize("change, error, message", [
    (dict(x_adv=torch.zeros(2, 3, dtype=torch.float16)), TypeError, "float32 or float64"),
    (dict(x_adv=torch.zeros(2, 3, dtype=torch.uint8)), TypeError, "float32 or float64"),
    (dict(x_adv=torch.zeros(3)), ValueError, "batch"),
    (dict(grad=torch.zeros(2, 4)), ValueError, "grad must be like x_adv"),
    (dict(grad=torch.zeros(2, 3, dtype=torch.int64)), TypeError, "floating-point"),
    (dict(grad=None), TypeError, "grad must be a tensor"),
    (dict(x=torch.zeros(2, 3, dtype=torch.float64)), TypeError, "dtype of x_adv"),
    (dict(eps=torch.zeros(3)), ValueError, r"eps must be a float or a tensor \[2\]"),
    (dict(alpha=torch.zeros(2, 1)), ValueError, "alpha must be"),
    (dict(active=torch.zeros(2)), ValueError, "active must be bool"),
    (dict(active=[True, False]), ValueError, r"active must be bool \[2\] on cpu, got list"),
    (dict(lo=1.0, hi=0.0), ValueError, "lo < hi"),
    (dict(quantize=0), ValueError, "levels"),
    (dict(quantize=255, strict_eps=True), ValueError, "exclude each other"),
    (dict(x_adv=torch.zeros(2, 3, requires_grad=True)), ValueError, "not differentiable"),
])  # fmt: skip
def test_bad_input_has_a_clear_error(change, error, message):
    given = dict(x_adv=torch.zeros(2, 3), grad=torch.zeros(2, 3), x=torch.zeros(2, 3), alpha=0.1, eps=0.1)
    for step in (ops.linf_step_, ops.l2_step_):
        with pytest.raises(error, match=message):
            step(**(given | change))


def test_the_clean_image_may_not_be_overwritten(batch):
    x, _, grad = batch()
    with pytest.raises(ValueError, match="share memory"):
        ops.linf_step_(x, grad, x, 0.1, 0.1)


@pytest.mark.parametrize("change, message", [
    (dict(sample_ids=torch.zeros(3, dtype=torch.int64)), "sample_ids"),
    (dict(sample_ids=torch.zeros(2)), "sample_ids"),
    (dict(sample_ids=[0, 1]), "sample_ids must be int64 .* got list"),
    (dict(stream=-1), "stream"),
    (dict(seed=2**64), "seed"),
])  # fmt: skip
def test_bad_start_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ops.uniform_start(**(dict(x=torch.zeros(2, 3), eps=0.1, sample_ids=None, seed=0) | change))
