"""The same CLIP in another library's files: open_clip's, a CLIPModel of transformers, or the vision tower alone.

open_clip keeps queries, keys and values of a block in one matrix, transformers in three; projections behind the towers
are transposed there. Everything else has another name. What one format cannot say is an error, never left out:
transformers' CLIPModel is a plain ViT beside a plain text transformer.
"""

import copy
import dataclasses
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rvlm.files import write_bytes
from rvlm.models.checkpoints import load_weights
from rvlm.models.clip import Clip
from rvlm.models.load import load_clip

__all__ = ["FORMATS", "VISUAL", "as_open_clip", "convert", "difference", "read_back"]

FORMATS = ("open_clip", "hf", "visual")
VISUAL = "visual.pt"
SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
ACTIVATIONS = {"quick_gelu": True, "gelu": False}
RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's numbers

# open_clip's names and transformers'.
TENSORS = {
    "logit_scale": "logit_scale",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
}
MODULES = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
BLOCK = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
TRANSPOSED = ("visual.proj", "text_projection")


def convert(clip: Clip, folder: str | Path, to: str) -> Path:
    """Writes a CLIP for another library; features stay equal to 1e-5.

    Args:
        clip: a model of open_clip or of transformers (`load_clip("hf:...")`), without an adapter.
        folder: where to; it must be empty, or not be there.
        to: "open_clip": weights and config as `Clip.save` writes them. "hf": a CLIPModel of transformers with its
            tokenizer and image processor (needs transformers). "visual": visual.pt, the state dict of the vision tower
            alone, as RobustVLM's scripts load it.

    Raises:
        ValueError: an unknown format, a folder that is not empty, or a model that the format has no place for.
        ImportError: "hf" without transformers.
    """
    if to not in FORMATS:
        raise ValueError(f"cannot convert to {to!r}: expected {', '.join(FORMATS)}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty: give another folder, or remove it")
    if clip.adapter is not None:
        raise ValueError(f"{clip.name} has an adapter, which these formats have no place for: convert its base")
    clip = as_open_clip(clip)
    if to == "open_clip":
        return clip.save(folder)
    if to == "hf":
        return _save_hf(clip, folder)
    buffer = io.BytesIO()
    torch.save({name: t.detach().cpu().contiguous() for name, t in clip.visual.state_dict().items()}, buffer)
    write_bytes(folder / VISUAL, buffer.getvalue())
    return folder


def read_back(clip: Clip, folder: str | Path, to: str) -> Clip:
    """What `convert(clip, folder, to)` wrote, as `load_clip` reads it; a vision tower beside the clip's texts."""
    if to != "visual":
        return load_clip(f"hf:{folder}" if to == "hf" else str(Path(folder).resolve()), clip.device)
    other = copy.deepcopy(as_open_clip(clip))
    for tensor in other.visual.state_dict().values():
        tensor.zero_()
    load_weights(other.model, Path(folder) / VISUAL)
    return other


def difference(clip: Clip, other: Clip) -> float:
    """Largest difference of the unit-norm embeddings of some noise and some texts."""
    x = torch.rand(4, 3, clip.size, clip.size, generator=torch.Generator().manual_seed(0))
    texts = ["a photo of a cat.", "two dogs on a beach", "3"]
    with torch.no_grad():
        images, words = (
            [encode(model).float().cpu() for model in (clip, other)]
            for encode in (lambda model: model(x.to(model.device)), lambda model: model.encode_text(texts))
        )
    return max((a - b).abs().max().item() for a, b in (images, words))


