"""CLIPs small enough to train in seconds on a CPU: open_clip architectures for 32 px, with its tokenizer."""

import copy

import torch

from rvlm.models.clip import Clip

__all__ = ["ARCHITECTURES", "build"]

_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
_PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "shortest"}

ARCHITECTURES: dict[str, dict] = {
    "tiny-vit": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 96, "layers": 3, "head_width": 32},
        "text_cfg": _TEXT,
    },
    "tiny-rn": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 24, "head_width": 32},
        "text_cfg": _TEXT,
    },
}


def build(name: str, seed: int = 0) -> Clip:
    """A tiny CLIP with random weights, the same for the same seed; the caller's random state is left alone."""
    import open_clip

    config = {"model_cfg": copy.deepcopy(ARCHITECTURES[name]), "preprocess_cfg": dict(_PREPROCESS)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**copy.deepcopy(config["model_cfg"]))
    tokenizer = open_clip.SimpleTokenizer(context_length=_TEXT["context_length"])
    return Clip(model, tokenizer, name=name, config=config)
