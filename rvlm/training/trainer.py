"""The training loop of all methods.

Per batch: craft x_adv on the raw frozen student (no gradient of the attack reaches a parameter), one forward of the
student on what the method asks for, its loss, one optimiser step. The learning rate is set before the step.
"""

import contextlib
import dataclasses
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from rvlm import profiling
from rvlm.attacks import pgd
from rvlm.data import Data
from rvlm.methods import Batch, Method
from rvlm.methods.base import Stage
from rvlm.models import Clip

__all__ = ["TrainResult", "train"]


@dataclasses.dataclass
class TrainResult:
    """What a run leaves: the student (eval mode, trained in place), a log row per epoch, seconds, images seen."""

    student: Clip
    history: list[dict[str, float]]
    seconds: float
    images: int


def train(
    student: Clip,
    data: Data,
    method: Method,
    *,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> TrainResult:
    """Trains `student` in place.

    For a fixed seed, machine and number of threads the result is the same to the last bit.

    Args:
        student: the CLIP to train, on the device to train on.
        data: training split.
        method: what to train; see `rvlm.methods.build_method`.
        seed: of the order of samples and of the attack's noise.
        out: folder for `metrics.jsonl` (a row per epoch) and `checkpoint/`; None writes nothing.
        progress: show a bar with running accuracy and images/s.

    Raises:
        FloatingPointError: the loss is NaN or infinite; names step and samples.
    """
    if not len(data):
        raise ValueError(f"{data.name} has no samples to train on")
    method.setup(student, data)
    history: list[dict[str, float]] = []
    images, began = 0, time.perf_counter()
    log = _Log(None if out is None else Path(out))
    for number, stage in enumerate(method.stages()):
        optimizer = _optimizer(stage, method)
        per_epoch = -(-len(data) // method.config.batch_size)
        with _bar(progress, stage.length * per_epoch, method.name) as bar:
            for epoch in range(stage.length):
                means = _Means()
                for k, rows in enumerate(_batches(len(data), method.config.batch_size, seed, number, epoch)):
                    step = epoch * per_epoch + k
                    factor = stage.schedule(step, stage.length * per_epoch)
                    for group in optimizer.param_groups:
                        group["lr"] = factor * method.config.lr * group.get("lr_scale", 1.0)
                    batch = Batch(*(t.to(student.device) for t in data.batch(rows)))
                    values = _step(student, method, optimizer, batch, _mix(seed, number, step))
                    means.add(values, len(rows))
                    images += len(rows)
                    bar.update()
                    bar.set_postfix(means.shown(images / (time.perf_counter() - began)), refresh=False)
                history.append({"stage": number, "epoch": epoch, **means.values()})
                log.write(history[-1])
    student.eval().requires_grad_(False)
    if out is not None:
        student.save(Path(out) / "checkpoint")
    return TrainResult(student, history, time.perf_counter() - began, images)


def _step(student: Clip, method: Method, optimizer, batch: Batch, noise_seed: int) -> dict[str, float]:
    x_adv = None
    if method.inputs in ("adv", "both"):
        config, attack_loss = method.config, method.attack(batch)
        with profiling.phase("attack"):
            x_adv = pgd(
                student.encode_pixels,
                batch.x,
                loss=lambda embedding, _: attack_loss(embedding),
                eps=config.eps,
                alpha=config.alpha,
                steps=config.steps,
                random_start=config.random_start,
                generator=torch.Generator().manual_seed(noise_seed),
                sample_ids=batch.index,
            )
    student.train()
    with profiling.phase("student"):
        out_adv, out_clean = _forward(student, method.inputs, x_adv, batch.x)
        losses = method.loss(out_adv, out_clean, batch)
        optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
    values = dict(zip(losses, torch.stack([v.detach().float() for v in losses.values()]).tolist(), strict=True))
    if not abs(values["total"]) < float("inf"):
        raise FloatingPointError(
            f"the loss is {values['total']} for samples {batch.index.tolist()}; the model was not updated. "
            "Lower the learning rate, clip gradients (clip_grad), or look at these images."
        )
    if method.config.clip_grad is not None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, method.config.clip_grad)
    with profiling.phase("optimizer"):
        optimizer.step()
    return values


def _forward(student: Clip, inputs: str, x_adv: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if inputs == "adv":
        return student(x_adv), None
    if inputs == "clean":
        return None, student(x)
    return student(torch.cat([x_adv, x])).chunk(2)


def _optimizer(stage: Stage, method: Method) -> torch.optim.Optimizer:
    config = method.config
    if config.optimizer == "sgd":
        return torch.optim.SGD(stage.param_groups, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    return torch.optim.AdamW(stage.param_groups, lr=config.lr, weight_decay=config.weight_decay)


def _batches(n: int, size: int, seed: int, stage: int, epoch: int) -> tuple[Tensor, ...]:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(_mix(seed, stage, -1 - epoch)))
    return order.split(size)


def _mix(seed: int, stage: int, step: int) -> int:
    """One 63-bit seed from three numbers, different for each (a multiplicative hash)."""
    value = 0
    for part in (seed, stage, step):
        value = ((value ^ (part & 0xFFFFFFFF)) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & 0x7FFFFFFFFFFFFFFF
        value ^= value >> 29
    return value


class _Means:
    """Running means over an epoch, weighted by batch size."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, values: dict[str, float], n: int) -> None:
        self.count += n
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * n

    def values(self) -> dict[str, float]:
        return {"loss" if name == "total" else name: total / self.count for name, total in self.sums.items()}

    def shown(self, speed: float) -> dict[str, str]:
        values = {n: f"{v:.1%}" if n.endswith("_acc") else f"{v:.3f}" for n, v in self.values().items()}
        return values | {"img/s": f"{speed:.0f}"}


class _Log:
    """metrics.jsonl, a line per epoch; nothing without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self.file = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = folder / "metrics.jsonl"
            self.file.write_text("")

    def write(self, row: dict[str, float]) -> None:
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def _bar(shown: bool, total: int, title: str):
    from tqdm import tqdm

    with tqdm(total=total, desc=title, disable=not shown, unit="step", mininterval=0.5) as bar:
        yield bar
