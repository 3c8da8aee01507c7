"""Evaluation: verdicts, intervals, records and files, on models whose robustness is known."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from rvlm.attacks import AttackWarning
from rvlm.attacks.stages import Stage
from rvlm.data import load_data
from rvlm.data.base import Data
from rvlm.evaluation import evaluate, parse_attack, wilson, write_evaluation, write_json
from rvlm.evaluation.images import read_png, save_images, save_pngs
from rvlm.evaluation.metrics import reliability
from rvlm.models import ZeroShotClassifier, load_clip


class Threshold(nn.Module):
    """Two classes by mean brightness: robust at eps exactly where |mean - 0.5| > eps."""

    def forward(self, x):
        z = 20 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-z, z], 1)


GAPS = torch.tensor([-40, -20, -9, -7, -3, 3, 7, 9, 20, 40])


@pytest.fixture
def data():
    return toy(4)


def toy(side):
    pixels = (128 + GAPS).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, side, side)
    y = (GAPS > 0).long()
    y[0] = 1  # wrong when clean
    return Data("toy", "test", ["dark", "bright"], y, torch.arange(10), lambda i: pixels[i], n_total=10)


def run(data, **settings):
    return evaluate(Threshold(), data, progress=False, **({"attack": "pgd-10", "eps": "8/255"} | settings))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_verdicts_are_the_known_ones(data, batch_size):
    found = run(data, batch_size=batch_size)
    # Gaps are to 128/255, the threshold is at 127.5/255: |gap + 0.5| > 8 is robust.
    assert found.broken_by.tolist() == [-2, -1, -1, 0, 0, 0, 0, -1, -1, -1]
    assert found.clean == pytest.approx(0.9) and found.robust == pytest.approx(0.5)
    assert all(item["ok"] for item in found.checks), found.checks
    assert (found.linf <= 8 / 255 + 1e-6).all() and found.pred_adv[3] == 1
    assert (found.margin[3:7] > 0).all() and (found.margin[7:] < 0).all()
    assert found.clean_ci == wilson(9, 10)


@pytest.mark.parametrize("eps, robust", [("0", 0.9), ("2/255", 0.9), ("4/255", 0.7), ("30/255", 0.1), ("64/255", 0.0)])
def test_accuracy_falls_with_eps(data, eps, robust):
    assert run(data, eps=eps).robust == pytest.approx(robust)


def test_stages_see_survivors_only(data):
    sizes = []

    class Spy(Threshold):
        def forward(self, x):
            if x.requires_grad:
                sizes.append(len(x))
            return super().forward(x)

    found = evaluate(Spy(), data, attack="pgd-3x2", eps="8/255", progress=False)
    assert [s.name for s in found.stages] == ["pgd-3-ce-1", "pgd-3-ce-2", "pgd-3-margin-1", "pgd-3-margin-2"]
    assert sizes[0] == 9 and sizes[-1] == 5 and found.robust == 0.5
    assert sum(int((found.broken_by == k).sum()) for k in range(4)) == 4


@pytest.mark.parametrize("attack", ["pgd-10", "apgd-ce-10", "square-60"])
def test_stages_that_refill_get_several_batches_at_once(attack, data, monkeypatch):
    """So that samples of later ones take the places of those that are fooled; the model sees no larger batch."""
    sizes = []

    class Spy(Threshold):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    settings = dict(attack=attack, eps="12/255", progress=False, batch_size=4)
    found = evaluate(Spy(), data, **settings)
    assert max(sizes) == 4 and 0 < found.robust < found.clean
    spent = len(sizes)
    monkeypatch.setitem(evaluate.__globals__, "CHUNKS", 1)
    together = evaluate(Spy(), data, **settings)
    assert max(sizes) == 4 and len(sizes) - spent < spent
    assert torch.equal(found.broken_by, together.broken_by) and found.backwards == together.backwards


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_trajectories_that_return_are_over_where_the_model_repeats_itself(data, noise):
    """And only there: what a random model has said of an image is no promise. It says it by its own numbers, too."""
    draws = torch.Generator().manual_seed(0)

    class Jittery(Threshold):
        def forward(self, x):
            return super().forward(x) + noise * torch.rand(len(x), 1, generator=draws)

    found = evaluate(Jittery(), data, attack="pgd-50@alpha=2/255", eps="8/255", progress=False)
    left = int((found.broken_by == -1).sum())
    assert left == 5 and (found.backwards < 20 * left if noise == 0 else found.backwards >= 50 * left)


def test_no_stage_shows_the_model_more_than_a_batch(monkeypatch):
    """Whatever it is given: some stages get several batches."""
    given, shown, attacked = {}, {}, Stage.__call__
    pixels = torch.randint(0, 256, (40, 3, 6, 6), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4)).eval()

    def noted(stage, model, x, y, **settings):
        sizes = shown.setdefault(stage.name, [])
        given[stage.name] = max(given.get(stage.name, 0), len(x))
        return attacked(stage, lambda v: sizes.append(len(v)) or model(v), x, y, **settings)

    monkeypatch.setattr(Stage, "__call__", noted)
    y = net(pixels / 255).argmax(1)
    data = Data("toy", "test", list("abcd"), y, torch.arange(40), lambda i: pixels[i], n_total=40)
    stages = ["pgd-3", "apgd-ce-3", "apgd-t-3", "fab-t-2", "square-9"]
    for precision in ("fp32", "cascade"):
        found = evaluate(
            net, data, attack=",".join(stages), eps="0.1/255", batch_size=4, precision=precision, progress=False
        )
        assert found.robust > 0.9 and list(shown) == stages
        assert {name: max(sizes) for name, sizes in shown.items()} == dict.fromkeys(stages, 4)
        assert min(given[name] for name in stages if name != "fab-t-2") > 4


def test_no_survivors_end_the_evaluation(data):
    found = run(data, attack="pgd-5x2", eps="64/255")
    assert found.robust == 0 and set(found.broken_by.tolist()) == {-2, 0}


def test_transfer_is_crafted_on_the_source(data):
    class Blind(Threshold):
        """The same decision, but pulled the other way: its images push brightness in the wrong direction."""

        def forward(self, x):
            return -super().forward(x)

    harmless = evaluate(Threshold(), data, source=Blind(), attack="pgd-10", eps="8/255", progress=False)
    assert harmless.target == "transfer" and harmless.robust == pytest.approx(0.9)
    same = evaluate(Threshold(), data, source=Threshold(), attack="pgd-10", eps="8/255", progress=False)
    assert same.robust == pytest.approx(0.5)


def test_l2(data):
    # Moving the mean of 48 pixels by d costs an L2 norm of d * sqrt(48).
    found = run(data, norm="l2", eps=str(8 / 255 * math.sqrt(48)), attack="pgd-50")
    assert found.robust == pytest.approx(0.5)
    assert (found.distance <= 8 / 255 * math.sqrt(48) + 1e-5).all() and (found.distance >= found.linf).all()
    assert (found.distance[found.broken_by == 0] > 2 * found.linf[found.broken_by == 0]).all()


def test_attack_names():
    assert [(s.settings["loss"], s.settings["steps"], s.restart) for s in parse_attack("pgd-50x2")] == [
        ("ce", 50, 0), ("ce", 50, 1), ("margin", 50, 0), ("margin", 50, 1)]  # fmt: skip
    assert parse_attack("fgsm")[0].settings["random_start"] is False
    assert parse_attack("pgd-10@alpha=1/255")[0].settings == {"steps": 10, "loss": "ce", "alpha": 1 / 255}
    assert parse_attack("pgd-30-margin@alpha=0.01")[0].settings == {"steps": 30, "loss": "margin", "alpha": 0.01}
    assert [s.name for s in parse_attack("autoattack")] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    plus = ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert [s.name for s in parse_attack("autoattack-plus")] == plus
    assert [s.settings["eot"] for s in parse_attack("autoattack-rand")] == [20, 20]
    assert parse_attack("tifgsm-10")[0].settings == {"steps": 10, "transforms": ["ti", "di"]}
    both = parse_attack("apgd-ce-50, square-7")
    assert [s.name for s in both] == ["apgd-ce-50", "square-7"] and both[1].settings == {"queries": 7}
    in_l1 = [s.settings for s in parse_attack("autoattack", "l1")]
    assert in_l1[0]["larger_eps"] and in_l1[0]["restarts"] == 5 and in_l1[1]["targets"] == 5
    assert [s.passes(10).units for s in parse_attack("autoattack")] == [303, 2728, 3610, 5001]
    for bad in ("pgd-3@alpha", "pgd-3@alpha=0"):
        with pytest.raises(ValueError, match="expected @lowfreq=BINS or @alpha=STEP, a number above 0"):
            parse_attack(bad)
    with pytest.raises(ValueError, match="@alpha is for fgsm and pgd"):
        parse_attack("square@alpha=1/255")
    for bad in ("pgd", "pgd-0", "pgd-3x0", "autoattak", "", "pgd-3,", "square-0", "pgd-3x1-margin"):
        with pytest.raises(ValueError, match="expected fgsm, pgd-STEPS"):
            parse_attack(bad)


@pytest.mark.parametrize(
    "attack",
    [
        "fgsm",
        "pgd-2",
        "pgd-2x2",
        "pgd-2@lowfreq=2",
        "mifgsm-2",
        "tifgsm-2",
        "apgd-ce-3",
        "fab-3",
        "fmn-3",
        "fab-t-3",
        "square-3",
        "apgd-ce-2,square-2",
    ],
)
@pytest.mark.parametrize("transfer", [False, True])
@pytest.mark.parametrize("norm, eps", [("linf", "8/255"), ("l2", "0.2"), ("l1", "1.0")])
def test_every_attack_runs_by_name(attack, transfer, norm, eps):
    found = run(toy(6), attack=attack, norm=norm, eps=eps, source=Threshold() if transfer else None)
    assert all(check["ok"] for check in found.checks) and found.n_clean == 9 and found.n_robust <= 9
    assert found.target == ("transfer" if transfer else "white-box")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_smallest_changes_by_name(norm):
    found = run(toy(6), attack="cw-2,deepfool-2", norm=norm, eps="0.1")
    assert [stage.name for stage in found.stages] == ["cw-2", "deepfool-2"]
    rounds = {"l2": 9, "linf": 21}[norm]
    assert [stage.passes(10, norm).units for stage in found.stages] == [2 * rounds * 3 + 2, 5 + 2 * 2 * 9]
    with pytest.raises(ValueError, match="deepfool-2 knows the norms 'linf' and 'l2', got 'l1'"):
        run(toy(6), attack="deepfool-2", norm="l1", eps="0.1")


class Certain(Threshold):
    """So large logits that float32 cross-entropy is exactly 0, and with it its gradient."""

    def forward(self, x):
        return 1e4 * super().forward(x)


class Quantised(Threshold):
    """Input in nine levels: no gradient at all."""

    def forward(self, x):
        return super().forward((8 * x).round() / 8)


class Misleading(Threshold):
    """The right logits with the gradient turned around."""

    def forward(self, x):
        turned = 2 * x.detach() - x
        return super().forward(turned)


def checks_of(found):
    return {item["id"]: item for item in found.checks}


def test_saturated_logits_switch_the_loss():
    found = evaluate(Certain(), toy(6), attack="pgd-10", eps="8/255", progress=False)
    assert [stage.name for stage in found.stages] == ["pgd-10", "pgd-10-margin"]
    assert found.robust == pytest.approx(0.5), "the verdicts of the same model with small logits"
    assert (found.broken_by == 1).sum() == 4 and not checks_of(found)["gradients_nonzero"]["ok"]
    assert "pgd-10: " in checks_of(found)["gradients_nonzero"]["detail"]
    fine = evaluate(Threshold(), toy(6), attack="pgd-10", eps="8/255", progress=False)
    assert len(fine.stages) == 1 and checks_of(fine)["gradients_nonzero"]["ok"]


def test_a_quantised_input_is_flagged():
    found = evaluate(Quantised(), toy(6), attack="apgd-ce-10,square-50", eps="24/255", progress=False)
    assert not checks_of(found)["gradients_nonzero"]["ok"] and "BPDA" in checks_of(found)["gradients_nonzero"]["detail"]
    assert [stage.name for stage in found.stages] == ["apgd-ce-10", "apgd-ce-10-margin", "square-50"]


def test_random_models_and_probabilities_are_named(data):
    class Random(Threshold):
        def forward(self, x):
            return super().forward(x) + 0.01 * torch.randn(len(x), 2)

    class Soft(Threshold):
        def forward(self, x):
            return super().forward(x).softmax(1)

    def failed(model):
        found = evaluate(model, data, attack="fgsm", eps="8/255", progress=False, batch_size=4)
        return {item["id"]: item["detail"] for item in found.checks if not item["ok"]}

    assert failed(Threshold()) == {}
    assert "attack its mean (autoattack-rand)" in failed(Random())["deterministic"]
    with pytest.warns(AttackWarning, match="probabilities"):
        assert "a softmax inside" in failed(Soft())["outputs_are_logits"]


def test_misleading_gradients_are_flagged_by_the_black_box():
    found = evaluate(Misleading(), toy(6), attack="pgd-10,square-100", eps="8/255", progress=False)
    assert (found.broken_by == 1).any() and not checks_of(found)["black_box_gain"]["ok"]
    honest = evaluate(Threshold(), toy(6), attack="pgd-10,square-100", eps="8/255", progress=False)
    assert checks_of(honest)["black_box_gain"]["ok"]


def test_bad_evaluations(data):
    with pytest.raises(ValueError, match="did you mean 8/255"):
        run(data, eps="8")
    with pytest.raises(ValueError, match=r"logits \[10, 2\], got \[10, 1\]"):
        evaluate(lambda x: x.flatten(1)[:, :1], data, progress=False)
    with pytest.raises(ValueError, match="no samples"):
        run(data.subset(torch.arange(0), "none"))


def test_nan_logits_are_reported_not_hidden(data):
    class Broken(Threshold):
        def forward(self, x):
            return torch.where((x.flatten(1).mean(1) > 0.6)[:, None], torch.nan, super().forward(x))

    data.y[9] = 0  # argmax over NaN is 0, which must not count as right
    found = evaluate(Broken(), data, attack="pgd-2", progress=False)
    assert found.broken_by[9] == -2 and found.pred_clean[9] == -1
    assert not next(item for item in found.checks if item["id"] == "logits_finite")["ok"]


def test_records(data, tmp_path):
    found = run(data)
    row = write_evaluation(tmp_path, "a model: x/y", found, data, Threshold(), method="by hand")
    assert row["clean"] == found.clean and row["robust"] == found.robust and row["eps"] == "8/255"
    record = json.loads((tmp_path / row["record"]).read_text())
    assert record["schema"] == "rvlm.result/1" and record["status"] == "complete"
    assert record["model"]["name"] == "Threshold" and record["model"]["method"] == "by hand"
    assert record["input"] == {"attack_res": [4, 4]} and record["attack"]["batch"] == 100
    assert record["metrics"]["asr"] == pytest.approx(4 / 9) and record["data"]["n_used"] == 10
    assert record["threat"] == {
        "norm": "linf",
        "eps": 8 / 255,
        "eps_str": "8/255",
        "space": "pixel[0,1]",
        "target": "white-box",
    }
    assert record["attack"]["stages"][0] == {
        "name": "pgd-10",
        "attack": "pgd",
        "settings": {
            "alpha": None,
            "steps": 10,
            "targeted": False,
            "loss": "ce",
            "random_start": True,
            "restarts": 1,
            "eot": 1,
            "low_frequency": None,
        },
        "restart": 0,
    }
    assert record["metrics"]["per_stage"] == {"pgd-10": 4} and record["data"]["fingerprint"] == data.fingerprint
    assert record["perf"]["backward_images"] > 0
    samples = np.load(tmp_path / record["samples"])
    assert samples["broken_by"].tolist() == found.broken_by.tolist() and set(samples.files) == {
        "index", "y", "pred_clean", "pred_adv", "broken_by", "fooled_at", "top_clean", "top_adv", "prob_clean",
        "prob_adv", "linf", "distance", "margin"}  # fmt: skip
    twice = write_evaluation(tmp_path, "twice", run(data, attack="pgd-10,pgd-10"), data, Threshold())["record"]
    assert json.loads((tmp_path / twice).read_text())["metrics"]["per_stage"] == {"pgd-10": 4}


def test_a_cut_data_set_makes_a_partial_record(data, tmp_path):
    some = data.limited(4)
    row = write_evaluation(tmp_path, "cut", run(some), some, Threshold())
    record = json.loads((tmp_path / row["record"]).read_text())
    assert record["status"] == "partial" and (record["data"]["n_used"], record["data"]["n_total"]) == (4, 10)
    assert record["data"]["index_rule"] == "perm(seed=0)[:4]"


def test_a_record_knows_the_weights_and_the_prompts(tmp_path):
    clip, some = load_clip("tiny-vit"), load_data("digits", "test", limit=2)
    classifier = ZeroShotClassifier(clip, some.class_names, "plain").eval()
    found = evaluate(classifier, some, attack="fgsm", progress=False)

    def record():
        return json.loads((tmp_path / write_evaluation(tmp_path, "m", found, some, classifier)["record"]).read_text())

    before = record()
    assert before["text"]["n_templates"] == len(classifier.templates) and before["input"]["norm_in_graph"]
    assert before["input"]["resize_in_graph"] is False and before["text"]["logit_scale"] == clip.logit_scale.item()
    with torch.no_grad():
        next(clip.model.visual.parameters()).add_(1e-3)
    after = record()
    assert after["model"]["sha256"] != before["model"]["sha256"] and after["text"] == before["text"]


def test_files_are_whole_or_old(tmp_path):
    path = write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_images_on_disk(data, tmp_path):
    from safetensors.torch import load_file

    found = run(data, keep_images=True, quantize=255, eps="9/255")
    tensors = load_file(save_images(tmp_path / "adv.safetensors", found, data, Threshold(), "toy"))
    assert torch.equal(tensors["x_adv"], found.x_adv) and tensors["broken_by"].tolist() == found.broken_by.tolist()
    report = save_pngs(tmp_path / "png", found, Threshold())
    assert report["written"] == report["still_fool"] == int((found.broken_by >= 0).sum()) > 0
    first = sorted((tmp_path / "png").iterdir())[0]
    row = int((found.broken_by >= 0).nonzero()[0])
    assert torch.equal(read_png(first), found.x_adv[row])


def test_wilson():
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)  # published example
    assert wilson(0, 100)[0] == 0 and wilson(100, 100)[1] == 1 and wilson(0, 0) == (0, 1)
    assert 0.03 < wilson(0, 100)[1] < 0.04
    sizes = [*range(1, 500), 17.3, 123.456]
    assert all(wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1 for n in sizes), "not but for rounding: repro asks it"
    with pytest.raises(ValueError, match="0 .. n"):
        wilson(5, 4)


class Overconfident(Threshold):
    """In bf16 it sees images 20/255 darker."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.one.weight)

    def forward(self, x):
        narrow = self.one(x.flatten(1)[:, :1]).dtype == torch.bfloat16
        return super().forward(x - (20 / 255 if narrow else 0.0))


