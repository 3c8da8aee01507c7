"""What a training method is to the trainer.

A method says which parameters learn, what the inner attack raises, and what is minimised. It never runs a loop, moves
data or saves files: `rvlm.training` does that for all of them.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from rvlm.data import Data
from rvlm.models import Clip
from rvlm.models.zero_shot import text_head
from rvlm.plugins import from_file, is_own
from rvlm.ranks import Ranks
from rvlm.units import Eps

__all__ = [
    "Batch", "Method", "MethodConfig", "Stage", "VisionMethod", "accuracy", "build_method", "judged", "list_methods",
    "method_class", "mixed", "register", "warmup_cosine",
]  # fmt: skip


@dataclasses.dataclass
class Batch:
    """One batch of a process: clean pixels x [B, 3, H, W] in [0, 1], labels y [B], sample numbers index [B].

    Attributes:
        count: samples of all processes' batches together; None means this one's.
        x_adv: adversarial images, once they are crafted.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    count: int | None = None
    x_adv: Tensor | None = None

    def mean(self, values: Tensor) -> Tensor:
        """This process's share of the mean over the whole batch: the shares of all processes add up to it."""
        return values.sum() / (self.count or len(self.y))


@dataclasses.dataclass
class Stage:
    """A stretch of training with its own parameters and schedule.

    Attributes:
        length: epochs.
        param_groups: as torch optimisers take them.
        schedule: (step, steps in the stage) -> factor on the learning rate, set before the step (0-based).
        name: for logs.
        lr: peak learning rate; None means the config's.
        on_epoch_start, on_epoch_end: called with the number of the epoch in the stage; they may change weights.
        defends: whether the student becomes what is to be kept, and may be the best so far; not where it stands in for
            a teacher.
    """

    length: int
    param_groups: list[dict[str, Any]]
    schedule: Callable[[int, int], float]
    name: str = ""
    lr: float | None = None
    on_epoch_start: Callable[[int], None] | None = None
    on_epoch_end: Callable[[int], None] | None = None
    defends: bool = True


@dataclasses.dataclass(kw_only=True)
class MethodConfig:
    """Settings that every method has; the sources of the presets are in the method's file."""

    epochs: int = 10
    """Passes over the training data."""
    batch_size: int = 128
    """Images a step, of all processes together."""
    accumulate: int = 1
    """Parts that a step's images are cut into to save memory; their gradients add up to that of the whole. Batch norm,
    dropout, the shares of mmt_ard's mtard and the context that apt's adversary perturbed moves see each part (and each
    process's) by itself."""
    optimizer: str = "adamw"
    """adamw or sgd (momentum 0.9)."""
    lr: float = 1e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled for adamw."""
    warmup_steps: int = 0
    """Linear warm-up; a cosine to 0 follows."""
    clip_grad: float | None = None
    """Largest norm of the gradient of each group of parameters (a student and a teacher that both learn are two), or
    None."""
    ema: float = 0.0
    """Decay per step of an average of the weights, which is then what is validated and kept; 0 keeps the weights. It
    starts anew with each stage, which begins from the average of the stage before."""
    eps: Eps = Eps("4/255")
    """Radius of the inner attack in pixel units (Linf)."""
    alpha: float | None = None
    """Its step size; None is the attack's default."""
    steps: int = 2
    """Its number of steps."""
    random_start: bool = True
    """Whether it starts from noise."""
    momentum: float = 0.0
    """Decay of the attack's velocity of signs (RobustVLM's PGD, 0.9 there), or 0 for plain PGD."""
    precision: str = "fp32"
    """fp32, or bf16 or fp16: vision tower and attack under autocast; weights, images, text and losses stay fp32. Under
    fp16 the losses of step and attack are scaled, so that small gradients do not vanish."""
    teacher_precision: str = "auto"
    """fp32 or bf16; auto is bf16 on a GPU and where the student has it."""
    templates: str = "auto"
    """Id of the prompt templates for the training classes; auto takes the data set's own."""

    def __post_init__(self) -> None:
        self.eps = Eps(self.eps)
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer must be adamw or sgd, got {self.optimizer!r}")
        self.eps.check("linf")
        self.one_of(precision=("fp32", "bf16", "fp16"), teacher_precision=("auto", "fp32", "bf16"))
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        self.at_least(1, "epochs", "batch_size", "steps", "accumulate")

    def one_of(self, **allowed: tuple[str, ...]) -> None:
        """Refuses a setting that is none of the words allowed for it."""
        for name, words in allowed.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, got {getattr(self, name)!r}")

    def at_least(self, least: float, *names: str) -> None:
        """Refuses settings below a bound; those that are None are left alone."""
        for name in names:
            if getattr(self, name) is not None and not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def positive(self, *names: str) -> None:
        """Refuses settings that are 0 or less; those that are None are left alone."""
        for name in names:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def from_noise(self, what: str) -> None:
        """Refuses an attack on a divergence from the model's own output that starts where it has no slope."""
        if not self.random_start:
            raise ValueError(f"{what} has no slope at the clean image: random_start must be True")


