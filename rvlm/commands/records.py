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
    from rvlm.evaluation import read_recorded
    from rvlm.evaluation.compare import read_any
    from rvlm.evaluation.records import ANSWERS
    from rvlm.models import load_clip

    if not args.record:
        raise ValueError("repro takes a record: rvlm repro RUN/result/NAME.json")
    if read_any(Path(args.record))["schema"] == ANSWERS:
        return _repro_answers(args)
    if args.adapter:
        raise ValueError("--adapter is for records of LVLMs: elsewhere it is a part of --model")
    old, device = read_recorded(args.record), device_of(args.device)
    specs = _placed(old.models, args)

    def load(spec: str, role: str, data):
        model = from_file(spec) if is_own(spec) else load_clip(spec)
        return old.classifier(model.to(device) if isinstance(model, torch.nn.Module) else model, data, role)

    with together(args) as ranks:
        with ranks.first_before_others():  # models of the zoo are trained on first use
            data = old.samples(args.data or old.data)
            models = {role: load(spec, role, data) for role, spec in specs.items()}
        run = Run("repro", args) if ranks.first else None
        found = old.run(models, data, device)
        if run is None:
            return 0
        return _judge(run, args, old.path, old.compare(found), old.write(run.out, found, data, models, ranks.size))


def _repro_answers(args: ReproArgs) -> int:
    """The same of an LVLM's answers."""
    from rvlm.lvlm import load_lvlm
    from rvlm.lvlm.records import write_answers
    from rvlm.lvlm.repro import read_recorded_answers

    old = read_recorded_answers(args.record)
    if args.source:
        raise ValueError("images for transfer are made on the LVLM without its adapter: leave --source out")
    if args.adapter and old.adapter is None:
        raise ValueError("the record is of the LVLM without an adapter: leave --adapter out")
    about, dtype = old.record["data"], {"torch.float32": "fp32", "torch.bfloat16": "bf16"}.get(old.record.get("dtype"))
    lvlm = load_lvlm(args.model or old.model, device_of(args.device), dtype=dtype or "auto", size=about["size"])
    adapter = old.adapted(lvlm, args.adapter or old.adapter)
    data = old.samples(args.data or old.data)
    run, found = Run("repro", args), old.run(lvlm, data, adapter)
    rows = write_answers(
        run.out, [found], lvlm, data, adapter, old.settings, eps=old.record["eps"], partial=about["partial"],
        protocol=old.record.get("protocol"),
    )  # fmt: skip
    return _judge(run, args, old.path, old.compare(found), rows)


def _placed(models: dict[str, str], args: ReproArgs) -> dict[str, str]:
    """Specs by role, with what --model and --source say: of a transfer matrix, all models in the record's order."""
    if "model" not in models:
        given = args.model.split(",") if args.model else list(models.values())
        if args.source or len(given) != len(models):
            raise ValueError(f"the record is of {', '.join(models)}: give as many as --model A,B,..., and no --source")
        return dict(zip(models, given, strict=True))
    if args.source and "source" not in models:
        raise ValueError("the record is white-box: leave --source out")
    return {role: getattr(args, role) or spec for role, spec in models.items()}


def _judge(run: Run, args: ReproArgs, record: Path, result, rows: list[dict]) -> int:
    run.write_json(run.out / "repro.json", {"record": str(record), **dataclasses.asdict(result)})
    run.finish(rows, json.dumps(dataclasses.asdict(result), indent=1) if args.json else _reproduced(result))
    return 0 if result.holds else CHECK_FAILED


def _reproduced(result) -> str:
    lines = []
    for what, (low, high) in result.interval.items():
        old, new, samples = result.recorded[what], result.again[what], result.samples[what]
        which = (
            f": samples {', '.join(map(str, samples[:10]))}{', ...' if len(samples) > 10 else ''}" if samples else ""
        )
        lines.append(
            f"{what:<7} {100 * old:.1f} % ({100 * low:.1f} to {100 * high:.1f}) recorded, {100 * new:.1f} % again; "
            f"{len(samples)} of {result.n[what]} verdicts changed{which}"
        )
    lines += [f"not as it was: {line}" for line in result.differs]
    rule = "every verdict must be the same" if result.exact else "figures must lie in the recorded intervals"
    return "\n".join([*lines, f"{'holds' if result.holds else 'DOES NOT HOLD'}: here {rule}"])
