"""`rvlm bench SUITE...` without its minutes: what it asks pytest for, what it makes of the answer, what it refuses."""

import importlib.util
import json
import os
import subprocess
from types import SimpleNamespace

import pytest

from rvlm import cli
from rvlm.commands import suites

ROW = {"peer": "eager", "impl": "cpp", "case": "[1]", "us_per_call": 2.0, "us_per_call_iqr": 0.1}
ROW |= {"peer_us_per_call": 1.0, "speedup": [0.4, 0.5, 0.6], "calls_per_round": 10}


def run(*argv):
    return cli.main(["bench", *map(str, argv)])


def a_run(median):
    stats = {"q1": 0.9 * median, "median": median, "q3": 1.1 * median, "rounds": 30}
    bench = {"fullname": "bench_steps.py::a", "group": "linf_step_", "stats": stats, "extra_info": ROW}
    return {"machine_info": {"rvlm": {"device": "x"}}, "commit_info": {}, "benchmarks": [bench]}


@pytest.fixture
def pytest_that(monkeypatch):
    """A pytest that writes what it is given, if anything, and returns a code; the words it was called with."""

    def made(result, code=0):
        words = []

        def call(command, cwd, stdout):
            words.extend(command)
            (file,) = [word.partition("=")[2] for word in command if word.startswith("--benchmark-json=")]
            if result is not None:
                with open(file, "w") as out:
                    json.dump(result, out)
            return SimpleNamespace(returncode=code)

        monkeypatch.setattr(subprocess, "run", call)
        return words

    return made


def test_suites_become_files_of_pytest(pytest_that, capsys):
    words = pytest_that(a_run(1.0))
    assert run("steps", "losses", "--only", "cpp", "--save", "before") == 0
    assert words[3:7] == ["-q", "-rs", "bench/bench_steps.py", "bench/bench_losses.py"]
    assert words[-2:] == ["-k", "cpp"] and "--benchmark-save=before" in words
    out = capsys.readouterr().out
    assert "device x" in out and "| [1] | cpp | 2.0 |" in out and "Against" not in out
    words.clear()
    assert run() == 0 and "bench/bench_train.py" in words and "bench/bench_steps.py" in words


def test_regressions_fail_above_a_percentage(pytest_that, tmp_path, capsys):
    file = tmp_path / "before.json"
    file.write_text(json.dumps(a_run(1.0)))
    pytest_that(a_run(1.3))
    assert run("steps", "--compare", file) == 0, "without --fail-above it is said, and that is all"
    assert "1 slower" in capsys.readouterr().out
    assert run("steps", "--compare", file, "--fail-above", "40") == 0
    assert run("steps", "--compare", file, "--fail-above", "20") == 4
    assert "FAIL bench_steps.py::a: 1.30 of the time before" in capsys.readouterr().err
    pytest_that(a_run(1.15))
    assert run("steps", "--compare", file, "--fail-above", "5", "--json") == 0, "quartiles overlap"
    assert json.loads(capsys.readouterr().out)["compared"]["cells"][0]["verdict"] == ""


def test_failures_of_pytest_are_failures(pytest_that, capsys):
    pytest_that(a_run(1.0), code=1)
    assert run("steps") == 4 and "cells are missing above" in capsys.readouterr().err
    pytest_that(None, code=1)
    assert run("steps") == 4 and "nothing was measured" in capsys.readouterr().err
    pytest_that(None, code=5)
    assert run("steps", "--only", "x") == 4 and "no cell is left by --only" in capsys.readouterr().err


def test_saved_runs_go_by_name_and_the_newest_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    for number, name in (("0001", "a_b"), ("0002", "a_b"), ("0003", "c")):
        file = tmp_path / ".benchmarks" / "machine" / f"{number}_{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
        os.utime(file, (int(number), int(number)))
    assert suites._kept("a_b").name == "0002_a_b.json"
    with pytest.raises(FileNotFoundError, match="no run b: expected a file or one of a_b, c"):
        suites._kept("b")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"benchmarks": [{}], "machine_info": {}}'])
def test_a_file_that_is_no_run_is_refused_before_anything_runs(content, tmp_path, pytest_that, capsys):
    words = pytest_that(a_run(1.0))
    (tmp_path / "x.json").write_text(content)
    assert run("steps", "--compare", tmp_path / "x.json") == 2 and not words
    assert "x.json cannot be compared with: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, code, message",
    [
        (["lunch"], 2, "unknown suite 'lunch': expected attacks, attention"),
        (["steps", "--fail-above", "5"], 2, "what is compared?"),
        (["steps", "--save", "a/b"], 2, "expected a name of letters"),
        (["steps", "--compare", "/no/file"], 3, "no run /no/file"),
    ],
)
def test_bad_input_is_named(argv, code, message, capsys):
    assert run(*argv) == code
    assert message in capsys.readouterr().err


def test_only_a_checkout_has_benchmarks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    assert run("steps") == 2 and "no source checkout" in capsys.readouterr().err


def test_pytest_benchmark_is_asked_for(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest_benchmark" else find(name))
    assert run("steps") == 2 and 'pip install -e ".[dev]"' in capsys.readouterr().err