@pytest.mark.parametrize("attack", ["pgd-10", "apgd-ce-10", "autoattack"])
def test_a_cascade_has_the_verdicts_of_fp32_and_counts_disagreements(attack, data, tmp_path):
    model = Overconfident()
    names = "apgd-ce-10,fab-3,square-20" if attack == "autoattack" else attack
    plain, cascade = (
        evaluate(model, data, attack=names, eps="8/255", precision=precision, progress=False)
        for precision in ("fp32", "cascade")
    )
    assert torch.equal(cascade.broken_by == -1, plain.broken_by == -1) and plain.disagreement is None
    assert cascade.disagreement["fooled_in_bf16_only"] > 0
    assert all(item["ok"] for item in cascade.checks if item["id"] == "verdict_rescored")
    write_evaluation(tmp_path, "toy", cascade, data, model)
    record = json.loads(next((tmp_path / "result").glob("*.json")).read_text())["attack"]
    assert record["precision"] == "cascade" and record["disagreement"] == cascade.disagreement
    expected = {"apgd": "cascade", "pgd": "cascade", "square": "cascade", "fab": "fp32"}
    assert [stage["precision"] for stage in record["stages"]] == [expected[s["attack"]] for s in record["stages"]]


def test_precision_is_checked_before_anything_runs(data):
    with pytest.raises(ValueError, match="precision must be one of 'fp32', 'tf32', 'bf16', 'cascade'"):
        run(data, precision="fp8")


