"""Records rerun: they hold, or it is said what does not; other weights and other samples are refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from rvlm.cli import main
from rvlm.models import load_clip
from rvlm.models.weights import weights_of

PLAIN = """
import torch
weight = torch.randn(3072, 10, generator=torch.Generator().manual_seed(0))
def model(x):
    return x.flatten(1) @ weight.to(x.device)
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


def test_a_record_holds(recorded, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(recorded.parent)
    assert run("repro", recorded.name, "--out", tmp_path / "again") == 0
    text = capsys.readouterr().out
    assert "holds: here" in text and "0 of 30 verdicts changed" in text
    again = json.loads((tmp_path / "again" / "result" / recorded.name).read_text())
    old = json.loads(recorded.read_text())
    assert again["metrics"] == old["metrics"] and again["attack"] == old["attack"] and again["data"] == old["data"]
    assert json.loads((tmp_path / "again" / "repro.json").read_text())["holds"]


def test_a_record_from_before_some_switches_were_noted_still_counts_verdict_by_verdict(recorded, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("verdicts need not be the same on a GPU")
    path = copied(recorded, tmp_path, lambda record: record["env"].pop("sdpa"))
    assert run("repro", path, "--out", tmp_path / "again") == 0
    assert "holds: here every verdict must be the same" in capsys.readouterr().out


def test_on_the_same_machine_every_verdict_counts(recorded, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("verdicts need not be the same on a GPU")
    path = copied(recorded, tmp_path, columns=one_more_is_robust)
    assert run("repro", path, "--out", tmp_path / "again") == 4
    text = capsys.readouterr().out
    assert "DOES NOT HOLD: here every verdict must be the same" in text
    [changed] = json.loads((tmp_path / "again" / "repro.json").read_text())["samples"]["robust"]
    assert f"1 of 30 verdicts changed: samples {changed}\n" in text


def test_elsewhere_the_interval_counts(recorded, tmp_path, capsys):
    def elsewhere(record):
        record["env"]["torch"] = "0.1"

    path = copied(recorded, tmp_path, elsewhere, one_more_is_robust)
    assert run("repro", path, "--out", tmp_path / "again") == 0
    text = capsys.readouterr().out
    assert "not as it was: torch was 0.1" in text and "holds: here figures must lie in the recorded" in text

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
    path = copied(recorded, tmp_path, lambda record: record.update(schema="rvlm.analysis/1"))
    assert run("repro", path) == 2
    assert "can be rerun" in capsys.readouterr().err
    path.write_text(path.read_text().replace("rvlm.analysis/1", "rvlm.retrieval/1"))
    assert run("repro", path) == 2
    assert "is not of a record rvlm.retrieval/1: it lacks 'text_clean'" in capsys.readouterr().err
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


def say_other_weights(path, was, now):
    """Makes a record tell the hash of weights that did not make its numbers."""
    shas = [weights_of(load_clip(str(folder))) for folder in (was, now)]
    path.write_text(path.read_text().replace(*shas))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models in folders: two, and one of other weights."""
    made = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b", "other")):
        load_clip("tiny-vit", seed=seed).save(made / name)
    return made


@pytest.fixture
def pictures(tmp_path):
    """Karpathy's layout: 30 images with two captions each."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    images = []
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        sentences = [{"raw": f"picture {i} of {k}"} for k in range(2)]
        images.append({"filename": f"{i}.png", "split": "test", "sentences": sentences})
    (tmp_path / "captions.json").write_text(json.dumps({"images": images}))
    return f"captions:{tmp_path}/captions.json"


@pytest.mark.parametrize("source", [[], ["--source", "b"]])
def test_of_retrieval(source, folders, pictures, tmp_path, capsys):
    argv = ["eval", "--model", folders / "a", "--data", pictures, "--size", "32", "--attack", "sga-2", "--limit", "24"]
    argv += [source[0], folders / source[1]] if source else []
    assert run(*argv, "--eps", "8/255", "--seed", "3", "--batch-size", "10", "--out", tmp_path / "run") == 0
    path = next((tmp_path / "run" / "result").glob("*.json"))
    assert run("repro", path, "--out", tmp_path / "again") == 0
    text = capsys.readouterr().out
    assert "holds: here" in text and "robust image_r@10" in text and "0 of 48 verdicts changed" in text
    again = json.loads((tmp_path / "again" / "result" / path.name).read_text())
    assert again["metrics"] == json.loads(path.read_text())["metrics"]
    assert run("repro", path, "--model", folders / "other", "--out", tmp_path / "no") == 2
    assert "the model is not the recorded one" in capsys.readouterr().err
    say_other_weights(path, folders / "a", folders / "other")
    assert run("repro", path, "--model", folders / "other", "--out", tmp_path / "no") == 4
    assert "DOES NOT HOLD" in capsys.readouterr().out
    found = json.loads((tmp_path / "no" / "repro.json").read_text())
    changed = found["samples"]["clean text_r@5"] + found["samples"]["clean image_r@5"]
    assert (
        changed
        and max(changed) < 48
        and len(found["samples"]["clean image_r@5"]) == found["changed"]["clean image_r@5"]
    )


def test_of_a_transfer_matrix(folders, tmp_path, capsys):
    both = f"{folders}/a,{folders}/b"
    argv = ["analyze", "transfer", "--models", both, "--limit", "20", "--attack", "pgd-2", "--batch-size", "7"]
    assert run(*argv, "--seed", "3", "--out", tmp_path / "run") == 0
    path = tmp_path / "run" / "result" / "transfer.json"
    assert run("repro", path, "--out", tmp_path / "again") == 0
    text = capsys.readouterr().out
    assert f"{folders}/b, images of {folders}/a" in text and f"{folders}/b, clean" in text and "holds: here" in text
    again = json.loads((tmp_path / "again" / "result" / "transfer.json").read_text())
    assert again["robust_acc"] == json.loads(path.read_text())["robust_acc"]
    changed = f"{folders}/a,{folders}/other"
    assert run("repro", path, "--model", changed, "--out", tmp_path / "no") == 2
    assert f"the {folders}/b is not the recorded one" in capsys.readouterr().err
    assert run("repro", path, "--model", folders / "a") == 2 and "as many as --model A,B" in capsys.readouterr().err
    say_other_weights(path, folders / "b", folders / "other")
    assert run("repro", path, "--model", changed, "--out", tmp_path / "no") == 4
    assert "DOES NOT HOLD" in capsys.readouterr().out
    found = json.loads((tmp_path / "no" / "repro.json").read_text())
    assert found["changed"][f"{folders}/b, clean"] and not found["changed"][f"{folders}/a, clean"]
