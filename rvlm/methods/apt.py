"""Adversarial tuning of a text context alone: APT (Li et al., CVPR 2024) and AdvPT (Zhang et al., ECCV 2024).

    APT     x_a = argmax_{|x_a - x|_inf <= eps} CE(z(x_a), y),       loss = CE(z_V(x_a), y)
    AdvPT   x_a made once on the model without a context,            loss = CE(z_V(x_a), y)

V is one context for all classes, before the class name (see rvlm.methods.prompts); images are never prompted. What
APT's attack sees is its `adversary`: the context as it is (`onfly`), the templates by hand (`constant`), or the context
after a step of its own against the clean batch, V + prompt_step sign(dCE/dV) (`perturbed`: image and prompt both move;
how far the prompt does is this library's reading).

The vision tower does not change, so AdvPT keeps the embeddings of its images, and no step runs the tower. It is no
defence against an attack that sees the context; it is here to be compared with.

Presets. `paper`: 16 tokens, SGD 0.002, batch 32, 50 epochs, and for APT its PGD of 3 steps of 2.67/255 at 4/255, on a
backbone that was trained adversarially; AdvPT's attack is not known to us, the labs' eps 1/255 stands in. `rvlm`: ours,
on the digits.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from rvlm import ops
from rvlm.attacks import scoring
from rvlm.data import Data
from rvlm.methods.base import Batch, mixed, register
from rvlm.methods.offline import OfflineImages
from rvlm.methods.prompts import LAB, PromptConfig, PromptMethod
from rvlm.models import Clip, ZeroShotClassifier
from rvlm.ranks import Ranks

__all__ = ["APT", "AdvPT"]

_PAPER = LAB | {"lr": 0.002, "text_tokens": 16}
_DIGITS = {
    "lr": 2e-2, "batch_size": 64, "epochs": 20, "warmup_steps": 20, "eps": "8/255", "steps": 2, "clip_grad": 1.0,
    "text_tokens": 8,
}  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class TextConfig(PromptConfig):
    visual_tokens: int = 0
    text_depth: int = 1
    words: str = ""
    sentence: str = "{}."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.visual_tokens:
            raise ValueError("this method has a context alone: for visual_tokens, use advvlp")


@dataclasses.dataclass(kw_only=True)
class APTConfig(TextConfig):
    adversary: str = "onfly"
    """onfly, constant or perturbed."""
    prompt_step: float = 0.01
    """How far adversary perturbed moves each number of the context."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of(adversary=("onfly", "constant", "perturbed"))


@register
class APT(PromptMethod):
    name = "apt"
    Config = APTConfig
    presets = {"paper": _PAPER | {"eps": "4/255", "alpha": 2.67 / 255, "steps": 3}, "rvlm": _DIGITS}

    def setup(self, student: Clip, data: Data) -> None:
        super().setup(student, data)
        self.by_hand = ZeroShotClassifier(self.undefended, data.class_names, self.training_templates(data)).head()

    def attack(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        head = self.encode_text().detach()
        if self.config.adversary == "constant":
            head = self.by_hand
        elif self.config.adversary == "perturbed":
            head = self._against(batch)
        return lambda embedding: ops.attack_loss(embedding @ head, batch.y)[0]

    def _against(self, batch: Batch) -> Tensor:
        """The head of a context that was moved to raise the loss of the clean batch."""
        rows = self.student.adapter.context
        with scoring(self.student), mixed(self.student, self.config.precision):
            embedding = self.student.encode_pixels(batch.x)
        loss = ops.attack_loss(embedding.float() @ self.head, batch.y)[0].sum()
        step = self.config.prompt_step * torch.autograd.grad(loss, rows, retain_graph=True)[0].sign()
        with torch.no_grad():
            return self.class_head(rows + step)

    def loss(self, out_adv: Tensor | None, out_clean: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        loss, correct, _ = ops.attack_loss(out_adv @ self.head, batch.y)
        return {"total": batch.mean(loss), "robust_acc": correct.float().mean()}


@dataclasses.dataclass(kw_only=True)
class AdvPTConfig(TextConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum:
            raise ValueError("advpt's images are plain PGD's: momentum must be 0")


@register
class AdvPT(PromptMethod):
    name = "advpt"
    Config = AdvPTConfig
    presets = {"paper": _PAPER, "rvlm": _DIGITS | {"steps": 10}}
    inputs = "none"

    def setup(self, student: Clip, data: Data) -> None:
        super().setup(student, data)
        model = ZeroShotClassifier(self.undefended, data.class_names, self.training_templates(data)).eval()
        self.images = OfflineImages.of(self.config, model, data)

    def prepare(self, ranks: Ranks) -> None:
        self.images.make(ranks)
        device, index = self.student.device, self.images.data.index
        with scoring(self.undefended):
            parts = [self.undefended(self.images.at(part).to(device)) for part in index.split(self.config.batch_size)]
        self.embeddings = torch.cat(parts)
        self.place = torch.full((int(index.max()) + 1,), -1, device=device)
        self.place[index.to(device)] = torch.arange(len(index), device=device)

    def loss(self, out_adv: Tensor | None, out_clean: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        embeddings = self.embeddings[self.place[batch.index]]
        loss, correct, _ = ops.attack_loss(embeddings @ self.encode_text(), batch.y)
        return {"total": batch.mean(loss), "robust_acc": correct.float().mean()}
