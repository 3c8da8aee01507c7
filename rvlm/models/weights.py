"""Models by their content: weights, and what decides their outputs beside the weights."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["differing", "settings_of", "weights_of", "weights_sha"]


def weights_sha(model: nn.Module) -> str:
    """Hash of names and values of everything in the state dict."""
    return _sha(model.state_dict())


def weights_of(model: Any) -> str | None:
    """Hash of the weights as records hold it: of a classifier its Clip's, of a plain callable None."""
    model = getattr(model, "clip", model)
    return weights_sha(model) if isinstance(model, nn.Module) else None


def settings_of(model: Any) -> dict[str, Any]:
    """What decides a module's outputs and is in no state dict, by the path of the part that it belongs to.

    A part says so itself by a dict `settings` of plain values whose class has it as a property (`Clip`: size,
    interpolation, mean, std, activation; `ZeroShotClassifier`: hashes of templates and class names). Of other parts it
    is a hash of the buffers that state dicts leave out. Of a plain callable nothing can be seen: {}.
    """
    if not isinstance(model, nn.Module):
        return {}
    found: dict[str, Any] = {}
    rest, kept = {}, model.state_dict().keys()
    for path, part in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(getattr(type(part), "settings", None), property):
            found |= {prefix + name: value for name, value in part.settings.items()}
        else:
            rest |= {prefix + name: buffer for name, buffer in part._buffers.items() if buffer is not None}
    if hidden := {name: buffer for name, buffer in rest.items() if name not in kept}:
        found["buffers"] = _sha(hidden)
    return found


def differing(recorded: dict[str, Any], model: Any) -> list[str]:
    """Sentences on the settings in which a model is not the recorded one; what was not recorded is not compared."""
    here = settings_of(model)
    return [
        f"{name} was {value!r}, is {here.get(name)!r}" for name, value in recorded.items() if here.get(name) != value
    ]


def _sha(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
