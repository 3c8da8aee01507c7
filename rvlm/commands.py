"""What the commands of `rvlm.cli` do. Each takes its arguments and returns an exit code."""

import copy
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rvlm.analyze import TOWERS
from rvlm.arguments import (
    CHECK_FAILED,
    DATA_MISSING,
    AnalyzeArgs,
    Arguments,
    AttackArgs,
    BenchArgs,
    CheckArgs,
    CompareArgs,
    ConvertArgs,
    DataArgs,
    DataToolArgs,
    DemoArgs,
    EvalArgs,
    InfoArgs,
    LsArgs,
    LvlmArgs,
    ProfileArgs,
    ReportArgs,
    ReproArgs,
    TrainArgs,
    recipes,
)
from rvlm.ranks import Ranks, joined
from rvlm.units import Eps

__all__ = [
    "analyze", "attack", "bench", "check", "compare", "convert", "data", "demo", "eval", "info", "ls", "lvlm",
    "profile", "report", "repro", "train",
]  # fmt: skip


def demo(args: DemoArgs) -> int:
    from rvlm.demo import run

    run(Path(args.out), seed=args.seed, quick=args.quick)
    return 0


def info(args: InfoArgs) -> int:
    from rvlm import info as page

    found = page.collect()
    print(json.dumps(found, indent=1) if args.json else page.text(found))
    return 0


def ls(args: LsArgs) -> int:
    from rvlm.attacks.stages import PATTERNS
    from rvlm.data import TEMPLATES, templates
    from rvlm.data.prompts import fingerprint
    from rvlm.data.registry import entries
    from rvlm.data.torchvision_sets import SETS
    from rvlm.evaluation import load_protocol, protocol_names
    from rvlm.methods import list_methods, method_class
    from rvlm.models import tiny, zoo

    lists = {
        "models": [
            *zoo.NAMES,
            *tiny.ARCHITECTURES,
            "ARCH[:PRETRAINED] of open_clip",
            "hf-hub:ORG/NAME",
            "hf:PATH_OR_NAME",
            "FOLDER",
        ],
        "methods": [f"{name} (presets: {', '.join(method_class(name).presets)})" for name in list_methods()],
        "attacks": [*PATTERNS, "several, separated by commas"],
        "datasets": [
            "digits",
            "npz:PATH",
            "folder:PATH",
            "wds:PATH",
            "parquet:PATH",
            *(f"torchvision:{name}:ROOT" for name in SETS),
            *(_line_of(entry) for entry in entries().values()),
        ],  # fmt: skip
        "templates": [
            *(
                f"{name} ({len(templates(name))}, hash {fingerprint(templates(name))})"
                for name in (*TEMPLATES, "openai", "simple")
            ),
            "file:PATH",
        ],  # fmt: skip
        "protocols": [f"{name:<18}{_sentence(load_protocol(name))}" for name in protocol_names()],
        "recipes": recipes(),
    }
    if args.what not in ("all", *lists):
        raise ValueError(f"cannot list {args.what!r}: expected all, {', '.join(lists)}")
    for title, names in lists.items():
        if args.what in ("all", title):
            print(title, *(f"  {name}" for name in names), sep="\n")
    return 0


def _sentence(protocol) -> str:
    attacks = "; ".join(f"{attack} at {', '.join(radii)}" for attack, radii in protocol.attacks.items())
    return f"{protocol.sha}: {len(protocol.parts)} sets, {protocol.n or 'all'} images; {attacks}"


def _line_of(entry) -> str:
    """A data set in one line: how many test samples each of its layouts must hold."""
    counts = [
        f"{layout.kind} {layout.counts.get('test') or 'unknown'}"
        for layout in entry.layouts
        if layout.kind != "parquet"
    ]
    return f"{entry.name:<16}{entry.title}: {entry.classes or 'unknown'} classes; test: {', '.join(counts)}"


def data(args: DataToolArgs) -> int:
    tools = {"check": _check_data, "get": _get_data, "make-wds": _make_wds}
    if args.what not in tools:
        raise ValueError(f"cannot {args.what!r} data: expected {', '.join(tools)}")
    return tools[args.what](args)


def _check_data(args: DataToolArgs) -> int:
    """A line for every layout of every set, and what is wrong with it."""
    from rvlm.data.audit import audit

    root, _, names = _registered(args)
    found = []
    for name in names:
        spec = name if ":" in name or name == "digits" else f"{name}:{root}"
        for line in audit(spec, args.split, args.images):
            found.append(line)
            count = f"{line.samples} samples (expected {line.expected or 'unknown'}) " if line.samples else ""
            print(f"{line.status:<8} {line.name:<26} {count}{line.path}")
            for problem in line.problems:
                print(f"         {problem}")
    status = [line.status for line in found]
    print(", ".join(f"{status.count(word)} {word}" for word in ("ok", "partly", "missing")))
    if "missing" in status:
        print("rvlm data get NAME says where a set comes from and where to put it")
    return DATA_MISSING if "missing" in status else CHECK_FAILED if "partly" in status else 0


