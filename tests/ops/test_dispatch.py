"""Registration: schemas, fakes and compilers agree with the ops; backends are chosen and reported as promised."""

import subprocess
import sys

import pytest
import torch

from rvlm import ops

STEPS = ["l2_step_", "linf_step", "linf_step_"]


def _step(memory_format=torch.contiguous_format):
    x = torch.rand(3, 3, 4, 4).to(memory_format=memory_format)
    alpha, active = torch.full((3,), 0.1), torch.tensor([True, False, True])
    return (x.clone(), torch.randn_like(x), x, alpha, torch.full((1,), 0.1), 0.0, 1.0, active, 0.0)


def _divergence(student_grad, teacher_grad):
    student, teachers = torch.randn(2, 4, 5), torch.randn(3, 4, 5)
    return (student, teachers, torch.rand(3, 4), torch.ones(3), 0b0001_0000_0001, 2, student_grad, teacher_grad)


ARGUMENTS = {
    **{name: [_step(), _step(torch.channels_last)] for name in STEPS},
    "uniform_start": [(torch.rand(3, 3, 4, 4), torch.full((1,), 0.1), torch.arange(3), 5, 0.0, 1.0, 0)],
    "apgd_step_": [
        (
            torch.rand(3, 8),
            *(torch.rand(3, 8) for _ in range(3)),
            torch.full((3,), 0.1),
            torch.full((1,), 0.1),
            0.75,
            0.0,
            1.0,
            torch.tensor([True, False, True]),
        )
    ],
    "momentum_step_": [
        (*(torch.rand(3, 8) for _ in range(4)), torch.full((3,), 0.1), torch.full((1,), 0.1), 0.9, kind, 0.0, 1.0, None)
        for kind in (0, 1)
    ],
    "keep_best_": [(torch.rand(3, 8), torch.rand(3, 8), torch.tensor([True, False, True]))],
    "l1_project": [(torch.rand(3, 8), torch.rand(3, 8), torch.full((3,), 0.5), 0.0, 1.0)],
    "sparse_step": [
        (torch.rand(3, 8), torch.randn(3, 8), torch.full((n,), 0.5), torch.tensor([0, 4, 7])) for n in (1, 3)
    ],
    "anchored_residual": [
        (
            torch.randn(2, 3, 8),
            torch.randn(2, 3, 8),
            torch.randn(3, 8),
            torch.rand(2),
            torch.rand(8),
            torch.rand(8),
            1e-5,
        )
    ],
    "anchored_residual_backward": [
        (*(torch.randn(2, 3, 8) for _ in range(3)), o, torch.rand(2, 3), torch.rand(2, 3), torch.rand(8), anchor, norm)
        for o in (torch.randn(2, 3, 8), None)
        for anchor in (True, False)
        for norm in (True, False)
    ],
    "multi_teacher_kl": [_divergence(student, teacher) for student in (True, False) for teacher in (True, False)],
    "fold_teachers": [(torch.randn(3, 4, 5), torch.rand(3, 4), torch.ones(3))],
    "attack_loss": [
        (torch.randn(4, 5), torch.arange(4), None, 0),
        (torch.randn(4, 5), torch.arange(4), torch.arange(1, 5), 3),
        (torch.randn(4, 5), torch.rand(4, 5), None, 4),
    ],
}
NAMES = sorted(ARGUMENTS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("namespace", ["rvlm", "rvlm_cpp"])
def test_opcheck(name, namespace):
    if namespace == "rvlm_cpp" and "cpp" in ops.backends()["missing"]:
        pytest.skip("the C++ part is not built")
    op = getattr(getattr(torch.ops, namespace), name).default
    for arguments in ARGUMENTS[name]:
        torch.library.opcheck(op, arguments)


def test_public_functions_compile_without_graph_breaks():
    x = torch.rand(2, 3, 8, 8)
    x_adv, grad = (x + 0.01).clamp(0, 1), torch.randn_like(x)

    def job(x_adv, grad, x):
        start = ops.uniform_start(x, 0.03, None, 7)
        y = ops.linf_step(x_adv, grad, x, 0.01, 0.03) + start
        ops.linf_step_(x_adv, grad, x, 0.01, 0.03)
        ops.l2_step_(x_adv, grad, x, 0.1, 0.3)
        return y

    expected_adv, compiled_adv = x_adv.clone(), x_adv.clone()
    expected = job(expected_adv, grad, x)
    result = torch.compile(job, fullgraph=True, backend="aot_eager")(compiled_adv, grad, x)
    assert torch.equal(result, expected) and torch.equal(compiled_adv, expected_adv)


def test_differentiable_functions_compile_without_graph_breaks():
    student, teachers = torch.randn(4, 6, requires_grad=True), torch.randn(2, 4, 6)
    y, head = torch.arange(4), torch.randn(6, 5)

    def job(student):
        loss = ops.multi_teacher_kl(student, teachers, [1.0, 0.5], kind="js")[0]
        folded = ops.fold_teachers(teachers, [1.0, 0.5])
        return loss.sum() + ops.attack_loss(student, y, "dlr")[0].sum() + ops.attack_loss(student, folded, "soft-ce")[
            0
        ].sum(), ops.clip_head_loss(student, head, y)[3]

    expected = job(student)
    result = torch.compile(job, fullgraph=True, backend="aot_eager")(student)
    for got, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    (got,), (wanted,) = torch.autograd.grad(result[0], student), torch.autograd.grad(expected[0], student)
    torch.testing.assert_close(got, wanted)


def test_every_op_has_a_backend_on_both_devices():
    found = ops.backends()
    assert sorted(found["ops"]) == NAMES
    for chosen in found["ops"].values():
        assert chosen["cpu"] in ("cpp", "reference") and chosen["cuda"] in ("triton", "reference")
        assert ("cpp" in found["missing"]) == (chosen["cpu"] == "reference")


def test_a_forced_backend_that_is_missing_names_both(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.rand(2, 3)
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"linf_step.*'triton'.*TRITON_INTERPRET"):
        ops.linf_step(x, x.clone(), x.clone(), 0.1, 0.1)
    assert ops.backends()["forced"] == "auto"
    with pytest.raises(ValueError, match="unknown backend 'cuda'"), ops.use_backend("cuda"):
        pass


def test_pure_python_runs_and_says_why():
    """Without compiled parts and without Triton the ops still work, on the reference."""
    code = """
import sys
sys.modules["rvlm._C"] = sys.modules["rvlm._C_cuda"] = sys.modules["rvlm._host"] = sys.modules["triton"] = None
import torch
from rvlm import ops, profiling
found = ops.backends()
assert all(v == {"cpu": "reference", "cuda": "reference"} for v in found["ops"].values()), found
assert set(found["missing"]) == {"cpp", "cuda_cpp", "triton"}, found
x = torch.rand(2, 3)
assert ops.linf_step(x, torch.ones(2, 3), x.clone(), 0.1, 0.05).sub(x).abs().max() <= 0.051
try:
    with ops.use_backend("cpp"):
        ops.linf_step(x, x.clone(), x.clone(), 0.1, 0.1)
except RuntimeError as error:
    assert "rvlm._C could not be imported" in str(error), error
else:
    raise AssertionError("a missing backend must not fall back")
with profiling.record() as timer, profiling.phase("a"):
    pass
assert timer.totals()["a"][1] == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)
