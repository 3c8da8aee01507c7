"""How a spec becomes a CLIP: open_clip names and tags, checkpoint folders, tiny models, models trained on first use."""

import json
import os
import pickle
from pathlib import Path

import torch

from rvlm.models import tiny, zoo
from rvlm.models.adapter import ADAPTER_CONFIG, Adapter, apply_adapter
from rvlm.models.checkpoints import load_weights, read_weights
from rvlm.models.clip import CONFIG, WEIGHTS, Clip
from rvlm.models.weights import weights_sha

__all__ = ["load_clip"]


def load_clip(spec: str, device: str | torch.device = "cpu", *, seed: int = 0) -> Clip:
    """Loads a CLIP in eval mode.

    Args:
        spec: `ARCH:PRETRAINED` with an open_clip tag or a checkpoint file ("ViT-B-32:openai"), `ARCH` (random weights),
            `hf-hub:ORG/NAME`, `hf:PATH_OR_NAME` (a CLIPModel of transformers with its tokenizer, in a folder or on the
            hub), a folder with open_clip_model.safetensors and open_clip_config.json or with an adapter (or a run
            folder with such a `checkpoint`), `tiny-vit` or `tiny-rn` (random weights, 32 px), or `digits-vit`,
            `digits-rn`, `digits-vit-tecoa` (trained on first use, then cached). Any of these may be followed by
            `+weights=FILE`, weights of the same architecture that another training script saved, a vision tower alone
            or all (see `rvlm.models.checkpoints`), and by `+adapter=FOLDER`.
        device: where to put it.
        seed: of random weights.

    Raises:
        FileNotFoundError: no such folder or file, or weights that cannot be fetched. ImportError: hf: without
            transformers. ValueError: unknown architecture or tag; weights of another architecture; QuickGELU in the
            checkpoint and not in the architecture, or the reverse.
    """
    base, plus, adapter = spec.partition("+adapter=")
    if plus:
        clip = apply_adapter(load_clip(base, device, seed=seed), adapter)
        clip.name = spec
        return clip
    base, plus, file = spec.rpartition("+weights=")
    if plus:
        clip = load_clip(base, device, seed=seed)
        load_weights(clip.model, file)
        clip.name = spec
        return clip
    if spec in zoo.NAMES:
        clip = _from_folder(zoo.folder_of(spec), spec)
    elif spec in tiny.ARCHITECTURES:
        clip = tiny.build(spec, seed)
    elif spec.startswith("hf-hub:"):
        clip = _from_hub(spec)
    elif spec.startswith("hf:"):
        clip = _from_transformers(spec)
    elif os.sep in spec.split(":")[0] or Path(spec).is_dir():
        clip = _from_folder(Path(spec), spec)
    else:
        clip = _from_architecture(spec, seed)
    return clip.to(device).eval()


def _from_folder(folder: Path, name: str) -> Clip:
    import open_clip

    folder = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
    if (folder / ADAPTER_CONFIG).is_file():
        adapter = Adapter.load(folder)
        clip, about = load_clip(adapter.config.base), adapter.config
        if about.base_sha not in ("", weights_sha(clip.model)):
            raise ValueError(
                f"the adapter in {folder} was made for other weights of {about.base} than load_clip({about.base!r}) "
                f"gives; to use it all the same, ask for {about.base}+adapter={folder}"
            )
        apply_adapter(clip, adapter)
        clip.name = name
        return clip
    missing = [file for file in (WEIGHTS, CONFIG) if not (folder / file).is_file()]
    if missing:
        theirs = f"; if it is one of transformers, hf:{folder}" if (folder / "config.json").is_file() else ""
        raise FileNotFoundError(
            f"{folder} lacks {' and '.join(missing)}: expected a folder written by Clip.save{theirs}"
        )
    model = open_clip.create_model(f"local-dir:{folder}")
    config = json.loads((folder / CONFIG).read_text())
    return Clip(model, _tokenizer(config, f"local-dir:{folder}"), name=name, config=config)


