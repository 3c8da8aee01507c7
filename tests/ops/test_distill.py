"""Divergences to teachers: every backend against float64 autograd, masks, maps, folding, bad input."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from rvlm import ops
from rvlm.ops.distill import KINDS

CLASSES = [1, 2, 10, 16, 33, 1000, 5000]  # with and without a part of a vector at the end


def plain(student: Tensor, teachers: Tensor, weights: Tensor, temperature: Tensor, kind: str, dtype=torch.float64):
    """The textbook formulas, differentiable."""
    tau = temperature.to(dtype).view(-1, 1, 1)
    log_q = torch.log_softmax(student.to(dtype) / tau, -1).expand_as(teachers)
    log_p = torch.log_softmax(teachers.to(dtype) / tau, -1)

    def kl(a, b):
        return torch.where(a > -torch.inf, a.exp() * (a - b), 0.0).sum(-1)

    if kind == "js":
        middle = torch.log((log_p.exp() + log_q.exp()) / 2)
        each = (kl(log_p, middle) + kl(log_q, middle)) / 2
    else:
        each = kl(log_p, log_q) if kind == "forward" else kl(log_q, log_p)
    weights = weights.to(dtype) if weights.dim() == 2 else weights.to(dtype)[:, None]
    return (weights * each).sum(0), each


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)).item()


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative in the norm; NaN never passes."""
    error = relative_error(got, expected)
    assert got.shape == expected.shape and error <= tolerance, f"relative error {error:.2e} > {tolerance:.2e}"