class Method:
    """Base of all methods. The order of calls: setup, prepare, stages, then per batch attack and loss."""

    name: ClassVar[str]
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {"rvlm": {}}
    inputs: ClassVar[str] = "adv"
    """Which images go through the student: "adv", "clean", "both" (one forward on their concatenation), or "none"."""
    trains_tower: ClassVar[bool] = True
    """Whether batch norm and dropout run as they do in training; a frozen tower stays as it is."""
    unit_norm: ClassVar[bool] = True
    """Whether embeddings are divided by their length, as CLIP's logits need them."""
    undefended: Clip | None = None
    """After setup, for defences that are to be measured by transfer too: the model that images are made on."""
    others: dict[str, Clip]
    """After finish: models beside the student that are worth keeping, by name."""

    def __init__(self, config: MethodConfig) -> None:
        self.config = config
        self.others = {}

    def setup(self, student: Clip, data: Data) -> None:
        """Freezes what does not learn and computes what stays fixed. Called once; of several processes the first one
        calls it before the others, who find what it has cached."""
        raise NotImplementedError

    def prepare(self, ranks: Ranks) -> None:
        """What all processes do together before the first step. Called once, after `setup`."""

    def stages(self) -> list[Stage]:
        raise NotImplementedError

    def attack(self, batch: Batch) -> Callable[[Tensor], Tensor] | None:
        """The loss that the inner PGD raises, embeddings [B, D] -> [B]; None without adversarial images."""
        return None

    def adversary(self, batch: Batch) -> Tensor | None:
        """Adversarial images [B, 3, H, W] that do not depend on the student as it is now; None crafts them."""
        return None

    def loss(self, out_adv: Tensor | None, out_clean: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        """From embeddings [B, D] to {"total": scalar to minimise, anything else worth a log}.

        The total is this process's share (see `Batch.mean`), the rest are means over its samples. "clean_acc" and
        "robust_acc" are shown in the progress bar. batch.x_adv holds the adversarial images.
        """
        raise NotImplementedError

    def teacher_precision(self, student: Clip) -> str:
        """What frozen models run in."""
        if self.config.teacher_precision != "auto":
            return self.config.teacher_precision
        return "bf16" if student.device.type == "cuda" or self.config.precision == "bf16" else "fp32"

    def finish(self) -> None:
        """Called once after the last step: makes the student's weights what is to be saved."""

    def checks(self, data: Data, history: list[dict[str, float]]) -> list[dict[str, Any]]:
        """Signs that the method has failed in a way that its accuracy alone may not show, looked for after the last
        step: {"id", "ok", "detail"} as an evaluation's. data: what was trained on; history: a log row per epoch with
        its "stage" and the means of what `loss` gave ("total" is "loss" there)."""
        return []

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the student's weights; tensors, numbers and dicts of them."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave, after `stages`."""

    def training_templates(self, data: Data) -> list[str]:
        from rvlm.data import templates

        return templates(data.template if self.config.templates == "auto" else self.config.templates)


class VisionMethod(Method):
    """A method that trains the vision tower against class embeddings which stay as they were.

    Attributes, after setup:
        student: the model.
        head: [D, C], the logit scale times the unit-norm text embeddings of the training classes.
    """

    def setup(self, student: Clip, data: Data) -> None:
        student.requires_grad_(False)
        student.model.visual.requires_grad_(True)
        self.student = student
        text = text_head(student, data.class_names, self.training_templates(data))
        self.head = (self.scale(student) * text).detach()

    def scale(self, clip: Clip) -> Tensor | float:
        """What cosines are multiplied by to be logits."""
        return clip.logit_scale

    def stages(self) -> list[Stage]:
        return [Stage(self.config.epochs, self.learning(), warmup_cosine(self.config.warmup_steps))]

    def learning(self) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.student.parameters() if p.requires_grad]}]


