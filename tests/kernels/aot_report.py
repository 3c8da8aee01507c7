"""Compiles what the launchers launch, for a GPU that need not be there, and prints what came out as JSON.

Run by test_aot.py in a process of its own, because Triton compiles only where its interpreter is off:

    python aot_report.py core|full ARCH ...    steps, for each compute capability; "core" is the usual variants
    python aot_report.py rows ARCH ...         divergences and attack losses
    python aot_report.py attention ARCH ...    the joint of an anchor with the residual stream
    python aot_report.py iterates ARCH ...     APGD and momentum steps, rows kept, the L1 projection
    python aot_report.py fused ARCH            one variant with fp fusion switched on, to see that its traces are found
    python aot_report.py seeds ARCH            random starts with many seeds, streams and radii

The launchers are called with CPU tensors under a stand-in for the driver that names the target; compiling is real,
specialisation of arguments included, and only the launch is left out.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from rvlm.kernels import attention, distill, iterates, l1, losses, steps

IMAGENET = 3 * 224 * 224
ODD = 3 * 17 * 53  # divisible by neither 16 nor 4
FLOAT, DOUBLE = torch.float32, torch.float64
CORE = [(FLOAT, FLOAT), (FLOAT, torch.bfloat16), (DOUBLE, DOUBLE)]
FULL = [*CORE, (FLOAT, torch.float16)]  # these four are what rvlm.ops lets through to the kernels
USAGE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")
INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)", re.MULTILINE)


class TargetOnly:
    """The part of Triton's driver that compiling asks for. The device number is the compute capability."""

    arch = 90

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


target, compiled = TargetOnly(), []
launch = JITFunction.run


def compile_only(self, *args, grid, warmup, **options):
    if sys.argv[1] == "fused":
        options["enable_fp_fusion"] = True
    compiled.append(launch(self, *args, grid=grid, warmup=True, **options))


def describe(kernel) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {name.lower(): int(number) for name, number in USAGE.findall(usage)}
    assert counts.keys() == {"reg", "stack", "local"}, f"cuobjdump says something else now: {usage}"
    return {
        "kernel": kernel.metadata.name,
        "arch": target.arch,
        "warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        "ptx": dict(Counter(INSTRUCTION.findall(kernel.asm["ptx"]))),
        **counts,
    }


def step_report(step, dtype, grad_dtype, n, quantize, in_place, rows) -> list[dict]:
    """rows: active flags, and a step size and radius for each row."""
    compiled.clear()
    x_adv, x, out = torch.empty((3, 2, n), dtype=dtype)
    grad = torch.empty((2, n), dtype=grad_dtype)
    per_row = torch.ones(2 if rows else 1, dtype=dtype)
    active = torch.ones(2, dtype=torch.bool) if rows else None
    out = x_adv if in_place else out
    step(out, x_adv, grad, x, per_row, per_row, 0.0, 1.0, active, 255.0 if quantize else 0.0)
    variant = {"dtype": str(dtype), "grad": str(grad_dtype), "n": n, "quantize": quantize, "in_place": in_place}
    return [{**variant, "rows": rows, **describe(kernel)} for kernel in compiled]


def start_report(dtype, n, rows) -> list[dict]:
    compiled.clear()
    x, out = torch.empty((2, 2, n), dtype=dtype)
    eps = torch.ones(2 if rows else 1, dtype=dtype)
    steps.uniform_start(out, x, eps, torch.arange(2), 7, 0.0, 1.0, 0)
    return [{"dtype": str(dtype), "n": n, "rows": rows, **describe(kernel)} for kernel in compiled]


def report(full: bool):
    """Descriptions of every kernel and variant."""
    both = (False, True)
    for (dtype, grad), n, quantize in itertools.product(FULL if full else CORE, (IMAGENET, ODD), both):
        for in_place, rows in itertools.product(both, both) if full else [(True, True)]:
            yield from step_report(steps.linf_step, dtype, grad, n, quantize, in_place, rows)
            yield from step_report(steps.l2_step, dtype, grad, n, quantize, in_place, rows)
    for dtype, n, rows in itertools.product((FLOAT, DOUBLE), (IMAGENET, ODD), both if full else (True,)):
        yield from start_report(dtype, n, rows)