def test_curves_over_steps_end_at_the_verdicts(data):
    found = run(data, attack="pgd-4@alpha=4/255,fmn-3,square-30", batch_size=3)
    first, fmn, last = (found.over_steps(k) for k in range(3))
    assert first["steps"] == [0, 1, 2, 3, 4] and first["samples"] == 9 and first["loss"] == "ce"
    assert first["fooled"] == sorted(first["fooled"]) and first["fooled"][-1] == first["broken"] == 4
    assert (found.fooled_at >= 0).equal(found.broken_by == 0)
    assert first["mean_loss"] == sorted(first["mean_loss"]), "a convex model: the loss of those that are left rises"
    assert fmn["steps"] == [] and fmn["loss"] is None and fmn["broken"] == 0
    assert last["samples"] == 5 and last["fooled"][-1] == 0 and last["steps"][-1] == 30
    whole = run(data, attack="pgd-4@alpha=4/255,fmn-3,square-30").over_steps(0)
    assert whole["fooled"] == first["fooled"] and whole["mean_loss"] == pytest.approx(first["mean_loss"])
    fab = run(data, attack="fab-3").over_steps(0)
    assert fab["steps"] == [0, 1, 2, 3] and fab["fooled"] == [0, 4, 4, 4] and fab["broken"] == 4
    assert fab["mean_loss"][0] < fab["mean_loss"][1] and fab["loss"] is None
    long = run(data, attack="square-1000").over_steps(0)
    assert len(long["steps"]) == 101 and long["steps"][0] == 0 and long["steps"][-1] == 1000
    found = run(data, attack="mifgsm-4,tifgsm-4")
    momentum, diverse = (found.over_steps(k) for k in range(2))
    assert momentum["steps"] == [0, 1, 2, 3, 4] and momentum["loss"] == "ce" and diverse["steps"] == []
    assert momentum["fooled"][-1] == momentum["broken"] == 4 and momentum["fooled"][0] == 0
    assert momentum["mean_loss"] == sorted(momentum["mean_loss"])
    moved = evaluate(Threshold(), data, source=Threshold(), attack="pgd-4", eps="8/255", progress=False)
    assert moved.over_steps(0)["steps"] == [], "by transfer, the attack does not see who is fooled"


