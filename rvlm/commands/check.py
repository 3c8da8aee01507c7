"""check and bench: a user's model, and a user's attack."""

import dataclasses
import json
import sys

from rvlm.arguments import CHECK_FAILED, BenchArgs, CheckArgs
from rvlm.commands.shared import device_of, load, show_findings
from rvlm.commands.suites import run_suites
from rvlm.plugins import from_file
from rvlm.ranks import Ranks

__all__ = ["bench", "check"]


def check(args: CheckArgs) -> int:
    from rvlm.evaluation import check as run_checks

    data, model, _ = load(args, Ranks())
    x, y, _ = data.batch(slice(None))
    return show_findings(run_checks(model, x.to(device_of(args.device)), y.to(device_of(args.device))))


def bench(args: BenchArgs) -> int:
    from rvlm.evaluation import check as run_checks
    from rvlm.evaluation.mine import compare

    if not args.mine:
        return run_suites(args)
    if args.suites or args.only or args.save or args.compare or args.fail_above is not None:
        raise ValueError("--mine compares an attack with rvlm's: suites, --only, --save and --compare go without it")
    attack, eps, device = from_file(args.mine), args.eps.check(args.norm), device_of(args.device)
    data, model, _ = load(args, Ranks())
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
    code = show_findings(found.findings)
    own = [name for name in ("eps", "alpha", "steps") if name not in found.passed]
    if own:
        print(f"{args.mine} takes no {', '.join(own)}: it must use what this command was given")
    print(
        f"{1e3 * found.seconds:.1f} ms a call on {found.samples} images, {found.forwards} forward passes; "
        f"rvlm's pgd {1e3 * found.seconds_of_ours:.1f} ms, {found.forwards_of_ours}: it takes "
        f"{found.ratio:.2f}x as long ({found.ratio_min:.2f} to {found.ratio_max:.2f} in {args.rounds} pairs)"
    )
    return code
