"""Registration of ops and the choice of a backend.

Every op is one schema in two namespaces. `rvlm::op` is what the library calls: the dispatcher sends CPU tensors to C++
and CUDA tensors to Triton, and to the eager reference where those are missing. `rvlm_cpp::op` reaches the C++ and
CUDA C++ code on either device, for `use_backend("cpp")`. `use_backend("reference")` calls the eager reference directly,
past the dispatcher, so that it can be differentiated, vmapped and stepped through.
"""

import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["Op", "backends", "use_backend"]

BACKENDS = ("auto", "reference", "cpp", "triton")

_ops: dict[str, "Op"] = {}
_missing: dict[str, str] = {}  # backend -> why it cannot be used in this process
_forced = os.environ.get("RVLM_BACKEND", "auto")
if _forced not in BACKENDS:
    raise ValueError(f"RVLM_BACKEND={_forced!r} is not a backend: expected one of {', '.join(BACKENDS)}")

for _name, _module in (("cpp", "rvlm._C"), ("cuda_cpp", "rvlm._C_cuda")):
    try:
        importlib.import_module(_module)
    except ImportError as _error:
        _missing[_name] = f"{_module} could not be imported: {_error}"


class Op:
    """One op: its schema, its fake, its eager reference (the specification) and its Triton launcher.

    Args:
        name: name in the `rvlm` and `rvlm_cpp` namespaces.
        schema: signature in the dispatcher's language, without the name.
        fake: shape function for compilers; takes and returns what the op does.
        reference: the op in plain PyTorch.
        triton: `module:function` of a function with the op's own signature. Resolved at the first call, so that
            machines without Triton can import rvlm.
    """

    def __init__(self, name: str, schema: str, *, fake: Callable, reference: Callable, triton: str) -> None:
        self.name, self.reference, self._triton_path = name, reference, triton
        for namespace in ("rvlm", "rvlm_cpp"):
            torch.library.define(f"{namespace}::{name}", schema)
            torch.library.register_fake(f"{namespace}::{name}", fake)
        if not self._has_kernel("rvlm", "CPU"):
            torch.library.impl(f"rvlm::{name}", "CPU", reference)
        torch.library.impl(f"rvlm::{name}", "CUDA", self._cuda)
        self._call = getattr(torch.ops.rvlm, name).default
        self._call_cpp = getattr(torch.ops.rvlm_cpp, name).default
        _ops[name] = self

    def __call__(self, *args):
        if _forced == "auto":
            return self._call(*args)
        if _forced == "reference":
            return self.reference(*args)
        device = args[0].device.type
        if _forced == "triton":
            kernel = self._triton_or_raise(device)
            return self._call(*args) if device == "cuda" else kernel(*args)  # the dispatcher has it for CUDA alone
        if not self._has_kernel("rvlm_cpp", device.upper()):
            raise RuntimeError(
                f"rvlm.ops.{self.name} has no 'cpp' backend for {device} tensors: "
                f"{_missing.get('cuda_cpp' if device == 'cuda' else 'cpp', 'it was built without this op')}. "
                "Use use_backend('auto') or rebuild (see `rvlm info`)."
            )
        return self._call_cpp(*args)

    def backend(self, device: str) -> str:
        """Name of the backend that `auto` takes for tensors on `device` ("cpu" or "cuda")."""
        if device == "cuda":
            return "triton" if triton_missing("cuda") is None else "reference"
        return "cpp" if self._has_kernel("rvlm_cpp", "CPU") else "reference"

    def _has_kernel(self, namespace: str, key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{self.name}", key)

    def _cuda(self, *args):
        return (self._triton() if triton_missing("cuda") is None else self.reference)(*args)

    def _triton(self) -> Callable:
        module, function = self._triton_path.split(":")
        return getattr(importlib.import_module(module), function)

    def _triton_or_raise(self, device: str) -> Callable:
        reason = triton_missing(device)
        if reason is not None:
            raise RuntimeError(
                f"rvlm.ops.{self.name} has no 'triton' backend for {device} tensors: {reason}. Use use_backend('auto')."
            )
        return self._triton()


def triton_missing(device: str) -> str | None:
    """Why Triton kernels cannot run on `device`, or None if they can."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on CPU tensors only under its interpreter (TRITON_INTERPRET=1 before triton is imported)"
    if "triton" not in _missing:
        try:
            importlib.import_module("triton")
        except ImportError as error:
            _missing["triton"] = f"triton could not be imported: {error}"
    return _missing.get("triton")


def reference_forced() -> bool:
    return _forced == "reference"


def known_signature(forward: Callable) -> Callable:
    """Decorates a Function's forward: torch asks for its signature at every call, which takes longer than small ops."""
    forward.__signature__ = inspect.signature(forward)
    return forward


def once_differentiable(name: str) -> Callable:
    """Decorates a Function's backward: differentiating its result is an error, not a silent zero.

    The result hangs on the incoming gradients and on what the Function has saved, so the Function must save its
    differentiable inputs, also where the gradient was computed in the forward pass. create_graph=True alone, which
    torch.func.grad always sets, is no error.
    """

    def decorate(backward: Callable) -> Callable:
        def checked(ctx, *grads):
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                results = backward(ctx, *grads)
            roots = [t for t in (*grads, *ctx.saved_tensors) if t is not None]
            return tuple(r if r is None else _Once.apply(name, r, *roots) for r in results)

        return checked

    return decorate


class _Once(torch.autograd.Function):
    """The identity, whose derivative is an error."""

    @staticmethod
    def forward(name, result, *roots):
        return result.view_as(result)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"rvlm.ops.{ctx.op} is differentiable once. For a second derivative call it under "
            "use_backend('reference'), which is plain PyTorch."
        )


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces every op in the block onto one backend, in the whole process.

    Args:
        name: "auto" (CPU: C++, CUDA: Triton, else the reference), "reference", "cpp" or "triton". A forced backend that
            an op lacks raises RuntimeError at the call; nothing falls back silently.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backends() -> dict:
    """What each op runs on in this process, and why a backend is missing.

    Returns:
        {"forced": name, "ops": {op: {"cpu": backend, "cuda": backend}}, "missing": {backend: reason}}
    """
    triton_missing("cuda")
    return {
        "forced": _forced,
        "ops": {name: {device: op.backend(device) for device in ("cpu", "cuda")} for name, op in sorted(_ops.items())},
        "missing": dict(_missing),
    }
