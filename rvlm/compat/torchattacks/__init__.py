"""torchattacks (3.5.1) on rvlm's engine: `import rvlm.compat.torchattacks as torchattacks`.

Same constructors, defaults, modes and random draws; `attack(images, labels)`. What is other than there, in every class:
the model is left as it was (module by module, batch norm statistics too), images must lie in [0, 1] and eps below 1,
float16 images are refused, and seeds of APGD, FAB and Square do not reseed the global generator. docs/compat.md has the
table of classes.
"""

from typing import Any

from rvlm.compat.torchattacks.attack import Attack
from rvlm.compat.torchattacks.momentum import DIFGSM, MIFGSM, NIFGSM, SINIFGSM, TIFGSM, VMIFGSM, VNIFGSM
from rvlm.compat.torchattacks.parts import APGD, APGDT, FAB, AutoAttack, MultiAttack, Square
from rvlm.compat.torchattacks.shortest import CW, DeepFool
from rvlm.compat.torchattacks.steps import BIM, EOTPGD, FFGSM, FGSM, GN, PGD, PGDL2, RFGSM, TPGD, VANILA

__all__ = [
    "APGD",
    "APGDT",
    "BIM",
    "CW",
    "DIFGSM",
    "EOTPGD",
    "FAB",
    "FFGSM",
    "FGSM",
    "GN",
    "MIFGSM",
    "NIFGSM",
    "PGD",
    "PGDL2",
    "RFGSM",
    "SINIFGSM",
    "TIFGSM",
    "TPGD",
    "VANILA",
    "VMIFGSM",
    "VNIFGSM",
    "Attack",
    "AutoAttack",
    "DeepFool",
    "MultiAttack",
    "Square",
]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise AttributeError(f"rvlm.compat.torchattacks has no {name}; it has {', '.join(__all__)}")
