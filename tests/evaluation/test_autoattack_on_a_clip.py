"""AutoAttack on a robust CLIP leaves the samples that its original implementation leaves."""

import pytest
import torch

from rvlm.attacks import scoring
from rvlm.data import load_data
from rvlm.evaluation import evaluate
from rvlm.models import ZeroShotClassifier, load_clip


@pytest.mark.slow
def test_standard_on_a_tecoa_clip():
    pyautoattack = pytest.importorskip("pyautoattack", reason="install rvlm[oracles]")
    data = load_data("digits", "test", limit=32)
    model = ZeroShotClassifier(load_clip("digits-vit-tecoa"), data.class_names, data.template).eval()
    found = evaluate(model, data, attack="autoattack", eps="24/255", progress=False)
    x, y, _ = data.batch(slice(None))
    with scoring(model):
        right = model(x).argmax(1) == y
    original = pyautoattack.AutoAttack(model, eps=24 / 255, norm="Linf", seed=0, version="standard")
    x_adv, _ = original.run_standard_evaluation(x, y, batch_size=len(x))
    with scoring(model):
        theirs = right & (model(x_adv).argmax(1) == y)
    assert 0 < found.n_robust < found.n_clean == int(right.sum()), "otherwise this shows nothing"
    assert torch.equal(found.broken_by == -1, theirs)
    assert all(item["ok"] for item in found.checks), found.checks
