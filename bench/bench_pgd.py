"""PGD-10 end to end against torchattacks at equal settings: same model, same start, same eps and alpha.

Before any timing both must give the same adversarial images from the clean start; on a GPU, where a model's backward
pass is not repeatable to the bit, up to what torchattacks differs from itself. Kernel, precision and compiler gains are
kept apart: `rvlm` differs from `torchattacks` in nothing but the loop, and `rvlm-compile` has torch.compile on top of
it. `share_*` is the Amdahl line: where an attack's time goes, and so what a faster step could still bring.
"""

import contextlib
import time

import pytest
import torch
from measure import QUICK, synchronize
from peers.pgd import torchattacks_pgd
from torch import Tensor, nn

from rvlm import profiling
from rvlm.attacks import pgd

ON_GPU = torch.cuda.is_available()
EPS, STEPS = 8 / 255, 10
SETTINGS = {"eps": EPS, "alpha": 2 / 255, "steps": STEPS, "random_start": False}
if QUICK:
    CASES = [("tiny-vit", 2, 10, 32)]
elif ON_GPU:
    CASES = [("ViT-B-32", 128, 100, 224), ("ViT-B-32", 8, 100, 224), ("tiny-vit", 128, 10, 32)]
else:
    CASES = [("tiny-vit", 1, 10, 32), ("tiny-vit", 8, 10, 32), ("tiny-vit", 128, 10, 32), ("ViT-B-32", 4, 100, 224)]
PRECISIONS = ["fp32", "bf16"] if ON_GPU else ["fp32"]
CELLS = [(impl, precision, case) for impl in ("rvlm", "torchattacks") for case in CASES for precision in PRECISIONS]
if ON_GPU and not QUICK:
    CELLS.append(("rvlm-compile", "bf16", CASES[0]))  # one, and last: compiling takes longer than all the rest


def rvlm_pgd(model: nn.Module, engine: str = "auto"):
    return lambda x, y: pgd(model, x, y, **SETTINGS, engine=engine)


@pytest.fixture(scope="module")
def classifier(device):
    """Random weights: speed does not depend on them. Normalisation and the cached text head are in the model."""
    pytest.importorskip("open_clip", reason="open_clip is needed for the models that are attacked")
    from rvlm.models import ZeroShotClassifier, load_clip

    built = {}

    def build(name: str, classes: int) -> nn.Module:
        if name not in built:
            built.clear()  # one model at a time
            names = [f"class {i}" for i in range(classes)]
            built[name] = ZeroShotClassifier(load_clip(name, device), names).to(device).eval()
        return built[name]

    return build


def differing(a: Tensor, b: Tensor) -> float:
    """Share of the pixels that are not the same."""
    assert a.isfinite().all() and b.isfinite().all()
    return ((a - b).abs() > 1e-6).float().mean().item()


def shares(attack, x: Tensor, y: Tensor) -> dict:
    """Where the time of one attack goes. `rest` is Python and whatever is in no phase."""
    synchronize(x.device)
    began = time.perf_counter()
    with profiling.record(x.device) as phases:
        attack(x, y)
        totals = {name: seconds for name, (seconds, _) in phases.totals().items()}
    wall = time.perf_counter() - began
    model = totals["forward"] + totals["backward"]
    return {
        "share_model": model / wall,
        "share_step": totals["step"] / wall,
        "share_rest": 1 - (model + totals["step"]) / wall,
        "us_per_step_op": totals["step"] / STEPS * 1e6,
    }


@pytest.mark.parametrize(
    "impl, precision, case", CELLS, ids=[f"{impl}-{precision}-{case[0]}-B{case[1]}" for impl, precision, case in CELLS]
)
@pytest.mark.benchmark(group="pgd-10")
def test_pgd(impl, precision, case, classifier, device, compare, benchmark):
    name, batch, classes, size = case
    model = classifier(name, classes)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.rand(batch, 3, size, size, device=device, generator=generator)
    y = torch.randint(classes, (batch,), device=device, generator=generator)
    peer = torchattacks_pgd(model, **SETTINGS)
    attack = {"rvlm": rvlm_pgd(model), "rvlm-compile": rvlm_pgd(model, "compile"), "torchattacks": peer}[impl]

    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with autocast:
        expected = peer(x, y)
        noise = differing(expected, peer(x, y))
        began = time.perf_counter()
        got = attack(x, y)
        first = time.perf_counter() - began
        if impl == "rvlm-compile":  # other rounding in the model, so other signs of tiny gradients: an equal attack
            assert (got - x).abs().max() <= EPS + 1e-6
            with torch.no_grad():
                losses = [nn.functional.cross_entropy(model(images).float(), y).item() for images in (got, expected)]
            torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0)
        else:  # the fused head rounds otherwise: other signs where a gradient is nearly zero
            assert differing(got, expected) <= 2 * noise + 1e-3
            if impl == "rvlm":  # as a plain callable, which has torch's own cross-entropy
                assert differing(rvlm_pgd(model.forward)(x, y), expected) <= (2 * noise + 1e-3 if ON_GPU else 0)
        info = {"impl": impl, "peer": type(peer).__module__.split(".")[0], "case": f"{name} B={batch} {precision}"}
        info |= {"pixels_differing": differing(got, expected), "peers_own_noise": noise}
        if impl == "rvlm-compile":
            info["compile_seconds"] = first
        compare(lambda: attack(x, y), lambda: peer(x, y), round_seconds=0.02, **info)
        if impl == "rvlm":
            benchmark.extra_info.update(shares(attack, x, y))
    if benchmark.stats is not None:
        benchmark.extra_info["images_per_s"] = batch / (benchmark.extra_info["us_per_call"] * 1e-6)
