"""Evaluation: clean and robust accuracy as records that can be compared and repeated, and checks of a user's model."""

from rvlm.evaluation.across import both_targets, over_radii
from rvlm.evaluation.check import Finding, check
from rvlm.evaluation.compare import Comparison, compare
from rvlm.evaluation.evaluate import Evaluation, evaluate, parse_attack
from rvlm.evaluation.metrics import wilson
from rvlm.evaluation.protocols import Protocol, load_protocol, protocol_names
from rvlm.evaluation.records import summary_row, write_evaluation, write_json, write_retrieval, write_transfer
from rvlm.evaluation.repro import Reproduction, read_recorded
from rvlm.evaluation.retrieval import Retrieval, retrieve
from rvlm.evaluation.saved import SavedImages, load_images
from rvlm.evaluation.transfer import TransferMatrix, transfer_matrix

__all__ = [
    "Comparison", "Evaluation", "Finding", "Protocol", "Reproduction", "Retrieval", "SavedImages", "TransferMatrix",
    "both_targets", "check", "compare", "evaluate", "load_images", "load_protocol", "over_radii", "parse_attack",
    "protocol_names", "read_recorded", "retrieve", "summary_row", "transfer_matrix", "wilson", "write_evaluation",
    "write_json", "write_retrieval", "write_transfer",
]  # fmt: skip
