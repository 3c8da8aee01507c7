"""eval and attack: accuracy under attack, of one data set, of retrieval, of saved images, of a protocol."""

import itertools
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rvlm.arguments import CHECK_FAILED, DATA_MISSING, AttackArgs, EvalArgs
from rvlm.commands.cost import show, with_times
from rvlm.commands.shared import Run, check_unsaid, device_of, load, root_of, together, warn
from rvlm.ranks import Ranks
from rvlm.units import Eps

__all__ = ["attack", "eval"]


def eval(args: EvalArgs) -> int:
    from rvlm.data.captions import holds_captions
    from rvlm.evaluation import evaluate, over_radii, parse_attack, write_evaluation
    from rvlm.evaluation.cost import earlier_shares, estimate
    from rvlm.report import accuracy_over_eps

    if args.protocol is not None:
        return _eval_protocol(args)
    if args.images is not None:
        return _eval_images(args)
    radii = [Eps(text).check(args.norm) for text in args.eps.split(",")]
    if holds_captions(args.data):
        return _eval_retrieval(args, radii)
    stages = parse_attack(args.attack, args.norm)
    with together(args) as ranks:
        data, model, source = load(args, ranks)
        cost = estimate(
            len(data), args.attack, stages, len(data.class_names), args.norm, batch_size=args.batch_size,
            shares=earlier_shares(args.out, args.model, args.attack, "transfer" if source else "white-box"),
        )  # fmt: skip
        costs = with_times(args, ranks, _in_turn(cost, radii), data, model, source)
        show(args, ranks, costs, f"{args.model} on {data.name}")
        if args.dry_run:
            return 0
        run = Run("eval", args) if ranks.first else None
        rows, seen, curve = [], [], []
        for eps, cost in zip(radii, costs, strict=True):
            found = evaluate(
                model, data, attack=args.attack, eps=eps, norm=args.norm, source=source,
                batch_size=args.batch_size, seed=args.seed, device=device_of(args.device), precision=args.precision,
                keep_images=args.examples, cost=cost, clean=seen[-1] if seen else None,
                # A run that was killed goes on with the same command.
                state=run and run.out / "state" / f"{str(eps).replace('/', '-')}.npz",
            )  # fmt: skip
            seen.append(found)
            found.checks += over_radii(seen)
            if run is not None:
                about = {"processes": ranks.size, "source": source}
                rows.append(write_evaluation(run.out, args.model, found, data, model, **about))
                curve.append((str(eps), found.robust, *found.robust_ci))
                warn(found.checks)
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
    from rvlm.evaluation.cost import estimate

    images = load_images(args.images)
    told = ("attack", "eps", "norm", "seed", "precision", "source", "limit")
    check_unsaid(args, told, args.images)
    with together(args) as ranks:
        data, model, _ = load(args, ranks)
        data = images.samples(data)
        cost = estimate(len(data), "saved", [images], len(data.class_names), batch_size=args.batch_size)
        costs = with_times(args, ranks, [cost], data, model, None)
        show(args, ranks, costs, f"{args.model} on {args.images}")
        if args.dry_run:
            return 0
        run = Run("eval", args) if ranks.first else None
        found = evaluate(
            model, data, images=images, batch_size=args.batch_size, device=device_of(args.device),
            keep_images=args.examples, cost=costs[0],
        )  # fmt: skip
        if run is None:
            return 0
        warn(found.checks)
        return run.finish([write_evaluation(run.out, args.model, found, data, model, processes=ranks.size)])


def _eval_retrieval(args: EvalArgs, radii: list[Eps]) -> int:
    """Recall on images with captions, clean and attacked: a record for each radius."""
    from rvlm.data.captions import load_captions
    from rvlm.evaluation import retrieve, write_retrieval
    from rvlm.evaluation.retrieval import parse_retrieval_attack, retrieval_cost
    from rvlm.models import load_clip

    parse_retrieval_attack(args.attack)  # an unknown attack is named before anything is loaded
    if args.precision != EvalArgs.precision:
        raise ValueError(f"attacks on captions run in fp32: leave --precision {args.precision} out")
    with together(args) as ranks:
        with ranks.first_before_others():
            data = load_captions(args.data, args.split, size=args.size, limit=args.limit)
            clip, source = (spec and load_clip(spec, device_of(args.device)) for spec in (args.model, args.source))
        costs = _in_turn(retrieval_cost(len(data), args.attack), radii)
        costs = with_times(args, ranks, costs, data, clip, source)
        show(args, ranks, costs, f"{args.model} on {data.name}")
        if args.dry_run:
            return 0
        run = Run("eval", args) if ranks.first else None
        rows, tables, found = [], [], None
        for eps, cost in zip(radii, costs, strict=True):
            found = retrieve(
                clip, data, attack=args.attack, eps=eps, norm=args.norm, source=source, batch_size=args.batch_size,
                seed=args.seed, device=device_of(args.device), cost=cost, clean=found,
            )  # fmt: skip
            if run is not None:
                rows.append(
                    write_retrieval(run.out, args.model, found, data, clip, processes=ranks.size, source=source)
                )
                tables.append(found.markdown(f"{args.model} on {data.name}, {len(data)} images"))
                warn(found.checks)
        return 0 if run is None else run.finish(rows, "\n\n".join(tables))


