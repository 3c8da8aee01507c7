"""SGA and Co-Attack against plain loops of the same steps, caption sets, and what they promise."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rvlm.attacks import SGA, CoAttack, caption_sets, coattack, sga
from rvlm.attacks.retrieval import Scales

from .test_contract import CALLERS, Counting, assert_same, state

ATTACKS = {"sga": sga, "coattack": coattack}


class Encoder(nn.Module):
    def __init__(self, model, unit=True):
        super().__init__()
        self.model, self.unit = model, unit

    def forward(self, x):
        return F.normalize(self.model(x), dim=-1) if self.unit else self.model(x)


@pytest.fixture
def scene(build, batch):
    """An encoder, images and three captions each, of which the last is missing in half of the sets."""
    x, _ = batch()
    encode = Encoder(build("vit"))
    captions = F.normalize(torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0), dtype=x.dtype), dim=-1)
    captions[::2, 2] = 0
    return encode, x, captions


def resized(v, scale):
    small = F.interpolate(v, scale_factor=scale, mode="bicubic", antialias=True).clamp(0, 1)
    return F.interpolate(small, (8, 8), mode="bicubic", antialias=True)


def by_hand(loss, x, eps, alpha, steps):
    x_adv = x.clone()
    for _ in range(steps):
        leaf = x_adv.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf), leaf)
        x_adv = (x + (x_adv + alpha * grad.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv


def test_sga_by_hand(scene):
    encode, x, captions = scene

    def loss(v):
        similar = [
            torch.einsum("bd, bkd -> bk", encode(u), captions) for u in (v, *(resized(v, s) for s in (0.5, 1.5)))
        ]
        return -sum(t.sum() for t in similar)

    expected = by_hand(loss, x, 4 / 255, 1 / 255, 5)
    found = sga(encode, x, captions, eps=4 / 255, steps=5, scales=(0.5, 1.5), noise=0.0, random_start=False)
    assert (found - expected).abs().max() < 1e-12
    alone = by_hand(lambda v: -torch.einsum("bd, bkd -> ", encode(v), captions), x, 4 / 255, 1 / 255, 5)
    assert (sga(encode, x, captions, eps=4 / 255, steps=5, scales=(), random_start=False) - alone).abs().max() < 1e-12


def test_coattack_by_hand(scene, build):
    _, x, captions = scene
    encode = Encoder(build("vit"), unit=False)
    clean = encode(x).detach()

    def loss(v):
        z = encode(v)
        total = F.kl_div(z.log_softmax(-1), clean.softmax(-1), reduction="sum")
        for b in range(len(x)):
            given = [t for t in captions[b] if t.any()]
            unit = F.normalize(z[b], dim=-1).log_softmax(-1)
            total = total + 3 * sum(F.kl_div(unit, t.softmax(-1), reduction="sum") for t in given) / len(given)
        return total

    expected = by_hand(loss, x, 4 / 255, 1.25 * 4 / 255 / 6, 6)
    found = coattack(encode, x, captions, eps=4 / 255, steps=6, random_start=False, return_info=True)
    assert (found.x_adv - expected).abs().max() < 1e-12
    torch.testing.assert_close(found.loss.sum(), loss(found.x_adv).detach())
    assert found.success is None


@pytest.mark.parametrize("name", ATTACKS)
def test_images_leave_their_captions(name, scene):
    encode, x, captions = scene
    captions[:, 0] = encode(x).detach()
    before = (encode(x) * captions[:, 0]).sum(1)
    x_adv = ATTACKS[name](encode, x, captions[:, 0], eps=16 / 255)
    assert ((encode(x_adv) * captions[:, 0]).sum(1) < before).all()
    assert (x_adv - x).abs().max() <= 16 / 255 + 1e-12
    others = captions[:, 0].roll(1, 0)
    near = sga(encode, x, others, eps=16 / 255, targeted=True)
    assert ((encode(near) * others).sum(1) > (encode(x) * others).sum(1)).all()


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("fail_at", [None, 1, 3])
@pytest.mark.parametrize("name", ATTACKS)
def test_no_trace(name, caller, fail_at, batch):
    x, _ = batch(torch.float32)
    model = Counting(fail_at)
    captions = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0))
    with CALLERS[caller]():
        before = state(model)
        try:
            x_adv = ATTACKS[name](model, x, captions, steps=3, generator=torch.Generator())
        except RuntimeError as error:
            assert str(error) == "the model broke" and model.seen == fail_at
        else:
            assert fail_at is None and not x_adv.requires_grad
        assert_same(before, state(model))


@pytest.mark.parametrize("name", ATTACKS)
def test_draws_depend_on_the_sample_alone(name, scene):
    encode, x, captions = scene
    together = ATTACKS[name](encode, x, captions, steps=3, generator=torch.Generator().manual_seed(0))
    again = ATTACKS[name](encode, x, captions, steps=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(together, again)
    alone = ATTACKS[name](
        encode,
        x[4:],
        captions[4:],
        steps=3,
        generator=torch.Generator().manual_seed(0),
        sample_ids=torch.tensor([4, 5]),
    )
    assert (alone - together[4:]).abs().max() < 1e-9
    eps = torch.tensor([0, 1, 2, 4, 8, 16], dtype=x.dtype) / 255
    assert ((ATTACKS[name](encode, x, captions, eps=eps) - x).abs().flatten(1).amax(1) <= eps + 1e-12).all()
    assert (ATTACKS[name](encode, x, captions, eps=0.5, norm="l2") - x).flatten(1).norm(dim=1).max() <= 0.5 + 1e-9


def test_classes(scene):
    encode, x, captions = scene
    attack = SGA(encode, scales=(), random_start=False, steps=2)
    assert torch.equal(attack(x, captions), sga(encode, x, captions, scales=(), random_start=False, steps=2))
    attack = CoAttack(encode, random_start=False, steps=2)
    assert torch.equal(attack(x, captions), coattack(encode, x, captions, random_start=False, steps=2))


def test_caption_sets():
    embeddings = torch.arange(1.0, 11.0).view(5, 2)
    sets = caption_sets(embeddings, torch.tensor([1, 0, 1, 2, 1]), 3)
    assert sets.shape == (3, 3, 2)
    assert torch.equal(sets[1], embeddings[[0, 2, 4]])
    assert torch.equal(sets[0, 0], embeddings[1]) and not sets[0, 1:].any()
    assert torch.equal(sets[2, 0], embeddings[3]) and not sets[2, 1:].any()


@pytest.mark.parametrize("images, count, message", [
    ([0, 1, 3], 3, "numbers in 0 .. 2"),
    ([0, -1, 1], 3, "numbers in 0 .. 2"),
    ([0, 2, 2], 3, "1 of 3 images have no caption, the first is 1"),
    ([0, 1], 2, "expected embeddings"),
])  # fmt: skip
def test_bad_sets(images, count, message):
    with pytest.raises(ValueError, match=message):
        caption_sets(torch.randn(3, 4), torch.tensor(images), count)


@pytest.mark.parametrize("attack", [sga, coattack])
@pytest.mark.parametrize("y, change, error, message", [
    (None, {}, TypeError, "embeddings of the captions"),
    (torch.zeros(6, dtype=torch.int64), {}, TypeError, "embeddings of the captions"),
    (torch.randn(5, 3, 5), {}, ValueError, r"captions must be embeddings \[6, K, D\]"),
    (torch.randn(6, 3, 4), {}, ValueError, r"the encoder must return embeddings \[6, 4\]"),
    (torch.randn(6, 5), dict(eps=4), ValueError, "did you mean"),
    (torch.randn(6, 5), dict(eps="4"), TypeError, "eps"),
    (torch.randn(6, 5), dict(bounds=(0.0, 0.1)), ValueError, "bounds"),
])  # fmt: skip
def test_bad_input(scene, attack, y, change, error, message):
    encode, x, _ = scene
    with pytest.raises(error, match=message):
        attack(encode, x, y, **change)


@pytest.mark.parametrize("change, message", [
    (dict(scales=(0.0,)), "scales must be"),
    (dict(scales=(1.0,) * 70), "at most 62"),
    (dict(noise=-1.0), "noise must be"),
])  # fmt: skip
def test_bad_scales(scene, change, message):
    encode, x, captions = scene
    with pytest.raises(ValueError, match=message):
        sga(encode, x, captions, **change)
    with pytest.raises(ValueError, match="weight must be"):
        coattack(encode, x, captions, weight=-1.0)
    with pytest.raises(ValueError, match="Scales: needs images"):
        sga(lambda v: v, x.flatten(1), x.flatten(1))
    assert Scales((), 0.05).draws is False
