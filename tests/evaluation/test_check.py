"""The report card: each mistake has a toy model that makes it, and only its line fails."""

import pytest
import torch
from torch import nn

from rvlm.evaluation import check


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(32, 3, 8, 8, generator=generator)
    return x, (x[:, 0].mean((1, 2)) > x[:, 1].mean((1, 2))).long()


class Good(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        z = self.scale * (x[:, 0].mean((1, 2)) - x[:, 1].mean((1, 2)))
        return torch.stack([-z, z], 1)


class WrongRange(Good):
    """Expects normalised pixels: on [0, 1] it always answers the same."""

    def forward(self, x):
        out = super().forward(x)
        return out if x.min() < -0.5 else out * 0 + torch.tensor([1.0, 0.0]) + 1e-6 * out


class Train(Good):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.0)
        self.train()


class Random(Good):
    def forward(self, x):
        return super().forward(x) + 0.1 * torch.randn(len(x), 2)


class BatchDependent(Good):
    def forward(self, x):
        return super().forward(x) - super().forward(x).mean(0)


def turned(x):
    """x, with the sign of its gradient turned around."""
    return 2 * x.detach() - x


def on_grid(x):
    return ((255 * x - (255 * x).round()).abs().flatten(1).amax(1) < 1e-3).view(-1, 1, 1, 1)


class Downhill(Good):
    """Every gradient points the wrong way."""

    def forward(self, x):
        return super().forward(turned(x))


class HonestOnTheGrid(Good):
    """The gradient is right at images that were stored as uint8, and wrong at whatever an attack makes of them."""

    def forward(self, x):
        return super().forward(torch.where(on_grid(x), x, turned(x)))


class Far(Good):
    """Right whatever happens, by a memory of the data that no attack can reach through the gradient."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def forward(self, x):
        near = (x[:, None] - self.x).flatten(2).norm(dim=2).argmin(1)
        return super().forward(x) * 0.01 + nn.functional.one_hot(self.y[near], 2)


def card(model, batch):
    return {finding.id: finding for finding in check(model, *batch)}


MISTAKES = {
    "value_range": WrongRange().eval(),
    "eval_mode": Train(),
    "determinism": Random().eval(),
    "per_sample": BatchDependent().eval(),
    "logits": lambda x: Good()(x).softmax(1),
    "saturation": lambda x: 1e5 * Good()(x),
    "gradient": lambda x: Good()(x.detach()) + 0 * Good().scale,
    "output": lambda x: Good()(x)[:, 0],
}


def test_a_good_model_passes_everything(batch):
    findings = card(Good().eval(), batch)
    assert all(f.ok for f in findings.values()), findings
    assert set(findings) == set(MISTAKES) | {"loss_rises", "many_steps", "black_box", "eps_sweep"}


def test_a_masked_class_is_no_mistake(batch):
    findings = card(lambda x: torch.cat([Good().eval()(x), torch.full((len(x), 1), -torch.inf)], 1), batch)
    assert all(f.ok for f in findings.values()), findings


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_found(batch, mistake):
    findings = card(MISTAKES[mistake], batch)
    assert not findings[mistake].ok
    others = {id for id, f in findings.items() if not f.ok} - {mistake}
    assert others <= ({"per_sample"} if mistake == "determinism" else set()), others


def test_attacks_that_fail_are_found(batch):
    x, y = (255 * batch[0]).round() / 255, batch[1]
    downhill = card(Downhill().eval(), (x, y))
    for id in ("loss_rises", "black_box", "eps_sweep"):
        assert not downhill[id].ok, id
    assert "does not point uphill" in downhill["loss_rises"].message
    honest = card(HonestOnTheGrid().eval(), (x, y))
    assert not honest["many_steps"].ok and "clean image alone" in honest["many_steps"].message
    far = card(Far(x, y).eval(), (x, y))
    assert not far["eps_sweep"].ok
    assert "loss_rises" not in {f.id for f in check(Good().eval(), x, y, attacks=False)}


@pytest.mark.parametrize("model, word", [
    (lambda x: Good()(x).detach(), "carries no gradient"),
    (lambda x: Good()((x * 4).round() / 4), "exactly zero"),
    (lambda x: Good()(x) + 0 * (x - x).pow(0.5).sum((1, 2, 3))[:, None], "NaN"),
])  # fmt: skip
def test_gradients(batch, model, word):
    finding = card(model, batch)["gradient"]
    assert not finding.ok and word in finding.message


def test_the_model_is_left_alone(batch):
    model = Train()
    check(model, *batch)
    assert model.training and model.drop.training and model.scale.requires_grad and model.scale.grad is None
