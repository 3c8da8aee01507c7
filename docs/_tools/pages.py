"""Pages that the code writes: the API from `__all__`, the command line from its parsers, the protocols from their YAML.

They are written to docs/reference when the site is built, and are no part of the repository; so are copies of pages
that lie elsewhere in it.
"""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from _tools.links import relinked
from rvlm import cli
from rvlm.arguments import COMMANDS
from rvlm.evaluation import Protocol, load_protocol, protocol_names
from rvlm.markdown import markdown_table
from rvlm.methods import list_methods, method_class

__all__ = ["MODULES", "on_source", "public_names", "write_pages"]

DOCS = Path(__file__).resolve().parents[1]
FOLDER = DOCS / "reference"

# page -> modules on it
MODULES = {
    "attacks": ("rvlm.attacks", "rvlm.attacks.losses", "rvlm.attacks.stages", "rvlm.attacks.contract"),
    "ops": ("rvlm.ops",),
    "models": ("rvlm.models",),
    "data": ("rvlm.data",),
    "methods": ("rvlm.methods",),
    "training": ("rvlm.training",),
    "evaluation": ("rvlm.evaluation",),
    "report": ("rvlm.report",),
    "analysis": ("rvlm.analysis",),
    "lvlm": ("rvlm.lvlm",),
    "compat": (
        "rvlm.compat",
        "rvlm.compat.torchattacks",
        "rvlm.compat.autoattack",
        "rvlm.compat.pyautoattack",
        "rvlm.compat.foolbox",
        "rvlm.compat.foolbox.attacks",
        "rvlm.compat.foolbox.criteria",
        "rvlm.compat.advertorch.attacks",
        "rvlm.compat.advertorch.context",
        "rvlm.compat.cleverhans.torch.attacks.fast_gradient_method",
        "rvlm.compat.cleverhans.torch.attacks.projected_gradient_descent",
        "rvlm.compat.adv_lib",
        "rvlm.compat.robustvlm",
        "rvlm.compat.tecoa",
    ),
    "profiling": ("rvlm.profiling", "rvlm.units"),
}

PROSE = {"rvlm.attacks.stages", "rvlm.attacks.contract"}


def write_pages() -> None:
    """Writes all of them; a page that has not changed keeps its time, so that Sphinx does not read it again."""
    for name, modules in MODULES.items():
        _write(FOLDER / "api" / f"{name}.rst", _api(modules))
    _write(FOLDER / "commands.md", _commands())
    _write(FOLDER / "methods.md", _method_settings())
    _write(FOLDER / "protocols.md", _protocols())
    shown = copies()
    for file, page in shown.items():
        text = file.read_text()
        if page.name == "index.md":
            text += "\n```{toctree}\n:glob:\n:caption: Results\n\n*\n```\n"
        _write(page, relinked(text, file, page, DOCS, shown))


def copies() -> dict[Path, Path]:
    """Pages for files, and for one folder, that lie elsewhere in the repository."""
    root, bench = DOCS.parent, FOLDER / "bench"
    results = {file: bench / file.name for file in sorted((root / "bench" / "results").glob("*.md"))}
    named = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "bench/README.md": "bench/index.md"}
    return {**{root / file: FOLDER / page for file, page in named.items()}, **results}


def on_source(app, docname: str, content: list[str]) -> None:
    """Handler of Sphinx's source-read: links of the pages that somebody wrote."""
    page = Path(app.env.doc2path(docname))
    if page.suffix == ".md" and not page.is_relative_to(FOLDER):
        content[0] = relinked(content[0], page, page, DOCS, copies())


def public_names(module: str) -> list[str]:
    """`__all__`; nothing of modules that only hold others, or whose docstring is all that is shown."""
    return [] if module in PROSE else list(getattr(importlib.import_module(module), "__all__", ()))