def _get_data(args: DataToolArgs) -> int:
    from rvlm.data.get import fetch, fetchable, instructions

    root, known, names = _registered(args)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown data set {unknown[0]!r}: expected one of {', '.join(known)}")
    for name in names:
        print(instructions(known[name], root))
        if args.download and args.names != ["all"] and fetchable(known[name]):
            fetch(known[name], root)
            print(f"  torchvision has fetched it into {root}")
    return 0


def _registered(args: DataToolArgs) -> tuple[Path, dict[str, Any], list[str]]:
    """The root, what is known of the sets there, and the names that were asked for."""
    from rvlm.data.registry import data_root, entries

    root = Path(args.root) if args.root else data_root()
    known = entries(root)
    return root, known, [*known] if args.names == ["all"] else args.names


def _make_wds(args: DataToolArgs) -> int:
    from rvlm.data import load_data
    from rvlm.data.make_wds import make_wds

    if len(args.names) != 2:
        raise ValueError("make-wds takes a data spec and a folder: rvlm data make-wds SPEC OUT")
    spec, out = args.names
    spec = f"{spec}:{args.root}" if args.root and ":" not in spec else spec
    tars = make_wds(load_data(spec, args.split, size=args.size, limit=args.limit), out)
    print(f"{len(tars)} tars in {tars[0].parent}: read them as wds:{out}")
    return 0


def eval(args: EvalArgs) -> int:
    from rvlm.data.captions import holds_captions
    from rvlm.evaluation import evaluate, over_radii, parse_attack, write_evaluation
    from rvlm.report import accuracy_over_eps

    if args.protocol is not None:
        return _eval_protocol(args)
    if args.images is not None:
        return _eval_images(args)
    radii = [Eps(text).check(args.norm) for text in args.eps.split(",")]
    if holds_captions(args.data):
        return _eval_retrieval(args, radii)
    parse_attack(args.attack, args.norm)
    with _together(args) as ranks:
        data, model, source = _load(args, ranks)
        run = _Run("eval", args) if ranks.first else None
        rows, seen, curve = [], [], []
        for eps in radii:
            found = evaluate(
                model, data, attack=args.attack, eps=eps, norm=args.norm, source=source,
                batch_size=args.batch_size, seed=args.seed, device=_device(args.device),
                # A run that was killed goes on with the same command.
                state=run and run.out / "state" / f"{str(eps).replace('/', '-')}.npz",
            )  # fmt: skip
            seen.append(found)
            found.checks += over_radii(seen)
            if run is not None:
                rows.append(
                    write_evaluation(run.out, args.model, found, data, model, processes=ranks.size, source=source)
                )
                curve.append((str(eps), found.robust, *found.robust_ci))
                _warn(found.checks)
        if run is None:
            return 0
        if len(radii) > 1:
            zero = [("0", found.clean, *found.clean_ci)]
            accuracy_over_eps(run.out / "accuracy.png", {f"{args.model}, {args.attack}": zero + curve})
        code = run.finish(rows)
        shutil.rmtree(run.out / "state")
        return code


def _eval_images(args: EvalArgs) -> int:
    """Saved adversarial images, shown to a model."""
    from rvlm.evaluation import evaluate, load_images, write_evaluation

    images = load_images(args.images)
    told = ("attack", "eps", "norm", "seed", "source", "limit")
    if changed := [name for name in told if getattr(args, name) != getattr(EvalArgs, name)]:
        raise ValueError(f"{args.images} says what --{changed[0]} is: leave it out")
    with _together(args) as ranks:
        data, model, _ = _load(args, ranks)
        data = images.samples(data)
        run = _Run("eval", args) if ranks.first else None
        found = evaluate(model, data, images=images, batch_size=args.batch_size, device=_device(args.device))
        if run is None:
            return 0
        _warn(found.checks)
        return run.finish([write_evaluation(run.out, args.model, found, data, model, processes=ranks.size)])


def _eval_retrieval(args: EvalArgs, radii: list[Eps]) -> int:
    """Recall on images with captions, clean and attacked: a record for each radius."""
    from rvlm.data.captions import load_captions
    from rvlm.evaluation import retrieve, write_retrieval
    from rvlm.evaluation.retrieval import parse_retrieval_attack
    from rvlm.models import load_clip

    parse_retrieval_attack(args.attack)
    with _together(args) as ranks:
        with ranks.first_before_others():
            data = load_captions(args.data, args.split, size=args.size, limit=args.limit)
            clip, source = (spec and load_clip(spec, _device(args.device)) for spec in (args.model, args.source))
        run = _Run("eval", args) if ranks.first else None
        rows, tables = [], []
        for eps in radii:
            found = retrieve(
                clip, data, attack=args.attack, eps=eps, norm=args.norm, source=source, batch_size=args.batch_size,
                seed=args.seed, device=_device(args.device),
            )  # fmt: skip
            if run is not None:
                rows.append(
                    write_retrieval(run.out, args.model, found, data, clip, processes=ranks.size, source=source)
                )
                tables.append(found.markdown(f"{args.model} on {data.name}, {len(data)} images"))
                _warn(found.checks)
        return 0 if run is None else run.finish(rows, "\n\n".join(tables))