def _in_turn(cost, radii: list[Eps]) -> list:
    """Of evaluations at several radii, of which the first one sees the clean images."""
    return [cost if k == 0 else cost.sharing() for k in range(len(radii))]


def _eval_protocol(args: EvalArgs) -> int:
    """All data sets of a protocol that are there: a record for each, its attacks, radii and targets."""
    from rvlm.evaluation import load_protocol
    from rvlm.models import load_clip
    from rvlm.report import protocol_table

    protocol, root = load_protocol(args.protocol), root_of(args)
    told = ("data", "split", "size", "templates", "attack", "eps", "norm", "seed", "precision", "images")
    check_unsaid(args, told, f"protocol {protocol.name}", "leave it out, or write another protocol")
    if ("transfer" in protocol.targets) != (args.source is not None):
        raise ValueError(
            f"protocol {protocol.name} measures {' and '.join(protocol.targets)}: "
            + ("leave --source out" if args.source else "give the model that images are made on as --source")
        )
    with together(args) as ranks:
        with ranks.first_before_others():
            models = [spec and load_clip(spec, device_of(args.device)) for spec in (args.model, args.source)]
        asked = [part.data for part in protocol.parts if part.task]
        there, missing, broken = _opened(args, protocol, root, ranks)
        costs = _costs(args, protocol, there, models, ranks)
        show(
            args,
            ranks,
            list(costs.values()),
            f"{args.model} on {protocol.name}, {len(there)} of {len(protocol.parts)} data sets",
        )
        if args.dry_run:
            return DATA_MISSING if missing else CHECK_FAILED if broken else 0
        run = Run("eval", args) if ranks.first else None
        rows = []
        for part, data in there:
            rows += _measured(args, protocol, part, data, models, ranks, run, costs)
        if run is None:
            return 0
        run.manifest |= {"protocol": {"name": protocol.name, "sha": protocol.sha}, "missing": missing, "broken": broken}
        run.manifest |= {"needs_lvlm": asked}
        table = protocol_table(rows, f"{protocol.name} {protocol.sha}", len(protocol.parts))
        run.finish(rows, table, status="incomplete" if missing or broken or asked else "complete")
        shutil.rmtree(run.out / "state", ignore_errors=True)
        for title, names in (("missing", missing), ("not what they should be", broken)):
            if names:
                print(f"{title}: {', '.join(names)}. Rerun with --out {run.out} when they are there.", file=sys.stderr)
        return DATA_MISSING if missing else CHECK_FAILED if broken else 0


def _opened(args: EvalArgs, protocol, root: Path, ranks: Ranks) -> tuple[list[tuple[Any, Any]], list[str], list[str]]:
    """Parts of a protocol with their samples; the names of those that are missing, and of those that are broken."""
    there, missing, broken = [], [], []
    for part in protocol.parts:
        if part.task:
            if ranks.first:
                how = f"rvlm lvlm --protocol {args.protocol} --model LVLM"
                print(f"NOT MEASURED {part.data}: {part.task} needs an LVLM ({how})", file=sys.stderr)
            continue
        data, error = None, None
        with ranks.first_before_others():
            try:
                data = protocol.open(part, root, args.limit)
            except (FileNotFoundError, ValueError, ImportError) as found:
                error = found
        if error := next((theirs for theirs in ranks.gather(error) if theirs is not None), None):
            (missing if isinstance(error, FileNotFoundError) else broken).append(part.data)
            if ranks.first:
                print(f"NOT MEASURED {part.data}: {error}", file=sys.stderr)
        else:
            there.append((part, data))
    return there, missing, broken


def _cells(args: EvalArgs, protocol, part, data) -> Iterator[tuple[str, str, str, str]]:
    """Attack, radius and target of every evaluation on a data set, and what its record is called."""
    from rvlm.evaluation.records import record_stem

    for attack, radii in (part.attacks or protocol.attacks).items():
        for eps, target in itertools.product(radii, protocol.targets):
            yield attack, eps, target, record_stem(args.model, data.name, target, attack, eps)


def _costs(args: EvalArgs, protocol, there: list[tuple[Any, Any]], models, ranks: Ranks) -> dict[str, Any]:
    """By the name of its record, the cost of every evaluation that has none yet."""
    from rvlm.data.captions import Captions
    from rvlm.evaluation import parse_attack
    from rvlm.evaluation.cost import earlier_shares, estimate
    from rvlm.evaluation.retrieval import retrieval_cost

    by_target: dict[str, dict[str, Any]] = {target: {} for target in protocol.targets}
    for part, data in there:
        first = True
        for attack, _, target, stem in _cells(args, protocol, part, data):
            if args.out and (Path(args.out) / "result" / f"{stem}.json").is_file():
                continue
            if isinstance(data, Captions):
                cost = retrieval_cost(len(data), attack)
            else:
                cost = estimate(
                    len(data), attack, parse_attack(attack, protocol.norm), len(data.class_names), protocol.norm,
                    batch_size=args.batch_size, shares=earlier_shares(args.out, args.model, attack, target),
                )  # fmt: skip
            by_target[target][stem] = cost if first else cost.sharing()
            first = False
    found = {}
    for target, costs in by_target.items():
        source = models[1] if target == "transfer" else None
        timed = with_times(args, ranks, list(costs.values()), there[0][1], models[0], source) if costs else []
        found |= dict(zip(costs, timed, strict=True))
    return found


