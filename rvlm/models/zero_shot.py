"""Zero-shot classification: logits = scale * <image embedding, text embedding of the class> (Radford et al. 2021)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rvlm.data.prompts import fingerprint
from rvlm.data.prompts import templates as named_templates
from rvlm.models.clip import Clip

__all__ = ["ZeroShotClassifier", "text_head"]


class ZeroShotClassifier(nn.Module):
    """Pixels [B, 3, H, W] in [0, 1] -> logits [B, C]. Text embeddings are computed once, here.

    Args:
        clip: the model.
        class_names: C names, put into the templates.
        templates: id of `rvlm.data.templates` ("plain", "openai", ...) or a list of templates with "{}". Per class the
            unit-norm embeddings of all templates are averaged and the mean is normalised again. A model whose adapter
            has a context names classes by the sentence that belongs to it, and by no template.
    """

    fused_head = True  # forward is embed @ head, but for a constant: attacks may start their backward pass there

    def __init__(self, clip: Clip, class_names: list[str], templates: str | list[str] = "plain") -> None:
        super().__init__()
        if not class_names:
            raise ValueError("class_names is empty: a zero-shot classifier needs at least one class")
        templates = named_templates(templates) if isinstance(templates, str) else list(templates)
        templates = _sentences(clip, templates)
        if not templates or any("{}" not in template for template in templates):
            raise ValueError(f"every template must contain {{}} for the class name, got {templates}")
        self.clip, self.class_names, self.templates = clip, list(class_names), templates
        with torch.no_grad():
            self.register_buffer("text", text_head(clip, class_names, templates), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.embed(x) @ self.head()
        bias = getattr(self.clip.model, "logit_bias", None)
        return logits if bias is None else logits + bias

    @property
    def settings(self) -> dict[str, str]:
        """Hashes of the sentences that name the classes (see `rvlm.models.weights.settings_of`)."""
        return {"templates": fingerprint(self.templates), "class_names": fingerprint(self.class_names)}

    def embed(self, x: Tensor) -> Tensor:
        """Unit-norm image embeddings [B, D]."""
        return self.clip.encode_pixels(x)

    def head(self) -> Tensor:
        """Scaled class embeddings [D, C]: logits = embed(x) @ head(), plus SigLIP's bias where there is one."""
        return self.clip.logit_scale * self.text


def text_head(clip: Clip, class_names: list[str], templates: list[str]) -> Tensor:
    """Unit-norm class embeddings [D, C], ensembled over templates (see ZeroShotClassifier)."""
    templates = _sentences(clip, templates)
    means = [clip.encode_text([template.format(name) for name in class_names]) for template in templates]
    return F.normalize(torch.stack(means).mean(0), dim=-1).T.contiguous()


def _sentences(clip: Clip, templates: list[str]) -> list[str]:
    learned = clip.adapter is not None and clip.adapter.config.sentence
    return [learned] if learned else templates