def rows_report() -> list[dict]:
    """Kernels on rows of logits: usual widths and types, every kind."""
    found = []
    for dtype, classes in itertools.product((FLOAT, torch.bfloat16, DOUBLE), (10, 1000, 21841)):
        wide = DOUBLE if dtype == DOUBLE else FLOAT
        label = {"dtype": str(dtype), "classes": classes}
        teachers, weights, tau = torch.empty(3, 4, classes, dtype=dtype), torch.ones(3, 4, dtype=wide), torch.ones(3)
        for kind, grads in itertools.product(range(3), (False, True)):
            compiled.clear()
            student = teachers[:1].contiguous()
            into = (torch.empty_like(student), torch.empty_like(teachers)) if grads else (None, None)
            loss, kl = torch.empty(4, dtype=wide), torch.empty(3, 4, dtype=wide)
            distill.multi_teacher_kl(loss, kl, *into, student, teachers, weights, tau.to(wide), 0, kind)
            found += [{**label, "kind": kind, "grads": grads, **describe(kernel)} for kernel in compiled]
        compiled.clear()
        distill.fold_teachers(torch.empty(4, classes, dtype=wide), teachers, weights, tau.to(wide))
        y, logits = torch.arange(4), torch.empty(4, classes, dtype=dtype)
        for kind in range(5):
            labels = torch.empty(4, classes, dtype=wide) if kind == 4 else y
            correct, loss = torch.empty(4, dtype=torch.bool), torch.empty(4, dtype=wide)
            losses.attack_loss(loss, correct, torch.empty_like(logits), logits, labels, y if kind == 3 else None, kind)
        found += [{**label, **describe(kernel)} for kernel in compiled]
    return found


def attention_report() -> list[dict]:
    """Widths of ViT-B/32 and ViT-L/14, streams in the usual types, with and without gradients of anchor and norm."""
    found = []
    for dtype, width in itertools.product((FLOAT, torch.bfloat16, DOUBLE), (768, 1024)):
        wide = DOUBLE if dtype == DOUBLE else FLOAT
        stream, rows, vector = torch.empty(8, 50, width, dtype=dtype), torch.empty(8, 50, dtype=wide), torch.ones(width)
        vector, anchor, mix = vector.to(wide), torch.empty(50, width, dtype=wide), torch.ones(2, dtype=wide)
        compiled.clear()
        attention.anchored_residual(stream, stream, rows, rows, stream, stream, anchor, mix, vector, vector, 1e-5)
        sums = torch.empty(attention.part_count(8, 50), 50, width, dtype=wide)
        products = sums[..., 0].contiguous()
        for into in ((None,) * 4, (sums, None, None, None), (sums, products, sums, sums)):
            o = None if into[1] is None else stream
            attention.anchored_residual_backward(stream, *into, stream, stream, stream, o, rows, rows, vector)
        found += [{"dtype": str(dtype), "width": width, **describe(kernel)} for kernel in compiled]
    return found


def iterates_report() -> list[dict]:
    """APGD and momentum steps, kept rows and the L1 projection, for the usual types."""
    found = []
    for (dtype, grad_dtype), n in itertools.product(CORE, (IMAGENET, ODD)):
        compiled.clear()
        x_prev, x_adv, x = torch.empty((3, 2, n), dtype=dtype)
        grad, size, rows = torch.empty((2, n), dtype=grad_dtype), torch.ones(2, dtype=dtype), torch.ones(2).bool()
        iterates.apgd_step(x_prev, x_adv, grad, x, size, size, 0.75, 0.0, 1.0, rows)
        for kind in (0, 1):
            iterates.momentum_step(x_adv, x_prev, grad, x, size, size, 0.9, kind, 0.0, 1.0, rows)
        iterates.keep_best(x_prev, x_adv, rows)
        l1.l1_project(x_prev, x_adv, x, size, 0.0, 1.0)
        l1.sparse_step(x_prev, x_adv, grad, size, torch.zeros(2, dtype=torch.int64))
        found += [{"dtype": str(dtype), "grad": str(grad_dtype), "n": n, **describe(kernel)} for kernel in compiled]
    return found


def fused_report() -> list[dict]:
    return step_report(steps.linf_step, FLOAT, FLOAT, IMAGENET, False, True, True)


def seeds_report() -> list[str]:
    """Names of the kernels that calls with changing numbers have compiled, one for each variant."""
    x, ids = torch.zeros(2, 48), torch.arange(2)
    for seed, stream in itertools.product((0, 1, 16, -3, 2**31, 2**40, 2**63 - 1), (0, 1, 16, 2**32 - 1)):
        for eps in (0.0, 0.5):
            steps.uniform_start(torch.empty_like(x), x, torch.full((1,), eps), ids, seed, 0.0, 1.0, stream)
    for alpha in (0.0, 1.0, 0.3):
        size = torch.full((1,), alpha)
        steps.linf_step(torch.empty_like(x), x, x, x, size, size, 0.0, 1.0, None, 0.0)
    return sorted(name for name, _ in {(kernel.metadata.name, kernel.hash) for kernel in compiled})


if __name__ == "__main__":
    driver.set_active(target)
    JITFunction.run = compile_only
    what, found = sys.argv[1], []
    reports = {
        "core": lambda: report(False),
        "full": lambda: report(True),
        "fused": fused_report,
        "seeds": seeds_report,
        "rows": rows_report,
        "iterates": iterates_report,
        "attention": attention_report,
    }
    for target.arch in map(int, sys.argv[2:]):
        found.extend(reports[what]())
    json.dump(found, sys.stdout)
