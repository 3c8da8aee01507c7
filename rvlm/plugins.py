"""What a user's own file adds: FILE.py:NAME as a model, attack, method, data set or loop. A leaf, without torch.

A file runs once in a process for each content that it has, in a module of its own; it may import its neighbours. What
it defines is told apart by `file_sha`, a hash of the file alone, which records and states of runs hold, so that results
of one version are not taken for another's.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["file_sha", "from_file", "is_own"]


def is_own(spec: str) -> bool:
    """Whether a spec is FILE.py:NAME."""
    return ".py:" in spec


def from_file(spec: str, sha: str | None = None) -> Callable[..., Any]:
    """The callable that FILE.py:NAME names.

    Args:
        spec: FILE.py:NAME.
        sha: `file_sha` of the version that is asked for; one that ran in this process stays, whatever becomes of the
            file. None is the file as it is now.

    Raises:
        FileNotFoundError: no such file. ValueError: it is no Python, has no such callable, or is another version.
    """
    path, _, name = spec.rpartition(":")
    file = Path(path)
    module = _loaded.get((file.resolve(), sha))
    if module is None:
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}: expected FILE.py:NAME, a callable")
        module = _module(file.resolve())
        if sha not in (None, module.__rvlm_sha__):
            raise ValueError(f"{file} is another version: its hash was {sha}, is {module.__rvlm_sha__}")
    if not callable(getattr(module, name, None)):
        have = ", ".join(n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n)))
        raise ValueError(f"{file} has no callable {name!r}; it has {have or 'none'}")
    thing = getattr(module, name)
    _shas[id(thing)] = module.__rvlm_sha__
    return thing


def file_sha(thing: Callable[..., Any]) -> str | None:
    """Hash of the file that `from_file` found a function or class in; None for others."""
    return _shas.get(id(thing))


_loaded: dict[tuple[Path, str | None], ModuleType] = {}
_shas: dict[int, str] = {}  # of what lives as long as the modules above


def _module(file: Path) -> ModuleType:
    content = file.read_bytes()
    sha = hashlib.sha256(content).hexdigest()[:16]
    if (file, sha) in _loaded:
        return _loaded[file, sha]
    name = f"rvlm_own_{len(_loaded)}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    module.__rvlm_sha__ = sha
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(file.parent))
    try:
        exec(compile(content, str(file), "exec"), vars(module))
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, SyntaxError):
            raise ValueError(f"{file}, line {error.lineno}: {error.msg}") from None
        raise
    finally:
        sys.path.remove(str(file.parent))
    _loaded[file, sha] = module
    return module
