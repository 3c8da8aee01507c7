"""Evaluations shared by processes that torchrun starts: the same result as one process's, with identical flags."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from rvlm.evaluation.resume import COLUMNS

MODEL = """
import os
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3072, 32), nn.Tanh(), nn.Linear(32, 10))
        self.left = int(os.environ.get("FORWARDS", "1000000"))

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), 9)
        return self.layers(x)

net = Net().eval()
"""
ATTACK = "pgd-3x1,square-10"  # which get several batches of four at once


@pytest.fixture
def command(tmp_path):
    """command(processes, out, *more) -> the finished process."""
    (tmp_path / "net.py").write_text(MODEL)
    pixels = torch.randint(0, 256, (70, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    names = {}
    exec(MODEL, names)
    y = names["net"](pixels / 255).argmax(1)
    y[::7] = (y[::7] + 1) % 10
    np.savez(tmp_path / "data.npz", x=pixels.numpy(), y=y.numpy())

    def run(processes, out, *more, **env):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        words = [
            sys.executable, *(launcher if processes > 1 else []), "-m", "rvlm", "eval", "--model",
            f"{tmp_path / 'net.py'}:net", "--data", f"npz:{tmp_path / 'data.npz'}", "--attack", ATTACK,
            "--eps", "1/255", "--batch-size", "4", "--out", str(tmp_path / out), *more,
        ]  # fmt: skip
        env = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "0"} | env
        return subprocess.run(words, capture_output=True, text=True, env=env, timeout=300)

    return run


def result(folder):
    (path,) = (folder / "result").glob("*.json")
    record = json.loads(path.read_text())
    with np.load(folder / record["samples"]) as file:
        return record, {name: file[name] for name in COLUMNS}


def same(first, second):
    for name, column in first[1].items():
        np.testing.assert_array_equal(column, second[1][name], err_msg=name)
    for key in ("metrics", "attack", "data", "checks", "threat"):
        assert first[0][key] == second[0][key]
    for key in ("forward_images", "backward_images"):
        assert first[0]["perf"][key] == second[0]["perf"][key]


@pytest.mark.slow
def test_two_processes_say_what_one_says(command, tmp_path):
    done = [command(processes, f"with{processes}") for processes in (1, 2)]
    assert [process.returncode for process in done] == [0, 0], done[1].stderr
    one, two = result(tmp_path / "with1"), result(tmp_path / "with2")
    same(one, two)
    assert [record["perf"]["processes"] for record, _ in (one, two)] == [1, 2]
    assert 0 < one[0]["metrics"]["robust_acc"]["v"] < one[0]["metrics"]["clean_acc"]["v"]
    assert done[1].stdout.count("written to") == 1, "the first process alone reports"
    assert not (tmp_path / "with2" / "state").exists()


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on_as_one(command, tmp_path):
    killed = command(2, "run", FORWARDS="100")
    assert killed.returncode != 0 and (tmp_path / "run" / "state").exists(), killed.stderr
    again = command(1, "run")
    assert again.returncode == 0, again.stderr
    command(1, "whole")
    same(result(tmp_path / "run"), result(tmp_path / "whole"))


@pytest.mark.slow
def test_one_process_says_what_it_costs(command, tmp_path):
    found = command(2, "never", "--dry-run")
    assert found.returncode == 0 and found.stdout.count("cost of") == 1 and "70 images" in found.stdout, found.stderr
    assert not (tmp_path / "never").exists()
