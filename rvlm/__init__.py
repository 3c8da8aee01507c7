"""rvlm: attack, defend and measure vision-language models.

The layers, lowest first: `rvlm.ops` (fused kernels), `rvlm.attacks` (model-agnostic adversarial attacks),
`rvlm.models` and `rvlm.data`, `rvlm.methods` and `rvlm.training` (defences), `rvlm.evaluation` and `rvlm.report`.
Importing `rvlm` imports none of them.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