def _eval_protocol(args: EvalArgs) -> int:
    """All data sets of a protocol that are there: a record for each, its attacks, radii and targets."""
    from rvlm.data.registry import data_root
    from rvlm.evaluation import load_protocol
    from rvlm.models import load_clip
    from rvlm.report import protocol_table

    protocol, root = load_protocol(args.protocol), Path(args.root) if args.root else data_root()
    told = ("data", "split", "size", "templates", "attack", "eps", "norm", "seed", "images")
    if changed := [name for name in told if getattr(args, name) != getattr(EvalArgs, name)]:
        raise ValueError(
            f"protocol {protocol.name} says what --{changed[0]} is: leave it out, or write another protocol"
        )
    if ("transfer" in protocol.targets) != (args.source is not None):
        raise ValueError(
            f"protocol {protocol.name} measures {' and '.join(protocol.targets)}: "
            + ("leave --source out" if args.source else "give the model that images are made on as --source")
        )
    with _together(args) as ranks:
        with ranks.first_before_others():
            models = [spec and load_clip(spec, _device(args.device)) for spec in (args.model, args.source)]
        run = _Run("eval", args) if ranks.first else None
        rows, missing, broken = [], [], []
        for part in protocol.parts:
            data, error = None, None
            with ranks.first_before_others():
                try:
                    data = protocol.open(part, root, args.limit)
                except (FileNotFoundError, ValueError, ImportError) as found:
                    error = found
            if error := next((theirs for theirs in ranks.gather(error) if theirs is not None), None):
                (missing if isinstance(error, FileNotFoundError) else broken).append(part.data)
                if run is not None:
                    print(f"NOT MEASURED {part.data}: {error}", file=sys.stderr)
                continue
            rows += _measured(args, protocol, part, data, models, ranks, run)
        if run is None:
            return 0
        run.manifest |= {"protocol": {"name": protocol.name, "sha": protocol.sha}, "missing": missing, "broken": broken}
        table = protocol_table(rows, f"{protocol.name} {protocol.sha}", len(protocol.parts))
        run.finish(rows, table, status="incomplete" if missing or broken else "complete")
        shutil.rmtree(run.out / "state", ignore_errors=True)
        for title, names in (("missing", missing), ("not what they should be", broken)):
            if names:
                print(f"{title}: {', '.join(names)}. Rerun with --out {run.out} when they are there.", file=sys.stderr)
        return DATA_MISSING if missing else CHECK_FAILED if broken else 0


def _measured(args: EvalArgs, protocol, part, data, models, ranks: Ranks, run: "_Run | None") -> list[dict[str, Any]]:
    """Rows of one data set of a protocol; records that an earlier attempt wrote are taken as they are."""
    from rvlm.data.captions import Captions
    from rvlm.evaluation import evaluate, retrieve, write_evaluation, write_retrieval
    from rvlm.evaluation.records import measured_before, record_stem
    from rvlm.models import ZeroShotClassifier

    mark, rows, checks = protocol.mark(part, data), [], []
    settings = dict(norm=protocol.norm, batch_size=args.batch_size, seed=protocol.seed, device=_device(args.device))
    if not isinstance(data, Captions):
        prompts, check = protocol.prompts(part, data)
        checks = [check]
        models = [clip and ZeroShotClassifier(clip, data.class_names, prompts).eval() for clip in models]
    for attack, radii in (part.attacks or protocol.attacks).items():
        for eps, target in itertools.product(radii, protocol.targets):
            stem = record_stem(args.model, data.name, target, attack, eps)
            model, source = models[0], models[1] if target == "transfer" else None
            row = run and measured_before(run.out, stem, data, model, source, mark)
            if (row := ranks.share(row)) is not None:
                rows.append(row)
                continue
            if isinstance(data, Captions):
                found = retrieve(model, data, attack=attack, eps=eps, source=source, **settings)
                write = write_retrieval
            else:
                state = run and run.out / "state" / f"{stem}.npz"
                found = evaluate(model, data, attack=attack, eps=eps, source=source, state=state, **settings)
                found.checks += checks
                write = write_evaluation
            if run is not None:
                about = {"processes": ranks.size, "source": source, "protocol": mark}
                rows.append(write(run.out, args.model, found, data, model, **about))
                (run.out / "state" / f"{stem}.npz").unlink(missing_ok=True)
                _warn(found.checks)
    return rows


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
    old, device = read_recorded(args.record), _device(args.device)

    def load(spec: str | None, role: str):
        if spec is None:
            return None
        model = _from_file(spec) if ".py:" in spec else load_clip(spec)
        return old.classifier(model.to(device) if isinstance(model, torch.nn.Module) else model, data, role)

    with _together(args) as ranks:
        with ranks.first_before_others():  # models of the zoo are trained on first use
            data = old.samples(args.data or old.data)
            model = load(args.model or old.model, "model")
            source = load(old.source and (args.source or old.source), "source")
        run = _Run("repro", args) if ranks.first else None
        found = old.run(model, data, source, device)
        if run is None:
            return 0
        result, record = old.compare(found), old.record
        mark = record["protocol"] and record["protocol"] | {"status": record["status"]}
        about = {"method": record["model"]["method"], "processes": ranks.size, "source": source, "protocol": mark}
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


