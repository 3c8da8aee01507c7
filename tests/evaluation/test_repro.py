"""Records rerun: they hold, or it is said what does not; other weights and other samples are refused."""

import json

import numpy as np
import pytest
import torch

from rvlm.cli import main
from rvlm.models import load_clip

PLAIN = """
import torch
weight = torch.randn(3072, 10, generator=torch.Generator().manual_seed(0))
def model(x):
    return x.flatten(1) @ weight
"""


def run(*argv):
    return main([str(word) for word in argv])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run and the path of its record."""
    out = tmp_path_factory.mktemp("run")
    argv = ["eval", "--model", "tiny-vit", "--eps", "2/255", "--attack", "pgd-2", "--limit", "30", "--out", out]
    assert run(*argv, "--batch-size", "8", "--seed", "3") == 0
    return next((out / "result").glob("*.json"))


def copied(recorded, folder, change=lambda record: None, columns=lambda columns: None):
    """The record elsewhere, changed."""
    record = json.loads(recorded.read_text())
    change(record)
    with np.load(recorded.parents[1] / record["samples"]) as file:
        arrays = {name: file[name] for name in file.files}
    columns(arrays)
    for name in ("result", "samples"):
        (folder / name).mkdir()
    np.savez(folder / record["samples"], **arrays)
    path = folder / "result" / recorded.name
    path.write_text(json.dumps(record))
    return path


def one_more_is_robust(columns):
    columns["broken_by"][(columns["broken_by"] != -1).nonzero()[0][0]] = -1


def test_a_record_holds(recorded, tmp_path, capsys):
    assert run("repro", recorded, "--out", tmp_path / "again") == 0
    text = capsys.readouterr().out
    assert "holds: here" in text and "0 of 30 verdicts changed" in text
    again = json.loads((tmp_path / "again" / "result" / recorded.name).read_text())
    old = json.loads(recorded.read_text())
    assert again["metrics"] == old["metrics"] and again["attack"] == old["attack"] and again["data"] == old["data"]
    assert json.loads((tmp_path / "again" / "repro.json").read_text())["holds"]


def test_on_the_same_machine_every_verdict_counts(recorded, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("verdicts need not be the same on a GPU")
    path = copied(recorded, tmp_path, columns=one_more_is_robust)
    assert run("repro", path, "--out", tmp_path / "again") == 4
    assert "DOES NOT HOLD: here every verdict must be the same" in capsys.readouterr().out


def test_elsewhere_the_interval_counts(recorded, tmp_path, capsys):
    def elsewhere(record):
        record["env"]["torch"] = "0.1"

    path = copied(recorded, tmp_path, elsewhere, one_more_is_robust)
    assert run("repro", path, "--out", tmp_path / "again") == 0
    text = capsys.readouterr().out
    assert "not as it was: torch was 0.1" in text and "holds: here accuracies must lie in the recorded" in text

    def better(record):
        elsewhere(record)
        record["metrics"]["clean_acc"]["ci95"] = [0.99, 1.0]
        record["attack"]["stages"][0]["settings"]["steps"] = 3

    (tmp_path / "other").mkdir()
    path = copied(recorded, tmp_path / "other", better)
    assert run("repro", path, "--json", "--out", tmp_path / "again") == 4
    text = capsys.readouterr().out
    assert '"holds": false' in text and "the stages of the attack are other ones" in text


def test_other_weights_and_other_samples_are_refused(recorded, tmp_path, capsys):
    load_clip("tiny-vit", seed=7).save(tmp_path / "other")
    assert run("repro", recorded, "--model", tmp_path / "other") == 2
    assert "the model is not the recorded one: its weights have the hash" in capsys.readouterr().err
    assert run("repro", recorded, "--data", "digits+classes=base") == 2
    assert "of 30 samples, such as" in capsys.readouterr().err
    path = copied(recorded, tmp_path, lambda record: record["data"].update(fingerprint="0"))
    assert run("repro", path) == 2
    assert "is not the recorded data" in capsys.readouterr().err


def test_another_normalisation_is_another_model(tmp_path, capsys):
    load_clip("tiny-vit").save(tmp_path / "model")
    argv = ["eval", "--model", tmp_path / "model", "--limit", "10", "--attack", "fgsm", "--out", tmp_path / "run"]
    assert run(*argv) == 0
    path = next((tmp_path / "run" / "result").glob("*.json"))
    file = tmp_path / "model" / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["preprocess_cfg"]["mean"] = [0.25, 0.25, 0.25]
    file.write_text(json.dumps(config))
    assert run("repro", path) == 2
    assert "clip.mean was [0.5, 0.5, 0.5], is [0.25, 0.25, 0.25]" in capsys.readouterr().err


def test_data_of_one_name_with_other_pixels_are_told_apart(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 200, (10, 32, 32, 3), dtype=np.uint8)
    for kind, x in (("clean", pixels), ("bright", pixels + 50)):
        (tmp_path / kind).mkdir()
        np.savez(tmp_path / kind / "test.npz", x=x, y=np.arange(10))
        argv = ["eval", "--model", "tiny-vit", "--data", f"npz:{tmp_path}/{kind}/test.npz", "--attack", "fgsm"]
        assert run(*argv, "--out", tmp_path / kind) == 0
    clean, bright = (next((tmp_path / kind / "result").glob("*.json")) for kind in ("clean", "bright"))
    assert run("compare", clean, bright) == 2 and "first image is" in capsys.readouterr().err
    assert run("compare", clean, clean) == 0
    assert run("repro", clean, "--data", f"npz:{tmp_path}/bright/test.npz", "--out", tmp_path / "again") == 2
    assert "its first image is another one" in capsys.readouterr().err


def test_what_is_no_record(recorded, tmp_path, capsys):
    assert run("repro") == 2 and "repro takes a record" in capsys.readouterr().err
    assert run("repro", tmp_path / "none.json") == 3
    path = copied(recorded, tmp_path, lambda record: record.update(schema="rvlm.retrieval/1"))
    assert run("repro", path) == 2
    assert "can be rerun" in capsys.readouterr().err
    (tmp_path / json.loads(path.read_text())["samples"]).unlink()
    path.write_text(path.read_text().replace("rvlm.retrieval/1", "rvlm.result/1"))
    assert run("repro", path) == 3


def test_transfer_from_a_users_file_on_a_users_data(tmp_path):
    (tmp_path / "mine.py").write_text(PLAIN)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", x=pixels, y=np.arange(12) % 10)
    argv = ["eval", "--model", f"{tmp_path}/mine.py:model", "--data", f"npz:{tmp_path}/mine.npz", "--limit", "9"]
    assert run(*argv, "--source", "tiny-rn", "--attack", "fgsm", "--out", tmp_path / "run") == 0
    path = next((tmp_path / "run" / "result").glob("*.json"))
    assert run("repro", path, "--out", tmp_path / "again") == 0


def test_of_training_the_trained_model(tmp_path):
    argv = ["train", "tecoa", "--student", "tiny-vit", "--epochs", "1", "--limit", "32", "--eval_limit", "20"]
    assert run(*argv, "--eval_attack", "fgsm", "--out", tmp_path / "run") == 0
    for name in ("before", "after"):
        path = next((tmp_path / "run" / "result").glob(f"{name}*.json"))
        assert run("repro", path, "--out", tmp_path / name) == 0


def test_of_training_a_defence_under_transfer(tmp_path, capsys):
    argv = ["train", "r_adapt", "--student", "tiny-vit", "--epochs", "1", "--batch_size", "32", "--steps", "1"]
    argv += ["--limit", "32", "--eval_limit", "20", "--eval_attack", "fgsm", "--out", tmp_path / "run"]
    assert run(*argv) == 0
    path = next((tmp_path / "run" / "result").glob("after-transfer*.json"))
    record = json.loads(path.read_text())
    assert record["source"]["sha256"] != record["model"]["sha256"] and record["source"]["name"] == "tiny-vit"
    assert run("repro", path, "--out", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "summary.json").read_text())["rows"][0]
    assert (again["target"], again["robust"]) == ("transfer", record["metrics"]["robust_acc"]["v"])
    path.write_text(json.dumps(record | {"source": None}))
    assert run("repro", path) == 2 and "does not say from which model" in capsys.readouterr().err


def test_a_part_of_a_protocol(tmp_path):
    argv = ["eval", "--protocol", "digits-demo", "--model", "tiny-vit", "--limit", "10", "--out", tmp_path / "run"]
    assert run(*argv) == 0
    path = sorted((tmp_path / "run" / "result").glob("*.json"))[0]
    assert run("repro", path, "--out", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "result" / path.name).read_text())
    assert again["protocol"] == json.loads(path.read_text())["protocol"] and again["status"] == "partial"
