"""`rvlm profile attack|eval|train`: the shares of its table add up, its operations are the model's, its trace nests."""

import gzip
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from rvlm import cli, profiling
from rvlm.commands import peak, phases
from rvlm.models import load_clip
from rvlm.report import frames, phase_table, write_flame
from rvlm.report.flame import Frame

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    load_clip("tiny-vit").save(folder)
    return str(folder)


@pytest.fixture
def photographs(tmp_path):
    """Six, of two classes."""
    generator = torch.Generator().manual_seed(0)
    for k in range(6):
        file = tmp_path / "data" / f"class {k % 2}" / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(file)
    return f"folder:{tmp_path / 'data'}"


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setitem(peak.SIDE, "cpu", 256)


def run(*argv):
    try:
        return cli.main(["profile", *map(str, argv), "--device", "cpu"])
    except SystemExit as stop:
        return stop.code


def at(found, *path):
    (row,) = [row for row in found["phases"] if row["path"] == list(path)]
    return row


def check_sums(found):
    """Own times, and so the shares of the table, add up to the whole; outer operations are the sum of inner ones."""
    rows = found["phases"]
    assert sum(row["own"] for row in rows) == pytest.approx(found["seconds"])
    for row in rows:
        inside = [r for r in rows if r["path"][:-1] == row["path"] and r["path"]]
        assert row["own"] >= 0 and row["seconds"] == pytest.approx(row["own"] + sum(r["seconds"] for r in inside))
        if inside:
            assert (row["flops"] or 0) == sum(r["flops"] or 0 for r in inside)
    table = phase_table(rows, found["images"], found["images_per_s"]).splitlines()[2:-1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    leaves = [
        cells[k] for k in range(len(cells))
        if k + 1 == len(cells) or cells[k + 1][0].count("·") <= cells[k][0].count("·")
    ]  # fmt: skip
    assert sum(float(leaf[2].rstrip("%")) for leaf in leaves) == pytest.approx(100, abs=0.1 * len(leaves))


def test_attack_with_trace_and_flame(cache, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("t.json.gz", "f.html", "p.json")}
    argv = ["attack", "--model", cache, "--limit", "60", "--batch_size", "40", "--attack", "pgd-2,square-3"]
    argv += ["--trace", files["t.json.gz"], "--flame", files["f.html"], "--json", files["p.json"]]
    assert run(*argv) == 0
    text = capsys.readouterr().out
    found = json.loads(files["p.json"].read_text())
    check_sums(found)
    assert [row["path"] for row in found["phases"]][:2] == [[], ["pgd-2"]]
    assert at(found, "pgd-2")["images"] == 60 and at(found, "pgd-2")["calls"] == 2
    assert at(found, "square-3", "step")["calls"] <= 6
    assert ["square-3", "backward"] not in [row["path"] for row in found["phases"]]
    flops, forward = found["flops"], at(found, "pgd-2", "forward")
    assert forward["flops"] == round(flops["per_image"]["forward"] * forward["images"])
    assert 0 < flops["utilisation"] < flops["utilisation_in_model"]
    assert flops["per_s"] * found["seconds"] == pytest.approx(flops["total"])
    assert 0 < found["step_share"] < 1 - found["model_share"] < 1
    assert found["memory"]["peak_bytes"] > 0 and found["clock"] == "wall clock" and found["env"]["torch"]
    for words in (
        "| · forward |", "| · other |", "| whole |", "Seconds by wall clock", "GFLOP an image", "% of a peak of",
        "measured now by the best of 5 products of 256 x 256 matrices", "Peak memory", "this process at its largest",
        "the attack's own arithmetic ", "| aten::addmm |", "https://ui.perfetto.dev",
    ):  # fmt: skip
        assert words in text

    trace = json.loads(gzip.decompress(files["t.json.gz"].read_bytes()))
    lane = frames(trace)[0]
    (stage,) = [f for name, f in lane.inside.items() if name == "pgd-2"]
    assert stage.kind == "phase" and stage.calls == 1, "one batch"
    assert {"forward", "backward", "step"} <= stage.inside.keys() and stage.inside["forward"].calls >= 2

    def check(frame):
        inside = sum(inner.seconds for inner in frame.inside.values())
        assert inside <= frame.seconds * (1 + 1e-6) + 1e-8 and frame.own == pytest.approx(frame.seconds - inside)
        for inner in frame.inside.values():
            check(inner)
        return frame

    check(lane)
    assert "aten::addmm" in str(stage.inside["forward"]), "ops stand in phases"
    page = files["f.html"].read_text()
    assert ">pgd-2</button>" in page and ">forward</button>" in page
    assert not re.search(r"(src|href)=|url\(|@import|https?:", page), "nothing is fetched"


def test_stages_that_the_classes_rule_out_are_named(cache, photographs, capsys):
    argv = ["attack", "--model", cache, "--data", photographs, "--size", "32", "--attack", "fgsm,apgd-dlr-1", "--json"]
    assert run(*argv) == 0
    said = capsys.readouterr()
    assert "NOT PROFILED apgd-dlr-1 needs 3 classes, there are 2" in said.err
    assert {row["path"][0] for row in json.loads(said.out)["phases"][1:]} == {"fgsm"}


def test_counted_operations_are_the_models(cache):
    clip = load_clip(cache)
    tower = sum(  # of a product with n tokens, n times as many
        p.numel() for name, p in clip.visual.named_parameters() if p.dim() == 2 and "positional" not in name
    )
    counted = phases.count(clip.encode_pixels, torch.rand(3, 3, 32, 32))
    per_image = phases._per_image(counted.spans())
    tokens = len(clip.visual.positional_embedding)
    assert per_image["forward"] == pytest.approx(2 * tokens * tower, rel=0.15), "attention and patches come on top"
    assert 0.9 < per_image["backward"] / per_image["forward"] < 1.1, "of the pixels alone: no weight is asked"
    assert per_image == phases._per_image(phases.count(clip.encode_pixels, torch.rand(7, 3, 32, 32)).spans())


def test_eval_reads_images_and_writes_a_record(cache, photographs, capsys):
    argv = ["eval", "--model", cache, "--data", photographs, "--size", "32", "--batch_size", "4"]
    assert run(*argv, "--attack", "fgsm,square-5", "--eps", "0.00001", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    check_sums(found)
    assert found["images"] == 6 and at(found, "scoring")["images"] >= 6
    assert at(found, "data", "read and decode")["calls"] == at(found, "data", "resize and crop")["calls"] >= 6
    assert at(found, "records")["images"] == 6 and at(found, "bookkeeping")["images"] >= 6
    right = at(found, "fgsm")["images"]
    assert 0 < right < 6 and at(found, "fgsm", "step"), "an untrained model is wrong on some, which are left alone"
    assert 0 < at(found, "square-5")["images"] <= right, "what the first stage left"


def test_train(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RVLM_CACHE", str(tmp_path))
    assert run("train", "--model", cache, "--limit", "100", "--json", "--flame", tmp_path / "f.html") == 0
    found = json.loads(capsys.readouterr().out)
    check_sums(found)
    per_image = found["flops"]["per_image"]
    rest = found["seconds"] - at(found, "setup")["seconds"]
    assert found["images_per_s"] == pytest.approx(100 / rest), "what happens once is no matter of speed"
    assert found["flops"]["per_s"] * rest == pytest.approx(found["flops"]["total"])
    assert found["images"] == 100 and at(found, "attack")["images"] == 100 and at(found, "setup")["images"] == 0
    assert per_image["student backward"] == pytest.approx(2 * per_image["student forward"], rel=0.1), "weights, too"
    assert per_image["backward"] == pytest.approx(per_image["forward"], rel=0.1)
    assert at(found, "attack", "backward")["images"] >= 200 and "model_share" not in found
    assert ">student backward</button>" in (tmp_path / "f.html").read_text()


@pytest.mark.slow
def test_train_other_methods_and_a_twin(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RVLM_CACHE", str(tmp_path))
    assert run("train", "--method", "pmg_aft", "--model", "tiny-vit", "--limit", "64") == 0
    text = capsys.readouterr().out
    for phase in ("attack", "student forward", "loss and teachers", "student backward", "optimizer", "images/s"):
        assert phase in text
    assert run("train", "--method", "hpt_gpd", "--model", "tiny-vit", "--limit", "64", "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 128, "an epoch of both stages"
    (tmp_path / "twin.py").write_text(
        "def epoch(method, student, data):\n    return lambda: len(data) // method.config.steps"
    )
    flags = ("--limit", "64", "--twin", tmp_path / "twin.py:epoch", "--rounds", "2", "--json")
    assert run("train", "--method", "tecoa", "--model", "tiny-vit", *flags) == 0
    twin = json.loads(capsys.readouterr().out)["twin"]
    assert twin["rounds"] == 2 and twin["ratio_min"] <= twin["ratio"] <= twin["ratio_max"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["lunch"], "expected train, attack, eval, infer"),
        (["train", "--defended", "x"], "goes with profile infer"),
        (["attack", "--twin", "x.py:y"], "goes with profile train"),
        (["train", "--twin", __file__ + ":lunch"], "has no callable 'lunch'"),
        (["attack", "--trace", "x.txt"], "expected a file that ends in .json or .json.gz"),
        (["infer", "--flame", "x.html"], "goes with profile train, attack and eval"),
        (["eval", "--attack", "lunch"], "unknown attack"),
        (["eval", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["eval", "--engine", "compile"], "--engine goes with profile attack"),
        (["train", "--precision", "bf16"], "--precision is the attack's"),
        (["eval", "--precision", "fp8"], "precision"),
        (["eval", "--eps", "4"], "did you mean 4/255?"),
    ],
)
def test_bad_input_is_named(argv, message, capsys):
    assert run(*argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_an_engines_pass_is_forward_and_backward(cache, capsys):
    argv = ["attack", "--model", cache, "--limit", "4", "--attack", "pgd-3", "--engine", "compile", "--json"]
    assert run(*argv) == 0
    found = json.loads(capsys.readouterr().out)
    check_sums(found)
    flops, row = found["flops"]["per_image"], at(found, "pgd-3", "model")
    assert row["flops"] == pytest.approx((flops["forward"] + flops["backward"]) * row["images"])
    assert found["model_share"] == pytest.approx(row["seconds"] / found["seconds"]) and row["seconds"] > 0


@pytest.mark.parametrize("precision, peak_of", [("bf16", "bf16"), ("cascade", "bf16"), ("fp32", "fp32")])
def test_the_peak_is_of_the_attacks_precision(precision, peak_of, cache, capsys):
    argv = ["eval", "--model", cache, "--limit", "30", "--attack", "fgsm", "--eps", "1/2550", "--json"]
    assert run(*argv, "--precision", precision) == 0
    assert json.loads(capsys.readouterr().out)["flops"]["precision"] == peak_of


def test_a_model_without_gradients_has_forward_passes_alone():
    def model(x):
        with torch.no_grad():
            return x.mean((2, 3)) @ torch.ones(3, 4)

    counted = phases.count(model, torch.rand(2, 3, 8, 8))
    assert phases._per_image(counted.spans()) == {"forward": 2 * 3 * 4}


@pytest.mark.parametrize(
    "name, tf32, precision, expected",
    [
        ("NVIDIA H100 80GB HBM3", False, "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", False, "fp32", 66.9),
        ("NVIDIA H100 80GB HBM3", True, "fp32", 494.7),
        ("NVIDIA H100 PCIe", False, "fp16", 756.0),
        ("NVIDIA H200", False, "bf16", 989.4),
        ("NVIDIA H200 NVL", False, "bf16", 835.5),
        ("NVIDIA A100-SXM4-80GB", True, "fp32", 156.0),
        ("NVIDIA A100 80GB PCIe", False, "fp32", 19.5),
        ("NVIDIA L40S", False, "bf16", 362.05),
        ("NVIDIA L40", False, "bf16", 181.05),
        ("NVIDIA GeForce RTX 4090", False, "bf16", 165.2),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", False, "fp32", None),
        ("NVIDIA GeForce RTX 5090", False, "fp32", None),
    ],
)
def test_peaks_are_dense_and_named(name, tf32, precision, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32" if tf32 else "ieee"))
    monkeypatch.setattr(peak, "_measured", lambda device, dtype, side: 1.0)
    found = peak.peak_of(torch.device("cuda"), precision)
    assert found.flops_per_s == (1.0 if expected is None else 1e12 * expected)
    assert found.precision == ("tf32" if tf32 else precision)
    assert ("measured now" in found.source) == (expected is None) and (expected is not None or name in found.source)


def test_a_measured_peak_is_what_a_product_takes(monkeypatch):
    class Clock(profiling.PyPhaseTimer):
        def totals(self):
            return {name: (0.5, calls) for name, (_, calls) in super().totals().items()}

    monkeypatch.setattr(profiling, "PhaseTimer", Clock)
    assert peak.peak_of(torch.device("cpu"), "fp32").flops_per_s == 2 * 256**3 / 0.5


def event(name, ts, dur, cat="cpu_op", tid=1, **more):
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur} | more


def test_frames_nest_by_time_lane_by_lane():
    trace = {"traceEvents": [
        event("attack", 0, 100, "user_annotation"), event("mm", 10, 20), event("mm", 40, 10), event("add", 45, 2),
        event("mm", 200, 5), event("kernel", 0, 30, "kernel", tid=7), event("call", 5, 5, "cuda_runtime"),
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": "stream 7"}},
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "pid": 1, "tid": 1, "ts": 3, "id": 1},
    ]}  # fmt: skip
    cpu, stream = frames(trace)
    assert (cpu.name, stream.name, stream.inside["kernel"].kind) == ("thread 1", "stream 7", "device")
    attack = cpu.inside["attack"]
    assert cpu.seconds == pytest.approx(105e-6) and attack.own == pytest.approx(70e-6)
    assert (attack.inside["mm"].calls, attack.inside["mm"].seconds) == (2, pytest.approx(30e-6))
    assert attack.inside["mm"].inside["add"].own == pytest.approx(2e-6) and cpu.inside["mm"].calls == 1


def test_the_chart_is_as_wide_as_its_times(tmp_path):
    child = Frame("a <b> & c", "op", 0.25, 2)
    lane = Frame("thread 1", "phase", 1.0, 0, {
        "left": Frame("left", "phase", 0.5, 1, {child.name: child}), "right": Frame("right", "phase", 0.4995, 1),
        "hardly": Frame("hardly", "op", 0.0005, 1),
    })  # fmt: skip
    page = write_flame(tmp_path / "f.html", "Title", "Intro", [lane, Frame("idle", "phase")]).read_text()
    assert 'top: 20px; left: 0.0000%; width: 25.0000%">a &lt;b&gt; &amp; c</button>' in page
    assert 'left: 50.0000%; width: 49.9500%">right<' in page and "hardly" not in page and "idle" not in page
    assert 'title="left: 500.00 ms, 50.0%, 1 calls, 250.00 ms of its own"' in page


@pytest.mark.skipif(BROWSER is None, reason="no Chromium (Debian: apt install chromium)")
def test_a_press_widens_a_box(tmp_path):
    lane = Frame("t", "phase", 1.0, 0, {n: Frame(n, "op", s, 1) for n, s in (("a", 0.6), ("b", 0.4))})
    file = write_flame(tmp_path / "f.html", "T", "I", [lane])
    probe = """<script>addEventListener("load", () => {
      const boxes = [...document.querySelectorAll(".box")];
      const widths = () => boxes.map(box => box.style.left + " " + box.style.width).join(",");
      boxes[1].click(); const wide = widths(); boxes[1].click();
      document.body.dataset.probe = wide + ";" + widths(); });</script></body>"""
    file.write_text(file.read_text().replace("</body>", probe))
    argv = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run([*argv, file.as_uri()], capture_output=True, text=True, timeout=120)
    assert 'data-probe="-150% 150%,0% 100%;0% 60%,60% 40%"' in done.stdout
