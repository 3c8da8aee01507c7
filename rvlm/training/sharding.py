"""Vision towers that are too large for one device: FSDP2, and the way back to a whole tower.

Every process holds a slice of each weight and of its optimiser state; a block's weights are gathered when it runs. All
processes must make the same passes through the tower, as training steps do and evaluations do not.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rvlm.models import Clip
from rvlm.ranks import whole

__all__ = ["Sharded"]


class Sharded:
    """A student whose vision tower is cut up in place, one slice for each process.

    Args:
        student: the same weights in all processes; only its vision tower may learn.

    Raises:
        ValueError: something outside the vision tower learns, or it has low-rank corrections.
    """

    def __init__(self, student: Clip) -> None:
        from torch.distributed.fsdp import fully_shard

        tower = student.model.visual
        inside = {id(p) for p in tower.parameters()}
        outside = [name for name, p in student.named_parameters() if p.requires_grad and id(p) not in inside]
        if outside:
            raise ValueError(f"fsdp shards the vision tower alone, but {outside[0]} learns too: use ddp")
        if any(hasattr(module, "parametrizations") for module in tower.modules()):
            raise ValueError("fsdp cannot shard low-rank corrections (their optimiser state is small): use ddp")
        self.student, self.plain = student, copy.deepcopy(tower).cpu()
        for block in _blocks(tower):
            fully_shard(block)
        fully_shard(tower)

    def state(self, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Whole weights and optimiser state, on the CPU of the first process. All processes must call it."""
        from torch.distributed.checkpoint import state_dict as dcp

        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        model = dcp.get_model_state_dict(self.student, options=options)
        inner = optimizer and dcp.get_optimizer_state_dict(self.student, optimizer, options=options)
        return model, inner

    def load(self, model: dict[str, Tensor], optimizer: torch.optim.Optimizer | None, inner: dict | None) -> None:
        """Takes back what `state` gave, which every process must have."""
        from torch.distributed.checkpoint import state_dict as dcp

        options = dcp.StateDictOptions(full_state_dict=True)
        dcp.set_model_state_dict(self.student, model, options=options)
        if optimizer is not None:
            dcp.set_optimizer_state_dict(self.student, optimizer, inner, options=options)

    def whole_tower(self) -> nn.Module:
        """The tower with the weights that it has now, on the student's device, in every process."""
        weights = whole(self.student.model.visual.state_dict())
        tower = copy.deepcopy(self.plain).to(self.student.device)
        tower.load_state_dict(weights)
        return tower


def _blocks(tower: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer, of open_clip or timm; none for a ResNet, which is one slice."""
    for path in ("transformer.resblocks", "trunk.blocks"):
        try:
            return list(tower.get_submodule(path))
        except AttributeError:
            continue
    return []