def convert(args: ConvertArgs) -> int:
    """Writes the model and its card, loads it back and says by how much its embeddings differ."""
    from rvlm.files import write_bytes
    from rvlm.models import convert as write_model
    from rvlm.models import load_clip
    from rvlm.models.convert import difference, read_back
    from rvlm.report import model_card

    if not (args.src and args.dst):
        raise ValueError("convert takes a model and a folder: rvlm convert SRC DST --to hf")
    if args.base is None and Path(args.src).is_file():
        raise ValueError(f"{args.src} holds weights alone: give the CLIP that they belong onto, --base ViT-B-32:openai")
    spec = args.src if args.base is None else f"{args.base}+weights={args.src}"
    clip = load_clip(spec)
    folder = write_model(clip, args.dst, args.to)
    runs = args.runs.split(",") if args.runs else [args.src] if Path(args.src, "result").is_dir() else []
    write_bytes(folder / "README.md", model_card(clip, args.to, runs).encode())
    gap = difference(clip, read_back(clip, folder, args.to))
    print(f"written to {folder}; loaded back, embeddings differ by at most {gap:.1g}")
    return 0 if gap <= 1e-5 else CHECK_FAILED


def attack(args: AttackArgs) -> int:
    from rvlm.evaluation import evaluate, parse_attack, write_evaluation
    from rvlm.evaluation.images import save_images, save_pngs
    from rvlm.report.plots import class_words, image_grid, pick_rows

    args.eps.check(args.norm)
    parse_attack(args.attack, args.norm)
    files = {"safetensors": "adversarial.safetensors", "npz": "adversarial.npz", "wds": "adversarial"}
    if args.format not in files:
        raise ValueError(f"unknown format {args.format!r}: expected {', '.join(files)}")
    with _together(args) as ranks:
        data, model, source = _load(args, ranks)
        run = _Run("attack", args) if ranks.first else None
        found = evaluate(
            model, data, attack=args.attack, eps=args.eps, norm=args.norm, source=source,
            batch_size=args.batch_size, seed=args.seed, device=_device(args.device), keep_images=True,
            quantize=255 if args.save_png or args.format == "wds" else None,
        )  # fmt: skip
        if run is None:
            return 0
        row = write_evaluation(run.out, args.model, found, data, model, processes=ranks.size, source=source)
        _warn(found.checks)
        save_images(run.out / files[args.format], found, data, source or model, args.source or args.model)
        if args.save_png:
            pngs = save_pngs(run.out / "png", found, model)
            print(f"{pngs['still_fool']} of {pngs['written']} PNGs still fool the model when read back")
            row["png"] = pngs
        some = pick_rows(found.broken_by, found.y)
        words = [class_words(data.class_names, t[some]) for t in (found.y, found.pred_clean, found.pred_adv)]
        image_grid(run.out / "images.png", data.batch(some)[0], found.x_adv[some], *words)
        return run.finish([row])


def check(args: CheckArgs) -> int:
    from rvlm.evaluation import check as run_checks

    data, model, _ = _load(args, Ranks())
    x, y, _ = data.batch(slice(None))
    return _show_findings(run_checks(model, x.to(_device(args.device)), y.to(_device(args.device))))


def _show_findings(findings) -> int:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for finding in findings:
        mark = Text("ok  ", "green") if finding.ok else Text("FAIL", "bold red")
        console.print(mark, Text(f"{finding.id:<14}{finding.message}"))
    return 0 if all(finding.ok for finding in findings) else CHECK_FAILED


