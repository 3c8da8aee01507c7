"""Training: one loop for every method, and the tiny models that are trained on first use."""

from rvlm.training.trainer import TrainResult, check_training, train

__all__ = ["TrainResult", "check_training", "train"]
