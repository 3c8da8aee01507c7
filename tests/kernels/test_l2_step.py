"""The L2 step kernels against a numpy oracle in float64, and against the eager reference."""

import numpy as np
import pytest
import torch

import rvlm.ops as ops
from rvlm.kernels import _launch, steps

TOLERANCE = {torch.float32: 2.5e-7, torch.float64: 5e-15}  # pixels in [-1, 1]: four roundings of the image type

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
]

# The interpreter computes both sides of a where in numpy, which speaks up at 0/0 and at inf - inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def oracle(x_adv, grad, x, alpha, eps, lo, hi, active, levels=0):
    """The step from its definition, row by row in float64, with the two norms measured and not expanded."""
    out = x_adv.astype(np.float64)
    for b in np.flatnonzero(active):
        g, clean = grad[b].astype(np.float64), x[b].astype(np.float64)
        delta = (x_adv[b] - x[b]).astype(np.float64)
        norm = np.sqrt((g * g).sum())
        if 0 < norm < np.inf:
            delta = delta + float(alpha[b % len(alpha)]) * g / norm
        length, radius = np.sqrt((delta * delta).sum()), float(eps[b % len(eps)])
        out[b] = np.clip(clean + (delta * (radius / length) if length > radius else delta), lo, hi)
    return out


def check(case, l2_step=steps.l2_step):
    """Both ways of calling the kernels agree to the bit with each other, and with the oracle to rounding."""
    out = case.launch(l2_step)
    assert torch.equal(out.nan_to_num(9.0), case.launch(l2_step, in_place=True).nan_to_num(9.0))
    arrays = case.numpy()
    exact = oracle(**arrays)
    got = out.cpu().numpy().astype(np.float64)
    if not case.levels:
        np.testing.assert_allclose(got, exact, rtol=0, atol=TOLERANCE[case.x.dtype])
    else:
        k, clean = np.round(got * case.levels), np.round(arrays["x"] * case.levels)
        np.testing.assert_array_equal(out.cpu().numpy(), (k / case.levels).astype(arrays["x"].dtype))
        wanted, moved = case.levels * (exact - arrays["x"]), k - clean
        moved, wanted = moved[arrays["active"]], wanted[arrays["active"]]
        slack = case.levels * 1e-6 + 1e-4
        assert (np.abs(moved) <= np.abs(wanted) + slack).all(), "a pixel moved further than the step"
        assert (np.abs(moved) > np.abs(wanted) - 1 - slack).all(), "a pixel moved a level less than the step"
        assert (moved * wanted >= 0).all(), "a pixel moved the other way"
    return out


def sized(case, alpha=0.6, eps=1.0):
    """The case with steps and radii that suit L2 norms; one row's step ends inside the ball, one's outside."""
    rows = torch.arange(len(case.alpha), device=case.x.device, dtype=case.x.dtype)
    return case.changed(alpha=alpha + 0.3 * rows, eps=eps + rows)


