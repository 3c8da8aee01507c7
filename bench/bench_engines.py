"""What a whole attack gains by its kernels, its scheduling, its precision, graphs and the compiler, each apart.

Every row changes one thing against its peer:

    kernel       pgd, eager, fp32                           torchattacks, or its loop in our own words
    compile      engine="compile"                           torchattacks; `over_eager` is the ratio to our eager loop
    graph        engine="cudagraph" (GPU)                   our eager loop
    precision    precision="bf16", "cascade", "tf32" (GPU)  our eager loop in fp32
    scheduling   early_stop="compact"                       the same attack without, best="adv" on both sides

Before any timing the verdicts of both sides are compared on `GATE` images: attacks that change nothing in exact
arithmetic may differ on one image in a hundred; precision must not fool fewer, but for one in a hundred. The
disagreements are in the table. A region is compiled once per model and shape: `compile_seconds` is what the first
attack took beyond the second, `break_even` after how many attacks against eager mode that is earned back.
"""

import time
from functools import partial

import pytest
import torch
from measure import QUICK, quartiles, robust, synchronize
from peers.pgd import torchattacks_pgd
from torch import nn

from rvlm.attacks import pgd

ON_GPU = torch.cuda.is_available()
EPS = 8 / 255
SETTINGS = {"eps": EPS, "alpha": 2 / 255, "steps": 10, "random_start": False}
GATE = 16 if QUICK else 256
MODELS = ["tiny-vit"] if QUICK else [*(["ViT-B-32"] if ON_GPU else []), "digits-vit", "digits-rn", "resnet20"]
BATCHES = [8] if QUICK or not ON_GPU else [8, 128]
KINDS = {
    "kernel": {},
    "compile": {"engine": "compile"},
    "precision bf16": {"precision": "bf16"},
    "precision cascade": {"precision": "cascade"},
    "scheduling compact": {"best": "adv", "early_stop": "compact"},
}
if ON_GPU:
    KINDS |= {"precision tf32": {"precision": "tf32"}, "graph": {"engine": "cudagraph"}}


def ours(model: nn.Module, x, y, **changed):
    return pgd(model, x, y, **SETTINGS, **changed)


def fooled(model, attack, x, y, batch: int):
    found = torch.cat([attack(*part) for part in zip(x.split(batch), y.split(batch), strict=True)])
    assert (found - x).abs().max() <= EPS + 1e-6
    return ~robust(model, found, y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"B{batch}")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.benchmark(group="gains")
def test_gain(kind, name, batch, load, device, compare, benchmark):
    model, all_x, all_y = load(name, GATE)
    if name == "ViT-B-32":  # random weights: its speed is what it is here for
        all_x = torch.rand(GATE, 3, 224, 224, device=device, generator=torch.Generator(device).manual_seed(0))
    changed = KINDS[kind]
    x, y = all_x[:batch], all_y[:batch]
    attack, eager = partial(ours, model, **changed), partial(ours, model)
    peer = torchattacks_pgd(model, **SETTINGS) if kind in ("kernel", "compile") else eager
    library = type(peer).__module__.split(".")[0] if kind in ("kernel", "compile") else "rvlm fp32"
    if kind.startswith("scheduling"):
        peer, library = partial(ours, model, best="adv"), "rvlm best=adv"

    synchronize(device)
    began = time.perf_counter()
    attack(x, y)
    synchronize(device)
    first = time.perf_counter() - began
    mine, theirs = (fooled(model, one, all_x, all_y, batch) for one in (attack, peer))
    differing = (mine != theirs).sum().item()
    slack = max(1, GATE // 100)
    if kind.startswith("precision"):
        assert mine.sum() >= theirs.sum() - slack, (mine.sum(), theirs.sum())
    else:
        assert differing <= slack, differing
    info = {"impl": f"rvlm {kind}", "peer": library, "case": f"{kind}: {name} B={batch}"}
    info |= {"fooled": mine.sum().item(), "verdicts_differing": differing, "images": GATE}
    compare(lambda: attack(x, y), lambda: peer(x, y), round_seconds=0.02, **info)
    if benchmark.stats is None or "engine" not in changed:
        return
    ratios, spared = [], []
    for _ in range(3 if QUICK else 20):
        turns = []
        for one in (attack, eager):
            synchronize(device)
            began = time.perf_counter()
            one(x, y)
            synchronize(device)
            turns.append(time.perf_counter() - began)
        ratios.append(turns[1] / turns[0])
        spared.append(turns[1] - turns[0])
    benchmark.extra_info["over_eager"] = round(quartiles(ratios)[1], 3)
    if kind == "compile":
        seconds = first - benchmark.extra_info["us_per_call"] * 1e-6
        gain = quartiles(spared)[1]
        benchmark.extra_info |= {
            "compile_seconds": seconds,
            "break_even": round(seconds / gain) if gain > 0 else "never",
        }
