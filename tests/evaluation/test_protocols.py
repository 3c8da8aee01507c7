"""Protocols: frozen files, drawn samples that depend on nothing else, runs that name what they lack; comparisons."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from rvlm.cli import main
from rvlm.data import Fit, load_data
from rvlm.data.make_wds import make_wds
from rvlm.data.prompts import TEMPLATES
from rvlm.data.registry import data_root, entries
from rvlm.data.tasks import TASKS
from rvlm.evaluation import compare, load_protocol, protocol_names, wilson
from rvlm.evaluation.compare import mcnemar
from rvlm.lvlm.layouts import LAYOUTS
from rvlm.models import ZeroShotClassifier, load_clip

# A protocol that must change gets another name: these are what published records carry.
FROZEN = {
    "coop11-pgd100": "d819a914f1d9508f",
    "digits-demo": "c945ec1018d3e718",
    "radapt18": "6098e953f2780460",
    "radapt18-2": "39d7d4af3d47cbff",
    "robustbench-in5k": "c56388c642535836",
    "robustvlm-aa1000": "2a9e99948877b3b9",
    "rvlm-fast6": "4d7c75af7a95cbde",
    "tecoa15-pgd10": "e2991f1cc1a8ff3e",
}

ABOUT = {"name": "mine", "about": "a test", "attacks": {"pgd-2": ["2/255", "8/255"]}}


def write_protocol(folder, **change):
    folder.mkdir(exist_ok=True)
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(ABOUT | change, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    load_clip("tiny-vit").save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory, model):
    """Two sets of digits as tars, two thirds of them under the names that the model gives them; one with captions; and
    one that is described, but not there."""
    root = tmp_path_factory.mktemp("root")
    digits = load_data("digits")
    with torch.no_grad():
        said = ZeroShotClassifier(load_clip(model), digits.class_names, "digits")(digits.batch(slice(0, 100))[0])
    for name, rows in (("a", torch.arange(60)), ("b", torch.arange(60, 100))):
        y = torch.where(rows % 3 > 0, said.argmax(1)[rows], digits.y[rows])
        make_wds(dataclasses.replace(digits.subset(rows, "some"), y=y), root / f"wds_{name}")
    layouts = {name: {"title": name, "classes": 10, "layouts": {"wds": {"name": name, "counts": {"test": n}}}}
               for name, n in (("a", 60), ("b", 40), ("gone", 9))}  # fmt: skip
    (root / "words").mkdir()
    x = digits.batch(slice(0, 8))[0]
    for i in range(8):
        Image.fromarray((x[i] * 255).byte().permute(1, 2, 0).numpy()).save(root / "words" / f"{i}.png")
    images = [
        {"filename": f"{i}.png", "split": "test", "sentences": [{"raw": f"a scan, number {i}"}]} for i in range(8)
    ]
    (root / "words" / "captions.json").write_text(json.dumps({"images": images}))
    layout = {"at": "words", "list": "captions.json", "images": ["."], "counts": {"test": 8}}
    layouts["words"] = {"title": "words", "layouts": {"karpathy": layout}}
    (root / "datasets.yaml").write_text(yaml.safe_dump(layouts))
    return root


def run(*argv):
    return main([str(word) for word in argv])


# The files


def test_the_bundled_ones_are_frozen():
    assert {name: load_protocol(name).sha for name in protocol_names()} == FROZEN
    for name in protocol_names():
        protocol = load_protocol(name)
        assert protocol.name == name and protocol.about and protocol.parts
        known = entries(data_root())
        for part in protocol.parts:
            set_, _, kind = part.data.partition("@")
            if part.task:
                assert set_ in LAYOUTS and part.task in TASKS and part.index and not kind
                continue
            assert set_ == "digits" or kind in {layout.kind for layout in known[set_].layouts}, part
            assert set(protocol.native) <= {each.name for each in protocol.parts}
            assert part.name not in protocol.native or known[set_].pixels


def test_the_docs_name_every_protocol():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert all(f"| `{name}` |" in page for name in protocol_names())


def test_drawn_samples_are_those_of_the_size_and_the_seed_alone():
    protocol = load_protocol("robustvlm-aa1000")
    for part in protocol.parts:
        set_, _, kind = part.data.partition("@")
        total = {layout.kind: layout for layout in entries()[set_].layouts}[kind].counts["test"]
        rows = torch.randperm(total, generator=torch.Generator().manual_seed(0))[: part.n or 1000].sort().values
        assert hashlib.sha256(json.dumps(rows.tolist()).encode()).hexdigest()[:16] == part.index
    digits = load_protocol("digits-demo")
    data = digits.open(digits.parts[0])
    assert data.index_sha == digits.parts[0].index and digits.mark(digits.parts[0], data)["status"] == "complete"


@pytest.mark.parametrize("part, home, name, change", [
    ({"data": "vqav2", "task": "vqa"}, TASKS, "vqa", {"prompt": "{} In a word."}),
    ({"data": "vqav2", "task": "vqa"}, TASKS, "vqa", {"max_tokens": 5}),
    ({"data": "coco-captions", "task": "captioning"}, TASKS, "captioning", {"score": "f1"}),
    ({"data": "digits", "templates": "tecoa"}, TEMPLATES, "tecoa", ["a {}"]),
    ({"data": "digits", "templates": "tecoa", "prompts": None}, TEMPLATES, "tecoa", ["a {}"]),
])  # fmt: skip
def test_a_hash_covers_the_words_that_stand_in_the_code(tmp_path, monkeypatch, part, home, name, change):
    file = write_protocol(tmp_path, parts=[part | {"attacks": {"pgd-2": ["1/255"]}}, "cifar10@wds"])
    other = write_protocol(tmp_path / "other", parts=["digits"])
    before = load_protocol(file).sha, load_protocol(other).sha
    monkeypatch.setitem(home, name, dataclasses.replace(home[name], **change) if home is TASKS else change)
    assert load_protocol(file).sha != before[0] and load_protocol(other).sha == before[1]
    frozen = write_protocol(tmp_path, parts=[part | {"attacks": {"pgd-2": ["1/255"]}}], frozen=before[0])
    with pytest.raises(ValueError, match="or what it asks in words, was edited"):
        load_protocol(frozen)


@pytest.mark.parametrize("change, message", [
    ({"frozen": "0"}, "was edited: its hash is"),
    ({"parts": [{"data": "vqav2", "task": ["vqa"], "attacks": {}}]}, "a task of captioning, vqa"),
    ({"parts": []} | {"colour": "red"}, "expected name, about, parts, attacks"),
    ({"parts": None}, "parts must be a list of data specs"),
    ({"parts": {"data": "digits"}}, "parts must be a list of data specs"),
    ({"attacks": ["pgd-2"]}, "attacks must be a mapping"),
    ({"parts": [{"split": "test"}]}, "must have data"),
    ({"parts": [{"data": "digits", "limit": 3}]}, "must have data"),
    ({"attacks": {"pgdd-2": ["1/255"]}}, "unknown attack 'pgdd-2'"),
    ({"attacks": {"pgd-2": ["4"]}}, "did you mean 4/255"),
    ({"attacks": {"pgd-2": "4/255"}}, "pgd-2 must have a list of radii"),
    ({"attacks": {"pgd-2": []}}, "pgd-2 must have a list of radii"),
    ({"parts": [{"data": "coco", "attacks": {"sgaa-3": ["1/255"]}}]}, "unknown attack 'sgaa-3'"),
    ({"parts": [{"data": "vqav2", "task": "chat", "attacks": {"pgd-2": ["1/255"]}}]}, "a task of captioning, vqa"),
    ({"parts": [{"data": "vqav2", "task": "vqa"}]}, "attacks of its own"),
    ({"parts": [{"data": "vqav2", "task": "vqa", "attacks": {"autoattack": ["1/255"]}}]}, "on answers: expected pgd"),
    ({"parts": [{"data": "vqav2", "task": "vqa", "attacks": {"pgd-2": ["1/255"]}}], "norm": "l2"}, "in linf, not"),
    ({"norm": "l3"}, "unknown norm 'l3'"),
    ({"targets": ["grey-box"]}, "unknown target grey-box"),
    ({"fit": {"size": 300, "resize": 200}}, "cannot cut 300"),
])  # fmt: skip
def test_broken_files_are_named(tmp_path, change, message):
    file = write_protocol(tmp_path, **({"parts": ["digits"]} | change))
    with pytest.raises(ValueError, match=message):
        load_protocol(file)


def test_radii_may_be_numbers(tmp_path):
    parts = [{"data": "digits", "attacks": {"pgd-3": [0.05]}}]
    protocol = load_protocol(write_protocol(tmp_path, parts=parts, attacks={"pgd-2": [8 / 255, "2/255"]}))
    assert protocol.attacks == {"pgd-2": ["8/255", "2/255"]} and protocol.parts[0].attacks == {"pgd-3": ["0.05"]}


def test_every_fact_is_in_the_hash(tmp_path):
    changes = [
        {}, {"parts": [{"data": "digits", "split": "train"}]}, {"n": 5}, {"seed": 1}, {"norm": "l2"},
        {"fit": {"size": 32}}, {"attacks": {"pgd-3": ["2/255", "8/255"]}},
    ]  # fmt: skip
    shas = [load_protocol(write_protocol(tmp_path, **{"parts": ["digits"]} | change)).sha for change in changes]
    assert len(set(shas)) == len(shas)
    assert load_protocol(write_protocol(tmp_path, parts=["digits"])).sha == shas[0]
    with pytest.raises(FileNotFoundError, match="expected one of coop11-pgd100"):
        load_protocol("mine")


def test_a_named_list_picks_images(tmp_path):
    for name in ("n1/a.jpg", "n1/b.jpg", "n2/a.jpg", "n2/b.jpg"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), len(name), np.uint8)).save(tmp_path / "set" / name)
    told = {"set": {"title": "s", "layouts": {"folder": {"at": ["set"], "counts": {"test": 4}}}}}
    (tmp_path / "datasets.yaml").write_text(yaml.safe_dump(told))
    ids = {"file": "ids.txt", "sha256": hashlib.sha256(b"n2/a.jpg\nn1/b.jpg\n").hexdigest(), "from": "somewhere"}
    protocol = load_protocol(write_protocol(tmp_path, parts=["set@folder"], ids=ids))
    with pytest.raises(FileNotFoundError, match="which names the images of mine; somewhere"):
        protocol.open(protocol.parts[0], tmp_path)
    (tmp_path / "ids.txt").write_text("n2/a.jpg\nn1/b.jpg\n")
    data = protocol.open(protocol.parts[0], tmp_path)
    assert data.index.tolist() == [1, 2] and protocol.mark(protocol.parts[0], data)["status"] == "complete"
    assert protocol.mark(protocol.parts[0], data.limited(1))["status"] == "partial"
    (tmp_path / "ids.txt").write_text("n2/a.jpg\n")
    with pytest.raises(ValueError, match="it is another list"):
        protocol.open(protocol.parts[0], tmp_path)


def test_sizes_prompts_and_draws(root, tmp_path):
    parts = [{"data": "a@wds", "prompts": "0"}, {"data": "b@wds", "templates": ["x {}"], "n": 7}]
    protocol = load_protocol(write_protocol(tmp_path, parts=parts, n=10, seed=3, fit={"size": 24}, native=["b"]))
    a, b = (protocol.open(part, root) for part in protocol.parts)
    assert a.batch(slice(0, 1))[0].shape[-1] == 24 and b.batch(slice(0, 1))[0].shape[-1] == 32
    assert (len(a), len(b)) == (10, 7) and a.index_rule == "perm(seed=3)[:10]"
    assert protocol.prompts(protocol.parts[1], b)[0] == ["x {}"]
    prompts, check = protocol.prompts(protocol.parts[0], a)
    assert prompts == ["a scan of the digit {}.", "the handwritten number {}."] and not check["ok"], "the tars' own"
    few = protocol.open(protocol.parts[0], root, limit=4)
    assert len(few) == 4 and set(few.index.tolist()) < set(a.index.tolist())
    assert [protocol.mark(protocol.parts[0], each)["status"] for each in (a, few)] == ["complete", "partial"]
    wrong = load_protocol(write_protocol(tmp_path, parts=[{"data": "a@wds", "index": "0"}], n=10))
    with pytest.raises(ValueError, match="the draw of mine has the hash 0, here it is"):
        wrong.open(wrong.parts[0], root)
    assert isinstance(protocol.fit, Fit)


# Runs


def test_a_run_measures_what_is_there_names_what_is_not_and_goes_on(root, model, tmp_path, capsys):
    parts = ["a@wds", {"data": "gone@wds"}, "b@wds", {"data": "words", "attacks": {"pgd-2": ["8/255"]}}]
    file = write_protocol(tmp_path, parts=parts, n=20)
    own = shutil.copytree(root, tmp_path / "root")
    argv = ["eval", "--protocol", file, "--model", model, "--root", own, "--out", tmp_path / "run"]
    assert run(*argv) == 3
    out, err = capsys.readouterr()
    assert "NOT MEASURED gone@wds" in err and "missing: gone@wds" in err
    assert "mean accuracy of 2 sets, of 4 in the protocol; pgd-2, 8/255, white-box" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert [(row["data"], row["eps"], row["metric"]) for row in summary] == [
        ("a@wds", "2/255", "accuracy"), ("a@wds", "8/255", "accuracy"), ("b@wds", "2/255", "accuracy"),
        ("b@wds", "8/255", "accuracy"), ("words@karpathy", "8/255", "text_r@1"),
    ]  # fmt: skip
    records = {row["record"]: json.loads((tmp_path / "run" / row["record"]).read_text()) for row in summary}
    sha = load_protocol(file).sha
    assert summary[0]["clean"] > 0.6 and summary[1]["robust"] < summary[0]["clean"], "there is something to compare"
    for record in records.values():
        assert record["protocol"] == {"name": "mine", "sha": sha} and record["status"] == "complete"
        assert (tmp_path / "run" / record["samples"]).is_file()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "incomplete" and manifest["missing"] == ["gone@wds"]
    assert not (tmp_path / "run" / "state").exists()
    # What is there now is measured, the rest is taken as it was.
    make_wds(load_data("digits", limit=9), own / "wds_gone")  # lacks some classes, as a split may
    assert run(*argv) == 0
    again = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert [row for row in again if row["data"] != "gone@wds"] == summary and len(again) == 7
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "complete"
    # Another batch size draws the same samples; a limit makes the records partial.
    small = ["--batch_size", 7, "--out", tmp_path / "small"]
    assert run(*argv[:-2], *small) == 0
    row = json.loads((tmp_path / "small" / "summary.json").read_text())["rows"][0]
    assert json.loads((tmp_path / "small" / row["record"]).read_text())["data"] == records[row["record"]]["data"]
    assert run(*argv[:-2], "--limit", 5, "--out", tmp_path / "few") == 0
    row = json.loads((tmp_path / "few" / "summary.json").read_text())["rows"][0]
    assert json.loads((tmp_path / "few" / row["record"]).read_text())["status"] == "partial" and row["samples"] == 5
    assert (
        run("eval", "--protocol", file, "--model", "tiny-rn", "--root", own, "--limit", 5, "--out", tmp_path / "few")
        == 0
    )


def test_halves_and_files_may_be_parts(root, model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", x=pixels, y=np.arange(6))
    parts = ["b@wds+classes=new", f"npz:{tmp_path}/mine.npz", "digits+classes=base"]
    file = write_protocol(tmp_path, parts=parts, n=8, attacks={"pgd-2": ["8/255"]})
    argv = ["eval", "--protocol", file, "--model", model, "--root", root, "--out", tmp_path / "run"]
    assert run(*argv) == 0
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert [row["data"] for row in rows] == ["b@wds+classes=new", "npz:mine.npz", "digits+classes=base"]
    for row in (rows[0], rows[2]):
        assert run("repro", tmp_path / "run" / row["record"], "--out", tmp_path / "again") == 0


def test_other_prompts_are_measured_anew(root, model, tmp_path):
    own = shutil.copytree(root, tmp_path / "root")
    file = write_protocol(tmp_path, parts=["b@wds"], attacks={"pgd-2": ["8/255"]})
    argv = ["eval", "--protocol", file, "--model", model, "--root", own, "--out", tmp_path / "run"]
    for prompts in (["a scan of the digit {}."], ["the number {}."]):
        lines = [prompt.replace("{}", "{c}") for prompt in prompts]
        (own / "wds_b" / "zeroshot_classification_templates.txt").write_text("\n".join(lines))
        assert run(*argv) == 0
        (path,) = (tmp_path / "run" / "result").glob("*.json")
        assert json.loads(path.read_text())["text"]["templates"] == prompts
    before = path.stat().st_mtime_ns
    assert run(*argv) == 0 and path.stat().st_mtime_ns == before


def test_a_run_that_was_interrupted_goes_on_with_the_same_numbers(root, model, tmp_path, monkeypatch):
    from rvlm.evaluation import evaluate as whole

    file = write_protocol(tmp_path, parts=["a@wds", "b@wds"])
    argv = ["eval", "--protocol", file, "--model", model, "--root", root]
    assert run(*argv, "--out", tmp_path / "once") == 0
    calls = []

    def stops_at_the_third(*args, **settings):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args, **settings)

    monkeypatch.setattr("rvlm.evaluation.evaluate", stops_at_the_third)
    assert run(*argv, "--out", tmp_path / "twice") == 130
    assert run(*argv, "--out", tmp_path / "twice") == 0 and len(calls) == 5, "two were taken as they were"
    once, twice = (json.loads((tmp_path / name / "summary.json").read_text())["rows"] for name in ("once", "twice"))
    assert [row | {"seconds": 0} for row in once] == [row | {"seconds": 0} for row in twice]


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(root, model, tmp_path):
    words = {"data": "words", "attacks": {"pgd-2": ["8/255"]}}
    file = write_protocol(tmp_path, parts=["a@wds", "gone@wds", words], n=50)
    rows = []
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        argv = ["-m", "rvlm", "eval", "--protocol", file, "--model", model, "--root", root, "--batch-size", 7]
        out = tmp_path / str(processes)
        done = subprocess.run(
            [sys.executable, *launcher, *map(str, [*argv, "--out", out])], capture_output=True, text=True, timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert "missing: gone@wds" in done.stderr and done.stderr.count("NOT MEASURED") == 1, done.stderr
        rows.append([row | {"seconds": 0} for row in json.loads((out / "summary.json").read_text())["rows"]])
    assert len(rows[0]) == 3 and rows[0] == rows[1]


def test_broken_data_is_named_and_does_not_stop_the_rest(root, model, tmp_path, capsys, monkeypatch):
    own = shutil.copytree(root, tmp_path / "root")
    (own / "wds_a" / "test" / "nshards.txt").write_text("2")
    (own / "parquet" / "b").mkdir(parents=True)
    (own / "parquet" / "b" / "test-0.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # not installed
    file = write_protocol(tmp_path, parts=["a@wds", "b@parquet", "b@wds"])
    assert run("eval", "--protocol", file, "--model", model, "--root", own, "--out", tmp_path / "run") == 4
    error = capsys.readouterr().err
    assert "not what they should be: a@wds, b@parquet" in error and "needs pyarrow" in error
    assert len(json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]) == 2


def test_white_box_and_transfer(root, model, tmp_path, capsys):
    file = write_protocol(tmp_path, parts=["b@wds"], targets=["white-box", "transfer"])
    argv = ["eval", "--protocol", file, "--model", model, "--root", root, "--out", tmp_path / "run"]
    assert run(*argv) == 2 and "give the model that images are made on as --source" in capsys.readouterr().err
    assert run(*argv, "--source", "tiny-rn") == 0
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert [(row["target"], row["eps"]) for row in rows] == [
        ("white-box", "2/255"), ("transfer", "2/255"), ("white-box", "8/255"), ("transfer", "8/255"),
    ]  # fmt: skip
    records = [json.loads((tmp_path / "run" / row["record"]).read_text()) for row in rows]
    assert records[0]["source"] is None and records[1]["source"]["name"] == "tiny-rn"
    compared = {"robust_beyond_transfer", "white_box_is_strongest", "eps_matters"}
    assert [sorted(compared & {check["id"] for check in record["checks"]}) for record in records] == [
        [], ["robust_beyond_transfer", "white_box_is_strongest"], ["eps_matters"], sorted(compared),
    ]  # fmt: skip
    said = next(check for check in records[1]["checks"] if check["id"] == "robust_beyond_transfer")["detail"]
    assert f"{rows[0]['robust']:.1%} white-box, {rows[1]['robust']:.1%} on images of" in said
    # Another source: the transfer record is measured anew, the white-box one is not.
    before = [(tmp_path / "run" / row["record"]).stat().st_mtime_ns for row in rows]
    assert run(*argv, "--source", model) == 0
    after = [(tmp_path / "run" / row["record"]).stat().st_mtime_ns for row in rows]
    assert after[0] == before[0] and after[1] > before[1] and after[2] == before[2] and after[3] > before[3]


def test_what_the_protocol_says_cannot_be_said_twice(tmp_path, capsys):
    assert run("eval", "--protocol", "digits-demo", "--eps", "4/255") == 2
    assert "says what --eps is" in capsys.readouterr().err
    assert run("eval", "--protocol", "digits-demo", "--source", "tiny-rn") == 2
    assert "leave --source out" in capsys.readouterr().err
    assert run("eval", "--protocol", "nothing") == 3
    assert run("ls", "protocols") == 0 and "robustvlm-aa1000" in capsys.readouterr().out


# Comparisons


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (1, 0), (5, 2), (30, 12), (7, 7)])
def test_mcnemar_is_the_exact_binomial(only_a, only_b):
    n = only_a + only_b
    exact = min(1.0, 2 * sum(comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n)
    assert mcnemar(only_a, only_b) == pytest.approx(exact, rel=1e-12) == mcnemar(only_b, only_a)
    assert mcnemar(40_000, 10_000) < 1e-300 or mcnemar(40_000, 10_000) == 0


def test_compare(root, model, tmp_path, capsys, monkeypatch):
    file = write_protocol(tmp_path, parts=["a@wds", {"data": "words", "attacks": {"pgd-2": ["8/255"]}}])
    records = []
    for name in (model, "tiny-rn"):
        out = tmp_path / name.split("/")[-1]
        assert run("eval", "--protocol", file, "--model", name, "--root", root, "--out", out) == 0
        rows = json.loads((out / "summary.json").read_text())["rows"]
        records.append([out / row["record"] for row in rows])
    clean, robust = compare(records[0][0], records[1][0])
    columns = [np.load(path[0].parents[1] / json.loads(path[0].read_text())["samples"]) for path in records]
    right = [each["broken_by"] == -1 for each in columns]
    assert robust.only_a == (right[0] & ~right[1]).sum() and robust.only_b == (right[1] & ~right[0]).sum()
    assert robust.only_a + robust.only_b > 0
    assert robust.n == 60 and robust.a == right[0].mean() and robust.a_ci == wilson(int(right[0].sum()), 60)
    assert clean.what == "clean" and robust.p == mcnemar(robust.only_a, robust.only_b)
    assert [one.what for one in compare(records[0][2], records[1][2])][0] == "clean text_r@1"
    capsys.readouterr()
    monkeypatch.chdir(records[1][0].parent)
    assert run("compare", records[0][0], records[1][0].name) == 0
    assert "| robust | 60 |" in capsys.readouterr().out
    assert run("compare", records[0][0], records[1][0], "--json") == 0
    assert json.loads(capsys.readouterr().out)[1]["only_a"] == robust.only_a
    for other, why in ((records[1][1], "eps is"), (records[1][2], "schema is")):
        assert run("compare", records[0][0], other) == 2
        assert "cannot be compared" in (error := capsys.readouterr().err) and why in error
    changed = json.loads(records[1][0].read_text())
    assert changed["data"]["resized"] is None
    for name, change in (
        ("protocol", {"protocol": None}),
        ("seed", {"attack": changed["attack"] | {"seed": 7}}),
        ("resizing", {"data": changed["data"] | {"resized": {"size": 224}}}),
    ):
        records[1][1].write_text(json.dumps(changed | change))
        assert run("compare", records[0][0], records[1][1]) == 2
        assert f"compared: {name} is" in capsys.readouterr().err
    assert run("compare", records[0][0]) == 2 and run("compare", records[0][0], "nowhere.json") == 3
    assert run("compare", records[0][0], file) in (2, 3)
