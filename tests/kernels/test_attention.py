"""The kernels of the anchor's joint: guarded outputs, parts of the batch, mutations that must be noticed."""

import pytest
import torch

from rvlm.kernels import attention
from rvlm.ops import attention as attention_ops

from .conftest import assert_guarded, guarded


@pytest.fixture
def streams(device):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 3, 37)] * 4 + [(3, 37), (2,), (37,), (37,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]


def check(streams, module=attention):
    x0, o, of_x1, of_y, anchor, mix, weight, bias = streams
    expected = attention_ops._forward(x0, o, anchor, mix, weight, bias, 1e-3)
    out = [guarded(t) for t in expected]
    module.anchored_residual(*out, x0, o, anchor, mix, weight, bias, 1e-3)
    for got, wanted in zip(out, expected, strict=True):
        assert_guarded(got)
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    x1, _, mean, rstd = expected
    arguments = (of_x1, of_y, x1, o, mean, rstd, weight)
    wanted_g, total, of_o, d_weight, d_bias = attention_ops._backward(*arguments, True, True)
    parts = module.part_count(7, 3)
    g, *sums = (
        guarded(x1.new_empty(s)) for s in ((7, 3, 37), (parts, 3, 37), (parts, 3), (parts, 3, 37), (parts, 3, 37))
    )
    module.anchored_residual_backward(g, *sums, *arguments)
    for t in (g, *sums):
        assert_guarded(t)
    got = (g, sums[0].sum(0), sums[1].sum().view(1), sums[2].sum((0, 1)), sums[3].sum((0, 1)))
    for ours, theirs in zip(got, (wanted_g, total, of_o, d_weight, d_bias), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_parts_of_the_batch(streams, monkeypatch, parts):
    monkeypatch.setattr(attention, "part_count", lambda batch, tokens: parts)
    check(streams)


MUTATIONS = {
    "anchor of another token": ("row % tokens * width", "0 * width"),
    "factors exchanged": ("tl.load(mix_ptr) * o", "tl.load(mix_ptr + 1) * o"),
    "padding in the variance": ("tl.where(inside, x1 - mean, 0.0)", "x1 - mean"),
    "eps outside the root": ("/ width + EPS)", "/ width) + EPS"),
    "mean not taken off": ("(s - tl.sum(s, axis=0) / width - z", "(s - z"),
    "slope not taken off": (" - z * (tl.sum(s * z, axis=0) / width))", ")"),
    "weight left out": ("s = of_y * weight", "s = of_y"),
    "total of the last sample": ("total += g", "total = g"),
    "stream's own gradient lost": ("g = of_x1 + rstd", "g = rstd"),
    "sum with the wrong stream": ("tl.where(inside, g * o, 0.0)", "tl.where(inside, g * x1, 0.0)"),
    "half of the batch": ("b += parts", "b += 2 * parts"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_is_noticed(streams, mutant, monkeypatch, name):
    module = mutant(*MUTATIONS[name], "attention")
    monkeypatch.setattr(module, "part_count", lambda batch, tokens: 2)
    with pytest.raises(AssertionError):
        check(streams, module)
