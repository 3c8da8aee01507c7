"""The `rvlm` command.

The command, and for `train` the method, are read off the command line first; then one flat parser is built for exactly
that. So a misspelt flag or key is named as what it is, and `--help` needs neither torch nor models.
"""

import dataclasses
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rvlm import __version__
from rvlm.units import Eps

__all__ = ["main"]

USAGE, DATA_MISSING, CHECK_FAILED = 2, 3, 4


@dataclasses.dataclass(kw_only=True)
class DemoArgs:
    """Train a small CLIP, break it, defend it, and write a report. Offline, about two minutes on two cores."""

    out: str = "rvlm-demo"
    """Folder for the report, records and images."""
    seed: int = 0
    """Seed of weights, data order and attack noise."""
    quick: bool = False
    """A shorter story (about 30 s): fewer epochs and samples, the same attacks."""


@dataclasses.dataclass(kw_only=True)
class InfoArgs:
    """Versions, device, what was built, the backend of every op, and the reason for anything missing."""

    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(kw_only=True)
class LsArgs:
    """List what can be named: models, methods, attacks, datasets, templates, recipes."""

    what: str = "all"
    """One of those words, or all."""


@dataclasses.dataclass(kw_only=True)
class DataArgs:
    model: str = "digits-vit"
    """ARCH[:PRETRAINED] of open_clip, hf-hub:ORG/NAME, a checkpoint or run folder, digits-vit, digits-rn,
    digits-vit-tecoa, or FILE.py:NAME, a callable from pixels in [0, 1] to logits."""
    data: str = "digits"
    """digits, npz:PATH or folder:PATH."""
    split: str = "test"
    """Split of the data."""
    size: int | None = None
    """Resize the shorter side to this and crop the centre."""
    limit: int | None = None
    """Use this many samples, drawn with a fixed seed; marks results as partial."""
    templates: str = "auto"
    """Id of the prompt templates, or auto for the data set's own."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    seed: int = 0
    """Seed of the attack's random starts."""
    batch_size: int = 100
    """Images per forward."""


@dataclasses.dataclass(kw_only=True)
class CheckArgs(DataArgs):
    """A report card on a model: pixel range, eval mode, determinism, probabilities, gradients, saturation."""

    limit: int | None = 64
    """Samples to look at."""


@dataclasses.dataclass(kw_only=True)
class AttackArgs(DataArgs):
    """Attack a model and keep the adversarial images."""

    attack: str = "pgd-10"
    """fgsm, pgd-STEPS, or pgd-STEPSxRESTARTS (cross-entropy, then the margin loss)."""
    eps: Eps = Eps("8/255")
    """Radius in pixel units: 8/255 or 0.031."""
    norm: str = "linf"
    """linf or l2."""
    source: str | None = None
    """Craft the images on this model instead (transfer)."""
    save_png: bool = False
    """Also write PNGs of the images that fool the model (valid uint8 by the attack) and score them as read back."""
    out: str | None = None
    """Run folder; default runs/attack-DATE."""


@dataclasses.dataclass(kw_only=True)
class EvalArgs(DataArgs):
    """Clean and robust accuracy, with intervals, a record and a row per sample."""

    attack: str = "pgd-10"
    """fgsm, pgd-STEPS, or pgd-STEPSxRESTARTS (cross-entropy, then the margin loss)."""
    eps: str = "8/255"
    """Radii in pixel units, separated by commas: 4/255,8/255."""
    norm: str = "linf"
    """linf or l2."""
    source: str | None = None
    """Craft the images on this model instead (transfer)."""
    out: str | None = None
    """Run folder; default runs/eval-DATE."""


