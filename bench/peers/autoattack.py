"""torchattacks' parts of AutoAttack, one after the other on what is left, with as many steps as asked for."""

from collections.abc import Callable, Mapping

from torch import Tensor

__all__ = ["torchattacks_parts"]

CLASSES = 10  # it aims at all but one of so many, however many the model has


def torchattacks_parts(
    model: Callable[[Tensor], Tensor], eps: float, counts: Mapping[str, int]
) -> Callable[[Tensor, Tensor], Tensor]:
    """counts: steps or queries of "apgd-ce", "apgd-t", "fab-t" and "square", of which some may be missing."""
    import torchattacks

    given = {"eps": eps, "seed": 0}
    aimed = given | {"n_classes": CLASSES}
    parts = {
        "apgd-ce": lambda n: torchattacks.APGD(model, steps=n, **given),
        "apgd-t": lambda n: torchattacks.APGDT(model, steps=n, **aimed),
        "fab-t": lambda n: torchattacks.FAB(model, steps=n, multi_targeted=True, **aimed),
        "square": lambda n: torchattacks.Square(model, n_queries=n, **given),
    }
    return torchattacks.MultiAttack([parts[name](n) for name, n in counts.items()])
