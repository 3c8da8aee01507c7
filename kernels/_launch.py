"""How the kernels are launched: sizes and compiler options, in one place.

Sizes are heuristics in the row length alone. Autotuning needs a GPU, breaks under graph capture and makes a sum's order
depend on timing; a size that depended on the batch would make a sample's result depend on the samples beside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from triton import cdiv, next_power_of_2

STEP_BLOCK = 2048  # elements per program: 8 warps, 8 elements a thread, two 16-byte fp32 loads in flight per tensor
SUMS_BLOCK = 1024  # 8 warps, 4 elements a thread, each with three float64 sums in registers
TILE = 4096  # elements of a tile of logits: 8 warps, 16 elements a thread for each of the few tiles alive at once
MIN_BLOCK = 128  # one warp, 16 bytes of fp32 a thread
MAX_ROW = 2**31 - 2**20  # offsets inside a row are 32 bits wide, and a program may reach beyond its end

_forced_block: int | None = None


class Sizes(NamedTuple):
    """block: elements per pass, a power of two; programs: per row; num_warps: 32-thread warps per program."""

    block: int
    programs: int
    num_warps: int


def step_sizes(n: int) -> Sizes:
    """Sizes for an elementwise kernel on rows of n elements, one block per program.

    Raises:
        ValueError: a row that 32-bit offsets cannot address.
    """
    if n > MAX_ROW:
        raise ValueError(f"a sample has {n} elements, kernels take at most {MAX_ROW}: split it into smaller samples")
    block = _block(n, STEP_BLOCK)
    return Sizes(block, cdiv(n, block), _warps(block, 8))


def sums_sizes(n: int, max_programs: int) -> Sizes:
    """Sizes for a kernel that sums over rows of n elements; beyond max_programs a program walks over several blocks."""
    block = _block(n, SUMS_BLOCK)
    return Sizes(block, min(cdiv(n, block), max_programs), _warps(block, 4))


def tile_sizes(rows: int, n: int) -> Sizes:
    """Sizes for a program that walks along `rows` rows of n elements at once; block is columns per tile."""
    height = next_power_of_2(rows)
    block = _forced_block or min(max(next_power_of_2(n), 32), max(TILE // height, 32))
    return Sizes(block, 1, _warps(height * block, 8))


def _block(n: int, largest: int) -> int:
    return _forced_block or min(max(next_power_of_2(n), MIN_BLOCK), largest)


def _warps(block: int, elements_per_thread: int) -> int:
    return min(max(block // (32 * elements_per_thread), 1), 8)


@contextmanager
def forced_block(block: int) -> Iterator[None]:
    """Uses `block` (a power of two, at least 4) in every launch of the `with` block.

    For tests: small blocks make short rows span several programs; large ones save time in the interpreter, which pays
    per program and hardly per element.
    """
    global _forced_block
    before, _forced_block = _forced_block, block
    try:
        yield
    finally:
        _forced_block = before


def launch(kernel, programs: int, device: torch.device, *args, num_warps: int, **constexprs) -> None:
    """Runs `programs` programs of a Triton kernel on `device`.

    Without fp fusion a product and a sum round twice, as in eager PyTorch and in the C++ code: the same bits on all.
    """
    # Triton launches on the current device, which need not be the tensors' own.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, **constexprs, num_warps=num_warps, enable_fp_fusion=False)
