"""Training steps of the methods against the papers' style of loop (peers/train.py): same batches, same losses first.

Neither side's time holds the loading of teachers; ours holds the setup of a run (class embeddings, the cached rows).
"classes" are what the text tower has to encode: 10 for the digits, 200 as in TinyImageNet, where the papers train with
batches of 64. Teachers' caches are warm; that the first run fills them is not in the medians.
"""

import copy

import pytest
import torch
from measure import QUICK
from peers.train import STEPS

pytest.importorskip("open_clip", reason="open_clip is needed for the models that are trained")

from rvlm.data import Data, load_data  # noqa: E402
from rvlm.methods import build_method  # noqa: E402
from rvlm.models import load_clip  # noqa: E402
from rvlm.training import train  # noqa: E402
from rvlm.training.trainer import _order  # noqa: E402

BATCH, BATCHES = (8, 1) if QUICK else (64, 4)
ATTACK = {"eps": 4 / 255, "alpha": 2 / 255, "steps": 2}
ROLES = {  # of a method's teachers: its setting -> what the peer calls it
    "tecoa": {},
    "pmg_aft": {},
    "hpt_gpd": {"proxy": "proxy"},
    "mmt_ard": {"robust_teacher": "robust", "clean_teacher": "clean"},
}
MORE = {"hpt_gpd": {"stages": "hpt"}, "mmt_ard": {"weights": "fixed"}}
SETTINGS = {
    "epochs": 1, "batch_size": BATCH, "warmup_steps": 0, "lr": 1e-4, "random_start": False, "clip_grad": None,
    "templates": "plain", "optimizer": "adamw",
}  # fmt: skip


@pytest.fixture(scope="module", params=[10, 200], ids=lambda classes: f"C{classes}")
def data(request):
    digits = load_data("digits", "train", limit=BATCH * BATCHES)
    if request.param == 10:
        return digits
    names = [f"thing number {k}" for k in range(request.param)]
    y = torch.randint(0, request.param, (len(digits),), generator=torch.Generator().manual_seed(0))
    return Data("many", "train", names, y, digits.index, digits.read, n_total=digits.n_total)


@pytest.fixture(scope="module")
def teachers(device):
    """What the peers call their frozen models."""
    names = {"proxy": "tiny-rn", "clean": "tiny-rn", "robust": "tiny-vit", "origin": "tiny-vit"}
    return {role: load_clip(name, device) for role, name in names.items()}


def method_of(name, teachers):
    given = {setting: teachers[role] for setting, role in ROLES[name].items()}
    return build_method(name, **(SETTINGS | ATTACK | MORE.get(name, {}) | given))


def ours(name, data, student, teachers):
    return train(copy.deepcopy(student), data, method_of(name, teachers), progress=False)


def twin(name, data, student, teachers, device):
    """One epoch of the papers' style."""
    (template,) = method_of(name, teachers).training_templates(data)
    texts = [template.format(thing) for thing in data.class_names]
    if name == "pmg_aft":
        teachers = {"frozen": copy.deepcopy(student)}
    student = copy.deepcopy(student)
    for model in (student, *teachers.values()):
        model.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.model.visual.parameters(), lr=SETTINGS["lr"], weight_decay=0.0)
    for rows in _order(len(data), 0, 0, 0).split(BATCH):
        x, y, _ = data.batch(rows)
        loss = STEPS[name](student, teachers, x.to(device), y.to(device), texts, ATTACK)
        optimizer.zero_grad()  # else the attack's weight gradients would be added
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.benchmark(group="training")
def test_epoch(name, data, teachers, device, compare, benchmark, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RVLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    student, losses = load_clip("tiny-vit", device, seed=1), []
    mine = ours(name, data, student, teachers).history[0]["loss"]
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "backward", _noting(losses, torch.Tensor.backward))
        twin(name, data, student, teachers, device)
    outer = losses[ATTACK["steps"] :: ATTACK["steps"] + 1]
    # Rounding decides about signs of small gradients, so the images and, after a step, the weights drift apart.
    assert abs(mine / (sum(outer) / len(outer)) - 1) < 2e-2, (mine, outer)
    info = {"impl": "rvlm", "peer": "paper style", "case": f"{name} B={BATCH} C={len(data.class_names)}"}
    compare(
        lambda: ours(name, data, student, teachers), lambda: twin(name, data, student, teachers, device),
        round_seconds=0.02, **info,
    )  # fmt: skip


def _noting(values, backward):
    def noted(self, *args, **kwargs):
        values.append(self.item())
        return backward(self, *args, **kwargs)

    return noted