def test_likeliest_words_and_calibration(data):
    found = run(data)
    x = (128 + GAPS)[:, None].expand(-1, 48).reshape(10, 3, 4, 4) / 255
    prob = Threshold()(x).softmax(1)
    assert torch.equal(found.top_clean[:, 0], found.pred_clean) and found.top_clean[:, 2].eq(-1).all()
    assert torch.allclose(found.prob_clean[:, 0], prob.max(1).values) and found.prob_clean[:, 2].eq(0).all()
    assert torch.equal(found.top_adv[:, 0], found.pred_adv)
    both = found.calibration()
    assert sum(both["clean"]["right"]) == 9 and sum(both["robust"]["right"]) == 5
    assert sum(both["clean"]["confidence"]) == pytest.approx(found.prob_clean[:, 0].sum().item())


def test_reliability_by_hand():
    confidence = torch.tensor([0.0, 0.05, 0.95, 1.0, 0.5])
    found = reliability(confidence, torch.tensor([False, True, True, False, True]))
    assert found["n"] == [2, *[0] * 5, 0, 1, *[0] * 6, 2] and found["right"][0] == 1
    # |1 - 0.05| + |1 - 0.5| + |1 - 1.95|, over 5
    assert found["ece"] == pytest.approx((0.95 + 0.5 + 0.95) / 5)
    assert reliability(torch.zeros(0), torch.zeros(0, dtype=torch.bool))["ece"] == 0