def as_open_clip(clip: Clip) -> Clip:
    """The Clip itself, or for a CLIPModel of transformers one of open_clip with the same weights.

    Raises:
        ValueError: no such model can be built, or the tokenizer is not CLIP's.
    """
    import open_clip

    if clip.config is not None:
        return clip
    if not hasattr(clip.model, "vision_model"):
        raise ValueError(f"{clip.name} has no open_clip config, so it cannot be converted: build it with load_clip")
    model_cfg = _open_clip_config(clip.model.config)
    tokenizer = open_clip.SimpleTokenizer(context_length=model_cfg["text_cfg"]["context_length"])
    if _their_vocabulary(tokenizer) != clip.tokenizer.tokenizer.get_vocab():
        raise ValueError(f"{clip.name} has a tokenizer of its own: open_clip's has CLIP's 49408 words")
    theirs = dict(clip.model.state_dict())
    layers = (model_cfg["vision_cfg"]["layers"], model_cfg["text_cfg"]["layers"])
    state = {}
    for ours, names in _names(*layers):
        tensors = [theirs.pop(name) for name in names]
        state[ours] = (
            tensors[0].T.contiguous() if ours in TRANSPOSED else torch.cat(tensors) if tensors[1:] else tensors[0]
        )
    _nothing_left(clip.name, theirs)
    with torch.random.fork_rng(devices=[]):
        model = open_clip.CLIP(**json.loads(json.dumps(model_cfg)))
    model.load_state_dict(state)
    preprocess = {"mean": clip.mean.flatten().tolist(), "std": clip.std.flatten().tolist()}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess | getattr(clip.visual, "preprocess_cfg", {})}
    return Clip(model, tokenizer, name=clip.name, config=config).to(clip.device).eval()


def _save_hf(clip: Clip, folder: Path) -> Path:
    try:
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
    except ImportError as error:
        raise ImportError(f'converting to hf needs transformers: pip install "rvlm[hf]" ({error})') from error
    told, processor = _hf_config(clip.name, clip.config["model_cfg"]), CLIPImageProcessor(**_processor(clip))
    if clip.config["model_cfg"]["text_cfg"].get("hf_tokenizer_name") or not hasattr(clip.tokenizer, "bpe_ranks"):
        raise ValueError(f"{clip.name} has a tokenizer of its own: a CLIPModel is written with CLIP's")
    ours, state = dict(clip.model.state_dict()), {}
    layers = [told[side]["num_hidden_layers"] for side in ("vision_config", "text_config")]
    for name, theirs in _names(*layers):
        tensor = ours.pop(name).detach().cpu()
        parts = (tensor.T,) if name in TRANSPOSED else tensor.chunk(len(theirs)) if theirs[1:] else (tensor,)
        state |= zip(theirs, (part.contiguous() for part in parts), strict=True)
    _nothing_left(clip.name, ours)
    with torch.random.fork_rng(devices=[]):
        model = CLIPModel(CLIPConfig(**told))
    model.load_state_dict(state)
    tokenizer = CLIPTokenizer(
        vocab=_their_vocabulary(clip.tokenizer), merges=[tuple(pair) for pair in clip.tokenizer.bpe_ranks],
        model_max_length=told["text_config"]["max_position_embeddings"],
    )  # fmt: skip
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder


def _processor(clip: Clip) -> dict:
    preprocess = clip.config["preprocess_cfg"]
    mode, interpolation = preprocess.get("resize_mode", "shortest"), preprocess.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or interpolation not in RESAMPLE:
        raise ValueError(
            f"{clip.name}: images resized by {mode}, {interpolation}, are nothing that transformers' CLIP does"
        )
    square, squash = {"height": clip.size, "width": clip.size}, mode == "squash"
    return {
        "image_mean": list(preprocess.get("mean", clip.mean.flatten().tolist())),
        "image_std": list(preprocess.get("std", clip.std.flatten().tolist())), "crop_size": square,
        "size": square if squash else {"shortest_edge": clip.size}, "do_center_crop": not squash,
        "resample": RESAMPLE[interpolation],
    }  # fmt: skip


