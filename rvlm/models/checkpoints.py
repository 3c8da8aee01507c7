"""Weights that other training scripts saved: vision towers alone, or whole CLIPs, under the keys that they use.

TeCoA (Mao et al. 2023) and what was forked from it keep the tower under `vision_encoder_state_dict`, RobustVLM
(Schlarmann et al. 2024) and MMT-ARD save the tower's bare state dict, others a `state_dict`; DataParallel puts
`module.` before every key, torch.compile `_orig_mod.`, a wrapper `model.`, a whole CLIP `visual.`. The keys behind all
that are open_clip's.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["load_weights", "read_weights"]

CONTAINERS = ("vision_encoder_state_dict", "state_dict")
PREFIXES = ("module.", "_orig_mod.", "model.")
SHOWN = 5  # keys that an error names


def read_weights(file: str | Path) -> tuple[dict[str, Tensor], bool]:
    """A state dict with open_clip's keys, and whether it is a vision tower alone.

    file: .safetensors, or of torch.save, of which nothing but tensors and plain values is read.

    Raises:
        FileNotFoundError: no such file. ValueError: it cannot be read without running code, or holds no weights.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: expected a checkpoint (.safetensors, or one of torch.save)")
    state = found = _read(file)
    for name in CONTAINERS:
        if isinstance(found.get(name), dict):
            state = found[name]
            break
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{file} holds no weights: expected a state dict, or one under {' or '.join(CONTAINERS)}; it has "
            f"{_some(map(str, found))}"
        )
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    if all(name.startswith("visual.") for name in state):
        return {name.removeprefix("visual."): value for name, value in state.items()}, True
    return state, not any(name.startswith("visual.") for name in state)


def load_weights(model: nn.Module, file: str | Path) -> None:
    """Puts what a file holds, a vision tower or a whole CLIP, into an open_clip model of the same architecture.

    Raises:
        ValueError: keys are missing or unexpected, or weights have another shape; they are named.
    """
    state, tower_alone = read_weights(file)
    target = model.visual if tower_alone else model
    own = target.state_dict()
    wrong = {
        "missing": own.keys() - state.keys(),
        "unexpected": state.keys() - own.keys(),
        "of another shape": {
            f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
            for name in own.keys() & state.keys()
            if state[name].shape != own[name].shape
        },
    }
    if any(wrong.values()):
        what = "; ".join(f"{len(names)} {kind}: {_some(sorted(names))}" for kind, names in wrong.items() if names)
        raise ValueError(f"{file} is not of this {'vision tower' if tower_alone else 'model'}: {what}")
    target.load_state_dict(state)


def _read(file: Path) -> dict:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file ({error})") from error
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises almost anything
        raise ValueError(
            f"{file} holds more than tensors, or is broken, and what it holds is never run: load it where you trust it "
            f"and save its state dict alone ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}: expected a state dict")
    return found


def _some(names) -> str:
    names = list(names)
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
