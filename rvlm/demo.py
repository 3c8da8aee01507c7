"""`rvlm demo`: a CLIP is trained, broken and defended in front of you, on real scans, without a network.

The story: a small ViT CLIP learns the digits; PGD breaks it; TeCoA fine-tunes its image tower; both are measured with
PGD-10 and with the stronger PGD-50 x 3 restarts on two losses; and the ViT's adversarial images are shown to a small
ResNet CLIP, which they hardly fool. Nothing is cached, so that the story is the same everywhere.
"""

import copy
import time
from pathlib import Path

from rvlm.arguments import EvalArgs
from rvlm.data import load_data
from rvlm.evaluation import evaluate, write_evaluation, write_json
from rvlm.evaluation.records import environment
from rvlm.methods import build_method
from rvlm.models import ZeroShotClassifier, load_clip
from rvlm.report import Table, accuracy_over_eps, image_grid, rich_table, write_html
from rvlm.report.plots import class_words, pick_rows
from rvlm.training import train

__all__ = ["run"]

EPS = "8/255"
SWEEP = ("2/255", "4/255", "16/255")


def run(out: Path, *, seed: int = 0, quick: bool = False) -> Path:
    """Runs the demo and writes `out`.

    Args:
        out: folder; gets summary.json, records, samples, pictures and report.html.
        seed: of weights, data order and noise. With the same number of threads the numbers repeat to the digit.
        quick: fewer epochs, 200 test samples and no eps sweep; the attacks stay as they are.

    Returns:
        Path of report.html.
    """
    from rich.console import Console

    began, console, robust = time.perf_counter(), Console(), None
    training, test = load_data("digits", "train"), load_data("digits", "test", limit=200 if quick else None)
    rows, curves = [], {"clip": [], "tecoa": []}

    def classifier(clip):
        return ZeroShotClassifier(clip, test.class_names, test.template).eval()

    def measure(name, clip, attack, eps=EPS, source=None, keep_images=False, data=test):
        scored = classifier(clip)
        found = evaluate(
            scored, data, attack=attack, eps=eps, seed=seed, keep_images=keep_images,
            source=None if source is None else classifier(source),
        )  # fmt: skip
        about = {"method": "tecoa" if clip is robust else "clip", "examples": EvalArgs.examples}
        rows.append(write_evaluation(out, name, found, data, scored, **about))
        if source is None and attack == "pgd-10":
            curves[name].append((str(eps), found.robust, *found.robust_ci))
        return found

    console.rule("1. A small CLIP learns ten words, and breaks")
    clip = load_clip("tiny-vit", seed=seed)
    train(clip, training, build_method("clip", epochs=5 if quick else 12), seed=seed)
    broken = measure("clip", clip, "pgd-10", keep_images=True)
    curves["clip"].insert(0, ("0", broken.clean, *broken.clean_ci))

    console.rule("2. TeCoA trains its image tower on adversarial images")
    robust = copy.deepcopy(clip)
    train(robust, training, build_method("tecoa", epochs=4 if quick else 12), seed=seed)
    defended = measure("tecoa", robust, "pgd-10", keep_images=True)
    curves["tecoa"].insert(0, ("0", defended.clean, *defended.clean_ci))

    console.rule("3. A stronger attack, and other radii")
    fewer = test.limited(100 if quick else 200)  # 300 steps an image: a smaller sample, not a weaker attack
    measure("clip", clip, "pgd-50x3", data=fewer)
    measure("tecoa", robust, "pgd-50x3", data=fewer)
    if not quick:
        for eps in SWEEP:
            measure("clip", clip, "pgd-10", eps)
            measure("tecoa", robust, "pgd-10", eps)

    console.rule("4. The same images shown to a CLIP of another architecture")
    resnet = load_clip("tiny-rn", seed=seed)
    train(resnet, training, build_method("clip", epochs=3 if quick else 6), seed=seed)
    measure("resnet clip", resnet, "pgd-10", source=clip)

    write_json(out / "summary.json", {"schema": "rvlm.summary/1", "rows": rows})
    report = _report(out, test, broken, defended, rows, curves, seed, quick, time.perf_counter() - began)
    console.print(rich_table(rows, "rvlm demo"))
    console.print(f"done in {time.perf_counter() - began:.0f} s; open {report}", soft_wrap=True)
    return report


def _report(out, test, broken, defended, rows, curves, seed, quick, seconds) -> Path:
    figures = []
    some = pick_rows(broken.broken_by, broken.y)
    for name, found, caption in (
        ("images-clip", broken, f"CLIP before: PGD-10 at {EPS}"),
        ("images-tecoa", defended, f"After TeCoA: PGD-10 at {EPS}"),
    ):
        words = [class_words(test.class_names, t[some]) for t in (found.y, found.pred_clean, found.pred_adv)]
        path = image_grid(out / f"{name}.png", test.batch(some)[0], found.x_adv[some], *words)
        figures.append((caption, path))
    curve = accuracy_over_eps(out / "accuracy.png", curves, "Accuracy under PGD-10, white-box")
    figures.append(("Accuracy over the attack's radius", curve))
    env = environment()
    return write_html(
        out / "report.html",
        title="A vision-language model, broken and defended",
        intro=(
            "A small CLIP was trained on 1,297 scans of handwritten digits to match an image with the words of its "
            f"digit. An attack that moves no pixel by more than {EPS} of its range breaks it. TeCoA, adversarial "
            "training of the image tower, defends it. The last row shows the first model's adversarial images to a "
            "ResNet CLIP that was trained on its own."
        ),
        tables=[Table("Results", rows)],
        figures=figures,
        facts={
            "command": "rvlm demo" + (" --quick" if quick else "") + f" --seed {seed}",
            "data": f"{test.name}, {len(test)} test samples, fingerprint {test.fingerprint}",
            "attacks": "pgd-10: PGD, 10 steps, cross-entropy, one random start; pgd-50x3: PGD, 50 steps, 3 random "
            "starts on cross-entropy, then 3 on the margin loss, each on what the ones before left; step size "
            "2.5 eps / steps; Linf; a sample counts as broken if any scored iterate fooled the model",
            "time": f"{seconds:.0f} s on {env['device']} with {env['threads']} threads",
            "versions": f"rvlm {env['rvlm']}, torch {env['torch']}, Python {env['python']}",
        },
    )
