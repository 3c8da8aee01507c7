"""Turns pytest-benchmark's JSON files into one small JSON and a Markdown page.

    python bench/report.py --out bench/results/2026-11-21-cpu steps.json pgd.json [--note TEXT] [--parts parts.json]

writes OUT.json (schema rvlm.bench/1: machine, versions, rows with medians and quartiles) and OUT.md, and prints the
tables. Missing input files are named and left out. Files of several calls on one machine may be given together.

    python bench/report.py --out bench/results/2026-11-21-h100 runs/*/clips-*.json --into README.md

also writes the table of whole attacks between the lines <!-- clips --> and <!-- end --> of a page.
"""

import argparse
import json
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

from rvlm.markdown import markdown_table

STEPS = (
    "linf_step_", "l2_step_", "uniform_start", "apgd_step_", "keep_best_", "l1_project", "l1_step_", "momentum_step_",
)  # fmt: skip
COLUMNS = {
    **dict.fromkeys(STEPS, ("gb_per_s", "fraction_of_copy", "device_us", "compile_seconds")),
    "gaussian_filter": ("largest_error",),
    "anchored_attention": ("device_us", "compile_seconds"),
    "prefix_attention": ("device_us",),
    "anchored_residual": ("device_us", "compile_seconds"),
    "multi_teacher_kl": ("device_us", "compile_seconds"),
    "fold_teachers": ("device_us", "compile_seconds"),
    "clip_head_loss": ("device_us", "compile_seconds"),
    "attack_loss": ("device_us", "compile_seconds"),
    "autoattack": ("robust",),
    "attacks": ("robust", "fooled", "distance"),
    "autoattack whole": ("peer", "robust"),
    "autoattack by one import": ("peer", "robust"),
    "apgd-t in slots": ("peer", "robust"),
    "square in slots": ("peer", "robust"),
    "pgd's restarts in slots": ("peer", "robust"),
    "fab-t in slots": ("peer", "robust", "verdicts_differing"),
    "pgd-100 exits": ("robust",),
    "training": (),
    "clips": ("peer", "gain", "images_per_s", "peak_mib", "robust", "images", "verdicts_differing"),
    "gains": ("peer", "fooled", "images", "verdicts_differing", "over_eager", "compile_seconds", "break_even"),
    "pgd-10": ("images_per_s", "share_model", "share_step", "share_rest", "pixels_differing", "compile_seconds"),
}
LOSING = 0.98  # below this the implementation is slower than what it is compared with
PART = re.compile(r"(<!-- clips -->\n).*?(<!-- end -->)", re.S)


def read(paths: list[Path]) -> tuple[dict, list[dict], list[str]]:
    """Machine, rows, and what was not measured: files that could not be read, and cells that files left out."""
    machine, rows, unread = {}, [], []
    for path in paths:
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError):
            unread.append(path.name)
            continue
        machine |= data["machine_info"].get("rvlm", {})
        ceilings = [b["extra_info"].get("copy_ceiling_gb_per_s") for b in data["benchmarks"]]
        if any(ceilings):
            machine["copy_ceiling_gb_per_s"] = round(next(filter(None, ceilings)), 1)
        if commit := (data.get("commit_info") or {}).get("id"):
            machine["commit"] = commit[:12]
        unread += [f"{cell} ({why})" for cell, why in data.get("left_out", {}).items()]
        for bench in data["benchmarks"]:
            rows.append({"group": bench["group"], "rounds": bench["stats"]["rounds"], **bench["extra_info"]})
    return machine, rows, unread


def tables(rows: list[dict]) -> str:
    """One Markdown table per group."""
    out = []
    for group in sorted({row["group"] for row in rows}, key=list(COLUMNS).index):
        mine = [row for row in rows if row["group"] == group]
        extra = [name for name in COLUMNS[group] if any(name in row for row in mine)]
        peers = "/".join(sorted({row["peer"] for row in mine}))
        out += [f"\n## {group}: speed against {peers}\n"]
        heads = ["case", "implementation", "median us", "IQR us", f"{peers} us", "speedup [quartiles]", *extra]
        lines = []
        for row in mine:
            low, median, high = row["speedup"]
            slower = " **slower**" if median < LOSING and row["impl"] != row["peer"] else ""
            cells = [row["case"], row["impl"], f"{row['us_per_call']:.1f}", f"{row['us_per_call_iqr']:.1f}"]
            cells += [f"{row['peer_us_per_call']:.1f}", f"{median:.2f} [{low:.2f}, {high:.2f}]{slower}"]
            cells += [value if isinstance(value := row.get(name, ""), str) else f"{value:.3g}" for name in extra]
            lines.append(cells)
        out.append(markdown_table(heads, lines))
    return "\n".join(out)


