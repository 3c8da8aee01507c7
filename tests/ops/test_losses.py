"""Attack losses: every backend against float64 autograd of the formulas, ties, saturation, masks, bad input."""

import pytest
import torch
from torch.nn import functional as F

from rvlm import ops
from rvlm.ops.losses import KINDS

CLASSES = [4, 10, 33, 1000, 5000]


def formulas(z, y, kind, target, weights):
    """Losses [B] from textbook expressions; dlr as a sorted row, not as this library computes it."""
    rows = torch.arange(len(z), device=z.device)
    top = z.sort(dim=1, descending=True).values
    best_is_y = z.argmax(1) == y
    match kind:
        case "ce":
            return F.cross_entropy(z, y, reduction="none")
        case "cw":
            return torch.where(best_is_y, top[:, 1], top[:, 0]) - z[rows, y]
        case "dlr":
            return -(z[rows, y] - torch.where(best_is_y, top[:, 1], top[:, 0])) / (top[:, 0] - top[:, 2] + 1e-12)
        case "dlr-targeted":
            return -(z[rows, y] - z[rows, target]) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)
        case "soft-ce":
            return -(weights * z.log_softmax(1)).sum(1)


def close(got, expected, tolerance):
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
    assert got.shape == expected.shape and error <= tolerance, f"relative error {error:.2e}"


def batch(device, classes, dtype=torch.float32, rows=6):
    generator = torch.Generator().manual_seed(classes)
    z = 3 * torch.randn(rows, classes, generator=generator, dtype=dtype)
    y = torch.randint(0, classes, (rows,), generator=generator)
    y[:3] = z[:3].argmax(1)  # some right, some wrong
    y[3:] = torch.where(z[3:].argmax(1) == y[3:], (y[3:] + 1) % classes, y[3:])
    weights = torch.rand(rows, classes, generator=generator, dtype=dtype)
    return z.to(device), y.to(device), ((y + 1) % classes).to(device), weights.to(device)


def call(z, y, target, weights, kind):
    return ops.attack_loss(z, weights if kind == "soft-ce" else y, kind, target if kind == "dlr-targeted" else None)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_verdicts_and_gradients(backend, device, classes, kind, dtype):
    z, y, target, weights = batch(device, classes, dtype)
    z.requires_grad_()
    wide = z.detach().double().requires_grad_()
    expected = formulas(wide, y, kind, target, weights.double())
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    loss, correct, grad = call(z, y, target, weights, kind)
    tolerance = 3e-6 if dtype == torch.float32 else 1e-12
    assert loss.dtype == grad.dtype == dtype and correct.dtype == torch.bool and not grad.requires_grad
    close(loss, expected, tolerance)
    close(grad, slope, tolerance)
    label = weights.argmax(1) if kind == "soft-ce" else y
    assert torch.equal(correct, z.argmax(1) == label) and (kind == "soft-ce" or 0 < correct.sum() < len(y))
    of_rows = torch.rand(len(y), device=device, dtype=dtype)
    (scaled,) = torch.autograd.grad((loss * of_rows).sum(), z)
    close(scaled, slope * of_rows[:, None], tolerance)


