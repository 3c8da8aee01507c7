"""What `rvlm profile` says of a piece of work: phases, floating-point operations, memory, a trace.

Everything runs more than once: before the clock starts, on little, which is what is slow only once and what operations
are counted on (counting slows down); then timed, with nothing but the phases; and, where a trace is asked for, on one
batch under torch.profiler, which slows down too.
"""

import gzip
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rvlm import profiling
from rvlm.arguments import ProfileArgs
from rvlm.commands.peak import peak_of

__all__ = ["as_json", "count", "measure", "show", "trace"]

FEW = 8  # images that are enough to count
TOP, WIDE = 10, 60  # ops that are listed, and how much of their names
SETUP, STEP = "setup", ("step",)
MODEL, BOTH = ("forward", "backward", "model"), "model"  # which an engine makes of forward and backward pass


def count(model: Callable[[Tensor], Tensor], x: Tensor) -> profiling.Recording:
    """Counts the operations of a forward pass and of the gradient with respect to the pixels."""
    from rvlm import ops
    from rvlm.attacks.contract import untouched

    leaf = x[:FEW].clone().requires_grad_()
    with untouched(model), ops.use_backend("reference"), profiling.record(x.device, flops=True) as counted:
        with profiling.phase("forward", len(leaf)):
            logits = model(leaf)
        if logits.requires_grad:  # else it is for attacks without gradients
            with profiling.phase("backward", len(leaf)):
                torch.autograd.grad(logits.sum(), leaf)
    return counted


def measure(
    args: ProfileArgs,
    device: torch.device,
    work: Callable[[], int],
    counted: profiling.Recording,
    precision: str = "fp32",
) -> dict[str, Any]:
    """What was found: seconds, phases, operations and what they are of the device's peak, memory.

    Args:
        args: of the command.
        device: that `work` runs on.
        work: what is measured; returns how many images it was for. A phase "setup" in it counts in no rate.
        counted: a recording with flops: of every phase as many an image as there.
        precision: of the matrix products, for the peak; of a cascade that of its search.
    """
    from rvlm.evaluation.records import environment

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with profiling.record(device) as recording:
        images = work()
    spans, per_image = recording.spans(), _per_image(counted.spans())
    if any(span.name == BOTH for span in spans):
        per_image[BOTH] = per_image["forward"] + per_image["backward"]
    phases = _rows(spans, per_image)
    whole = phases[0]
    seconds = whole["seconds"] - sum(row["seconds"] for row in phases if row["path"] == [SETUP])
    found = {
        "what": args.what, "model": args.model, "clock": "CUDA events" if on_gpu else "wall clock",
        "seconds": whole["seconds"], "images": images, "images_per_s": images / seconds, "phases": phases,
        "memory": {
            "peak_bytes": profiling.memory_peak(device),
            "of": "tensors on the device" if on_gpu else "this process at its largest, Python and libraries included",
        },
        "env": environment(),
    }  # fmt: skip
    if args.what != "train":  # whose passes have other names
        for share, names in (("model_share", MODEL), ("step_share", STEP)):
            found[share] = sum(row["seconds"] for row in phases[1:] if row["path"][-1] in names) / whole["seconds"]
    if whole["flops"]:
        peak, rate = peak_of(device, {"cascade": "bf16"}.get(precision, precision)), whole["flops"] / seconds
        busy = whole["flops"] / sum(row["seconds"] for row in phases[1:] if row["path"][-1] in per_image)
        found["flops"] = {
            "per_image": per_image, "total": whole["flops"], "per_s": rate, "per_s_in_model": busy,
            "peak_per_s": peak.flops_per_s, "precision": peak.precision, "peak_source": peak.source,
            "utilisation": rate / peak.flops_per_s, "utilisation_in_model": busy / peak.flops_per_s,
        }  # fmt: skip
    return found


def _per_image(spans: list[profiling.Span]) -> dict[str, float]:
    """Operations an image of every phase that has no other inside it, by name."""
    outer = {span.path[:-1] for span in spans if span.path}
    sums: dict[str, tuple[int, int]] = {}
    for span in spans:
        if span.path not in outer and span.images and span.flops:
            flops, images = sums.get(span.name, (0, 0))
            sums[span.name] = (flops + span.flops, images + span.images)
    return {name: flops / images for name, (flops, images) in sums.items()}


def _rows(spans: list[profiling.Span], per_image: dict[str, float]) -> list[dict[str, Any]]:
    """Spans for JSON. A phase with others inside it did what they did."""
    flops: dict[tuple[str, ...], int] = {}
    for span in reversed(spans):  # which come after those that they are inside
        inside = [done for path, done in flops.items() if path[:-1] == span.path]
        flops[span.path] = sum(inside) if inside else round(per_image.get(span.name, 0) * span.images)
    return [
        {
            "path": list(span.path), "seconds": span.seconds, "own": span.own, "calls": span.calls,
            "images": span.images, "flops": flops[span.path] or None,
        }
        for span in spans
    ]  # fmt: skip


