"""Adversarial images saved and shown to models again: the same verdicts on their own, transfer on others."""

import json

import numpy as np
import pytest
import torch

from rvlm.cli import main
from rvlm.evaluation import load_images

FILES = {"safetensors": "adversarial.safetensors", "npz": "adversarial.npz", "wds": "adversarial"}


def run(*argv):
    return main([str(word) for word in argv])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By format: run folders of one attack, on the grid of 8 bits."""
    folders = {}
    for kind in FILES:
        folders[kind] = tmp_path_factory.mktemp(kind)
        argv = ["attack", "--model", "tiny-vit", "--limit", "40", "--attack", "pgd-3", "--seed", "2", "--save-png"]
        assert run(*argv, "--format", kind, "--out", folders[kind]) == 0
    return folders


def record(folder):
    return json.loads(next((folder / "result").glob("*.json")).read_text())


def test_all_formats_hold_the_same(made):
    first, *others = (load_images(made[kind] / file) for kind, file in FILES.items())
    assert first.facts["attack"] == "pgd-3" and first.facts["eps"] == "8/255" and first.facts["quantize"] == "255"
    for other in others:
        assert other.facts == first.facts and torch.equal(other.x_adv, first.x_adv)
        assert all(torch.equal(getattr(other, name), getattr(first, name)) for name in ("y", "index", "broken_by"))


@pytest.mark.parametrize("kind", FILES)
def test_on_their_own_model_the_verdicts_are_the_same(made, kind, tmp_path):
    assert run("eval", "--images", made[kind] / FILES[kind], "--model", "tiny-vit", "--out", tmp_path) == 0
    now, then = record(tmp_path), record(made[kind])
    assert now["threat"] == then["threat"] and now["threat"]["target"] == "white-box" and now["source"] is None
    for name in ("clean_acc", "robust_acc"):
        assert now["metrics"][name] == then["metrics"][name]
    assert all(check["ok"] for check in now["checks"]) and now["attack"]["seed"] == 2
    assert now["images"]["model"] == "tiny-vit" and now["data"]["fingerprint"] == then["data"]["fingerprint"]


def test_on_another_model_it_is_transfer(made, tmp_path, capsys):
    file = made["safetensors"] / FILES["safetensors"]
    assert run("eval", "--images", file, "--model", "tiny-rn", "--out", tmp_path / "saved") == 0
    argv = ["eval", "--source", "tiny-vit", "--model", "tiny-rn", "--limit", "40", "--attack", "pgd-3", "--seed", "2"]
    assert run(*argv, "--out", tmp_path / "made") == 0
    saved, made_now = record(tmp_path / "saved"), record(tmp_path / "made")
    assert saved["threat"] == made_now["threat"] and saved["source"]["sha256"] == made_now["source"]["sha256"]
    weak = next(check for check in saved["checks"] if check["id"] == "made_for_transfer")
    assert not weak["ok"] and "stop where they fool their own model: rvlm eval --source" in weak["detail"]
    assert "WARNING made_for_transfer" in capsys.readouterr().err
    assert saved["metrics"]["clean_acc"] == made_now["metrics"]["clean_acc"]
    path = next((tmp_path / "saved" / "result").glob("*.json"))
    assert run("repro", path) == 2 and "rvlm eval --images FILE" in capsys.readouterr().err


def test_images_made_for_transfer_are_as_strong_on_the_model_that_they_were_made_for(tmp_path):
    threat = ["--model", "tiny-rn", "--source", "tiny-vit", "--limit", "40", "--attack", "pgd-3"]
    assert run("attack", *threat, "--out", tmp_path / "made") == 0
    file = tmp_path / "made" / FILES["safetensors"]
    assert run("eval", "--images", file, "--model", "tiny-rn", "--out", tmp_path / "saved") == 0
    made, saved = record(tmp_path / "made"), record(tmp_path / "saved")
    assert saved["threat"] == made["threat"] and saved["metrics"]["robust_acc"] == made["metrics"]["robust_acc"]
    assert saved["source"]["sha256"] == made["source"]["sha256"] and all(check["ok"] for check in saved["checks"])
    other = load_images(file).as_transfer(torch.ones(40, dtype=torch.bool))
    assert not other["ok"] and "images were never attacked" in other["detail"]


def test_images_that_break_their_word_are_named(made, tmp_path):
    with np.load(made["npz"] / FILES["npz"]) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["x_adv"] = 1 - arrays["x_adv"]
    np.savez(tmp_path / "far.npz", **arrays)
    assert run("eval", "--images", tmp_path / "far.npz", "--model", "tiny-vit", "--out", tmp_path / "run") == 0
    failed = {check["id"] for check in record(tmp_path / "run")["checks"] if not check["ok"]}
    assert "eps_respected" in failed


def test_what_does_not_fit_is_refused(made, tmp_path, capsys):
    file = made["npz"] / FILES["npz"]
    for argv, code, message in (
        (["--images", tmp_path / "none.npz"], 3, "no images at"),
        (["--images", file, "--eps", "4/255"], 2, "says what --eps is"),
        (["--images", file, "--data", "digits+classes=base"], 2, "samples, such as"),
        (["--images", file, "--split", "train"], 2, "such as"),
        (["--images", file, "--size", "16"], 2, "holds images [3, 32, 32], the data [3, 16, 16]"),
        (["--images", file, "--protocol", "digits-demo"], 2, "what --images is"),
    ):
        assert run("eval", "--model", "tiny-vit", *argv) == code
        assert message in capsys.readouterr().err
    with np.load(file) as arrays:
        np.savez(tmp_path / "bare.npz", x_adv=arrays["x_adv"], y=arrays["y"])
    with pytest.raises(ValueError, match="lacks index, broken_by, attack, eps"):
        load_images(tmp_path / "bare.npz")
    assert run("attack", "--model", "tiny-vit", "--format", "zip") == 2
    assert "unknown format 'zip': expected safetensors, npz, wds" in capsys.readouterr().err
