"""advertorch's context managers, by the contract of rvlm's attacks: everything is as it was afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rvlm.attacks.contract import untouched

__all__ = ["ctx_eval", "ctx_noparamgrad", "ctx_noparamgrad_and_eval"]


@contextmanager
def ctx_noparamgrad(module: nn.Module) -> Iterator[None]:
    """Parameters need no gradient inside."""
    with untouched(module, "keep", compiled=True):
        yield


@contextmanager
def ctx_eval(module: nn.Module) -> Iterator[None]:
    """Every module is in eval mode inside."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for m, training in flags:
            m.training = training


@contextmanager
def ctx_noparamgrad_and_eval(module: nn.Module) -> Iterator[None]:
    """Both."""
    with untouched(module, "eval", compiled=True):
        yield
