"""Inputs for the kernel tests, on the GPU where there is one and in Triton's interpreter where there is none."""

import importlib.util
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need Triton")


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET=1 was not set before triton was imported")
    return torch.device("cpu")


@dataclass
class Case:
    """Arguments of a step: x_adv, grad, x [B, ...]; alpha, eps [1] or [B]; active bool [B] or None."""

    x_adv: torch.Tensor
    grad: torch.Tensor
    x: torch.Tensor
    alpha: torch.Tensor
    eps: torch.Tensor
    lo: float = 0.0
    hi: float = 1.0
    active: torch.Tensor | None = None
    levels: float = 0.0

    def changed(self, **fields) -> "Case":
        return replace(self, **fields)

    def rows(self, *which: int) -> "Case":
        """The same case, restricted to some rows."""
        which = list(which)
        few = {name: getattr(self, name)[which].contiguous() for name in ("x_adv", "grad", "x")}
        for name in ("alpha", "eps", "active"):
            t = getattr(self, name)
            few[name] = t if t is None or len(t) == 1 else t[which]
        return replace(self, **few)

    def numpy(self) -> dict:
        """As numpy arrays, the gradient widened to the image type."""
        arrays = {name: getattr(self, name) for name in ("x_adv", "x", "alpha", "eps")}
        arrays["grad"] = self.grad.to(self.x.dtype)
        arrays = {name: t.cpu().numpy() for name, t in arrays.items()}
        active = np.ones(len(self.x), bool) if self.active is None else self.active.cpu().numpy()
        return {**arrays, "active": active, "lo": self.lo, "hi": self.hi, "levels": self.levels}

    def launch(self, step, in_place: bool = False) -> torch.Tensor:
        """Result of a launcher, inside a buffer of NaN whose borders must survive."""
        out = guarded(self.x)
        if in_place:
            out.copy_(self.x_adv)
        x_adv = out if in_place else self.x_adv
        step(out, x_adv, self.grad, self.x, self.alpha, self.eps, self.lo, self.hi, self.active, self.levels)
        assert_guarded(out)
        return out


GUARD = 64


def guarded(like: torch.Tensor) -> torch.Tensor:
    """A contiguous NaN tensor shaped like `like` with NaN on both sides of its memory."""
    buffer = torch.full((like.numel() + 2 * GUARD,), float("nan"), dtype=like.dtype, device=like.device)
    return buffer[GUARD : GUARD + like.numel()].view(like.shape)


def assert_guarded(out: torch.Tensor) -> None:
    buffer = out._base
    assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all(), "a kernel wrote outside its output"


@pytest.fixture
def make_case(device):
    """Factory of cases: images inside the box, iterates near them, some gradients exactly zero."""

    def make(shape=(3, 3, 17, 19), dtype=torch.float32, grad_dtype=None, per_sample=True, seed=0, **fields) -> Case:
        random = np.random.default_rng(seed)
        rows = shape[0] if per_sample else 1
        x = random.random(shape)
        grad = random.standard_normal(shape) * (random.random(shape) > 0.1)
        case = {
            "x": torch.tensor(x).to(device, dtype),
            "x_adv": torch.tensor(np.clip(x + 0.05 * random.standard_normal(shape), 0, 1)).to(device, dtype),
            "grad": torch.tensor(grad).to(device, grad_dtype or dtype),
            "alpha": torch.tensor(random.uniform(0.5, 4, rows) / 255).to(device, dtype),
            "eps": torch.tensor(random.uniform(2, 12, rows) / 255).to(device, dtype),
        }
        return Case(**{**case, **fields})

    return make


@pytest.fixture
def mutant(tmp_path):
    """Imports a module of rvlm.kernels, steps by default, with one piece of its source exchanged."""

    def load(before: str, after: str, name: str = "steps"):
        source = Path(importlib.import_module(f"rvlm.kernels.{name}").__file__).read_text()
        assert source.count(before) >= 1, f"the mutation {before!r} no longer fits the source"
        path = tmp_path / f"mutant_{name}.py"  # a real file: Triton reads a kernel's source again
        path.write_text(source.replace(before, after))
        spec = importlib.util.spec_from_file_location(f"mutant_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
