"""A CLIP whose pixels are pixels: resizing and normalisation are inside the model and in its graph.

Normalisation outside the model is the commonest way to attack with the wrong eps; here the attack cannot see it.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rvlm.files import write_bytes
from rvlm.models import text
from rvlm.models.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from rvlm.models.towers import causal_text_tower

__all__ = ["CONFIG", "WEIGHTS", "Clip"]

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
RESIZED = {"mode": "bicubic", "antialias": True}  # images of another size than the tower's
NARROW = (torch.bfloat16, torch.float16)
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip(nn.Module):
    """An open_clip model from pixels in [0, 1] to unit-norm embeddings.

    Attributes:
        model: the open_clip model.
        tokenizer: list[str] -> int64 [C, L].
        mean, std: [3, 1, 1], the checkpoint's normalisation.
        size: input height and width in pixels.
        name: the spec that it was loaded from.
        config: {"model_cfg", "preprocess_cfg"} as open_clip stores them, or None if unknown (then it cannot be saved).
        adapter: what `rvlm.models.apply_adapter` put around the tower, or None.
    """

    pools_tokens = True  # of its tower, so that an adapter may add some

    def __init__(self, model: nn.Module, tokenizer, *, name: str, config: dict | None = None) -> None:
        super().__init__()
        self.model, self.tokenizer, self.name, self.config = model, tokenizer, name, config
        self.register_module("adapter", None)
        preprocess = (config or {}).get("preprocess_cfg") or getattr(model.visual, "preprocess_cfg", {})
        for key, default in (("mean", OPENAI_MEAN), ("std", OPENAI_STD)):
            values = torch.tensor(preprocess.get(key, default)).view(3, 1, 1)
            self.register_buffer(key, values, persistent=False)
        size = model.visual.image_size
        self.size = size if isinstance(size, int) else size[0]

    def __deepcopy__(self, memo: dict) -> "Clip":
        """A copy of everything but the tokenizer, which never changes and has a large vocabulary."""
        memo[id(self.tokenizer)] = self.tokenizer
        copied = memo[id(self)] = self.__class__.__new__(self.__class__)
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    @classmethod
    def wrap(cls, model: nn.Module, tokenizer, name: str = "custom") -> "Clip":
        """A Clip around an open_clip model that you built yourself."""
        return cls(model, tokenizer, name=name)

    @property
    def visual(self) -> nn.Module:
        """The vision tower."""
        return self.model.visual

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def settings(self) -> dict[str, Any]:
        """What decides embeddings beside the weights (see `rvlm.models.weights.settings_of`), as JSON keeps it."""
        return {
            "size": self.size,
            "interp": RESIZED["mode"],
            "antialias": RESIZED["antialias"],
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "quick_gelu": bool(((self.config or {}).get("model_cfg") or {}).get("quick_gelu", False)),
        }

    @property
    def dtype(self) -> torch.dtype:
        """What the vision tower takes pixels in: the dtype of its first convolution (norms may have another one)."""
        first = None
        for parameter in self.visual.parameters():
            first = parameter if first is None else first
            if parameter.dim() == 4:
                return parameter.dtype
        return torch.float32 if first is None else first.dtype

    @property
    def logit_scale(self) -> Tensor:
        """The factor on cosines that gives logits, 100 for OpenAI's weights."""
        return self.model.logit_scale.exp()

    def limit_logit_scale(self) -> None:
        """Brings a scale that is trained back into 1 .. 100, as CLIP's own training does."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))

    def encode_pixels(self, x: Tensor, unit_norm: bool = True) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> embeddings [B, D], of unit norm; other sizes are resized (bicubic).

        Of a tower whose weights have 16 bits pixels stay what they are up to its door, so that gradients with respect
        to them do, and embeddings are normalised in float32.
        """
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"pixels must be [B, 3, H, W], got {list(x.shape)}")
        if x.shape[-2] != x.shape[-1]:
            raise ValueError(f"images must be square, got {x.shape[-1]} x {x.shape[-2]}: crop them first")
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), align_corners=False, **RESIZED)
        if self.adapter is not None:
            x = self.adapter.filter(x)
        dtype, x = self.dtype, (x - self.mean) / self.std
        embedding = self.model.encode_image(x.to(dtype) if dtype in NARROW else x)
        return _unit(embedding) if unit_norm else embedding

    forward = encode_pixels

    def encode_text(self, texts: list[str]) -> Tensor:
        """Texts -> unit-norm embeddings [C, D]; behind the adapter's context, if it has one.

        Towers that `rvlm.models.text` knows run what the texts begin with once and nothing behind their ends.
        """
        context = None if self.adapter is None else self.adapter.context
        if context is not None or (causal_text_tower(self) is not None and self.dtype not in NARROW):
            return text.encode(self, text.tokenized(self, texts), context)
        return _unit(self.model.encode_text(self.tokenizer(texts).to(self.device)))

    def save(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> Path:
        """Writes weights and config that open_clip loads back exactly (`local-dir:FOLDER`), each file atomically.

        Of a model with an adapter, which is frozen, the adapter alone is written; `load_clip` puts both together again.

        state: of the open_clip model, if it is not to be the one that it has now.
        """
        from safetensors.torch import save

        folder = Path(folder)
        if self.adapter is not None:
            self.adapter.save(folder)
            _remove(folder, WEIGHTS, CONFIG)
            return folder
        if self.config is None:
            raise ValueError("this Clip has no open_clip config, so it cannot be saved: build it with load_clip")
        folder.mkdir(parents=True, exist_ok=True)
        state = self.model.state_dict() if state is None else state
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        write_bytes(folder / WEIGHTS, save(state))
        write_bytes(folder / CONFIG, json.dumps(self.config, indent=1).encode())
        _remove(folder, ADAPTER_WEIGHTS, ADAPTER_CONFIG)
        return folder


def _unit(embedding: Tensor) -> Tensor:
    return F.normalize(embedding.float() if embedding.dtype in NARROW else embedding, dim=-1)


def _remove(folder: Path, *names: str) -> None:
    """What an earlier save of the other kind left, which would be taken for the model."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