@dataclasses.dataclass(kw_only=True)
class TrainArgs:
    """Train a model with a method; `rvlm train METHOD --help` lists the method's own settings too."""

    method: str = ""
    """Name of the method (rvlm ls methods); also the first word after train."""
    preset: str = "rvlm"
    """Settings to start from: paper, code or rvlm."""
    student: str = "digits-vit"
    """Model to train: as --model elsewhere, or tiny-vit, tiny-rn (random weights)."""
    data: str = "digits"
    """digits, npz:PATH or folder:PATH."""
    split: str = "train"
    """Split to train on."""
    size: int | None = None
    """Resize the shorter side to this and crop the centre."""
    limit: int | None = None
    """Train on this many samples."""
    eval_data: str | None = None
    """Data to evaluate on before and after; default the same data, split test."""
    eval_attack: str = "pgd-10"
    """Attack of that evaluation (white-box, at the method's eps)."""
    eval_limit: int | None = None
    """Samples of that evaluation."""
    seed: int = 0
    """Seed of weights, data order and attack noise."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    out: str | None = None
    """Run folder; default runs/train-DATE."""


COMMANDS: dict[str, type] = {
    "demo": DemoArgs,
    "info": InfoArgs,
    "ls": LsArgs,
    "attack": AttackArgs,
    "eval": EvalArgs,
    "check": CheckArgs,
    "train": TrainArgs,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (0 ok, 2 usage, 3 data missing, 4 check failed)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        return _fail(command, f"unknown command {command!r}{_suggest(command, COMMANDS)}\n\n{_overview()}", USAGE)
    try:
        args = _parse(command, rest)
        from rvlm import commands

        return getattr(commands, command.replace("-", "_"))(args)
    except SystemExit as stop:  # argparse: help, or a usage error that was printed
        return stop.code if isinstance(stop.code, int) else USAGE
    except KeyboardInterrupt:
        return _fail(command, "interrupted", 130)
    except FileNotFoundError as error:
        return _expected(command, error, DATA_MISSING)
    except (ValueError, TypeError, FloatingPointError) as error:
        return _expected(command, error, USAGE)


def _parse(command: str, argv: list[str]):
    """Arguments of a command as its dataclass; for train, a pair with the method's settings."""
    import jsonargparse
    from jsonargparse.typing import register_type

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message, ex=None):
            print(f"{self.prog}: {_explain(message, known)}", file=sys.stderr)
            sys.exit(USAGE)

    if importlib.util.find_spec("docstring_parser"):  # explains the settings in --help; nothing else needs it
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    register_type(Eps, serializer=str, deserializer=Eps, fail_already_registered=False)
    cls = COMMANDS[command]
    argv = _positional(command, argv)
    argv = [_recipe(argv[k - 1], word) for k, word in enumerate(argv)]
    classes, defaults = [cls], {}
    if command == "train":
        method, preset = _peek(argv, "method"), _peek(argv, "preset") or "rvlm"
        if method:
            from rvlm.methods import build_method, method_class

            classes.append(method_class(method).Config)
            defaults = dataclasses.asdict(build_method(method, preset).config)
    fields = {field.name: field.type for kind in classes for field in dataclasses.fields(kind)}
    known = [f"--{name}" for name in fields] + ["--config", "--print_config", "--help"]
    argv = _flags(argv, fields)
    parser = Parser(prog=f"rvlm {command}", description=cls.__doc__)
    parser.add_argument(
        "--config", action="config", help="YAML file of these settings, or a recipe such as digits/tecoa"
    )
    for kind in classes:
        parser.add_class_arguments(kind)
    if defaults:
        parser.set_defaults(defaults)
    parsed = parser.parse_args(argv)
    values = {name: getattr(parsed, name) for name in fields}
    text = parser.dump(parsed)
    result = [kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)}) for kind in classes]
    if command == "train" and len(result) == 1:
        raise ValueError("which method? rvlm train METHOD, or --config FILE with `method:`; see rvlm ls methods")
    for arguments in result:
        arguments.config_text = text
    return result if command == "train" else result[0]


def _positional(command: str, argv: list[str]) -> list[str]:
    """The one word that may stand without its flag: rvlm train METHOD, ls WHAT, check MODEL."""
    flag = {"train": "--method", "ls": "--what", "check": "--model"}.get(command)
    return [flag, *argv] if flag and argv and not argv[0].startswith("-") else argv


def _recipe(before: str, word: str) -> str:
    """A --config that is no file but a bundled recipe becomes its path."""
    name = word.removeprefix("--config=")
    if before != "--config" and name == word:
        return word
    bundled = Path(__file__).parent / "recipes" / f"{name}.yaml"
    if not Path(name).is_file() and not bundled.is_file():
        raise FileNotFoundError(
            f"no config {name}: expected a YAML file or one of {', '.join(recipes()) or 'no recipes'}"
        )
    path = name if Path(name).is_file() else str(bundled)
    return path if name == word else f"--config={path}"


def recipes() -> list[str]:
    """Names of the bundled recipes."""
    root = Path(__file__).parent / "recipes"
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def _peek(argv: list[str], key: str) -> str | None:
    """A setting before there is a parser: from its flag, else from the --config file."""
    for k, word in enumerate(argv):
        if word == f"--{key}" and k + 1 < len(argv):
            return argv[k + 1]
        if word.startswith(f"--{key}="):
            return word.partition("=")[2]
    for k, word in enumerate(argv):
        if word.startswith("--config"):
            import yaml

            path = word.partition("=")[2] or argv[k + 1]
            return (yaml.safe_load(Path(path).read_text()) or {}).get(key)
    return None


def _flags(argv: list[str], fields: dict[str, type]) -> list[str]:
    """--quick and --no-quick for booleans, --save-png for --save_png."""
    words = []
    for k, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            following = argv[k + 1] if k + 1 < len(argv) else ""
            if fields.get(name) is bool and not equals and following.lower() not in ("true", "false"):
                equals, value = "=", "true"
            elif name.startswith("no_") and fields.get(name[3:]) is bool and not equals:
                name, equals, value = name[3:], "=", "false"
            word = f"--{name}{equals}{value}"
        words.append(word)
    return words


def _explain(message: str, known: Sequence[str]) -> str:
    """A parser's message, with the nearest names for what it did not know."""
    for pattern in (
        r"unrecognized arguments?: (\S+)",
        r"[Oo]ption ['\"]([\w.]+)['\"] is not accepted",
    ):
        if match := re.search(pattern, message, flags=re.IGNORECASE):
            word = "--" + match[1].lstrip("-").partition("=")[0]
            return f"unknown setting {word}{_suggest(word, known)}"
    return " ".join(message.split())


def _suggest(word: str, known) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else f": expected one of {', '.join(known)}"


def _expected(command: str, error: Exception, code: int) -> int:
    if os.environ.get("RVLM_TRACEBACK"):
        raise error
    return _fail(command, str(error), code)


def _fail(command: str, message: str, code: int) -> int:
    print(f"rvlm {command}: {message}", file=sys.stderr)
    return code


def _overview() -> str:
    lines = [f"rvlm {__version__}: attack, defend and measure vision-language models", "", "rvlm COMMAND --help", ""]
    lines += [f"  {name:<8}{cls.__doc__}" for name, cls in COMMANDS.items()]
    return "\n".join(lines)