def bench(args: BenchArgs) -> int:
    from rvlm.evaluation import check as run_checks
    from rvlm.evaluation.mine import compare

    if not args.mine:
        raise ValueError("--mine FILE.py:NAME is missing: which attack is to be compared?")
    attack, eps, device = _from_file(args.mine), args.eps.check(args.norm), _device(args.device)
    data, model, _ = _load(args, Ranks())
    x, y, _ = (t.to(device) for t in data.batch(slice(None)))
    for finding in run_checks(model, x, y, attacks=False):
        if not finding.ok:
            print(f"WARNING the model: {finding.id}: {finding.message}", file=sys.stderr)
    found = compare(
        attack, model, x, y, eps=float(eps), alpha=None if args.alpha is None else float(args.alpha),
        steps=args.steps, norm=args.norm, rounds=args.rounds, seed=args.seed,
    )  # fmt: skip
    if args.json:
        print(json.dumps(dataclasses.asdict(found) | {"ok": found.ok}, indent=1))
        return 0 if found.ok else CHECK_FAILED
    code = _show_findings(found.findings)
    own = [name for name in ("eps", "alpha", "steps") if name not in found.passed]
    if own:
        print(f"{args.mine} takes no {', '.join(own)}: it must use what this command was given")
    print(
        f"{1e3 * found.seconds:.1f} ms a call on {found.samples} images, {found.forwards} forward passes; "
        f"rvlm's pgd {1e3 * found.seconds_of_ours:.1f} ms, {found.forwards_of_ours}: it takes "
        f"{found.ratio:.2f}x as long ({found.ratio_min:.2f} to {found.ratio_max:.2f} in {args.rounds} pairs)"
    )
    return code


def analyze(args: AnalyzeArgs) -> int:
    if args.what == "transfer":
        return _analyze_transfer(args)
    if args.what not in TOWERS:
        raise ValueError(f"cannot analyze {args.what!r}: expected transfer, {', '.join(TOWERS)}")
    return _analyze_towers(args)


def _analyze_towers(args: AnalyzeArgs) -> int:
    """Two towers of one architecture, compared: OUT/result/WHAT.json, OUT/WHAT.png and its numbers as CSV."""
    from rvlm.data import load_data
    from rvlm.evaluation.records import environment
    from rvlm.models import load_clip
    from rvlm.models.weights import weights_sha

    args.eps.check("linf")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"analyze {args.what} runs in one process: start it without torchrun")
    names = [name.strip() for name in (args.models or "digits-vit,digits-vit-tecoa").split(",")]
    if len(set(names)) != 2 or len(names) != 2:
        raise ValueError(f"{args.what} compares two models, a base and a robust one, got {', '.join(names)}")
    data = load_data(args.data, args.split, size=args.size, limit=args.limit)
    base, robust = (load_clip(name, _device(args.device)) for name in names)
    run, began = _Run("analyze", args), time.time()
    picture = run.out / f"{args.what}.png"
    found, table = TOWERS[args.what](args, base, robust, data, picture)
    record = {
        "schema": "rvlm.analysis/1", "what": args.what, **found,
        "models": [{"name": clip.name, "weights_sha": weights_sha(clip)} for clip in (base, robust)],
        "data": {"name": data.name, "split": data.split, "samples": len(data), "index_rule": data.index_rule},
        "seconds": round(time.time() - began, 2), "env": environment(),
    }  # fmt: skip
    run.write_json(run.out / "result" / f"{args.what}.json", record)
    return run.finish([{"name": args.what, "models": names, "record": f"result/{args.what}.json"}], table)


def _analyze_transfer(args: AnalyzeArgs) -> int:
    from rvlm.data import load_data
    from rvlm.evaluation import parse_attack, transfer_matrix, write_transfer
    from rvlm.report import transfer_heat_map

    args.eps.check(args.norm)
    parse_attack(args.attack, args.norm)
    sources = [name.strip() for name in (args.models or "digits-vit,digits-rn").split(",")]
    targets = [name.strip() for name in args.targets.split(",")] if args.targets else sources
    with _together(args) as ranks:
        with ranks.first_before_others():
            data = load_data(args.data, args.split, size=args.size, limit=args.limit)
            models = {
                name: _load_model(name, _device(args.device), data, args.templates)
                for name in dict.fromkeys(sources + targets)
            }
        run = _Run("analyze", args) if ranks.first else None
        found = transfer_matrix(
            {name: models[name] for name in sources}, {name: models[name] for name in targets}, data,
            attack=args.attack, eps=args.eps, norm=args.norm, batch_size=args.batch_size, seed=args.seed,
            device=_device(args.device),
        )  # fmt: skip
        if run is None:
            return 0
        rows = write_transfer(run.out, found, data, models)
        _warn(found.checks)
        transfer_heat_map(run.out / "transfer.png", found)
        return run.finish(rows, found.markdown())


