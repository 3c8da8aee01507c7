"""What is known of the samples of a batch, as dataclasses from which samples can leave and to which others can come."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["Rows", "on_device"]


class Rows:
    """Base of dataclasses whose fields are tensors [B, ...], tuples of those, lists of B or Rows of the same samples;
    others are shared.

    A list is for what the host must know without waiting for a device.
    """

    def at(self, rows: Tensor) -> Self:
        """Some of the samples."""

        def some(value: Any) -> Any:
            if isinstance(value, list):
                return [value[row] for row in rows.tolist()]
            if isinstance(value, tuple):
                return tuple(part[rows] for part in value)
            return value.at(rows) if isinstance(value, Rows) else value[rows]

        return self._each(some)

    def join(self, other: Self) -> Self:
        """These samples and then the other's."""

        def joined(mine: Any, others: Any) -> Any:
            if isinstance(mine, list):
                return mine + others
            if isinstance(mine, tuple):
                return tuple(torch.cat(pair) for pair in zip(mine, others, strict=True))
            return mine.join(others) if isinstance(mine, Rows) else torch.cat([mine, others])

        return self._each(joined, other)

    def _each(self, change: Callable[..., Any], *others: "Rows") -> Self:
        part = copy.copy(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            tensors = isinstance(value, tuple) and all(isinstance(item, Tensor) for item in value)
            if tensors or isinstance(value, Tensor | list | Rows):
                setattr(part, field.name, change(value, *(getattr(other, field.name) for other in others)))
        return part


def on_device(like: Tensor, values: list) -> Tensor:
    """Numbers or flags as a tensor where another one is; the host does not wait for it."""
    if values.count(values[0]) == len(values):
        return torch.full((len(values),), values[0], device=like.device)
    if not like.is_cuda:
        return torch.tensor(values, device=like.device)
    return torch.tensor(values, pin_memory=True).to(like.device, non_blocking=True)
