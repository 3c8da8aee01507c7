"""The command line: help without torch, errors that say what to do, runs that leave complete folders."""

import contextlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from rvlm.cli import COMMANDS, main
from rvlm.data import load_data
from rvlm.ranks import Ranks


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A checkpoint of a tiny CLIP with random weights, so that no test waits for training."""
    from rvlm.models import load_clip

    folder = tmp_path_factory.mktemp("tiny")
    load_clip("tiny-vit").save(folder)
    return str(folder)


def run(*argv):
    try:
        return main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], *[[name, "--help"] for name in COMMANDS]])
def test_help_needs_no_torch(argv):
    code = "import sys; from rvlm.cli import main; assert main(sys.argv[1:]) == 0 and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rvlm" in done.stdout or argv == ["--version"]
    if argv[:1] == ["eval"] and importlib.util.find_spec("docstring_parser"):
        assert "Radii in pixel units" in done.stdout, "every setting is explained"


@pytest.mark.parametrize("argv, code, message", [
    (["evall"], 2, "unknown command 'evall': did you mean eval?"),
    (["eval", "--epz", "3"], 2, "unknown setting --epz: did you mean --eps?"),
    (["eval", "--eps", "4"], 2, "did you mean 4/255?"),
    (["attack", "--eps", "4"], 2, "did you mean 4/255?"),
    (["attack", "--eps", "x"], 2, "fraction such as 4/255"),
    (["eval", "--attack", "apgd"], 2, "expected fgsm, pgd-STEPS"),
    (["eval", "--limit", "many"], 2, "limit"),
    (["eval", "--data", "npz:/nope.npz"], 3, "no file /nope.npz"),
    (["eval", "--data", "cifar"], 2, "expected digits, npz:PATH"),
    (["eval", "--model", "/no/such/folder"], 3, "lacks open_clip_model.safetensors"),
    (["eval", "--model", "ViT-B-31"], 2, "unknown model 'ViT-B-31'"),
    (["eval", "--config", "nope.yaml"], 3, "no config nope.yaml"),
    (["check", "/no/file.py:model"], 3, "no file /no/file.py"),
    (["train"], 2, "which method?"),
    (["train", "tecoaa"], 2, "did you mean 'tecoa'"),
    (["train", "tecoa", "--epochz", "3"], 2, "unknown setting --epochz: did you mean --epochs?"),
    (["train", "tecoa", "--preset", "best"], 2, "no preset 'best'"),
    (["train", "tecoa", "--eps", "4"], 2, "did you mean 4/255?"),
    (["train", "tecoa", "--shots", "2", "--limit", "9"], 2, "limit and shots both choose the samples"),
    (["ls", "cats"], 2, "cannot list 'cats'"),
])  # fmt: skip
def test_mistakes_are_explained(argv, code, message, capsys):
    assert run(*argv) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_unknown_keys_in_a_config_are_named(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("method: tecoa\nepoch: 3\n")
    assert run("train", "--config", tmp_path / "c.yaml") == 2
    assert "unknown setting --epoch: did you mean --epochs?" in capsys.readouterr().err


def test_ls(capsys):
    assert run("ls") == 0
    text = capsys.readouterr().out
    assert "tecoa (presets: paper, code, robustvlm, rvlm)" in text and "digits/tecoa" in text
    assert run("ls", "recipes") == 0 and "tecoa (presets" not in capsys.readouterr().out


def test_eval_leaves_a_complete_run(cache, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["eval", "--model", cache, "--eps", "2/255,0.03", "--attack", "pgd-2", "--limit", "30", "--out", out]
    assert run(*argv) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [row["eps"] for row in summary["rows"]] == ["2/255", "0.03"]
    for row in summary["rows"]:
        record = json.loads((out / row["record"]).read_text())
        assert record["metrics"]["clean_acc"]["v"] == row["clean"] and record["status"] == "partial"
        assert (out / record["samples"]).is_file()
    manifest = json.loads((out / "manifest.json").read_text())
    assert (out / "accuracy.png").is_file() and manifest["status"] == "complete"
    assert f"torch=={importlib.metadata.version('torch')}" in manifest["packages"]
    assert yaml.safe_load((out / "config.yaml").read_text())["eps"] == "2/255,0.03"
    # The saved config is itself a valid --config, and gives the same numbers.
    assert run("eval", "--config", out / "config.yaml", "--out", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "summary.json").read_text())["rows"]
    assert [(r["clean"], r["robust"]) for r in again] == [(r["clean"], r["robust"]) for r in summary["rows"]]
    assert "robust %" in capsys.readouterr().out


def test_attack_writes_images_that_fool_the_model_from_disk(cache, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [
        "attack",
        "--model",
        cache,
        "--eps",
        "8/255",
        "--attack",
        "pgd-3",
        "--limit",
        "24",
        "--save-png",
        "--out",
        out,
    ]
    assert run(*argv) == 0
    row = json.loads((out / "summary.json").read_text())["rows"][0]
    assert row["png"]["written"] == row["png"]["still_fool"] == len(list((out / "png").iterdir()))
    assert (out / "adversarial.safetensors").is_file() and (out / "images.png").is_file()
    assert yaml.safe_load((out / "config.yaml").read_text())["eps"] == "8/255", "as it was written"
    assert "PNGs still fool the model" in capsys.readouterr().out


def test_transfer(cache, tmp_path):
    argv = ["eval", "--model", cache, "--source", "tiny-rn", "--attack", "fgsm", "--limit", "20", "--out", tmp_path]
    assert run(*argv) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["rows"][0]["target"] == "transfer"


def test_analyze_transfer(cache, tmp_path, capsys):
    argv = ["analyze", "transfer", "--models", f"{cache},tiny-rn", "--targets", cache, "--attack", "fgsm"]
    assert run(*argv, "--limit", "20", "--out", tmp_path) == 0
    assert "| (clean) |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert [(row["source"], row["name"], row["target"]) for row in rows] == [
        (cache, cache, "white-box"), ("tiny-rn", cache, "transfer")
    ]  # fmt: skip
    record = json.loads((tmp_path / rows[0]["record"]).read_text())
    assert record["robust_acc"] == [[row["robust"]] for row in rows] and record["status"] == "partial"
    assert record["models"]["tiny-rn"]["model"]["sha256"]
    assert np.load(tmp_path / record["samples"])["correct"].shape == (2, 1, 20)
    assert (tmp_path / "transfer.png").is_file() and (tmp_path / "transfer.csv").is_file()
    assert run("analyze", "cookies") == 2
    assert "expected transfer" in capsys.readouterr().err


def test_processes_with_different_settings_are_refused(monkeypatch, capsys):
    class Two(Ranks):
        def gather(self, mine):
            return [mine, mine + "seed: 1"]

    monkeypatch.setattr("rvlm.commands.shared.joined", lambda: contextlib.nullcontext(Two()))
    assert run("eval") == 2
    assert "different settings" in capsys.readouterr().err


def test_check_of_a_users_file(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\nweight = torch.randn(3072, 10, generator=torch.Generator().manual_seed(0))\n"
        "def model(x):\n    return x.flatten(1) @ weight.to(x.device)\n"
        "def soft(x):\n    return model(x).softmax(1)\n"
    )
    assert run("check", f"{tmp_path}/mine.py:model") == 0
    assert "ok" in capsys.readouterr().out
    assert run("check", f"{tmp_path}/mine.py:soft") == 4
    text = capsys.readouterr().out
    assert "FAIL" in text and "probabilities" in text
    assert run("check", f"{tmp_path}/mine.py:modell") == 2
    assert "has no callable 'modell'; it has model, soft" in capsys.readouterr().err


def test_train_by_recipe_and_flags(tmp_path, capsys):
    argv = [
        "train",
        "--config",
        "digits/tecoa",
        "--student",
        "tiny-vit",
        "--epochs",
        "1",
        "--limit",
        "64",
        "--eps",
        "4/255",
    ]
    assert run(*argv, "--eval_attack", "pgd-2", "--eval_limit", "20", "--out", tmp_path) == 0
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["before", "after"] and {row["target"] for row in rows} == {"white-box"}
    assert rows[0]["eps"] == "4/255"
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["method"] == "tecoa" and config["epochs"] == 1 and config["lr"] == 1e-3
    assert run("eval", "--model", tmp_path, "--attack", "fgsm", "--limit", "10", "--out", tmp_path / "eval") == 0
    assert run("train", "--config", tmp_path / "config.yaml", "--out", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "summary.json").read_text())["rows"]
    assert [(r["clean"], r["robust"]) for r in again] == [(r["clean"], r["robust"]) for r in rows]


@pytest.mark.parametrize("method, flags", [
    ("fare", ["--validate", "16"]),
    ("pmg_aft", []),
    ("hpt_gpd", ["--proxy", "tiny-rn", "--ga_epochs", "1"]),
    ("mmt_ard", ["--robust_teacher", "tiny-vit", "--clean_teacher", "tiny-rn", "--lora_rank", "2"]),
])  # fmt: skip
def test_train_every_method(tmp_path, monkeypatch, method, flags):
    monkeypatch.setenv("RVLM_CACHE", str(tmp_path / "cache"))
    quick = ["--student", "tiny-vit", "--epochs", "1", "--limit", "64", "--eval_limit", "16", "--eval_attack", "fgsm"]
    assert run("train", method, *quick, *flags, "--out", tmp_path / "run") == 0
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["before", "after"]
    record = json.loads((tmp_path / "run" / rows[1]["record"]).read_text())
    assert record["model"]["method"] == method and not (tmp_path / "run" / "state.pt").exists()
    assert (tmp_path / "run" / "best").is_dir() == ("--validate" in flags)
    assert run("eval", "--model", tmp_path / "run", "--limit", "8", "--attack", "fgsm", "--out", tmp_path / "eval") == 0


MINE = """
import torch
from torch.nn import functional as F

