"""Anchors and prefixes: every backend against float64 autograd and the textbook formulas, identities, bad input."""

import pytest
import torch
from torch.nn import functional as F

from rvlm import ops
from rvlm.ops.attention import MIXES


def plain(x0, o, anchor, alpha, mix, weight, bias, eps=1e-5):
    """The lines that a hook would write, in the dtype of x0."""
    joined = {
        "add": lambda: o + alpha * anchor,
        "lerp": lambda: (1 - alpha) * o + alpha * anchor,
        "normadd": lambda: (o + alpha * anchor) / (1 + alpha),
    }[mix]()
    x1 = x0 + joined
    return x1, F.layer_norm(x1, x1.shape[-1:], weight, bias, eps)


def tensors(device, shape=(3, 5, 24), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    batch, tokens, width = shape
    shapes = (shape, shape, (tokens, width), (), (width,), (width,))
    made = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    made[3] = made[3].abs() + 0.2
    return [t.to(device).requires_grad_() for t in made]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shape", [(3, 5, 24), (1, 1, 3), (20, 2, 100), (2, 50, 768)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(backend, device, mix, shape, dtype):
    x0, o, anchor, alpha, weight, bias = inputs = tensors(device, shape, dtype)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = plain(*wide[:4], mix, *wide[4:])
    got = ops.anchored_residual(x0, o, anchor, alpha, mix, weight, bias)
    slopes = [torch.sin(torch.arange(t.numel(), device=device)).view_as(t).to(dtype) for t in got]
    gradients = torch.autograd.grad(got, inputs, slopes)
    wanted = torch.autograd.grad(expected, wide, [s.double() for s in slopes])
    for ours, truth in zip((*got, *gradients), (*expected, *wanted), strict=True):
        error = (ours.double() - truth).norm() / truth.norm().clamp(min=1e-6)
        assert ours.shape == truth.shape and error < (1e-5 if dtype == torch.float32 else 1e-11), error


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
def test_gradcheck(backend, device, mix):
    inputs = tensors(device, (2, 3, 4))
    assert torch.autograd.gradcheck(lambda *t: ops.anchored_residual(*t[:4], mix, *t[4:]), inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (5,), (0, 2)])
