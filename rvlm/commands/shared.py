"""What the commands share: the processes that run together, what their specs name, run folders."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rvlm.arguments import CHECK_FAILED, Arguments, DataArgs
from rvlm.plugins import from_file, is_own
from rvlm.ranks import Ranks, joined

__all__ = [
    "Run", "check_alone", "check_unsaid", "device_of", "load", "load_model", "root_of", "show_findings", "together",
    "warn",
]  # fmt: skip


@contextmanager
def together(args: Arguments) -> Iterator[Ranks]:
    """The processes that torchrun started with this command, which must have the same settings."""
    with joined() as ranks:
        if len(set(ranks.gather(args.config_text))) > 1:
            raise ValueError("the processes were started with different settings: give all of them the same")
        yield ranks


def load(args: DataArgs, ranks: Ranks):
    """The data, the model and, for transfer, the source model of a command."""
    from rvlm.data import load_data

    with ranks.first_before_others():  # models of the zoo are trained on first use
        data = load_data(args.data, args.split, size=args.size, limit=args.limit)
        source = getattr(args, "source", None)
        made_on = None if source is None else load_model(source, device_of(args.device), data, args.templates)
        return data, load_model(args.model, device_of(args.device), data, args.templates), made_on


def load_model(spec: str, device: torch.device, data, templates: str = "auto") -> Callable[[Tensor], Tensor]:
    from rvlm.models import ZeroShotClassifier, load_clip

    if is_own(spec):
        model = from_file(spec)
        return model.to(device) if isinstance(model, torch.nn.Module) else model
    template = data.template if templates == "auto" else templates
    return ZeroShotClassifier(load_clip(spec, device), data.class_names, template).eval()


def check_unsaid(args: Arguments, names: Iterable[str], by: str, otherwise: str = "leave it out") -> None:
    """Raises ValueError for a setting that was given, where something else says what it is."""
    if changed := [name for name in names if getattr(args, name) != getattr(type(args), name)]:
        raise ValueError(f"{by} says what --{changed[0]} is: {otherwise}")


def check_alone(what: str) -> None:
    """Raises ValueError under torchrun with several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{what} runs in one process: start it without torchrun")


def root_of(args) -> Path:
    """Where the data sets of a command with --root lie."""
    from rvlm.data.registry import data_root

    return Path(args.root) if args.root else data_root()


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(name)


def warn(checks: list[dict[str, Any]]) -> None:
    for item in checks:
        if not item["ok"]:
            print(f"WARNING {item['id']}: {item['detail']}", file=sys.stderr)


class Run:
    """A run folder: config and manifest at the start, summary at the end."""

    def __init__(self, command: str, args: Any) -> None:
        from rvlm.evaluation.records import environment, packages, write_json
        from rvlm.files import write_bytes

        self.began, self.write_json = time.time(), write_json
        self.out = Path(args.out or f"runs/{command}-{time.strftime('%Y%m%d-%H%M%S')}")
        write_bytes(self.out / "config.yaml", args.config_text.encode())
        self.manifest = {
            "command": shlex.join(["rvlm", *sys.argv[1:]]), "env": environment(), "packages": packages(),
            "status": "running",
        }  # fmt: skip
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


def show_findings(findings) -> int:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for finding in findings:
        mark = Text("ok  ", "green") if finding.ok else Text("FAIL", "bold red")
        console.print(mark, Text(f"{finding.id:<14}{finding.message}"))
    return 0 if all(finding.ok for finding in findings) else CHECK_FAILED
