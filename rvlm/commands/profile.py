"""profile: where the time goes."""

import copy
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rvlm import profiling
from rvlm.arguments import ProfileArgs
from rvlm.commands import phases
from rvlm.commands.shared import device_of, load_model
from rvlm.plugins import from_file

__all__ = ["profile"]


def profile(args: ProfileArgs) -> int:
    from rvlm.data import load_data

    whats = {"train": _profile_train, "attack": _profile_attack, "eval": _profile_eval, "infer": _profile_infer}
    if args.what not in whats:
        raise ValueError(f"cannot profile {args.what!r}: expected {', '.join(whats)}")
    if args.twin is not None and args.what != "train":
        raise ValueError("--twin is another training loop: it goes with profile train")
    if args.defended is not None and args.what != "infer":
        raise ValueError("--defended are models beside --model: it goes with profile infer")
    if args.engine != "auto" and args.what != "attack":
        raise ValueError("--engine goes with profile attack")
    if args.precision != "fp32" and args.what not in ("attack", "eval"):
        raise ValueError("--precision is the attack's: it goes with profile attack and eval")
    if args.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {args.batch_size}")
    for name, ends in (("trace", (".json", ".json.gz")), ("flame", (".html",))):
        file = getattr(args, name)
        if file is not None and args.what == "infer":
            raise ValueError(f"--{name} goes with profile train, attack and eval")
        if file is not None and not file.endswith(ends):
            raise ValueError(f"--{name} {file}: expected a file that ends in {' or '.join(ends)}")
    data = load_data(args.data, "train" if args.what == "train" else "test", size=args.size, limit=args.limit)
    return whats[args.what](args, data)


def _profile_train(args: ProfileArgs, data) -> int:
    """Phases of one epoch of each stage; with a twin, images per second of both, timed in turn."""
    from rvlm import ops
    from rvlm.methods import build_method
    from rvlm.models import load_clip
    from rvlm.training import train as run_training

    twin = None if args.twin is None else from_file(args.twin)
    device = device_of(args.device)
    clip = load_clip(args.model, device)
    config = build_method(args.method, args.preset).config

    def epochs(some):
        with profiling.phase("setup"):
            student, method = copy.deepcopy(clip), build_method(args.method, args.preset)
        whole = method.stages
        method.stages = lambda: [dataclasses.replace(stage, length=1) for stage in whole()]
        return run_training(student, some, method, progress=False)

    build_method(args.method, args.preset).setup(copy.deepcopy(clip), data)  # what is made at first use
    batch = data.subset(torch.arange(min(config.batch_size, len(data))), "the first batch")
    with ops.use_backend("reference"), profiling.record(device, flops=True) as counted:
        epochs(batch)
    found = phases.measure(args, device, lambda: epochs(data).images, counted, config.precision)
    found |= phases.trace(args, device, lambda: epochs(batch))
    if twin is not None:
        epoch = twin(build_method(args.method, args.preset), clip, data)
        found["twin"] = _against(lambda: epochs(data), epoch, 3 if args.rounds is None else args.rounds, device)
    return phases.show(args, found)


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
    """Phases of the stages of an attack, each on all images, which are in memory."""
    from rvlm.attacks.stages import parse_attack, usable

    eps = args.eps.check(args.norm)
    stages = parse_attack(args.attack, args.norm)
    device = device_of(args.device)
    model = load_model(args.model, device, data)
    stages, refused = usable(stages, len(data.class_names))
    for sentence in refused:
        print(f"NOT PROFILED {sentence}", file=sys.stderr)
    batches = [tuple(t.to(device) for t in data.batch(rows)) for rows in torch.arange(len(data)).split(args.batch_size)]

    def work(some: Sequence[tuple[Tensor, ...]]) -> int:
        for stage in stages:
            for x, y, index in some:
                generator = torch.Generator().manual_seed(stage.restart)
                with profiling.phase(stage.name, len(x)):
                    stage(
                        model, x, y, eps=float(eps), norm=args.norm, generator=generator, sample_ids=index,
                        precision=None if args.precision == "fp32" else args.precision, engine=args.engine,
                    )  # fmt: skip
        return len(data)

    counted = phases.count(model, batches[0][0])
    work([tuple(t[: phases.FEW] for t in batches[0])])
    found = phases.measure(args, device, lambda: work(batches), counted, args.precision)
    found |= phases.trace(args, device, lambda: work(batches[:1]))
    return phases.show(args, found)


def _profile_eval(args: ProfileArgs, data) -> int:
    """Phases of an evaluation as `rvlm eval` makes it, whose record goes to a folder that is thrown away."""
    from rvlm.evaluation import evaluate, parse_attack, write_evaluation

    eps = args.eps.check(args.norm)
    parse_attack(args.attack, args.norm)
    device = device_of(args.device)
    model = load_model(args.model, device, data)

    def work(some) -> int:
        found = evaluate(
            model, some, attack=args.attack, eps=eps, norm=args.norm, precision=args.precision,
            batch_size=args.batch_size, device=device, progress=False,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, profiling.phase("records", len(some)):
            write_evaluation(folder, args.model, found, some, model)
        return len(some)

    counted = phases.count(model, data.batch(slice(0, phases.FEW))[0].to(device))
    work(data.subset(torch.arange(min(phases.FEW, len(data))), "the first few"))
    found = phases.measure(args, device, lambda: work(data), counted, args.precision)
    batch = data.subset(torch.arange(min(args.batch_size, len(data))), "the first batch")
    found |= phases.trace(args, device, lambda: work(batch))
    return phases.show(args, found)


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
    found = {"rows": rows, "data": data.name, "pixels": list(x.shape[-2:]), "env": environment()}
    if not phases.as_json(args, found):
        print(latency_table(rows))
    return 0
