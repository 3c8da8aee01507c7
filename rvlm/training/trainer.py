"""The training loop of all methods.

Per batch: craft x_adv on the raw frozen student (no gradient of the attack reaches a parameter), one forward of the
student on what the method asks for, its loss, one optimiser step. The learning rate is set before the step. With
`accumulate` this is done for parts of the batch, whose gradients add up, before the step.

Under torchrun every process takes every n-th sample of a batch; one reduction a step (DistributedDataParallel) makes
the gradient that of the whole batch. The attack runs on the module inside the wrapper. Towers that are too large for a
device are cut up instead (`rvlm.training.sharding`), and reduced block by block.

A run with a folder writes its state at every epoch and, with one process, once a minute; a run that was killed goes on
there and ends, on one device, with the same bits.
"""

import contextlib
import dataclasses
import functools
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from rvlm import profiling
from rvlm.attacks import mifgsm, pgd
from rvlm.data import Data
from rvlm.evaluation import evaluate
from rvlm.files import write_bytes
from rvlm.methods import Batch, Method, lora
from rvlm.methods.base import Stage, mixed
from rvlm.models import Clip, ZeroShotClassifier
from rvlm.models.weights import settings_of, weights_sha
from rvlm.plugins import file_sha
from rvlm.ranks import Ranks, placed_like, whole
from rvlm.training.sharding import Sharded
from rvlm.units import Eps

__all__ = ["TrainResult", "check_training", "train"]

STATE = "state.pt"
PARALLEL = ("ddp", "fsdp")
SAVE_SECONDS = 60.0


@dataclasses.dataclass
class TrainResult:
    """What a run leaves: the student (eval mode, trained in place), a log row per epoch, seconds, images seen.

    `checks` is what the method says of itself (see `Method.checks`).
    `setup_seconds` is what this call spent before the first step: loading teachers (a model of the zoo is trained at
    first use), their rows of clean images and offline adversarial images where no cache has them, class embeddings.
    `seconds` holds none of it.
    """

    student: Clip
    history: list[dict[str, float]]
    seconds: float
    images: int
    setup_seconds: float = 0.0
    checks: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Progress:
    """Where a run is: the next batch of an epoch of a stage, and what is known so far."""

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    images: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    count: int = 0
    best: float = -1.0


def train(
    student: Clip,
    data: Data,
    method: Method,
    *,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
    validation: Data | None = None,
    validation_attack: str = "pgd-10",
    parallel: str = "ddp",
    tensorboard: bool = False,
    ranks: Ranks | None = None,
) -> TrainResult:
    """Trains `student` in place.

    For a fixed seed, machine and number of threads the result is the same to the last bit, also if the run was killed
    and called again with the same arguments and folder.

    Args:
        student: the CLIP to train, on the device to train on.
        data: training split.
        method: what to train; see `rvlm.methods.build_method`.
        seed: of the order of samples and of the attack's noise.
        out: folder for `metrics.jsonl` (a row per epoch), `checkpoint/` (and, by their names, a method's `others`) and,
            until the run has ended, `state.pt`; None writes nothing. In a process group (see `rvlm.ranks`) the first
            process writes; the last batch of an epoch is left out if it has fewer samples than there are processes.
        progress: show a bar with running accuracy and images/s.
        validation: held-out samples; after every epoch clean and robust accuracy on them (white-box, the method's eps)
            are added to the log as val_clean and val_robust, and the student with the best val_robust so far is kept
            in `best/`. Use samples that the final evaluation does not.
        validation_attack: see `rvlm.attacks.stages`.
        parallel: what several processes do: "ddp", each holds the whole student, or "fsdp", each holds a slice of the
            vision tower, its gradients and its optimiser state. With one process there is no difference.
        tensorboard: also write the rows of the log to `out`/tensorboard, over images (needs the package tensorboard).
        ranks: the processes that train together; None is the group that there is.

    Raises:
        FloatingPointError: the loss is NaN or infinite; names step and samples. Weights and images are written to
            `out`/failed.pt (each process has its own), to be looked at.
        ValueError: no data, a folder with the state of another run, or settings that exclude each other.
    """
    if not len(data):
        raise ValueError(f"{data.name} has no samples to train on")
    if tensorboard and out is None:
        raise ValueError("tensorboard=True needs a folder: pass out")
    check_training(method, parallel, tensorboard)
    ranks = ranks or Ranks()
    if method.config.batch_size < ranks.size:
        raise ValueError(f"batch_size={method.config.batch_size} is less than the {ranks.size} processes")
    out = None if out is None else Path(out)
    key = _key(student, data, method, seed, validation)
    device = student.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_mix(seed, 0, -(2**20)))  # for what draws from torch's own generator: low-rank starts
        began = time.perf_counter()
        bare = student.adapter is None
        try:
            with profiling.phase("setup"):
                with ranks.first_before_others():  # what the first writes to caches, the others find
                    method.setup(student, data)
                method.prepare(ranks)
        except BaseException:
            if bare and student.adapter is not None:
                student.adapter.detach(student)
            raise
        setup_seconds = time.perf_counter() - began
        if student.adapter is not None and any(p.requires_grad for p in student.model.parameters()):
            raise ValueError(f"{method.name} trains weights of {student.name}, which has an adapter: start without it")
        if out is not None and student.config is None and student.adapter is None:
            raise ValueError(
                f"{student.name} has no open_clip config, so it could not be saved once it is trained: rvlm convert "
                "makes an open_clip model of a CLIPModel"
            )
        try:
            run = _Run(student, data, method, seed, out, key, ranks, parallel)
            if tensorboard and ranks.first:
                run.board = _board()(str(out / "tensorboard"), purge_step=run.at.images + 1)
            if validation is not None:
                templates, eps = method.training_templates(validation), method.config.eps
                run.validate = lambda clip: _accuracies(clip, validation, templates, validation_attack, eps)
            for number in range(run.at.stage, len(run.stages)):
                run.stage(number, progress and ranks.first)
            run.end()
        finally:
            method.finish()
    student.eval().requires_grad_(False)
    seconds, history = run.seconds(), run.at.history
    if out is not None and ranks.first:
        student.save(out / "checkpoint")
        for name, other in method.others.items():
            other.save(out / name)
        (out / STATE).unlink(missing_ok=True)
    return TrainResult(student, history, seconds, run.at.images, setup_seconds, method.checks(data, history))


