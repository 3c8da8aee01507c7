"""Compares two runs of the benchmarks, cell by cell; `rvlm bench --compare` prints what it says.

A cell is a benchmark with its parameters. Its ratio is that of the medians a call, now / before, so that 1.10 takes a
tenth longer. The spread goes from (lower quartile now / upper quartile before) to the reverse; where it does not hold
1, the quartiles of the two runs do not overlap, and only then a cell is called slower or faster. Two runs are minutes
or months apart, in which a machine changes more than in a pair of turns: what a cell's speedup over its peer was in
either run stands beside it.
"""

import statistics

from rvlm.markdown import markdown_table

# What makes two machines two, and what else times depend on.
MACHINE = ("device", "cuda", "driver", "cores", "threads")
PACKAGES = ("torch", "triton", "rvlm", "torchattacks", "open_clip_torch", "liger_kernel", "numpy")
VERSIONS = ("commit", "python", *PACKAGES)

SOME = 3  # cells without a partner that are named


def compare(before: dict, now: dict) -> dict:
    """What two files of pytest-benchmark say of each other.

    Args:
        before, now: their content.

    Returns:
        cells (name, us_before, us, ratio, spread [low, high], verdict "slower", "faster" or "", speedup_before and
        speedup, which are None where there is no peer), gone and new (names of cells that only one run has), and
        machine and versions (name -> [before, now] of what differs).

    Raises:
        ValueError: something that is not such a file, or a quick run against a full one.
    """
    for title, data in (("before", before), ("now", now)):
        if not isinstance(data, dict) or not {"machine_info", "benchmarks"} <= data.keys():
            raise ValueError(f"the run {title} is no JSON of pytest-benchmark: expected machine_info and benchmarks")
    commits = [(data.get("commit_info") or {}).get("id", "")[:12] for data in (before, now)]
    told = [
        data["machine_info"].get("rvlm", {}) | {"commit": id} for data, id in zip((before, now), commits, strict=True)
    ]
    if told[0].get("quick", False) != told[1].get("quick", False):
        raise ValueError("one of the runs is of RVLM_BENCH_QUICK=1, whose numbers mean nothing: compare like with like")
    old, new = ({bench["fullname"]: bench for bench in data["benchmarks"]} for data in (before, now))
    differ = {key: [info.get(key) for info in told] for key in (*MACHINE, *VERSIONS)}
    differ = {key: values for key, values in differ.items() if values[0] != values[1]}
    return {
        "cells": [_cell(name, old[name], new[name]) for name in new if name in old],
        "gone": [name for name in old if name not in new],
        "new": [name for name in new if name not in old],
        "machine": {key: differ[key] for key in MACHINE if key in differ},
        "versions": {key: differ[key] for key in VERSIONS if key in differ},
    }


def _cell(name: str, before: dict, now: dict) -> dict:
    (low_before, was, high_before), (low, median, high) = _quartiles(before), _quartiles(now)
    spread = [low / high_before, high / low_before]
    return {
        "name": name, "us_before": was, "us": median, "ratio": median / was, "spread": spread,
        "verdict": "slower" if spread[0] > 1 else "faster" if spread[1] < 1 else "",
        "speedup_before": _speedup(before), "speedup": _speedup(now),
    }  # fmt: skip


def _quartiles(bench: dict) -> list[float]:
    """Microseconds a call: how many calls a round has is chosen anew in every run."""
    calls = bench["extra_info"].get("calls_per_round", 1)
    return [1e6 * bench["stats"][key] / calls for key in ("q1", "median", "q3")]


def _speedup(bench: dict) -> float | None:
    pairs = bench["extra_info"].get("speedup")
    return None if pairs is None else pairs[1]


def text(found: dict) -> str:
    """What `compare` returned, as a Markdown table with what to know before believing it."""
    lines = []
    for key, title in (("machine", "ANOTHER MACHINE"), ("versions", "other versions")):
        if found[key]:
            what = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in found[key].items())
            lines.append(f"{title}: {what}{': ratios say little about the code' if key == 'machine' else ''}")
    heads = ["cell", "us before", "us now", "ratio", "spread", "speedup before", "speedup now", ""]
    rows = []
    for cell in found["cells"]:
        low, high = cell["spread"]
        speedups = ["" if cell[key] is None else f"{cell[key]:.2f}" for key in ("speedup_before", "speedup")]
        cells = [cell["name"], f"{cell['us_before']:.1f}", f"{cell['us']:.1f}"]
        cells += [f"{cell['ratio']:.2f}", f"{low:.2f}-{high:.2f}", *speedups]
        rows.append([*cells, f"**{cell['verdict']}**" if cell["verdict"] else ""])
    verdicts = [cell["verdict"] for cell in found["cells"]]
    middle = f", ratios around {statistics.median(c['ratio'] for c in found['cells']):.2f}" if verdicts else ""
    lines += [
        "",
        markdown_table(heads, rows),
        "",
        f"{len(verdicts)} cells{middle}: {verdicts.count('slower')} slower, {verdicts.count('faster')} faster",
    ]
    for key, title in (("gone", "not measured now"), ("new", "not measured before")):
        if found[key]:
            some = ", ".join(found[key][:SOME]) + (", ..." if len(found[key]) > SOME else "")
            lines.append(f"{len(found[key])} cells {title}: {some}")
    return "\n".join(lines).strip()
