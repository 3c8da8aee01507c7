"""Launch sizes, compiler options, the current device, and 64-bit addresses."""

import contextlib
import importlib
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from rvlm.kernels import _launch, steps


@pytest.mark.parametrize("n", [1, 5, 127, 128, 129, 3072, 4096, 4097, 150528, 3 * 1024 * 1024, _launch.MAX_ROW])
def test_sizes_cover_the_row(n):
    for block, programs, num_warps in (_launch.step_sizes(n), _launch.sums_sizes(n, 128)):
        assert block & (block - 1) == 0 and num_warps & (num_warps - 1) == 0
        assert 32 * num_warps * 4 <= block, "a thread has less than 16 bytes to load"
        assert (programs - 1) * block < n, "a program has nothing to do"
    assert _launch.step_sizes(n).programs * _launch.step_sizes(n).block >= n
    assert _launch.sums_sizes(n, 128).programs <= 128


def test_rows_beyond_32_bit_offsets_are_refused():
    with pytest.raises(ValueError, match=str(_launch.MAX_ROW + 1)):
        _launch.step_sizes(_launch.MAX_ROW + 1)


def test_forced_block_ends_with_its_block():
    usual = _launch.step_sizes(10**6)
    with pytest.raises(RuntimeError), _launch.forced_block(64):
        assert _launch.step_sizes(10**6).block == _launch.sums_sizes(10**6, 128).block == 64
        raise RuntimeError
    assert _launch.step_sizes(10**6) == usual


class FakeKernel:
    def __getitem__(self, grid):
        self.grid = grid
        return lambda *args, **options: setattr(self, "options", options)


def test_products_and_sums_are_never_fused():
    kernel = FakeKernel()
    _launch.launch(kernel, 7, torch.device("cpu"), num_warps=4, BLOCK=64)
    assert kernel.grid == (7,)
    assert kernel.options == {"BLOCK": 64, "num_warps": 4, "enable_fp_fusion": False}


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda d: entered.append(d) or contextlib.nullcontext())
    _launch.launch(FakeKernel(), 1, torch.device("cpu"), num_warps=1)
    assert entered == []
    _launch.launch(FakeKernel(), 1, torch.device("cuda", 3), num_warps=1)
    assert entered == [torch.device("cuda", 3)]


ROW, N, BLOCK = 9, 2**30, 1024  # row 9 begins at element 9 * 2^30, past what 32 bits can count
BLOCKS = N // BLOCK
FAR, WIDTH = 2**22 + 4, 1024  # the same for kernels that walk along a row: more of them, and shorter
PARTS = 64


def one(dtype):
    return torch.ones(1, dtype=dtype)


IMAGE, HALF, ACTIVE, SUMS, IDS = (
    one(dtype) for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.float64, torch.int64)
)
COUNTS = one(torch.int32)
BOX = {"LO": 0.0, "HI": 1.0, "BLOCK": BLOCK}
STEP = {"ALPHA_STRIDE": 1, "EPS_STRIDE": 1, **BOX}
LEVELS = {"LEVELS": 0.0, "IN_PLACE": True}
TEACHERS = {"T": 2, "T_PADDED": 2, "BLOCK": WIDTH}

