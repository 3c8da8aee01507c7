"""What counts as adversarial."""

from torch import Tensor

__all__ = ["Misclassification", "TargetedMisclassification"]


class Misclassification:
    """Another class than the labels [B]."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __call__(self, perturbed: Tensor, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1) != self.labels


class TargetedMisclassification:
    """The target classes [B]."""

    def __init__(self, target_classes: Tensor) -> None:
        self.target_classes = target_classes

    def __call__(self, perturbed: Tensor, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1) == self.target_classes
