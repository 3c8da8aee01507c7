"""PMG-AFT: pre-trained model guided adversarial fine-tuning (Wang et al., CVPR 2024, arXiv 2401.04350).

    x_a  = argmax_{|x_a - x|_inf <= eps} CE(z_S(x_a), y)             PGD
    loss = CE(z_S(x_a), y) + a KL(p_O(x_a) || p_S(x_a)) + b KL(p_S(x) || p_S(x_a))

with O the model before training, p = softmax(z), z = s cos over the training classes. The cross-entropy is a mean over
the batch; the divergences are sums in the released code (`reduction`), so their weight grows with the batch. The
gradient of the last term flows through both of its sides unless `detach_clean`.

Presets. `paper` and `code`: the README's command, raw cosines as logits (s = 1). A softmax of raw cosines is nearly
uniform, which weakens the inner attack; evaluate with s = 100. `rvlm`: ours, measured on the digits with a tiny ViT.
"""

import dataclasses

import torch
from torch import Tensor

from rvlm import ops
from rvlm.data import Data
from rvlm.methods.base import Batch, MethodConfig, VisionMethod, accuracy, register
from rvlm.methods.teachers import classifier, frozen_copy
from rvlm.models import Clip

__all__ = ["PMGAFT"]


@dataclasses.dataclass(kw_only=True)
class PMGAFTConfig(MethodConfig):
    templates: str = "tecoa"
    logit_scale: float | None = None
    """On the cosines: 1 in the released code; the model's own if None."""
    general_weight: float = 1.0
    """a: of the divergence from the frozen model on adversarial images."""
    clean_weight: float = 1.0
    """b: of the divergence from the student's own clean predictions."""
    reduction: str = "mean"
    """Of the divergences over the batch: mean, or sum as in the released code."""
    detach_clean: bool = False
    """Keep the gradient of the last term out of the clean side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be mean or sum, got {self.reduction!r}")
        self.positive("logit_scale")


_PAPER = {
    "optimizer": "sgd", "lr": 5e-5, "batch_size": 256, "epochs": 10, "warmup_steps": 1000, "eps": "1/255",
    "alpha": 1 / 255, "steps": 2, "logit_scale": 1.0, "reduction": "sum",
}  # fmt: skip


@register
class PMGAFT(VisionMethod):
    name = "pmg_aft"
    Config = PMGAFTConfig
    presets = {
        "paper": _PAPER,
        "code": _PAPER,
        "rvlm": {"lr": 1e-3, "batch_size": 64, "epochs": 20, "warmup_steps": 20, "eps": "8/255", "steps": 2,
                 "clip_grad": 1.0, "templates": "auto"},
    }  # fmt: skip
    inputs = "both"

    def scale(self, clip: Clip) -> Tensor | float:
        return clip.logit_scale if self.config.logit_scale is None else self.config.logit_scale

    def setup(self, student: Clip, data: Data) -> None:
        super().setup(student, data)
        config, templates = self.config, self.training_templates(data)
        frozen = frozen_copy(student)
        self.frozen = classifier(frozen, student, data, templates, config.logit_scale, self.teacher_precision(student))

    def attack(self, batch: Batch):
        return lambda embedding: ops.attack_loss(embedding @ self.head, batch.y)[0]

    def loss(self, out_adv: Tensor | None, out_clean: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        adv, clean = out_adv @ self.head, out_clean @ self.head
        ce, correct, _ = ops.attack_loss(adv, batch.y)
        weights = [self.config.general_weight, self.config.clean_weight]
        teachers = torch.stack(
            [self.frozen(batch.x_adv).to(adv), clean.detach() if self.config.detach_clean else clean]
        )
        divergence, each = ops.multi_teacher_kl(adv, teachers, weights, teacher_grad=not self.config.detach_clean)
        divergence = divergence.sum() if self.config.reduction == "sum" else batch.mean(divergence)
        return {
            "total": batch.mean(ce) + divergence,
            "ce": ce.mean(),
            "general": each[0].mean(),
            "clean": each[1].mean(),
            "robust_acc": correct.float().mean(),
            "clean_acc": accuracy(clean, batch.y),
        }
