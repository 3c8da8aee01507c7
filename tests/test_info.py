"""rvlm info: tells what is there, and names the cause and the cure of what is not."""

import json
import subprocess
import sys

from rvlm import info


def test_everything_is_reported():
    found = info.collect()
    assert found["packages"]["torch"] and found["build"]["ext"] in ("none", "cpu", "cuda") and found["problems"] == []
    assert set(found["ops"]["ops"]) >= {"linf_step_", "uniform_start"}
    page = info.text(found)
    assert "linf_step_" in page and "built" in page
    for backend, reason in found["ops"]["missing"].items():
        assert f"missing   {backend}: {reason}" in page
    json.dumps(found)


def test_a_cpu_torch_beside_a_cuda_torchvision_is_named_with_the_cure():
    error = RuntimeError("operator torchvision::nms does not exist")
    message = info.diagnose_torchvision("torchvision", error, torch_cuda=None)
    assert (
        "CPU-only build" in message
        and "CUDA build" in message
        and "pip install --force-reinstall torch torchvision" in message
    )
    assert "do not fit" in info.diagnose_torchvision("open_clip", error, torch_cuda="13.0")
    assert "pip install --upgrade" in info.diagnose_torchvision("open_clip", ImportError("no module"), None)


def test_it_runs_when_things_are_missing_or_broken():
    code = """
import sys
for name in ("torchvision", "open_clip", "triton", "rvlm._C", "rvlm._C_cuda", "rvlm._host"):
    sys.modules[name] = None
from rvlm.cli import main
sys.exit(main(["info"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PROBLEM   torchvision cannot be imported" in done.stdout and "missing   triton" in done.stdout
    assert "linf_step_      reference / reference" in done.stdout