def _value(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file() or file.read_text() != text:
        file.write_text(text)


def _api(modules: tuple[str, ...]) -> str:
    return "\n".join(_module(module, "-" if k else "=") for k, module in enumerate(modules))


def _module(module: str, underline: str) -> str:
    lines = [module, underline * len(module), "", f".. automodule:: {module}", ""]
    names = sorted(public_names(module), key=lambda name: inspect.isclass(_value(module, name)))
    if names:
        lines += [f".. currentmodule:: {module}", "", ".. autosummary::", "   :nosignatures:", ""]
        lines += [*(f"   {name}" for name in names), ""]
    for name in names:
        lines += _member(module, name)
    return "\n".join(lines)


def _member(module: str, name: str) -> list[str]:
    value = _value(module, name)
    if inspect.ismodule(value):  # has a place of its own
        return []
    if inspect.isclass(value):
        # "function" is how APGD, CW, FAB ... name what they call; it has an entry of its own
        return [f".. autoclass:: {name}", "   :members:", "   :exclude-members: function", ""]
    return [f".. autofunction:: {name}", ""] if callable(value) else [f".. autodata:: {name}", "   :no-value:", ""]


def _commands() -> str:
    """What `rvlm COMMAND --help` says, of every command."""
    lines = [
        "# Commands", "",
        "What `rvlm COMMAND --help` prints. Exit codes: 0 ok, 2 usage, 3 data missing, 4 a check failed.",
        "`--config FILE` reads settings from YAML, `--print_config` prints them all; a run's folder holds its own.", "",
    ]  # fmt: skip
    for command in COMMANDS:
        words = " ".join(
            word.rstrip("*").upper() + (" ..." if "*" in word else "") for word in cli.WORDS.get(command, ())
        )
        parser, (kind,) = cli.build_parser(command)
        lines += [f"## rvlm {command}", "", f"`rvlm {command}{' ' * bool(words)}{words} [SETTINGS]`", ""]
        lines += [_plain(" ".join(kind.__doc__.split())), "", *_settings(parser, kind)]
    return "\n".join(lines)


def _method_settings() -> str:
    lines = [
        "# Settings of the methods", "",
        "What `rvlm train METHOD --help` prints beside the settings of [rvlm train](commands.md#rvlm-train).",
        "Defaults are those of the preset `rvlm`; `--preset paper` has the paper's, `--preset code` its code's.", "",
    ]  # fmt: skip
    for method in list_methods():
        parser, (_, kind) = cli.build_parser("train", method)
        presets = ", ".join(f"`{name}`" for name in method_class(method).presets)
        lines += [f"## {method}", "", f"Presets: {presets}.", "", *_settings(parser, kind)]
    return "\n".join(lines)


def _settings(parser, kind: type) -> list[str]:
    """A definition list of the settings that are fields of `kind`."""
    actions = {action.dest: action for action in parser._actions}
    lines = []
    for field in dataclasses.fields(kind):
        action = actions[field.name]
        default = "" if action.default in (None, "", []) else f", default `{action.default}`"
        lines += [f"`--{field.name}`{default}", f": {_plain(' '.join(action.help.split()))}", ""]
    return lines


def _plain(text: str) -> str:
    """Text of a help page as Markdown that shows every character of it; backticks stay what they are."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if k % 2 else re.sub(r"[$*<\\]", r"\\\g<0>", part) for k, part in enumerate(parts))


def _protocols() -> str:
    lines = [
        "# Frozen protocols", "",
        "What the files in `rvlm/protocols` hold; how they are run: [Data sets](../data.md#protocols).", "",
    ]  # fmt: skip
    for protocol in map(load_protocol, protocol_names()):
        lines += [f"## {protocol.name}", "", _plain(protocol.about[0].upper() + protocol.about[1:]) + ".", ""]
        lines += [f"Where it differs: {_plain(protocol.differs)}.", ""] if protocol.differs else []
        lines += [f"- {key}: {said}" for key, said in _facts(protocol).items()]
        rows = []
        for part in protocol.parts:
            told = part.templates or "the data set's own"
            told = ", ".join(f"`{one}`" for one in told) if isinstance(told, list) else told
            images = str(part.n or protocol.n or "all")
            own = f" ({_attacks(part.attacks)})" if part.attacks else ""
            rows.append([f"`{part.data}`{own}", images, told])
        lines += ["", markdown_table(["data set", "images", "prompts"], rows), ""]
    return "\n".join(lines)


def _facts(protocol: Protocol) -> dict[str, str]:
    chosen = f"those that `{protocol.ids['file']}` names" if protocol.ids else "all"
    if protocol.n:
        chosen = f"{protocol.n:,} of each set (or as the table says), drawn with seed {protocol.seed}"
    facts = {
        "hash": f"`{protocol.sha}`",
        "attacks": _attacks(protocol.attacks),
        "norm": protocol.norm,
        "images": chosen,
    }
    if protocol.fit:
        how = {f.name: getattr(protocol.fit, f.name) for f in dataclasses.fields(protocol.fit)}
        facts["resizing, before the attack"] = ", ".join(f"{k} {v}" for k, v in how.items() if v not in (None, False))
    if protocol.native:
        facts["attacked at their own size"] = ", ".join(protocol.native)
    return facts | {"targets": ", ".join(protocol.targets)}


def _attacks(attacks: dict[str, list[str]]) -> str:
    return "; ".join(f"`{name}` at {', '.join(radii)}" for name, radii in attacks.items())