def train(args: tuple[TrainArgs, Any]) -> int:
    from rvlm.data import load_data
    from rvlm.evaluation import Evaluation, both_targets, evaluate, parse_attack, write_evaluation
    from rvlm.methods import method_class
    from rvlm.models import Clip, ZeroShotClassifier, load_clip
    from rvlm.training import check_training
    from rvlm.training import train as run_training

    args, settings = args
    parse_attack(args.eval_attack)
    check_training(method_class(args.method)(settings), args.parallel, args.tensorboard)
    if None not in (args.limit, args.shots):
        raise ValueError("--limit and --shots both choose the training samples: give one of them")
    with _together(args) as ranks:
        with ranks.first_before_others():  # models of the zoo are trained on first use
            data = load_data(args.data, args.split, size=args.size, limit=args.limit)
            data = data if args.shots is None else data.few_shot(args.shots, args.seed)
            data, held_out = data.held_out(args.validate) if args.validate else (data, None)
            test = load_data(args.eval_data or args.data, "test", size=args.size, limit=args.eval_limit)
            student = load_clip(args.student, _device(args.device), seed=args.seed)
        method = method_class(args.method)(settings)
        run = _Run("train", args) if ranks.first else None
        out = ranks.share(None if run is None else str(run.out))  # its default name holds the time
        rows = []

        def measure(
            name: str, source: Clip | None = None, checks: Callable[[Evaluation], list[dict]] = lambda found: []
        ) -> Evaluation:
            classifier, made_on = (
                clip and ZeroShotClassifier(clip, test.class_names, method.training_templates(test))
                for clip in (student, source)
            )
            found = evaluate(
                classifier, test, attack=args.eval_attack, eps=settings.eps, source=made_on, seed=args.seed,
                device=student.device,
            )  # fmt: skip
            found.checks += checks(found)
            if run is not None:
                trained_by = None if name == "before" else args.method
                rows.append(
                    write_evaluation(run.out, name, found, test, classifier, method=trained_by, processes=ranks.size)
                )
                _warn(found.checks)
            return found

        measure("before")
        result = run_training(
            student, data, method, seed=args.seed, out=out, validation=held_out, parallel=args.parallel,
            tensorboard=args.tensorboard,
        )  # fmt: skip
        if ranks.first:
            speed = result.images / result.seconds
            print(
                f"trained on {result.images} images in {result.seconds:.1f} s ({speed:.0f} images/s), after "
                f"{result.setup_seconds:.1f} s for teachers and class embeddings"
            )
        white_box = measure("after", checks=lambda found: result.checks)
        if method.undefended is not None:
            measure("after", method.undefended, lambda found: both_targets(white_box, found))
        return 0 if run is None else run.finish(rows)