def whole_attacks(rows: list[dict]) -> str:
    """One line for each attack, model and batch of clips.py: images a second, ratios for what was gained, memory."""
    cells: dict[str, dict[tuple[str, str], dict]] = {}
    for row in rows:
        if row["group"] == "clips":
            cells.setdefault(row["case"], {})[row["impl"], row["peer"]] = row
    heads = ["attack", "torchattacks fp32, images/s", "rvlm, both fp32", "rvlm, both bf16", "rvlm bf16 over fp32"]
    heads += ["graph", "compiler", "all", "peak MiB, torchattacks / rvlm bf16", "verdicts that bf16 changes"]
    lines = []
    for case, found in cells.items():

        def ratio(impl: str, peer: str, found=found) -> str:
            return f"{found[impl, peer]['speedup'][1]:.2f}" if (impl, peer) in found else ""

        plain, narrow = found.get(("torchattacks",) * 2), found.get(("rvlm bf16", "rvlm"))
        best = "rvlm compile bf16" if ("rvlm compile bf16", "torchattacks") in found else "rvlm bf16"
        lines.append([
            case, "" if plain is None else f"{plain['images_per_s']:.1f}", ratio("rvlm", "torchattacks"),
            ratio("rvlm bf16", "torchattacks bf16"), ratio("rvlm bf16", "rvlm"), ratio("rvlm graph bf16", "rvlm bf16"),
            ratio("rvlm compile bf16", "rvlm bf16"), ratio(best, "torchattacks"),
            " / ".join("" if row is None else f"{row['peak_mib']:.0f}" for row in (plain, narrow)),
            "" if narrow is None else f"{narrow['verdicts_differing']} of {narrow['images']}",
        ])  # fmt: skip
    return markdown_table(heads, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="pytest-benchmark JSON files")
    parser.add_argument("--out", required=True, type=Path, help="path without suffix")
    parser.add_argument("--note", default="", help="a sentence on the conditions of the run")
    parser.add_argument("--parts", type=Path, help="JSON of the other parts of a run, kept as it is")
    parser.add_argument("--into", type=Path, help="page that gets the table of whole attacks, too")
    args = parser.parse_args()
    machine, rows, unread = read(args.files)
    record = {"schema": "rvlm.bench/1", "date": datetime.now(timezone.utc).date().isoformat(), "note": args.note}
    record |= {"machine": machine, "not_measured": unread, "rows": rows}
    if args.parts:
        record["parts"] = json.loads(args.parts.read_text())
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    quick = "Tiny sizes, to show that the files run: these numbers mean nothing.\n\n" if machine.get("quick") else ""
    page = f"# Benchmarks, {record['date']}\n\n{facts}\n\n{quick}{args.note}\n"
    if unread:
        page += f"\nNot measured: {', '.join(unread)}\n"
    attacks = whole_attacks(rows)
    if any(row["group"] == "clips" for row in rows):
        page += f"\n## Whole attacks\n\n{attacks}\n"
    page += tables(rows) + "\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_name(args.out.name + ".json").write_text(json.dumps(record, indent=1) + "\n")
    args.out.with_name(args.out.name + ".md").write_text(page)
    print(page)
    if args.into is not None:
        text = args.into.read_text()
        if not PART.search(text):
            raise SystemExit(f"{args.into} has no lines <!-- clips --> and <!-- end --> for the table to stand between")
        source = f"{record['date']}, {facts}"
        args.into.write_text(PART.sub(lambda found: f"{found[1]}{attacks}\n\n{source}\n{found[2]}", text))
    return 0 if rows and not {path.name for path in args.files}.intersection(unread) else 1


if __name__ == "__main__":
    sys.exit(main())
