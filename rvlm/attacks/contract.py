"""The contract of every attack: it leaves no trace on the model, and it checks its input before it touches anything.

During an attack the parameters are frozen (no weight gradients are computed; `_freezes` has the one exception), every
module is in the mode that was asked for, and the native multi-head-attention fast path is off, since it runs without
gradients only and would show the scorer other logits than the attack. Afterwards, also after an exception, everything
is as it was: parameters, `.grad`, `requires_grad`, training flags per module, buffers, grad mode, autocast.
"""

import functools
import numbers
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

__all__ = ["AttackWarning", "scoring", "untouched"]

MODEL_MODES = ("eval", "train", "keep")


class AttackWarning(UserWarning):
    """The attack runs, but its result may not mean what it seems to."""


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
    ViT-B/32 attack a quarter slower on a CPU (pytorch/pytorch#126973, #161564).
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
def arithmetic(model: Callable, device: torch.device, precision: str | None) -> Iterator[None]:
    """Precision of the forward passes: None leaves the caller's autocast state, "fp32" turns it off."""
    with ExitStack() as stack:
        if precision is not None:
            stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(_weights_cast_once(_module_of(model), torch.get_autocast_dtype(device.type)))
        yield


@contextmanager
def _weights_cast_once(module: nn.Module | None, dtype: torch.dtype) -> Iterator[None]:
    """Autocast caches the casts of trainable weights only; frozen ones it would cast again at every forward.

    Done for layers whose weights autocast casts anyway, so outputs are bitwise the same, and for no parameter that
    another kind of layer shares.
    """
    cast, shared = {}, set()
    for m in module.modules() if module is not None else ():
        for parameter in m.parameters(recurse=False):
            if type(m) in _AUTOCAST_LAYERS and parameter.dtype == torch.float32:
                cast[id(parameter)] = parameter
            else:
                shared.add(id(parameter))
    originals = [(parameter, parameter.data) for key, parameter in cast.items() if key not in shared]
    try:
        for parameter, data in originals:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in originals:
            parameter.data = data


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
    with torch.no_grad():
        for m, name, buffer, version, saved in buffers:
            m._buffers[name] = buffer
            # Batch norm writes its statistics without raising the version; an unneeded copy would raise it, and break
            # a backward pass of the caller's that has saved the buffer.
            if buffer._version != version or not torch.equal(buffer, saved):
                buffer.copy_(saved)


def check_images(x: Tensor, bounds: tuple[float, float]) -> None:
    """Raises unless x is a batch of finite float images inside bounds."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor [B, ...] of pixels in {list(bounds)}, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"x must hold floats in {list(bounds)}, got {x.dtype}. For uint8 images pass x.float() / 255, "
            "and quantize=255 to get valid uint8 images back."
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"x must be float32 or float64, got {x.dtype}: a ball of radius 1/255 does not survive in 16 bits. "
            "Pass x.float(); the model may still run in 16 bits (precision='bf16')."
        )
    if x.dim() < 2:
        raise ValueError(f"x must be a batch [B, ...] such as [B, 3, H, W], got shape {list(x.shape)}")
    lo, hi = bounds
    if not lo < hi:
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds}")
    if not x.numel():
        return
    low, high = (v.item() for v in torch.aminmax(x.detach()))
    if low != low or high != high:
        bad = x.detach().isnan().flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"x has NaN pixels in sample(s) {_some(bad)}: remove or repair them first")
    slack = 1e-6 * (hi - lo)
    if low < lo - slack or high > hi + slack:
        raise ValueError(
            f"x must lie in bounds {list(bounds)}, got values in [{low:.4g}, {high:.4g}]. Attacks work on pixels, "
            "before normalisation: put the normalisation into the model, or pass bounds=(low, high)."
        )


def check_radius(name: str, value: float | Tensor, batch: int, norm: str, bounds: tuple[float, float]) -> None:
    """Raises unless a radius or step size is a non-negative float or tensor [B]; a Linf eps must not span the box."""
    if isinstance(value, Tensor):
        if value.dim() > 1 or value.numel() not in (1, batch):
            raise ValueError(f"{name} must be a float or a tensor [{batch}], got shape {list(value.shape)}")
        least, most = (value.min().item(), value.max().item()) if value.numel() else (0.0, 0.0)
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        least = most = float(value)
    else:
        raise TypeError(f"{name} must be a float or a tensor [{batch}], got {type(value).__name__}")
    if not (least >= 0 and most < float("inf")):
        raise ValueError(f"{name} must be finite and not negative, got {least:g} (to descend, use targeted=True)")
    if name == "eps" and norm == "linf" and most >= bounds[1] - bounds[0]:
        hint = f": did you mean {most:g}/255?" if bounds[1] - bounds[0] == 1 else ""
        raise ValueError(f"Linf eps must be below the pixel range {bounds[1] - bounds[0]:g}, got {most:g}{hint}")


def check_labels(y: Tensor, batch: int) -> Tensor:
    """Integer labels [B] as int64."""
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y must be integer labels [{batch}], got {got}. Other targets need a callable loss.")
    if y.shape != (batch,):
        raise ValueError(f"y must have shape [{batch}], one label per image, got {list(y.shape)}")
    return y.long()


def _some(items: list, most: int = 8) -> str:
    text = ", ".join(map(str, items[:most]))
    return text if len(items) <= most else f"{text}, ... ({len(items)} in all)"
