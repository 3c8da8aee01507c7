"""Fused operations: the only door to the compiled kernels.

Each op has one meaning, written as plain PyTorch (its reference), and up to four implementations of it: that reference,
C++ for the CPU, Triton and CUDA C++ for GPUs. `backends()` says what runs here; `use_backend` forces one.
"""

from rvlm.ops._dispatch import backends, use_backend
from rvlm.ops.steps import l2_step_, linf_step, linf_step_, uniform_start

__all__ = ["backends", "l2_step_", "linf_step", "linf_step_", "uniform_start", "use_backend"]
