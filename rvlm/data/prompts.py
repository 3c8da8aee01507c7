"""Prompt templates by id. "{}" stands for the class name."""

import hashlib
import json
from pathlib import Path

__all__ = ["TEMPLATES", "fingerprint", "templates"]

TEMPLATES: dict[str, list[str]] = {
    "plain": ["a photo of a {}."],
    "tecoa": ["This is a photo of a {}"],  # Mao et al. 2023, training prompt of TeCoA, PMG-AFT and HPT-GPD
    # Zhou et al. 2022 (CoOp), the hand-written prompts that learned ones are compared with.
    "coop/plain": ["a photo of a {}."],
    "coop/pets": ["a photo of a {}, a type of pet."],
    "coop/flowers": ["a photo of a {}, a type of flower."],
    "coop/aircraft": ["a photo of a {}, a type of aircraft."],
    "coop/food": ["a photo of {}, a type of food."],
    "coop/textures": ["{} texture."],
    "coop/satellite": ["a centered satellite photo of {}."],
    "coop/actions": ["a photo of a person doing {}."],
    "digits": ["a scan of the digit {}.", "the handwritten number {}."],
}
_OF_OPEN_CLIP = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}


def templates(name: str) -> list[str]:
    """The templates called `name`: one of TEMPLATES, "openai" (CLIP's 80 for ImageNet), "simple" (7), or "file:PATH".

    A file holds a template on each line, with "{c}" (as CLIP_benchmark writes them) or "{}" for the class name.
    """
    if name in _OF_OPEN_CLIP:
        import open_clip

        return [template("{}") for template in getattr(open_clip, _OF_OPEN_CLIP[name])]
    if name.startswith("file:"):
        file = Path(name.removeprefix("file:"))
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}: expected a template with {{c}} on each line")
        found = [line.strip().replace("{c}", "{}") for line in file.read_text(encoding="utf-8").rstrip().split("\n")]
        wrong = [line for line in found if "{}" not in line]
        if wrong:
            raise ValueError(f"{file}: {wrong[0]!r} has no {{c}} for the class name")
        return found
    if name not in TEMPLATES:
        known = ", ".join([*TEMPLATES, *_OF_OPEN_CLIP, "file:PATH"])
        raise ValueError(f"unknown templates {name!r}: expected one of {known}")
    return TEMPLATES[name]


def fingerprint(found: list[str]) -> str:
    """Hash of a list of templates or of class names, as records hold it."""
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