def trace(args: ProfileArgs, device: torch.device, work: Callable[[], Any]) -> dict[str, Any]:
    """Writes the trace and the flame chart, if one was asked for; "ops" are those that took longest by themselves."""
    from torch.profiler import ProfilerActivity

    from rvlm.files import write_bytes
    from rvlm.report import frames, write_flame

    if args.trace is None and args.flame is None:
        return {}
    on_gpu = device.type == "cuda"
    if not on_gpu:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it calls it an error that there is no GPU
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as seen, profiling.record(device, ranges=True):
        work()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(file))
        content = file.read_bytes()
    if args.trace is not None:
        write_bytes(args.trace, gzip.compress(content) if args.trace.endswith(".gz") else content)
    if args.flame is not None:
        intro = f"rvlm profile {args.what} on {args.model}: one batch, under torch.profiler, which slows it down."
        write_flame(args.flame, f"Where the time of {args.what} goes", intro, frames(json.loads(content)))
    # What ran on a GPU has rows of its own beside those of the ops that asked for it.
    where, own = ("CUDA", "self_device_time_total") if on_gpu else ("CPU", "self_cpu_time_total")
    ran = [op for op in seen.key_averages() if op.device_type.name == where and not op.is_user_annotation]
    spent = [(getattr(op, own) / 1e6, op.key, op.count) for op in ran]
    whole = sum(seconds for seconds, _, _ in spent)
    return {
        "ops": [
            {"name": name, "seconds": seconds, "share": seconds / whole, "calls": calls}
            for seconds, name, calls in sorted(spent, reverse=True)[:TOP]
        ]
    }


def as_json(args: ProfileArgs, found: dict[str, Any]) -> bool:
    """Prints JSON, which is then all that is printed, or writes it, as --json says."""
    from rvlm.evaluation.records import write_json

    if isinstance(args.json, str):
        write_json(args.json, found)
    elif args.json:
        print(json.dumps(found, indent=1))
    return args.json is True


def show(args: ProfileArgs, found: dict[str, Any]) -> int:
    """Prints what was found, as --json says."""
    from rvlm.report import markdown, phase_table

    if as_json(args, found):
        return 0
    print(phase_table(found["phases"], found["images"], found["images_per_s"]))
    once = " Rates of the whole are those without setup." if found["phases"][1]["path"] == [SETUP] else ""
    print(f"\nSeconds by {found['clock']}. Images are counted as often as they go through a phase.{once}")
    if "flops" in found:
        _show_flops(found["flops"])
    if (peak := found["memory"]["peak_bytes"]) is not None:
        print(f"Peak memory {peak / 2**20:.0f} MB: {found['memory']['of']}.")
    if "model_share" in found:
        model, step = found["model_share"], found["step_share"]
        print(
            f"The model's passes are {model:.1%} of the time, the attack's own arithmetic {step:.1%}. Without any "
            f"cost, that would make it {1 / (1 - step):.2f}x as fast, and all that is not the model {1 / model:.2f}x."
        )
    if twin := found.get("twin"):
        print(
            f"{twin['images_per_s']:.0f} images/s, {args.twin} {twin['twin_images_per_s']:.0f}: {twin['ratio']:.2f}x "
            f"({twin['ratio_min']:.2f} to {twin['ratio_max']:.2f} in {twin['rounds']} pairs)"
        )
    if top := found.get("ops"):
        rows = [
            {"name": op["name"][:WIDE], "ms": f"{1e3 * op['seconds']:.2f}", "share": f"{op['share']:.1%}",
             "calls": str(op["calls"])}
            for op in top
        ]  # fmt: skip
        print("\nOps (on a GPU, kernels) of one batch by their own time, under torch.profiler\n")
        print(markdown(rows, {"name": "op", "ms": "ms", "share": "share", "calls": "calls"}))
        if args.trace is not None:
            print(f"{args.trace}: open it in https://ui.perfetto.dev or chrome://tracing")
    return 0


def _show_flops(flops: dict[str, Any]) -> None:
    each = ", ".join(f"{name} {count / 1e9:.3g}" for name, count in flops["per_image"].items())
    print(f"GFLOP an image (products of matrices and convolutions): {each}.")
    print(
        f"{flops['per_s'] / 1e9:.3g} GFLOP/s over the whole and {flops['per_s_in_model'] / 1e9:.3g} in these phases: "
        f"{flops['utilisation']:.1%} and {flops['utilisation_in_model']:.1%} of a peak of "
        f"{flops['peak_per_s'] / 1e9:.4g} in {flops['precision']} ({flops['peak_source']})."
    )
