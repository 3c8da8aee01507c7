"""Records as `rvlm eval` writes them, with the sections that a report reads."""

import json

import pytest

from rvlm.evaluation import wilson


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
