"""Small scripts as users write them, run with the other library and again with one import line changed."""

import warnings

import pytest
import torch
from torch import nn

from rvlm.attacks import AttackWarning

SETUP = """
import torch
from torch import nn

torch.manual_seed(3)
model = nn.Sequential(
    nn.Conv2d(3, 6, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 25, 16), nn.Tanh(), nn.Linear(16, 6)
).eval()
images = torch.randint(20, 236, (16, 3, 12, 12)) / 255
labels = model(images).argmax(1)
labels[:2] = (labels[:2] + 1) % 6
"""


@pytest.fixture
def model_and_batch():
    """The model of the scripts, its images [16, 3, 12, 12] and labels, of which the first two are wrong."""
    names: dict = {}
    exec(SETUP, names)
    return names["model"], names["images"], names["labels"]


@pytest.fixture
def both():
    """both(import of theirs, import of ours, rest of the script) -> their `result` and ours, and the script's names."""

    def run(theirs: str, ours: str, script: str):
        pytest.importorskip(theirs.split()[1].split(".")[0], reason="install rvlm[oracles], or that library")
        found = []
        for line in (theirs, ours):
            names: dict = {}
            state = torch.get_rng_state()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AttackWarning)
                exec(f"{line}\n{SETUP}\n{script}", names)
            torch.set_rng_state(state)
            found.append(names)
        return found[0]["result"], found[1]["result"], found[1]

    return run


class Watched(nn.Module):
    """Batch norm, dropout and a mode of its own per module; keeps what an attack must not change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
        self.head = nn.Linear(100, 6)
        self.body[1].eval()
        self.modes: list = []

    def forward(self, x):
        self.modes.append([m.training for m in self.modules()])
        return self.head(self.body(x))

    def state(self):
        flags = [m.training for m in self.modules()]
        tensors = [t.clone() for t in (*self.parameters(), *self.buffers())]
        return flags, tensors, [p.grad is None and p.requires_grad for p in self.parameters()]


@pytest.fixture
def watched():
    return Watched()


def same_state(before, after) -> bool:
    tensors = all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    return before[0] == after[0] and tensors and before[2] == after[2]
