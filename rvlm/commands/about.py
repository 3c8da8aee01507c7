"""demo, info, ls."""

import json
from pathlib import Path

from rvlm.arguments import DemoArgs, InfoArgs, LsArgs, recipes

__all__ = ["demo", "info", "ls"]


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
        "methods": [
            *(f"{name} (presets: {', '.join(method_class(name).presets)})" for name in list_methods()),
            "FILE.py:NAME",
        ],
        "attacks": [*PATTERNS, "several, separated by commas"],
        "datasets": [
            "digits",
            "npz:PATH",
            "folder:PATH",
            "wds:PATH",
            "parquet:PATH",
            "FILE.py:NAME",
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
