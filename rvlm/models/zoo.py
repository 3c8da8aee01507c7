"""Names of models that are trained on this machine at first use and cached.

Training stands above models in the house, so this file may not import it. It names the function that can build a model
and resolves the name when one is asked for, as a plug-in would be.
"""

import importlib
from pathlib import Path

__all__ = ["NAMES", "folder_of"]

NAMES = ("digits-vit", "digits-rn", "digits-vit-tecoa")
_BUILDER = "rvlm.training.zoo:folder_of"


def folder_of(name: str) -> Path:
    """The checkpoint folder of a name in NAMES; trains the model first if the cache has none."""
    module, function = _BUILDER.split(":")
    return getattr(importlib.import_module(module), function)(name)
