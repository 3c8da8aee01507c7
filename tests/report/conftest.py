"""Records as `rvlm eval` writes them, with the sections that a report reads."""

import json

import pytest
import torch

from rvlm.data.base import Data
from rvlm.evaluation import evaluate, wilson, write_evaluation


def figure(share, n):
    return {"v": share, "ci95": list(wilson(round(share * n), n)), "n": n}


def write_record(
    folder, name, robust=0.5, *, clean=0.9, data="digits", eps="8/255", attack="pgd-10", target="white-box", n=100,
    status="complete", protocol=None, source=None, seed=0, fingerprint="f", sha=None, checks=(),
):  # fmt: skip
    record = {
        "schema": "rvlm.result/1", "status": status, "name": name, "protocol": protocol,
        "model": {"name": name, "sha256": sha or name, "method": None}, "source": source and {"name": source},
        "data": {"name": data, "fingerprint": f"{data} {fingerprint}", "n_used": n, "n_total": n},
        "threat": {"norm": "linf", "eps_str": eps, "target": target}, "input": {"attack_res": [32, 32]},
        "attack": {"name": attack, "stages": [], "seed": seed}, "checks": list(checks), "perf": {"wall_s": 1.0},
        "metrics": {"clean_acc": figure(clean, n), "robust_acc": figure(robust, n)},
        "env": {"rvlm": "0", "torch": "2", "device": "cpu"}, "samples": "samples/x.npz",
    }  # fmt: skip
    path = folder / "result" / f"{name}-{data}-{target}-{attack}-{eps}-{n}-{seed}.json".replace("/", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


@pytest.fixture(scope="session")
def record():
    return write_record


LINEAR = torch.linspace(-1, 1, 48 * 4).reshape(48, 4)


def linear(x):
    return 4 * (x.flatten(1) - 0.5) @ LINEAR


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """A run with two models at one radius, as `rvlm eval` leaves it, and what was found."""
    folder = tmp_path_factory.mktemp("measured")
    pixels = torch.randint(0, 256, (30, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    y = linear(pixels / 255).argmax(1)
    names = ["cat", "dog: a $ and: more", "a class with a name that is far too long for one line", "bird"]
    data = Data("toy", "test", names, y, torch.arange(30), lambda i: pixels[i], n_total=30)
    given = dict(attack="pgd-5@alpha=1/255,fmn-2,square-20", eps="4/255", keep_images=3, progress=False)
    found = {}
    for name, model in (("plain", linear), ("smooth", lambda x: linear(x.mean((2, 3), True).expand_as(x)))):
        found[name] = evaluate(model, data, **given)
        write_evaluation(folder, name, found[name], data, model)
    return folder, found, data
