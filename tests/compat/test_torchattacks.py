"""torchattacks' scripts with one import line changed: the same images to the bit, or as near as is said here."""

import pytest
import torch
from torch import nn

from rvlm.attacks import AttackWarning, scoring
from rvlm.compat import torchattacks as compat

from .conftest import same_state

THEIRS, OURS = "import torchattacks", "import rvlm.compat.torchattacks as torchattacks"
SCRIPT = """
torch.manual_seed(0)
attack = torchattacks.{call}
{mode}
first, result = attack(images, labels), attack(images, labels)
"""
TO_THE_BIT = [
    "VANILA(model)", "GN(model, std=0.05)", "FGSM(model)", "FFGSM(model)", "RFGSM(model, steps=4)", "PGD(model)",
    "PGD(model, eps=4/255, alpha=1/255, steps=20, random_start=False)", "EOTPGD(model, steps=3)",
    "TPGD(model, steps=5)", "MIFGSM(model, steps=5, decay=0.5)",
    "DIFGSM(model, steps=6, resize_rate=0.6, random_start=True)",
    "Square(model, eps=2/255, n_queries=100)",
    "Square(model, n_restarts=2, n_queries=40, loss='ce', resc_schedule=False)",
]  # fmt: skip
NEAR = {  # the largest difference of a pixel
    "BIM(model)": 1e-7, "BIM(model, steps=0)": 1e-7, "NIFGSM(model, steps=5)": 1e-7,
    "SINIFGSM(model, steps=3, m=3)": 1e-7,
    "VMIFGSM(model, steps=3, N=3)": 1e-7, "VNIFGSM(model, steps=3, N=3)": 1e-7, "TIFGSM(model, steps=3)": 1e-7,
    "PGDL2(model, eps=0.5)": 1e-6, "PGDL2(model, eps=0.5, alpha=0.1, steps=3, random_start=False)": 1e-6,
    "APGD(model, eps=1/255)": 1e-7, "APGD(model, eps=1/255, loss='dlr', n_restarts=3, seed=5)": 1e-7,
    "APGD(model, norm='L2', eps=0.1, steps=20)": 1e-4, "APGDT(model, eps=1/255, n_classes=6)": 1e-7,
    "FAB(model, eps=1/255, multi_targeted=True, n_restarts=2, n_classes=6)": 1e-6,
    "FAB(model, norm='L2', eps=0.1, n_restarts=2)": 1e-6,
}  # fmt: skip
TARGETED = [
    "set_mode_targeted_by_label(quiet=True)", "set_mode_targeted_least_likely(kth_min=2, quiet=True)",
    "set_mode_targeted_random(quiet=True)", "set_mode_targeted_by_function(lambda x, y: (y + 2) % 6, quiet=True)",
]  # fmt: skip


def difference(both, call, mode=""):
    theirs, ours, names = both(THEIRS, OURS, SCRIPT.format(call=call, mode=mode))
    assert not ours.requires_grad and (call.startswith("VANILA") or not torch.equal(ours, names["images"]))
    return (theirs - ours).abs().max().item()


@pytest.mark.parametrize("call", TO_THE_BIT)
def test_equal_to_the_bit(both, call):
    assert difference(both, call) == 0


@pytest.mark.parametrize("call", NEAR)
def test_equal_but_for_rounding(both, call):
    assert difference(both, call) <= NEAR[call]


@pytest.mark.parametrize("mode", TARGETED)
@pytest.mark.parametrize("call", ["PGD(model)", "FGSM(model)", "Square(model, eps=48/255, n_queries=60)"])
def test_targets(both, call, mode):
    """Of one call: there a seed reseeds the global generator, which random targets of a second call would see."""
    script = SCRIPT.replace("first, result = attack(images, labels), ", "result = ")
    theirs, ours, names = both(THEIRS, OURS, script.format(call=call, mode=f"attack.{mode}"))
    assert torch.equal(theirs, ours) and not torch.equal(ours, names["images"])


def test_normalised_images(both):
    """In float64: what is normalised and back again is not the same pixel, there and here."""
    script = """
mean, std = [0.48, 0.45, 0.40], [0.27, 0.26, 0.28]
attack = torchattacks.PGD(model.double())
attack.set_normalization_used(mean=mean, std=std)
mean, std = (torch.tensor(t).view(1, 3, 1, 1) for t in (mean, std))
torch.manual_seed(0)
result = attack((images.double() - mean) / std, labels)
"""
    theirs, ours, _ = both(THEIRS, OURS, script)
    assert (theirs - ours).abs().max() < 1e-6 and ours.dtype == torch.float64


def test_settings_may_be_changed_later(both):
    mode = "attack.eps, attack.steps = 2 / 255, 3\nassert attack.get_mode() == 'default'"
    assert difference(both, "PGD(model)", mode) == 0


def test_cw_where_no_quirk_decides(both):
    """In float64, with all logits above 0, no margin asked for, and an objective that falls all the time."""
    script = """
class Plus(nn.Module):
    def forward(self, x):
        return x + 10

result = torchattacks.CW(nn.Sequential(model, Plus()).double(), c=5, steps=9, lr=0.005)(images.double(), labels)
"""
    theirs, ours, names = both(THEIRS, OURS, script)
    moved = (ours - names["images"]).flatten(1).abs().amax(1) > 0.001
    assert (theirs - ours).abs().max() < 1e-6 and moved.sum() > 10


def test_deepfool_fools_as_near(both):
    script = "result = torchattacks.DeepFool(model)(images, labels)"
    theirs, ours, names = both(THEIRS, OURS, script)
    model, x, y = names["model"], names["images"], names["labels"]
    assert (model(theirs).argmax(1) != y).all() and (model(ours).argmax(1) != y).all()
    lengths = [(t - x).flatten(1).norm(dim=1)[2:].mean() for t in (theirs, ours)]
    assert abs(lengths[1] / lengths[0] - 1) < 0.02


