"""AutoAttack's parts against the original implementation (pyautoattack): same model, same starts, same settings.

Before any timing both must leave the same samples robust, up to 2 % of them (their random numbers differ in Square).
Nothing is stopped early on either side, other than what the algorithms do themselves.
"""

import pytest
import torch
from measure import QUICK

from rvlm.attacks import apgd, fab, square

ON_GPU = torch.cuda.is_available()
EPS = 4 / 255
CASES = [4] if QUICK else [64, 8]
PARTS = {"apgd-ce": 10, "apgd-t": 5, "fab-t": 5, "square": 100}  # steps, queries
if QUICK:
    PARTS = dict.fromkeys(PARTS, 2)


def ours(part: str, model, x, y):
    n = PARTS[part]
    draws = torch.Generator().manual_seed(0)
    if part == "apgd-ce":
        return apgd(model, x, y, eps=EPS, steps=n, generator=draws)
    if part == "apgd-t":
        return apgd(model, x, y, eps=EPS, steps=n, loss="dlr-targeted", generator=draws)
    if part == "fab-t":
        return fab(model, x, y, eps=EPS, steps=n, generator=draws)
    return square(model, x, y, eps=EPS, queries=n, generator=draws)


def theirs(part: str, model, x, y):
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    given = {"eps": EPS, "norm": "Linf", "device": x.device, "seed": 0}
    if part == "apgd-ce":
        return APGDAttack(model, n_iter=PARTS[part], loss="ce", **given).perturb(x, y)
    if part == "apgd-t":
        return APGDAttack_targeted(model, n_iter=PARTS[part], n_target_classes=9, **given).perturb(x, y)
    if part == "fab-t":
        return FABAttack_PT(model, n_iter=PARTS[part], targeted=True, n_target_classes=9, **given).perturb(x, y)
    return SquareAttack(model, n_queries=PARTS[part], resc_schedule=False, **given).perturb(x, y)


@pytest.fixture(scope="module")
def classifier(device):
    """A digits CLIP made robust with TeCoA, so that the attacks have work to do."""
    pytest.importorskip("open_clip", reason="open_clip is needed for the models that are attacked")
    pytest.importorskip("pyautoattack", reason="install rvlm[oracles]")
    from rvlm.data import load_data
    from rvlm.models import ZeroShotClassifier, load_clip

    data = load_data("digits", "test")
    name = "tiny-vit" if QUICK else "digits-vit-tecoa"
    return ZeroShotClassifier(load_clip(name, device), data.class_names, data.template).to(device).eval(), data


@pytest.mark.parametrize("batch", CASES, ids=lambda batch: f"B{batch}")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("impl", ["rvlm", "pyautoattack"])
@pytest.mark.benchmark(group="autoattack")
def test_part(impl, part, batch, classifier, device, compare, benchmark):
    model, data = classifier
    x, y, _ = data.batch(slice(0, batch))
    x, y = x.to(device), y.to(device)
    attack = ours if impl == "rvlm" else theirs
    with torch.no_grad():
        robust = [
            (model(found).argmax(1) == y).sum().item()
            for found in (attack(part, model, x, y), theirs(part, model, x, y))
        ]
    assert abs(robust[0] - robust[1]) <= max(1, 0.02 * len(x)), robust
    info = {"impl": impl, "peer": "pyautoattack", "case": f"{part} {PARTS[part]} B={len(x)}", "robust": robust[0]}
    compare(lambda: attack(part, model, x, y), lambda: theirs(part, model, x, y), round_seconds=0.02, **info)
