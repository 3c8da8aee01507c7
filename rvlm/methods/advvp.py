"""AdvVP: adversarial visual prompt tuning, a baseline of prompt defences; every weight of CLIP is frozen.

    x_a  = argmax_{|x_a - x|_inf <= eps} CE(s cos_P(x_a), y)         PGD
    loss = CE(s cos_P(x_a), y)                                       mean over the batch

TeCoA's attack and loss on prompts instead of weights: cos_P are the cosines of the tower with deep visual prompts P [J,
tokens, D] (see rvlm.models.adapter) to fixed class embeddings. Comparisons of prompt defences use it so (Mao et al.
2023 train prompts in pixels and tokens; deep tokens as in Jia et al. 2022).

Presets. `code`: the settings that the labs' released configurations share (two tokens, depth 9, SGD 0.0035, eps 1/255,
two steps), with the warm-up per step and not per epoch. `rvlm`: ours, on the digits.
"""

import dataclasses

import torch

from rvlm.data import Data
from rvlm.methods.base import MethodConfig, register
from rvlm.methods.tecoa import TeCoA
from rvlm.models import Adapter, Clip, apply_adapter
from rvlm.models.adapter import AdapterConfig, adaptable_block

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
class AdvVP(TeCoA):
    name = "advvp"
    Config = AdvVPConfig
    presets = {
        "code": {"optimizer": "sgd", "lr": 0.0035, "weight_decay": 5e-4, "batch_size": 32, "epochs": 50, "eps": "1/255",
                 "alpha": 1 / 255, "steps": 2},
        "rvlm": {"lr": 2e-2, "batch_size": 64, "epochs": 20, "warmup_steps": 20, "eps": "8/255", "steps": 2,
                 "clip_grad": 1.0, "tokens": 8, "depth": 3},
    }  # fmt: skip

    def setup(self, student: Clip, data: Data) -> None:
        if student.adapter is not None:
            raise ValueError(f"{student.name} has an adapter already: start from the model without it")
        super().setup(student, data)
        student.requires_grad_(False)
        adaptable_block(student, self.config.depth - 1)  # or an error that says what is expected
        width = student.model.visual.positional_embedding.shape[1]
        rows = torch.randn(self.config.depth, self.config.tokens, width) * self.config.init_std  # by the run's seed
        apply_adapter(student, Adapter(AdapterConfig.of(student, source="advvp"), prompts=rows))
        student.adapter.prompts.requires_grad_(True)
