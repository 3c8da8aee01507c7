"""Training: one loop for every method, and the tiny models that are trained on first use."""

from rvlm.training.trainer import TrainResult, train

__all__ = ["TrainResult", "train"]
