"""HPT-GPD: robustness for a ViT CLIP from a vanilla ResNet CLIP, on the bundled digits; about a minute on two cores."""

from rvlm.data import load_data
from rvlm.evaluation import evaluate
from rvlm.methods import build_method
from rvlm.models import ZeroShotClassifier, load_clip
from rvlm.training import train

student = load_clip("digits-vit")  # any CLIP: "ViT-B-32:openai" and a proxy "ViT-B-16:openai", as in the paper
method = build_method("hpt_gpd", proxy="digits-rn", epochs=4, ga_epochs=2)
train(student, load_data("digits", "train"), method, out="runs/hpt")  # the same call goes on after a kill

test = load_data("digits", "test", limit=200)
classifier = ZeroShotClassifier(student, test.class_names, test.template)
found = evaluate(classifier, test, attack="pgd-20", eps="8/255")
print(f"clean {found.clean:.1%}, robust {found.robust:.1%} (PGD-20 at 8/255, white-box)")
