"""Zero-shot training from scratch: the undefended CLIP that attacks break and the other methods start from.

    loss = CE(s e(x)^T W, y),   W the unit-norm text embeddings of the class names under one template

Both towers and the logit scale s learn. With every class in the batch this is CLIP's image-to-text loss (Radford et al.
2021) without duplicates of a caption among the negatives. The scale starts at 1/0.07 and must be free to grow: fixed at
100 from scratch, training collapses to chance. It is capped at 100, as in CLIP.
"""

from torch import Tensor
from torch.nn import functional as F

from rvlm.data import Data
from rvlm.methods.base import Batch, Method, Stage, accuracy, register, warmup_cosine
from rvlm.models import Clip
from rvlm.models.zero_shot import text_head

__all__ = ["ClipTraining"]


@register
class ClipTraining(Method):
    name = "clip"
    presets = {
        "rvlm": {"lr": 1e-3, "batch_size": 64, "epochs": 12, "warmup_steps": 20, "weight_decay": 0.05, "clip_grad": 1.0}
    }
    inputs = "clean"

    def setup(self, student: Clip, data: Data) -> None:
        student.requires_grad_(True)
        self.student, self.class_names, self.templates = student, data.class_names, self.training_templates(data)

    def stages(self) -> list[Stage]:
        parameters = list(self.student.parameters())
        return [Stage(self.config.epochs, [{"params": parameters}], warmup_cosine(self.config.warmup_steps))]

    def loss(self, out_adv: Tensor | None, out_clean: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        head = text_head(self.student, self.class_names, self.templates)
        self.student.limit_logit_scale()
        logits = self.student.logit_scale * out_clean @ head
        return {
            "total": batch.mean(F.cross_entropy(logits, batch.y, reduction="none")),
            "clean_acc": accuracy(logits, batch.y),
        }

    def finish(self) -> None:
        self.student.limit_logit_scale()
