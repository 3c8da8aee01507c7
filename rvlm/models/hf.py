"""CLIPModels of Hugging Face transformers with the face of open_clip's, so that all else takes them as they are.

Only load_clip("hf:PATH_OR_NAME") imports this file: it needs transformers (extra [hf]).
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerBase

from rvlm.models.clip import Clip

__all__ = ["HFClip", "load"]

INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # by PIL's numbers


class HFClip(CLIPModel):
    """A CLIPModel that is asked as open_clip's models are; names and values of its weights are the original's."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.vision_model.image_size = config.vision_config.image_size

    @property
    def visual(self) -> nn.Module:
        return self.vision_model

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__("vision_model" if name == "visual" else name, value)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> embeddings [B, D]."""
        return self.get_image_features(pixel_values=pixel_values).pooler_output

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens [C, L] -> embeddings [C, D]."""
        return self.get_text_features(input_ids=tokens).pooler_output


class Tokenizer:
    """list[str] -> int64 [C, L], cut and filled up to the model's context."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, texts: list[str]) -> Tensor:
        given = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        return self.tokenizer(texts, **given)["input_ids"]


def load(source: str) -> Clip:
    """A CLIP from a folder or a name on the hub; without a preprocessor_config.json it has OpenAI's mean and std.

    Raises:
        FileNotFoundError: neither is there. ValueError: it is no CLIP, or its images are prepared in another way.
    """
    missing = f"no CLIPModel with its tokenizer at {source}: expected a folder of transformers, or a name on its hub"
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(missing)
    try:
        kind = AutoConfig.from_pretrained(source).model_type
        if kind != "clip":
            raise ValueError(f"hf:{source} is a {kind}: expected a CLIPModel")
        model = HFClip.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="right")
    except OSError as error:
        raise FileNotFoundError(f"{missing} ({error})") from error
    try:
        processor = CLIPImageProcessor.from_pretrained(source)
    except OSError:
        pass  # Clip knows OpenAI's
    else:
        model.visual.preprocess_cfg = _preprocess(source, processor)
    name = f"hf:{Path(source).resolve()}" if Path(source).is_dir() else f"hf:{source}"
    return Clip(model, Tokenizer(tokenizer, model.config.text_config.max_position_embeddings), name=name)


def _preprocess(source: str, processor: CLIPImageProcessor) -> dict:
    """What it does to images, in open_clip's words."""
    levels, kind = 1 / processor.rescale_factor, INTERPOLATIONS.get(int(processor.resample))
    if not (processor.do_rescale and processor.do_normalize) or round(levels) != 255 or kind is None:
        raise ValueError(
            f"hf:{source} has an image processor with do_rescale={processor.do_rescale}, rescale_factor=1/{levels:g}, "
            f"do_normalize={processor.do_normalize}, resample={int(processor.resample)}: expected one that rescales by "
            f"1/255, normalises and resizes by {' or '.join(INTERPOLATIONS.values())}"
        )
    return {
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
        "interpolation": kind,
        "resize_mode": "shortest" if "shortest_edge" in processor.size else "squash",
    }