def lvlm(args: LvlmArgs) -> int:
    """OUT/result/NAME-TARGET.json and the answers in OUT/samples/NAME-TARGET.jsonl."""
    from rvlm.evaluation.images import write_png
    from rvlm.evaluation.records import environment
    from rvlm.files import write_bytes
    from rvlm.lvlm import SCORES, evaluate_answers, load_lvlm, load_questions, white_adapter
    from rvlm.models import Adapter
    from rvlm.report import markdown

    if not args.model or not args.data:
        raise ValueError("which model, and asked what? rvlm lvlm --model FOLDER_OR_NAME --data QUESTIONS.jsonl")
    if args.score not in SCORES:
        raise ValueError(f"unknown score {args.score!r}: expected {' or '.join(SCORES)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("lvlm runs in one process: start it without torchrun")
    args.eps.check("linf")
    model = load_lvlm(args.model, _device(args.device), dtype=args.dtype, size=args.size)
    data = load_questions(args.data, model.size, args.limit)
    adapter = None
    if args.adapter is not None:
        adapter = white_adapter(model) if args.adapter == "white" else Adapter.load(args.adapter)
    run, began, rows = _Run("lvlm", args), time.time(), []
    results = evaluate_answers(
        model, data, attack=args.attack, eps=args.eps, adapter=adapter, score=args.score, aim=args.aim,
        max_tokens=args.max_tokens, batch_size=args.batch_size, seed=args.seed, quantize=255 if args.save_png else None,
    )  # fmt: skip
    seconds = round(time.time() - began, 2)
    for result in results:
        stem = f"{result.name}-{result.target}"
        row = {
            "name": result.name, "clean": result.mean("score_clean"), "robust": result.mean("score_adv"),
            "relative_clean": result.relative("score_clean"), "relative_robust": result.relative("score_adv"),
            "loss_clean": result.mean("loss_clean"), "loss_robust": result.mean("loss_adv"), "score": args.score,
            "eps": str(args.eps), "attack": args.attack, "target": result.target, "samples": len(result.rows),
            "seconds": seconds, "record": f"result/{stem}.json",
        }  # fmt: skip
        if args.aim is not None:
            row["aimed"] = result.mean("aim_adv")
        record = {
            "schema": "rvlm.answers/1", **row, "norm": "linf", "aim": args.aim, "seed": args.seed, "model": args.model,
            "adapter": None if result.name == "before" else dataclasses.asdict(adapter.config),
            "data": {"name": args.data, "size": model.size, "partial": args.limit is not None},
            "rows": f"samples/{stem}.jsonl",
            "env": environment() | {"transformers": importlib.metadata.version("transformers")},
        }  # fmt: skip
        run.write_json(run.out / row["record"], record)
        lines = "".join(json.dumps(answers, ensure_ascii=False) + "\n" for answers in result.rows)
        write_bytes(run.out / record["rows"], lines.encode())
        if args.save_png and result.target != "transfer":
            for answers, pixels in zip(result.rows, result.x_adv, strict=True):
                write_png(run.out / "png" / stem / f"{answers['index']:06d}.png", pixels)
        rows.append(row)
    columns = {
        "name": "model", "target": "target", "clean": f"clean {args.score} %", "robust": f"robust {args.score} %",
        "relative_clean": "relative clean", "relative_robust": "relative robust", "loss_clean": "clean loss",
        "loss_robust": "robust loss", "samples": "samples",
    } | ({} if args.aim is None else {"aimed": "share with the aim"})  # fmt: skip
    return run.finish(rows, markdown(rows, columns))


def profile(args: ProfileArgs) -> int:
    from rvlm.data import load_data

    whats = {"train": _profile_train, "attack": _profile_attack, "infer": _profile_infer}
    if args.what not in whats:
        raise ValueError(f"cannot profile {args.what!r}: expected {', '.join(whats)}")
    if args.twin is not None and args.what != "train":
        raise ValueError("--twin is another training loop: it goes with profile train")
    if args.defended is not None and args.what != "infer":
        raise ValueError("--defended are models beside --model: it goes with profile infer")
    data = load_data(args.data, "train" if args.what == "train" else "test", size=args.size, limit=args.limit)
    return whats[args.what](args, data)


def _profile_train(args: ProfileArgs, data) -> int:
    """Phases of one epoch of each stage; with a twin, images per second of both, timed in turn."""
    from rvlm import profiling
    from rvlm.methods import build_method
    from rvlm.models import load_clip
    from rvlm.training import train as run_training

    twin = None if args.twin is None else _from_file(args.twin)
    device = _device(args.device)
    clip = load_clip(args.model, device)

    def work():
        method = build_method(args.method, args.preset)
        whole = method.stages
        method.stages = lambda: [dataclasses.replace(stage, length=1) for stage in whole()]
        return run_training(copy.deepcopy(clip), data, method, progress=False)

    build_method(args.method, args.preset).setup(copy.deepcopy(clip), data)  # what is made at first use
    with profiling.record(device) as timer:
        result = work()
    speed = result.images / result.seconds
    found = {"seconds": result.seconds, "images_per_s": speed, "phases": timer.totals()}
    if twin is not None:
        epoch = twin(build_method(args.method, args.preset), clip, data)
        found["twin"] = _against(work, epoch, 3 if args.rounds is None else args.rounds, device)
    return _show_profile(args, found, result.images)


def _against(work, epoch: Callable[[], int], rounds: int, device: torch.device) -> dict[str, float]:
    """Images per second of our epochs (without their setup) and of the twin's, and the ratio, as medians of pairs."""
    epoch()  # what is slow once
    pairs = []
    for _ in range(max(1, rounds)):
        result = work()
        began = time.perf_counter()
        images = epoch()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        pairs.append((result.images / result.seconds, images / (time.perf_counter() - began)))
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "images_per_s": ours, "twin_images_per_s": theirs, "ratio": statistics.median(ratios),
        "ratio_min": ratios[0], "ratio_max": ratios[-1], "rounds": len(pairs),
    }  # fmt: skip


def _profile_attack(args: ProfileArgs, data) -> int:
    from rvlm import profiling
    from rvlm.attacks import pgd
    from rvlm.evaluation import evaluate, parse_attack
    from rvlm.models import ZeroShotClassifier, load_clip

    parse_attack(args.attack)
    device = _device(args.device)
    classifier = ZeroShotClassifier(load_clip(args.model, device), data.class_names, data.template)
    x, y, _ = (t.to(device) for t in data.batch(slice(0, 1)))
    pgd(classifier, x, y, steps=1)  # what is slow once
    began = time.perf_counter()
    with profiling.record(device) as timer:
        evaluate(classifier, data, attack=args.attack, eps="8/255", device=device, progress=False)
    phases, seconds = timer.totals(), time.perf_counter() - began
    found = {"seconds": seconds, "images_per_s": len(data) / seconds, "phases": phases}
    for share, names in (("model_share", ("forward", "backward")), ("step_share", ("step",))):
        found[share] = sum(phases[name][0] for name in names if name in phases) / seconds
    return _show_profile(args, found, len(data))


