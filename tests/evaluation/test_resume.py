"""An evaluation that is killed goes on where it was, with the same result; a state of another one is refused."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from rvlm.data.base import Data
from rvlm.evaluation import evaluate
from rvlm.evaluation.resume import COLUMNS

ATTACK = "pgd-5x2,apgd-ce-5,square-20"


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x):
        return self.layers(x)


class Killed(Net):
    """Raises at the n-th forward pass."""

    def __init__(self, left):
        super().__init__()
        self.left = left

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().forward(x)


Killed.__qualname__ = "Net"  # the weights and the name are the same: the same evaluation


def toy():
    pixels = torch.randint(0, 256, (40, 3, 6, 6), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    y = Net()(pixels / 255).argmax(1)
    return Data("toy", "test", list("abcd"), y, torch.arange(40), lambda i: pixels[i], n_total=40)


@pytest.fixture
def data():
    return toy()


def run(model, data, **settings):
    given = dict(attack=ATTACK, eps="2/255", batch_size=8, progress=False, keep_images=11) | settings
    return evaluate(model, data, **given)


def same(first, second):
    for name in COLUMNS:
        torch.testing.assert_close(
            getattr(first, name), getattr(second, name), rtol=0, atol=0, equal_nan=True, msg=name
        )
    assert first.losses == second.losses and torch.equal(first.x_adv, second.x_adv)
    assert (first.forwards, first.backwards, first.checks) == (second.forwards, second.backwards, second.checks)
    assert first.stages == second.stages


@pytest.mark.parametrize("batch_size, left", [*((8, left) for left in (0, 3, 5, 20, 60, 100, 150)), (2, 650), (2, 900)])
def test_a_run_that_is_cut_anywhere_ends_the_same(data, tmp_path, monkeypatch, batch_size, left):
    """With batches of two some stages get four of them at once."""
    monkeypatch.setattr("rvlm.evaluation.resume.Keeper.save_now_and_then", lambda keeper: keeper.save())
    whole = run(Net(), data, batch_size=batch_size)
    path = tmp_path / "state.npz"
    with pytest.raises(KeyboardInterrupt):
        run(Killed(left), data, state=path, batch_size=batch_size)
    again = run(Net(), data, state=path, batch_size=batch_size)
    same(again, whole)
    calls = Killed(10**6)
    same(run(calls, data, state=path, batch_size=batch_size), whole)
    assert calls.left == 10**6, "a complete state asks the model nothing"


def test_every_chunk_is_kept(data, tmp_path, monkeypatch):
    """Cut again and again, one chunk further each time."""
    monkeypatch.setattr("rvlm.evaluation.resume.Keeper.save_now_and_then", lambda keeper: keeper.save())
    path, attempts = tmp_path / "state.npz", 0
    while attempts < 100:
        try:
            found = run(Killed(40), data, state=path)
            break
        except KeyboardInterrupt:
            attempts += 1
    assert 1 < attempts < 100
    same(found, run(Net(), data))


SCRIPT = """
import sys, time
sys.path.insert(0, {folder!r})
import test_resume as t
class Slow(t.Net):
    def forward(self, x):
        time.sleep(0.1)
        return super().forward(x)
