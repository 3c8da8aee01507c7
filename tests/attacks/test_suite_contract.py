"""What every attack promises, asked of all of them: no trace, any caller, layouts, radii per sample, the generator."""

import functools
import warnings

import pytest
import torch
from torch import nn

from rvlm.attacks import AttackWarning, apgd, autoattack, cw, deepfool, fab, fgsm, fmn, mifgsm, pgd, square

from .test_contract import CALLERS, Counting, assert_same, state

part = functools.partial
SUITE = {
    "fgsm": fgsm,
    "pgd": part(pgd, steps=4),
    "pgd-compact": part(pgd, steps=4, best="adv", early_stop="compact"),
    "apgd-ce": part(apgd, steps=4),
    "apgd-compact": part(apgd, steps=6, early_stop="compact"),
    "apgd-slots": part(apgd, steps=6, early_stop="compact", slots=4),
    "apgd-t": part(apgd, steps=3, loss="dlr-targeted", targets=2),
    "apgd-eot": part(apgd, steps=3, eot=2),
    "fab": part(fab, steps=3, aimed=False),
    "fab-t": part(fab, steps=3, targets=2),
    "fab-compact": part(fab, steps=3, targets=2, early_stop="compact"),
    "fab-slots": part(fab, steps=3, aimed=False, early_stop="compact", slots=2),
    "fmn": part(fmn, steps=4),
    "cw": part(cw, steps=4, rounds=2, norm="linf"),
    "deepfool": part(deepfool, steps=3, norm="linf"),
    "square": part(square, queries=6),
    "square-slots": part(square, queries=6, slots=4),
    "mifgsm": part(mifgsm, steps=2, transforms=["vmi", "ni", "si", "di", "ti"]),
    "autoattack": part(autoattack, version="custom", attacks=["apgd-ce-3", "fab-t-2", "square-3"]),
}
NO_GENERATOR = {"fmn", "cw", "deepfool"}
DRAWS_NOTHING = {"fgsm", "fab", "fab-t", "fab-compact", "fab-slots", *NO_GENERATOR}


def drawn(name):
    return {} if name in NO_GENERATOR else {"generator": torch.Generator().manual_seed(0)}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("fail_at", [None, 1, 3])
@pytest.mark.parametrize("name", SUITE)
def test_no_trace(name, caller, fail_at, batch):
    x, y = batch(torch.float32)
    model = Counting(fail_at)
    with CALLERS[caller]():
        before, kept = state(model), (x.clone(), y.clone())
        try:
            x_adv = SUITE[name](model, x, y, **drawn(name))
        except RuntimeError as error:
            assert str(error) == "the model broke" and model.seen == fail_at
        else:
            assert fail_at is None or model.seen < fail_at
            assert not x_adv.requires_grad and x_adv.grad_fn is None and x_adv.dtype == x.dtype
        assert_same(before, state(model))
        assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])


@pytest.mark.parametrize("name", SUITE)
def test_one_draw_or_none(name, build, batch):
    (x, y), model = batch(), build()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    torch.randint(-(2**63), 2**63 - 1, ())
    one_draw = torch.get_rng_state()
    torch.manual_seed(5)
    SUITE[name](model, x, y)
    assert torch.equal(torch.get_rng_state(), before if name in DRAWS_NOTHING else one_draw)
    torch.manual_seed(5)
    with pytest.raises(ValueError, match="labels"):
        SUITE[name](model, x, y + 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
@pytest.mark.parametrize("name", SUITE)
def test_layouts(name, layout, build, batch):
    x, y = batch()
    y = build()(x).argmax(1)
    if layout == "expanded":
        x, y = x[:1].repeat(6, 1, 1, 1), y[:1].repeat(6)
        given = x[:1].expand(6, -1, -1, -1)
    elif layout == "channels_last":
        given = x.contiguous(memory_format=torch.channels_last)
    else:
        given = x.transpose(2, 3).contiguous().transpose(2, 3)
    expected = SUITE[name](build(), x, y, **drawn(name))
    result = SUITE[name](build(), given, y, **drawn(name))
    assert (result - expected).abs().max() < 1e-9
    if layout == "channels_last":
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", SUITE)
def test_radii_per_sample(name, build, batch):
    model, (x, _) = build("mlp"), batch()
    y = model(x).argmax(1)
    eps = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64) / 255
    ids = {"sample_ids": torch.arange(6)}
    together = SUITE[name](model, x, y, eps=eps, **drawn(name), **ids)
    assert ((together - x).abs().flatten(1).amax(1) <= eps + 1e-12).all()
    for k in (1, 4):
        one = {"sample_ids": torch.tensor([k])}
        alone = SUITE[name](model, x[k : k + 1], y[k : k + 1], eps=eps[k].item(), **drawn(name), **one)
        assert (alone - together[k : k + 1]).abs().max() < 1e-9


@pytest.mark.parametrize("name", SUITE)
def test_one_image_and_none(name, build, batch):
    model, (x, y) = build("mlp"), batch()
    assert SUITE[name](model, x[:1], y[:1], **drawn(name)).shape == x[:1].shape
    with pytest.warns(AttackWarning, match="empty batch"):
        assert SUITE[name](model, x[:0], y[:0]).shape == x[:0].shape


@pytest.mark.parametrize("name", SUITE)
def test_logits_that_are_nan_spoil_their_sample_alone(name, build, batch):
    model, (x, _) = build("mlp"), batch()
    y = model(x).argmax(1)
    expected = SUITE[name](model, x, y, **drawn(name))

    class Broken(nn.Module):
        def forward(self, v):
            near = (v - x[2]).flatten(1).norm(dim=1) < 1
            return torch.where(near[:, None], torch.nan, model(v))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        found = SUITE[name](Broken(), x, y, **drawn(name))
    assert found.isfinite().all()
    others = [0, 1, 3, 4, 5]
    assert (found[others] - expected[others]).abs().max() < 1e-9
