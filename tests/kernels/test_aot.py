"""Compiles every kernel for GPUs that need not be there, and looks at the machine code: registers, spills, wide loads.

It says nothing about results or speed; those need the GPU itself.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

REPORT = Path(__file__).with_name("aot_report.py")

# 64 registers at 8 warps keep 32 warps on an SM of compute capability 8.0 or 9.0; 32 keep all 64.
REGISTERS = {
    ("_linf_step_kernel", "torch.float32"): 48,
    ("_linf_step_kernel", "torch.float64"): 64,
    ("_l2_sums_kernel", "torch.float32"): 64,
    ("_l2_sums_kernel", "torch.float64"): 64,
    ("_l2_apply_kernel", "torch.float32"): 80,
    ("_l2_apply_kernel", "torch.float64"): 96,
    ("_uniform_start_kernel", "torch.float32"): 32,
    ("_uniform_start_kernel", "torch.float64"): 40,
}
# Loads of one number: active, alpha, eps, three sums, the sample id. All others are loads of pixels.
SINGLE_LOADS = {"_linf_step_kernel": 3, "_l2_sums_kernel": 1, "_l2_apply_kernel": 6, "_uniform_start_kernel": 2}
PRODUCTS_OF_PHILOX = 20  # ten rounds of two, for four pixels


def aot_report(tmp_path, *arguments: str) -> list:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # empty: a cached kernel would hide a broken compiler
    # Triton warns of a number that its type cannot hold, a shift by more bits than there are among them.
    command = [sys.executable, "-W", "error:Value", str(REPORT), *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    return aot_report(tmp_path_factory.mktemp("triton"), "core", "90")


def count(kernel: dict, *starts: str) -> int:
    return sum(number for name, number in kernel["ptx"].items() if name.startswith(starts))


def check(kernels: list[dict]) -> None:
    assert {kernel["kernel"] for kernel in kernels} == set(SINGLE_LOADS)
    for kernel in kernels:
        name, label = kernel["kernel"], {key: value for key, value in kernel.items() if key != "ptx"}
        assert kernel["stack"] == kernel["local"] == 0, f"spilled registers: {label}"
        assert kernel["reg"] <= REGISTERS[name, kernel["dtype"]], f"too many registers: {label}"
        assert not fused(kernel), f"fused products and sums: {label}"
        assert not count(kernel, "div.full", "div.approx", "rcp", "sqrt.approx", "ex2"), f"approximate: {label}"
        check_loads(kernel, label)


def check_loads(kernel: dict, label: dict) -> None:
    name, single = kernel["kernel"], count(kernel, "ld.global.b")
    wide = count(kernel, "ld.global.v4.b32", "ld.global.v2.b64")
    if kernel["n"] % 16 == 0:
        # Eight (in the sums: four) pixels of each of three images (in the start: one) per thread, 16 bytes at a time.
        assert wide and single <= SINGLE_LOADS[name], f"pixels are loaded one by one: {label}, {kernel['ptx']}"
        narrower = count(kernel, "ld.global") - wide - single
        sixteen_bit = kernel.get("grad") in ("torch.float16", "torch.bfloat16")
        assert narrower == (name == "_l2_sums_kernel" and sixteen_bit), f"loads under 16 bytes: {label}"
        if name != "_l2_sums_kernel":
            assert count(kernel, "st.global") == count(kernel, "st.global.v4.b32", "st.global.v2.b64"), label
    else:
        assert not wide, f"row starts are not aligned to 16 bytes: {label}"


def fused(kernel: dict) -> list[str]:
    """Instructions that multiply and add with one rounding."""
    return [name for name in kernel["ptx"] if name.startswith(("fma", "mad")) and name.endswith(("f32", "f64"))]


both_archs = pytest.mark.parametrize("arch", ["90", pytest.param("80", marks=pytest.mark.slow)])


def test_usual_variants_for_hopper(core):
    assert len(core) == 12 * 3 + 4
    check(core)


def test_plain_linf_step_is_lean(core):
    for kernel in core:
        plain = kernel["kernel"] == "_linf_step_kernel" and kernel["dtype"] == kernel["grad"] == "torch.float32"
        if plain and kernel["n"] % 16 == 0:
            assert kernel["shared"] == 0 and kernel["reg"] <= 40
            assert count(kernel, "ld.global.v4.b32") == 6 and count(kernel, "st.global.v4.b32") == 2


def test_quantized_pixels_are_divided_exactly(core):
    for kernel in core:
        if kernel["kernel"] in ("_linf_step_kernel", "_l2_apply_kernel"):
            bits = kernel["dtype"][-2:]
            assert (count(kernel, f"div.rn.f{bits}") >= 8) == kernel["quantize"]


def test_four_pixels_share_one_draw(core):
    for kernel in core:
        if kernel["kernel"] == "_uniform_start_kernel":
            assert count(kernel, "mul.hi.u32", "mul.wide.u32") <= 2 * PRODUCTS_OF_PHILOX + 4


@pytest.mark.slow  # half a minute of compiling
@pytest.mark.parametrize("arch", ["90", "80"])
def test_rows_of_logits_fit_in_registers(tmp_path, arch):
    kernels = aot_report(tmp_path, "rows", arch)
    assert {kernel["kernel"] for kernel in kernels} == {
        "_multi_teacher_kl_kernel", "_fold_teachers_kernel", "_attack_loss_kernel"}  # fmt: skip
    assert len(kernels) == 9 * (6 + 1 + 5)
    for kernel in kernels:
        label = {key: value for key, value in kernel.items() if key != "ptx"}
        double = kernel["dtype"] == "torch.float64"  # for gradient checks; a few words of stack do no harm there
        # Of js on sm_80, and of divergences on both by Triton 3.6, there is a frame of up to 16 bytes, without a spill.
        assert kernel["stack"] <= 16 and kernel["local"] == 0, f"spilled registers: {label}"
        assert kernel["reg"] <= (255 if double else 128), f"too many registers: {label}"


@pytest.mark.slow
@both_archs
def test_steps_that_look_back_and_those_in_l1_are_lean(tmp_path, arch):
    kernels = aot_report(tmp_path, "iterates", arch)
    l1 = [f"_l1_{part}_kernel" for part in ("bracket", "largest", "lengths", "shrink", "sums")]
    sparse = ["_select_digit_kernel", "_select_histogram_kernel", "_sparse_step_kernel"]
    names = ["_apgd_step_kernel", "_keep_best_kernel", *l1, "_momentum_step_kernel", *sparse]
    assert sorted({kernel["kernel"] for kernel in kernels}) == names
    for kernel in kernels:
        label = {key: value for key, value in kernel.items() if key != "ptx"}
        assert kernel["stack"] == kernel["local"] == 0, f"spilled registers: {label}"
        assert kernel["reg"] <= (104 if kernel["dtype"] == "torch.float64" else 80), f"too many registers: {label}"
        assert not fused(kernel), f"fused products and sums: {label}"
        wide = count(kernel, "ld.global.v4.b32", "ld.global.v2.b64", "ld.global.v2.b32")
        if kernel["kernel"] in ("_l1_bracket_kernel", "_l1_lengths_kernel", *sparse[:2]):
            continue  # sums of few numbers, and arithmetic on one pixel a thread
        assert bool(wide) == (kernel["n"] % 16 == 0), f"loads under 16 bytes, or rows that are not aligned: {label}"


@both_archs
def test_the_joint_of_an_anchor_is_lean(tmp_path, arch):
    kernels = aot_report(tmp_path, "attention", arch)
    assert len(kernels) == 6 * 4
    for kernel in kernels:
        label = {key: value for key, value in kernel.items() if key != "ptx"}
        assert kernel["stack"] == kernel["local"] == 0, f"spilled registers: {label}"
        assert kernel["reg"] <= (224 if kernel["dtype"] == "torch.float64" else 96), f"too many registers: {label}"
        assert count(kernel, "ld.global.v"), f"rows are loaded one by one: {label}"


def test_fusion_would_be_seen(tmp_path):
    (kernel,) = aot_report(tmp_path, "fused", "90")
    assert fused(kernel)
    with pytest.raises(AssertionError, match="fused"):
        check([kernel, *({**kernel, "kernel": name} for name in SINGLE_LOADS)])


def test_changing_numbers_do_not_compile_again(tmp_path):
    assert aot_report(tmp_path, "seeds", "90") == ["_linf_step_kernel", "_uniform_start_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
def test_all_variants(tmp_path, arch):
    kernels = aot_report(tmp_path, "full", arch)
    assert len(kernels) == 4 * 2 * 2 * 4 * 3 + 8
    check(kernels)