class _Run:
    """One run, as far as it has come."""

    def __init__(self, student, data, method, seed, out, key, ranks, parallel) -> None:
        self.student, self.data, self.method, self.seed = student, data, method, seed
        self.out, self.key, self.ranks = out, key, ranks
        self.at, self.optimizer, self.average = _Progress(), None, {}
        self.validate: Callable[[Clip], dict[str, float]] | None = None
        self.board = None
        several = ranks.size > 1 and any(p.requires_grad for p in student.parameters())
        self.sharded = Sharded(student) if several and parallel == "fsdp" else None
        self.forward: nn.Module = student
        if several and self.sharded is None:
            self.forward = DistributedDataParallel(student)
        self.stages = method.stages()  # now that the weights are what an optimiser will hold
        self.scaler = torch.amp.GradScaler(student.device.type, enabled=method.config.precision == "fp16")
        self.began = self.saved = time.perf_counter()
        if out is not None and (out / STATE).is_file():
            self._restore()
        elif out is not None and ranks.first:
            _write_log(out, [])

    def seconds(self) -> float:
        return self.at.seconds + time.perf_counter() - self.began

    def stage(self, number: int, progress: bool) -> None:
        stage, config, at = self.stages[number], self.method.config, self.at
        if self.optimizer is None:
            self.optimizer = _optimizer(stage, self.method)
            self.average = {}
        per_epoch = -(-len(self.data) // config.batch_size)
        peak = config.lr if stage.lr is None else stage.lr
        title = f"{self.method.name} {stage.name}".strip()
        with _bar(progress, stage.length * per_epoch, title, at.epoch * per_epoch + at.batch) as bar:
            for epoch in range(at.epoch, stage.length):
                if at.batch == 0 and stage.on_epoch_start is not None:
                    stage.on_epoch_start(epoch)
                order = _order(len(self.data), self.seed, number, epoch).split(config.batch_size)
                for rows in order[at.batch :]:
                    step = epoch * per_epoch + at.batch
                    factor = stage.schedule(step, stage.length * per_epoch)
                    for group in self.optimizer.param_groups:
                        group["lr"] = factor * peak
                    if len(rows) >= self.ranks.size:  # else the last few samples, fewer than processes
                        self._step(rows, _mix(self.seed, number, step))
                        self._follow()
                    at.batch += 1
                    bar.update()
                    bar.set_postfix(_shown(at, at.images / self.seconds()), refresh=False)
                    if self.ranks.size == 1 and time.perf_counter() - self.saved > SAVE_SECONDS:
                        self.save()  # several processes save together, at the ends of epochs
                if stage.on_epoch_end is not None:
                    stage.on_epoch_end(epoch)
                self._end_epoch(number, epoch, stage)
                self.save()
        self.student.load_state_dict(self.average, strict=False)  # the next stage begins with what this one would keep
        at.stage, at.epoch, at.batch, self.optimizer = number + 1, 0, 0, None

    def _end_epoch(self, number: int, epoch: int, stage: Stage) -> None:
        at, sums, count = self.at, {}, 0
        self._agree()
        for theirs, samples in self.ranks.gather((at.sums, at.count)):
            count += samples
            for name, value in theirs.items():
                sums[name] = sums.get(name, 0.0) + value
        row = {"stage": number, "epoch": epoch, **({"name": stage.name} if stage.name else {}), **_means(sums, count)}
        if self.validate is not None:
            with self._kept() as student:
                row |= self.validate(student)
                better = stage.defends and row["val_robust"] > at.best
                if self.out is not None and self.ranks.first and better:
                    student.save(self.out / "best", lora.plain_state(student.model))
            at.best = row["val_robust"] if better else at.best
        at.history.append(row)
        at.epoch, at.batch, at.sums, at.count = epoch + 1, 0, {}, 0
        if self.out is not None and self.ranks.first:
            _write_log(self.out, at.history)
        if self.board is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, at.images)
            self.board.flush()

    def _agree(self) -> None:
        """Makes the buffers of all processes the first one's: statistics of batch norm are each process's own."""
        if self.ranks.size > 1:
            for buffer in self.student.buffers():
                distributed.broadcast(buffer, src=0)

    def _step(self, rows: Tensor, noise_seed: int) -> None:
        config, size = self.method.config, self.ranks.size
        mine = rows[self.ranks.rank :: size]
        parts = mine.tensor_split(min(config.accumulate, len(rows) // size))  # as many in all processes
        self.optimizer.zero_grad(set_to_none=True)
        for k, part in enumerate(parts):
            with self._reducing(k + 1 == len(parts)):
                self._part(part, len(rows), noise_seed)
        if config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            for group in self.optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], config.clip_grad)
        with profiling.phase("optimizer", len(mine)):
            self.scaler.step(self.optimizer)  # leaves a step with infinite gradients out
            self.scaler.update()
        self.at.count += len(mine)
        self.at.images += len(rows)

    def _part(self, mine: Tensor, count: int, noise_seed: int) -> None:
        """Adds the gradient of some of a step's samples."""
        student, method = self.student, self.method
        batch = Batch(*(t.to(student.device) for t in self.data.batch(mine)), count=count)
        student.train(method.trains_tower)
        if method.inputs in ("adv", "both"):
            with profiling.phase("attack", len(mine)), parametrize.cached():
                made = method.adversary(batch)
                batch.x_adv = _craft(student, method, batch, noise_seed, self.scaler) if made is None else made
        precision = method.config.precision
        with profiling.phase("student forward", len(mine)), parametrize.cached(), mixed(student, precision):
            outputs = _forward(self.forward, method, batch)
        with profiling.phase("loss and teachers", len(mine)), parametrize.cached():
            losses = method.loss(*(None if o is None else o.float() for o in outputs), batch)
        values = dict(zip(losses, torch.stack([v.detach().float() for v in losses.values()]).tolist(), strict=True))
        if not abs(values["total"]) < float("inf"):
            raise FloatingPointError(
                f"the loss is {values['total']} for samples {batch.index.tolist()} at epoch {self.at.epoch}, step "
                f"{self.at.batch}; the model was not updated. Lower the learning rate, clip gradients (clip_grad), or "
                f"look at these images{self._keep_failed(batch, values)}."
            )
        with profiling.phase("student backward", len(mine)):
            # Wrappers average over processes, and the shares of all are to be added up.
            self.scaler.scale(losses["total"] * self.ranks.size).backward()
        values["total"] *= count / len(mine)
        for name, value in values.items():
            self.at.sums[name] = self.at.sums.get(name, 0.0) + value * len(mine)

    def _keep_failed(self, batch: Batch, values: dict[str, float]) -> str:
        """Writes what led to a loss that is no number; where, for the message."""
        if self.out is None or self.sharded is not None:
            return ""
        name = "failed.pt" if self.ranks.first else f"failed-{self.ranks.rank}.pt"
        buffer = io.BytesIO()
        batch = {"x": batch.x, "y": batch.y, "index": batch.index, "x_adv": batch.x_adv}
        torch.save({"student": self.student.state_dict(), "batch": batch, "losses": values}, buffer)
        return f", which are in {write_bytes(self.out / name, buffer.getvalue())} with the weights"

    def _reducing(self, on: bool) -> contextlib.AbstractContextManager:
        """A backward pass that exchanges gradients, or keeps them to be added to. Slices are always exchanged: whole
        gradients between parts would need the memory that slicing is to save."""
        wrapped = self.forward is not self.student
        return self.forward.no_sync() if wrapped and not on else contextlib.nullcontext()

    def _follow(self) -> None:
        """Moves the average of the weights."""
        decay = self.method.config.ema
        if not decay:
            return
        learning = {name for name, p in self.student.named_parameters() if p.requires_grad}
        learning |= {name for name, b in self.student.named_buffers() if b.is_floating_point()}
        weights = {name: t for name, t in self.student.state_dict().items() if name in learning}
        if not self.average:
            self.average = {name: t.clone() for name, t in weights.items()}
        for name, t in weights.items():
            self.average[name].lerp_(t, 1 - decay)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[Clip]:
        """The student as it would be kept if the run ended now, in eval mode: averaged and whole."""
        student, tower = self.student, self.student.model.visual
        training = {name: t.clone() for name, t in student.state_dict().items()} if self.average else {}
        try:
            if self.average:
                student.load_state_dict(self.average, strict=False)
            if self.sharded is not None:
                student.model.visual = self.sharded.whole_tower()
            student.eval()
            yield student
        finally:
            student.model.visual = tower
            if training:
                student.load_state_dict(training)

    def end(self) -> None:
        """Makes the student what is kept."""
        with self._kept() as student:
            tower, weights = student.model.visual, {name: t.clone() for name, t in student.state_dict().items()}
        self.student.model.visual = tower
        self.student.load_state_dict(weights)
        if self.board is not None:
            self.board.close()

    def save(self) -> None:
        """Everything that the rest of the run depends on, in one file that is replaced as a whole."""
        self.saved = time.perf_counter()
        if self.out is None:
            return
        # Sums over the epoch so far are each process's own; all of them are needed to go on.
        progress = self.ranks.gather(dataclasses.asdict(self.at) | {"seconds": self.seconds()})
        student, optimizer = self.student.state_dict(), self.optimizer and self.optimizer.state_dict()
        if self.sharded is not None:
            student, optimizer = self.sharded.state(self.optimizer)
        average, method = whole(self.average), whole(self.method.state())
        if not self.ranks.first:
            return
        buffer = io.BytesIO()
        torch.save(
            {
                "key": self.key,
                "progress": progress,
                "student": student,
                "optimizer": optimizer,
                "average": average,
                "scaler": self.scaler.state_dict(),
                "method": method,
                "random": torch.get_rng_state(),
            },
            buffer,
        )
        write_bytes(self.out / STATE, buffer.getvalue())

    def _restore(self) -> None:
        path = self.out / STATE
        try:
            device = "cpu" if self.sharded is not None else self.student.device  # whole states may not fit there
            state = torch.load(path, map_location=device, weights_only=True)
            theirs = state["key"]
        except Exception as error:
            raise ValueError(f"{path} is no state of a run ({error}): remove it to begin anew") from None
        differ = [name for name in self.key | theirs if self.key.get(name) != theirs.get(name)]
        if differ:
            what = "; ".join(f"{name} was {theirs.get(name)!r}, is {self.key.get(name)!r}" for name in differ)
            raise ValueError(f"{path} belongs to another run ({what}): remove it, or write elsewhere")
        parts = state["progress"]
        if len(parts) != self.ranks.size and parts[0]["batch"]:
            raise ValueError(f"{path} stopped inside an epoch of one process: go on with one, not {self.ranks.size}")
        self.at = _Progress(**parts[self.ranks.rank % len(parts)])
        if self.at.stage < len(self.stages) and state["optimizer"] is not None:
            self.optimizer = _optimizer(self.stages[self.at.stage], self.method)
        if self.sharded is not None:
            self.sharded.load(state["student"], self.optimizer, state["optimizer"])
        else:
            self.student.load_state_dict(state["student"])
            if self.optimizer is not None:
                self.optimizer.load_state_dict(state["optimizer"])
        self.method.restore(state["method"])
        weights = self.student.state_dict()
        self.average = {name: placed_like(t, weights[name]) for name, t in state["average"].items()}
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"].cpu())


