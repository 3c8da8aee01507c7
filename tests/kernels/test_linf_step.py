"""The Linf step kernel against a numpy oracle, to the bit, and against the eager reference."""

import numpy as np
import pytest
import torch

import rvlm.ops as ops
from rvlm.kernels import _launch, steps

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
]


def oracle(x_adv, grad, x, alpha, eps, lo, hi, active, levels):
    """The step in plain numpy, in the dtype of x."""
    one = x.dtype.type
    rows = (-1, *[1] * (x.ndim - 1))
    alpha, eps = alpha.reshape(rows), eps.reshape(rows)
    sign = np.zeros_like(x)
    sign[grad > 0], sign[grad < 0] = 1, -1
    delta = x_adv + alpha * sign - x
    delta = np.where(delta < -eps, -eps, np.where(delta > eps, eps, delta))
    y = x + delta
    y = np.where(y < one(lo), one(lo), np.where(y > one(hi), one(hi), y))
    if levels:
        y = nearest_level(y, x, eps, lo, hi, levels).astype(x.dtype) / one(levels)
    return np.where(active.reshape(rows), y, x_adv)


def nearest_level(y, x, eps, lo, hi, levels):
    """Of all k with k / levels in ball and box, the one nearest to y: by trying every k, in float64."""
    k = np.arange(np.ceil(levels * lo), np.floor(levels * hi) + 1)
    grid = k / levels
    distance = np.abs(y.astype(np.float64)[..., None] - grid)
    outside = np.abs(grid - x.astype(np.float64)[..., None]) > eps.astype(np.float64)[..., None] + 1e-6
    return k[np.where(outside, np.inf, distance).argmin(-1)]


def check(case, linf_step=steps.linf_step):
    """Both ways of calling the kernel give the oracle's bits; in float32, also float64's result to two roundings."""
    expected = oracle(**case.numpy())
    for in_place in (False, True):
        out = case.launch(linf_step, in_place).cpu().numpy()
        np.testing.assert_array_equal(out, expected)
    if not case.levels:
        arrays = case.numpy()
        wide = {k: v.astype(np.float64) if getattr(v, "dtype", None) == np.float32 else v for k, v in arrays.items()}
        scale = max(1.0, np.nanmax(np.abs(expected), initial=0.0))
        np.testing.assert_allclose(expected, oracle(**wide), rtol=0, atol=2.5e-7 * scale)