def test_each_gradient_alone(backend, device, wanted):
    inputs = [t.detach() for t in tensors(device)]
    for k in wanted:
        inputs[k].requires_grad_()
    got = ops.anchored_residual(*inputs[:4], "lerp", *inputs[4:])
    expected = plain(*inputs[:4], "lerp", *inputs[4:])
    leaves = [inputs[k] for k in wanted]
    gradients = (torch.autograd.grad(sum(t.sin().sum() for t in pair), leaves) for pair in (got, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_one_output_may_go_unused(backend, device):
    inputs = tensors(device)
    for used in (0, 1):
        got = ops.anchored_residual(*inputs[:4], "add", *inputs[4:])[used]
        expected = plain(*inputs[:4], "add", *inputs[4:])[used]
        ours, theirs = (torch.autograd.grad(t.sin().sum(), inputs[:3]) for t in (got, expected))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mix", MIXES)
def test_without_strength_it_is_the_block_as_it_was(backend, device, mix):
    x0, o, anchor, _, weight, bias = (t.detach() for t in tensors(device, dtype=torch.float32))
    x1, y = ops.anchored_residual(x0, o, anchor, 0.0, mix, weight, bias)
    assert torch.equal(x1, x0 + o)
    torch.testing.assert_close(y, F.layer_norm(x0 + o, (24,), weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_streams(backend, device, dtype):
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates when it casts to bfloat16")
    x0, o, anchor, alpha, weight, bias = tensors(device, dtype=torch.float32)
    x0, o = (t.detach().to(dtype).requires_grad_() for t in (x0, o))
    x1, y = ops.anchored_residual(x0, o, anchor, alpha, "add", weight, bias)
    assert x1.dtype == y.dtype == dtype
    expected = plain(
        x0.double(), o.double(), *(t.double() for t in (anchor, alpha)), "add", weight.double(), bias.double()
    )
    gradients = torch.autograd.grad(y.float().sin().sum(), (x0, anchor, alpha))
    wanted = torch.autograd.grad(expected[1].sin().sum(), (x0, anchor, alpha))
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
    for ours, truth in zip((x1, y, *gradients), (*expected, *wanted), strict=True):
        error = (ours.double() - truth.double()).norm() / truth.double().norm()
        assert error < 4 * torch.finfo(dtype).eps, error


def test_layouts_and_an_empty_batch(backend, device):
    x0, o, anchor, _, weight, bias = (t.detach() for t in tensors(device))
    expected = ops.anchored_residual(x0, o, anchor, 0.5, "add", weight, bias)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x0, o)]
    for a, b in zip(ops.anchored_residual(*turned, anchor, 0.5, "add", weight, bias), expected, strict=True):
        assert torch.equal(a, b)
    none = x0[:0].clone().requires_grad_()
    leaf = anchor.clone().requires_grad_()
    x1, y = ops.anchored_residual(none, o[:0], leaf, 0.5, "add", weight, bias)
    assert x1.shape == y.shape == (0, 5, 24)
    assert not torch.autograd.grad(y.sum(), leaf)[0].any()


def test_functional_gradients(backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip(
            "forced onto the interpreter, an op is called past the dispatcher, which unwraps functorch's tensors"
        )
    inputs = [t.detach() for t in tensors(device)]

    def loss(*inputs):
        return sum(t.sin().sum() for t in ops.anchored_residual(*inputs[:4], "lerp", *inputs[4:]))

    got = torch.func.grad(loss, argnums=tuple(range(6)))(*inputs)
    leaves = [t.requires_grad_() for t in inputs]
    for ours, theirs in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_second_derivative_is_an_error_that_helps(device):
    inputs = tensors(device)
    x1, y = ops.anchored_residual(*inputs[:4], "add", *inputs[4:])
    slopes = torch.autograd.grad(y.sin().sum(), inputs[:3], create_graph=True)
    for slope in slopes:
        with pytest.raises(RuntimeError, match=r"anchored_residual is differentiable once"):
            torch.autograd.grad(slope.square().sum(), inputs[0], retain_graph=True)
    with ops.use_backend("reference"):
        few = tensors(device, (2, 2, 3))
        assert torch.autograd.gradgradcheck(lambda *t: ops.anchored_residual(*t[:4], "lerp", *t[4:])[1], few)


@pytest.mark.parametrize("change, error, message", [
    ({"mix": "mul"}, ValueError, "'add', 'lerp', 'normadd', got 'mul'"),
    ({"x0": torch.zeros(5, 24)}, TypeError, r"stream \[B, N, D\]"),
    ({"o": torch.zeros(3, 5, 23)}, ValueError, "o must be like x0"),
    ({"o": torch.zeros(3, 5, 24, device="meta")}, ValueError, "o must be like x0, .* on cpu, got .* on meta"),
    ({"anchor": torch.zeros(4, 24)}, ValueError, r"anchor must be \[5, 24\] on cpu, got \[4, 24\]"),
    ({"alpha": torch.zeros(2)}, ValueError, "alpha must be a float or one element"),
    ({"ln_bias": torch.zeros(3)}, ValueError, r"ln_bias must be \[24\]"),
])  # fmt: skip
def test_bad_input(change, error, message):
    stream = torch.zeros(3, 5, 24)
    good = {"x0": stream, "o": stream, "anchor": stream[0], "alpha": 1.0, "mix": "add"}
    good |= {"ln_weight": torch.ones(24), "ln_bias": torch.zeros(24)}
    with pytest.raises(error, match=message):
        ops.anchored_residual(**good | change)


SIZES = [(2, 3, 5, 4), (1, 2, 50, 16), (2, 1, 197, 8), (1, 1, 257, 8), (1, 1, 577, 4), (3, 2, 1, 2)]


def heads(device, shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).to(device).requires_grad_() for _ in range(3)]


def weights_of(q, k):
    return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("site", ["map", "heads"])
@pytest.mark.parametrize("mix", ["add", "lerp"])
def test_anchored_attention_is_its_formula(device, shape, site, mix):
    q, k, v = heads(device, shape)
    _, h, n, d = shape
    anchor = torch.rand(h, n, n if site == "map" else d, dtype=torch.float64, device=device).requires_grad_()
    alpha = torch.tensor(0.3, dtype=torch.float64, device=device).requires_grad_()
    inputs = (q, k, v, anchor, alpha)
    share = 1 - alpha if mix == "lerp" else 1
    if site == "map":
        expected = (share * weights_of(q, k) + alpha * anchor) @ v
    else:
        expected = share * (weights_of(q, k) @ v) + alpha * anchor
    got = ops.anchored_attention(q, k, v, anchor, alpha, site, mix)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    slope = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, slope), torch.autograd.grad(expected, inputs, slope), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("site", ["map", "heads"])
def test_an_anchor_without_strength_and_one_that_replaces(device, site):
    q, k, v = (t.detach() for t in heads(device, (2, 2, 6, 4)))
    live = F.scaled_dot_product_attention(q, k, v)
    anchor = torch.rand(2, 6, 6 if site == "map" else 4, dtype=torch.float64, device=device)
    for mix in ("add", "lerp"):
        torch.testing.assert_close(ops.anchored_attention(q, k, v, anchor, 0.0, site, mix), live)
    only = ops.anchored_attention(q, k, v, anchor, 1.0, site, "lerp")
    torch.testing.assert_close(only, anchor @ v if site == "map" else anchor.expand(2, -1, -1, -1))


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_prefix_attention_is_token_concatenation(device, shape, prefix, causal):
    q, k, v = heads(device, shape)
    batch, h, n, d = shape
    more = [torch.randn(h, prefix, d, dtype=torch.float64, device=device).requires_grad_() for _ in range(3)]
    tokens = [torch.cat([p.expand(batch, -1, -1, -1), t], 2) for t, p in zip((q, k, v), more, strict=True)]
    unseen = torch.full((prefix + n,) * 2, -torch.inf, dtype=torch.float64, device=device).triu(1) if causal else 0
    scores = tokens[0] @ tokens[1].transpose(-2, -1) / d**0.5 + unseen
    expected = (scores.softmax(-1) @ tokens[2])[:, :, prefix:]  # what the prompts' own rows give is thrown away
    inputs = (q, k, v, *more[1:])
    got = ops.prefix_attention(q, k, v, *more[1:], causal)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    slope = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, slope), torch.autograd.grad(expected, inputs, slope), strict=True
    ):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_attention_in_sixteen_bits_keeps_prompts_and_anchors_wide(device):
    q, k, v = (t.detach().bfloat16().requires_grad_() for t in heads(device, (2, 2, 7, 8)))
    anchor = torch.rand(2, 7, 7, device=device).requires_grad_()
    prompts = [torch.randn(2, 3, 8, device=device).requires_grad_() for _ in range(2)]
    for got, leaf in (
        (ops.anchored_attention(q, k, v, anchor, 0.5), anchor),
        (ops.prefix_attention(q, k, v, *prompts), prompts[0]),
    ):
        assert got.dtype == torch.bfloat16
        assert torch.autograd.grad(got.float().sum(), leaf)[0].dtype == torch.float32


