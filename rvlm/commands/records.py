"""compare, report, repro: what was measured, beside each other, on a page, and once more."""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from rvlm.arguments import CHECK_FAILED, CompareArgs, ReportArgs, ReproArgs
from rvlm.commands.shared import Run, device_of, together
from rvlm.plugins import from_file, is_own

__all__ = ["compare", "report", "repro"]


def compare(args: CompareArgs) -> int:
    from rvlm.evaluation import compare as compare_records
    from rvlm.report import comparison_table

    if not (args.a and args.b):
        raise ValueError("compare takes two records: rvlm compare A.json B.json")
    found = compare_records(args.a, args.b)
    print(json.dumps([dataclasses.asdict(one) for one in found], indent=1) if args.json else comparison_table(found))
    return 0


def report(args: ReportArgs) -> int:
    from rvlm import report as pages

    if args.leaderboard and (args.published or len(args.runs) != 1 or not Path(args.runs[0]).is_dir()):
        raise ValueError("a leaderboard is of one folder: rvlm report FOLDER --leaderboard --out FILE")
    if not args.runs and not args.published:
        raise ValueError("report takes runs: rvlm report RUN ... --out FILE.html|.md|.csv|.tex")
    if args.out is not None:
        pages.check_format(args.out)
    found = pages.gather(args.runs)
    title, legend, drawn = "Clean and robust", pages.html.LEGEND, []
    if args.leaderboard:
        title, legend = "Leaderboard", pages.leaderboard.LEGEND
        tables, unranked = pages.leaderboards(found, pages.load_entries(args.runs[0]))
        found.left_out |= unranked
    elif args.published:
        title, legend, tables = "Published figures", pages.published.LEGEND, pages.published_tables(found)
    else:
        tables = pages.result_tables(found)
    for name, reason in found.left_out.items():
        print(f"LEFT OUT {name}: {reason}", file=sys.stderr)
    if args.out is None:
        for table in tables:
            print(
                "\n\n".join(filter(None, (f"## {table.title}", table.note, pages.markdown(table.rows, table.columns))))
            )
        return 0
    out = Path(args.out)
    if out.suffix in (".html", ".md") and not args.published:
        drawn = pages.figures(found, out.with_name(f"{out.stem}-figures"))
    about = pages.facts(found)
    print(f"written to {pages.write_report(out, args.title or title, tables, drawn, about, legend=legend)}")
    return 0


def repro(args: ReproArgs) -> int:
    """Runs a record's evaluation again: OUT/repro.json, and a record of its own."""
    from rvlm.evaluation import read_recorded, write_evaluation
    from rvlm.models import load_clip

    if not args.record:
        raise ValueError("repro takes a record: rvlm repro RUN/result/NAME.json")
    old, device = read_recorded(args.record), device_of(args.device)

    def load(spec: str | None, role: str):
        if spec is None:
            return None
        model = from_file(spec) if is_own(spec) else load_clip(spec)
        return old.classifier(model.to(device) if isinstance(model, torch.nn.Module) else model, data, role)

    with together(args) as ranks:
        with ranks.first_before_others():  # models of the zoo are trained on first use
            data = old.samples(args.data or old.data)
            model = load(args.model or old.model, "model")
            source = load(old.source and (args.source or old.source), "source")
        run = Run("repro", args) if ranks.first else None
        found = old.run(model, data, source, device)
        if run is None:
            return 0
        result, record = old.compare(found), old.record
        mark = record["protocol"] and record["protocol"] | {"status": record["status"]}
        about = {
            "method": record["model"]["method"], "method_sha": record["model"].get("method_sha"),
            "processes": ranks.size, "source": source, "protocol": mark,
        }  # fmt: skip
        rows = [write_evaluation(run.out, record["name"], found, data, model, **about)]
        run.write_json(run.out / "repro.json", {"record": str(old.path), **dataclasses.asdict(result)})
        run.finish(rows, json.dumps(dataclasses.asdict(result), indent=1) if args.json else _reproduced(result))
        return 0 if result.holds else CHECK_FAILED


def _reproduced(result) -> str:
    lines = [
        f"{what:<7} {100 * result.recorded[what]:.1f} % ({100 * low:.1f} to {100 * high:.1f}) recorded, "
        f"{100 * result.again[what]:.1f} % again; {result.changed[what]} of {result.n} verdicts changed"
        for what, (low, high) in result.interval.items()
    ]
    lines += [f"not as it was: {line}" for line in result.differs]
    rule = "every verdict must be the same" if result.exact else "accuracies must lie in the recorded intervals"
    return "\n".join([*lines, f"{'holds' if result.holds else 'DOES NOT HOLD'}: here {rule}"])
