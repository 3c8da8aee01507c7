"""AutoAttack by one changed import: `rvlm.compat` against torchattacks and pyautoattack, equal settings, equal draws.

Before any timing every sample must end the same way on both sides, but for those that only ours breaks. The steps of
APGD and FAB and the queries of Square stand in the case: torchattacks' own defaults are 10 and 5000, AutoAttack's 100
and 5000. Where a model is broken by the first attack, nearly all of the work is what fooled samples still do; where it
is robust, both sides make the same passes through it.
"""

import warnings

import pytest
from measure import QUICK, robust

CASES = [  # model, eps, steps, queries, samples
    ("digits-vit", 8 / 255, 10, 5000, 64),
    ("digits-vit", 8 / 255, 100, 5000, 64),
    ("digits-rn", 8 / 255, 100, 5000, 64),
    ("digits-vit-tecoa", 24 / 255, 20, 200, 32),
    ("digits-vit-tecoa", 8 / 255, 20, 200, 16),
]
if QUICK:
    CASES = [(name, eps, 2, 2, 8) for name, eps, *_ in CASES]


def torchattacks(library, model, eps: float, steps: int, queries: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attack = library.AutoAttack(model, eps=eps, n_classes=10, seed=0)
    ce, aimed, fab, square = attack._autoattack.attacks
    ce.steps = aimed.steps = fab.steps = steps
    square.n_queries = queries
    return attack


def pyautoattack(library, model, eps: float, steps: int, queries: int):
    attack = library.AutoAttack(model, eps=eps, seed=0, device=next(model.parameters()).device)
    attack.verbose = False
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = steps
    attack.square.n_queries = queries
    return lambda x, y: attack.run_standard_evaluation(x, y, batch_size=len(x))[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1] * 255:.0f}-{case[2]}")
@pytest.mark.parametrize("peer", ["torchattacks", "pyautoattack"])
@pytest.mark.benchmark(group="autoattack by one import")
def test_autoattack(peer, case, load, compare, benchmark):
    theirs = pytest.importorskip(peer, reason="install rvlm[oracles]")
    from rvlm.compat import pyautoattack as ours_pyautoattack
    from rvlm.compat import torchattacks as ours_torchattacks

    name, eps, steps, queries, samples = case
    build, ours = {
        "torchattacks": (torchattacks, ours_torchattacks),
        "pyautoattack": (pyautoattack, ours_pyautoattack),
    }[peer]
    model, x, y = load(name, samples)
    sides = [build(library, model, eps, steps, queries) for library in (ours, theirs)]
    fooled = [~robust(model, side(x, y), y) for side in sides]
    assert (fooled[0] >= fooled[1]).all() and (fooled[0] != fooled[1]).sum() <= max(1, 0.02 * len(x)), fooled
    info = {"impl": "rvlm.compat", "peer": peer, "robust": int((~fooled[0]).sum())}
    info["case"] = f"{name} eps {eps * 255:.0f}/255 N={len(x)}, {steps} steps, {queries} queries"
    compare(lambda: sides[0](x, y), lambda: sides[1](x, y), round_seconds=0.02, **info)
