"""What attacks say that they cost is what they take of a model that nothing fools, counted at the model."""

import pytest
import torch
from torch import nn

from rvlm.attacks import APGD, CW, FAB, FGSM, FMN, MIFGSM, PGD, SGA, SI, VMI, AutoAttack, CoAttack, DeepFool, Square
from rvlm.attacks.objective import Passes
from rvlm.attacks.stages import parse_attack

B, CLASSES = 3, 6


class Robust(nn.Module):
    """Logits that no change of pixels turns; counts the images that go through it, there and back."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("w", 1e-3 * torch.randn(108, classes, generator=generator))
        self.register_buffer("b", torch.tensor([10.0] + [0.0] * (classes - 1)))
        self.forwards = self.backwards = 0

    def forward(self, x):
        self.forwards += len(x)
        z = x.flatten(1) @ self.w + self.b
        if z.requires_grad:
            z.register_hook(self.back)
        return z

    def back(self, grad):
        self.backwards += len(grad)


class Encoder(Robust):
    """Unit-norm embeddings."""

    def forward(self, x):
        return nn.functional.normalize(super().forward(x), dim=1)


X = torch.rand(B, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.zeros(B, dtype=torch.int64)


def counted(attack, model=None, y=Y):
    result = attack(X, y)
    model = model or attack.model
    assert (model.forwards % B, model.backwards % B) == (0, 0)
    return Passes(model.forwards // B, model.backwards // B), result


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("kind, settings", [
    (PGD, dict(steps=7)),
    (PGD, dict(steps=4, restarts=3, best="adv", early_stop="compact")),
    (PGD, dict(steps=4, eot=3)),
    (PGD, dict(steps=3, random_start=False, low_frequency=2.0)),
    (MIFGSM, dict(steps=4)),
    (MIFGSM, dict(steps=3, transforms=["ti", "di", "ni"])),
    (MIFGSM, dict(steps=3, transforms=[SI(3), VMI(2)], eot=2)),
    (APGD, dict(steps=7)),
    (APGD, dict(steps=7, eot=2, loss="dlr", restarts=2)),
    (APGD, dict(steps=5, loss="dlr-targeted")),
    (APGD, dict(steps=5, loss="ce-targeted", targets=2, restarts=2)),
    (FAB, dict(steps=3)),
    (FAB, dict(steps=3, aimed=False, restarts=2)),
    (FAB, dict(steps=2, targets=2)),
    (FAB, dict(steps=3, early_stop="compact")),
    (FAB, dict(steps=3, early_stop="compact", slots=4, restarts=2)),
    (FMN, dict(steps=5)),
    (Square, dict(queries=9)),
    (Square, dict(queries=9, restarts=2)),
])  # fmt: skip
def test_the_formula_is_the_count(kind, settings, norm):
    model = Robust()
    count, result = counted(kind(model, norm=norm, eps=0.01, return_info=True, **settings))
    assert not result.success.any(), "something was fooled: the count would be no upper bound"
    assert kind.passes(CLASSES, norm, **settings) == count
    assert (result.forwards, result.backwards) == (count.forwards * B, count.backwards * B)


@pytest.mark.parametrize("kind, norm, settings", [
    (APGD, "l1", dict(steps=20, larger_eps=True, restarts=2)),
    (CW, "l2", dict(steps=4, abort_early=False)),
    (CW, "l2", dict(steps=4, rounds=2, abort_early=False)),
    (CW, "linf", dict(steps=4, abort_early=False)),
    (CW, "linf", dict(steps=4, const=0.1, abort_early=False)),
    (DeepFool, "linf", dict(steps=4)),
    (DeepFool, "l2", dict(steps=4, candidates=3)),
])  # fmt: skip
def test_the_formula_is_the_count_where_norms_differ(kind, norm, settings):
    count, result = counted(kind(Robust(), norm=norm, eps=0.01, return_info=True, **settings))
    assert not result.success.any() and kind.passes(CLASSES, norm, **settings) == count


def test_fgsm_and_few_and_many_classes():
    count, _ = counted(FGSM(Robust(), eps=0.01, return_info=True))
    assert count == Passes(2, 1) == FGSM.passes(CLASSES, steps=1)
    for classes, targets in ((4, 3), (20, 9)):
        count, _ = counted(APGD(Robust(classes), eps=0.01, steps=2, loss="dlr-targeted", return_info=True))
        assert count == Passes(targets * 3 + 1, targets * 3) == APGD.passes(classes, steps=2, loss="dlr-targeted")


@pytest.mark.parametrize("kind, settings", [
    (SGA, dict(steps=3)), (SGA, dict(steps=3, scales=())), (SGA, dict(steps=2, restarts=2, scales=(0.5,))),
    (CoAttack, dict(steps=3)),
])  # fmt: skip
def test_attacks_on_retrieval(kind, settings):
    model = Encoder()
    captions = nn.functional.normalize(torch.randn(B, 2, CLASSES, generator=torch.Generator().manual_seed(2)), dim=2)
    count, _ = counted(kind(model, eps=0.01, return_info=True, **settings), y=captions)
    assert kind.passes(CLASSES, "linf", **settings) == count


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attacks", [["apgd-ce-3", "apgd-t-3", "fab-t-2", "square-5"], ["apgd-dlr-4"]])
def test_autoattack_is_the_sum_of_its_stages(attacks, norm):
    count, result = counted(
        AutoAttack(Robust(), norm=norm, eps=0.01, version="custom", attacks=attacks, return_info=True)
    )
    assert not result.success.any()
    assert AutoAttack.passes(CLASSES, norm, version="custom", attacks=attacks) == count


def test_autoattack_on_many_classes_by_hand():
    """101 gradients; nine classes with 101 each and a look at the classes; the same with 201; 5,001 queries."""
    stages = [stage.passes(1000) for stage in parse_attack("autoattack")]
    assert stages == [Passes(101, 101), Passes(910, 909), Passes(1810, 900), Passes(5001)]
    assert AutoAttack.passes(1000) == Passes(2 + 101 + 910 + 1810 + 5001, 101 + 909 + 900)
    with pytest.raises(TypeError, match="unknown argument.s. step; PGD takes eps"):
        PGD.passes(10, step=3)
    assert stages[0].units == 303 and stages[0].times(0.5) == Passes(50, 50)
    rand = sum((stage.passes(10) for stage in parse_attack("autoattack-rand")), Passes())
    assert rand == Passes(2 * 20 * 101, 2 * 20 * 101)
    assert parse_attack("pgd-50")[0].passes(10) == Passes(51, 50)
