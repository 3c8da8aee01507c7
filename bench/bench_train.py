"""Training steps of the methods against the papers' style of loop (peers/train.py): same batches, same losses first.

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

BATCH, BATCHES = (8, 1) if QUICK else (64, 4)
ATTACK = {"eps": 4 / 255, "alpha": 2 / 255, "steps": 2}
TEACHERS = {
    "tecoa": {},
    "pmg_aft": {},
    "hpt_gpd": {"proxy": "tiny-rn", "stages": "hpt"},
    "mmt_ard": {"robust_teacher": "tiny-vit", "clean_teacher": "tiny-rn", "weights": "fixed"},
}
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


def method_of(name):
    return build_method(name, **(SETTINGS | ATTACK | TEACHERS[name]))


def ours(name, data, student):
    return train(copy.deepcopy(student), data, method_of(name), progress=False)


def twin(name, data, student, device):
    """One epoch of the papers' style; the loss of its first step."""
    from rvlm.training.trainer import _order

    texts = [f"{method_of(name).training_templates(data)[0]}".format(name_) for name_ in data.class_names]
    frozen = copy.deepcopy(student)
    student = copy.deepcopy(student)
    student.model.requires_grad_(True)
    teachers = {"frozen": frozen, "proxy": load_clip("tiny-rn", device), "clean": load_clip("tiny-rn", device)}
    teachers |= {"robust": load_clip("tiny-vit", device), "origin": load_clip("tiny-vit", device)}
    for teacher in teachers.values():
        teacher.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.model.visual.parameters(), lr=SETTINGS["lr"], weight_decay=0.0)
    first = None
    for rows in _order(len(data), 0, 0, 0).split(BATCH):
        x, y, _ = data.batch(rows)
        optimizer.zero_grad()
        loss = STEPS[name](student, teachers, x.to(device), y.to(device), texts, ATTACK)
        optimizer.zero_grad()  # else the attack's weight gradients would be added
        loss.backward()
        optimizer.step()
        first = loss.item() if first is None else first
    return first


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.benchmark(group="training")
def test_epoch(name, data, device, compare, benchmark, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RVLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    student = load_clip("tiny-vit", device, seed=1)
    single = data.subset(torch.arange(len(data)), "all")
    one = train(copy.deepcopy(student), single, method_of(name), progress=False).history[0]["loss"]
    theirs = []
    monkeypatch.setattr(torch.Tensor, "backward", _noting(theirs, torch.Tensor.backward))
    twin(name, data, student, device)
    monkeypatch.undo()
    monkeypatch.setenv("RVLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    outer = theirs[ATTACK["steps"] :: ATTACK["steps"] + 1]
    assert abs(one / (sum(outer) / len(outer)) - 1) < 2e-2, (one, outer)
    info = {"impl": "rvlm", "peer": "paper style", "case": f"{name} B={BATCH} C={len(data.class_names)}"}
    compare(lambda: ours(name, data, student), lambda: twin(name, data, student, device), round_seconds=0.02, **info)


def _noting(values, backward):
    def noted(self, *args, **kwargs):
        values.append(self.item())
        return backward(self, *args, **kwargs)

    return noted