def attack(model, images, labels, epsilon, step_size, num_steps):
    x_adv = images.clone()
    for _ in range(num_steps):
        x_adv.requires_grad_()
        grad, = torch.autograd.grad(F.cross_entropy(model(x_adv), labels), x_adv)
        x_adv = x_adv.detach() + step_size * grad.sign()
        x_adv = (images + (x_adv - images).clamp(-epsilon, epsilon)).clamp(0, 1)
    return x_adv

def twice(model, images, labels, steps):
    return attack(model, images, labels, 16 / 255, 8 / 255, steps)

def model(x):
    return torch.cat([x.mean((2, 3)), x.square().mean((2, 3)), -x.amax((2, 3)), x[:, :1, 4, 4]], 1)
"""


def test_bench_mine(tmp_path, cache, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    flags = ("--model", cache, "--limit", "60", "--steps", "2", "--rounds", "2", "--mine")
    assert run("bench", *flags, f"{tmp_path}/mine.py:attack") == 0
    text = capsys.readouterr().out
    assert "ok   strength" in text and "rvlm's pgd" in text and "it takes" in text and "takes no" not in text
    assert run("bench", *flags, f"{tmp_path}/mine.py:twice", "--json") == 4
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and [f["id"] for f in found["findings"] if not f["ok"]] == ["ball"]
    assert found["passed"] == ["steps"] and found["ratio_min"] <= found["ratio"] <= found["ratio_max"]
    assert run("bench", *flags, f"{tmp_path}/mine.py:twice", "--alpha", "1/255", "--eps", "8/255") == 4
    text = capsys.readouterr().out
    assert "FAIL ball" in text and "takes no eps, alpha: it must use what this command was given" in text
    assert run("bench", "steps", *flags, f"{tmp_path}/mine.py:attack") == 2
    assert "go without it" in capsys.readouterr().err


def test_profile_infer(cache, tmp_path, capsys):
    from rvlm.methods import build_method
    from rvlm.models import load_clip
    from rvlm.training import train

    clip = load_clip(cache)
    train(clip, load_data("digits", "train", limit=8), build_method("r_adapt", anchor="white"), out=tmp_path / "run",
          progress=False)  # fmt: skip
    (tmp_path / "twice.py").write_text(
        "from rvlm.models import load_clip\n"
        f"clip = load_clip({cache!r})\n"
        "def twice(x):\n    return sum(clip.encode_pixels(x) @ clip.encode_pixels(x).T for _ in range(3))[:, :10]\n"
        "def nan(x):\n    return clip.encode_pixels(x)[:, :10] * float('nan')\n"
    )
    slower = f"{tmp_path / 'twice.py'}:twice"
    argv = [
        "profile",
        "infer",
        "--model",
        cache,
        "--defended",
        f"{tmp_path / 'run'}, {slower}",
        "--batch_sizes",
        "1,16",
    ]
    assert run(*argv, "--rounds", "5", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["batch"]) for row in found["rows"]] == [
        (name, size) for size in (1, 16) for name in (cache, str(tmp_path / "run"), slower)
    ]  # fmt: skip
    assert [row["passes"] for row in found["rows"]] == [10, 5, 5] * 2, "the plain model has a pass in every pair"
    for row in found["rows"]:
        assert row["latency_ms_q1"] <= row["latency_ms"] <= row["latency_ms_q3"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["latency_ms"])
        assert (row["ratio"] is None) == (row["name"] == cache) and (row["phases_ms"] == {}) == (row["name"] == slower)
        assert sum(row["phases_ms"].values()) <= 1.5 * row["latency_ms"] and row["peak_mb"] > 0
    plain, adapted, slow = found["rows"][3:]
    assert slow["ratio"] > 2 and found["env"]["torch"], "six passes for one"
    assert plain["phases_ms"].keys() == {"pixels", "tower", "head"}
    assert adapted["weights_mb"] > plain["weights_mb"] > 0
    assert run(*argv, "--rounds", "2") == 0
    assert "| model | batch | ms |" in capsys.readouterr().out
    for flags, message in (
        (["--defended", f"{tmp_path / 'twice.py'}:nan"], "returns logits that are not finite"),
        (["--batch_sizes", "many"], "whole numbers separated by commas"),
        (["--batch_sizes", "4", "--limit", "2"], "a batch of 4 needs as many images, got 2"),
        (["--batch_sizes", "0"], "batch sizes of at least 1"),
        (["--rounds", "1"], "2 rounds or more"),
        (["--defended", cache], "name every model once"),
    ):
        assert run("profile", "infer", "--model", cache, *flags) == 2
        assert message in capsys.readouterr().err


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "rvlm", "ls", "attacks"], capture_output=True, text=True)
    assert done.returncode == 0 and "pgd-STEPS" in done.stdout


def test_recipes_are_valid_configs(capsys):
    for path in (Path(__file__).parents[1] / "rvlm" / "recipes").rglob("*.yaml"):
        name = f"{path.parent.name}/{path.stem}"
        assert run("train", "--config", name, "--print_config") == 0
        assert "method: " in capsys.readouterr().out


def test_train_on_few_shots_of_the_base_classes(tmp_path, capsys):
    argv = ["train", "tecoa", "--student", "tiny-vit", "--epochs", "1", "--data", "digits+classes=base", "--shots", "3"]
    new = ["--eval_data", "digits+classes=new", "--eval_attack", "fgsm", "--eval_limit", "20"]
    assert run(*argv, *new, "--out", tmp_path) == 0
    assert "trained on 15 images" in capsys.readouterr().out
    row = json.loads((tmp_path / "summary.json").read_text())["rows"][1]
    assert json.loads((tmp_path / row["record"]).read_text())["data"]["name"] == "digits+classes=new"
