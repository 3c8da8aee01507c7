"""Prompt tuning by cross-entropy, adversarial and clean: the baselines of prompt defences. Every weight is frozen.

    x_a  = argmax_{|x_a - x|_inf <= eps} CE(s cos_PV(x_a), y)        PGD, class embeddings fixed
    loss = CE(s cos_PV(x_a), y)                                      mean over the batch;  ivlp: of x instead of x_a

TeCoA's attack and loss on prompts instead of weights: cos_PV are cosines with visual prompts P and context V in the
towers (see rvlm.methods.prompts). What differs is where prompts are:

    advvp      in the vision tower alone (adversarial visual prompt tuning, as comparisons use it; Mao et al. 2023
               train prompts in pixels and tokens, deep tokens are Jia et al. 2022's)
    advvlp     in both towers, independent
    advmaple   in both towers, the visual ones linear maps of the context (MaPLe, Khattak et al. 2023)
    ivlp       as advvlp, on clean images: no defence, and what a defence's clean accuracy is compared with. MaPLe with
               coupling=text_to_vision

The released configurations of one lab train AdvVLP on batches of which half is attacked; others, and this file, attack
all. Presets. `code`: the settings that the labs' released configurations share (two tokens, depth 9, SGD 0.0035, eps
1/255, two steps), with the warm-up per step and not per epoch. `rvlm`: ours, on the digits.
"""

import dataclasses
from collections.abc import Callable

from torch import Tensor

from rvlm import ops
from rvlm.methods.base import Batch, register
from rvlm.methods.prompts import LAB, PromptConfig, PromptMethod

__all__ = ["IVLP", "AdvMaPLe", "AdvVLP", "AdvVP"]

DIGITS = {
    "lr": 2e-2, "batch_size": 64, "epochs": 20, "warmup_steps": 20, "eps": "8/255", "steps": 2, "clip_grad": 1.0,
    "visual_tokens": 8, "visual_depth": 3,
}  # fmt: skip
BOTH = DIGITS | {"text_tokens": 4, "text_depth": 2, "words": "a scan of the", "sentence": "digit {}."}


class _CrossEntropy(PromptMethod):
    def attack(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        head = self.encode_text().detach()
        return lambda embedding: ops.attack_loss(embedding @ head, batch.y)[0]

    def loss(self, out_adv: Tensor | None, out_clean: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        loss, correct, _ = ops.attack_loss(out_adv @ self.head, batch.y)
        return {"total": batch.mean(loss), "robust_acc": correct.float().mean()}


@dataclasses.dataclass(kw_only=True)
class AdvVPConfig(PromptConfig):
    text_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_tokens:
            raise ValueError("advvp has visual prompts alone: for text_tokens, use advvlp")


@register
class AdvVP(_CrossEntropy):
    name = "advvp"
    Config = AdvVPConfig
    presets = {"code": LAB, "rvlm": DIGITS}


@register
class AdvVLP(_CrossEntropy):
    name = "advvlp"
    presets = {"code": LAB, "rvlm": BOTH}


@dataclasses.dataclass(kw_only=True)
class AdvMaPLeConfig(PromptConfig):
    coupling: str = "text_to_vision"


@register
class AdvMaPLe(_CrossEntropy):
    name = "advmaple"
    Config = AdvMaPLeConfig
    presets = {"code": LAB, "rvlm": BOTH | {"visual_tokens": 4, "visual_depth": 2}}


@register
class IVLP(PromptMethod):
    name = "ivlp"
    presets = {"code": LAB, "rvlm": BOTH}
    inputs = "clean"

    def loss(self, out_adv: Tensor | None, out_clean: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        loss, correct, _ = ops.attack_loss(out_clean @ self.encode_text(), batch.y)
        return {"total": batch.mean(loss), "clean_acc": correct.float().mean()}
