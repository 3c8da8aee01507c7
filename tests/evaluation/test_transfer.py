"""The transfer matrix on models whose robustness is known."""

import pytest
import torch
from torch import nn

from rvlm.data.base import Data
from rvlm.evaluation import evaluate, transfer_matrix


class Channel(nn.Module):
    """Two classes by the mean of one colour: blind to what is done to the others."""

    def __init__(self, channel):
        super().__init__()
        self.channel = channel

    def forward(self, x):
        z = 20 * (x[:, self.channel].flatten(1).mean(1) - 127.5 / 255)
        return torch.stack([-z, z], 1)


GAPS = torch.tensor([-40, -20, -9, -7, -3, 3, 7, 9, 20, 40])


@pytest.fixture
def data():
    pixels = (128 + GAPS).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 6, 6)
    y = (GAPS > 0).long()
    y[0] = 1  # wrong when clean
    return Data("toy", "test", ["dark", "bright"], y, torch.arange(10), lambda i: pixels[i], n_total=10)


MODELS = {"red": Channel(0), "green": Channel(1)}


@pytest.mark.parametrize("attack", ["pgd-10", "fgsm", "apgd-ce-10", "pgd-10,apgd-ce-5"])
def test_only_the_own_images_fool(data, attack):
    found = transfer_matrix(MODELS, MODELS, data, attack=attack, batch_size=4, progress=False)
    assert found.clean.tolist() == [0.9, 0.9] and found.robust.shape == (2, 2)
    assert found.robust.tolist() == [[0.5, 0.9], [0.9, 0.5]]
    assert found.correct[0, 1].tolist() == [False] + [True] * 9
    assert found.markdown().splitlines()[-1] == "| green | 90.0 | 50.0 |"


def test_cells_are_what_evaluate_says_of_transfer(data):
    torch.manual_seed(0)
    nets = {k: nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.Tanh(), nn.Linear(8, 2)).eval() for k in "ab"}
    found = transfer_matrix(nets, nets, data, attack="pgd-10", eps="24/255", progress=False)
    one = evaluate(nets["b"], data, source=nets["a"], attack="pgd-10", eps="24/255", progress=False)
    assert found.robust[0, 1] == pytest.approx(one.robust) and found.clean[1] == pytest.approx(one.clean)


def test_models_are_left_alone_and_bad_input(data):
    MODELS["red"].train()
    transfer_matrix(MODELS, {"green": MODELS["green"]}, data, attack="fgsm", progress=False)
    assert MODELS["red"].training
    with pytest.raises(ValueError, match="0 sources"):
        transfer_matrix({}, MODELS, data)
    with pytest.raises(ValueError, match="unknown attack"):
        transfer_matrix(MODELS, MODELS, data, attack="pdg-10")


def test_gradients_that_mislead_are_named(data):
    class Misled(Channel):
        """The same decision with a gradient that points the other way."""

        def forward(self, x):
            z = super().forward(x)
            return z.detach() - (z - z.detach())

    models = {"red": Channel(0), "misled": Misled(0)}
    found = transfer_matrix(models, models, data, progress=False)
    assert found.robust[0, 1] < found.robust[1, 1]
    (check,) = found.checks
    assert not check["ok"] and check["detail"] == "misled by images of red (50.0%, by its own 90.0%)"
    assert transfer_matrix(MODELS, MODELS, data, progress=False).checks[0]["ok"]
