"""HPT-GPD: robustness from a vanilla proxy of another architecture (arXiv 2601.12865).

    x_a   = argmax_{|x_a - x|_inf <= eps} CE(z_S(x_a), y)            PGD on the student
    L_GA  = KL(p_S(x_a) || p_P(x))         stage 1, low rate: generalisation-anchored warm-up (equation 8)
    L_HPT = KL(p_S(x_a) || p_P(x_a))       stage 2, high rate: heterogeneous proxy transfer (equation 5)

P is a frozen CLIP that was never trained adversarially, but whose architecture differs, so that images made for the
student fool it less. After every epoch of stage 1  ema <- gamma ema + (1 - gamma) theta  (equation 9). Stage 2 starts
again from the vanilla weights, and before each of its epochs but the first  theta <- beta theta + (1 - beta) ema
(equation 10).

With several proxies the divergence is their mean. A proxy may be any callable to logits.

Open in the paper, and so knobs: the scale of the logits (raw cosines in the released code, s = 1, where a softmax is
nearly uniform), the direction of the divergence (equation 6 says student first, the code teacher first), sum or mean
over the batch, what is trained (the equations and the first upload say both towers, the code it builds on the vision
tower; with `trains="all"` the prompts are encoded once a step, and the attack sees them as constants). A learning rate
belongs to one choice of these and cannot be carried to another.

`stages` picks rows of the paper's tables: "both"; stage 2 alone, "hpt"; stage 1 alone, "ga", whose result is theta and
not its average; or "clean", distillation on clean images without an attack, at stage 2's rate and epochs.

Presets. `paper`: SGD, batch 64, 10 epochs of each stage (whether that is per stage is not said), PGD-2 at 1/255, s = 1
and sums as in the code that published rates belong to. `code`: the first upload's defaults (PGD-5 at 2/255, batch 256,
anchor weight 0.001, one stage). `rvlm`: ours, on the digits.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rvlm import ops
from rvlm.data import Data
from rvlm.methods.base import Batch, MethodConfig, Stage, VisionMethod, accuracy, register, warmup_cosine
from rvlm.methods.teachers import classifier, frozen_copy
from rvlm.models import Clip
from rvlm.models.zero_shot import text_head
from rvlm.ranks import placed_like

__all__ = ["HPTGPD"]


@dataclasses.dataclass(kw_only=True)
class HPTGPDConfig(MethodConfig):
    templates: str = "tecoa"
    proxy: str | list[str] = "digits-rn"
    """Frozen model(s) of other architectures; from Python also Clips and callables to logits."""
    stages: str = "both"
    """both, hpt, ga or clean."""
    trains: str = "vision"
    """vision, the vision tower, or all: both towers and the logit scale, which stays between 1 and 100."""
    ga_epochs: int | None = None
    """Epochs of stage 1; as many as stage 2 if None."""
    ga_lr: float = 5e-5
    """Peak learning rate of stage 1; lr is stage 2's."""
    logit_scale: float | None = None
    """On the cosines of student and proxies; their own scales if None."""
    direction: str = "student_first"
    """student_first KL(S || P), or teacher_first KL(P || S)."""
    reduction: str = "mean"
    """Of the divergences over the batch: mean or sum."""
    temperature: float = 1.0
    """Divides all logits in the divergence."""
    ce_weight: float = 0.0
    """Of a cross-entropy on the adversarial images."""
    anchor_weight: float = 0.0
    """Of the divergence from the vanilla student on clean images."""
    gamma: float = 0.9
    """Of the average over stage 1."""
    beta: float = 0.5
    """Share of the weights that stage 2 keeps at each pull."""
    pull_first: bool = False
    """Pull before the first epoch of stage 2, too."""
    start_from_ema: bool = False
    """Stage 2 starts from the average instead of the vanilla weights."""
    cache_teachers: bool = True
    """Compute what frozen models say of clean images once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of(
            stages=("both", "hpt", "ga", "clean"),
            trains=("vision", "all"),
            direction=("student_first", "teacher_first"),
            reduction=("mean", "sum"),
        )
        self.at_least(1, "ga_epochs")
        self.positive("logit_scale", "temperature")
        for name in ("gamma", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


_SGD = {
    "optimizer": "sgd", "epochs": 10, "warmup_steps": 1000, "logit_scale": 1.0, "reduction": "sum", "ga_lr": 5e-5,
    "lr": 5e-2, "alpha": 1 / 255,
}  # fmt: skip


@register
class HPTGPD(VisionMethod):
    name = "hpt_gpd"
    Config = HPTGPDConfig
    presets = {
        "paper": _SGD | {"batch_size": 64, "eps": "1/255", "steps": 2},
        "code": _SGD | {"batch_size": 256, "eps": "2/255", "steps": 5, "stages": "hpt", "lr": 5e-5,
                        "direction": "teacher_first", "anchor_weight": 0.001},
        "rvlm": {"lr": 1e-3, "ga_lr": 3e-4, "batch_size": 64, "epochs": 12, "ga_epochs": 6, "warmup_steps": 20,
                 "eps": "8/255", "steps": 2, "clip_grad": 1.0, "templates": "auto"},
    }  # fmt: skip

    def __init__(self, config: HPTGPDConfig) -> None:
        super().__init__(config)
        self.inputs = "clean" if config.stages == "clean" else "adv"
        self.anchored = config.stages in ("ga", "clean")  # the proxy sees clean images
        self.ema: dict[str, Tensor] = {}

    def scale(self, clip: Clip) -> Tensor | float:
        return clip.logit_scale if self.config.logit_scale is None else self.config.logit_scale

    def setup(self, student: Clip, data: Data) -> None:
        super().setup(student, data)
        config, templates = self.config, self.training_templates(data)
        if config.trains == "all":
            student.requires_grad_(True)
            student.model.logit_scale.requires_grad_(config.logit_scale is None)  # else the loss does not depend on it
            self.text = lambda: text_head(student, data.class_names, templates)
        proxies = config.proxy if isinstance(config.proxy, list | tuple) else [config.proxy]
        given = {"scale": config.logit_scale, "precision": self.teacher_precision(student)}
        self.proxies = [classifier(proxy, student, data, templates, **given) for proxy in proxies]
        self.anchor = None
        if config.anchor_weight:
            self.anchor = classifier(frozen_copy(student), student, data, templates, **given)
        if config.cache_teachers:
            for teacher in [*(self.proxies if config.stages != "hpt" else []), *([self.anchor] if self.anchor else [])]:
                teacher.remember(data, student.device)

    def stages(self) -> list[Stage]:
        # Here and not in setup: several processes may have cut the tower into slices since.
        self.vanilla = {name: t.clone() for name, t in self._weights().items()}
        config, schedule = self.config, warmup_cosine(self.config.warmup_steps)
        epochs = config.epochs if config.ga_epochs is None else config.ga_epochs
        anchored = Stage(
            epochs, self.learning(), schedule, "ga", config.ga_lr, on_epoch_start=self._begin_anchored,
            on_epoch_end=self._average,
        )  # fmt: skip
        transfer = Stage(config.epochs, self.learning(), schedule, "hpt", on_epoch_start=self._begin_transfer)
        clean = Stage(config.epochs, self.learning(), schedule, "clean")
        return {"both": [anchored, transfer], "hpt": [transfer], "ga": [anchored], "clean": [clean]}[config.stages]

    def _begin_anchored(self, epoch: int) -> None:
        self.anchored = True
        if epoch == 0:
            self.ema = {name: t.clone() for name, t in self.vanilla.items()}

    def _average(self, epoch: int) -> None:
        for name, t in self._weights().items():
            self.ema[name].lerp_(t, 1 - self.config.gamma)

    def _begin_transfer(self, epoch: int) -> None:
        self.anchored = False
        if not self.ema:  # no stage before: nothing to start from or to be pulled to
            return
        weights = self._weights()
        if epoch == 0:
            for name, t in weights.items():
                t.copy_(self.ema[name] if self.config.start_from_ema else self.vanilla[name])
        if epoch > 0 or self.config.pull_first:
            for name, t in weights.items():
                t.lerp_(self.ema[name], 1 - self.config.beta)

    def _weights(self) -> dict[str, Tensor]:
        """What is averaged and pulled: all floating-point numbers of what learns, statistics included."""
        tower = (self.student.model if self.config.trains == "all" else self.student.model.visual).state_dict()
        return {name: t for name, t in tower.items() if t.is_floating_point()}

    def state(self) -> dict[str, Any]:
        return {"ema": self.ema, "vanilla": self.vanilla, "anchored": self.anchored}

    def restore(self, state: dict[str, Any]) -> None:
        weights, self.anchored = self._weights(), state["anchored"]
        self.ema, self.vanilla = (
            {name: placed_like(t, weights[name]) for name, t in state[part].items()} for part in ("ema", "vanilla")
        )

    def attack(self, batch: Batch):
        self._encode_text()
        head = self.head.detach()
        return lambda embedding: ops.attack_loss(embedding @ head, batch.y)[0]

    def _encode_text(self) -> None:
        """The class embeddings of this step, with their graph, if the text tower learns."""
        if self.config.trains == "all":
            self.student.limit_logit_scale()
            self.head = self.scale(self.student) * self.text()

    def finish(self) -> None:
        if self.config.trains == "all":
            self.student.limit_logit_scale()

    def loss(self, out_adv: Tensor | None, out_clean: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        if out_adv is None:
            self._encode_text()
        logits = (out_clean if out_adv is None else out_adv) @ self.head
        said = [proxy.on_clean(batch) if self.anchored else proxy(batch.x_adv) for proxy in self.proxies]
        weights = [1 / len(said)] * len(said)
        kind = "reverse" if config.direction == "student_first" else "forward"
        if self.anchor is not None:
            said.append(self.anchor.on_clean(batch))
            weights.append(config.anchor_weight)
        total, each = ops.multi_teacher_kl(logits, torch.stack(said).to(logits), weights, config.temperature, kind)
        losses = {"total": total.sum() if config.reduction == "sum" else batch.mean(total)}
        losses["kl"] = each[: len(self.proxies)].mean()
        if config.ce_weight:
            ce = ops.attack_loss(logits, batch.y)[0]
            losses["total"] = losses["total"] + config.ce_weight * batch.mean(ce)
            losses["ce"] = ce.mean()
        return losses | {"clean_acc" if out_adv is None else "robust_acc": accuracy(logits, batch.y)}
