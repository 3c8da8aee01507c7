"""What scheduling alone brings: the same attack with the same verdicts, run after run, in slots, and by its peers.

    turns      `apgd(early_stop="compact")`: a run per target, each on the samples that are left
    slots      the same runs in slots that a queue refills
    cycle      `pgd` that ends a sample when its trajectory has returned to an earlier image
    compact    `pgd` that ends a sample when it is fooled
    compact+cycle    for either reason
    restarts   `pgd` with restarts that share a batch, against restarts one after the other
    together   `square` on all samples at one query, in batches that are cut anew, against one batch after the other
    all steps  `fab` without an exit, a run per target, each on the samples that are left; against FAB-T in slots, where
               a sample leaves with the first image that counts

Before any timing run after run and slots, Square together and batch by batch, and PGD and FAB with and without an exit,
must leave the same samples robust, and peers as many, up to one or 2 %; FAB's peer fools none that ours does not, and
how many verdicts differ is in the table. Undefended models are broken at once, and nearly all of a peer's work is what
fooled samples still do; on robust ones every side makes the same passes, and what scheduling can bring is fuller
batches.
"""

from functools import partial

import pytest
import torch
from measure import QUICK, robust

from rvlm.attacks import apgd, fab, pgd, square

AIMED = [  # model, eps in 1/255, steps, samples
    ("digits-vit", 8, 100, 64),
    ("digits-rn", 4, 100, 64),
    ("digits-vit", 4, 10, 32),
    ("digits-rn", 2, 10, 32),
    ("digits-vit-tecoa", 24, 10, 32),
    ("digits-vit-tecoa", 8, 10, 8),
]
LONG = [("digits-vit", 8, 100, 64), ("digits-rn", 8, 100, 64), ("digits-vit-tecoa", 8, 100, 64)]
RESTARTS = [("digits-vit", 4, 10, 8), ("digits-rn", 2, 10, 8), ("digits-vit-tecoa", 8, 10, 8)]
BLACK_BOX = [
    ("digits-rn", 12, 300, 64),
    ("digits-vit", 24, 300, 64),
    ("digits-vit-tecoa", 48, 300, 64),
    ("digits-vit-tecoa", 8, 100, 64),
]
BOUNDARY = [
    ("digits-vit", 8, 100, 64),
    ("digits-rn", 4, 100, 64),
    ("digits-vit", 4, 10, 32),
    ("digits-vit-tecoa", 24, 10, 32),
    ("digits-vit-tecoa", 8, 10, 8),
]
SLOTS = 16
if QUICK:
    every = (AIMED, LONG, RESTARTS, BLACK_BOX, BOUNDARY)
    AIMED, LONG, RESTARTS, BLACK_BOX, BOUNDARY = ([(name, eps, 3, 8) for name, eps, *_ in cases] for cases in every)
    SLOTS = 2
IDS = lambda case: f"{case[0]}-{case[1]}-{case[2]}"  # noqa: E731


def ours(model, eps: float, steps: int, slots: int | None):
    settings = dict(eps=eps, steps=steps, loss="dlr-targeted", early_stop="compact", slots=slots)
    return lambda x, y: apgd(model, x, y, generator=torch.Generator().manual_seed(0), **settings)


def their_apgdt(library: str, model, eps: float, steps: int, device):
    if library == "torchattacks":
        import torchattacks

        return torchattacks.APGDT(model, eps=eps, steps=steps, n_classes=10, seed=0)
    from pyautoattack.autopgd_base import APGDAttack_targeted

    given = dict(eps=eps, norm="Linf", device=device, seed=0, n_iter=steps, n_target_classes=9)
    return APGDAttack_targeted(model, **given).perturb


@pytest.mark.parametrize("case", AIMED, ids=IDS)
@pytest.mark.parametrize("peer", ["turns", "torchattacks", "pyautoattack"])
@pytest.mark.benchmark(group="apgd-t in slots")
def test_targets(peer, case, load, compare, device, benchmark):
    name, eps, steps, samples = case
    model, x, y = load(name, samples)
    slots = ours(model, eps / 255, steps, len(x))
    if peer == "turns":
        theirs = ours(model, eps / 255, steps, None)
    else:
        pytest.importorskip(peer, reason="install rvlm[oracles]")
        theirs = their_apgdt(peer, model, eps / 255, steps, device)
    left = [robust(model, attack(x, y), y) for attack in (slots, theirs)]
    if peer == "turns":
        assert torch.equal(*left)
    assert abs(int(left[0].sum() - left[1].sum())) <= max(1, 0.02 * len(x)), left
    info = {"impl": "rvlm in slots", "peer": peer, "case": f"{name} eps {eps}/255 N={samples}, {steps} steps"}
    compare(lambda: slots(x, y), lambda: theirs(x, y), round_seconds=0.02, **info, robust=int(left[0].sum()))