def _profile_infer(args: ProfileArgs, data) -> int:
    """Forward passes of the plain model and of defended ones, in pairs."""
    from rvlm import infer
    from rvlm.evaluation.records import environment
    from rvlm.report import latency_table

    try:
        batch_sizes = [int(size) for size in args.batch_sizes.split(",")]
    except ValueError:
        raise ValueError(f"batch_sizes must be whole numbers separated by commas, got {args.batch_sizes!r}") from None
    names = [args.model, *(name.strip() for name in (args.defended or "").split(",") if name.strip())]
    if len(set(names)) < len(names):
        raise ValueError(f"name every model once, got {', '.join(names)}")
    device = _device(args.device)
    models = {name: _load_model(name, device, data) for name in names}
    x = data.batch(slice(0, max(batch_sizes)))[0].to(device)
    rows = infer.measure(models, x, len(data.class_names), batch_sizes, 20 if args.rounds is None else args.rounds)
    if args.json:
        print(
            json.dumps({"rows": rows, "data": data.name, "pixels": list(x.shape[-2:]), "env": environment()}, indent=1)
        )
    else:
        print(latency_table(rows))
    return 0


def _show_profile(args: ProfileArgs, found: dict[str, Any], images: int) -> int:
    from rvlm.report import phase_table

    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print(phase_table(found["phases"], found["seconds"], images))
    if "model_share" in found:
        model, step = found["model_share"], found["step_share"]
        print(
            f"The model's passes are {model:.1%} of the time, the attack's own arithmetic {step:.1%}. Without any "
            f"cost, that would make it {1 / (1 - step):.2f}x as fast, and all that is not the model {1 / model:.2f}x."
        )
    if twin := found.get("twin"):
        print(
            f"{twin['images_per_s']:.0f} images/s, {args.twin} {twin['twin_images_per_s']:.0f}: {twin['ratio']:.2f}x "
            f"({twin['ratio_min']:.2f} to {twin['ratio_max']:.2f} in {twin['rounds']} pairs)"
        )
    return 0


@contextmanager
def _together(args: Arguments) -> Iterator[Ranks]:
    """The processes that torchrun started with this command, which must have the same settings."""
    with joined() as ranks:
        if len(set(ranks.gather(args.config_text))) > 1:
            raise ValueError("the processes were started with different settings: give all of them the same")
        yield ranks


def _load(args: DataArgs, ranks: Ranks):
    """The data, the model and, for transfer, the source model of a command."""
    from rvlm.data import load_data

    with ranks.first_before_others():  # models of the zoo are trained on first use
        data = load_data(args.data, args.split, size=args.size, limit=args.limit)
        source = getattr(args, "source", None)
        made_on = None if source is None else _load_model(source, _device(args.device), data, args.templates)
        return data, _load_model(args.model, _device(args.device), data, args.templates), made_on


def _load_model(spec: str, device: torch.device, data, templates: str = "auto") -> Callable[[Tensor], Tensor]:
    from rvlm.models import ZeroShotClassifier, load_clip

    if ".py:" in spec:
        model = _from_file(spec)
        return model.to(device) if isinstance(model, torch.nn.Module) else model
    template = data.template if templates == "auto" else templates
    return ZeroShotClassifier(load_clip(spec, device), data.class_names, template).eval()


def _from_file(spec: str) -> Callable[[Tensor], Tensor]:
    path, _, name = spec.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: expected FILE.py:NAME, a callable")
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, str(file.parent))  # the file may import its neighbours
    try:
        module_spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    if not callable(getattr(module, name, None)):
        have = ", ".join(n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n)))
        raise ValueError(f"{file} has no callable {name!r}; it has {have or 'none'}")
    return getattr(module, name)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(name)


def _warn(checks: list[dict[str, Any]]) -> None:
    for item in checks:
        if not item["ok"]:
            print(f"WARNING {item['id']}: {item['detail']}", file=sys.stderr)


class _Run:
    """A run folder: config and manifest at the start, summary at the end."""

    def __init__(self, command: str, args: Any) -> None:
        from rvlm.evaluation.records import environment, write_json
        from rvlm.files import write_bytes

        self.began, self.write_json = time.time(), write_json
        self.out = Path(args.out or f"runs/{command}-{time.strftime('%Y%m%d-%H%M%S')}")
        write_bytes(self.out / "config.yaml", args.config_text.encode())
        self.manifest = {"command": shlex.join(["rvlm", *sys.argv[1:]]), "env": environment(), "status": "running"}
        write_json(self.out / "manifest.json", self.manifest)

    def finish(self, rows: list[dict[str, Any]], table: str | None = None, status: str = "complete") -> int:
        """Writes the summary and prints it, or the table given instead."""
        from rich.console import Console

        from rvlm.report import rich_table

        self.write_json(self.out / "summary.json", {"schema": "rvlm.summary/1", "rows": rows})
        self.manifest |= {"status": status, "seconds": round(time.time() - self.began, 1)}
        self.write_json(self.out / "manifest.json", self.manifest)
        if table is None:
            Console().print(rich_table(rows))
        else:
            print(table)
        print(f"written to {self.out}")
        return 0