def _names(vision_layers: int, text_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """open_clip's name of every weight with transformers'; three of them for queries, keys and values."""
    for ours, theirs in TENSORS.items():
        yield ours, (theirs,)
    modules = dict(MODULES)
    for ours, side, layers in (("visual.", "vision", vision_layers), ("", "text", text_layers)):
        for k in range(layers):
            at, there = f"{ours}transformer.resblocks.{k}", f"{side}_model.encoder.layers.{k}"
            modules |= {f"{at}.{part}": f"{there}.{name}" for part, name in BLOCK.items()}
            for kind in ("weight", "bias"):
                yield f"{at}.attn.in_proj_{kind}", tuple(f"{there}.self_attn.{c}_proj.{kind}" for c in "qkv")
    for ours, theirs in modules.items():
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", (f"{theirs}.{kind}",)


def _hf_config(name: str, model_cfg: dict) -> dict:
    """What CLIPConfig takes; everything that it cannot say must be open_clip's default."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    model_cfg = dict(model_cfg)
    vision, text = CLIPVisionCfg(**model_cfg.pop("vision_cfg")), CLIPTextCfg(**model_cfg.pop("text_cfg"))
    said = {"width", "layers", "mlp_ratio"}
    odd = [
        key for key, value in model_cfg.items() if value and key not in ("embed_dim", "quick_gelu", "init_logit_scale")
    ]
    for side, cfg, more in (
        ("vision_cfg", vision, {"head_width", "patch_size", "image_size", "patch_dropout"}),
        ("text_cfg", text, {"heads", "context_length", "vocab_size"}),
    ):
        usual = dataclasses.asdict(type(cfg)())
        odd += [f"{side}.{k}" for k, v in dataclasses.asdict(cfg).items() if k not in said | more and v != usual[k]]
    if not isinstance(vision.layers, int):
        odd.append("vision_cfg.layers of a ResNet")
    if odd:
        raise ValueError(f"{name}: a CLIPModel of transformers has no place for {', '.join(odd)}")

    def tower(cfg: CLIPVisionCfg | CLIPTextCfg, heads: int) -> dict:
        return {
            "hidden_size": cfg.width, "num_hidden_layers": cfg.layers, "num_attention_heads": heads,
            "intermediate_size": int(cfg.width * cfg.mlp_ratio), "projection_dim": model_cfg["embed_dim"],
            "hidden_act": "quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        }  # fmt: skip

    last = text.vocab_size - 1  # the end of a text has the largest number, which open_clip looks for
    return {
        "projection_dim": model_cfg["embed_dim"],
        "vision_config": tower(vision, vision.width // vision.head_width)
        | {"image_size": vision.image_size, "patch_size": vision.patch_size},
        "text_config": tower(text, text.heads)
        | {
            "vocab_size": text.vocab_size, "max_position_embeddings": text.context_length, "bos_token_id": last - 1,
            "eos_token_id": last, "pad_token_id": last,
        },
    }  # fmt: skip


def _open_clip_config(config) -> dict:
    """open_clip's model_cfg for a CLIPConfig."""
    vision, text = config.vision_config, config.text_config
    for side in (vision, text):
        if side.hidden_act != vision.hidden_act or side.hidden_act not in ACTIVATIONS:
            raise ValueError(f"activation {side.hidden_act}: open_clip has {' or '.join(ACTIVATIONS)}, in both towers")
        if side.layer_norm_eps != 1e-5:
            raise ValueError(f"layer_norm_eps {side.layer_norm_eps}: open_clip's CLIP has 1e-05")
    if text.eos_token_id not in (2, text.vocab_size - 1):  # 2 is how transformers writes "the largest"
        raise ValueError(f"eos_token_id {text.eos_token_id}: open_clip's CLIP reads texts at the largest number")

    def tower(side) -> dict:
        ratio = side.intermediate_size / side.hidden_size
        if int(side.hidden_size * ratio) < side.intermediate_size:
            ratio = math.nextafter(ratio, math.inf)
        return {"width": side.hidden_size, "layers": side.num_hidden_layers, "mlp_ratio": ratio}

    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": ACTIVATIONS[vision.hidden_act],
        "vision_cfg": tower(vision)
        | {
            "image_size": vision.image_size, "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
        },
        "text_cfg": tower(text)
        | {
            "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
        },
    }  # fmt: skip


def _their_vocabulary(tokenizer) -> dict[str, int]:
    return {SPECIAL.get(word, word): number for word, number in tokenizer.encoder.items()}


def _nothing_left(name: str, state: dict[str, Tensor]) -> None:
    if state:
        raise ValueError(f"{name}: the other format has no place for {', '.join(sorted(state)[:5])}")
