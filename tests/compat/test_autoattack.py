"""AutoAttack's scripts with one import line changed (the original as pyautoattack packs it): parts and verdicts."""

import json

import pytest
import torch

from rvlm.compat.autoattack import APGDAttack, APGDAttack_targeted, AutoAttack, FABAttack_PT, SquareAttack

from .conftest import same_state

SCRIPT = """
import warnings
warnings.simplefilter("ignore")
adversary = AutoAttack(model, norm={norm!r}, eps={eps}, seed=2, version={version!r}, device="cpu"{more})
adversary.apgd.n_iter, adversary.apgd_targeted.n_iter, adversary.fab.n_iter = 12, 8, 5
adversary.fab.n_target_classes = adversary.apgd_targeted.n_target_classes = 5
adversary.square.n_queries = 50
adversary.apgd.n_restarts = 2
x_adv, y_adv = adversary.run_standard_evaluation(images, labels, batch_size=6)
single = adversary.run_standard_evaluation_individual(images, labels, batch_size=16)
accuracy = adversary.clean_accuracy(x_adv, labels, bs=7)
verdict = [pred != labels for pred in (y_adv, *(pred for _, pred in single.values()))]
result = (x_adv, torch.stack(verdict), accuracy, list(single))
"""


@pytest.mark.parametrize("norm, eps, version, more", [
    ("Linf", 1.2 / 255, "standard", ""),
    pytest.param("Linf", 1.2 / 255, "plus", "", marks=pytest.mark.slow),
    pytest.param("Linf", 1.2 / 255, "rand", "", marks=pytest.mark.slow),
    ("L2", 0.09, "custom", ", attacks=['apgd-ce', 'fab', 'apgd-t']"),
    ("L1", 0.9, "custom", ", attacks=['apgd-dlr', 'apgd-t']"),
])  # fmt: skip
def test_same_verdicts(both, norm, eps, version, more):
    """Of the whole, and of every attack alone."""
    script = SCRIPT.format(norm=norm, eps=eps, version=version, more=more)
    imports = "from pyautoattack import AutoAttack", "from rvlm.compat.pyautoattack import AutoAttack"
    theirs, ours, names = both(*imports, script)
    assert theirs[3:] == ours[3:] and theirs[2] == ours[2]
    assert torch.equal(theirs[1], ours[1]) and 3 <= ours[1][0].sum() <= 15
    model, x, y = names["model"], names["images"], names["labels"]
    assert torch.equal(model(ours[0]).argmax(1) != y, ours[1][0])
    order = {"Linf": torch.inf, "L2": 2, "L1": 1}[norm]
    assert (ours[0] - x).flatten(1).norm(order, dim=1).max() < eps * (1 + 1e-5)


PARTS = {
    "autopgd_base.APGDAttack(model, n_iter=15, eps=1/255, n_restarts=2, loss='dlr')": 1e-7,
    "autopgd_base.APGDAttack(model, n_iter=15, eps=0.1, norm='L2')": 1e-4,
    "autopgd_base.APGDAttack(model, n_iter=25, eps=0.8, norm='L1', use_largereps=True)": 2e-4,
    "autopgd_base.APGDAttack_targeted(model, n_iter=10, eps=1/255, n_target_classes=4)": 1e-7,
    "fab_pt.FABAttack_PT(model, n_iter=5, eps=1/255, targeted=True, n_target_classes=3, n_restarts=2)": 1e-6,
    "square.SquareAttack(model, n_queries=80, eps=2/255, n_restarts=2)": 0,
}


@pytest.mark.parametrize("call", PARTS)
def test_the_parts_give_the_same_images(both, call):
    script = f"result = {call.split('.', 1)[1].replace('(model', '(model, device=None', 1)}.perturb(images, labels)"
    if "fab" in call:
        script = script.replace("device=None", "device='cpu'")
    module, name = call.split("(")[0].split(".")
    theirs, ours, names = both(
        f"from pyautoattack.{module} import {name}", f"from rvlm.compat.autoattack import {name}", script
    )
    assert (theirs - ours).abs().max() <= PARTS[call] and not torch.equal(ours, names["images"])


def adversary(model, **settings):
    made = AutoAttack(model, eps=1.2 / 255, seed=0, device="cpu", verbose=False, **settings)
    made.apgd_targeted.n_target_classes = made.fab.n_target_classes = 5
    made.apgd.n_iter = made.apgd_targeted.n_iter = made.fab.n_iter = 5
    made.square.n_queries = 20
    return made


