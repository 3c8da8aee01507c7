"""The fused head: the same attack as through the whole model, only where the model promises it, and really run."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rvlm.attacks import pgd
from rvlm.attacks.objective import Objective


class Toy(nn.Module):
    """Pixels [B, 3, 4, 4] -> unit-norm embedding [B, 8] -> six logits."""

    fused_head = True

    def __init__(self, dtype=torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tower = nn.Parameter(torch.randn(48, 8, generator=generator, dtype=dtype))
        self.text = nn.Parameter(10 * torch.randn(8, 6, generator=generator, dtype=dtype))

    def embed(self, x):
        return F.normalize((x.flatten(1) - 0.5).tanh() @ self.tower, dim=1)

    def head(self):
        return self.text

    def forward(self, x):
        return self.embed(x) @ self.head() + 3.0


class Sharper(Toy):
    def forward(self, x):
        return super().forward(x) * 2


class Masked(Toy):
    def embed(self, x):
        return super().embed(x) * torch.tensor([1.0] * 7 + [0.0], dtype=x.dtype)


def test_the_head_is_made_once_per_attack(batch):
    calls = []

    class Counting(Toy):
        def head(self):
            calls.append(1)
            return super().head()

    pgd(Counting(), *batch, steps=5)
    assert len(calls) == 1


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 6, (6,), generator=generator)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("cls", [Toy, Masked])
def test_the_same_attack_as_through_the_whole_model(batch, loss, targeted, cls):
    model = cls()
    assert Objective(model, *batch, loss, targeted).fused
    settings = {"loss": loss, "targeted": targeted, "eps": 0.1, "return_info": True, "best": "adv"}
    fused = pgd(model, *batch, generator=torch.Generator().manual_seed(3), **settings)
    whole = pgd(lambda x: model(x), *batch, generator=torch.Generator().manual_seed(3), **settings)
    torch.testing.assert_close(fused.x_adv, whole.x_adv, rtol=0, atol=1e-12)
    torch.testing.assert_close(fused.loss, whole.loss, rtol=0, atol=1e-10)
    assert torch.equal(fused.success, whole.success) and torch.equal(fused.pred, whole.pred)
    assert (fused.forwards, fused.backwards) == (whole.forwards, whole.backwards)


def test_a_forward_of_its_own_is_a_promise_of_its_own(batch):
    hooked, patched = Toy(), Toy()
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    patched.forward = lambda x: Toy.forward(patched, x) * 2
    for model in (Sharper(), hooked, patched, torch.nn.Sequential(Toy()), lambda x: Toy()(x)):
        assert not Objective(model, *batch, "ce", False).fused
    assert not Objective(Toy(), *batch, lambda output, y: output.sum(1), False).fused


def test_a_hooked_model_is_attacked_as_it_is(batch):
    calls = []
    model = Toy()
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    pgd(model, *batch, steps=3)
    assert len(calls) == 3


def test_bad_labels_are_named(batch):
    with pytest.raises(ValueError, match=r"labels must lie in 0 \.\. 5"):
        pgd(Toy(), batch[0], torch.full((6,), 6))


def test_the_op_runs_and_the_head_leaves_no_graph(batch):
    x, y = batch
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        pgd(Toy(), x, y, steps=4)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["rvlm::attack_loss"] == 4 and not any("CrossEntropy" in key or "LogSoftmax" in key for key in counts)


def test_a_model_that_is_certain_still_shows_its_gradient():
    """In float32 the softmax of a saturated model is one-hot, and textbook cross-entropy forgets the label's logit."""

    class Certain(Toy):
        fused_head = True

        def embed(self, x):
            return x.flatten(1)[:, :2] - 0.5

        def head(self):
            return torch.tensor([[200.0, 0.0, 0.0], [0.0, 0.0, 200.0]])

        def forward(self, x):
            return self.embed(x) @ self.head()

    x = torch.full((1, 3, 4, 4), 0.5)
    x.view(-1)[:2] = torch.tensor([0.7, 0.4])
    model = Certain()
    _, fused = Objective(model, x, torch.tensor([0]), "ce", False).gradient(x)
    _, plain = Objective(lambda x: model(x), x, torch.tensor([0]), "ce", False).gradient(x)
    assert plain.view(-1)[0] == 0  # the pixel that carries the label
    assert fused.view(-1)[0] < 0 < fused.view(-1)[1]


@pytest.mark.slow
def test_a_clip_at_the_usual_logit_scale_is_broken_as_by_the_margin_loss():
    """Robust accuracy of digits-vit with CLIP's scale of 100; docs/decisions.md 18 quotes these figures."""
    from rvlm.data import load_data
    from rvlm.models import ZeroShotClassifier, load_clip

    data, clip = load_data("digits", "test"), load_clip("digits-vit")
    with torch.no_grad():
        clip.model.logit_scale.fill_(math.log(100))
    classifier = ZeroShotClassifier(clip, data.class_names, data.template).eval()
    x, y, _ = data.batch(slice(None))

    def robust(model, loss):
        generator = torch.Generator().manual_seed(0)
        found = pgd(model, x, y, eps=8 / 255, loss=loss, best="adv", generator=generator, return_info=True)
        return (~found.success).float().mean().item()

    ours, margin, torchs = robust(classifier, "ce"), robust(classifier, "margin"), robust(classifier.forward, "ce")
    print(f"robust at logit scale 100: ce {ours:.1%}, margin {margin:.1%}, torch's ce {torchs:.1%}")
    assert ours < torchs and abs(ours - margin) < 0.01  # five images; the model's own bits depend on threads
