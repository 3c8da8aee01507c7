"""Evaluation: clean and robust accuracy as records that can be compared and repeated, and checks of a user's model."""

from rvlm.evaluation.check import Finding, check
from rvlm.evaluation.evaluate import Evaluation, evaluate, parse_attack
from rvlm.evaluation.metrics import wilson
from rvlm.evaluation.records import summary_row, write_evaluation, write_json

__all__ = [
    "Evaluation", "Finding", "check", "evaluate", "parse_attack", "summary_row", "wilson",
    "write_evaluation", "write_json",
]  # fmt: skip