@pytest.mark.parametrize("dtype, grad_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 3, 17, 19), (1, 5), (4, 1), (2, 3, 32, 32)])
@pytest.mark.parametrize("levels", [0.0, 255.0])
def test_matches_oracle(make_case, shape, dtype, grad_dtype, levels):
    case = sized(make_case(shape, dtype, grad_dtype, levels=levels))
    check(case.changed(x=(case.x * 255).round() / 255) if levels else case)


@pytest.mark.parametrize("block, parts", [(64, 128), (64, 4), (65536, 128)])
def test_rows_over_several_programs(make_case, monkeypatch, block, parts):
    monkeypatch.setattr(steps, "MAX_PARTS", parts)  # 969 pixels are 16 blocks of 64: with 4 parts, each sums over four
    case = sized(make_case((3, 3, 17, 19)))
    with _launch.forced_block(block):
        check(case)


@pytest.mark.parametrize("per_sample", [False, True])
def test_step_sizes_and_radii(make_case, per_sample):
    case = sized(make_case((3, 3, 17, 19), per_sample=per_sample))
    check(case)
    check(case.changed(alpha=-case.alpha))
    check(case.changed(eps=1e3 * case.eps))
    check(case.changed(eps=case.eps[:1]))
    assert torch.equal(check(case.changed(eps=torch.zeros_like(case.eps))), case.x)
    projected = check(case.changed(alpha=torch.zeros_like(case.alpha), eps=0.1 * case.eps))
    assert torch.allclose((projected - case.x).flatten(1).norm(dim=1), 0.1 * case.eps, rtol=0.2)


@pytest.mark.parametrize("eps", [1e-3, 0.5, 3.0])
def test_stays_in_the_ball(make_case, eps):
    case = make_case((4, 3, 16, 16), per_sample=False)
    case = case.changed(alpha=torch.full_like(case.alpha, 2 * eps), eps=torch.full_like(case.eps, eps))
    for _ in range(4):
        case = case.changed(x_adv=case.launch(steps.l2_step))
    length = (case.x_adv.double() - case.x.double()).flatten(1).norm(dim=1)
    assert (length <= eps * (1 + 1e-6) + 1e-6).all() and (length > 0.3 * eps).all()


def test_rows_without_a_direction_are_only_projected(make_case):
    case = sized(make_case((5, 3, 9, 7)), eps=0.05)
    case.grad[0] = 0.0
    case.grad[1, 0, 0, 0] = float("nan")
    case.grad[2, 0, 0, 0] = float("inf")
    case.x_adv[3] = case.x[3]
    case.grad[3] = 0.0  # 0 / 0 in both quotients
    out = check(case)
    still = case.changed(alpha=torch.zeros_like(case.alpha), grad=torch.ones_like(case.grad)).launch(steps.l2_step)
    assert torch.equal(out[:4], still[:4]) and torch.equal(out[3], case.x[3])
    assert not torch.equal(out[4], still[4])


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_gradient_scale_does_not_matter(make_case, scale):
    # 1e-12: squares underflow in fp32; 1e12: they overflow in fp16 and come near it in fp32.
    case = sized(make_case((2, 3, 17, 19)))
    out = check(case.changed(grad=case.grad * scale))
    assert torch.allclose(out, case.launch(steps.l2_step), rtol=0, atol=2.5e-7)


def test_step_back_to_the_clean_image(make_case):
    # delta + scale * grad cancels: its squared length is a difference of equal numbers and may round below zero.
    case = make_case((1, 3, 17, 19), torch.float64)
    delta = case.x_adv - case.x
    case = case.changed(grad=-delta, alpha=delta.norm().view(1), eps=torch.ones_like(case.eps))
    assert torch.allclose(case.launch(steps.l2_step), case.x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("levels", [0.0, 255.0])
def test_inactive_rows_keep_their_bits(make_case, device, levels):
    case = sized(make_case((4, 3, 9, 7), levels=levels))
    case = case.changed(x=(case.x * 255).round() / 255, active=torch.tensor([True, False, True, False], device=device))
    case.x_adv[1, 0, 0, :3] = torch.tensor([float("nan"), -0.0, 1e-42])
    case.grad[3] = float("nan")
    for in_place in (False, True):
        out = case.launch(steps.l2_step, in_place)
        assert torch.equal(out[[1, 3]].view(torch.int32), case.x_adv[[1, 3]].view(torch.int32))
        assert torch.equal(out[[0, 2]], check(case.rows(0, 2)))


def test_no_row_active(make_case, device):
    case = sized(make_case()).changed(active=torch.zeros(3, dtype=torch.bool, device=device))
    assert torch.equal(case.launch(steps.l2_step), case.x_adv)


def test_empty_batch(make_case):
    for shape in ((0, 3, 4, 4), (2, 0)):
        assert make_case(shape, per_sample=False).launch(steps.l2_step).shape == shape


def test_repeats_to_the_bit_and_ignores_the_batch(make_case):
    case = sized(make_case((4, 3, 17, 19)))
    with _launch.forced_block(64):
        out = case.launch(steps.l2_step)
        assert torch.equal(out, case.launch(steps.l2_step))
        for row in range(4):
            assert torch.equal(out[row : row + 1], case.rows(row).launch(steps.l2_step))


MUTATIONS = {
    "direction": ("scale = alpha / tl.where", "scale = -alpha / tl.where"),
    "cross term": ("2.0 * scale * dg", "scale * dg"),
    "length of the step": ("+ alpha * alpha", "+ alpha"),
    "radius": ("tl.where(length > eps, eps / length, 1.0)", "tl.where(length > eps, length / eps, 1.0)"),
    "no projection": ("tl.where(length > eps, eps / length, 1.0)", "1.0 + 0.0 * length"),
    "no box": ("_clip(x + ((x_adv - x) + direction) * shrink, LO, HI)", "x + ((x_adv - x) + direction) * shrink"),
    "direction not shrunk": ("((x_adv - x) + direction) * shrink", "((x_adv - x) * shrink + direction)"),
    "square root forgotten": ("norm = tl.sqrt(gg)", "norm = gg"),
    "NaN norm taken": ("(norm > 0) & (norm <", "(norm == norm) | (norm <"),
    "one eps for all": ("eps_ptr + row * EPS_STRIDE", "eps_ptr"),
    "blocks summed twice": ("first += parts * BLOCK", "first += BLOCK"),
    "partial sums left out": ("mask=part < parts", "mask=part < 1"),
    "rows mixed up": ("row.to(tl.int64) * 3 * parts + part", "part"),
    "rounded up": ("tl.floor(tl.abs(levels_moved)", "tl.ceil(tl.abs(levels_moved)"),
    "rounded down, not toward x": ("tl.where(levels_moved < 0, -whole, whole)", "tl.floor(levels_moved)"),
}


@pytest.fixture
def mutation_cases(make_case, monkeypatch):
    monkeypatch.setattr(steps, "MAX_PARTS", 2)
    plain = sized(make_case((3, 230), lo=0.1, hi=0.7))
    plain = plain.changed(eps=0.3 * plain.alpha)
    plain.grad[0] = 0.0
    no_direction = sized(make_case((3, 40)))
    no_direction.grad[1, 5] = float("nan")
    on_grid = sized(make_case((2, 230), levels=255.0))
    on_grid = on_grid.changed(x=(on_grid.x * 255).round() / 255)
    with _launch.forced_block(64):
        yield [plain, no_direction, on_grid]


def test_the_right_kernel_passes_where_wrong_ones_must_not(mutation_cases):
    for case in mutation_cases:
        check(case)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_is_noticed(mutation_cases, mutant, name):
    wrong = mutant(*MUTATIONS[name])
    wrong.MAX_PARTS = steps.MAX_PARTS
    with pytest.raises(AssertionError):
        for case in mutation_cases:
            check(case, wrong.l2_step)


@pytest.mark.parametrize("dtype, grad_dtype", DTYPES)
@pytest.mark.parametrize("quantize", [None, 255])
def test_public_op_matches_the_reference(make_case, dtype, grad_dtype, quantize):
    case = sized(make_case((2, 3, 11, 13), dtype, grad_dtype))
    x = (case.x * 255).round() / 255
    active = torch.tensor([False, True], device=x.device)
    for layout in (torch.contiguous_format, torch.channels_last):
        x_adv, grad, clean = (t.contiguous(memory_format=layout) for t in (case.x_adv, case.grad, x))
        results = []
        for backend in ("reference", "triton"):
            with ops.use_backend(backend):
                stepped = x_adv.clone()
                ops.l2_step_(stepped, grad, clean, case.alpha, case.eps, active=active, quantize=quantize)
            results.append(stepped)
        difference = (results[0] - results[1]).abs()
        if quantize:  # a pixel on the edge between two levels may go either way
            assert (difference > TOLERANCE[dtype]).float().mean() < 0.005 and difference.max() < 1.01 / 255
        else:
            assert difference.max() <= TOLERANCE[dtype]