Slow.__qualname__ = "Net"
t.run(Slow(), t.toy(), state={path!r})
print("done")
"""


def attacking(path):
    """Whether a state says that the clean images are done."""
    if not path.exists():
        return False
    with np.load(path) as file:
        return bool((file["pred_clean"] >= 0).all())


def test_kill_9(data, tmp_path):
    path = tmp_path / "state.npz"
    script = SCRIPT.format(folder=os.path.dirname(__file__), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.time() + 60
    while not attacking(path) and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    out, err = process.communicate()
    assert b"done" not in out and path.exists(), err.decode()
    with np.load(path) as file:
        assert (file["pred_clean"] >= 0).all()
    same(run(Net(), data, state=path), run(Net(), data))


@pytest.mark.parametrize("attack", ["pgd-5", "square-20,pgd-3x2"])
def test_another_radius_takes_over_the_clean_pass(data, tmp_path, attack):
    """And is the same, whatever the one before did to the images; also cut and taken up again."""

    class Noisy(Net):
        def forward(self, x):
            return torch.where(x[:, :1, 0, 0] > 0.9, torch.nan, super().forward(x))

    pixels = data.read(data.index)
    pixels[:, 0, 0, 0] = torch.where(torch.arange(40) % 9 > 0, 128, 255)
    y = torch.where(torch.arange(40) % 5 > 0, Net()(pixels / 255).argmax(1), 0)
    wrong = dataclasses.replace(data, y=y, read=lambda i: pixels[i])
    before = run(Noisy(), wrong, eps="16/255", keep_images=0)
    whole = run(Noisy(), wrong, attack=attack)
    assert (whole.broken_by == -2).any() and (whole.broken_by >= 0).any() and (whole.broken_by == -1).any()
    after = run(Noisy(), wrong, attack=attack, clean=before)
    after.forwards += after.cost.shared
    same(after, whole)
    assert after.cost.shared == 48 and whole.cost.shared == 0
    path = tmp_path / "state.npz"
    run(Noisy(), wrong, attack=attack, clean=before, state=path)
    again = run(Noisy(), wrong, attack=attack, state=path)
    assert again.cost.shared == 48 and again.forwards == after.forwards - 48
    with pytest.raises(ValueError, match="these 40 samples in batches of 4, got an evaluation of the same samples"):
        run(Noisy(), wrong, clean=before, batch_size=4)
    with pytest.raises(ValueError, match="got an evaluation of other samples in batches of 8"):
        run(Noisy(), data, clean=before)


@pytest.mark.parametrize("change, word", [
    (dict(eps="4/255"), "eps was '2/255', is '4/255'"),
    (dict(attack="pgd-5"), "attack was"),
    (dict(seed=1), "seed was 0, is 1"),
    (dict(batch_size=4), "batch_size was 8, is 4"),
    (dict(norm="l2", eps="2/255"), "norm was"),
    (dict(quantize=255), "quantize was None, is 255"),
    (dict(model=Net(1)), "classifier was"),
    (dict(source=Net()), "source was None"),
])  # fmt: skip
def test_another_evaluation_is_refused(data, tmp_path, change, word):
    path = tmp_path / "state.npz"
    run(Net(), data, state=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"belongs to another evaluation .*{word}"):
        run(change.pop("model", Net()), data, state=path, **change)
    assert path.read_bytes() == before


def test_other_prompts_and_other_pixels_are_another_evaluation(data, tmp_path):
    class Zero(Net):
        templates = ("a {}.",)

    path, pixels = tmp_path / "state.npz", data.read(data.index)
    run(Zero(), data, state=path)
    Zero.templates = ("a photo of a {}.",)
    with pytest.raises(ValueError, match="belongs to another evaluation .classifier was"):
        run(Zero(), data, state=path)
    Zero.templates = ("a {}.",)
    with pytest.raises(ValueError, match="belongs to another evaluation .first_image was"):
        run(Zero(), dataclasses.replace(data, read=lambda i: 255 - pixels[i]), state=path)


def test_what_is_no_state_is_named(data, tmp_path):
    path = tmp_path / "state.npz"
    run(Net(), data, state=path)
    whole = path.read_bytes()
    for damaged in (b"", b"no archive", whole[: len(whole) // 2], whole[:100] + b"0000" + whole[104:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no state of an evaluation"):
            run(Net(), data, state=path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="no state of an evaluation"):
        run(Net(), data, state=path)
    with pytest.raises(ValueError, match="keep_images"):
        run(Net(), data, state=tmp_path / "other.npz", keep_images=True)


def test_a_full_disk_leaves_the_last_state(data, tmp_path, monkeypatch):
    monkeypatch.setattr("rvlm.evaluation.resume.Keeper.save_now_and_then", lambda keeper: keeper.save())
    path = tmp_path / "state.npz"
    with pytest.raises(KeyboardInterrupt):
        run(Killed(20), data, state=path)
    before, replace = path.read_bytes(), os.replace

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        run(Net(), data, state=path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["state.npz"]
    monkeypatch.setattr(os, "replace", replace)
    same(run(Net(), data, state=path), run(Net(), data))
