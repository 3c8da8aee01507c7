"""What makes a robust tower robust: comparisons of two CLIPs of one architecture, layer by layer (R-Adapt's analyses).

linear_cka, cka_matrix       how alike what two layers say is
replacements                 accuracy while modules of one tower take the place of the other's
spectral_shift               what changed in the patch embedding's filters, by frequency
attention_map, insensitivity where a block looks, and how much of its answer does not depend on the image
drift                        how far every module's weights moved
"""

from rvlm.analysis.attention import attention_map, insensitivity
from rvlm.analysis.cka import cka_matrix, linear_cka
from rvlm.analysis.replace import Replacements, drift, replacements, units
from rvlm.analysis.spectrum import spectral_shift

__all__ = [
    "Replacements", "attention_map", "cka_matrix", "drift", "insensitivity", "linear_cka", "replacements",
    "spectral_shift", "units",
]  # fmt: skip
