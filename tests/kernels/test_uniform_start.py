"""The random start kernel: its integers against an independent Philox4x32-10, its pixels against numpy."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import rvlm.ops as ops
from rvlm.kernels import _launch, steps
from rvlm.kernels.steps import _philox

WORD = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 of Salmon et al. (SC 2011), table 2, in Python integers: four words from four and two."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & WORD, p0 >> 32 ^ c[3] ^ k[1], p0 & WORD]
        k = [k[0] + 0x9E3779B9 & WORD, k[1] + 0xBB67AE85 & WORD]
    return c


def oracle(x, eps, sample_ids, seed, lo, hi, stream):
    """The start in numpy, in the dtype of x."""
    one, rows = x.dtype.type, x.reshape(len(x), -1)
    out = np.empty_like(rows)
    for b, sample in enumerate(int(i) for i in sample_ids):
        counters = range((rows.shape[1] + 3) // 4)
        key = (seed & WORD, seed >> 32 & WORD)
        words = [philox((j, sample & WORD, sample >> 32 & WORD, stream), key) for j in counters]
        u = np.array(words, np.uint32).ravel()[: rows.shape[1]] // 256
        noise = (u.astype(x.dtype) / one(2**24) * one(2) - one(1)) * eps[b % len(eps)]
        out[b] = np.clip(rows[b] + noise, one(lo), one(hi))
    return out.reshape(x.shape)


@triton.jit
def _philox_kernel(out_ptr, in_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    inside = i < n
    c0 = tl.load(in_ptr + i * 6 + 0, mask=inside, other=0).to(tl.uint32)
    c1 = tl.load(in_ptr + i * 6 + 1, mask=inside, other=0).to(tl.uint32)
    c2 = tl.load(in_ptr + i * 6 + 2, mask=inside, other=0).to(tl.uint32)
    c3 = tl.load(in_ptr + i * 6 + 3, mask=inside, other=0).to(tl.uint32)
    k0 = tl.load(in_ptr + i * 6 + 4, mask=inside, other=0).to(tl.uint32)
    k1 = tl.load(in_ptr + i * 6 + 5, mask=inside, other=0).to(tl.uint32)
    w0, w1, w2, w3 = _philox(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + i * 4 + 0, w0.to(tl.int64), mask=inside)
    tl.store(out_ptr + i * 4 + 1, w1.to(tl.int64), mask=inside)
    tl.store(out_ptr + i * 4 + 2, w2.to(tl.int64), mask=inside)
    tl.store(out_ptr + i * 4 + 3, w3.to(tl.int64), mask=inside)


def kernel_words(words, device):
    """Philox words of the device function for rows (c0, c1, c2, c3, k0, k1)."""
    given = torch.tensor(words, dtype=torch.int64, device=device)
    out = torch.full((len(words), 4), -1, dtype=torch.int64, device=device)
    _philox_kernel[(1,)](out, given, len(words), BLOCK=triton.next_power_of_2(len(words)), enable_fp_fusion=False)
    return out.tolist()


# Random123's known-answer file (kat_vectors), philox4x32 with 10 rounds.
KNOWN = {
    (0,) * 6: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    (WORD,) * 6: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0): (
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ),
}


def test_known_answers(device):
    for given, expected in KNOWN.items():
        assert tuple(philox(given[:4], given[4:])) == expected
    assert [tuple(row) for row in kernel_words(list(KNOWN), device)] == list(KNOWN.values())


def test_integers_equal_an_independent_implementation(device):
    random = np.random.default_rng(0)
    given = random.integers(0, 2**32, (300, 6)).tolist()
    assert kernel_words(given, device) == [philox(row[:4], row[4:]) for row in given]


def start(x, eps, ids, seed=0, lo=0.0, hi=1.0, stream=0, uniform_start=steps.uniform_start):
    out = torch.full_like(x, float("nan"))
    uniform_start(out, x, eps, ids, seed, lo, hi, stream)
    return out


def images(device, shape=(3, 3, 17, 19), dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype).to(device)


IDS = [5, 2**40 + 3, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 3, 17, 19), (3, 5), (3, 1), (1, 3, 8, 8)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_matches_oracle(device, dtype, shape, per_sample):
    x = images(device, shape, dtype)
    ids = torch.tensor(IDS[: len(x)], device=device)
    eps = torch.tensor([8, 3, 0.5][: len(x) if per_sample else 1], dtype=dtype, device=device) / 255
    got = start(x, eps, ids, seed=7, lo=0.05, hi=0.9, stream=3)
    expected = oracle(x.cpu().numpy(), eps.cpu().numpy(), ids.cpu(), 7, 0.05, 0.9, 3)
    np.testing.assert_array_equal(got.cpu().numpy(), expected)


@pytest.mark.parametrize("seed", [0, 1, 16, -1, 2**31, 2**40 + 7, 2**63 - 1, -(2**63), 2**64 - 1])
@pytest.mark.parametrize("stream", [0, 1, 2**32 - 1])
def test_seeds_and_streams_use_all_their_bits(device, seed, stream):
    x, eps = images(device, (2, 13)), torch.full((1,), 0.1, device=device)
    ids = torch.tensor([0, 2**62 + 9], device=device)
    expected = oracle(x.cpu().numpy(), eps.cpu().numpy(), ids.cpu(), seed, 0.0, 1.0, stream)
    np.testing.assert_array_equal(start(x, eps, ids, seed, stream=stream).cpu().numpy(), expected)


def test_noise_belongs_to_the_sample(device):
    x, eps = images(device, (4, 3, 17, 19)), torch.full((1,), 8 / 255, device=device)
    ids = torch.tensor([11, 2, 2**35, 7], device=device)
    whole = start(x, eps, ids, seed=3)
    order = torch.tensor([2, 0, 3, 1], device=device)
    assert torch.equal(start(x[order], eps, ids[order], seed=3), whole[order])
    for row in range(4):
        assert torch.equal(start(x[row : row + 1], eps, ids[row : row + 1], seed=3), whole[row : row + 1])
    with _launch.forced_block(64):
        assert torch.equal(start(x, eps, ids, seed=3), whole)
    for other in ({"seed": 4}, {"seed": 3, "stream": 1}):
        assert ((start(x, eps, ids, **other) - whole).abs() > 1e-4).float().mean() > 0.9


def test_noise_is_uniform(device):
    x, eps = torch.zeros((8, 4096), device=device), torch.full((1,), 0.5, device=device)
    noise = start(x, eps, torch.arange(8, device=device), seed=12, lo=-1.0).cpu().double().flatten()
    assert noise.min() >= -0.5 and noise.max() < 0.5
    ranks = (torch.arange(len(noise)) + 0.5) / len(noise) - 0.5
    assert (noise.sort().values - ranks).abs().max() < 1.95 / len(noise) ** 0.5  # Kolmogorov-Smirnov, p = 0.001
    assert torch.corrcoef(torch.stack((noise[:-1], noise[1:])))[0, 1].abs() < 0.02


def test_empty_batch_and_zero_radius(device):
    eps = torch.zeros(1, device=device)
    assert start(images(device, (0, 3, 4, 4)), eps, torch.zeros(0, dtype=torch.int64, device=device)).numel() == 0
    x = images(device)
    assert torch.equal(start(x, eps, torch.arange(3, device=device)), x)


MUTATIONS = {
    "fewer rounds": ("tl.static_range(10)", "tl.static_range(9)"),
    "lanes swapped": ("tl.interleave(tl.interleave(w0, w2)", "tl.interleave(tl.interleave(w2, w0)"),
    "id cut to 32 bits": ("(sample >> 32).to(tl.uint32)", "(sample * 0).to(tl.uint32)"),
    "seed cut to 32 bits": ("seed_high.to(tl.uint32)", "(seed_high * 0).to(tl.uint32)"),
    "stream ignored": ("stream.to(tl.uint32)", "(stream * 0).to(tl.uint32)"),
    "counter restarts in every block": ("block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)", "tl.arange(0, BLOCK // 4)"),
    "noise above zero only": ("(u * 2 - 1)", "(u * 2)"),
    "no box": ("_clip(x + (u * 2 - 1) * eps, LO, HI)", "x + (u * 2 - 1) * eps"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_is_noticed(device, mutant, name):
    x, ids = images(device, (3, 150)), torch.tensor(IDS, device=device)
    eps = torch.tensor([0.1], device=device)
    arguments = {"seed": 2**40 + 7, "lo": 0.0, "hi": 1.0, "stream": 5}
    expected = oracle(x.cpu().numpy(), eps.cpu().numpy(), ids.cpu(), **arguments)
    wrong = mutant(*MUTATIONS[name]).uniform_start
    with _launch.forced_block(64):
        assert np.array_equal(start(x, eps, ids, **arguments).cpu().numpy(), expected)
        assert not np.array_equal(start(x, eps, ids, **arguments, uniform_start=wrong).cpu().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_public_op_gives_the_reference_bits(device, dtype, seed):
    x, ids = images(device, dtype=dtype), torch.tensor(IDS, device=device)
    results = []
    for backend in ("reference", "triton"):
        for layout in (torch.contiguous_format, torch.channels_last):
            with ops.use_backend(backend):
                results.append(ops.uniform_start(x.contiguous(memory_format=layout), 8 / 255, ids, seed, stream=9))
    assert all(torch.equal(results[0], other) for other in results[1:])
