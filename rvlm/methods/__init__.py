"""Training methods: one file per paper, whose docstring holds the formulas.

    method = build_method("tecoa", preset="rvlm", eps=4 / 255)

`list_methods()` has their names.
"""

from rvlm.methods import (  # noqa: F401  (registers them)
    apd,
    apt,
    ard,
    clip,
    fap,
    fare,
    hpt_gpd,
    mmt_ard,
    pmg_aft,
    prompt_tuning,
    r_adapt,
    tecoa,
)
from rvlm.methods.base import Batch, Method, MethodConfig, Stage, build_method, list_methods, method_class

__all__ = ["Batch", "Method", "MethodConfig", "Stage", "build_method", "list_methods", "method_class"]
