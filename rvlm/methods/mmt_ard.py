"""MMT-ARD: adversarially robust distillation from a robust and a clean teacher (arXiv 2511.17448 and its code).

    x_a  = argmax_{|x_a - x|_inf <= eps} KL(p_c(x) || p_S(x_a))      PGD from noise; c the clean teacher
    loss = mean_b [ w_r,b KL(p_r(x_a) || p_S(x_a)) + w_c,b KL(p_c(x) || p_S(x)) ]

r is the robust teacher, which sees the student's adversarial images. An `origin` teacher o adds
w_o KL(p_o(x) || p_S(x)). Rows are weighted by `weights`, always as constants:

    code     w_r = 50 u / C, w_c = 5 v / C, u and v the teachers' cosines at the true label, not below 0: what the
             released code does. It up-weights what teachers find easy
    fixed    w_r = robust_weight, w_c = clean_weight
    mtard    shares of the two that follow how fast the two terms fall (the rule of MTARD, commented out in the code)
    sigmoid  w_r = sigmoid(kappa (q_r - q_c) + b), w_c = 1 - w_r, q a teacher's probability of the true label
    hard     the same with 1 - q in the place of q, so that what a teacher finds hard weighs more

The paper's own formulas for its dynamic weights could not be found; sigmoid and hard are this library's reading of its
abstract. `lora_rank` trains low-rank corrections of the attention's projections instead of the tower.

Presets. `code`: the released script (AdamW 2e-5, 5,000 steps of 512, PGD-10 at 2/255). `rvlm`: ours, on the digits.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rvlm import ops
from rvlm.data import Data
from rvlm.methods import lora
from rvlm.methods.ard import MMT_CODE
from rvlm.methods.base import Batch, MethodConfig, VisionMethod, accuracy, register
from rvlm.methods.teachers import classifier
from rvlm.models import Clip

__all__ = ["MMTARD"]

WEIGHTS = ("code", "fixed", "mtard", "sigmoid", "hard")


@dataclasses.dataclass(kw_only=True)
class MMTARDConfig(MethodConfig):
    templates: str = "tecoa"
    robust_teacher: str = "digits-vit-tecoa"
    """Robust model, as --model elsewhere; from Python also a Clip or a callable to logits."""
    clean_teacher: str = "digits-rn"
    """Accurate model."""
    origin: str | None = None
    """A third teacher on clean images, weighted by origin_weight."""
    origin_weight: float = 0.0
    """Of the third teacher's divergence."""
    weights: str = "code"
    """code, fixed, mtard, sigmoid or hard."""
    robust_weight: float = 1.0
    """Factor on the robust teacher's weight (50 in the code preset)."""
    clean_weight: float = 1.0
    """Factor on the clean teacher's weight (5 in the code preset)."""
    per_class: bool = False
    """Divide the loss by the number of classes, as the released code's mean over all entries does."""
    confidence: str = "cosine"
    """What "code" weights by: cosine, or prob, the probability of the label (for teachers that are no CLIP)."""
    kappa: float = 4.0
    """Slope of the sigmoid (ours)."""
    offset: float = 0.0
    """b of the sigmoid (ours)."""
    mtard_rate: float = 0.025
    """eta of mtard."""
    mtard_power: float = 1.0
    """beta of mtard."""
    inner_loss: str = "clean"
    """What the attack raises: clean or robust, the KL from that teacher's clean prediction, or ce."""
    robust_input: str = "adv"
    """What the robust teacher sees: adv or clean."""
    temperature: float = 1.0
    """Divides all logits in the divergences."""
    lora_rank: int = 0
    """Rank of the corrections to the attention's projections; 0 trains the whole tower."""
    lora_alpha: float = 16.0
    """They are scaled by alpha / rank."""
    lora_dropout: float = 0.0
    """Share of the input features that a correction does not see in a training pass (0.1 in the released code)."""
    lora_targets: str = "all"
    """Which projections of the attention are corrected: qkv, out or all."""
    cache_teachers: bool = True
    """Compute what teachers say of clean images once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of(
            weights=WEIGHTS,
            confidence=("cosine", "prob"),
            inner_loss=("clean", "robust", "ce"),
            robust_input=("adv", "clean"),
            lora_targets=("all", "qkv", "out"),
        )
        self.at_least(0, "lora_rank")
        self.positive("temperature", "lora_alpha")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")


@register
class MMTARD(VisionMethod):
    name = "mmt_ard"
    Config = MMTARDConfig
    presets = {
        "code": MMT_CODE | {"robust_weight": 50.0, "clean_weight": 5.0, "per_class": True},
        "rvlm": {"lr": 1e-3, "batch_size": 64, "epochs": 20, "warmup_steps": 20, "eps": "8/255", "steps": 2,
                 "clip_grad": 1.0, "templates": "auto", "weights": "sigmoid"},
    }  # fmt: skip
    inputs = "both"

    def setup(self, student: Clip, data: Data) -> None:
        super().setup(student, data)
        config, templates = self.config, self.training_templates(data)
        if config.lora_rank:
            student.model.visual.requires_grad_(False)
            lora.attach(
                student.model.visual, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets
            )

        def teacher(source: Any):
            return classifier(source, student, data, templates, precision=self.teacher_precision(student))

        self.robust, self.clean = teacher(config.robust_teacher), teacher(config.clean_teacher)
        self.origin = None if config.origin is None else teacher(config.origin)
        if config.cache_teachers:
            on_clean = [self.clean, *([self.origin] if self.origin else [])]
            if config.inner_loss == "robust" or config.robust_input == "clean":
                on_clean.append(self.robust)
            for each in on_clean:
                each.remember(data, student.device)
        if config.weights == "code" and config.confidence == "cosine":
            for each in (self.robust, self.clean):
                if each.scale is None:
                    raise ValueError(
                        f"weights='code' needs cosines, and {each.name} is no CLIP: give confidence='prob'"
                    )
        self.share, self.first = torch.tensor(0.5), None  # of mtard

    def attack(self, batch: Batch):
        if self.config.inner_loss == "ce":
            return lambda embedding: ops.attack_loss(embedding @ self.head, batch.y)[0]
        teacher, tau = self.clean if self.config.inner_loss == "clean" else self.robust, self.config.temperature
        target = ops.fold_teachers(teacher.on_clean(batch)[None], [1.0], tau)
        return lambda embedding: ops.attack_loss(embedding @ self.head / tau, target, "soft-ce")[0]

    def loss(self, out_adv: Tensor | None, out_clean: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        config, students = self.config, torch.stack([out_adv @ self.head, out_clean @ self.head])
        robust = self.robust(batch.x_adv) if config.robust_input == "adv" else self.robust.on_clean(batch)
        said, of = [robust, self.clean.on_clean(batch)], [0, 1]
        weights = self._weights(*said, students, batch)
        if self.origin is not None:
            said, of = [*said, self.origin.on_clean(batch)], [0, 1, 1]
            weights = torch.cat([weights, torch.full_like(weights[:1], config.origin_weight)])
        if config.per_class:
            weights = weights / robust.shape[1]
        loss, each = ops.multi_teacher_kl(
            students, torch.stack(said).to(students), weights, config.temperature, student_of=of
        )
        return {
            "total": batch.mean(loss), "robust_kl": each[0].mean(), "clean_kl": each[1].mean(),
            "robust_weight": weights[0].mean(), "clean_weight": weights[1].mean(),
            "robust_acc": accuracy(students[0], batch.y), "clean_acc": accuracy(students[1], batch.y),
        }  # fmt: skip

    def _weights(self, robust: Tensor, clean: Tensor, students: Tensor, batch: Batch) -> Tensor:
        """w_r and w_c of every row, [2, B]."""
        config, label = self.config, batch.y[:, None]
        factors = torch.tensor([[config.robust_weight], [config.clean_weight]], device=robust.device)
        if config.weights == "fixed":
            return factors.expand(2, len(label))
        if config.weights == "mtard":
            return factors * self._mtard(robust, clean, students)[:, None].expand(2, len(label))
        if config.weights == "code" and config.confidence == "cosine":
            scaled = [(self.robust, robust), (self.clean, clean)]
            sure = torch.stack([logits.gather(1, label)[:, 0] / teacher.scale for teacher, logits in scaled])
            return factors * sure.clamp(min=0)
        sure = torch.stack([logits.softmax(1).gather(1, label)[:, 0] for logits in (robust, clean)])
        if config.weights == "code":
            return factors * sure
        sure = 1 - sure if config.weights == "hard" else sure
        share = torch.sigmoid(config.kappa * (sure[0] - sure[1]) + config.offset)
        return factors * torch.stack([share, 1 - share])

    def _mtard(self, robust: Tensor, clean: Tensor, students: Tensor) -> Tensor:
        """Shares of the robust and the clean term, moved by this step's losses of this process."""
        with torch.no_grad():
            pair = torch.stack([robust, clean]).to(students)
            _, each = ops.multi_teacher_kl(students, pair, [1.0, 1.0], self.config.temperature, student_of=[0, 1])
            now = each.mean(1)
            self.first = now if self.first is None else self.first
            fall = (now / self.first.clamp(min=1e-12)) ** self.config.mtard_power
            clean_share = 1 - self.share.to(now)
            clean_share = clean_share - self.config.mtard_rate * (clean_share - fall[1] / fall.sum().clamp(min=1e-12))
            self.share = 1 - clean_share
        return torch.stack([self.share, 1 - self.share])

    def state(self) -> dict[str, Any]:
        return {"share": self.share, "first": self.first}

    def restore(self, state: dict[str, Any]) -> None:
        self.share, self.first = state["share"], state["first"]

    def finish(self) -> None:
        lora.merge(self.student.model.visual)
