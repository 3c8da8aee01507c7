"""Progress of an evaluation on disk, so that one that was killed goes on where it was.

A state file holds what is known of every sample, the sums so far and the next (stage, chunk), and a description of the
evaluation: data, weights, attack, everything that decides the result. A file of another evaluation is refused. It is
replaced as a whole, so that a crash or a full disk leaves the last one.
"""

import dataclasses
import json
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rvlm.attacks.stages import Stage
from rvlm.data.prompts import fingerprint
from rvlm.files import whole_file
from rvlm.models.weights import settings_of, weights_sha

__all__ = ["COLUMNS", "Keeper", "State", "Tally"]

SCHEMA = "rvlm.state/4"
COLUMNS = (
    "pred_clean", "pred_adv", "broken_by", "fooled_at", "top_clean", "top_adv", "prob_clean", "prob_adv", "linf",
    "distance", "margin",
)  # fmt: skip
PAUSE, SHARE = 1.0, 0.01  # seconds between two saves at least, and the share of the time that they may take


@dataclasses.dataclass
class Tally:
    """Sums over the samples so far, and where to go on: stage -1 is the pass over clean images.

    Attributes:
        shared: passes over clean images that another evaluation made (`rvlm.evaluation.evaluate(clean=)`).
        clean_nonfinite: of nonfinite, those of the pass over clean images.
    """

    stage: int = -1
    chunk: int = 0
    classes: int = 0
    stages: list[Stage] = dataclasses.field(default_factory=list)
    vanished: list[str] = dataclasses.field(default_factory=list)
    losses: list[list[float]] = dataclasses.field(default_factory=list)
    zeros: int = 0
    gradients: int = 0
    shared: int = 0
    nonfinite: int = 0
    clean_nonfinite: int = 0
    disagreements: int = 0
    bf16_only: int = 0
    fp32_only: int = 0
    varies: float = 0.0
    probabilities: bool = False
    over: float = 0.0
    outside: float = 0.0

    def add_losses(self, more: list[float]) -> None:
        """Adds a chunk's losses, step by step, to those of the stage; a chunk that ends early keeps its last ones."""
        self.losses += [[] for _ in range(self.stage + 1 - len(self.losses))]
        so_far = self.losses[self.stage]
        longest = max(len(so_far), len(more))
        both = [each + each[-1:] * (longest - len(each)) if each else [0.0] * longest for each in (so_far, more)]
        self.losses[self.stage] = [sum(pair) for pair in zip(*both, strict=True)]


class State:
    """A state file.

    Args:
        path: of the file.
        key: all that decides the result, by name.
    """

    def __init__(self, path: str | Path, key: dict[str, Any]) -> None:
        self.path, self.key = Path(path), {"schema": SCHEMA} | key
        self.saved, self.pause = 0.0, PAUSE

    @property
    def due(self) -> bool:
        """Once a second, or, where a state is so large that writing takes long, for a hundredth of the time."""
        return time.perf_counter() - self.saved > self.pause

    def write(self, known: dict[str, Any], columns: dict[str, np.ndarray] | None = None) -> None:
        """Replaces the file. known: plain values by name; columns: arrays by name."""
        began = time.perf_counter()
        about = json.dumps({"key": self.key, **known}).encode()
        with whole_file(self.path) as file:
            np.savez(file, about=np.frombuffer(about, np.uint8), **(columns or {}))
        self.saved = time.perf_counter()
        self.pause = max(PAUSE, (self.saved - began) / SHARE)

    def read(self, columns: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Plain values and, of the arrays, those named in columns, as they were written; None where there is no file.

        Raises:
            ValueError: it is something else, or of another evaluation.
        """
        if not self.path.exists():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                known = json.loads(file["about"].tobytes())
                theirs, ours = known.pop("key"), json.loads(json.dumps(self.key))
                found = {name: file[name] for name in columns} if theirs == ours else {}
        except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path} is no state of an evaluation ({error}): remove it to begin anew") from None
        if differ := [name for name in ours | theirs if ours.get(name) != theirs.get(name)]:
            what = "; ".join(f"{name} was {theirs.get(name)!r}, is {ours.get(name)!r}" for name in differ)
            raise ValueError(f"{self.path} belongs to another evaluation ({what}): remove it, or write elsewhere")
        return known, found


class Keeper:
    """Saves and restores; without a path it does neither.

    Args:
        path: of the state file.
        result: Evaluation, filled in from the file if there is one.
        data: what is evaluated.
        models: by role, to be recognised by their weights and settings.
        settings: more that decides the result.
    """

    def __init__(self, path: str | Path | None, result, data, models: dict[str, Any], settings: dict[str, Any]) -> None:
        self.state, self.result = None, result
        self.columns = COLUMNS if result.x_adv is None or path is None else (*COLUMNS, "x_adv")
        self.tally, self.began, self.before = Tally(), time.perf_counter(), 0.0
        if path is None:
            return
        key = {
            "attack": result.attack, "eps": str(result.eps), "norm": result.norm,
            "target": result.target, "seed": result.seed, "batch_size": result.batch_size, "data": data.name,
            "fingerprint": data.fingerprint, "samples": data.index_sha,
            "first_image": data.first_image, "data_file": data.file_sha,
            "attack_files": [stage.sha256 for stage in result.stages if stage.sha256] or None,
            **{role: _name(model) for role, model in models.items()}, **settings,
            **{f"{role}.{name}": v for role, model in models.items() for name, v in settings_of(model).items()},
        }  # fmt: skip
        self.state = State(path, key)
        if (found := self.state.read(self.columns)) is not None:
            self.adopt(found[0] | {"columns": found[1]})

    def seconds(self) -> float:
        """Spent so far, in all attempts."""
        return self.before + time.perf_counter() - self.began

    def save_now_and_then(self) -> None:
        if self.state is not None and self.state.due:
            self.save()

    def known(self) -> dict[str, Any]:
        """Everything that the samples and the sums so far say."""
        return {
            "tally": dataclasses.asdict(self.tally),
            "result": {name: getattr(self.result, name) for name in ("forwards", "backwards", "refused")},
            "columns": {name: getattr(self.result, name).numpy() for name in self.columns},
            "seconds": self.seconds(),
        }

    def adopt(self, known: dict[str, Any]) -> None:
        """Goes on from there."""
        for name, column in known["columns"].items():
            getattr(self.result, name).copy_(torch.from_numpy(column.copy()))
        for name, value in known["result"].items():
            setattr(self.result, name, value)
        self.tally = Tally(**known["tally"])
        self.tally.stages = [Stage(**stage) for stage in self.tally.stages]
        self.before, self.began = known["seconds"], time.perf_counter()

    def save(self) -> None:
        if self.state is not None:
            known = self.known()
            columns = known.pop("columns")
            self.state.write(known, columns)


def _name(model: Any) -> str | None:
    """Class, weights and prompts; of a plain callable its name alone, since nothing else can be seen."""
    if model is None:
        return None
    name = getattr(model, "__qualname__", type(model).__qualname__)
    prompts = fingerprint(getattr(model, "templates", []))
    return f"{name} {weights_sha(model)} {prompts}" if isinstance(model, nn.Module) else name
