"""ARD: adversarially robust distillation from one robust teacher (Goldblum et al., AAAI 2020, arXiv 1905.09747).

    x_a  = argmax_{|x_a - x|_inf <= eps} KL(p_T(x) || p_S(x_a))      PGD from noise
    loss = KL(p_T(x) || p_S(x_a))                                    mean over the batch

the single-teacher baseline of MMT-ARD as its released code has it: the teacher sees clean images, so what it says is
computed once. p = softmax of the class logits. The temperature divides both sides' logits (1 there).

Presets. `code`: MMT-ARD's script of the baseline; its teacher's weights are not released. `rvlm`: ours, on the digits.
"""

import dataclasses

from torch import Tensor

from rvlm import ops
from rvlm.data import Data
from rvlm.methods.base import Batch, MethodConfig, VisionMethod, accuracy, register
from rvlm.methods.teachers import classifier
from rvlm.models import Clip

__all__ = ["ARD", "MMT_CODE"]

MMT_CODE = {
    "optimizer": "adamw", "lr": 2e-5, "weight_decay": 1e-4, "batch_size": 512, "epochs": 2, "warmup_steps": 350,
    "eps": "2/255", "alpha": 1 / 255, "steps": 10, "momentum": 0.9,
}  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class ARDConfig(MethodConfig):
    templates: str = "tecoa"
    teacher: str = "digits-vit-tecoa"
    """Robust model, as --model elsewhere; from Python also a Clip or a callable to logits."""
    temperature: float = 1.0
    """Divides the logits of teacher and student."""
    cache_teachers: bool = True
    """Compute the teacher's logits on the training images once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("temperature")


@register
class ARD(VisionMethod):
    name = "ard"
    Config = ARDConfig
    presets = {
        "code": MMT_CODE,
        "rvlm": {"lr": 1e-3, "batch_size": 64, "epochs": 20, "warmup_steps": 20, "eps": "8/255", "steps": 2,
                 "clip_grad": 1.0, "templates": "auto"},
    }  # fmt: skip
    inputs = "adv"

    def setup(self, student: Clip, data: Data) -> None:
        super().setup(student, data)
        config, templates = self.config, self.training_templates(data)
        self.teacher = classifier(config.teacher, student, data, templates, precision=self.teacher_precision(student))
        if config.cache_teachers:
            self.teacher.remember(data, student.device)

    def attack(self, batch: Batch):
        tau = self.config.temperature
        self.teacher_logits = self.teacher.on_clean(batch)
        target = ops.fold_teachers(self.teacher_logits[None], [1.0], tau)  # once: its gradient is that of the KL
        return lambda embedding: ops.attack_loss(embedding @ self.head / tau, target, "soft-ce")[0]

    def loss(self, out_adv: Tensor | None, out_clean: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        logits = out_adv @ self.head
        loss, _ = ops.multi_teacher_kl(logits, self.teacher_logits[None].to(logits), [1.0], self.config.temperature)
        return {"total": batch.mean(loss), "robust_acc": accuracy(logits, batch.y)}
