"""foolbox (3.3.4) for PyTorch on rvlm's engine: `import rvlm.compat.foolbox as fb`.

    fmodel = fb.PyTorchModel(model, bounds=(0, 1))
    raw, clipped, success = fb.attacks.LinfPGD()(fmodel, images, labels, epsilons=[2 / 255, 8 / 255])

Same signatures, defaults, returned tuples and random draws. The radii of a list run as one batch. What was computed
leaves no gradients in the model's parameters. docs/compat.md has the table of classes.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rvlm.compat.common import Preprocessed
from rvlm.compat.foolbox import attacks, criteria
from rvlm.compat.foolbox.criteria import Misclassification, TargetedMisclassification

__all__ = ["Misclassification", "PyTorchModel", "TargetedMisclassification", "accuracy", "attacks", "criteria"]


class PyTorchModel:
    """A module, the box of its pixels, and a normalisation in front of it.

    Args:
        model: moved to `device`; its mode is left as it is.
        bounds: (lower, upper).
        device: None: a GPU if there is one.
        preprocessing: {"mean", "std", "axis"}: pixels minus mean over std, along the axis -3 unless given.
    """

    data_format = "channels_first"

    def __init__(
        self,
        model: nn.Module,
        bounds: tuple[float, float],
        device: torch.device | str | None = None,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError("expected model to be a torch.nn.Module instance")
        if model.training:
            warnings.warn("the model is in training mode: call its eval() if that is not meant", stacklevel=2)
        default = "cuda:0" if torch.cuda.is_available() else "cpu"
        self.device, self.bounds = torch.device(default if device is None else device), tuple(bounds)
        model = model.to(self.device)
        self.model = Preprocessed(model, _preprocessing(preprocessing)) if preprocessing else model

    def __call__(self, inputs: Tensor) -> Tensor:
        with torch.set_grad_enabled(inputs.requires_grad):
            return self.model(inputs)


def accuracy(fmodel: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> float:
    """Share of the inputs that the model gets right."""
    return (fmodel(inputs).argmax(-1) == labels).float().mean().item()


def _preprocessing(given: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    unknown = set(given) - {"mean", "std", "axis"}
    if unknown:
        raise ValueError(f"preprocessing knows mean, std and axis, got {', '.join(sorted(unknown))}")
    axis = given.get("axis")
    if axis is not None and axis >= 0:
        raise ValueError("expected axis to be None or negative, -1 refers to the last axis")

    def shaped(name: str, x: Tensor) -> Tensor:
        value = torch.as_tensor(given.get(name, 0.0 if name == "mean" else 1.0)).to(x)
        return value.view(*value.shape, *[1] * (-1 - axis)) if axis is not None and value.dim() == 1 else value

    return lambda x: (x - shaped("mean", x)) / shaped("std", x)
