"""Fused operations: the only door to the compiled kernels.

Each op has one meaning, written as plain PyTorch (its reference), and up to four implementations of it: that reference,
C++ for the CPU, Triton and CUDA C++ for GPUs. `backends()` says what runs here; `use_backend` forces one.
"""

from rvlm.ops._dispatch import backends, use_backend
from rvlm.ops.attention import anchored_attention, anchored_residual, prefix_attention
from rvlm.ops.distill import fold_teachers, multi_teacher_kl
from rvlm.ops.filters import gaussian_filter
from rvlm.ops.iterates import apgd_step_, keep_best_, momentum_step_
from rvlm.ops.l1 import l1_project, l1_step_
from rvlm.ops.losses import attack_loss, clip_head_loss
from rvlm.ops.steps import l2_step_, linf_step, linf_step_, uniform_start

__all__ = [
    "anchored_attention",
    "anchored_residual",
    "apgd_step_",
    "attack_loss",
    "backends",
    "clip_head_loss",
    "fold_teachers",
    "gaussian_filter",
    "keep_best_",
    "l1_project",
    "l1_step_",
    "l2_step_",
    "linf_step",
    "linf_step_",
    "momentum_step_",
    "multi_teacher_kl",
    "prefix_attention",
    "uniform_start",
    "use_backend",
]
