"""AdvVP: adversarial visual prompt tuning, a baseline of prompt defences; every weight of CLIP is frozen.

    x_a  = argmax_{|x_a - x|_inf <= eps} CE(s cos_P(x_a), y)         PGD
    loss = CE(s cos_P(x_a), y)                                       mean over the batch

with cos_P the cosines of the tower with deep visual prompts P [J, tokens, D] (see rvlm.models.adapter) to fixed class
embeddings. It is TeCoA's loss on prompts instead of weights, as the comparisons of prompt defences use it (Mao et al.
2023 train prompts in pixels and tokens; deep tokens as in Jia et al. 2022).

Presets. `code`: the settings that the labs' released configurations share (two tokens, depth 9, SGD 0.0035, eps 1/255,
two steps), with the warm-up per step and not per epoch. `rvlm`: ours, on the digits.
"""

import dataclasses

import torch
from torch import Tensor

from rvlm import ops
from rvlm.data import Data
from rvlm.methods.base import Batch, Method, MethodConfig, Stage, register, warmup_cosine
from rvlm.models import Adapter, Clip, apply_adapter
from rvlm.models.adapter import AdapterConfig, adaptable_block
from rvlm.models.zero_shot import text_head

__all__ = ["AdvVP"]


@dataclasses.dataclass(kw_only=True)
class AdvVPConfig(MethodConfig):
    tokens: int = 2
    """Prompts in each block."""
    depth: int = 9
    """Blocks with prompts of their own, from the first; at most all."""
    init_std: float = 0.02
    """Standard deviation of the prompts at first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@register
class AdvVP(Method):
    name = "advvp"
    Config = AdvVPConfig
    presets = {
        "code": {"optimizer": "sgd", "lr": 0.0035, "weight_decay": 5e-4, "batch_size": 32, "epochs": 50, "eps": "1/255",
                 "alpha": 1 / 255, "steps": 2},
        "rvlm": {"lr": 2e-2, "batch_size": 64, "epochs": 20, "warmup_steps": 20, "eps": "8/255", "steps": 2,
                 "clip_grad": 1.0, "tokens": 8, "depth": 3},
    }  # fmt: skip
    inputs = "adv"

    def setup(self, student: Clip, data: Data) -> None:
        config = self.config
        if student.adapter is not None:
            raise ValueError(f"{student.name} has an adapter already: start from the model without it")
        student.requires_grad_(False)
        with torch.no_grad():
            self.head = student.logit_scale * text_head(student, data.class_names, self.training_templates(data))
        adaptable_block(student, config.depth - 1)  # or an error that says what is expected
        width = student.model.visual.positional_embedding.shape[1]
        rows = torch.randn(config.depth, config.tokens, width) * config.init_std  # the run's seed decides
        about = AdapterConfig.of(student, source="advvp")
        apply_adapter(student, Adapter(about, prompts=rows))
        student.adapter.prompts.requires_grad_(True)
        self.student = student

    def stages(self) -> list[Stage]:
        learning = [{"params": [self.student.adapter.prompts]}]
        return [Stage(self.config.epochs, learning, warmup_cosine(self.config.warmup_steps))]

    def attack(self, batch: Batch):
        return lambda embedding: ops.attack_loss(embedding @ self.head, batch.y)[0]

    def loss(self, out_adv: Tensor | None, out_clean: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        loss, correct, _ = ops.attack_loss(out_adv @ self.head, batch.y)
        return {"total": batch.mean(loss), "robust_acc": correct.float().mean()}
