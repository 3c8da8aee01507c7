"""Measure a classifier with AutoAttack, see which stage broke what, and ask whether the figure can be trusted.

python examples/autoattack.py
"""

import torch

from rvlm.attacks import AutoAttack
from rvlm.data import load_data
from rvlm.evaluation import check
from rvlm.models import ZeroShotClassifier, load_clip

data = load_data("digits", "test", limit=16)
classifier = ZeroShotClassifier(load_clip("digits-vit"), data.class_names, data.template).eval()
x, y, _ = data.batch(slice(None))

for finding in check(classifier, x, y):
    print("ok  " if finding.ok else "FAIL", f"{finding.id:<13}", finding.message)

# version="standard" is the measure to report; these stages are short versions of its parts, for a look.
quick = ["apgd-ce-20", "apgd-t-10", "fab-t-10", "square-200"]
attack = AutoAttack(classifier, eps=4 / 255, version="custom", attacks=quick)
result = attack(x, y, generator=torch.Generator().manual_seed(0), return_info=True)
print("still robust after", result.robust)
print("broken by", [result.stages[k] if k >= 0 else "nobody" for k in result.broken_by.tolist()])

assert (result.x_adv - x).abs().max() <= 4 / 255 + 1e-6
assert torch.equal(result.success, classifier(result.x_adv).argmax(1) != y)
