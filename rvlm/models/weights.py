"""Weights by their content."""

import hashlib

import torch
from torch import nn

__all__ = ["weights_sha"]


def weights_sha(model: nn.Module) -> str:
    """Hash of names and values of everything in the state dict."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