@pytest.mark.parametrize("case", BOUNDARY, ids=IDS)
@pytest.mark.parametrize("peer", ["all steps", "pyautoattack"])
@pytest.mark.benchmark(group="fab-t in slots")
def test_boundaries(peer, case, load, compare, device, benchmark):
    name, eps, steps, samples = case
    model, x, y = load(name, samples)
    settings = dict(eps=eps / 255, steps=steps)
    slots = partial(fab, model, early_stop="compact", slots=len(x), **settings)
    if peer == "all steps":
        theirs = partial(fab, model, **settings)
    else:
        fab_pt = pytest.importorskip("pyautoattack.fab_pt", reason="install rvlm[oracles]")
        given = dict(eps=eps / 255, norm="Linf", device=device, n_iter=steps, targeted=True, n_target_classes=9)
        theirs = fab_pt.FABAttack_PT(model, **given).perturb
    left = [robust(model, attack(x, y), y) for attack in (slots, theirs)]
    if peer == "all steps":
        assert torch.equal(*left)
    assert not (left[0] & ~left[1]).any(), left  # an image beyond eps that still fools when projected counts here alone
    info = {"impl": "rvlm in slots", "peer": peer, "case": f"{name} eps {eps}/255 N={samples}, {steps} steps"}
    info |= {"robust": int(left[0].sum()), "verdicts_differing": int((left[0] != left[1]).sum())}
    compare(lambda: slots(x, y), lambda: theirs(x, y), round_seconds=0.02, **info)


@pytest.mark.parametrize("case", LONG, ids=IDS)
@pytest.mark.parametrize("exit", ["compact", "cycle", "compact+cycle"])
@pytest.mark.benchmark(group="pgd-100 exits")
def test_exits(exit, case, load, compare, benchmark):
    torchattacks = pytest.importorskip("torchattacks", reason="install rvlm[oracles]")
    name, eps, steps, samples = case
    model, x, y = load(name, samples)
    settings = dict(eps=eps / 255, alpha=2 / 255, steps=steps, random_start=False)
    best = "last" if exit == "cycle" else "adv"
    attack = partial(pgd, model, best=best, early_stop=exit, **settings)
    peer = torchattacks.PGD(model, **settings)
    left = [robust(model, find(x, y), y) for find in (attack, partial(pgd, model, best=best, **settings), peer)]
    assert torch.equal(left[0], left[1])
    if exit != "cycle":  # fooled at any step, of which torchattacks looks at the last alone
        assert not (left[0] & ~left[2]).any() or QUICK
    assert abs(int(left[0].sum() - left[2].sum())) <= max(1, 0.02 * len(x)), left
    info = {"impl": f"rvlm, {exit}", "peer": "torchattacks"}
    info |= {"case": f"{name} eps {eps}/255 N={samples}, {steps} steps", "robust": int(left[0].sum())}
    compare(lambda: attack(x, y), lambda: peer(x, y), round_seconds=0.02, **info)


@pytest.mark.parametrize("case", RESTARTS, ids=IDS)
@pytest.mark.benchmark(group="pgd's restarts in slots")
def test_restarts(case, load, compare, benchmark):
    name, eps, steps, samples = case
    model, x, y = load(name, samples)
    settings = dict(eps=eps / 255, steps=steps, restarts=10, best="adv", early_stop="compact")

    def attack(slots: int | None):
        return pgd(model, x, y, slots=slots, generator=torch.Generator().manual_seed(0), **settings)

    left = [robust(model, attack(slots), y) for slots in (64, None)]
    assert torch.equal(*left)
    info = {"impl": "rvlm in slots", "peer": "turns", "case": f"{name} eps {eps}/255 N={samples}, 10 x {steps} steps"}
    compare(lambda: attack(64), lambda: attack(None), round_seconds=0.02, **info, robust=int(left[0].sum()))


@pytest.mark.parametrize("case", BLACK_BOX, ids=IDS)
@pytest.mark.benchmark(group="square in slots")
def test_square(case, load, compare, device, benchmark):
    name, eps, queries, samples = case
    model, x, y = load(name, samples)
    ids = torch.arange(samples, device=device)

    def attack(rows, slots=None):
        draws = {"generator": torch.Generator().manual_seed(0), "sample_ids": rows}
        return square(model, x[rows], y[rows], eps=eps / 255, queries=queries, slots=slots, **draws)

    together = lambda: attack(ids, SLOTS)  # noqa: E731
    in_turn = lambda: torch.cat([attack(rows) for rows in ids.split(SLOTS)])  # noqa: E731
    left = [robust(model, find(), y) for find in (together, in_turn)]
    assert torch.equal(*left)
    info = {"impl": "rvlm, together", "peer": f"batches of {SLOTS}"}
    info |= {"case": f"{name} eps {eps}/255 N={samples}, {queries} queries", "robust": int(left[0].sum())}
    compare(together, in_turn, round_seconds=0.02, **info)
