"""Training methods: one file per paper, whose docstring holds the formulas.

method = build_method("tecoa", preset="rvlm", eps=4 / 255)
"""

from rvlm.methods import advvp, ard, clip, fare, hpt_gpd, mmt_ard, pmg_aft, r_adapt, tecoa  # noqa: F401  (registers them)
from rvlm.methods.base import Batch, Method, MethodConfig, Stage, build_method, list_methods, method_class

__all__ = ["Batch", "Method", "MethodConfig", "Stage", "build_method", "list_methods", "method_class"]
