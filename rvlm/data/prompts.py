"""Prompt templates by id. "{}" stands for the class name."""

__all__ = ["TEMPLATES", "templates"]

TEMPLATES: dict[str, list[str]] = {
    "plain": ["a photo of a {}."],
    "tecoa": ["This is a photo of a {}"],  # Mao et al. 2023, training prompt of TeCoA, PMG-AFT and HPT-GPD
    "digits": ["a scan of the digit {}.", "the handwritten number {}."],
}
_OF_OPEN_CLIP = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}


def templates(name: str) -> list[str]:
    """The templates called `name`: "plain", "tecoa", "digits", "openai" (CLIP's 80 for ImageNet), "simple" (7)."""
    if name in _OF_OPEN_CLIP:
        import open_clip

        return [template("{}") for template in getattr(open_clip, _OF_OPEN_CLIP[name])]
    if name not in TEMPLATES:
        raise ValueError(f"unknown templates {name!r}: expected one of {', '.join([*TEMPLATES, *_OF_OPEN_CLIP])}")
    return TEMPLATES[name]
