"""The contract of every attack: it leaves no trace on the model.

During an attack the parameters are frozen (no weight gradients are computed; `_freezes` has the one exception), every
module is in the mode that was asked for, and the native multi-head-attention fast path is off, since it runs without
gradients only and would show the scorer other logits than the attack. Afterwards, also after an exception, everything
is as it was: parameters, `.grad`, `requires_grad`, training flags per module, buffers, grad mode, autocast.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["scoring", "untouched"]

MODEL_MODES = ("eval", "train", "keep")


@contextmanager
def untouched(model: Callable, mode: str = "eval", *, compiled: bool = False) -> Iterator[None]:
    """Freezes a model for the block and restores all of it afterwards.

    Args:
        model: a module, a bound method of one, or a functools.partial of either. The parameters of any other callable
            cannot be seen and are left alone.
        mode: "eval", "train", or "keep" for the flags as they are.
        compiled: the model runs under torch.compile, whose backward pass computes what any trainable weight could ask
            for: then every parameter is frozen, without the exception that eager mode makes for speed.
    """
    module = _module_of(model)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    modules = list(module.modules()) if module is not None else []
    flags = [(m, m.training) for m in modules]
    trained = [p for m in modules for name, p in m._parameters.items() if _freezes(m, name, p, compiled)]
    buffers = _snapshot(modules)
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for parameter in trained:
            parameter.requires_grad_(False)
        if mode != "keep":
            _set_training((m, mode == "train") for m in modules)
        yield
    finally:
        _set_training(flags)
        for parameter in trained:
            parameter.requires_grad_(True)
        _restore(buffers)
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _set_training(flags: Iterable[tuple[nn.Module, bool]]) -> None:
    for m, training in flags:
        if m.training != training:  # setting an attribute of a module is slow, and there are hundreds
            m.training = training


def _freezes(m: nn.Module, name: str, parameter: nn.Parameter | None, compiled: bool) -> bool:
    """Every trainable parameter but, in eager mode, one kind, whose gradient autograd.grad skips all the same.

    A batch-first nn.MultiheadAttention multiplies a transposed view of its input by in_proj_weight. torch folds that
    into one matrix product only if the weight is trainable; frozen, it runs one small product per token, which makes a
    ViT-B/32 attack a quarter slower on a CPU (pytorch/pytorch#161564).
    """
    if parameter is None or not parameter.requires_grad:
        return False
    return compiled or not (isinstance(m, nn.MultiheadAttention) and name == "in_proj_weight" and m.batch_first)


@contextmanager
def scoring(model: Callable) -> Iterator[None]:
    """Eval mode without gradients, in which accuracy is measured: the same logits that an attack sees."""
    with untouched(model, "eval"), torch.no_grad():
        yield


@contextmanager
def arithmetic(
    model: Callable, device: torch.device, precision: str | None
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Precision of the forward passes: None leaves the caller's autocast state, "fp32" and "tf32" turn it off, "bf16"
    and "cascade" turn it on. Weights that autocast would cast are cast once.

    Yields what opens a block in float32 inside it, for verdicts: no autocast, and the model's own weights.
    """
    with ExitStack() as stack:
        if precision is not None:
            narrow = precision in ("bf16", "cascade")
            stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow))
        if precision == "tf32":
            stack.enter_context(_tf32())
        cast = None
        if torch.is_autocast_enabled(device.type):
            cast = _Cast(_module_of(model), torch.get_autocast_dtype(device.type))
            stack.enter_context(cast)

        @contextmanager
        def in_float32() -> Iterator[None]:
            with torch.autocast(device.type, enabled=False), nullcontext() if cast is None else cast.undone():
                yield

        yield in_float32