def _craft(student: Clip, method: Method, batch: Batch, noise_seed: int, scaler: torch.amp.GradScaler) -> Tensor:
    """The inner attack of a method, on the raw student."""
    config, attack_loss = method.config, method.attack(batch)

    def raised(embedding: Tensor, _: None) -> Tensor:
        with torch.autocast(student.device.type, enabled=False):
            loss = attack_loss(embedding.float())
        # Directions do not feel a factor, but in 16 bits gradients without one are 0. The scaler's fits a step's mean.
        return scaler.scale(loss) / (batch.count or len(loss)) if scaler.is_enabled() else loss

    given = {
        "loss": raised, "eps": config.eps, "steps": config.steps, "random_start": config.random_start,
        "sample_ids": batch.index, "generator": torch.Generator().manual_seed(noise_seed), "alpha": config.alpha,
    }  # fmt: skip
    model = functools.partial(student.encode_pixels, unit_norm=method.unit_norm)
    with mixed(student, config.precision):
        if config.momentum:
            return mifgsm(model, batch.x, mu=config.momentum, velocity="sign", **given)
        return pgd(model, batch.x, **given)


def _forward(student: nn.Module, method: Method, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    """Embeddings of adversarial and of clean images, in one pass."""
    if method.inputs == "none":
        if not isinstance(student, Clip):
            student(batch.x[:1], method.unit_norm)  # a wrapper exchanges gradients once it was called, with anything
        return None, None
    if method.inputs == "adv":
        return student(batch.x_adv, method.unit_norm), None
    if method.inputs == "clean":
        return None, student(batch.x, method.unit_norm)
    return student(torch.cat([batch.x_adv, batch.x]), method.unit_norm).chunk(2)


def _accuracies(student: Clip, data: Data, templates: list[str], attack: str, eps: Eps) -> dict[str, float]:
    classifier = ZeroShotClassifier(student, data.class_names, templates)
    found = evaluate(classifier, data, attack=attack, eps=eps, device=student.device, progress=False)
    return {"val_clean": found.clean, "val_robust": found.robust}


def _optimizer(stage: Stage, method: Method) -> torch.optim.Optimizer:
    config = method.config
    if config.optimizer == "sgd":
        return torch.optim.SGD(stage.param_groups, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    return torch.optim.AdamW(stage.param_groups, lr=config.lr, weight_decay=config.weight_decay)


def check_training(method: Method, parallel: str, tensorboard: bool) -> None:
    """Refuses what `train` would refuse, before anything is loaded."""
    if parallel not in PARALLEL:
        raise ValueError(f"parallel must be one of {', '.join(PARALLEL)}, got {parallel!r}")
    if parallel == "fsdp" and method.config.precision == "fp16":
        raise ValueError("precision fp16 cannot be sharded: use bf16, or ddp")
    if tensorboard:
        _board()


def _board() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError('tensorboard=True needs the package tensorboard: pip install "rvlm[tensorboard]"') from None
    return SummaryWriter


def _key(student: Clip, data: Data, method: Method, seed: int, validation: Data | None) -> dict[str, Any]:
    """What decides a run, for the state file."""
    return {
        "method": method.name, **{name: _described(value) for name, value in vars(method.config).items()},
        "method_file": file_sha(type(method)), "data_file": data.file_sha, "data": data.fingerprint,
        "validation": validation and validation.fingerprint, "seed": seed, "student": weights_sha(student),
        "settings": json.dumps(settings_of(student)),
    }  # fmt: skip


def _described(setting: Any) -> str:
    """A setting as text that is the same in the next process: models by their weights, functions by their names."""
    if isinstance(setting, list | tuple):
        return str([_described(each) for each in setting])
    if isinstance(setting, nn.Module):
        return f"{weights_sha(setting)} {json.dumps(settings_of(setting))}"
    return getattr(setting, "__qualname__", str(setting)) if callable(setting) else str(setting)


def _order(n: int, seed: int, stage: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(_mix(seed, stage, -1 - epoch)))


def _mix(seed: int, stage: int, step: int) -> int:
    """One 63-bit seed from three numbers, different for each (a multiplicative hash)."""
    value = 0
    for part in (seed, stage, step):
        value = ((value ^ (part & 0xFFFFFFFF)) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & 0x7FFFFFFFFFFFFFFF
        value ^= value >> 29
    return value


def _means(sums: dict[str, float], count: int) -> dict[str, float]:
    """Means over an epoch, weighted by batch size."""
    return {"loss" if name == "total" else name: total / count for name, total in sums.items()}


def _shown(at: _Progress, speed: float) -> dict[str, str]:
    values = _means(at.sums, max(at.count, 1))
    shown = {n: f"{v:.1%}" if n.endswith("_acc") else f"{v:.3f}" for n, v in values.items()}
    return shown | {"img/s": f"{speed:.0f}"}


def _write_log(folder: Path, history: list[dict[str, float]]) -> None:
    """metrics.jsonl, a line per epoch."""
    write_bytes(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history).encode())


@contextlib.contextmanager
def _bar(shown: bool, total: int, title: str, already: int):
    from tqdm import tqdm

    with tqdm(total=total, initial=already, desc=title, disable=not shown, unit="step", mininterval=0.5) as bar:
        yield bar
