"""CLIP models as modules from pixels in [0, 1] to embeddings, and zero-shot classifiers on top of them.

    clip = load_clip("ViT-B-32:openai")
    classifier = ZeroShotClassifier(clip, ["cat", "dog"], templates="openai")
    logits = classifier(x)

Which models can be named stands at `load_clip`.
"""

from rvlm.models.adapter import Adapter, apply_adapter
from rvlm.models.clip import Clip
from rvlm.models.convert import convert
from rvlm.models.ensemble import Ensemble
from rvlm.models.load import load_clip
from rvlm.models.zero_shot import ZeroShotClassifier

__all__ = ["Adapter", "Clip", "Ensemble", "ZeroShotClassifier", "apply_adapter", "convert", "load_clip"]