def _from_hub(spec: str) -> Clip:
    import open_clip
    from huggingface_hub import hf_hub_download

    model = open_clip.create_model(spec)
    config = json.loads(Path(hf_hub_download(spec.removeprefix("hf-hub:"), CONFIG)).read_text())
    return Clip(model, open_clip.get_tokenizer(spec), name=spec, config=config)


def _from_transformers(spec: str) -> Clip:
    try:
        from rvlm.models.hf import load
    except ImportError as error:
        raise ImportError(f'{spec} needs transformers: pip install "rvlm[hf]" ({error})') from error
    return load(spec.removeprefix("hf:"))


def _from_architecture(spec: str, seed: int) -> Clip:
    import open_clip

    arch, _, pretrained = spec.partition(":")
    model_cfg = open_clip.get_model_config(arch)
    if model_cfg is None:
        raise ValueError(
            f"unknown model {spec!r}: expected ARCH[:PRETRAINED] of open_clip (such as ViT-B-32:openai), "
            "hf-hub:ORG/NAME, hf:PATH_OR_NAME, a checkpoint folder, or one of the names in `rvlm ls models`"
        )
    quick_gelu = _quick_gelu(arch, pretrained, model_cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _built(arch, pretrained, quick_gelu)
    if quick_gelu:
        model_cfg = model_cfg | {"quick_gelu": True}
    keys = ("mean", "std", "interpolation", "resize_mode")
    preprocess = {key: value for key, value in model.visual.preprocess_cfg.items() if key in keys}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    return Clip(model, open_clip.get_tokenizer(arch), name=spec, config=config)


def _built(arch: str, pretrained: str, quick_gelu: bool):
    import open_clip

    try:
        return open_clip.create_model(arch, pretrained=pretrained or None, force_quick_gelu=quick_gelu)
    except (RuntimeError, AssertionError, pickle.UnpicklingError) as error:  # what open_clip has to say of keys
        if "Failed to download" in str(error):
            raise FileNotFoundError(
                f"{arch}:{pretrained} is not on this machine and could not be fetched: {error} Without a network, give "
                f"a file of its weights ({arch}:FILE), or digits-vit for a try."
            ) from error
        if not Path(pretrained).is_file():
            raise
    if read_weights(pretrained)[1]:
        raise ValueError(
            f"{pretrained} holds a vision tower alone; its text tower is that of the CLIP it was trained from: name "
            f"that one, such as {arch}:openai+weights={pretrained}"
        )
    model = open_clip.create_model(arch, force_quick_gelu=quick_gelu)
    load_weights(model, pretrained)
    return model


def _quick_gelu(arch: str, pretrained: str, model_cfg: dict) -> bool:
    """Whether to build with QuickGELU: what the checkpoint was trained with, known from its tag or its config file."""
    import open_clip

    built = bool(model_cfg.get("quick_gelu", False))
    if not pretrained:
        return built
    if Path(pretrained).is_file():
        config = Path(pretrained).parent / CONFIG
        if not config.is_file():
            return built
        trained = bool(json.loads(config.read_text())["model_cfg"].get("quick_gelu", False))
    else:
        tag = open_clip.get_pretrained_cfg(arch, pretrained)
        if not tag:
            known = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
            raise ValueError(f"{arch} has no pretrained weights {pretrained!r}: a file, or one of {known}")
        trained = bool(tag.get("quick_gelu", False))
        if trained and not built:
            return True  # the plain name with OpenAI's tag means OpenAI's model
    if trained != built:
        has, lacks = ("the checkpoint", "the architecture") if trained else ("the architecture", "the checkpoint")
        other = arch.removesuffix("-quickgelu") if built else f"{arch}-quickgelu"
        raise ValueError(
            f"QuickGELU mismatch: {has} uses it, {lacks} does not, which costs accuracy silently. "
            f"Use {other}:{pretrained}."
        )
    return trained


def _tokenizer(config: dict, source: str):
    """The tokenizer that the config names; open_clip's own, with the model's context length, if it names none."""
    import open_clip

    text = config["model_cfg"].get("text_cfg", {})
    if "hf_tokenizer_name" in text:
        return open_clip.get_tokenizer(source)
    return open_clip.SimpleTokenizer(context_length=text.get("context_length", 77))