# kernel -> arguments, constexprs, the program of the far row, and by how many bytes each access must then be further.
FAR_ROWS = {
    "steps._linf_step_kernel": (
        (IMAGE, IMAGE, HALF, IMAGE, IMAGE, IMAGE, ACTIVE, N),
        {**STEP, **LEVELS, "FIRST_LEVEL": 0, "LAST_LEVEL": 0},
        ROW * BLOCKS,
        {ROW, ROW * 4, ROW * N * 2, ROW * N * 4},
    ),
    "steps._l2_sums_kernel": (
        (SUMS, IMAGE, HALF, IMAGE, ACTIVE, N, BLOCKS),
        {"BLOCK": BLOCK},
        ROW * BLOCKS,
        {ROW, ROW * N * 2, ROW * N * 4, ROW * 3 * BLOCKS * 8},
    ),
    "steps._l2_apply_kernel": (
        (IMAGE, IMAGE, HALF, IMAGE, IMAGE, IMAGE, ACTIVE, SUMS, N, PARTS),
        {**STEP, **LEVELS, "MAX_PARTS": PARTS},
        ROW * BLOCKS,
        {ROW, ROW * 4, ROW * N * 2, ROW * N * 4, ROW * 3 * PARTS * 8},
    ),
    "steps._uniform_start_kernel": (
        (IMAGE, IMAGE, IMAGE, IDS, N, 7, 0, 0),
        {"EPS_STRIDE": 1, **BOX},
        ROW * BLOCKS,
        {ROW * 4, ROW * 8, ROW * N * 4},
    ),
    "iterates._apgd_step_kernel": (
        (IMAGE, IMAGE, HALF, IMAGE, IMAGE, IMAGE, ACTIVE, N),
        {"STEP_STRIDE": 1, "EPS_STRIDE": 1, "A": 0.75, **BOX},
        ROW * BLOCKS,
        {ROW, ROW * 4, ROW * N * 2, ROW * N * 4},
    ),
    "iterates._l1_sums_kernel": (
        (SUMS, HALF, ACTIVE, N, BLOCKS),
        {"DTYPE": tl.float32, "BLOCK": BLOCK},
        ROW * BLOCKS,
        {ROW, ROW * N * 2, ROW * BLOCKS * 8},
    ),
    "iterates._momentum_step_kernel": (
        (IMAGE, IMAGE, HALF, IMAGE, IMAGE, IMAGE, ACTIVE, SUMS, N, PARTS),
        {**STEP, "MU": 0.9, "MAX_PARTS": PARTS},
        ROW * BLOCKS,
        {ROW, ROW * 4, ROW * N * 2, ROW * N * 4, ROW * PARTS * 8},
    ),
    "iterates._keep_best_kernel": (
        (IMAGE, IMAGE, ACTIVE, N),
        {"BLOCK": BLOCK},
        ROW * BLOCKS,
        {ROW, ROW * N * 4},
    ),
    "l1._l1_largest_kernel": (
        (SUMS, IMAGE, IMAGE, N, BLOCKS),
        {"BLOCK": BLOCK},
        ROW * BLOCKS,
        {ROW * N * 4, ROW * BLOCKS * 8},
    ),
    "l1._l1_lengths_kernel": (
        (SUMS, IMAGE, IMAGE, SUMS, SUMS, N, BLOCKS),
        {**BOX, "KNOTS": 32},
        ROW * BLOCKS,
        {ROW * 8, ROW * N * 4, ROW * BLOCKS * 32 * 8},
    ),
    "l1._l1_bracket_kernel": (
        (SUMS, SUMS, SUMS, SUMS, SUMS, IMAGE, PARTS),
        {"KNOTS": 32},
        FAR,
        {FAR * 4, FAR * 8, FAR * PARTS * 32 * 8},
    ),
    "l1._l1_shrink_kernel": (
        (IMAGE, IMAGE, IMAGE, SUMS, SUMS, SUMS, SUMS, IMAGE, N),
        BOX,
        ROW * BLOCKS,
        {ROW * 4, ROW * 8, ROW * N * 4},
    ),
    "l1._select_histogram_kernel": (
        (COUNTS, HALF, IDS, N, BLOCKS),
        {"SHIFT": 0, "DIGIT": 5, "WIDE": False, "BLOCK": BLOCK},
        ROW * BLOCKS,
        {ROW * 8, ROW * N * 2, ROW * BLOCKS * 32 * 4},
    ),
    "l1._select_digit_kernel": (
        (IDS, IDS, IDS, COUNTS, IDS, PARTS),
        {"DIGIT": 5},
        FAR,
        {FAR * 8, FAR * PARTS * 32 * 4},
    ),
    "l1._sparse_step_kernel": (
        (IMAGE, IMAGE, HALF, IMAGE, IDS, IDS, IDS, N),
        {"ALPHA_STRIDE": 1, "WIDE": False, "BLOCK": BLOCK},
        ROW * BLOCKS,
        {ROW * 4, ROW * 8, ROW * N * 2, ROW * N * 4},
    ),
    "losses._attack_loss_kernel": (
        (IMAGE, ACTIVE, HALF, HALF, IDS, IDS, WIDTH),
        {"KIND": 3, "BLOCK": WIDTH},
        FAR,
        {FAR, FAR * 4, FAR * 8, FAR * WIDTH * 2},
    ),
    "distill._multi_teacher_kl_kernel": (
        (IMAGE, IMAGE, HALF, HALF, HALF, HALF, IMAGE, IMAGE, FAR + 1, WIDTH),
        {"STUDENT_OF": 0, "KIND": 2, "S": 1, **TEACHERS},
        FAR,
        {0, FAR * 4, FAR * WIDTH * 2},  # the temperatures stay where they are
    ),
    "distill._fold_teachers_kernel": (
        (IMAGE, HALF, IMAGE, IMAGE, FAR + 1, WIDTH),
        TEACHERS,
        FAR,
        {0, FAR * 4, FAR * WIDTH * 2, FAR * WIDTH * 4},
    ),
    "attention._anchored_residual_kernel": (
        (HALF, HALF, IMAGE, IMAGE, HALF, HALF, *(IMAGE,) * 4, 4, WIDTH),
        {"EPS": 1e-5, "BLOCK": WIDTH},
        FAR,
        {0, FAR * 4, FAR * WIDTH * 2},
    ),
    "attention._anchored_residual_backward_kernel": (
        (HALF, *(IMAGE,) * 4, *(HALF,) * 4, *(IMAGE,) * 3, FAR + 1, 1, WIDTH, FAR + 1),
        {"BLOCK": WIDTH},
        FAR,
        {0, FAR * 4, FAR * WIDTH * 2, FAR * WIDTH * 4},
    ),
}


