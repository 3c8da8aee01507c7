"""Whole attacks on CLIPs of full size with random weights: what each gain is worth, apart, with memory and verdicts.

    python bench/clips.py --out FILE.json [--models ViT-B-32,ViT-B-16,ViT-L-14] [--batches 1,16,128,512] [--seconds 300]

In a cell, an attack on a model at a batch size, these take turns, A B C A B C; ratios are taken within a turn:

    torchattacks             fp32, as it comes (`apgd` and `autoattack`: its parts in a row)
    torchattacks bf16        the same under autocast
    rvlm                     against torchattacks in fp32: kernels, and scheduling where samples may leave
    rvlm bf16                against torchattacks in bf16, and against rvlm in fp32: precision
    rvlm graph bf16          against rvlm bf16: PGD alone, small batches, CUDA devices
    rvlm compile bf16        against rvlm bf16: PGD-10 alone, one batch size, since compiling takes longer than the rest

The labels are the model's predictions, and the radius, of its own for every model, is the largest of RADII that leaves
at least half of 16 images with their labels under PGD-10 in fp32, so that attacks that end early have work and verdicts
say something; the least one if none does. Images that an attack leaves robust are counted in fp32. `verdicts_differing`
is between a variant and its peer, image by image.

The first call of everybody is not timed: it is where compilers work, and where memory and images are looked at. Cells
go from cheap to dear. One that would not end in the time that its model has left, judged by one step, is left out and
listed, as is what does not fit in memory. The file is written after every cell.
"""

import argparse
import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from conftest import versions
from measure import QUICK, quartiles, seconds_per_call, synchronize
from peers.autoattack import torchattacks_parts
from peers.pgd import torchattacks_pgd
from torch import Tensor, nn

from rvlm.attacks import autoattack, pgd, scoring
from rvlm.evaluation.records import environment
from rvlm.models import ZeroShotClassifier, load_clip
from rvlm.profiling import peak_bytes

MODELS = ["tiny-vit"] if QUICK else ["ViT-B-32", "ViT-B-16", "ViT-L-14"]
BATCHES = [2] if QUICK else [1, 16, 128, 512]
RADII = [scale / 255 for scale in (8, 4, 2, 1, 0.5, 0.25, 0.125, 0.0625)]
CLASSES = 10 if QUICK else 100
# Passes of an image that nothing fools, there and back; and the largest batch that is asked for.
ATTACKS = {"pgd-10": (10, 512), "pgd-100": (100, 128), "apgd": (60, 128), "autoattack": (120, 16)}
WHOLE = {"apgd-ce": 10, "apgd-t": 5, "fab-t": 3, "square": 50}  # steps, queries; apgd-t and fab-t for nine classes
if QUICK:
    del ATTACKS["pgd-100"]
COMPILED = {2} if QUICK else {128}
GRAPHED = 2 if QUICK else 16
MOST_ROUNDS = 2 if QUICK else 10
CALLS = 5  # a cell lasts about as long as so many fp32 attacks: both sides untimed and timed, and those in bf16
NO_TIME, NO_MEMORY = "no time left, would take", "does not fit in memory"


def of_kind(kind: str) -> dict[str, int]:
    """The parts of `apgd` or `autoattack`."""
    return dict(list(WHOLE.items())[: 2 if kind == "apgd" else None])


def ours(attack: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, **changed) -> Tensor:
    kind, _, steps = attack.partition("-")
    if kind == "pgd":
        return pgd(model, x, y, eps=eps, steps=int(steps), random_start=False, **changed)
    draws = torch.Generator().manual_seed(0)
    stages = [f"{name}-{n}" for name, n in of_kind(kind).items()]
    return autoattack(model, x, y, eps=eps, version="custom", attacks=stages, generator=draws, **changed)


def theirs(attack: str, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    kind, _, steps = attack.partition("-")
    if kind == "pgd":
        settings = {"eps": eps, "alpha": 2.5 * eps / int(steps), "steps": int(steps), "random_start": False}
        return torchattacks_pgd(model, **settings)(x, y)
    with contextlib.redirect_stdout(None):
        return torchattacks_parts(model, eps, of_kind(kind))(x, y)


def in_bf16(attack: Callable, device: torch.device, *args) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16):
        return attack(*args)


def variants(attack: str, batch: int, device: torch.device) -> dict[str, tuple[Callable, dict[str, str]]]:
    """name -> (attack, {peer: gain})."""
    mine, other = partial(ours, attack), partial(theirs, attack)
    found = {
        "torchattacks": (other, {}),
        "torchattacks bf16": (partial(in_bf16, other, device), {"torchattacks": "precision"}),
        "rvlm": (mine, {"torchattacks": "kernels and scheduling, fp32"}),
        "rvlm bf16": (
            partial(mine, precision="bf16"),
            {
                "torchattacks bf16": "kernels and scheduling, bf16",
                "rvlm": "precision",
                "torchattacks": "all of it but the compiler",
            },
        ),
    }
    if attack.startswith("pgd") and batch <= GRAPHED and device.type == "cuda":
        found["rvlm graph bf16"] = partial(mine, precision="bf16", engine="cudagraph"), {"rvlm bf16": "graph"}
    if attack == "pgd-10" and batch in COMPILED:
        gains = {"rvlm bf16": "compiler", "torchattacks": "all of it"}
        found["rvlm compile bf16"] = partial(mine, precision="bf16", engine="compile"), gains
    return found


