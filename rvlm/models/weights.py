"""Weights by their content."""

import hashlib
from typing import Any

import torch
from torch import nn

__all__ = ["weights_of", "weights_sha"]


def weights_sha(model: nn.Module) -> str:
    """Hash of names and values of everything in the state dict."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def weights_of(model: Any) -> str | None:
    """Hash of the weights as records hold it: of a classifier its Clip's, of a plain callable None."""
    model = getattr(model, "clip", model)
    return weights_sha(model) if isinstance(model, nn.Module) else None