@contextmanager
def _tf32() -> Iterator[None]:
    """Matrix products and convolutions of CUDA devices on tensor cores, with float32 inputs cut to ten bits.

    Set by the older names, since torch.compile reads those and refuses a mixture; what they were set to is put back by
    the newer ones, which know one state more.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kinds = (cudnn.conv, cudnn.rnn)
    before, cudnn_before = matmul.fp32_precision, [kind.fp32_precision for kind in kinds]
    try:
        if before != "tf32":
            matmul.allow_tf32 = True
        if cudnn_before != ["tf32", "tf32"]:
            cudnn.allow_tf32 = True
        yield
    finally:
        if before != "tf32":
            matmul.allow_tf32 = False
            matmul.fp32_precision = before
        if cudnn_before != ["tf32", "tf32"]:
            cudnn.allow_tf32 = False
            for kind, value in zip(kinds, cudnn_before, strict=True):
                kind.fp32_precision = value


class _Cast:
    """A block in which a model has its weights in another dtype.

    Autocast caches the casts of trainable weights only; frozen ones it would cast again at every forward. Done for
    layers whose weights autocast casts anyway, so outputs are bitwise the same, and for no parameter that another kind
    of layer shares.
    """

    def __init__(self, module: nn.Module | None, dtype: torch.dtype) -> None:
        cast, shared = {}, set()
        for m in module.modules() if module is not None else ():
            for name, parameter in m._parameters.items():
                if parameter is None:
                    continue
                # A slice of a sharded weight is gathered at every forward pass, and cast there.
                whole = not hasattr(parameter, "placements")
                if type(m) in _AUTOCAST_LAYERS and parameter.dtype == torch.float32 and whole:
                    cast.setdefault(id(parameter), []).append((m, name, parameter))
                else:
                    shared.add(id(parameter))
        self.dtype = dtype
        self.places = [place for key, found in cast.items() if key not in shared for place in found]
        self.narrow: dict[int, nn.Parameter] = {}

    def __enter__(self) -> None:
        for _, _, parameter in self.places:
            if id(parameter) not in self.narrow:
                cast = nn.Parameter(parameter.detach().to(self.dtype), parameter.requires_grad)
                self.narrow[id(parameter)] = cast
        self._put(narrow=True)

    def __exit__(self, *_: Any) -> None:
        self._put(narrow=False)
        self.narrow.clear()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """The own weights for a while."""
        self._put(narrow=False)
        try:
            yield
        finally:
            self._put(narrow=True)

    def _put(self, narrow: bool) -> None:
        # Other parameters in their places: new data in the old ones would tear off the hooks of their gradients.
        for m, name, parameter in self.places:
            m._parameters[name] = self.narrow[id(parameter)] if narrow else parameter


_AUTOCAST_LAYERS = {
    nn.Linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear,  # out_proj of nn.MultiheadAttention
    nn.MultiheadAttention,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
}


def _module_of(model: Callable) -> nn.Module | None:
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, functools.partial):
        return _module_of(model.func)
    owner = getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _snapshot(modules: list[nn.Module]) -> list[tuple[nn.Module, str, Tensor, int, Tensor]]:
    return [
        (m, name, buffer, buffer._version, buffer.detach().clone())
        for m in modules
        for name, buffer in m._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]


def _restore(buffers: list[tuple[nn.Module, str, Tensor, int, Tensor]]) -> None:
    """Puts the buffers back, and their old values into those that were written to.

    Batch norm writes its statistics without raising the version, so values are compared; all at once, since every
    question to a GPU waits for it. An unneeded copy would raise the version, and break a backward pass of the caller's
    that has saved the buffer.
    """
    for m, name, buffer, _, _ in buffers:
        m._buffers[name] = buffer
    with torch.no_grad():
        differ = [(buffer != saved).any() for _, _, buffer, _, saved in buffers]
        written = torch.stack([flag.to(differ[0].device) for flag in differ]).tolist() if differ else []
        for (_, _, buffer, version, saved), changed in zip(buffers, written, strict=True):
            if changed or buffer._version != version:
                buffer.copy_(saved)
