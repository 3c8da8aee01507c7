"""What an evaluation says that it costs, before, and what it took."""

import json
import sys
from dataclasses import astuple

import numpy as np
import pytest
import torch
from torch import nn

from rvlm.attacks.objective import Passes
from rvlm.cli import main
from rvlm.data.base import Data
from rvlm.evaluation import evaluate, parse_attack, write_evaluation
from rvlm.evaluation.cost import Cost, Forecast, Speed, describe, duration, earlier_shares, estimate, measure_speed

CLASSES = list("abcdef")


class Robust(nn.Module):
    """Logits that no change of pixels turns."""

    def __init__(self):
        super().__init__()
        self.register_buffer("w", 1e-3 * torch.randn(108, 6, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("b", torch.tensor([10.0, 0, 0, 0, 0, 0]))
        self.forwards = 0

    def forward(self, x):
        self.forwards += len(x)
        return x.flatten(1) @ self.w + self.b


class Clock:
    """Stands for the module `time`, and goes on only while a model of its own runs."""

    now = 0.0

    def perf_counter(self):
        return self.now


class Timed(Robust):
    """An image takes so many seconds there and twice as many back; the first pass each way takes a hundred more."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds, self.cold = clock, seconds, {"there", "back"}

    def takes(self, way, seconds):
        self.clock.now += seconds + 100 * (way in self.cold)
        self.cold.discard(way)

    def forward(self, x):
        self.takes("there", self.seconds * len(x))
        if x.requires_grad and torch.is_grad_enabled():
            x = x.view_as(x)  # of this pass alone
            x.register_hook(lambda grad: self.takes("back", 2 * self.seconds * len(grad)))
        return super().forward(x)


def toy(n=20, label=0):
    pixels = torch.randint(0, 256, (n, 3, 6, 6), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Data("toy", "test", CLASSES, torch.full((n,), label), torch.arange(n), lambda i: pixels[i], n_total=n)


ATTACK = "pgd-3x2,apgd-t-4,fab-2,fab-t-2,square-5,mifgsm-3,fmn-3,deepfool-2"


@pytest.mark.parametrize("batch_size", [7, 100])
@pytest.mark.parametrize("transfer", [False, True])
def test_what_nothing_fools_costs_the_most(batch_size, transfer):
    model = Robust()
    source = Robust() if transfer else None
    found = evaluate(model, toy(), attack=ATTACK, eps="1/255", batch_size=batch_size, source=source, progress=False)
    assert found.robust == 1.0 and found.cost.most == Passes(found.forwards, found.backwards)
    assert model.forwards + (source.forwards if transfer else 0) == found.forwards
    if transfer:
        assert model.forwards == found.cost.scored([1.0] * len(found.stages)).forwards


def test_what_is_wrong_when_clean_costs_two_passes_at_most():
    found = evaluate(Robust(), toy(label=1), attack=ATTACK, eps="1/255", batch_size=7, progress=False)
    assert found.clean == 0 and (found.forwards, found.backwards) == (27, 0)


def test_costs_by_hand():
    cost = estimate(1000, "pgd-9", parse_attack("pgd-9"), 10, batch_size=100)
    assert cost.most == Passes(1000 + 100 + 1000 * 11, 9000) and cost.expected == Passes(1100 + 500 * 11, 4500)
    assert cost.seconds is None and cost.record()["seconds"] is None
    timed = cost.timed(Speed(0.1, 0.1, 0.2), processes=2)
    assert timed.seconds == pytest.approx(((6600 * 0.1 + 4500 * 0.2) / 2, (12100 * 0.1 + 9000 * 0.2) / 2))
    known = estimate(1000, "pgd-9", parse_attack("pgd-9"), 10, batch_size=100, shares=[0.25])
    assert known.expected == Passes(1100 + 250 * 11, 2250) and "earlier records" in known.assumes
    few = estimate(10, "autoattack", parse_attack("autoattack"), 3)
    assert [name for name, _ in few.stages] == ["apgd-ce", "fab-t", "square"], "apgd-t needs four classes"
    text = describe([timed, timed], "m on toy")
    assert text.splitlines()[0] == "cost of m on toy: 2 evaluations, 2,000 images"
    assert (
        "10 forward        9 backward" in text and "at most   24,200 forward and 18,000 backward passes, 50 min" in text
    )
    said = [duration(s) for s in (0.2, 61, 3000, 7500, 400_000)]
    assert said == ["less than a second", "61 s", "50 min", "2 h 05 min", "4 d 15 h"]


def test_seconds_are_those_of_the_model(monkeypatch):
    """By a clock that stands still between passes the prediction is what the run takes."""
    clock = Clock()
    for module in ("cost", "resume"):
        monkeypatch.setattr(f"rvlm.evaluation.{module}.time", clock)
    data, model = toy(20), Timed(clock, 0.004)
    cost = estimate(20, "pgd-8", parse_attack("pgd-8"), 6, batch_size=10)
    speed = measure_speed(model, data.batch(slice(0, 10))[0])
    assert astuple(speed) == pytest.approx((0.004, 0.004, 0.008)), "passes that are warm"
    other = measure_speed(Timed(clock, 0.009), data.batch(slice(0, 10))[0], model)
    assert astuple(other) == pytest.approx((0.009, 0.004, 0.008))
    found = evaluate(model, data, attack="pgd-8", eps="1/255", batch_size=10, progress=False, cost=cost.timed(speed))
    assert found.cost.seconds[1] == pytest.approx(found.seconds)


def test_timing_leaves_no_trace_and_needs_no_gradient():
    class Noisy(Robust):
        def forward(self, x):
            return super().forward(x.detach()) + torch.rand(())

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert measure_speed(Noisy(), toy().batch(slice(0, 10))[0]).backward >= 0
    assert torch.equal(torch.rand(3), expected)


def test_the_record_holds_what_was_predicted_and_what_it_took(tmp_path):
    found = evaluate(Robust(), toy(), attack="pgd-3x1", eps="1/255", batch_size=10, progress=False)
    row = write_evaluation(tmp_path, "m", found, toy(), Robust())
    record = json.loads((tmp_path / row["record"]).read_text())
    predicted, took = record["cost"]["predicted"], record["perf"]
    most = {"forward_images": 20 + 10 + 20 * 5 * 2, "backward_images": 20 * 3 * 2}
    assert predicted["most"] == most == {key: took[key] for key in most} and took["wall_s"] == found.seconds
    assert predicted["assumes"].startswith("50%") and took["shared_forward_images"] == 0
    assert earlier_shares(tmp_path, "m", "pgd-3x1") == [1.0, 1.0]
    assert earlier_shares(tmp_path, "m", "pgd-4") is None and earlier_shares(None, "m", "pgd-3x1") is None


def test_a_shared_pass_over_clean_images_is_counted_once(tmp_path):
    model, given = Robust(), dict(attack="pgd-3x1", batch_size=7, progress=False)
    first = evaluate(model, toy(), eps="1/255", **given)
    found = evaluate(model, toy(), eps="2/255", clean=first, **given)
    assert model.forwards == first.forwards + found.forwards and first.forwards - found.forwards == 27
    assert found.cost.most == Passes(found.forwards, found.backwards) and found.cost.shared == 27
    row = write_evaluation(tmp_path, "m", found, toy(), model)
    took = json.loads((tmp_path / row["record"]).read_text())["perf"]
    assert took["forward_images"] == found.forwards and took["shared_forward_images"] == 27


def test_earlier_shares_are_means_over_records(tmp_path):
    (tmp_path / "result").mkdir()
    for k, (clean, broken) in enumerate([(1.0, [50, 25]), (0.5, [50, 0])]):
        metrics = {"clean_acc": {"v": clean, "n": 100}, "per_stage": dict(zip("ab", broken, strict=True))}
        record = {"name": "m", "attack": {"name": "two"}, "threat": {"target": "white-box"}, "metrics": metrics}
        (tmp_path / "result" / f"{k}.json").write_text(json.dumps(record))
    (tmp_path / "result" / "other.json").write_text(json.dumps({"schema": "rvlm.transfer/1"}))
    assert earlier_shares(tmp_path, "m", "two") == [0.75, 0.25]
    assert earlier_shares(tmp_path, "m", "two", "transfer") is None


def test_a_forecast_follows_what_has_been_seen():
    forecast = Forecast([1, 10, 100])
    forecast.begin(0, 1000)
    assert forecast.left == 1000 * 111
    forecast.saw(500, 500, 250)
    assert forecast.left == 500 + 500 * 110, "half of the images are right"
    forecast.saw(500, 500, 250)
    forecast.begin(1, 500)
    forecast.saw(100, 400, 50)
    assert forecast.left == 400 * 4 + 250 * 100
    forecast.begin(2, 40, survived=10)
    assert forecast.left == 40 * 100


def test_the_bar_ends_where_it_says(capsys):
    evaluate(Robust(), toy(), attack="pgd-3x1,square-4", eps="1/255", batch_size=7, progress=True)
    assert "100%" in capsys.readouterr().err.rsplit("\r", 1)[-1]


def argv(*more):
    words = ["eval", "--model", "tiny-vit", "--limit", "40", "--batch-size", "10", *more]
    return main([str(word) for word in words])


def test_a_dry_run_says_what_it_costs_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert argv("--attack", "pgd-20,square-50", "--eps", "2/255,4/255", "--dry-run", "--out", out) == 0
    said = capsys.readouterr()
    assert "cost of tiny-vit on digits: 2 evaluations, 80 images" in said.out and not out.exists()
    most = (40 + 10) + 2 * 40 * (22 + 52)
    assert f"at most   {most:,} forward and {2 * 40 * 20:,} backward passes, " in said.out
    assert "(if 50% of the images survive every stage)" in said.out and "cost of" not in said.err


def test_a_record_of_several_radii_is_that_of_one(tmp_path):
    runs = {"2/255,8/255": tmp_path / "both", "8/255": tmp_path / "one"}
    for eps, out in runs.items():
        assert argv("--attack", "pgd-2", "--eps", eps, "--out", out) == 0
    both, one = (
        json.loads((out / "result" / "tiny-vit-white-box-pgd-2-8-255.json").read_text()) for out in runs.values()
    )
    took = [record.pop("perf") for record in (both, one)]
    assert took[0]["shared_forward_images"] == 50 == took[1]["forward_images"] - took[0]["forward_images"]
    most = [record.pop("cost")["predicted"]["most"]["forward_images"] for record in (both, one)]
    assert most[1] - most[0] == 50
    both["checks"] = [check for check in both["checks"] if check["id"] != "eps_matters"]
    assert both == one
    for column in np.load(tmp_path / "one" / one["samples"]).files:
        files = [np.load(out / one["samples"])[column] for out in runs.values()]
        assert np.array_equal(*files)


def test_a_run_says_it_on_a_terminal_only(tmp_path, capsys, monkeypatch):
    assert argv("--attack", "fgsm", "--out", tmp_path / "a") == 0
    assert "cost of" not in "".join(capsys.readouterr())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert argv("--attack", "fgsm", "--out", tmp_path / "b") == 0
    said = capsys.readouterr().err
    assert "at most   170 forward and 40 backward passes (if all survive)" in said, "so short a run is not timed"
    told = json.loads(next((tmp_path / "b" / "result").glob("*.json")).read_text())
    assert told["cost"]["predicted"]["seconds"] is None and told["perf"]["wall_s"] > 0


def test_a_long_run_is_timed_before(tmp_path):
    assert argv("--attack", "square-600", "--out", tmp_path) == 0
    seconds = json.loads(next((tmp_path / "result").glob("*.json")).read_text())["cost"]["predicted"]["seconds"]
    assert 0 < seconds["expected"] < seconds["most"]


def test_a_dry_run_of_a_protocol_is_over_all_sets(tmp_path, capsys):
    protocol = tmp_path / "two.yaml"
    protocol.write_text(
        "name: two\nabout: test\nn: 30\nparts: [digits, pets]\nattacks: {pgd-5: [2/255, 4/255], square-10: [4/255]}\n"
    )
    words = ["eval", "--protocol", protocol, "--root", tmp_path, "--model", "tiny-vit", "--batch-size", "10"]
    out = tmp_path / "run"
    assert main([*map(str, words), "--dry-run", "--out", str(out)]) == 3, "as the run itself would end"
    said = capsys.readouterr()
    assert (
        "cost of tiny-vit on two, 1 of 2 data sets: 3 evaluations, 90 images" in said.out and "NOT MEASURED" in said.err
    )
    most = 40 + 30 * (7 + 7 + 12)
    assert f"at most   {most:,} forward and {30 * 10:,} backward passes" in said.out and not out.exists()
    assert main([*map(str, words), "--out", str(out)]) == 3
    capsys.readouterr()
    next((out / "result").glob("*square*")).unlink()
    assert main([*map(str, words), "--dry-run", "--out", str(out)]) == 3
    said = capsys.readouterr().out
    assert "1 evaluation, 30 images" in said, "what is measured already costs nothing"
    assert main([*map(str, words), "--out", str(out)]) == main([*map(str, words), "--dry-run", "--out", str(out)]) == 3
    assert "nothing, there is no evaluation left" in capsys.readouterr().out


def test_other_costs():
    nothing = Cost(10, "saved", (("saved", Passes()),), 5, (1.0,), "")
    assert nothing.most == nothing.expected == Passes(25)
