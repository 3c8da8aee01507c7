"""FAP: few-shot adversarial prompt learning (Zhou et al., NeurIPS 2024); every weight of CLIP is frozen.

    x_a  = argmax_{|x_a - x|_inf <= eps} KL(p(x) || p(x_a))                          PGD, p(x) fixed
    loss = CE(z(x), y) + lambda mean_i [ KL(p(x) || p(x_a)) (1 + cos(e(x), e(x_a))) ]_i

with both outputs differentiated. The factor multiplies: it is large where the two embeddings are alike, as in the
released code. Prompts are in both towers, the context of deeper blocks a linear map of the visual ones.

Presets. `code`: the released settings that are known to us (two tokens, depth 9, batch 4, 10 epochs, lambda 1.5), with
the labs' SGD. `rvlm`: ours, on the digits.
"""

import dataclasses
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from rvlm import ops
from rvlm.attacks import scoring
from rvlm.methods.base import Batch, accuracy, mixed, register
from rvlm.methods.prompt_tuning import BOTH
from rvlm.methods.prompts import LAB, PromptConfig, PromptMethod

__all__ = ["FAP"]


@dataclasses.dataclass(kw_only=True)
class FAPConfig(PromptConfig):
    coupling: str = "vision_to_text"
    trade_off: float = 1.5
    """lambda."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "trade_off")
        self.from_noise("fap's attack")


@register
class FAP(PromptMethod):
    name = "fap"
    Config = FAPConfig
    presets = {
        "code": LAB | {"batch_size": 4, "epochs": 10},
        "rvlm": BOTH | {"visual_tokens": 4},
    }
    inputs = "both"

    def attack(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        head = self.encode_text().detach()
        with scoring(self.student), mixed(self.student, self.config.precision):
            clean = self.student.encode_pixels(batch.x)
        clean = (clean.float() @ head)[None]
        return lambda embedding: ops.multi_teacher_kl(embedding @ head, clean, [1.0])[0]

    def loss(self, out_adv: Tensor | None, out_clean: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        adv, clean = out_adv @ self.head, out_clean @ self.head
        ce, correct, _ = ops.attack_loss(clean, batch.y)
        kl = ops.multi_teacher_kl(adv, clean[None], [1.0], teacher_grad=True)[0]
        alike = 1 + F.cosine_similarity(out_clean, out_adv, dim=1)
        total = ce + self.config.trade_off * kl * alike
        return {
            "total": batch.mean(total), "ce": ce.mean(), "kl": kl.mean(), "clean_acc": correct.float().mean(),
            "robust_acc": accuracy(adv, batch.y),
        }  # fmt: skip