@pytest.mark.parametrize("call", [
    "AutoAttack(model, eps=1.5/255, n_classes=6, seed=0)",
    pytest.param("AutoAttack(model, eps=1.5/255, n_classes=6, seed=0, version='plus')", marks=pytest.mark.slow),
    pytest.param("AutoAttack(model, norm='L2', eps=0.1, seed=1, version='rand')", marks=pytest.mark.slow),
    pytest.param("AutoAttack(model, eps=1.5/255, seed=0, version='rand')", marks=pytest.mark.slow),
    "MultiAttack([torchattacks.FGSM(model, eps=1/255), torchattacks.PGD(model, eps=1.5/255)])",
])  # fmt: skip
def test_same_verdicts(both, call):
    """Only FAB may fool more here: an image that is too far counts if it still fools when it is drawn into the ball."""
    mode = "for part in getattr(attack, '_autoattack', attack).attacks:\n    part.n_queries = 60"
    theirs, ours, names = both(THEIRS, OURS, SCRIPT.format(call=call, mode=mode))
    fooled = [names["model"](t).argmax(1) != names["labels"] for t in (theirs, ours)]
    assert torch.equal(*fooled) and 3 <= fooled[1].sum() <= 15
    robust = ~fooled[1]
    assert torch.equal(ours[robust], names["images"][robust])


def test_the_warning_of_autoattack(model_and_batch):
    with pytest.warns(AttackWarning, match="10 steps, AutoAttack for 100"):
        compat.AutoAttack(model_and_batch[0])


@pytest.mark.parametrize("name", ["PGD", "MIFGSM", "CW", "APGD", "Square", "DeepFool"])
def test_the_model_is_left_as_it_was(watched, name):
    x, y = torch.rand(4, 3, 12, 12), torch.arange(4)
    settings = {"n_queries": 5} if name == "Square" else {"steps": 2}
    watched.train()
    watched.body[1].eval()
    before = watched.state()
    getattr(compat, name)(watched, **settings)(x, y)
    assert same_state(before, watched.state())
    assert not any(any(flags) for flags in watched.modes)


def test_modes_of_the_model(watched):
    attack = compat.PGD(watched, steps=1)
    x, y = torch.rand(4, 3, 12, 12), torch.arange(4)
    kinds = [type(m) for m in watched.modules()]
    for batchnorm, dropout in ((False, False), (True, False), (False, True)):
        attack.set_model_training_mode(True, batchnorm, dropout)
        before = watched.state()
        attack(x, y)
        inside = dict(zip(kinds, watched.modes[-1], strict=True))
        assert inside[nn.BatchNorm2d] == batchnorm and inside[nn.Dropout] == dropout and inside[nn.Linear]
        assert same_state(before, watched.state())


def test_a_part_of_several_attacks_runs_in_its_own_mode(watched):
    x, y = torch.rand(4, 3, 12, 12), torch.arange(4)
    trained, usual = compat.FGSM(watched, eps=1e-6), compat.FGSM(watched, eps=1e-6)
    trained.set_model_training_mode(True, True, True)
    before = watched.state()
    with scoring(watched):
        y = watched(x).argmax(1)
    watched.modes.clear()
    compat.MultiAttack([trained, usual])(x, y)
    assert [all(flags) for flags in watched.modes] == [True, False, False, False], "steps and verdicts"
    assert same_state(before, watched.state())


@pytest.mark.parametrize("save_type", ["float", "int"])
def test_save_and_load(model_and_batch, tmp_path, save_type):
    model, x, y = model_and_batch
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=6)
    attack = compat.PGD(model, random_start=False)
    path = tmp_path / "kept.pt"
    robust, l2, _ = attack.save(
        loader, path, verbose=False, return_verbose=True, save_predictions=True, save_clean_inputs=True,
        save_type=save_type,
    )  # fmt: skip
    x_adv, labels, pred, clean = (
        torch.cat(t) for t in zip(*attack.load(path, 5, False, None, True, True), strict=True)
    )
    expected = torch.cat([attack(*pair) for pair in loader])
    assert torch.equal(labels, y) and torch.equal(pred, model(expected).argmax(1)) and (clean - x).abs().max() < 1e-7
    assert (x_adv - expected).abs().max() < (0.51 / 255 if save_type == "int" else 1e-9)
    assert ((x_adv - x).abs() <= attack.eps + 1e-6).all()
    assert robust == 100 * (pred == y).float().mean() and 0 < l2 < 2
    normal = {"mean": [0.5] * 3, "std": [0.25] * 3}
    assert ((attack.load(path, 16, normalize=normal).dataset[0][0] * 0.25 + 0.5) - x_adv[0]).abs().max() < 1e-6


def test_errors(model_and_batch):
    model, x, y = model_and_batch
    with pytest.raises(AttributeError, match="has no Pixle; it has APGD, "):
        compat.Pixle  # noqa: B018
    with pytest.raises(ValueError, match="Targeted mode is not supported"):
        compat.APGD(model).set_mode_targeted_by_label()
    with pytest.raises(ValueError, match="did you mean 8/255"):
        compat.PGD(model, eps=8)(x, y)
    with pytest.raises(ValueError, match="kernel_name must be 'gaussian'"):
        compat.TIFGSM(model, kernel_name="linear")
    with pytest.raises(ValueError, match="different model"):
        compat.MultiAttack([compat.PGD(model), compat.PGD(nn.Identity())])
    assert "eps=0.1" in repr(compat.PGD(model, eps=0.1)) and "normalization_used=False" in repr(compat.PGD(model))