def mixed(clip: Clip, precision: str) -> torch.autocast:
    """The arithmetic that a config's `precision` asks for."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(clip.device.type, dtype, enabled=precision != "fp32")


def judged(id: str, ok: bool, said: str, remedy: str) -> dict[str, Any]:
    """A line of `Method.checks`: what was found, and what to do if it is not fine."""
    return {"id": id, "ok": ok, "detail": said if ok else f"{said}: {remedy}"}


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == y).float().mean()


def warmup_cosine(warmup_steps: int) -> Callable[[int, int], float]:
    """(t + 1) / T_w during warm-up, then 0.5 (1 + cos(pi (t - T_w) / (T - T_w)))."""

    def factor(step: int, total: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total - warmup_steps)))

    return factor


_methods: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    _methods[cls.name] = cls
    return cls


def list_methods() -> list[str]:
    """Names of all methods."""
    return sorted(_methods)


def method_class(name: str) -> type[Method]:
    """The class of a method by its name, or your own by FILE.py:NAME.

    Raises:
        ValueError: no such method, or what a file has there is none. FileNotFoundError: no such file.
    """
    if is_own(name):
        return _own(name)
    if name not in _methods:
        near = difflib.get_close_matches(name, _methods)
        hint = f": did you mean {near[0]!r}?" if near else f": expected one of {', '.join(list_methods())}"
        raise ValueError(f"unknown method {name!r}{hint}")
    return _methods[name]


def _own(spec: str) -> type[Method]:
    cls = from_file(spec)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ValueError(f"{spec} is no method: expected a class that inherits from rvlm.methods.Method")
    if not isinstance(getattr(cls, "name", None), str):
        raise ValueError(f'{spec} must say what it is called: name = "..." in the class')
    if not (isinstance(cls.Config, type) and issubclass(cls.Config, MethodConfig)):
        raise ValueError(f"{spec}: Config must inherit from rvlm.methods.MethodConfig")
    return cls


def build_method(name: str, preset: str = "rvlm", **overrides: Any) -> Method:
    """The method `name`, or FILE.py:NAME, with a preset's settings and your own on top.

    Presets name their source: "paper", "code" (the authors' defaults where they differ), "rvlm" (ours, measured on the
    bundled data).
    """
    cls = method_class(name)
    if preset not in cls.presets:
        raise ValueError(f"{name} has no preset {preset!r}: expected one of {', '.join(cls.presets)}")
    fields = {field.name for field in dataclasses.fields(cls.Config)}
    for key in overrides:
        if key not in fields:
            near = difflib.get_close_matches(key, fields)
            hint = f": did you mean {near[0]!r}?" if near else f": expected one of {', '.join(sorted(fields))}"
            raise ValueError(f"{name} has no setting {key!r}{hint}")
    return cls(cls.Config(**(cls.presets[preset] | overrides)))
