"""What the commands of `rvlm.cli` do. Each takes its arguments and returns an exit code."""

from rvlm.commands.about import demo, info, ls
from rvlm.commands.analyze import analyze
from rvlm.commands.check import bench, check
from rvlm.commands.data import data
from rvlm.commands.evaluate import attack, eval
from rvlm.commands.lvlm import lvlm
from rvlm.commands.profile import profile
from rvlm.commands.records import compare, report, repro
from rvlm.commands.train import convert, train

__all__ = [
    "analyze", "attack", "bench", "check", "compare", "convert", "data", "demo", "eval", "info", "ls", "lvlm",
    "profile", "report", "repro", "train",
]  # fmt: skip
