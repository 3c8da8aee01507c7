"""analyze: towers beside each other, and who is fooled by whose images."""

import time

from rvlm.arguments import AnalyzeArgs
from rvlm.commands.shared import Run, check_alone, device_of, load_model, together, warn
from rvlm.commands.towers import TOWERS

__all__ = ["analyze"]


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
    check_alone(f"analyze {args.what}")
    names = [name.strip() for name in (args.models or "digits-vit,digits-vit-tecoa").split(",")]
    if len(set(names)) != 2 or len(names) != 2:
        raise ValueError(f"{args.what} compares two models, a base and a robust one, got {', '.join(names)}")
    data = load_data(args.data, args.split, size=args.size, limit=args.limit)
    base, robust = (load_clip(name, device_of(args.device)) for name in names)
    run, began = Run("analyze", args), time.time()
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
    with together(args) as ranks:
        with ranks.first_before_others():
            data = load_data(args.data, args.split, size=args.size, limit=args.limit)
            models = {
                name: load_model(name, device_of(args.device), data, args.templates)
                for name in dict.fromkeys(sources + targets)
            }
        run = Run("analyze", args) if ranks.first else None
        found = transfer_matrix(
            {name: models[name] for name in sources}, {name: models[name] for name in targets}, data,
            attack=args.attack, eps=args.eps, norm=args.norm, batch_size=args.batch_size, seed=args.seed,
            device=device_of(args.device),
        )  # fmt: skip
        if run is None:
            return 0
        rows = write_transfer(run.out, found, data, models)
        warn(found.checks)
        transfer_heat_map(run.out / "transfer.png", found)
        return run.finish(rows, found.markdown())
