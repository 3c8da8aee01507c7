"""The model card of an exported CLIP: what it is, how it was trained, how robust it was found to be, how to load it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rvlm
from rvlm.evaluation import summary_row
from rvlm.evaluation.records import RETRIEVAL, SCHEMA
from rvlm.models import Clip
from rvlm.models.convert import VISUAL
from rvlm.models.weights import weights_sha
from rvlm.report.tables import markdown

__all__ = ["model_card"]

COLUMNS = {
    "data": "data", "metric": "metric", "clean": "clean %", "robust": "robust %", "eps": "eps", "norm": "norm",
    "attack": "attack", "target": "target", "samples": "samples", "status": "of the set",
}  # fmt: skip
HERE = ("out", "device", "config", "tensorboard")  # settings that say nothing about the model
LOAD = {
    "open_clip": """import open_clip
from rvlm.models import load_clip

clip = load_clip("FOLDER")  # pixels in [0, 1] in, normalisation inside
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")""",
    "hf": """from rvlm.models import load_clip
from transformers import CLIPModel, CLIPProcessor

clip = load_clip("hf:FOLDER")  # pixels in [0, 1] in, normalisation inside
model, processor = CLIPModel.from_pretrained("FOLDER"), CLIPProcessor.from_pretrained("FOLDER")""",
    "visual": f"""from rvlm.models import load_clip

# A vision tower alone: BASE is the CLIP that it was trained from, such as ViT-B-32:openai.
clip = load_clip("BASE+weights=FOLDER/{VISUAL}")""",
}


def model_card(clip: Clip, to: str, runs: Sequence[str | Path] = ()) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        clip: the model as it was loaded, before it was converted.
        to: a format of `rvlm.models.convert`.
        runs: run folders of `rvlm train` and `rvlm eval`; records of other weights are left out.
    """
    sha = weights_sha(clip)
    rows, trained = [], None
    for run in map(Path, runs):
        for path in sorted((run / "result").glob("*.json")):
            record = json.loads(path.read_text())
            if record.get("schema") in (SCHEMA, RETRIEVAL) and record["model"]["sha256"] == sha:
                rows.append(summary_row(record, path.name) | {"status": record["status"]})
                trained = trained or (_settings(run) if record["model"]["method"] else None)
    front = {"open_clip": "library_name: open_clip\n", "hf": "library_name: transformers\n", "visual": ""}[to]
    parameters = sum(p.numel() for p in clip.model.parameters()) / 1e6
    mean, std = (", ".join(f"{v:.4g}" for v in values.flatten().tolist()) for values in (clip.mean, clip.std))
    facts = [
        f"Written by rvlm {rvlm.__version__} from `{clip.name}`, {parameters:.1f} M parameters, weights `{sha}`.",
        f"Images of {clip.size} x {clip.size} pixels, mean {mean}, std {std}; "
        f"{'QuickGELU' if 'QuickGELU' in repr(clip.model) else 'GELU'} in its transformers.",
    ]
    if trained:
        facts.insert(0, f"Base: `{trained['student']}`. Method: {trained['method']}, preset {trained['preset']}.")
    parts = [
        f"---\n{front}pipeline_tag: zero-shot-image-classification\ntags: [clip, adversarial-robustness]\n---\n",
        f"# {_title(clip, trained)}\n",
        "\n".join(facts) + "\n",
        "## Robustness\n",
        _robustness(rows),
    ]
    if trained:
        import yaml

        settings = {key: value for key, value in trained.items() if key not in HERE}
        parts += ["## Training\n", f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```\n"]
    return "\n".join([*parts, "## Load\n", f"```python\n{LOAD[to]}\n```\n"])


def _title(clip: Clip, trained: dict[str, Any] | None) -> str:
    return f"{trained['student']}, {trained['method']}" if trained else clip.name


def _settings(run: Path) -> dict[str, Any] | None:
    """Of the `rvlm train` that the folder is of."""
    import yaml

    file = run / "config.yaml"
    told = yaml.safe_load(file.read_text()) if file.is_file() else {}
    return told if {"method", "student", "preset"} <= set(told) else None


def _robustness(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "Not measured: there was no record of these weights.\n"
    return (
        markdown(rows, COLUMNS)
        + "\nWith 95 % Wilson intervals. eps is in units of pixels in [0, 1]. A robust figure is an upper bound: a "
        "stronger attack may find more. `transfer` rows are of images made on another model and bound nothing.\n"
    )