def test_the_original_signature(model_and_batch, tmp_path, capsys):
    model, x, y = model_and_batch
    made = AutoAttack(model, norm="Linf", eps=1.2 / 255, version="custom", attacks_to_run=["apgd-ce", "square"],
                      device="cpu", log_path=tmp_path / "log.txt", seed=1)  # fmt: skip
    made.square.n_queries = 10
    x_adv, y_adv = made.run_standard_evaluation(x, y, bs=9, return_labels=True)
    assert torch.equal(model(x_adv).argmax(1), y_adv)
    printed = capsys.readouterr().out
    for line in ("using custom version including apgd-ce, square.", "initial accuracy: 87.50%",
                 "apgd-ce - 2/2 - ", "robust accuracy after SQUARE: ", "max Linf perturbation: 0.00"):  # fmt: skip
        assert line in printed and line in (tmp_path / "log.txt").read_text()
    found = made.run_standard_evaluation_individual(x, y)
    assert list(found) == ["apgd-ce", "square"] and found["square"].shape == x.shape
    assert made.attacks_to_run == ["apgd-ce", "square"] and made.verbose
    with pytest.raises(ValueError, match="version='custom'"):
        AutoAttack(model, attacks_to_run=["square"], device="cpu")
    with pytest.raises(ValueError, match="Attack not supported: 'fob'"):
        adversary(model, version="custom", attacks_to_run=["fob"]).run_standard_evaluation(x, y)


def test_goes_on_from_a_state(model_and_batch, tmp_path):
    model, x, y = model_and_batch
    path = tmp_path / "state.json"
    whole = adversary(model, version="custom", attacks_to_run=["apgd-ce", "apgd-t"])
    expected = model(whole.run_standard_evaluation(x, y)).argmax(1) == y
    first = adversary(model, version="custom", attacks_to_run=["apgd-ce", "apgd-t"])
    first.apgd_targeted.perturb = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        first.run_standard_evaluation(x, y, state_path=path)
    assert json.loads(path.read_text())["run_attacks"] == ["apgd-ce"]
    second = adversary(model, version="custom", attacks_to_run=["apgd-ce", "apgd-t"])
    second.apgd.perturb = lambda *_: 1 / 0
    second.run_standard_evaluation(x, y, state_path=path)
    assert json.loads(path.read_text())["robust_flags"] == expected.tolist()
    with pytest.raises(ValueError, match="state of other attacks, apgd-ce, apgd-t"):
        adversary(model, version="custom", attacks_to_run=["square"]).run_standard_evaluation(x, y, state_path=path)


def test_robustvlms_fork(model_and_batch):
    """alpha is the first step in radii, use_rs=False starts from the images, iterations_apgd counts steps."""
    model, x, y = model_and_batch
    seen = []

    def watched(v):
        seen.append(v.detach().clone())
        return model(v)

    made = AutoAttack(
        watched, eps=8 / 255, attacks_to_run=["apgd-ce"], version="custom", device="cpu", verbose=False, alpha=0.25,
        iterations_apgd=3, use_rs=False,
    )  # fmt: skip
    made.run_standard_evaluation(x, y)
    shown = [v for v in seen if len(v) == 14]  # of the images that are right when clean
    assert torch.equal(shown[1], x[2:]) and made.apgd.n_iter == made.apgd_targeted.n_iter == 3
    assert (shown[2] - x[2:]).abs().max() == pytest.approx(2 / 255, abs=1e-6)


def test_the_global_generator_stays(model_and_batch):
    model, x, y = model_and_batch
    state = torch.get_rng_state()
    adversary(model).run_standard_evaluation(x, y)
    assert torch.equal(state, torch.get_rng_state())


def test_the_model_stays_and_runs_in_its_own_mode(watched):
    watched.eval()
    watched.body[2].train()
    before = watched.state()
    made = adversary(watched, version="custom", attacks_to_run=["square", "fab-t", "apgd-ce"])
    made.run_standard_evaluation(torch.rand(4, 3, 12, 12), torch.arange(4))
    assert same_state(before, watched.state()) and all(flags == before[0] for flags in watched.modes)


def test_bad_parts(model_and_batch):
    model, x, y = model_and_batch
    with pytest.raises(ValueError, match="norm must be one of 'Linf', 'L2', 'L1'"):
        APGDAttack(model, norm="linf", eps=0.1)
    for images, labels in ((x[:0], y[:0]), (x[:2], y[:3])):
        with pytest.raises(ValueError, match="expected images and as many labels"):
            AutoAttack(model, device="cpu", verbose=False).run_standard_evaluation(images, labels)
    with pytest.raises(ValueError, match="eps, the radius"):
        SquareAttack(model)
    with pytest.raises(ValueError, match="targets=9 needs more than 9 classes"):
        APGDAttack_targeted(model, eps=0.1).perturb(x, y)
    with pytest.raises(ValueError, match="needs target labels"):
        SquareAttack(model, eps=0.1, targeted=True).perturb(x)
    assert FABAttack_PT(model, norm="L2").eps == 1.0