class Cell:
    """One attack on one model at one batch size."""

    def __init__(self, name: str, model: nn.Module, attack: str, x: Tensor, y: Tensor, eps: float) -> None:
        self.case = f"{attack} {name} B={len(x)} eps={eps * 255:g}/255"
        self.model, self.x, self.y, self.eps = model, x, y, eps
        self.variants = variants(attack, len(x), x.device)

    def measure(self, seconds: float, failed: dict[str, str]) -> list[dict]:
        """Rows as bench/report.py reads them, in about so many seconds. failed: case and variant -> why, filled."""
        fooled, peaks = {}, {}
        for name in self.variants:
            try:
                peaks[name] = peak_bytes(lambda name=name: fooled.update({name: self._fooled(name)}), self.x.device)
            except Exception as error:  # of a peer, too: the others go on
                failed[f"{self.case}, {name}"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                del error
                forget()
        times, began = {name: [] for name in peaks}, time.perf_counter()
        while times and len(next(iter(times.values()))) < MOST_ROUNDS:
            for name, mine in times.items():
                synchronize(self.x.device)
                start = time.perf_counter()
                self._attack(name)
                synchronize(self.x.device)
                mine.append(time.perf_counter() - start)
            if time.perf_counter() - began > seconds:
                break
        rows = []
        for name in times:
            peers = {peer: gain for peer, gain in self.variants[name][1].items() if peer in times} or {name: "itself"}
            rows += [self._row(name, peer, gain, times, fooled, peaks) for peer, gain in peers.items()]
        return rows

    def _attack(self, name: str) -> Tensor:
        return self.variants[name][0](self.model, self.x, self.y, self.eps)

    def _fooled(self, name: str) -> Tensor:
        x_adv = self._attack(name)
        over = (x_adv - self.x).abs().max().item() - self.eps
        assert over <= 1e-6, f"{over} beyond the radius"
        with scoring(self.model):
            return torch.cat([self.model(part).argmax(1) for part in x_adv.split(64)]) != self.y

    def _row(self, name: str, peer: str, gain: str, times: dict, fooled: dict, peaks: dict) -> dict:
        low, median, high = quartiles(times[name])
        return {
            "case": self.case, "impl": name, "peer": peer, "gain": gain, "us_per_call": median * 1e6,
            "us_per_call_iqr": (high - low) * 1e6, "peer_us_per_call": quartiles(times[peer])[1] * 1e6,
            "speedup": quartiles([b / a for a, b in zip(times[name], times[peer], strict=True)]),
            "images_per_s": len(self.x) / median, "peak_mib": peaks[name] / 2**20, "images": len(self.x),
            "robust": int((~fooled[name]).sum()), "verdicts_differing": int((fooled[name] != fooled[peer]).sum()),
            "rounds": len(times[name]),
        }  # fmt: skip


def radius(model: nn.Module, x: Tensor, y: Tensor) -> float:
    for eps in RADII:
        if pgd(model, x, y, eps=eps, random_start=False, return_info=True).success.float().mean() <= 0.5:
            break
    return eps


def step_seconds(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return seconds_per_call(lambda: pgd(model, x, y, eps=RADII[0], steps=1, random_start=False), x.device, calls=1)


def forget() -> None:
    """Memory of what has failed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(args: argparse.Namespace, write: Callable[[list[dict], dict[str, str]], None]) -> dict[str, str]:
    device, ends, rows, failed = torch.device(args.device), time.monotonic() + args.seconds, [], {}
    for number, name in enumerate(args.models):
        mine = time.monotonic() + (ends - time.monotonic()) / (len(args.models) - number)
        torch.manual_seed(0)
        model = ZeroShotClassifier(load_clip(name, device), [f"class {i}" for i in range(CLASSES)]).to(device).eval()
        x = torch.rand(max(args.batches), 3, model.clip.size, model.clip.size, device=device)
        with scoring(model):
            y = torch.cat([model(part).argmax(1) for part in x.split(64)])
        eps = radius(model, x[:16], y[:16])
        cells = [
            (n * batch, n, a, batch) for a, (n, most) in ATTACKS.items() for batch in args.batches if batch <= most
        ]
        for _, passes, attack, batch in sorted(cells):
            case, part, began = f"{attack} {name} B={batch}", (x[:batch], y[:batch]), time.monotonic()
            try:
                needs = CALLS * passes * step_seconds(model, *part)
            except torch.OutOfMemoryError:
                failed[case] = NO_MEMORY
                forget()
                continue
            if needs > mine - began:
                failed[case] = f"{NO_TIME}: {needs:.0f} s"
                continue
            rows += Cell(name, model, attack, *part, eps).measure(min((mine - began) / 8, 15), failed)
            print(f"{case}: {time.monotonic() - began:.0f} s", flush=True)
            write(rows, failed)
        write(rows, failed)
        model = x = part = None  # their memory, before the next model
        forget()
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--models", type=lambda text: text.split(","), default=MODELS)
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=BATCHES)
    parser.add_argument("--seconds", type=float, default=300, help="in all; each model has the same share of the rest")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    commit = {"id": environment()["git"]}

    def write(rows: list[dict], failed: dict[str, str]) -> None:
        benchmarks = [
            {
                "fullname": f"clips.py::{row['case']}::{row['impl']}::{row['peer']}",
                "group": "clips",
                "stats": {"rounds": row["rounds"]},
                "extra_info": row,
            }
            for row in rows
        ]
        found = {"machine_info": {"rvlm": versions()}, "commit_info": commit}
        found |= {"benchmarks": benchmarks, "left_out": failed}
        args.out.write_text(json.dumps(found, indent=1) + "\n")

    failed = measure(args, write)
    for case, why in failed.items():
        print(f"left out: {case}: {why}")
    excused = (NO_TIME, NO_MEMORY, "OutOfMemoryError", "ModuleNotFoundError")
    return int(not all(why.startswith(excused) for why in failed.values()))


if __name__ == "__main__":
    sys.exit(main())
