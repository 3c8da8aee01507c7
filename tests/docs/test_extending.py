"""docs/extending by doing it: the code of each page is written to a folder and used as the page says."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from rvlm import cli
from rvlm.attacks.own import run_own
from rvlm.data import load_data
from rvlm.evaluation import evaluate
from rvlm.evaluation.resume import Keeper
from rvlm.methods import build_method, method_class
from rvlm.models import ZeroShotClassifier, load_clip
from rvlm.training import train

from .pages import files

LINES = 60
PAGES = {"attack": "cosine_pgd.py", "method": "trades.py", "dataset": "shapes.py"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files of all pages, where the test runs."""
    for page in PAGES:
        for name, code in files(f"extending/{page}.md").items():
            (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv):
    return cli.main([str(word) for word in argv])


def record(folder):
    (path,) = (folder / "result").glob("*.json")
    return json.loads(path.read_text())


def edit(path):
    path.write_text(path.read_text() + "\n# another version\n")


@pytest.mark.parametrize("page", PAGES)
def test_it_takes_few_lines(page):
    (code,) = files(f"extending/{page}.md").values()
    assert list(files(f"extending/{page}.md")) == [PAGES[page]] and len(code.splitlines()) < LINES


EVAL = ("eval", "--model", "tiny-vit", "--limit", "30", "--eps", "1/255")
ATTACK = (*EVAL, "--attack", "fgsm,cosine_pgd.py:cosine_pgd", "--batch-size", "15")


def test_an_attack_by_the_command_line(folder, capsys):
    assert run(*ATTACK, "--out", "a") == 0
    found = record(folder / "a")
    assert found["metrics"]["clean_acc"]["v"] > 0, "nobody was attacked"
    assert [stage["name"] for stage in found["attack"]["stages"]] == ["fgsm", "cosine_pgd.py:cosine_pgd"]
    assert found["attack"]["stages"][1]["settings"] == {"steps": 20, "first": 1.0}
    assert all(check["ok"] for check in found["checks"] if check["id"] != "gradients_nonzero")
    assert (
        run("bench", "--mine", "cosine_pgd.py:cosine_pgd", "--model", "tiny-vit", "--rounds", "1", "--limit", "8") == 0
    )
    assert "FAIL" not in capsys.readouterr().out
    flags = ("--models", "tiny-vit", "--limit", "10", "--attack", "cosine_pgd.py:cosine_pgd", "--out", "t")
    assert run("analyze", "transfer", *flags) == 0
    assert record(folder / "t")["attack"]["stages"] == found["attack"]["stages"][1:], "a transfer's record has the hash"
    (path,) = (folder / "a" / "result").glob("*.json")
    assert run("repro", path, "--out", "again") == 0
    edit(folder / "cosine_pgd.py")
    capsys.readouterr()
    assert run(*ATTACK, "--out", "b") == 0
    (other,) = (folder / "b" / "result").glob("*.json")
    assert run("compare", path, other) == 2
    assert "stages is" in capsys.readouterr().err, "two versions of a file are two attacks"
    assert run("repro", path, "--out", "more") == 0
    assert "the stages of the attack are other ones" in capsys.readouterr().out


def test_an_attack_that_was_killed_goes_on_and_not_with_another_file(folder, monkeypatch):
    data = load_data("digits", limit=60)
    model = ZeroShotClassifier(load_clip("tiny-vit"), data.class_names).eval()
    with torch.no_grad():
        data = dataclasses.replace(data, y=model(data.batch(slice(None))[0]).argmax(1))  # all right when clean
    given = {"attack": "cosine_pgd.py:cosine_pgd", "eps": "1/255", "batch_size": 15, "progress": False}
    whole = evaluate(model, data, **given)

    def breaks(*args, calls=[], **more):  # noqa: B006  (counts)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_own(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr("rvlm.attacks.stages.run_own", breaks)
        patch.setattr(Keeper, "save_now_and_then", Keeper.save)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, data, state="state.npz", **given)
    again = evaluate(model, data, state="state.npz", **given)
    for name in ("pred_adv", "broken_by", "distance", "margin"):
        assert torch.equal(getattr(whole, name), getattr(again, name))
    edit(folder / "cosine_pgd.py")
    with pytest.raises(ValueError, match="belongs to another evaluation .attack_files was"):
        evaluate(model, data, state="state.npz", **given)


def test_a_frozen_protocol_takes_no_file(folder, capsys):
    (folder / "p.yaml").write_text(
        "name: p\nabout: x\nparts: [digits]\nattacks: {'cosine_pgd.py:cosine_pgd': [1/255]}\n"
    )
    assert run("eval", "--protocol", "p.yaml") == 2 and "a protocol is frozen" in capsys.readouterr().err
    (folder / "p.yaml").write_text("name: p\nabout: x\nparts: ['shapes.py:shapes']\nattacks: {pgd-10: [1/255]}\n")
    assert run("eval", "--protocol", "p.yaml") == 2 and "a protocol is frozen" in capsys.readouterr().err


TRAIN = ("train", "trades.py:Trades", "--student", "tiny-vit", "--limit", "64", "--eval_limit", "20", "--epochs", "1")


