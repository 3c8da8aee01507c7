"""Evaluations beside each other: every sign is triggered by a model or an attack with the fault, and by no other."""

import json

import pytest
import torch
from torch import nn

from rvlm import cli
from rvlm.data.base import Data
from rvlm.evaluation import both_targets, evaluate, over_radii

GAPS = torch.tensor([-40, -20, -9, -7, -3, 3, 7, 9, 20, 40])


class Channel(nn.Module):
    """Two classes by the mean of one colour."""

    def __init__(self, channel=0, threshold=127.5, hidden=False):
        super().__init__()
        self.channel, self.threshold, self.hidden = channel, threshold / 255, hidden

    def forward(self, x):
        z = 20 * (x[:, self.channel].flatten(1).mean(1) - self.threshold)
        # Hidden: the sign, with a gradient that points the wrong way.
        z = z.sign().detach() - 1e-3 * (z - z.detach()) if self.hidden else z
        return torch.stack([-z, z], 1)


@pytest.fixture
def data():
    pixels = (128 + GAPS).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 6, 6)
    return Data("toy", "test", ["dark", "bright"], (GAPS > 0).long(), torch.arange(10), lambda i: pixels[i], n_total=10)


def of(data, model, source=None, attack="pgd-10", eps="12/255"):
    return evaluate(model, data, attack=attack, eps=eps, source=source, progress=False)


def failed(checks):
    return [check["id"] for check in checks if not check["ok"]]


def test_images_of_another_model_are_no_measure_of_robustness(data):
    red, green = Channel(0), Channel(1)
    own, moved = of(data, red), of(data, red, green)
    assert (own.robust, moved.robust) == (0.4, 1.0)
    checks = both_targets(own, moved)
    assert failed(checks) == ["robust_beyond_transfer"]
    assert "40.0% white-box, 100.0% on images of the undefended model" in checks[0]["detail"]
    assert "quote the white-box figure" in checks[0]["detail"]
    assert failed(both_targets(own, own)) == []


def test_gradients_that_mislead(data):
    hidden = Channel(hidden=True)
    own, moved = of(data, hidden), of(data, hidden, Channel())
    assert own.robust == 1.0 and moved.robust == 0.4
    assert failed(both_targets(own, moved)) == ["white_box_is_strongest"]


@pytest.mark.parametrize("attack, stuck", [("cw-9", True), ("pgd-10", False)])
def test_an_attack_that_does_not_use_the_radius(data, attack, stuck):
    """Smallest changes for a model that turns at another brightness fool only the samples from one side of it."""
    target, source = Channel(threshold=125.5), Channel()
    small, large = (of(data, target, source, attack, eps) for eps in ("10/255", "19/255"))
    assert small.robust == large.robust or not stuck
    assert failed(over_radii([small, large])) == failed(over_radii([large, small])) == ["eps_matters"] * stuck
    assert over_radii([small]) == over_radii([small, small]) == []


def test_robust_models_and_broken_ones_give_no_alarm(data):
    for threshold, radii in ((127.5, ("1/255", "2/255")), (127.5, ("60/255", "90/255"))):
        found = [of(data, Channel(threshold=threshold), eps=eps) for eps in radii]
        assert found[0].robust == found[1].robust and failed(over_radii(found)) == []


def test_the_command_notes_it(tmp_path):
    (tmp_path / "models.py").write_text(
        "import torch\n"
        "def target(x):\n    return scores(x, 0.62)\n"
        "def source(x):\n    return scores(x, 0.5)\n"
        "def scores(x, first):\n"
        "    z = torch.zeros(len(x), 10, device=x.device)\n"
        "    mean = x.flatten(1).mean(1) * 3\n"
        "    return z + torch.stack([(mean - first) * 9] + [(first - mean) * 9] + [mean * 0 - 99.0] * 8, 1)\n"
    )
    flags = ["--model", f"{tmp_path}/models.py:target", "--source", f"{tmp_path}/models.py:source", "--limit", "60"]
    flags += ["--attack", "cw-9", "--eps", "64/255,96/255", "--out", str(tmp_path / "run")]
    assert cli.main(["eval", *flags]) == 0
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    ids = [
        [check["id"] for check in json.loads((tmp_path / "run" / row["record"]).read_text())["checks"]] for row in rows
    ]
    assert ["eps_matters" in there for there in ids] == [False, True], "the second radius has something to compare with"
