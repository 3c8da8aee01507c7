"""data: what is there, where it comes from, and tars of it."""

from pathlib import Path
from typing import Any

from rvlm.arguments import CHECK_FAILED, DATA_MISSING, DataToolArgs
from rvlm.commands.shared import root_of

__all__ = ["data"]


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
    from rvlm.data.registry import entries

    root = root_of(args)
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