def test_a_method_by_the_command_line(folder, capsys):
    assert run(*TRAIN, "--beta", "3", "--eval_attack", "pgd-2", "--out", "a") == 0
    written = {path.name: json.loads(path.read_text()) for path in (folder / "a" / "result").glob("*.json")}
    after = next(one for name, one in written.items() if name.startswith("after"))["model"]
    before = next(one for name, one in written.items() if name.startswith("before"))["model"]
    assert after["method"] == "trades.py:Trades" and len(after["method_sha"]) == 16 and before["method_sha"] is None
    assert (folder / "a" / "config.yaml").read_text().count("beta: 3.0") == 1
    assert run("train", "--config", "a/config.yaml", "--out", "b") == 0, "a run's settings are a config"
    assert run(*TRAIN, "--betta", "3") == 2 and "did you mean --beta?" in capsys.readouterr().err
    assert run(*TRAIN, "--beta", "-1") == 2 and "beta must be at least 0" in capsys.readouterr().err
    assert run("train", "trades.py:Trade") == 2 and "has no callable 'Trade'" in capsys.readouterr().err
    assert run("train", "trades.py:TradesConfig") == 2 and "is no method" in capsys.readouterr().err
    assert run("train", "no.py:Trades") == 3
    assert run("profile", "train", "--method", "trades.py:Trades", "--model", "tiny-vit", "--limit", "64") == 0


def test_a_method_that_was_killed_goes_on_and_not_with_another_file(folder):
    data = load_data("digits", "train", limit=128)

    def fit(out, **settings):
        method = build_method("trades.py:Trades", epochs=2, **settings)
        return train(load_clip("tiny-vit"), data, method, out=out, progress=False)

    whole = fit("whole")
    cls = method_class("trades.py:Trades")
    loss, calls = cls.loss, []

    def breaks(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(self, *args)

    cls.loss = breaks
    with pytest.raises(KeyboardInterrupt):
        fit("killed")
    cls.loss = loss
    state = (folder / "killed" / "state.pt").read_bytes()
    again = fit("killed")
    for a, b in zip(whole.student.parameters(), again.student.parameters(), strict=True):
        assert torch.equal(a, b)
    (folder / "killed" / "state.pt").write_bytes(state)
    edit(folder / "trades.py")
    with pytest.raises(ValueError, match="method_file"):
        fit("killed")


@pytest.mark.slow
def test_the_example_method_is_more_robust_than_plain_training(folder):
    assert run("train", "trades.py:Trades", "--student", "digits-vit", "--eval_limit", "200", "--out", "a") == 0
    before, after = json.loads((folder / "a" / "summary.json").read_text())["rows"]
    assert before["robust"] < 0.1 and after["robust"] > before["robust"] + 0.5 and after["clean"] > 0.85


def test_a_data_set_by_the_command_line(folder, capsys):
    assert run("train", "clip", "--data", "shapes.py:shapes", "--student", "tiny-vit", "--epochs", "1", "--limit",
               "192", "--eval_limit", "20", "--eval_attack", "fgsm", "--out", "clip") == 0  # fmt: skip
    flags = ("eval", "--data", "shapes.py:shapes", "--model", "clip", "--attack", "pgd-2", "--limit", "60")
    assert run(*flags, "--out", "a") == 0
    found = record(folder / "a")
    assert (
        found["data"]["name"] == "shapes" and found["data"]["n_total"] == 300 and len(found["data"]["file_sha"]) == 16
    )
    (path,) = (folder / "a" / "result").glob("*.json")
    assert run("repro", path, "--out", "again") == 0
    assert run("data", "check", "shapes.py:shapes") == 0
    assert run(*flags, "--size", "16", "--out", "small") == 0
    assert record(folder / "small")["input"]["attack_res"] == [16, 16]
    (small,) = (folder / "small" / "result").glob("*.json")
    assert run("repro", small, "--out", "small again") == 0
    edit(folder / "shapes.py")
    capsys.readouterr()
    assert run("repro", path, "--out", "more") == 2
    assert "the file that reads it has the hash" in capsys.readouterr().err
    assert run(*flags, "--out", "b") == 0
    (other,) = (folder / "b" / "result").glob("*.json")
    assert run("compare", path, other) == 2 and "data file is" in capsys.readouterr().err


def test_what_is_no_data_set(folder):
    (folder / "bad.py").write_text(
        "import dataclasses, torch\nfrom shapes import shapes\n"
        "def nothing(split): pass\n"
        "def twice(split): return dataclasses.replace(shapes(split), index=torch.zeros(300, dtype=torch.int64))\n"
        "def floats(split): return dataclasses.replace(shapes(split), read=lambda i: torch.rand(len(i), 3, 8, 8))\n"
        "def names(split): return dataclasses.replace(shapes(split), class_names=['disc'])\n"
        "def fixed(): return shapes('test')\n"
    )
    for name, said in {
        "nothing": "must return an rvlm.data.Data, it returned NoneType", "twice": "1 different ones",
        "floats": r"uint8 \[B, 3, H, W\], it returned torch.float32", "names": "1 class names",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=said):
            load_data(f"bad.py:{name}")
    with pytest.raises(ValueError, match="shapes has the splits train, test, not 'val'"):
        load_data("shapes.py:shapes", "val")
    assert len(load_data("bad.py:fixed", "train")) == 300, "without a split there is one"
    assert load_data("bad.py:fixed", size=32).batch(slice(2))[0].shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="takes no size, and its images have 32 x 32 pixels, not 16"):
        load_data("bad.py:fixed", size=16)
    half = load_data("shapes.py:shapes+classes=base", limit=10)
    assert half.class_names == ["disc", "square"] and len(half) == 10 and half.file_sha


@pytest.mark.slow
def test_two_processes_find_what_one_finds(folder):
    flags = ["-m", "rvlm", "eval", "--data", "shapes.py:shapes", "--model", "tiny-vit", "--limit", "70", "--batch-size",
             "16", "--attack", "fgsm,cosine_pgd.py:cosine_pgd", "--eps", "1/255"]  # fmt: skip
    for out, launcher in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
    ):
        words = [sys.executable, *launcher, *flags, "--out", out]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (np.load(folder / out / record(folder / out)["samples"]) for out in ("one", "two"))
    assert record(folder / "two")["perf"]["processes"] == 2
    for name in one.files:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
