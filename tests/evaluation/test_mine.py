"""Somebody's own PGD: each mistake is found, and only it; times and passes are those of both sides."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rvlm.evaluation.mine import compare


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1), nn.Flatten())
        self.head = nn.Linear(54, 5)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def case():
    model = Small().eval()
    x = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % 5
    return model, x, y


def good(model, x, y, eps, alpha, steps, up=1, whole=None):
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = x_adv.detach() + up * alpha * grad.sign()
        x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)
    for m, flag in training:
        m.training = flag
    return x_adv


def like(**changes):
    """good with one thing done wrong afterwards or inside."""

    def attack(model, x, y, eps, alpha, steps):
        result = good(model, x, y, changes.get("scale", 1) * eps, alpha, steps, changes.get("up", 1))
        after = changes.get("after")
        changed = after(model, x, y, result) if after else None
        return result if changed is None else changed

    return attack


def backward(model, x, y, result):
    F.cross_entropy(model(result), y).backward()


def trains(model, x, y, result):
    with torch.no_grad():
        model.head.weight.add_(0.001)


def whole_train(model, x, y, result):
    if model.training:
        model.train()


def frozen(model, x, y, result):
    for p in model.parameters():
        p.requires_grad_(False)


def learns_statistics(model, x, y, result):
    model.body[1].running_mean.add_(0.01)


BROKEN = {
    "detached": lambda *args, eps, alpha, steps: good(*args, eps, alpha, steps).requires_grad_(),
    "ball": like(scale=1.5),
    "box": like(after=lambda model, x, y, result: result - 1e-5 * (result == 0)),
    "inputs": like(after=lambda model, x, y, result: x.copy_(result) * 1),
    "parameters": like(after=trains),
    "buffers": like(after=learns_statistics),
    "grad": like(after=backward),
    "requires_grad": like(after=frozen),
    "modes": like(after=whole_train),
    "strength": like(up=-1),
}


def failed(found):
    return [finding.id for finding in found.findings if not finding.ok]


def test_nothing_is_wrong_with_a_good_one(case):
    model, x, y = case
    before = [p.clone() for p in (*model.parameters(), *model.buffers())]
    found = compare(good, model, x, y, eps=16 / 255, steps=5, rounds=4)
    assert found.ok and len(found.findings) == 11 and found.passed == ["eps", "alpha", "steps"]
    assert found.samples == 37 and found.forwards == found.forwards_of_ours == 5 * 37
    assert found.seconds > 0 and found.ratio_min <= found.ratio <= found.ratio_max
    assert abs(found.fooled - found.fooled_by_ours) <= 2 and 3 < found.fooled < 34, "a radius that tells them apart"
    assert all(torch.equal(a, b) for a, b in zip(before, (*model.parameters(), *model.buffers()), strict=True))


@pytest.mark.parametrize("id", BROKEN)
def test_each_mistake_is_found_alone(case, id):
    model, x, y = case
    state = [p.clone() for p in (*model.parameters(), *model.buffers())]
    flags = [(m.training) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    found = compare(BROKEN[id], model, x, y, eps=16 / 255, alpha=4 / 255, steps=5, rounds=1)
    assert failed(found) == [id]
    assert all(torch.equal(a, b) for a, b in zip(state, (*model.parameters(), *model.buffers()), strict=True))
    assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert all(p.grad is None for p in model.parameters())


def test_perturbations_and_other_results(case):
    model, x, y = case
    delta = like(after=lambda model, x, y, result: result - x)
    found = compare(delta, model, x, y, eps=16 / 255, steps=2, rounds=1)
    assert "ball" in failed(found) and "return x + delta" in next(f.message for f in found.findings if f.id == "ball")
    with pytest.raises(ValueError, match=r"expected images \[37, 3, 8, 8\].*returned NoneType"):
        compare(lambda *args: None, model, x, y, eps=0.1)
    with pytest.raises(ValueError, match="returned \\[37\\]"):
        compare(lambda model, x, y: y.float(), model, x, y, eps=0.1)
    with pytest.raises(ValueError, match="nothing to attack"):
        compare(good, model, x, (model(x).argmax(1) + 1) % 5, eps=0.1)


def test_other_norms_names_and_callables(case):
    model, x, y = case

    def l2(model, x, y, epsilon, n_iter):
        x_adv = x.clone()
        for _ in range(n_iter):
            x_adv.requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
            delta = x_adv.detach() + grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * epsilon - x
            length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            x_adv = (x + delta * (epsilon / length).clamp(max=1)).clamp(0, 1)
        return x_adv

    found = compare(l2, model, x, y, eps=0.8, alpha=0.8, steps=3, norm="l2", rounds=1)
    assert found.ok and found.passed == ["eps", "steps"] and found.at_eps == 0.8
    found = compare(l2, lambda v: model(v), x, y, eps=0.8, alpha=0.8, steps=3, norm="l2", rounds=1)
    assert found.ok and found.forwards == 0
