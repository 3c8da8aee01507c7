"""Adversarial attacks on any model: a callable from pixels in [0, 1] to logits.

    from rvlm.attacks import pgd
    x_adv = pgd(model, x, y, eps=4 / 255, steps=10)

Every attack is a function and a class of the same name (`pgd`, `PGD`; `square`, `Square`). The contract that they
share, what they promise about the model, is in `rvlm.attacks.contract`, the frame that they run in in
`rvlm.attacks.search`; `rvlm.attacks.stages` has them by name.
"""

from rvlm.attacks.apgd import APGD, apgd
from rvlm.attacks.autoattack import AutoAttack, AutoAttackResult, autoattack
from rvlm.attacks.checks import AttackWarning
from rvlm.attacks.contract import scoring
from rvlm.attacks.cw import CW, cw
from rvlm.attacks.deepfool import DeepFool, deepfool
from rvlm.attacks.fab import FAB, fab
from rvlm.attacks.fgsm import FGSM, fgsm
from rvlm.attacks.fmn import FMN, fmn
from rvlm.attacks.losses import LOSSES
from rvlm.attacks.mifgsm import DI, MIFGSM, NI, SI, TI, VMI, mifgsm
from rvlm.attacks.objective import AttackResult
from rvlm.attacks.pgd import PGD, pgd
from rvlm.attacks.retrieval import SGA, CoAttack, Scales, caption_sets, coattack, sga
from rvlm.attacks.square import Square, square
from rvlm.attacks.wrappers import BPDA, Joint, LowFrequency

__all__ = [
    "APGD",
    "BPDA",
    "CW",
    "DI",
    "FAB",
    "FGSM",
    "FMN",
    "LOSSES",
    "MIFGSM",
    "NI",
    "PGD",
    "SGA",
    "SI",
    "TI",
    "VMI",
    "AttackResult",
    "AttackWarning",
    "AutoAttack",
    "AutoAttackResult",
    "CoAttack",
    "DeepFool",
    "Joint",
    "LowFrequency",
    "Scales",
    "Square",
    "apgd",
    "autoattack",
    "caption_sets",
    "coattack",
    "cw",
    "deepfool",
    "fab",
    "fgsm",
    "fmn",
    "mifgsm",
    "pgd",
    "scoring",
    "sga",
    "square",
]
