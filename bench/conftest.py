"""How everything here is timed.

`compare(subject, peer)` times two functions in turn, A B A B, in one process: pytest-benchmark times the subject, and
the untimed setup of each of its rounds is the peer's turn. Load on the machine then falls on both, and the ratio of
each pair is worth more than either median. Device work is waited for at the end of every turn.

Environment:
    RVLM_BENCH_QUICK=1    tiny sizes and few rounds: shows that the files run, and measures nothing.
    RVLM_BENCH_SECONDS    budget; what has not begun by then is skipped, and says so.
"""

import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # not a package: the files here import each other by name

from compare import PACKAGES
from measure import QUICK, quartiles, seconds_per_call, synchronize

_began = time.monotonic()
if "OMP_NUM_THREADS" in os.environ:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")


def pytest_runtest_setup(item):
    budget = float(os.environ.get("RVLM_BENCH_SECONDS", "inf"))
    if time.monotonic() - _began > budget:
        pytest.skip(f"time budget of {budget:g} s is spent")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["rvlm"] = versions()


def versions() -> dict:
    """What a number depends on."""
    from importlib import metadata

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "cuda": torch.version.cuda if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "quick": QUICK,
        **{package: version(package) for package in PACKAGES},
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def copy_ceiling(device) -> float:
    """Bytes per second, read plus written, of a large copy: what a kernel that only moves memory can reach."""
    megabytes = 4 if QUICK else 1024 if device.type == "cuda" else 128
    source = torch.rand(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    seconds = [seconds_per_call(lambda: target.copy_(source), device, calls=1) for _ in range(20)]
    return 2 * source.numel() * source.element_size() / quartiles(seconds[3:])[1]


@pytest.fixture(scope="module")
def load(device):
    """load(name, samples) -> a CLIP or "resnet20" as a classifier of digits, test images and labels; it keeps the last
    model.
    """
    pytest.importorskip("open_clip", reason="open_clip is needed for the models that are attacked")
    from peers.resnet import ResNet20

    from rvlm.data import load_data
    from rvlm.models import ZeroShotClassifier, load_clip

    data = load_data("digits", "test")

    @functools.lru_cache(1)
    def model_of(name: str):
        torch.manual_seed(0)
        if name == "resnet20":
            x, y, _ = (t.to(device) for t in load_data("digits", "train").batch(slice(0, None)))
            return ResNet20().to(device).fit(x, y, 3)
        clip = load_clip("tiny-vit" if QUICK else name, device)
        return ZeroShotClassifier(clip, data.class_names, data.template).to(device).eval()

    def one(name: str, samples: int):
        x, y, _ = (t.to(device) for t in data.batch(slice(0, samples)))
        return model_of(name), x, y

    return one


@pytest.fixture
def compare(benchmark, device) -> Callable[..., None]:
    """compare(subject, peer, round_seconds=..., **info): times both in turn and records their ratio.

    `round_seconds` is the least that a turn lasts: short calls are repeated within it. What lands in extra_info:
    us_per_call and us_per_call_iqr of the subject, peer_us_per_call, and speedup = peer / subject per pair, as
    [lower quartile, median, upper quartile].
    """

    def run(subject: Callable, peer: Callable, /, *, round_seconds: float = 5e-3, **info) -> None:
        slower = max(seconds_per_call(fn, device, calls=1) for fn in (subject, peer))
        rounds, warmup = (2, 1) if QUICK else (30, 3) if slower < 0.1 else (10, 1) if slower < 2 else (3, 0)
        calls = 1 if QUICK else max(1, min(200, int(round_seconds / slower)))
        peer_seconds = []

        def turn(fn):
            for _ in range(calls):
                fn()
            synchronize(device)

        def peers_turn():
            synchronize(device)
            began = time.perf_counter()
            turn(peer)
            peer_seconds.append((time.perf_counter() - began) / calls)

        benchmark.pedantic(turn, args=(subject,), setup=peers_turn, rounds=rounds, warmup_rounds=warmup)
        benchmark.extra_info.update(info, calls_per_round=calls)
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds = [total / calls for total in benchmark.stats.stats.data]
        low, median, high = quartiles(seconds)
        pairs = [theirs / ours for theirs, ours in zip(peer_seconds[-len(seconds) :], seconds, strict=True)]
        benchmark.extra_info.update(
            us_per_call=median * 1e6,
            us_per_call_iqr=(high - low) * 1e6,
            peer_us_per_call=quartiles(peer_seconds[-len(seconds) :])[1] * 1e6,
            speedup=quartiles(pairs),
        )

    return run
