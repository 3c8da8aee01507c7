"""The processes of one job: torchrun starts them, a group of one where it did not. A leaf that every layer may use.

    torchrun --nproc-per-node 2 -m rvlm eval ...

Every process runs the same code with the same arguments; work is divided by rank, and results are exchanged so that all
know everything. The first process alone writes files and prints.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["Ranks", "joined", "placed_like", "whole"]


class Ranks:
    """The process group that is initialised now, or this process alone.

    Attributes:
        rank: of this process. size: how many there are.
    """

    def __init__(self) -> None:
        on = distributed.is_available() and distributed.is_initialized()
        self.rank, self.size = (distributed.get_rank(), distributed.get_world_size()) if on else (0, 1)

    @classmethod
    def alone(cls) -> "Ranks":
        """This process by itself, whatever group there is: for work that one of them does while others wait."""
        ranks = cls()
        ranks.rank, ranks.size = 0, 1
        return ranks

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, mine: Any) -> list[Any]:
        """What every process gives, in the order of their ranks, for all of them."""
        if self.size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.size
        distributed.all_gather_object(everyone, mine)
        return everyone

    def share(self, value: Any) -> Any:
        """The first process's value, for all of them."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first process runs the block, then the others do: what it caches on disk they find."""
        if not self.first:
            distributed.barrier()
        yield
        if self.first and self.size > 1:
            distributed.barrier()


def whole(state: Any) -> Any:
    """A tensor, or a dict of such, with the slices of all processes put together. All processes must call it."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    return state.full_tensor() if hasattr(state, "full_tensor") else state


def placed_like(t: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of another one, and cut into slices as that is."""
    t = t.to(like.device)
    if not hasattr(like, "placements"):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, like.device_mesh, like.placements)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the group that torchrun describes in the environment, if it started this process, and leaves it after."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield Ranks()
        return
    devices, mine = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if devices:
        torch.cuda.set_device(mine % devices)
    # NCCL takes one process a device; where processes share one, gloo takes their tensors, too.
    shared = devices < int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    distributed.init_process_group("gloo" if shared else "cpu:gloo,cuda:nccl")
    try:
        yield Ranks()
    finally:
        distributed.destroy_process_group()
