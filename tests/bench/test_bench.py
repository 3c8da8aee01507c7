"""The benchmarks run, and what they compare with is what they say."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from rvlm import ops

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import peers.attention
    import peers.iterates
    import peers.losses
    import peers.pgd
    import peers.steps

    return peers


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5)).eval()
    x = torch.rand(4, 3, 8, 8, generator=generator)
    y = torch.randint(5, (4,), generator=generator)
    return model, x, y


def quick(command: list[str], **env: str) -> subprocess.CompletedProcess:
    # Under pytest-xdist pytest-benchmark measures nothing, and it knows by the environment.
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    clean |= {"RVLM_BENCH_QUICK": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run(command, cwd=BENCH.parent, env=clean, capture_output=True, text=True, timeout=300)


def test_twin_of_the_peer_gives_the_peers_images(peers, problem):
    torchattacks = pytest.importorskip("torchattacks", reason="extra [oracles] is not installed")
    model, x, y = problem
    settings = {"eps": 8 / 255, "alpha": 2 / 255, "steps": 7}
    for random_start in (False, True):
        torch.manual_seed(5)
        twin = peers.pgd.PGD(model, random_start=random_start, **settings)(x, y)
        torch.manual_seed(5)
        package = torchattacks.PGD(model, random_start=random_start, **settings)(x, y)
        assert torch.equal(twin, package)


def test_twin_of_the_l2_step_gives_the_peers_images(peers, problem):
    torchattacks = pytest.importorskip("torchattacks", reason="extra [oracles] is not installed")
    model, x, y = problem
    x_adv = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x_adv), y), x_adv)
    # The package divides 0 by 0 in a first step that does not move; alpha > eps makes it project.
    package = torchattacks.PGDL2(model, eps=0.3, alpha=0.5, steps=1, random_start=False)(x, y)
    twin = peers.steps.l2_step(x, grad, x, 0.5, 0.3)
    assert torch.equal(twin, package)
    assert (twin - x).flatten(1).norm(dim=1).max() <= 0.3 + 1e-6


def test_gpu_script_parses():
    assert subprocess.run(["bash", "-n", str(BENCH / "run_gpu.sh")]).returncode == 0


def gpu_script(out, *parts: str, **env: str) -> subprocess.CompletedProcess:
    return quick(
        ["bash", str(BENCH / "run_gpu.sh"), str(out), *parts], RVLM_BENCH_CPU="1", PYTHON=sys.executable, **env
    )


def test_gpu_script_runs_in_parts(tmp_path):
    done = gpu_script(tmp_path, "ops", "stepps")
    assert done.returncode == 2 and "unknown part stepps: expected" in done.stderr
    done = gpu_script(tmp_path, "build", "ops", "clips", RVLM_GPU_SECONDS="0")
    assert done.returncode == 0, done.stderr
    assert "no time left for: steps iterates losses attention filters clips-tiny-vit" in done.stdout
    (tmp_path / "parts.tsv").write_text("filters\t1\t9\told\ninfo\t0\t1\told\n")
    done = gpu_script(tmp_path, "filters")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-1000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(part["name"], part["exit_code"]) for part in result["parts"]["parts"]] == [("info", "0"), ("filters", "0")]
    assert {row["group"] for row in result["rows"]} == {"gaussian_filter"}


@pytest.mark.slow
def test_gpu_script_runs_dry(tmp_path):
    done = gpu_script(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    result = json.loads((tmp_path / "result.json").read_text())
    parts = {
        "info",
        "tests",
        "steps",
        "iterates",
        "losses",
        "attention",
        "filters",
        "clips-tiny-vit",
        "pgd",
        "engines",
        "attacks",
        "train",
        "memcheck",
    }
    assert {part["name"] for part in result["parts"]["parts"]} == parts
    groups = {
        "linf_step_",
        "l2_step_",
        "uniform_start",
        "apgd_step_",
        "keep_best_",
        "l1_project",
        "l1_step_",
        "momentum_step_",
    }
    groups |= {"anchored_residual", "anchored_attention", "prefix_attention"}
    groups |= {
        "multi_teacher_kl",
        "attack_loss",
        "clip_head_loss",
        "gaussian_filter",
        "pgd-10",
        "clips",
        "gains",
        "fold_teachers",
        "training",
    }
    for oracle, group in (("pyautoattack", "autoattack"), ("torchattacks", "attacks")):  # else parts are skipped
        if importlib.util.find_spec(oracle):
            groups |= {group, "autoattack whole"}
    assert {row["group"] for row in result["rows"]} == groups
    assert all(len(row["speedup"]) == 3 and row["us_per_call"] > 0 for row in result["rows"])
    assert "| tiny-vit B=2 fp32 | rvlm |" in (tmp_path / "result.md").read_text()


@pytest.mark.slow
def test_gate_stops_a_wrong_step(tmp_path):
    """A benchmark of something that computes something else must fail before it is timed."""
    plugin = tmp_path / "wrong_step.py"
    plugin.write_text(
        "import rvlm.ops.steps as s\n"
        "right = s._linf_op_._call_cpp\n"
        "s._linf_op_._call_cpp = lambda x_adv, g, x, a, *rest: right(x_adv, g, x, -a, *rest)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "bench/bench_steps.py", "-k", "linf and cpp", "-p", "wrong_step"]
    done = quick(command, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "AssertionError: Tensor-likes are not close" in done.stdout, done.stdout[-2000:]


@pytest.mark.slow
def test_budget_skips_what_has_not_begun():
    command = [sys.executable, "-m", "pytest", "-q", "bench/bench_steps.py", "-k", "eager", "-rs"]
    done = quick(command, RVLM_BENCH_SECONDS="0")
    assert done.returncode == 0 and "time budget of 0 s is spent" in done.stdout, done.stdout[-2000:]


def test_report_keeps_losing_cells_and_names_missing_files(tmp_path):
    row = {"peer": "eager", "impl": "cpp", "case": "[1]", "us_per_call": 2.0, "us_per_call_iqr": 0.1}
    row |= {"peer_us_per_call": 1.0, "speedup": [0.4, 0.5, 0.6]}
    bench = {"group": "linf_step_", "stats": {"rounds": 30}, "extra_info": row}
    (tmp_path / "a.json").write_text(json.dumps({"machine_info": {"rvlm": {"device": "x"}}, "benchmarks": [bench]}))
    command = [
        sys.executable,
        str(BENCH / "report.py"),
        "--out",
        str(tmp_path / "r"),
        str(tmp_path / "a.json"),
        "b.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Not measured: b.json" in done.stdout
    assert "0.50 [0.40, 0.60] **slower**" in (tmp_path / "r.md").read_text()
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["speedup"] == [0.4, 0.5, 0.6]


def test_the_table_of_whole_attacks(tmp_path):
    def bench(impl, peer, ratio, **more):
        row = {
            "case": "pgd-10 A B=2",
            "impl": impl,
            "peer": peer,
            "gain": "g",
            "us_per_call": 1.0,
            "us_per_call_iqr": 0.0,
        }
        row |= {"peer_us_per_call": 1.0, "speedup": [ratio] * 3, "images_per_s": 7.0, "peak_mib": 5.0, "images": 2}
        return {"group": "clips", "stats": {"rounds": 3}, "extra_info": row | {"verdicts_differing": 1} | more}

    rows = [bench("torchattacks", "torchattacks", 1.0), bench("rvlm", "torchattacks", 2.0)]
    rows += [bench("rvlm bf16", "rvlm", 3.0, peak_mib=4.0), bench("rvlm bf16", "torchattacks", 6.0)]
    found = {"machine_info": {}, "benchmarks": rows, "left_out": {"pgd-100 A B=2": "no time left"}}
    (tmp_path / "a.json").write_text(json.dumps(found))
    page = tmp_path / "page.md"
    command = [sys.executable, str(BENCH / "report.py"), "--out", str(tmp_path / "r"), str(tmp_path / "a.json")]
    page.write_text("before\n<!-- clips -->\nold\n<!-- end -->\nafter\n")
    assert subprocess.run([*command, "--into", str(page)], capture_output=True).returncode == 0
    line = "| pgd-10 A B=2 | 7.0 | 2.00 |  | 3.00 |  |  | 6.00 | 5 / 4 | 1 of 2 |"
    assert line in page.read_text() and line in (tmp_path / "r.md").read_text()
    assert page.read_text().startswith("before\n") and page.read_text().endswith("<!-- end -->\nafter\n")
    assert "old" not in page.read_text() and "pgd-100 A B=2 (no time left)" in (tmp_path / "r.md").read_text()
    page.write_text("no place")
    done = subprocess.run([*command, "--into", str(page)], capture_output=True, text=True)
    assert done.returncode == 1 and "has no lines <!-- clips --> and <!-- end -->" in done.stderr


def test_cells_without_time_are_listed_and_errors_counted(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RVLM_BENCH_QUICK", "1")
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("conftest", "measure"):  # those of the benchmarks, in quick mode
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("clips", BENCH / "clips.py")
    clips = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(clips)
    monkeypatch.setattr(clips, "ATTACKS", {"pgd-10": (10, 2), "pgd-2": (2, 2)})
    monkeypatch.setattr(clips, "step_seconds", lambda model, x, y: 1.0)
    monkeypatch.setattr(clips, "theirs", lambda *args: 1 / 0)
    monkeypatch.setattr(clips, "peak_bytes", lambda work, device: work() or 2**20)
    argv = ["--out", str(tmp_path / "a.json"), "--seconds", "30", "--batches", "1", "--device", "cpu"]
    assert clips.main(argv) == 1, "the peer raised"
    found = json.loads((tmp_path / "a.json").read_text())
    assert {bench["extra_info"]["impl"] for bench in found["benchmarks"]} == {"rvlm", "rvlm bf16"}
    assert all("pgd-2 tiny-vit B=1" in bench["extra_info"]["case"] for bench in found["benchmarks"])
    assert found["left_out"]["pgd-10 tiny-vit B=1"].startswith("no time left, would take: 50 s")
    assert any(why.startswith("ZeroDivisionError") for why in found["left_out"].values())
    monkeypatch.setattr(clips, "theirs", lambda attack, model, x, y, eps: x + 2 * eps)
    assert clips.main(argv) == 1 and "beyond the radius" in capsys.readouterr().out


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import compare

    return compare


def a_run(cells, **machine):
    """A file of pytest-benchmark; cells: name -> (lower quartile, median, upper quartile) in us, calls of a round."""
    benchmarks = [
        {
            "fullname": name,
            "stats": dict(zip(("q1", "median", "q3"), (1e-6 * calls * us for us in times), strict=True)),
            "extra_info": {"calls_per_round": calls, "speedup": [1.9, 2.0, 2.1]} if calls > 1 else {},
        }
        for name, (times, calls) in cells.items()
    ]
    info = {"device": "x", "threads": 2, "torch": "2.15.0", "quick": False} | machine
    return {"machine_info": {"rvlm": info}, "commit_info": {"id": "f" * 40}, "benchmarks": benchmarks}


def test_cells_are_slower_only_where_quartiles_do_not_overlap(compare):
    before = a_run({"same": ((9, 10, 11), 1), "slow": ((9, 10, 11), 200), "gone": ((1, 1, 1), 1)})
    now = a_run({"slow": ((12, 13, 14), 50), "same": ((10.9, 13, 14), 1), "a|b": ((1, 1, 1), 1)})
    found = compare.compare(before, now)
    slow, same = found["cells"]
    assert (slow["verdict"], same["verdict"]) == ("slower", "") and slow["ratio"] == pytest.approx(1.3)
    assert slow["us"] == pytest.approx(13), "a call, however many a round has"
    assert same["spread"] == pytest.approx([10.9 / 11, 14 / 9]) and (slow["speedup"], same["speedup"]) == (2.0, None)
    assert (found["gone"], found["new"], found["machine"], found["versions"]) == (["gone"], ["a|b"], {}, {})
    assert compare.compare(now, before)["cells"][1]["verdict"] == "faster"
    text = compare.text(found)
    assert "| slow | 10.0 | 13.0 | 1.30 | 1.09-1.56 | 2.00 | 2.00 | **slower** |" in text
    assert "2 cells, ratios around 1.30: 1 slower, 0 faster" in text and "1 cells not measured before: a|b" in text
    assert "ANOTHER MACHINE" not in text


def test_another_machine_is_named_and_quick_runs_are_refused(compare):
    cell = {"a": ((1, 1, 1), 1)}
    found = compare.compare(a_run(cell), a_run(cell, device="y", torch="2.16.0"))
    assert found["machine"] == {"device": ["x", "y"]} and found["versions"] == {"torch": ["2.15.0", "2.16.0"]}
    assert compare.text(found).startswith("ANOTHER MACHINE: device x -> y: ratios say little about the code\n")
    with pytest.raises(ValueError, match="RVLM_BENCH_QUICK"):
        compare.compare(a_run(cell), a_run(cell, quick=True))
    with pytest.raises(ValueError, match="the run before is no JSON of pytest-benchmark"):
        compare.compare({"schema": "rvlm.bench/1"}, a_run(cell))


@pytest.mark.slow
def test_a_run_is_saved_and_compared(tmp_path):
    argv = [sys.executable, "-m", "rvlm", "bench", "filters", "--only", "rvlm or fft", "--device", "cpu"]
    done = quick([*argv, "--save", "test-of-the-benchmarks", "--json"])
    (saved,) = (BENCH.parent / ".benchmarks").glob("*/*_test-of-the-benchmarks.json")
    try:
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout)
        assert found["machine"]["quick"] and found["compared"] is None
        assert sorted(row["impl"] for row in found["rows"]) == ["fft", "rvlm"]
        done = quick([*argv, "--compare", "test-of-the-benchmarks", "--fail-above", "100000"])
        assert done.returncode == 0, done.stderr[-2000:]
        assert "## Against test-of-the-benchmarks" in done.stdout and "2 cells, ratios around" in done.stdout
        data = json.loads(saved.read_text())
        for bench in data["benchmarks"]:
            bench["stats"] = {
                name: value / 1e4 for name, value in bench["stats"].items() if name in ("q1", "median", "q3")
            }
        (tmp_path / "fast.json").write_text(json.dumps(data))
        done = quick([*argv, "--compare", str(tmp_path / "fast.json"), "--fail-above", "5"])
        assert done.returncode == 4 and done.stderr.count("FAIL bench/bench_filters.py::") == 2
    finally:
        saved.unlink()


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_lines_of_the_divergences_are_the_ops(peers, kind):
    student, teachers = torch.randn(4, 9).double(), torch.randn(3, 4, 9).double()
    weights = torch.tensor([0.5, 1.0, 2.0]).double()
    expected, _ = ops.multi_teacher_kl(student, teachers, weights, kind=kind)
    torch.testing.assert_close(peers.losses.multi_teacher_kl(student, teachers, weights, kind), expected)


def check_liger(peers, kind):
    student, teachers = torch.randn(4, 9, requires_grad=True), torch.randn(3, 4, 9)
    weights = torch.tensor([0.5, 1.0, 2.0])
    both = (
        peers.losses.multi_teacher_kl_of_liger(student, teachers, weights, kind),
        ops.multi_teacher_kl(student, teachers, weights, kind=kind)[0].sum(),
    )
    torch.testing.assert_close(*both)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student) for loss in both))


def test_lines_of_liger_are_the_ops(peers, monkeypatch):
    """Its KL is a subclass of torch's, which stands in for it here: its own kernel asks for a GPU."""
    package = types.ModuleType("liger_kernel.transformers")
    for name, content in (("kl_div", {"LigerKLDIVLoss": torch.nn.KLDivLoss}), ("jsd", {"LigerJSD": object})):
        module = types.ModuleType(f"{package.__name__}.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    check_liger(peers, "forward")


def test_lines_of_ligers_own_divergence_are_the_ops(peers):
    pytest.importorskip("liger_kernel", reason="extra [oracles] is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("runs Liger-Kernel's kernel in Triton's interpreter: needs TRITON_INTERPRET=1")
    check_liger(peers, "js")


@pytest.mark.parametrize("name", ["anchored_by_flex", "anchored_by_einsum", "anchored_by_matmul", "anchored_naive"])
def test_other_ways_to_an_anchored_map_are_the_op(peers, name):
    q, k, v = torch.randn(3, 2, 3, 5, 8).double()
    anchor = torch.rand(3, 5, 5).double()
    got = getattr(peers.attention, name)(q, k, v, anchor, 0.3)
    torch.testing.assert_close(got, ops.anchored_attention(q, k, v, anchor, 0.3))


@pytest.mark.parametrize("kind", ["ce", "cw", "dlr"])
def test_lines_of_the_attack_losses_are_the_ops(peers, kind):
    logits, y = torch.randn(20, 5).double(), torch.randint(0, 5, (20,))
    loss, correct = peers.losses.attack_loss(logits, y, kind)
    expected, verdict, _ = ops.attack_loss(logits, y, kind)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(correct, verdict)


def test_lines_of_the_iterates_are_the_ops(peers):
    x, x_prev, x_adv, grad = (
        torch.rand(4, 3, 6, 6),
        torch.rand(4, 3, 6, 6),
        torch.rand(4, 3, 6, 6),
        torch.randn(4, 3, 6, 6),
    )
    step, flag = torch.rand(4) / 10, torch.tensor([True, False, True, False])
    expected = ops.apgd_step_(x_prev.clone(), x_adv, grad, x, step, 0.03)
    got = peers.iterates.apgd_step(x_prev, x_adv, grad, x, step.view(-1, 1, 1, 1), 0.03, 0.75)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert torch.equal(peers.iterates.keep_best(x.clone(), x_adv, flag), ops.keep_best_(x.clone(), x_adv, flag))
    for kind in ("mi", "sign"):
        v, w, moved = torch.rand_like(x), torch.zeros_like(x), x_adv.clone()
        w.copy_(v)
        got = peers.iterates.momentum_step(x_adv, v, grad, x, 0.01, 0.03, 0.9, kind)
        ops.momentum_step_(moved, w, grad, x, 0.01, 0.03, 0.9, kind)
        torch.testing.assert_close(got, moved, rtol=0, atol=1e-6)
        torch.testing.assert_close(v, w, rtol=1e-5, atol=1e-7)
    for eps in (0.1, 10.0, 1000.0):
        torch.testing.assert_close(
            peers.iterates.l1_project(x_adv, x, eps), ops.l1_project(x_adv, x, eps), rtol=0, atol=1e-5
        )


@pytest.fixture
def methods():
    spec = importlib.util.spec_from_file_location("methods", BENCH / "methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(**given):
    base = {
        "name": "tecoa",
        "seed": 0,
        "train_seconds": 1.0,
        "train_images": 40,
        "samples": 20,
        "few": 10,
        "clean": 0.9,
    }
    rates = {"pgd 8/255": 0.5, "pgd 8/255, same samples": 0.5, "autoattack 8/255": 0.45, "proxy clean": 0.9}
    return (
        base
        | rates
        | {"joint 8/255": 0.7, "transfer 8/255": 0.75, "proxy on its images 8/255": 0.8, "failed checks 8/255": []}
        | given
    )


def test_the_table_of_methods(methods, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        methods, "measure", lambda task, name, seed, args: row(name=name, seed=seed, clean=0.9 + 0.02 * seed)
    )
    argv = ["--out", str(tmp_path / "digits"), "--seeds", "0,1", "--eps", "8/255", "--only", "undefended;tecoa"]
    assert methods.main(argv) == 0
    text = (tmp_path / "digits.md").read_text()
    assert "| method | seeds | train s | seen | clean | pgd-20 8/255 |" in text, "no column without a number"
    assert "| undefended | 1 | 1 | 40 | 90.0 | 50.0 | 45.0 | 75.0 | 70.0 | 80.0 |" in text
    assert "| tecoa | 2 | 1 | 40 | 91.0 ±1.0 | 50.0 ±0.0 | 45.0 ±0.0 | 75.0 ±0.0 | 70.0 ±0.0 | 80.0 ±0.0 |" in text
    assert "bench/methods.py" in text and len(list((tmp_path / "digits").glob("*.json"))) == 3
    monkeypatch.setattr(methods, "measure", None)  # runs that are there are not repeated
    assert methods.main(argv) == 0
    more = [word.replace("0,1", "0,1,2") for word in argv]
    assert methods.main([*more, "--collect"]) == 0 and "| tecoa | 2 |" in (tmp_path / "digits.md").read_text()
    with pytest.raises(SystemExit):
        methods.main([*[word.replace("0,1", "7") for word in argv], "--collect"])


def test_no_table_where_pgd_was_too_weak(methods, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(methods, "measure", lambda task, name, seed, args: row(name=name, **{"autoattack 8/255": 0.3}))
    argv = ["--out", str(tmp_path / "digits"), "--seeds", "0", "--eps", "8/255", "--only", "tecoa"]
    assert methods.main(argv) == 4
    assert "PGD leaves 50.0%, AutoAttack 30.0% of the same samples" in capsys.readouterr().err
    assert not (tmp_path / "digits.md").exists()
    with pytest.raises(SystemExit):
        methods.main(["--out", str(tmp_path), "--only", "magic"])


def test_the_page_of_efficiency(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("efficiency", BENCH / "images_to_robustness.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def found(seed, *_):
        curve = [0.3, 0.7, 0.8, 0.9] if seed == 0 else [0.1, 0.2, 0.3, 0.4]
        seconds = {
            f"{n} seconds, {c}": 1.0 + (n == "mmt_ard") for n in ("ard", "mmt_ard") for c in ("cached", "uncached")
        }
        needed = 2 if seed == 0 else None
        base = {"images": 40, "held_out": 10, "epochs": 4, "goal": 0.7, "seconds to fill the cache": 0.5}
        curves = {"seed": seed, "ard reached after": 4, "mmt_ard reached after": needed, "mmt_ard robust": curve}
        return base | curves | seconds

    monkeypatch.setattr(module, "measure", found)
    assert module.main(["--out", str(tmp_path / "eff"), "--seeds", "0,1"]) == 0
    text = (tmp_path / "eff.md").read_text()
    assert "| 0 | 70.0 | 4 (of 4) | 2 | 2.00x | 1.00x | 1.00x |" in text
    assert "| 1 | 70.0 | 4 (of 4) | not in 4 (best 40.0) | - | - | - |" in text
    assert len(json.loads((tmp_path / "eff.json").read_text())["rows"]) == 2


@pytest.mark.slow
def test_a_row_with_few_images(methods, tmp_path, monkeypatch):
    from rvlm.data import load_data
    from rvlm.models import load_clip

    monkeypatch.setenv("RVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(methods.ROWS, "few", ("r_adapt", {"epochs": 3, "steps": 1}, 5))
    data, make = load_data("digits", "train", limit=20), lambda: load_clip("tiny-vit", seed=1)
    task = methods.Task(data, data, make, lambda: load_clip("tiny-rn"), make, settings={})
    monkeypatch.setitem(methods.TASKS, "digits", lambda root, images: task)
    argv = ["--out", str(tmp_path / "r_adapt"), "--seeds", "0", "--eps", "8/255", "--only", "few", "--attack", "pgd-1"]
    assert methods.main([*argv, "--strong", "fgsm", "--few", "5", "--device", "cpu"]) in (0, 4)
    (path,) = (tmp_path / "r_adapt").glob("*.json")
    found = json.loads(path.read_text())["row"]
    assert (found["images"], found["train_images"]) == (5, 15) and 0 <= found["lowfreq 8/255"] <= found["clean"]