@pytest.mark.parametrize("dtype, grad_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 3, 17, 19), (1, 5), (4, 1), (2, 3, 32, 32)])
def test_matches_oracle(make_case, shape, dtype, grad_dtype):
    check(make_case(shape, dtype, grad_dtype))


@pytest.mark.parametrize("block", [4, 64, 65536])
def test_rows_over_several_programs(make_case, block):
    with _launch.forced_block(block):
        check(make_case((2, 37) if block == 4 else (3, 3, 17, 19)))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("levels", [0.0, 255.0])
def test_step_sizes_and_radii(make_case, per_sample, levels):
    case = make_case(per_sample=per_sample, levels=levels)
    case = case.changed(x=(case.x * 255).round() / 255)
    check(case)
    check(case.changed(alpha=-case.alpha))
    check(case.changed(alpha=torch.zeros_like(case.alpha)))
    check(case.changed(eps=torch.zeros_like(case.eps)))
    check(case.changed(eps=case.eps[:1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lo, hi", [(0.1, 0.7), (-1.0, 1.0)])
def test_box(make_case, dtype, lo, hi):
    # The clean images lie partly outside the box: there the order of the two clips shows.
    check(make_case((3, 3, 17, 19), dtype, lo=lo, hi=hi))


@pytest.mark.parametrize("levels", [0.0, 255.0])
def test_inactive_rows_keep_their_bits(make_case, device, levels):
    case = make_case((4, 3, 9, 7), levels=levels)
    case.x_adv[1, 0, 0, :3] = torch.tensor([float("nan"), -0.0, 1e-42])
    case.x[3] = float("nan")  # whatever an inactive row holds, nothing of it is looked at
    case = case.changed(active=torch.tensor([True, False, True, False], device=device))
    for in_place in (False, True):
        out = case.launch(steps.linf_step, in_place)
        assert torch.equal(out[[1, 3]].view(torch.int32), case.x_adv[[1, 3]].view(torch.int32))
        moved = oracle(**case.rows(0, 2).numpy())
        np.testing.assert_array_equal(out[[0, 2]].cpu().numpy(), moved)


def test_no_row_active(make_case, device):
    case = make_case().changed(active=torch.zeros(3, dtype=torch.bool, device=device))
    assert torch.equal(case.launch(steps.linf_step), case.x_adv)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_without_a_sign(make_case, grad_dtype):
    case = make_case(grad_dtype=grad_dtype)
    flat = case.grad.view(-1)
    flat[:7] = torch.tensor([float("nan"), 0.0, -0.0, float("inf"), -float("inf"), 6e-8, -6e-8])
    check(case)
    check(case.changed(grad=torch.full_like(case.grad, float("nan"))))
    check(case.changed(grad=torch.zeros_like(case.grad)))


def test_nan_iterate_stays_nan(make_case):
    case = make_case((2, 40))
    case.x_adv[1, 3] = float("nan")
    for levels in (0.0, 255.0):
        out = case.changed(levels=levels).launch(steps.linf_step)
        assert out[1, 3].isnan() and out.isnan().sum() == 1


@pytest.mark.parametrize("eps", [8 / 255, 7.5 / 255, 0.4 / 255, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantized(make_case, device, dtype, eps):
    case = make_case((2, 3, 16, 16), dtype, levels=255.0)
    k = torch.randint(0, 256, case.x.shape, generator=torch.Generator().manual_seed(3)).to(device)
    case = case.changed(x=k.to(dtype) / 255, eps=torch.tensor([eps], dtype=dtype, device=device))
    check(case)
    moved = (case.launch(steps.linf_step) * 255).round().long() - k
    assert moved.abs().max() == int(eps * 255 + 1e-6)


def test_empty_batch(make_case):
    for shape in ((0, 3, 4, 4), (2, 0)):
        case = make_case(shape, per_sample=False)
        assert case.launch(steps.linf_step).shape == shape


def test_repeats_to_the_bit_and_ignores_the_batch(make_case):
    case = make_case((4, 3, 17, 19))
    out = case.launch(steps.linf_step)
    assert torch.equal(out, case.launch(steps.linf_step))
    for row in range(4):
        assert torch.equal(out[row : row + 1], case.rows(row).launch(steps.linf_step))


CLIPS, STORE = "_clip(x + _clip(moved - x, -eps, eps), LO, HI)", "tl.store(out_ptr + start + offset, y, mask="
MUTATIONS = {
    "sign of alpha": ("x_adv + alpha * _sign(grad)", "x_adv - alpha * _sign(grad)"),
    "box before ball": (CLIPS, "x + _clip(_clip(moved, LO, HI) - x, -eps, eps)"),
    "no box": (CLIPS, "x + _clip(moved - x, -eps, eps)"),
    "one bound of the ball": ("_clip(moved - x, -eps, eps)", "_clip(moved - x, -eps, 1.0)"),
    "sign of zero": ("(grad < 0)", "(grad <= 0)"),
    "one eps for all": ("eps_ptr + row * EPS_STRIDE", "eps_ptr"),
    "one alpha for all": ("alpha_ptr + row * ALPHA_STRIDE", "alpha_ptr"),
    "active ignored": ("if not tl.load(active_ptr + row)", "if tl.load(active_ptr) < 0"),
    "rounding down": ("tl.floor(LEVELS * y + 0.5)", "tl.floor(LEVELS * y)"),
    "no slack": ("tl.floor(LEVELS * (x + eps) + LEVELS * 1e-6)", "tl.floor(LEVELS * (x + eps) - LEVELS * 1e-6)"),
    "levels beyond the ball": ("_clip(_clip(q, lowest, highest), FIRST_LEVEL", "_clip(q, FIRST_LEVEL"),
    "multiplying by 1/levels": ("tl.div_rn(q, tl.full(q.shape, LEVELS, tl.float32))", "q * (1.0 / LEVELS)"),
    "last elements left out": ("inside = offset < n", "inside = offset < n - 1"),
    "written past the end": (STORE + "inside)", STORE + "offset < n + 3)"),
}


@pytest.fixture
def mutation_cases(make_case, device):
    on_grid = make_case((2, 3, 16, 16), levels=255.0, eps=torch.tensor([8 / 255, 7.6 / 255], device=device))
    return [
        make_case(lo=0.1, hi=0.7, active=torch.tensor([True, False, True], device=device)),
        on_grid.changed(x=(on_grid.x * 255).round() / 255),
    ]


def test_the_right_kernel_passes_where_wrong_ones_must_not(mutation_cases):
    for case in mutation_cases:
        check(case)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_is_noticed(mutation_cases, mutant, name):
    wrong = mutant(*MUTATIONS[name])
    with pytest.raises(AssertionError):
        for case in mutation_cases:
            check(case, wrong.linf_step)


@pytest.mark.parametrize("dtype, grad_dtype", DTYPES)
@pytest.mark.parametrize("quantize", [None, 255])
def test_public_op_gives_the_reference_bits(make_case, dtype, grad_dtype, quantize):
    case = make_case((2, 3, 11, 13), dtype, grad_dtype)
    x = (case.x * 255).round() / 255
    active = torch.tensor([False, True], device=x.device)
    for layout in (torch.contiguous_format, torch.channels_last):
        args = [t.contiguous(memory_format=layout) for t in (case.x_adv, case.grad, x)]
        results = []
        for backend in ("reference", "triton"):
            with ops.use_backend(backend):
                new = ops.linf_step(*args, case.alpha, case.eps, active=active, quantize=quantize)
                in_place = args[0].clone()
                ops.linf_step_(in_place, *args[1:], case.alpha, case.eps, active=active, quantize=quantize)
            assert torch.equal(new, in_place) and new.stride() == args[0].stride()
            results.append(new)
        assert torch.equal(*results)