def test_functional_gradients_and_fullgraph_of_attention(device):
    q, k, v = (t.detach() for t in heads(device, (2, 2, 5, 4)))
    anchor, prompt = torch.rand(2, 5, 5, dtype=torch.float64), torch.rand(2, 3, 4, dtype=torch.float64)
    anchor, prompt = anchor.to(device), prompt.to(device)

    def job(q, anchor, prompt):
        return (ops.anchored_attention(q, k, v, anchor, 0.5) * ops.prefix_attention(q, k, v, prompt, prompt)).sum()

    got = torch.func.grad(job, argnums=(0, 1, 2))(q, anchor, prompt)
    leaves = [t.clone().requires_grad_() for t in (q, anchor, prompt)]
    for ours, theirs in zip(got, torch.autograd.grad(job(*leaves), leaves), strict=True):
        torch.testing.assert_close(ours, theirs)
    compiled = torch.compile(job, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, anchor, prompt), job(q, anchor, prompt))


HEADS = torch.zeros(2, 3, 5, 4)


@pytest.mark.parametrize("call, error, message", [
    (lambda: ops.anchored_attention(HEADS[0], HEADS, HEADS, HEADS[0], 1.0), TypeError, r"q must be .* \[B, H, N, d\]"),
    (lambda: ops.anchored_attention(HEADS, HEADS[:1], HEADS, HEADS[0], 1.0), ValueError, "k must be like q"),
    (lambda: ops.anchored_attention(HEADS, HEADS, HEADS, HEADS[0], 1.0), ValueError, r"anchor must be \[3, 5, 5\]"),
    (lambda: ops.anchored_attention(HEADS, HEADS, HEADS, HEADS[0], 1.0, "logits"), ValueError, "got 'logits'"),
    (lambda: ops.anchored_attention(HEADS, HEADS, HEADS, HEADS[0], torch.ones(2), "heads"), ValueError, "one element"),
    (lambda: ops.prefix_attention(HEADS, HEADS, HEADS, HEADS, HEADS), ValueError, r"prefix_k must be \[3, P, 4\]"),
    (lambda: ops.prefix_attention(HEADS, HEADS, HEADS, HEADS[0], HEADS[0, :, :2]), ValueError, "prefix_v must be"),
])  # fmt: skip
def test_bad_heads(call, error, message):
    with pytest.raises(error, match=message):
        call()
