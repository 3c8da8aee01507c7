"""profile: where the time goes."""

import copy
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from rvlm.arguments import ProfileArgs
from rvlm.commands.shared import device_of, load_model
from rvlm.plugins import from_file

__all__ = ["profile"]


def profile(args: ProfileArgs) -> int:
    from rvlm.data import load_data

    whats = {"train": _profile_train, "attack": _profile_attack, "infer": _profile_infer}
    if args.what not in whats:
        raise ValueError(f"cannot profile {args.what!r}: expected {', '.join(whats)}")
    if args.twin is not None and args.what != "train":
        raise ValueError("--twin is another training loop: it goes with profile train")
    if args.defended is not None and args.what != "infer":
        raise ValueError("--defended are models beside --model: it goes with profile infer")
    data = load_data(args.data, "train" if args.what == "train" else "test", size=args.size, limit=args.limit)
    return whats[args.what](args, data)


def _profile_train(args: ProfileArgs, data) -> int:
    """Phases of one epoch of each stage; with a twin, images per second of both, timed in turn."""
    from rvlm import profiling
    from rvlm.methods import build_method
    from rvlm.models import load_clip
    from rvlm.training import train as run_training

    twin = None if args.twin is None else from_file(args.twin)
    device = device_of(args.device)
    clip = load_clip(args.model, device)

    def work():
        method = build_method(args.method, args.preset)
        whole = method.stages
        method.stages = lambda: [dataclasses.replace(stage, length=1) for stage in whole()]
        return run_training(copy.deepcopy(clip), data, method, progress=False)

    build_method(args.method, args.preset).setup(copy.deepcopy(clip), data)  # what is made at first use
    with profiling.record(device) as timer:
        result = work()
    speed = result.images / result.seconds
    found = {"seconds": result.seconds, "images_per_s": speed, "phases": timer.totals()}
    if twin is not None:
        epoch = twin(build_method(args.method, args.preset), clip, data)
        found["twin"] = _against(work, epoch, 3 if args.rounds is None else args.rounds, device)
    return _show_profile(args, found, result.images)


def _against(work, epoch: Callable[[], int], rounds: int, device: torch.device) -> dict[str, float]:
    """Images per second of our epochs (without their setup) and of the twin's, and the ratio, as medians of pairs."""
    epoch()  # what is slow once
    pairs = []
    for _ in range(max(1, rounds)):
        result = work()
        began = time.perf_counter()
        images = epoch()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        pairs.append((result.images / result.seconds, images / (time.perf_counter() - began)))
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "images_per_s": ours, "twin_images_per_s": theirs, "ratio": statistics.median(ratios),
        "ratio_min": ratios[0], "ratio_max": ratios[-1], "rounds": len(pairs),
    }  # fmt: skip


def _profile_attack(args: ProfileArgs, data) -> int:
    from rvlm import profiling
    from rvlm.attacks import pgd
    from rvlm.evaluation import evaluate, parse_attack
    from rvlm.models import ZeroShotClassifier, load_clip

    parse_attack(args.attack)
    device = device_of(args.device)
    classifier = ZeroShotClassifier(load_clip(args.model, device), data.class_names, data.template)
    x, y, _ = (t.to(device) for t in data.batch(slice(0, 1)))
    pgd(classifier, x, y, steps=1)  # what is slow once
    began = time.perf_counter()
    with profiling.record(device) as timer:
        evaluate(classifier, data, attack=args.attack, eps="8/255", device=device, progress=False)
    phases, seconds = timer.totals(), time.perf_counter() - began
    found = {"seconds": seconds, "images_per_s": len(data) / seconds, "phases": phases}
    for share, names in (("model_share", ("forward", "backward")), ("step_share", ("step",))):
        found[share] = sum(phases[name][0] for name in names if name in phases) / seconds
    return _show_profile(args, found, len(data))


def _profile_infer(args: ProfileArgs, data) -> int:
    """Forward passes of the plain model and of defended ones, in pairs."""
    from rvlm.commands import infer
    from rvlm.evaluation.records import environment
    from rvlm.report import latency_table

    try:
        batch_sizes = [int(size) for size in args.batch_sizes.split(",")]
    except ValueError:
        raise ValueError(f"batch_sizes must be whole numbers separated by commas, got {args.batch_sizes!r}") from None
    names = [args.model, *(name.strip() for name in (args.defended or "").split(",") if name.strip())]
    if len(set(names)) < len(names):
        raise ValueError(f"name every model once, got {', '.join(names)}")
    device = device_of(args.device)
    models = {name: load_model(name, device, data) for name in names}
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch writes to stderr whenever its profiler starts or stops
    x = data.batch(slice(0, max(batch_sizes)))[0].to(device)
    rows = infer.measure(models, x, len(data.class_names), batch_sizes, 20 if args.rounds is None else args.rounds)
    if args.json:
        print(
            json.dumps({"rows": rows, "data": data.name, "pixels": list(x.shape[-2:]), "env": environment()}, indent=1)
        )
    else:
        print(latency_table(rows))
    return 0


def _show_profile(args: ProfileArgs, found: dict[str, Any], images: int) -> int:
    from rvlm.report import phase_table

    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print(phase_table(found["phases"], found["seconds"], images))
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
    return 0
