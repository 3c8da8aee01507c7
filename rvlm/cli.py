"""The `rvlm` command.

The command, and for `train` the method, are read off the command line first; then one flat parser is built for exactly
that. So a misspelt flag or key is named as what it is, and `--help` needs neither torch nor models.
"""

import dataclasses
import difflib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rvlm import __version__
from rvlm.arguments import COMMANDS, DATA_MISSING, USAGE, recipes
from rvlm.units import Eps

__all__ = ["build_parser", "main"]

# The settings that words before the first flag stand for; * takes all that are left.
WORDS = {
    "train": ("method",), "ls": ("what",), "data": ("what", "names*"), "check": ("model",), "analyze": ("what",),
    "profile": ("what",), "compare": ("a", "b"), "report": ("runs*",), "convert": ("src", "dst"),
    "repro": ("record",), "bench": ("suites*",),
}  # fmt: skip


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
    except (ValueError, TypeError, FloatingPointError, ImportError) as error:
        return _expected(command, error, USAGE)


def _parse(command: str, argv: list[str]):
    """Arguments of a command as its dataclass; for train, a pair with the method's settings."""
    argv = _positional(command, argv)
    argv = [_recipe(argv[k - 1], word) for k, word in enumerate(argv)]
    method = _peek(argv, "method") if command == "train" else None
    parser, classes = build_parser(command, method, _peek(argv, "preset") or "rvlm")
    fields = {field.name: field.type for kind in classes for field in dataclasses.fields(kind)}
    parsed = parser.parse_args(_flags(argv, fields))
    values = {name: getattr(parsed, name) for name in fields}
    text = parser.dump(parsed)
    result = [kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)}) for kind in classes]
    if command == "train" and len(result) == 1:
        raise ValueError("which method? rvlm train METHOD, or --config FILE with `method:`; see rvlm ls methods")
    result[0].config_text = text
    return result if command == "train" else result[0]


def build_parser(command: str, method: str | None = None, preset: str = "rvlm"):
    """The parser of a command, and the dataclasses whose fields it reads; of train with a method, that one's too."""
    import jsonargparse
    from jsonargparse.typing import register_type

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message, ex=None):
            print(f"{self.prog}: {_explain(message, known)}", file=sys.stderr)
            sys.exit(USAGE)

    if importlib.util.find_spec("docstring_parser"):  # explains the settings in --help; nothing else needs it
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    register_type(Eps, serializer=str, deserializer=Eps, fail_already_registered=False)
    classes, defaults = [COMMANDS[command]], {}
    if method:
        from rvlm.methods import build_method, method_class

        classes.append(method_class(method).Config)
        defaults = dataclasses.asdict(build_method(method, preset).config)
    names = [field.name for kind in classes for field in dataclasses.fields(kind)]
    known = [f"--{name}" for name in names] + ["--config", "--print_config", "--help"]
    parser = Parser(prog=f"rvlm {command}", description=COMMANDS[command].__doc__)
    parser.add_argument(
        "--config", action="config", help="YAML file of these settings, or a recipe such as digits/tecoa"
    )
    for kind, title in zip(classes, ("settings", f"settings of {method}"), strict=False):
        parser.add_argument_group(title).add_class_arguments(kind, as_group=False)
    if defaults:
        parser.set_defaults(defaults)
    return parser, classes


def _positional(command: str, argv: list[str]) -> list[str]:
    """The words that may stand without their flags: train METHOD, ls WHAT, data WHAT NAME ..., ..."""
    flags = []
    for name in WORDS.get(command, ()):
        n = next((k for k, word in enumerate(argv) if word.startswith("-")), len(argv))
        if n:
            n = n if name.endswith("*") else 1
            flags += [f"--{name.rstrip('*')}", json.dumps(argv[:n]) if name.endswith("*") else argv[0]]
            argv = argv[n:]
    return [*flags, *argv]


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
    """--quick and --no-quick for booleans, --json for --json FILE without a file, --save-png for --save_png."""
    words = []
    for k, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            following = argv[k + 1] if k + 1 < len(argv) else ""
            alone = following.startswith("-") or not following
            if fields.get(name) is bool and not equals and following.lower() not in ("true", "false"):
                equals, value = "=", "true"
            elif fields.get(name) == (bool | str) and not equals and alone:
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