def _measured(
    args: EvalArgs, protocol, part, data, models, ranks: Ranks, run: Run | None, costs: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of one data set of a protocol; records that an earlier attempt wrote are taken as they are."""
    from rvlm.data.captions import Captions
    from rvlm.evaluation import evaluate, retrieve, write_evaluation, write_retrieval
    from rvlm.evaluation.records import measured_before
    from rvlm.models import ZeroShotClassifier

    mark, rows, checks, found = protocol.mark(part, data), [], [], None
    settings = dict(norm=protocol.norm, batch_size=args.batch_size, seed=protocol.seed, device=device_of(args.device))
    if not isinstance(data, Captions):
        prompts, check = protocol.prompts(part, data)
        checks = [check]
        models = [clip and ZeroShotClassifier(clip, data.class_names, prompts).eval() for clip in models]
    for attack, eps, target, stem in _cells(args, protocol, part, data):
        model, source = models[0], models[1] if target == "transfer" else None
        row = run and measured_before(run.out, stem, data, model, source, mark)
        if (row := ranks.share(row)) is not None:
            rows.append(row)
            continue
        settings |= {"attack": attack, "eps": eps, "source": source, "cost": costs.get(stem), "clean": found}
        if isinstance(data, Captions):
            found = retrieve(model, data, **settings)
            write = write_retrieval
        else:
            kept = {"state": run and run.out / "state" / f"{stem}.npz", "keep_images": args.examples}
            found = evaluate(model, data, **kept, **settings)
            found.checks += checks + _beside(rows, found)
            write = write_evaluation
        if run is not None:
            about = {"processes": ranks.size, "source": source, "protocol": mark}
            rows.append(write(run.out, args.model, found, data, model, **about))
            (run.out / "state" / f"{stem}.npz").unlink(missing_ok=True)
            warn(found.checks)
    return rows


def _beside(rows: list[dict[str, Any]], found) -> list[dict[str, Any]]:
    """Checks of an evaluation beside rows of the same data, of other radii and of the other target."""
    from rvlm.evaluation import both_targets, over_radii

    others = [SimpleNamespace(**row | {"eps": Eps(row["eps"])}) for row in rows if row["attack"] == found.attack]
    checks = over_radii([*(one for one in others if one.target == found.target), found])
    for other in others:
        if other.target != found.target and other.eps == found.eps:
            checks += both_targets(*sorted((other, found), key=lambda one: one.target == "transfer"))
    return checks


def attack(args: AttackArgs) -> int:
    from rvlm.evaluation import evaluate, parse_attack, write_evaluation
    from rvlm.evaluation.images import save_images, save_pngs
    from rvlm.report.plots import class_words, image_grid, pick_rows

    args.eps.check(args.norm)
    parse_attack(args.attack, args.norm)
    files = {"safetensors": "adversarial.safetensors", "npz": "adversarial.npz", "wds": "adversarial"}
    if args.format not in files:
        raise ValueError(f"unknown format {args.format!r}: expected {', '.join(files)}")
    with together(args) as ranks:
        data, model, source = load(args, ranks)
        run = Run("attack", args) if ranks.first else None
        with tempfile.TemporaryDirectory(dir=run and run.out, ignore_cleanup_errors=True) as folder:
            found = evaluate(
                model, data, attack=args.attack, eps=args.eps, norm=args.norm, source=source,
                batch_size=args.batch_size, seed=args.seed, device=device_of(args.device),
                keep_images=Path(folder) / "x_adv",  # all of them may be more than memory holds
                quantize=255 if args.save_png or args.format == "wds" else None,
            )  # fmt: skip
            if run is None:
                return 0
            about = {"processes": ranks.size, "source": source, "examples": EvalArgs.examples}
            row = write_evaluation(run.out, args.model, found, data, model, **about)
            warn(found.checks)
            save_images(run.out / files[args.format], found, data, source or model, args.source or args.model)
            if args.save_png:
                pngs = save_pngs(run.out / "png", found, model)
                print(f"{pngs['still_fool']} of {pngs['written']} PNGs still fool the model when read back")
                row["png"] = pngs
            some = pick_rows(found.broken_by, found.y)
            words = [class_words(data.class_names, t[some]) for t in (found.y, found.pred_clean, found.pred_adv)]
            image_grid(run.out / "images.png", data.batch(some)[0], found.x_adv[some], *words)
            return run.finish([row])
