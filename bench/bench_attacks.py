"""Attacks against the libraries that have them: same model, same samples, same settings, gate first.

AutoAttack's parts against the original (pyautoattack), the others against torchattacks or foolbox, and AutoAttack as a
whole against both its original and torchattacks' on an undefended and on a robust model. Before any timing both sides
must leave the same samples robust, up to 2 % of them (random numbers differ), or find perturbations of the same length,
up to 2 %, where an attack looks for short ones.
"""

from functools import partial

import pytest
import torch
from measure import QUICK, robust
from peers.autoattack import torchattacks_parts

from rvlm.attacks import apgd, autoattack, cw, deepfool, fab, fmn, mifgsm, square

ON_GPU = torch.cuda.is_available()
EPS = 4 / 255
CASES = [4] if QUICK else [32, 8]
PARTS = {"apgd-ce": 10, "apgd-t": 5, "fab-t": 5, "square": 100}  # steps, queries
OTHERS = {"mifgsm": 10, "vmifgsm": 3, "tifgsm": 10, "cw": 30, "deepfool": 8, "fmn": 20}
STANDARD = {"apgd-ce": 100, "apgd-t": 100, "fab-t": 100, "square": 5000}
SHORT = {"apgd-ce": 20, "apgd-t": 20, "fab-t": 20, "square": 200}
if QUICK:
    PARTS, OTHERS, STANDARD, SHORT = (dict.fromkeys(table, 2) for table in (PARTS, OTHERS, STANDARD, SHORT))
WHOLE = [  # model, eps in 1/255, steps and queries
    ("digits-vit", 8, STANDARD),
    ("digits-rn", 8, STANDARD),
    ("digits-vit", 8, SHORT),
    ("digits-vit-tecoa", 24, SHORT),
    ("digits-vit-tecoa", 8, SHORT),
]
PEERS = {"cw": "foolbox", "deepfool": "foolbox", "fmn": "foolbox"}  # of OTHERS; else torchattacks


def ours(name: str, n: int, model, x, y):
    draws = torch.Generator().manual_seed(0)
    given = {"steps": n, "generator": draws}
    attack = {
        "apgd-ce": partial(apgd, eps=EPS, **given),
        "apgd-t": partial(apgd, eps=EPS, loss="dlr-targeted", **given),
        "fab-t": partial(fab, eps=EPS, **given),
        "square": partial(square, eps=EPS, queries=n, generator=draws),
        "mifgsm": partial(mifgsm, eps=EPS, alpha=EPS / 4, **given),
        "vmifgsm": partial(mifgsm, eps=EPS, alpha=EPS / 4, transforms=["vmi"], **given),
        "tifgsm": partial(mifgsm, eps=EPS, alpha=EPS / 4, mu=0.0, transforms=["ti", "di"], **given),
        "cw": partial(cw, steps=n, rounds=3, const=1.0, abort_early=False),
        "deepfool": partial(deepfool, steps=n),
        "fmn": partial(fmn, steps=n, norm="linf"),
    }[name]
    return attack(model, x, y)


def original(part: str, n: int, model, x, y):
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    given = {"eps": EPS, "norm": "Linf", "device": x.device, "seed": 0}
    attack = {
        "apgd-ce": partial(APGDAttack, n_iter=n, loss="ce"),
        "apgd-t": partial(APGDAttack_targeted, n_iter=n, n_target_classes=9),
        "fab-t": partial(FABAttack_PT, n_iter=n, targeted=True, n_target_classes=9),
        "square": partial(SquareAttack, n_queries=n, resc_schedule=False),
    }[part]
    return attack(model, **given).perturb(x, y)


def peer(name: str, n: int, model, x, y):
    if PEERS.get(name) == "foolbox":
        import foolbox

        attack = {
            "cw": partial(
                foolbox.attacks.L2CarliniWagnerAttack, binary_search_steps=3, initial_const=1.0, abort_early=False
            ),
            "deepfool": partial(foolbox.attacks.L2DeepFoolAttack, loss="logits"),
            "fmn": foolbox.attacks.LInfFMNAttack,
        }[name](steps=n)
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        return attack.run(wrapped, x, foolbox.criteria.Misclassification(y))
    import torchattacks

    attack = {
        "mifgsm": partial(torchattacks.MIFGSM, decay=1.0),
        "vmifgsm": torchattacks.VMIFGSM,
        "tifgsm": partial(torchattacks.TIFGSM, decay=0.0, random_start=False),
    }[name]
    return attack(model, eps=EPS, alpha=EPS / 4, steps=n)(x, y)


