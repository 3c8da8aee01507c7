"""Make a CLIP robust with TeCoA from Python, and measure it before and after. About ten seconds with these settings.

python examples/train_tecoa.py
"""

from rvlm.data import load_data
from rvlm.evaluation import evaluate
from rvlm.methods import build_method
from rvlm.models import ZeroShotClassifier, load_clip
from rvlm.training import train

training, test = load_data("digits", "train"), load_data("digits", "test", limit=200)
clip = load_clip("tiny-vit")
train(clip, training, build_method("clip", epochs=4))


def report(name: str) -> None:
    classifier = ZeroShotClassifier(clip, test.class_names, test.template)
    found = evaluate(classifier, test, attack="pgd-10", eps="8/255", progress=False)
    print(f"{name}: clean {found.clean:.1%}, PGD-10 at 8/255 {found.robust:.1%} (white-box, {len(found)} samples)")


report("before")
train(clip, training, build_method("tecoa", epochs=2))
report("after 2 epochs of TeCoA")