def test_margin_is_another_name_for_cw(backend, device):
    z, y, *_ = batch(device, 10)
    for a, b in zip(ops.attack_loss(z, y, "margin"), ops.attack_loss(z, y, "cw"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ce", "cw", "dlr", "dlr-targeted", "soft-ce"])
def test_gradcheck_through_the_kernels(backend, device, kind):
    z, y, target, weights = batch(device, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda z: call(z, y, target, weights, kind)[0], (z.requires_grad_(),))


def test_cross_entropy_keeps_its_gradient_when_the_model_is_certain(backend, device):
    # In float32 softmax(z)_y rounds to 1 here, so 1 - softmax(z)_y would be 0.
    z = torch.tensor([[40.0, 0.0, 1.0], [0.0, 60.0, 0.0]], device=device)
    y = torch.tensor([0, 1], device=device)
    loss, _, grad = ops.attack_loss(z, y)
    wide = z.double().requires_grad_()
    m = wide.scatter(1, y[:, None], -torch.inf).logsumexp(1) - wide.gather(1, y[:, None]).squeeze(1)
    expected = F.softplus(m, threshold=1000)
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-5, atol=0)
    assert (loss > 0).all() and F.cross_entropy(z, y) == 0
    torch.testing.assert_close(grad.sum(1), torch.zeros(2, device=device), rtol=0, atol=1e-24)


@pytest.mark.parametrize("kind", ["ce", "cw", "dlr"])
def test_of_equal_logits_the_first_counts(backend, device, kind):
    z = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0, 2.0]], device=device)
    correct = ops.attack_loss(z, torch.tensor([1, 0], device=device), kind)[1]
    assert correct.tolist() == [True, True]
    correct = ops.attack_loss(z, torch.tensor([2, 1], device=device), kind)[1]
    assert correct.tolist() == [False, False]
    if kind == "cw":
        grad = ops.attack_loss(z, torch.tensor([1, 0], device=device), kind)[2]
        assert grad.tolist() == [[0, -1, 1, 0, 0], [-1, 1, 0, 0, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_masked_classes(backend, device, kind):
    z, y, target, weights = batch(device, 60, torch.float64)
    mask = torch.ones(60, dtype=torch.bool, device=device)
    mask[torch.cat([y, target, z.topk(4).indices.flatten()]).unique()] = False
    assert mask.any(), "the case masks nothing"
    masked = z.masked_fill(mask, -torch.inf)
    weights = weights.masked_fill(mask, 0.0)
    loss, _, grad = call(masked, y, target, weights, kind)
    assert loss.isfinite().all() and grad.isfinite().all() and not grad[:, mask].any()
    some = (~mask).nonzero().flatten()
    number = {int(c): k for k, c in enumerate(some)}
    y, target = (torch.tensor([number[int(c)] for c in t], device=device) for t in (y, target))
    few = z[:, some].requires_grad_()
    expected = formulas(few, y, kind, target, weights[:, some])
    close(loss, expected, 1e-12)
    close(grad[:, some], torch.autograd.grad(expected.sum(), few)[0], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_breaks_its_row_alone(backend, device, kind):
    z, y, target, weights = batch(device, 8)
    whole = call(z, y, target, weights, kind)
    z[1, 5] = torch.nan
    loss, correct, grad = call(z, y, target, weights, kind)
    others = [0, 2, 3, 4, 5]
    assert loss[1].isnan() and not correct[1] and grad[1].isnan().all()
    for got, before in zip((loss, correct, grad), whole, strict=True):
        assert torch.equal(got[others], before[others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_logits(backend, device, dtype):
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates when it casts to bfloat16")
    z, y, *_ = batch(device, 50)
    z = z.to(dtype)
    loss, _, grad = ops.attack_loss(z, y)
    wide = z.double().requires_grad_()
    expected = F.cross_entropy(wide, y, reduction="none")
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    close(loss, expected, 3e-6)
    close(grad, torch.autograd.grad(expected.sum(), wide)[0], torch.finfo(dtype).eps)


def test_an_empty_batch(backend, device):
    loss, correct, grad = ops.attack_loss(
        torch.zeros(0, 5, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    )
    assert loss.shape == correct.shape == (0,) and grad.shape == (0, 5)


@pytest.mark.parametrize("kind", ["ce", "cw", "dlr"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_head_of_a_clip(backend, device, kind, normalize):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 16, generator=generator, dtype=torch.float64).to(device)
    if not normalize:
        features = F.normalize(features)
    features.requires_grad_()
    head = 20 * F.normalize(torch.randn(16, 7, generator=generator, dtype=torch.float64), dim=0).to(device)
    y = torch.tensor([0, 1, 2, 3, 4], device=device)
    logits = (F.normalize(features) if normalize else features) @ head
    expected = formulas(logits, y, kind, None, None)
    loss, correct, got_logits, d = ops.clip_head_loss(features, head, y, kind, normalize=normalize)
    close(loss, expected, 1e-12)
    close(got_logits, logits, 1e-12)
    close(d, torch.autograd.grad(expected.sum(), features)[0], 1e-11)
    assert torch.equal(correct, logits.argmax(1) == y)
    assert not any(t.requires_grad for t in (loss, correct, got_logits, d))


def test_a_second_derivative_is_an_error_that_helps(device):
    z, y, *_ = batch(device, 5, torch.float64)
    loss = ops.attack_loss(z.requires_grad_(), y)[0]
    (slope,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"attack_loss is differentiable once.*use_backend\('reference'\)"):
        torch.autograd.grad(slope.square().sum(), z)
    with ops.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda z: ops.attack_loss(z, y)[0], (z,))


@pytest.mark.parametrize("kind", KINDS)
def test_functional_gradients(backend, device, kind):
    z, y, target, weights = batch(device, 6, torch.float64)
    got = torch.func.grad(lambda z: call(z, y, target, weights, kind)[0].sum())(z)
    torch.testing.assert_close(got, call(z, y, target, weights, kind)[2])


@pytest.mark.skipif("cpp" in ops.backends()["missing"], reason="the C++ part is not built")
def test_the_cpu_notices_labels_that_are_no_classes():
    for kind, y, target in (("ce", 5, None), ("cw", -1, None), ("dlr-targeted", 0, 7)):
        target = None if target is None else torch.tensor([target])
        with pytest.raises(RuntimeError, match=r"must lie in 0 \.\. 4"):
            ops.attack_loss(torch.zeros(1, 5), torch.tensor([y]), kind, target)


Y = torch.tensor([0, 1])


@pytest.mark.parametrize("args, error, message", [
    ((torch.zeros(2, 5), Y, "hinge"), ValueError, "kind must be one of 'ce', .* got 'hinge'"),
    ((torch.zeros(2, 5, dtype=torch.int64), Y), TypeError, "logits must be a floating-point tensor"),
    ((torch.zeros(5), Y), ValueError, r"logits \[B, C\]"),
    ((torch.zeros(2, 1), Y, "cw"), ValueError, "at least 2 classes"),
    ((torch.zeros(2, 2), Y, "dlr"), ValueError, "at least 3 classes"),
    ((torch.zeros(2, 3), Y, "dlr-targeted", Y), ValueError, "at least 4 classes"),
    ((torch.zeros(2, 5), Y, "dlr-targeted"), ValueError, "target, int64"),
    ((torch.zeros(2, 5), Y, "ce", Y), ValueError, "target, int64"),
    ((torch.zeros(2, 5), Y[:1]), ValueError, r"y must be a tensor \[2\] on cpu, got \[1\]"),
    ((torch.zeros(2, 5), Y.float()), TypeError, "y must be int64"),
    ((torch.zeros(2, 5), Y, "soft-ce"), ValueError, r"y must be a tensor \[2, 5\]"),
    ((torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int64), "soft-ce"), TypeError, "floating-point for 'soft-ce'"),
])  # fmt: skip
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        ops.attack_loss(*args)


def test_the_head_is_wide_under_autocast(device):
    generator = torch.Generator().manual_seed(0)
    embedding, head = torch.randn(4, 8, generator=generator), 100 * torch.randn(8, 5, generator=generator)
    embedding, head, y = embedding.to(device), head.to(device), torch.arange(4, device=device)
    expected = ops.clip_head_loss(embedding, head, y)
    narrow = ops.clip_head_loss(embedding.bfloat16().float(), head, y)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        for got, wanted in zip(ops.clip_head_loss(embedding, head, y), expected, strict=True):
            assert torch.equal(got, wanted)
        loss, correct, logits, grad = ops.clip_head_loss(embedding.bfloat16(), head, y)
    assert torch.equal(logits, narrow[2]) and torch.equal(loss, narrow[0]) and grad.dtype == torch.bfloat16


def test_a_head_that_does_not_fit():
    with pytest.raises(ValueError, match=r"embedding \[B, D\] and head \[D, C\], got \[2, 4\], \[5, 3\]"):
        ops.clip_head_loss(torch.zeros(2, 4), torch.zeros(5, 3), Y)