def ours_whole(eps: float, counts: dict, model, x, y):
    stages = [f"{name}-{n}" for name, n in counts.items()]
    return autoattack(
        model, x, y, eps=eps, version="custom", attacks=stages, generator=torch.Generator().manual_seed(0)
    )


def torchattacks_whole(eps: float, counts: dict, model, x, y):
    return torchattacks_parts(model, eps, counts)(x, y)


def original_whole(eps: float, counts: dict, model, x, y):
    from pyautoattack.autoattack import AutoAttack

    attack = AutoAttack(model, norm="Linf", eps=eps, seed=0, device=x.device)
    attack.apgd.n_iter, attack.apgd_targeted.n_iter, attack.fab.n_iter, attack.square.n_queries = counts.values()
    return attack.run_standard_evaluation(x, y, batch_size=len(x))[0]


@pytest.mark.parametrize("batch", CASES, ids=lambda batch: f"B{batch}")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("impl", ["rvlm", "pyautoattack"])
@pytest.mark.benchmark(group="autoattack")
def test_part(impl, part, batch, load, compare, benchmark):
    pytest.importorskip("pyautoattack", reason="install rvlm[oracles]")
    (model, x, y), n = load("digits-vit-tecoa", batch), PARTS[part]
    attack = ours if impl == "rvlm" else original
    left = [int(robust(model, found(part, n, model, x, y), y).sum()) for found in (attack, original)]
    assert abs(left[0] - left[1]) <= max(1, 0.02 * len(x)), left
    info = {"impl": impl, "peer": "pyautoattack", "case": f"{part} {n} B={len(x)}", "robust": left[0]}
    compare(lambda: attack(part, n, model, x, y), lambda: original(part, n, model, x, y), round_seconds=0.02, **info)


@pytest.mark.parametrize("batch", CASES, ids=lambda batch: f"B{batch}")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("impl", ["rvlm", "peer"])
@pytest.mark.benchmark(group="attacks")
def test_other(impl, name, batch, load, compare, benchmark):
    library = PEERS.get(name, "torchattacks")
    pytest.importorskip(library, reason="install rvlm[oracles]")
    (model, x, y), n = load("digits-vit" if name in PEERS else "digits-vit-tecoa", batch), OTHERS[name]
    attack = ours if impl == "rvlm" else peer
    found = [run(name, n, model, x, y) for run in (attack, peer)]
    if name in PEERS:
        order = torch.inf if name == "fmn" else 2
        with torch.no_grad():
            both = torch.stack([model(x_adv).argmax(1) != y for x_adv in (x, *found)])
        counted = both[1] & both[2] & ~both[0]
        lengths = [(x_adv - x).flatten(1).norm(order, dim=1)[counted].mean().item() for x_adv in found]
        assert QUICK or (counted.any() and abs(lengths[0] / lengths[1] - 1) <= 0.02), lengths
        outcome = {"fooled": both[1].sum().item(), "distance": round(lengths[0], 4)}
    else:
        left = [int(robust(model, x_adv, y).sum()) for x_adv in found]
        assert abs(left[0] - left[1]) <= max(1, 0.02 * len(x)), left
        outcome = {"robust": left[0]}
    info = {"impl": "rvlm" if impl == "rvlm" else library, "peer": library, "case": f"{name} {n} B={len(x)}"}
    compare(
        lambda: attack(name, n, model, x, y), lambda: peer(name, n, model, x, y), round_seconds=0.02, **info, **outcome
    )


@pytest.mark.parametrize("library", ["torchattacks", "pyautoattack"])
@pytest.mark.parametrize("case", WHOLE, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]['square']}")
@pytest.mark.benchmark(group="autoattack whole")
def test_whole(library, case, load, compare, benchmark):
    pytest.importorskip(library, reason="install rvlm[oracles]")
    name, eps, counts = case
    model, x, y = load(name, CASES[0])
    theirs = torchattacks_whole if library == "torchattacks" else original_whole
    mine, peers = (partial(whole, eps / 255, counts, model) for whole in (ours_whole, theirs))
    left = [int(robust(model, attack(x, y), y).sum()) for attack in (mine, peers)]
    assert abs(left[0] - left[1]) <= max(1, 0.02 * len(x)), left
    info = {"impl": "rvlm", "peer": library, "case": f"{name} eps {eps}/255 N={len(x)}, {counts['apgd-ce']} steps"}
    compare(lambda: mine(x, y), lambda: peers(x, y), round_seconds=0.02, **info, robust=left[0])
