"""What is shipped: wheel and sdist hold every part, and an installed copy runs without the source tree."""

import importlib.metadata
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _installed(name):
    # By metadata: find_spec("pip") makes setuptools' distutils shim switch itself off in this process.
    return any(d.metadata["Name"] == name for d in importlib.metadata.distributions())


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _installed("pip"), reason="pip is not installed in this environment"),
    pytest.mark.skipif(not _installed("setuptools"), reason="setuptools is not installed"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clean copy of the tracked files, so that a build leaves nothing in the working tree."""
    folder = tmp_path_factory.mktemp("source")
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def build(source, out, *how):
    """Calls the build backend as pip would, without isolation and without compiling."""
    code = f"import _build_backend as b; b.{how[0]}({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, env=_environment(RVLM_BUILD_EXT="0")
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.iterdir())


def _environment(**more):
    import os

    return {**os.environ, **more}


def test_the_wheel_runs_elsewhere(source, tmp_path):
    (tmp_path / "dist").mkdir()
    wheel = build(source, tmp_path / "dist", "build_wheel")
    names = zipfile.ZipFile(wheel).namelist()
    for part in (
        "rvlm/kernels/steps.py",
        "rvlm/recipes/digits/tecoa.yaml",
        "rvlm/report/report.html",
        "rvlm/published/hpt_gpd.yaml",
        "rvlm/ops/steps.py",
    ):
        assert part in names
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel],
        check=True,
    )
    code = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]  # else a checkout's parts fill the gaps
import rvlm, torch
from rvlm.attacks import pgd
from rvlm.cli import main
from rvlm.ops import backends
assert rvlm.__file__.startswith(SITE), rvlm.__file__
assert backends()["ops"]["linf_step_"]["cpu"] == "reference"
import rvlm.kernels.steps
w = torch.randn(12, 3)
assert pgd(lambda x: x.flatten(1) @ w, torch.rand(2, 3, 2, 2)).shape == (2, 3, 2, 2)
assert main(["train", "--config", "digits/tecoa", "--print_config"]) == 0 and main(["info"]) == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", f"SITE = {str(tmp_path / 'site')!r}\n{code}"],
        cwd=tmp_path, capture_output=True, text=True, env=_environment(PYTHONPATH=str(tmp_path / "site")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "RVLM_BUILD_EXT=0" in done.stdout, "rvlm info repeats why nothing was built"


def test_the_sdist_holds_what_a_build_needs(source, tmp_path):
    sdist = build(source, tmp_path, "build_sdist")
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    for part in ("_build_backend.py", "setup.py", "csrc/cuda/steps.cu", "csrc/cuda/launch.h", "csrc/cpu/steps.cpp",
                 "csrc/step_math.h", "csrc/host.cpp", "kernels/steps.py", "LICENSE", "NOTICE"):  # fmt: skip
        assert part in names
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = next((tmp_path / "unpacked").iterdir())
    (tmp_path / "dist").mkdir()
    assert build(unpacked, tmp_path / "dist", "build_wheel").suffix == ".whl"


@pytest.mark.parametrize("compiler, host_torch, expected", [
    (True, True, []), (True, False, ["torch>=2.10"]), (False, False, []),
])  # fmt: skip
def test_torch_is_a_build_requirement_only_where_it_is_missing(source, compiler, host_torch, expected):
    code = f"""
import os
from types import SimpleNamespace
import _build_backend as b
b.shutil.which = lambda name: {compiler} or None
finder = SimpleNamespace(find_spec=lambda *_: {host_torch} or None)
b.importlib = SimpleNamespace(machinery=SimpleNamespace(PathFinder=finder))
os.environ.pop("RVLM_BUILD_EXT", None)
assert b._torch_requirement() == {expected}, b._torch_requirement()
os.environ["RVLM_BUILD_EXT"] = "0"
assert b._torch_requirement() == []
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("forced", [{}, {"RVLM_BUILD_EXT": "1"}, {"FORCE_CUDA": "1"}])
def test_a_compiler_that_fails_costs_one_level_or_is_an_error(source, tmp_path, forced):
    broken = {"CC": "/bin/false", "CXX": "/bin/false", **forced}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path],
        cwd=source, capture_output=True, text=True, env=_environment(**broken),
    )  # fmt: skip
    assert (done.returncode != 0) == bool(forced), done.stderr[-2000:]
    if not forced:
        (written,) = (tmp_path / "lib").rglob("_build_info.json")
        info = json.loads(written.read_text())
        assert info["ext"] == "none" and not info["host"]
        assert "the C++ part was not built" in info["reason"] and "rvlm._host was not built" in info["reason"]
        assert "\n" not in info["reason"]