@pytest.fixture
def offsets(monkeypatch):
    """Runs the programs of the first and of a far row of a batch too large to exist: how far apart each access is.

    The interpreter computes addresses as the GPU does, in 32 or 64 bits; only its loads and stores are replaced.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("looks inside Triton's interpreter: needs TRITON_INTERPRET=1")
    addresses = []

    def load(pointers, mask, other, dtype):
        addresses.append(int(pointers.min()))
        return np.ones(pointers.shape, dtype)

    def store(pointers, values, mask):
        addresses.append(int(pointers.min()))

    def run(kernel, args, constexprs, far):
        seen = []
        for number in (0, far):
            program = interpreter.TensorHandle(np.array([number], np.int32), tl.int32)
            monkeypatch.setattr(interpreter.interpreter_builder, "create_get_program_id", lambda axis, p=program: p)
            addresses.clear()
            kernel[(1,)](*args, **constexprs)
            seen.append(list(addresses))
        return {there - here for here, there in zip(*seen, strict=True)}

    monkeypatch.setattr(interpreter, "_interpreter", SimpleNamespace(load=load, store=store))
    return run


def kernels_of(module: str) -> dict:
    found = vars(importlib.import_module(f"rvlm.kernels.{module}"))
    return {f"{module}.{name}": kernel for name, kernel in found.items() if name.endswith("_kernel")}


def test_every_kernel_is_among_them():
    modules = ("attention", "distill", "iterates", "l1", "losses", "steps")
    assert set(FAR_ROWS) == {name for module in modules for name in kernels_of(module)}


@pytest.mark.parametrize("name", FAR_ROWS)
def test_far_rows(offsets, name):
    args, constexprs, far, expected = FAR_ROWS[name]
    assert offsets(kernels_of(name.split(".")[0])[name], args, constexprs, far) == expected


NARROW = [
    ("row.to(tl.int64) * n", "row * n", "steps", ("_linf_step_kernel", "_l2_apply_kernel", "_uniform_start_kernel")),
    ("row.to(tl.int64) * n", "row * n", "iterates", ("_l1_sums_kernel",)),
    ("row.to(tl.int64) * n", "row * n", "l1", ("_l1_largest_kernel", "_l1_lengths_kernel", "_select_histogram_kernel")),
    ("program_id(0).to(tl.int64)", "program_id(0)", "l1", ("_l1_bracket_kernel", "_select_digit_kernel")),
    ("program_id(0).to(tl.int64)", "program_id(0)", "losses", ("_attack_loss_kernel",)),
    ("program_id(0).to(tl.int64)", "program_id(0)", "distill", ("_multi_teacher_kl_kernel", "_fold_teachers_kernel")),
    ("b.to(tl.int64) * tokens", "b * tokens", "attention", ("_anchored_residual_backward_kernel",)),
    ("program_id(0).to(tl.int64)", "program_id(0)", "attention", ("_anchored_residual_kernel",)),
]


@pytest.mark.parametrize("before, after, module, kernels", NARROW)
def test_32_bit_row_offsets_are_noticed(offsets, mutant, before, after, module, kernels):
    wrong = mutant(before, after, module)
    for name in kernels:
        args, constexprs, far, expected = FAR_ROWS[f"{module}.{name}"]
        assert offsets(getattr(wrong, name), args, constexprs, far) != expected


@pytest.mark.gpu
@pytest.mark.parametrize("step, size", [(steps.linf_step, 0.03), (steps.l2_step, 0.5)])
def test_graph_replay_equals_a_call(make_case, device, step, size):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    case = make_case((4, 3, 32, 32), active=torch.tensor([True, True, False, True], device=device))
    case = case.changed(alpha=torch.full_like(case.alpha, size), eps=torch.full_like(case.eps, size))
    out = torch.empty_like(case.x)

    def call():
        step(out, case.x_adv, case.grad, case.x, case.alpha, case.eps, 0.0, 1.0, case.active, 0.0)

    call()  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    case.grad.neg_()
    case.alpha.mul_(0.5)
    case.active.logical_not_()
    graph.replay()
    replayed = out.clone()
    assert torch.equal(replayed, case.launch(step))


@pytest.mark.gpu
def test_batch_of_more_than_2_31_pixels(device):
    if device.type != "cuda" or torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs a GPU with 30 GiB of free memory")
    n, rows = 2**20, 2**11 + 1
    x_adv, x = torch.empty((2, rows, n), device=device)
    grad = torch.empty((rows, n), dtype=torch.bfloat16, device=device)
    active = torch.zeros(rows, dtype=torch.bool, device=device)
    active[-1] = True
    x[-1].uniform_()
    x_adv[-1].copy_(x[-1]).add_(0.01)
    grad[-1].normal_()
    alpha, eps = torch.full((2, 1), 0.03, device=device)
    for step in (steps.linf_step, steps.l2_step):
        alone = x_adv[-1:].clone()
        step(alone, alone, grad[-1:], x[-1:], alpha, eps, 0.0, 1.0, None, 0.0)
        step(x_adv, x_adv, grad, x, alpha, eps, 0.0, 1.0, active, 0.0)
        assert torch.equal(x_adv[-1:], alone)
    ids = torch.arange(rows, device=device)
    steps.uniform_start(x_adv, x, eps, ids, 5, 0.0, 1.0, 0)
    alone = torch.empty_like(x[-1:])
    steps.uniform_start(alone, x[-1:], eps, ids[-1:], 5, 0.0, 1.0, 0)
    assert torch.equal(x_adv[-1:], alone)
