"""What is known of the samples of a batch, as dataclasses from which samples can leave and to which others can come."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["Rows"]


class Rows:
    """Base of dataclasses whose fields are tensors [B, ...], lists of B or Rows of the same samples; others are shared.

    A list is for what the host must know without waiting for a device.
    """

    def at(self, rows: Tensor) -> Self:
        """Some of the samples."""

        def some(value: Any) -> Any:
            if isinstance(value, list):
                return [value[row] for row in rows.tolist()]
            return value.at(rows) if isinstance(value, Rows) else value[rows]

        return self._each(some)

    def join(self, other: Self) -> Self:
        """These samples and then the other's."""

        def joined(mine: Any, others: Any) -> Any:
            if isinstance(mine, list):
                return mine + others
            return mine.join(others) if isinstance(mine, Rows) else torch.cat([mine, others])

        return self._each(joined, other)

    def _each(self, change: Callable[..., Any], *others: "Rows") -> Self:
        part = copy.copy(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | list | Rows):
                setattr(part, field.name, change(value, *(getattr(other, field.name) for other in others)))
        return part