def test_the_first_images_and_their_words(tmp_path, data):
    found = run(data, keep_images=4, batch_size=3)
    whole = run(data, keep_images=True)
    assert found.x_adv.shape == (4, 3, 4, 4) and torch.equal(found.x_adv, whole.x_adv[:4])
    for evaluation, most, kept in ((found, 9, 4), (whole, 2, 2)):
        row = write_evaluation(tmp_path / str(kept), "toy", evaluation, data, Threshold(), examples=most)
        examples = json.loads((tmp_path / str(kept) / row["record"]).read_text())["examples"]
        assert examples["rule"] == f"the first {kept} samples" and examples["index"] == list(range(kept))
    with np.load(tmp_path / "4" / "samples" / "toy-white-box-pgd-10-8-255-images.npz") as images:
        clean, change = torch.from_numpy(images["clean"]), torch.from_numpy(images["change"]).float()
    assert torch.equal(clean, data.read(torch.arange(4)))
    assert torch.allclose(clean / 255 + change, found.x_adv, atol=2e-5) and not change[0].any() and change[3].any()
    examples = json.loads((tmp_path / "4" / "result" / "toy-white-box-pgd-10-8-255.json").read_text())["examples"]
    assert examples["labels"] == ["bright", "dark", "dark", "dark"]
    assert examples["clean"][3][0][0] == "dark" and examples["adversarial"][3][0][0] == "bright"
    assert [len(words) for words in examples["clean"]] == [2] * 4
    write_evaluation(tmp_path / "none", "toy", run(data), data, Threshold())
    assert len(list((tmp_path / "none" / "samples").iterdir())) == 1
    with pytest.raises(ValueError, match="True, False or a number"):
        run(data, keep_images=-1)
