"""Module replacement: which part of a robust tower carries its robustness."""

import copy
import dataclasses

import torch
from torch import Tensor

from rvlm.data import Data
from rvlm.evaluation import Evaluation, evaluate
from rvlm.models import Clip, ZeroShotClassifier

__all__ = ["Replacements", "drift", "replacements", "units", "without_adapters"]


@dataclasses.dataclass
class Replacements:
    """Accuracies of towers between a base and a robust one.

    Attributes:
        steps: what had been replaced, "base" first.
        white_box: evaluations of every step, images made on it.
        transfer: the same with images made on the base.
    """

    steps: list[str]
    white_box: list[Evaluation]
    transfer: list[Evaluation]


def units(clip: Clip) -> dict[str, list[str]]:
    """The parts of a vision tower in the order of the data's way, with the names of their weights.

    "Emb" (patch, class and position embeddings, ln_pre), "B1-Attn" (the first block's ln_1 and attention), "B1" (the
    rest of it), "B2", ..., "Head" (ln_post and projection).

    Raises:
        ValueError: the tower is no VisionTransformer of open_clip.
    """
    names = list(clip.model.visual.state_dict())
    if not any(name.startswith("transformer.resblocks.") for name in names):
        raise ValueError(f"{clip.name} ({type(clip.model.visual).__name__}): expected a VisionTransformer of open_clip")
    found: dict[str, list[str]] = {"Emb": [], "B1-Attn": []}
    head = []
    for name in names:
        if name.startswith("transformer.resblocks."):
            number, rest = name.removeprefix("transformer.resblocks.").split(".", 1)
            first = number == "0" and rest.split(".")[0] in ("ln_1", "attn", "ls_1")
            found.setdefault("B1-Attn" if first else f"B{int(number) + 1}", []).append(name)
        elif name.startswith(("ln_post", "proj", "attn_pool")):
            head.append(name)
        else:
            found["Emb"].append(name)
    return found | {"Head": head}


def replacements(
    base: Clip, robust: Clip, data: Data, *, cumulative: bool = True, attack: str = "pgd-10",
    eps: str | float = "4/255", templates: str | list[str] = "plain", seed: int = 0, batch_size: int = 100,
    progress: bool = True,
) -> Replacements:  # fmt: skip
    """Accuracy while units of the base are replaced by the robust tower's.

    Args:
        base, robust: of one architecture; neither is changed. Text comes from the base.
        cumulative: each step keeps what was replaced before it, up to the whole tower; else one unit at a time.
        attack, eps, seed, batch_size: of the evaluations (Linf); every step twice, white-box and by transfer from the
            base, as the published figures seem to be.

    Raises:
        ValueError: different architectures.
    """
    parts = units(base)
    ours, theirs = base.model.visual.state_dict(), robust.model.visual.state_dict()
    _same(base, ours, robust, theirs)
    original = ZeroShotClassifier(base, data.class_names, templates)
    hybrid = copy.deepcopy(base)
    classifier = ZeroShotClassifier(hybrid, data.class_names, templates).eval()
    found = Replacements([], [], [])
    given = {"attack": attack, "eps": eps, "seed": seed, "batch_size": batch_size, "device": base.device}
    weights = dict(ours)
    for step, names in {"base": [], **parts}.items():
        weights = dict(weights if cumulative else ours) | {name: theirs[name] for name in names}
        hybrid.model.visual.load_state_dict(weights)
        found.steps.append(step)
        found.white_box.append(evaluate(classifier, data, **given, progress=progress))
        found.transfer.append(evaluate(classifier, data, source=original, **given, progress=progress))
    return found


def drift(base: Clip, robust: Clip) -> dict[str, float]:
    """How far the weights of every unit moved: |w' - w| / |w| over all of its weights."""
    ours, theirs = base.model.visual.state_dict(), robust.model.visual.state_dict()
    _same(base, ours, robust, theirs)

    def norm(tensors: list[Tensor]) -> float:
        return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())

    return {
        unit: norm([theirs[name] - ours[name] for name in names]) / norm([ours[name] for name in names])
        for unit, names in units(base).items()
    }


def without_adapters(*clips: Clip) -> None:
    """Refuses what stands around a tower where its weights alone are looked at."""
    for clip in clips:
        if clip.adapter is not None:
            raise ValueError(f"{clip.name} has an adapter, which is no part of the weights that are compared")


def _same(base: Clip, ours: dict[str, Tensor], robust: Clip, theirs: dict[str, Tensor]) -> None:
    without_adapters(base, robust)
    if {name: t.shape for name, t in ours.items()} != {name: t.shape for name, t in theirs.items()}:
        raise ValueError(
            f"{base.name} and {robust.name} have different vision towers: they must be of one architecture"
        )
