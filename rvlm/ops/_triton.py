"""The ops' signatures on top of the Triton launchers: allocates outputs, nothing else."""

import torch

from rvlm.kernels import steps


def linf_step_(x_adv, *args):
    steps.linf_step(x_adv, x_adv, *args)


def linf_step(x_adv, *args):
    out = torch.empty_like(x_adv)
    steps.linf_step(out, x_adv, *args)
    return out


def l2_step_(x_adv, *args):
    steps.l2_step(x_adv, x_adv, *args)


def uniform_start(x, *args):
    out = torch.empty_like(x)
    steps.uniform_start(out, x, *args)
    return out
