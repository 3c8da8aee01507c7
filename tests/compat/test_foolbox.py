"""foolbox's scripts with one import line changed: raw, clipped and success."""

import pytest
import torch
from torch import nn

import rvlm.compat.foolbox as compat

from .conftest import same_state

THEIRS, OURS = "import foolbox as fb", "import rvlm.compat.foolbox as fb"
SCRIPT = """
torch.manual_seed(0)
fmodel = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
attack = fb.attacks.{call}
result = attack(fmodel, images, {criterion}, epsilons={epsilons})
accuracy = fb.utils.accuracy(fmodel, images, labels) if hasattr(fb, "utils") else fb.accuracy(fmodel, images, labels)
assert accuracy == 14 / 16
"""
NEAR = {
    "LinfPGD()": 0, "LinfPGD(steps=5, abs_stepsize=1/255, random_start=False)": 0, "FGSM()": 0,
    "LinfFastGradientAttack(random_start=True)": 0, "LinfBasicIterativeAttack()": 0,
    "L2PGD(steps=10)": 1e-6, "L2BasicIterativeAttack()": 1e-6, "FGM()": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize("criterion", ["labels", "fb.criteria.TargetedMisclassification((labels + 1) % 6)"])
@pytest.mark.parametrize("epsilons", ["[2/255, 0.5/255]", "0.02"])
@pytest.mark.parametrize("call", NEAR)
def test_equal(both, call, epsilons, criterion):
    if "Targeted" in criterion and call.split("(")[0] in ("FGSM", "FGM", "LinfFastGradientAttack"):
        pytest.skip("untargeted there, too")
    if "L2" in call or call == "FGM()":
        epsilons = "[0.3, 0.1]"
    script = SCRIPT.format(call=call, epsilons=epsilons, criterion=criterion)
    theirs, ours, names = both(THEIRS, OURS, script)
    assert type(theirs[0]) is type(ours[0]) and torch.equal(theirs[2], ours[2])
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        mine, other = (torch.stack(t) if isinstance(t, list) else t for t in (mine, other))
        assert mine.shape == other.shape and (mine - other).abs().max() <= NEAR[call]
    assert all(p.grad is None for p in names["model"].parameters())


@pytest.mark.parametrize("call", [
    "L2CarliniWagnerAttack(binary_search_steps=3, steps=40, initial_const=0.1, abort_early=False)",
    "L2DeepFoolAttack(steps=20)", "LinfDeepFoolAttack(steps=20, candidates=None)", "LInfFMNAttack(steps=30)",
    "L2FMNAttack(steps=30)",
])  # fmt: skip
def test_as_short(both, call):
    """In L2, FMN's radius has not come down there after 30 steps."""
    theirs, ours, names = both(THEIRS, OURS, SCRIPT.format(call=call, epsilons="[None, 0.02]", criterion="labels"))
    order = torch.inf if "nf" in call.split("Attack")[0] else 2
    right = slice(2, None)
    lengths = [(t[0][0] - names["images"]).flatten(1).norm(order, dim=1)[right].mean() for t in (theirs, ours)]
    assert theirs[2][0].all() and ours[2][0].all() and lengths[1] < 1.03 * lengths[0]
    assert "L2FMN" in call or lengths[1] > 0.97 * lengths[0]
    assert (theirs[2][1] != ours[2][1]).sum() <= 1 and ours[0][0] is ours[1][0]
    assert (ours[1][1] - names["images"]).flatten(1).norm(order, dim=1).max() < 0.02 + 1e-6


def test_repeat(both):
    script = SCRIPT.format(call="LinfPGD(steps=1).repeat(3)", epsilons="[1/255, 2/255]", criterion="labels")
    theirs, ours, _ = both(THEIRS, OURS, script)
    assert torch.equal(theirs[2], ours[2]) and torch.equal(torch.stack(theirs[1]), torch.stack(ours[1]))
    once = both(THEIRS, OURS, script.replace(".repeat(3)", ""))[1]
    assert (ours[2] >= once[2]).all()
    nearest = SCRIPT.format(call="L2DeepFoolAttack(steps=3).repeat(2)", epsilons="None", criterion="labels")
    raw, clipped, success = both(THEIRS, OURS, nearest)[1]
    assert raw is not None and torch.equal(raw, clipped) and success.shape == (16,)


def test_bounds_and_preprocessing(both):
    script = """
module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 6)).eval()
given = dict(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25], axis=-3)
fmodel = fb.PyTorchModel(module, bounds=(-1, 2), preprocessing=given, device="cpu")
torch.manual_seed(0)
result = fb.attacks.LinfPGD(steps=5)(fmodel, images * 3 - 1, labels, epsilons=0.1)
outputs = fmodel(images)
"""
    theirs, ours, names = both(THEIRS, OURS, script)
    assert torch.equal(theirs[0], ours[0]) and torch.equal(theirs[2], ours[2]) and ours[0].min() < -0.5
    assert not names["outputs"].requires_grad and names["fmodel"](names["images"].requires_grad_()).requires_grad


def test_the_model_stays(watched):
    with pytest.warns(UserWarning, match="training mode"):
        fmodel = compat.PyTorchModel(watched, (0, 1), device="cpu")
    before = watched.state()
    compat.attacks.LinfPGD(steps=2)(fmodel, torch.rand(4, 3, 12, 12), torch.arange(4), epsilons=0.1)
    assert same_state(before, watched.state()) and all(flags == before[0] for flags in watched.modes)


def test_errors(model_and_batch):
    model, x, y = model_and_batch
    fmodel = compat.PyTorchModel(model, (0, 1), device="cpu")
    with pytest.raises(ValueError, match="torch.nn.Module"):
        compat.PyTorchModel(lambda x: x, (0, 1))
    with pytest.raises(ValueError, match="got flip_axis"):
        compat.PyTorchModel(nn.Identity().eval(), (0, 1), preprocessing={"flip_axis": -1})
    with pytest.raises(ValueError, match="unsupported criterion"):
        compat.attacks.FGSM()(fmodel, x, compat.TargetedMisclassification(y), epsilons=0.1)
    with pytest.raises(NotImplementedError, match="needs radii"):
        compat.attacks.LinfPGD()(fmodel, x, y, epsilons=[None, 0.1])
    with pytest.raises(ValueError, match="values in"):
        compat.attacks.LinfPGD()(fmodel, x + 1, y, epsilons=0.1)
    with pytest.raises(AttributeError, match="has no EADAttack"):
        compat.attacks.EADAttack  # noqa: B018
    assert "steps=40" in repr(compat.attacks.PGD())
