"""bench SUITE...: the pytest-benchmark files of a source checkout, run, kept and compared with a run that was kept.

pytest-benchmark does the measuring and the keeping (ROOT/.benchmarks/MACHINE/NUMBER_NAME.json); tables and comparison
are those of bench/report.py and bench/compare.py, which are no part of an installed package either.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import rvlm
from rvlm.arguments import CHECK_FAILED, BenchArgs
from rvlm.plugins import from_file

__all__ = ["run_suites"]

ROOT = Path(rvlm.__file__).parents[1]
NO_TESTS = 5  # pytest's exit code


def run_suites(args: BenchArgs) -> int:
    """Runs suites; the exit code says whether all ran, and with --fail-above whether a cell became slower by more."""
    files = _files(args.suites)
    if args.fail_above is not None and (args.compare is None or args.fail_above < 0):
        raise ValueError("--fail-above is a percentage of a --compare run's times, at least 0: what is compared?")
    if args.save is not None and not re.fullmatch(r"[\w.-]+", args.save):
        raise ValueError(f"--save {args.save!r}: expected a name of letters, digits, dots and dashes")
    before = None if args.compare is None else _before(args.compare)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "pytest", "-q", "-rs", *files, "--benchmark-disable-gc", "--benchmark-quiet"]
        command += [f"--benchmark-json={found}"] + ([f"--benchmark-save={args.save}"] if args.save else [])
        command += ["-k", args.only] if args.only else []
        code = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode
        if not found.is_file():  # nothing was left to measure, or pytest did not come that far
            what = "no cell is left by --only" if code == NO_TESTS else "nothing was measured: see what pytest says"
            print(f"rvlm bench: {what}", file=sys.stderr)
            return CHECK_FAILED
        machine, rows, _ = from_file(f"{ROOT}/bench/report.py:read")([found])
        now = json.loads(found.read_bytes())
    compared = None if before is None else from_file(f"{ROOT}/bench/compare.py:compare")(before, now)
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows, "compared": compared}, indent=1))
    else:
        print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None))
        print(from_file(f"{ROOT}/bench/report.py:tables")(rows))
        if compared is not None:
            print(f"\n## Against {args.compare}\n\n{from_file(f'{ROOT}/bench/compare.py:text')(compared)}")
    if code:
        print(f"rvlm bench: pytest ended with {code}: cells are missing above", file=sys.stderr)
        return CHECK_FAILED
    return 0 if compared is None or args.fail_above is None else _verdict(compared["cells"], args.fail_above)


def _verdict(cells: list[dict], percent: float) -> int:
    """Slower cells, whose quartiles do not overlap, count from a ratio of medians on."""
    worse = [cell for cell in cells if cell["verdict"] == "slower" and cell["ratio"] > 1 + percent / 100]
    for cell in worse:
        print(f"FAIL {cell['name']}: {cell['ratio']:.2f} of the time before", file=sys.stderr)
    return CHECK_FAILED if worse else 0


def _files(suites: list[str]) -> list[str]:
    """Files of suites by name, relative to the checkout."""
    have = {path.stem.removeprefix("bench_"): path for path in sorted((ROOT / "bench").glob("bench_*.py"))}
    if not have:
        raise ValueError(
            f"the benchmarks are not installed with rvlm, and {ROOT} is no source checkout: clone the repository and "
            "pip install -e there. rvlm bench --mine FILE.py:NAME works everywhere"
        )
    for package in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'the benchmarks need {package}: pip install -e ".[dev]"')
    if unknown := [name for name in suites if name not in have]:
        raise ValueError(f"unknown suite {unknown[0]!r}: expected {', '.join(have)}, or none for all")
    return [str(have[name].relative_to(ROOT)) for name in suites or have]


def _before(name: str) -> dict:
    """A run to compare with; what is wrong with it is said before another one takes minutes."""
    path = _kept(name)
    try:
        found = json.loads(path.read_bytes())
        from_file(f"{ROOT}/bench/compare.py:compare")(found, found)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be compared with: {error}") from None
    return found


def _kept(name: str) -> Path:
    """The file of a run: a path, or the newest one that was saved under a name."""
    if Path(name).is_file():
        return Path(name)
    saved = sorted((ROOT / ".benchmarks").glob("*/[0-9]*_*.json"), key=lambda path: path.stat().st_mtime)
    names = {path.stem.partition("_")[2]: path for path in saved}  # later ones take the place of earlier ones
    if name not in names:
        raise FileNotFoundError(f"no run {name}: expected a file or one of {', '.join(names) or 'no saved runs'}")
    return names[name]
