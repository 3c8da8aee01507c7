"""The tiny models that `load_clip("digits-vit")` and its kin name: trained once on the digits, cached by config.

The cache is $RVLM_CACHE, or ~/.cache/rvlm. A model is built in a temporary folder that is then renamed: a build that is
killed leaves nothing, and of two at the same time the first to finish wins.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from rvlm.data import load_data
from rvlm.files import cache_root
from rvlm.methods import build_method
from rvlm.models import load_clip, tiny
from rvlm.ranks import Ranks
from rvlm.training.trainer import train

__all__ = ["RECIPES", "folder_of"]

RECIPES: dict[str, dict] = {
    "digits-vit": {"student": "tiny-vit", "method": "clip"},
    "digits-rn": {"student": "tiny-rn", "method": "clip"},
    "digits-vit-tecoa": {"student": "digits-vit", "method": "tecoa"},
}


def folder_of(name: str, progress: bool = True) -> Path:
    """The checkpoint folder of a name in RECIPES; trains the model (10 to 60 s on two cores) if the cache lacks it."""
    recipe = RECIPES[name]
    folder = cache_root() / "zoo" / f"{name}-{_key(name)}"
    if folder.is_dir():
        return folder
    student = load_clip(recipe["student"])
    train(student, load_data("digits", "train"), build_method(recipe["method"]), progress=progress, ranks=Ranks.alone())
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
    try:
        student.save(temporary)
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same model
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _key(name: str) -> str:
    """Hash of all that decides the weights."""
    recipe = RECIPES[name]
    start = recipe["student"]
    origin = tiny.ARCHITECTURES[start] if start in tiny.ARCHITECTURES else _key(start)
    config = dataclasses.asdict(build_method(recipe["method"]).config)
    text = json.dumps([origin, recipe["method"], config], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