def logits(device, classes, count=3, rows=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = 4 * torch.randn(rows, classes, generator=generator, dtype=dtype)
    teachers = 4 * torch.randn(count, rows, classes, generator=generator, dtype=dtype)
    return student.to(device).requires_grad_(), teachers.to(device).requires_grad_()


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(backend, device, classes, kind, dtype):
    torch.manual_seed(0)
    student, teachers = logits(device, classes, dtype=dtype)
    weights = torch.rand(3, 4, device=device) + 0.5
    temperature = torch.tensor([1.0, 2.0, 0.5], device=device)
    expected, each = plain(student, teachers, weights, temperature, kind)
    loss, kl = ops.multi_teacher_kl(student, teachers, weights, temperature, kind, teacher_grad=True)
    assert loss.dtype == kl.dtype == dtype and not kl.requires_grad
    if classes == 1:
        assert not loss.any() and not kl.any()
        assert not any(g.any() for g in torch.autograd.grad(loss.sum(), (student, teachers)))
        return
    of_rows = torch.rand(4, device=device, dtype=dtype)
    got = (loss, kl, *torch.autograd.grad((loss * of_rows).sum(), (student, teachers)))
    wanted = (expected, each, *torch.autograd.grad((expected * of_rows).sum(), (student, teachers)))
    # At most twice what the textbook lines lose in the same precision, which is much where a softmax is nearly one-hot.
    peer, peer_each = plain(student, teachers, weights, temperature, kind, dtype)
    peers = (peer, peer_each, *torch.autograd.grad((peer * of_rows).sum(), (student, teachers)))
    for ours, theirs, truth in zip(got, peers, wanted, strict=True):
        close(ours, truth, 2 * relative_error(theirs, truth) + (4e-6 if dtype == torch.float32 else 2e-12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits(backend, device, dtype):
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates when it casts to bfloat16")
    student, teachers = (t.detach().to(dtype).requires_grad_() for t in logits(device, 100))
    loss, _ = ops.multi_teacher_kl(student, teachers, [1.0, 1.0, 1.0])
    expected, _ = plain(student, teachers, torch.ones(3, device=device), torch.ones(3, device=device), "forward")
    assert loss.dtype == torch.float32
    close(loss, expected, 3e-6)
    (got,), (wanted,) = torch.autograd.grad(loss.sum(), student), torch.autograd.grad(expected.sum(), student)
    assert got.dtype == dtype
    close(got, wanted, torch.finfo(dtype).eps)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_through_the_kernels(backend, device, kind):
    student, teachers = logits(device, 5, rows=2, dtype=torch.float64)

    def loss(s, t):
        return ops.multi_teacher_kl(s, t, [0.5, 1.0, 2.0], 1.5, kind, teacher_grad=True)[0]

    assert torch.autograd.gradcheck(loss, (student, teachers))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", ["both", "teachers", "student"])
def test_masked_classes(backend, device, kind, masked):
    student, teachers = logits(device, 9, dtype=torch.float64)
    mask = torch.zeros(9, dtype=torch.bool, device=device)
    mask[[2, 7]] = True
    s = student.detach().masked_fill(mask, -torch.inf) if masked != "teachers" else student.detach()
    t = teachers.detach().masked_fill(mask, -torch.inf) if masked != "student" else teachers.detach()
    s, t = s.requires_grad_(), t.requires_grad_()
    loss, kl = ops.multi_teacher_kl(s, t, [1.0, 1.0, 1.0], 2.0, kind, teacher_grad=True)
    grads = torch.autograd.grad(loss.sum(), (s, t))
    assert loss.isfinite().all() and kl.isfinite().all() and all(g.isfinite().all() for g in grads)
    if masked == "both":  # as if the classes did not exist
        few = [v.detach()[..., ~mask].requires_grad_() for v in (s, t)]
        expected, _ = plain(*few, torch.ones(3, device=device), torch.full((3,), 2.0, device=device), kind)
        close(loss, expected, 1e-12)
        for g, w in zip(grads, torch.autograd.grad(expected.sum(), few), strict=True):
            close(g[..., ~mask], w, 1e-12)
            assert not g[..., mask].any()
    elif kind == "js" or (kind == "forward") == (masked == "teachers"):  # finite by the formula itself
        expected, _ = plain(s, t, torch.ones(3, device=device), torch.full((3,), 2.0, device=device), kind)
        close(loss, expected, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 2.0])  # dividing by the first overflows to -inf
def test_the_lowest_number_masks_like_infinity(backend, device, kind, temperature):
    pair, masked = [t.detach() for t in logits(device, 20)], torch.tensor([0, 18], device=device)
    got, expected = (
        ops.multi_teacher_kl(*(t.index_fill(-1, masked, low) for t in pair), [1.0, 1.0, 1.0], temperature, kind)
        for low in (torch.finfo(torch.float32).min, -torch.inf)
    )
    for ours, theirs in zip(got, expected, strict=True):
        close(ours, theirs, 1e-6)


def test_a_student_that_is_its_teacher(backend, device):
    student, teachers = logits(device, 1001, count=1)
    loss, _ = ops.multi_teacher_kl(student, student.detach()[None], [1.0])
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert loss.abs().max() <= 1e-6 and grad.abs().max() <= 1e-6


def test_classes_where_the_divergence_is_infinite_are_left_out(backend, device):
    student = torch.tensor([[0.0, 1.0, -torch.inf]], device=device, dtype=torch.float64).requires_grad_()
    teachers = torch.tensor([[[1.0, 0.5, 0.0]]], device=device, dtype=torch.float64)
    loss, _ = ops.multi_teacher_kl(student, teachers, [1.0])
    log_p, log_q = teachers[0].log_softmax(1), student.log_softmax(1)
    expected = (log_p.exp() * (log_p - log_q))[:, :2].sum(1)
    close(loss, expected, 1e-12)
    (got,), (wanted,) = torch.autograd.grad(loss.sum(), student), torch.autograd.grad(expected.sum(), student)
    close(got[:, :2], wanted[:, :2], 1e-12)


def test_a_broken_row_is_nan_and_alone(backend, device):
    student, teachers = logits(device, 12)
    with torch.no_grad():
        student[1, 3] = torch.nan
        student[2] = -torch.inf
        teachers[0, 3, 0] = torch.inf
    for kind in KINDS:
        loss, _ = ops.multi_teacher_kl(student, teachers, [1.0, 1.0, 1.0], 1.0, kind)
        assert loss.isnan().tolist() == [False, True, True, True], kind


@pytest.mark.parametrize("kind", KINDS)
def test_students_of_their_own(backend, device, kind):
    adversarial, teachers = logits(device, 20, dtype=torch.float64)
    clean, _ = logits(device, 20, dtype=torch.float64, seed=1)
    weights = torch.rand(3, 4, device=device)
    loss, kl = ops.multi_teacher_kl(
        torch.stack([adversarial, clean]), teachers, weights, kind=kind, student_of=[0, 1, 0]
    )
    ones = torch.ones(1, device=device)
    parts = [
        plain(student, teachers[k : k + 1], weights[k : k + 1], ones, kind)
        for k, student in enumerate((adversarial, clean, adversarial))
    ]
    expected = sum(part for part, _ in parts)
    close(loss, expected, 1e-12)
    close(kl, torch.cat([each for _, each in parts]), 1e-12)
    for got, wanted in zip(
        torch.autograd.grad(loss.sum(), (adversarial, clean)),
        torch.autograd.grad(expected.sum(), (adversarial, clean)),
        strict=True,
    ):
        close(got, wanted, 1e-12)


@pytest.mark.parametrize("count", [1, 2, 5, 15])
def test_any_number_of_teachers(backend, device, count):
    student, teachers = logits(device, 40, count)
    weights = torch.rand(count, device=device)
    loss, _ = ops.multi_teacher_kl(student, teachers, weights)
    close(loss, plain(student, teachers, weights, torch.ones(count, device=device), "forward")[0], 3e-6)


def test_teachers_are_constants_unless_asked(backend, device):
    student, teachers = logits(device, 10)
    loss, _ = ops.multi_teacher_kl(student, teachers, [1.0, 1.0, 1.0])
    assert torch.autograd.grad(loss.sum(), teachers, allow_unused=True) == (None,)


@pytest.mark.parametrize("classes", [2, 10, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folding_keeps_the_gradient(backend, device, classes, dtype):
    student, teachers = logits(device, classes, dtype=dtype)
    weights, tau = torch.rand(3, 4, device=device), 2.0
    mean = ops.fold_teachers(teachers.detach(), weights, tau)
    assert mean.dtype == dtype
    expected = (weights[..., None].double() * torch.softmax(teachers.detach().double() / tau, -1)).sum(0)
    close(mean, expected, 1e-6 if dtype == torch.float32 else 1e-12)
    soft, _, _ = ops.attack_loss(student / tau, mean, "soft-ce")
    loss, _ = ops.multi_teacher_kl(student, teachers, weights, tau)
    (folded,), (full,) = torch.autograd.grad(soft.sum(), student), torch.autograd.grad(loss.sum(), student)
    close(folded, full, 1e-5 if dtype == torch.float32 else 1e-12)


def test_an_empty_batch(backend, device):
    student, teachers = logits(device, 10, rows=0)
    loss, kl = ops.multi_teacher_kl(student, teachers, [1.0, 1.0, 1.0])
    assert loss.shape == (0,) and kl.shape == (3, 0)
    assert torch.autograd.grad(loss.sum(), student)[0].shape == (0, 10)
    assert ops.fold_teachers(teachers, [1.0, 1.0, 1.0]).shape == (0, 10)


def test_rows_do_not_depend_on_their_batch(backend, device):
    student, teachers = logits(device, 300)
    whole = ops.multi_teacher_kl(student, teachers, [1.0, 2.0, 0.5])[0]
    alone = [ops.multi_teacher_kl(student[k : k + 1], teachers[:, k : k + 1], [1.0, 2.0, 0.5])[0] for k in range(4)]
    assert torch.equal(whole, torch.cat(alone))


def test_a_second_derivative_is_an_error_that_helps(device):
    student, teachers = logits(device, 6, dtype=torch.float64)
    loss, _ = ops.multi_teacher_kl(student, teachers, [1.0, 1.0, 1.0])
    (slope,) = torch.autograd.grad(loss.sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"multi_teacher_kl is differentiable once.*use_backend\('reference'\)"):
        torch.autograd.grad(slope.square().sum(), student)
    with ops.use_backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda s: ops.multi_teacher_kl(s, teachers.detach(), [1.0, 1.0, 1.0], kind="js")[0], (student,)
        )


def test_functional_gradients(backend, device):
    student, teachers = (t.detach() for t in logits(device, 6, dtype=torch.float64))

    def loss(student, teachers):
        return ops.multi_teacher_kl(student, teachers, [1.0, 0.5, 2.0], kind="js", teacher_grad=True)[0].sum()

    got = torch.func.grad(loss, argnums=(0, 1))(student, teachers)
    leaves = [student.requires_grad_(), teachers.requires_grad_()]
    for ours, theirs in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_and_inference_mode_change_nothing(device):
    student, teachers = logits(device, 50)
    expected = ops.multi_teacher_kl(student, teachers, [1.0, 1.0, 1.0])[0].detach()
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        assert torch.equal(ops.multi_teacher_kl(student, teachers, [1.0, 1.0, 1.0])[0].detach(), expected)
    with torch.inference_mode():
        assert torch.equal(ops.multi_teacher_kl(student, teachers, [1.0, 1.0, 1.0])[0], expected)


@pytest.mark.parametrize("change, error, message", [
    ({"student": torch.zeros(4, 9)}, ValueError, r"with the teachers' B and C, got \[4, 9\]"),
    ({"student": torch.zeros(4, 10, dtype=torch.int64)}, TypeError, "student must be floating-point"),
    ({"teachers": torch.zeros(4, 10)}, ValueError, r"teachers must be logits \[T, B, C\], got \[4, 10\]"),
    ({"teachers": [torch.zeros(4, 10)]}, ValueError, "got list: stack them"),
    ({"teachers": torch.zeros(16, 4, 10)}, ValueError, "1 to 15"),
    ({"weights": torch.ones(2)}, ValueError, r"weights must be \[3\] or \[3, 4\], got \[2\]"),
    ({"weights": torch.ones(3, requires_grad=True)}, ValueError, "weights are constants"),
    ({"temperature": 0.0}, ValueError, "temperature must be above 0, got 0.0"),
    ({"temperature": torch.ones(2)}, ValueError, r"temperature must be a float or \[3\]"),
    ({"kind": "hinton"}, ValueError, "'forward', 'reverse', 'js', got 'hinton'"),
    ({"student": torch.zeros(2, 4, 10)}, ValueError, "2 students need student_of"),
    ({"student_of": [0, 0, 1]}, ValueError, r"one of 1 student\(s\) for each of 3 teachers"),
    ({"student": torch.zeros(20, 4, 10), "student_of": [0, 16, 1]}, ValueError, r"one of 16 student"),
])  # fmt: skip
def test_bad_input(change, error, message):
    good = {"student": torch.zeros(4, 10), "teachers": torch.zeros(3, 4, 10), "weights": torch.ones(3)}
    with pytest.raises(error, match=message):
        ops.multi_teacher_kl(**good | change)


@pytest.mark.skipif("cpp" in ops.backends()["missing"], reason="the C++ part is not built")
def test_threads_change_no_bit():
    code = """
import torch
from rvlm import ops
generator = torch.Generator().manual_seed(0)
s, t = torch.randn(64, 999, generator=generator), torch.randn(3, 64, 999, generator=generator)
print(ops.multi_teacher_kl(s, t, [1., 2., 3.], kind="js")[0].double().sum().item().hex())
"""
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": n}, check=True, capture_output=True
        ).stdout
        for n in ("1", "3")
    }
    assert len(runs) == 1
