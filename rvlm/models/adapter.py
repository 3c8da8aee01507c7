"""What stands around a frozen tower: a low-pass filter before it and an anchor in one of its blocks (R-Adapt).

    x  -> G x                                  Gaussian filter of the pixels, cutoff D0 in DFT bins
    x1 =  x0 + mix(o, alpha A)                 in one block: o the attention's output, A [N, D] the same for every image

with mix add: o + alpha A; lerp: (1 - alpha) o + alpha A; normadd: (o + alpha A) / (1 + alpha). Nothing of the tower is
changed or copied: its state dict has the same keys and values with and without an adapter, which `detach` takes away
without a trace.

An adapter is saved as adapter.safetensors (the anchor) and adapter.json (all else), a few hundred kB beside a model.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rvlm import ops
from rvlm.files import write_bytes
from rvlm.ops.attention import MIXES

if TYPE_CHECKING:
    from rvlm.models.clip import Clip

__all__ = ["ADAPTER_CONFIG", "Adapter", "anchorable_block", "apply_adapter", "attention_output"]

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter.safetensors", "adapter.json"


@dataclasses.dataclass(kw_only=True)
class AdapterConfig:
    """What an adapter is, beside its anchor."""

    base: str
    """The model that it was made for, as load_clip names it."""
    size: int
    """Height and width of the images that the anchor belongs to."""
    cutoff: float | None = None
    """D0 of the filter in DFT bins at `size`; None is no filter."""
    clamp: bool = True
    """Clip filtered pixels to [0, 1]."""
    alpha: float = 0.0
    """Strength of the anchor."""
    mix: str = "add"
    """add, lerp or normadd."""
    block: int = 0
    """Number of the block, from 0."""
    source: str = ""
    """Where the anchor comes from, in words."""

    def __post_init__(self) -> None:
        if self.cutoff is not None and not 0 < self.cutoff < math.inf:
            raise ValueError(f"cutoff must be a finite number of DFT bins above 0, or None, got {self.cutoff}")
        if self.mix not in MIXES:
            raise ValueError(f"mix must be one of {', '.join(MIXES)}, got {self.mix!r}")
        if not math.isfinite(self.alpha) or (self.mix == "normadd" and self.alpha <= -1):
            raise ValueError(f"alpha must be finite, and above -1 for normadd, got {self.alpha}")


class Adapter(nn.Module):
    """A filter and an anchor for one tower.

    Args:
        config: see AdapterConfig.
        anchor: A [N, D], a row per token (class token first), kept in float32; None is no anchor.
    """

    def __init__(self, config: AdapterConfig, anchor: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.anchor = None if anchor is None else nn.Parameter(anchor.detach().float().clone(), requires_grad=False)
        numbers = torch.tensor(
            [config.alpha, config.cutoff or 0.0, float(config.clamp), float(MIXES.index(config.mix))]
        )
        self.register_buffer("numbers", torch.cat([numbers, torch.tensor([float(config.block)])]))  # for weights_sha

    def filter(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1], low-passed."""
        if self.config.cutoff is None:
            return x
        cutoff = self.config.cutoff * x.shape[-1] / self.config.size  # the same blur at another resolution
        return ops.gaussian_filter(x, cutoff, self.config.clamp)

    def attach(self, clip: "Clip", fused: bool = True) -> None:
        """Puts itself around a model, in the place of an adapter that is there.

        fused: the block runs residual, anchor and LayerNorm in one pass; else a hook changes the attention's output,
            which works where a block is built in another way, and is the specification of the other.

        Raises:
            ValueError: an anchor, and a tower without such blocks; or an anchor of other shape than its tokens.
        """
        if clip.adapter is not None:
            clip.adapter.detach(clip)
        if self.anchor is not None:
            block = anchorable_block(clip, self.config.block)
            self._fit(clip)
            if fused:
                block.forward = functools.partial(_anchored_forward, block, self)
            else:
                block.ls_1.register_forward_hook(functools.partial(_mix_hook, self))
        clip.adapter = self.to(clip.device)

    def detach(self, clip: "Clip") -> None:
        """Takes itself away; the model is as it was."""
        if self.anchor is not None:
            block = anchorable_block(clip, self.config.block)
            vars(block).pop("forward", None)
            hooks = block.ls_1._forward_hooks  # by what they are: a copy of a model has no handles of its own
            for key in [key for key, hook in hooks.items() if getattr(hook, "func", None) is _mix_hook]:
                del hooks[key]
        clip.adapter = None

    def mixed(self, o: Tensor) -> Tensor:
        """mix(o, alpha A)."""
        alpha, anchor = self.config.alpha, self.anchor.to(o.dtype)
        if self.config.mix == "add":
            return o + alpha * anchor
        if self.config.mix == "lerp":
            return (1 - alpha) * o + alpha * anchor
        return (o + alpha * anchor) / (1 + alpha)

    def _fit(self, clip: "Clip") -> None:
        """Brings the anchor to the tower's number of tokens: the grid is resized, the class token's row stays."""
        tokens, width = clip.model.visual.positional_embedding.shape
        if tuple(self.anchor.shape) == (tokens, width):
            return
        sides = [math.isqrt(n - 1) for n in (len(self.anchor), tokens)]
        if self.anchor.shape[1] != width or [s * s + 1 for s in sides] != [len(self.anchor), tokens]:
            raise ValueError(
                f"the adapter's anchor is {list(self.anchor.shape)}, made for {self.config.base}, but {clip.name} has "
                f"{tokens} tokens of width {width}"
            )
        first, grid = self.anchor[:1], self.anchor[1:].T.reshape(1, width, sides[0], sides[0])
        grid = F.interpolate(grid, (sides[1], sides[1]), mode="bilinear", align_corners=False)
        self.anchor = nn.Parameter(torch.cat([first, grid.reshape(width, -1).T]).detach(), requires_grad=False)

    def save(self, folder: str | Path) -> Path:
        """Writes adapter.safetensors and adapter.json, each atomically."""
        from safetensors.torch import save

        folder = Path(folder)
        tensors = {} if self.anchor is None else {"anchor": self.anchor.detach().cpu().contiguous()}
        write_bytes(folder / ADAPTER_WEIGHTS, save(tensors))
        about = {"schema": "rvlm.adapter/1", **dataclasses.asdict(self.config)}
        write_bytes(folder / ADAPTER_CONFIG, json.dumps(about, indent=1).encode())
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Adapter":
        """Reads what `save` wrote, from the folder or the `checkpoint` in it.

        Raises:
            FileNotFoundError: a file is missing. ValueError: another schema, or a setting that cannot be.
        """
        from safetensors.torch import load

        folder = Path(folder)
        folder = folder / "checkpoint" if (folder / "checkpoint" / ADAPTER_CONFIG).is_file() else folder
        missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {' and '.join(missing)}: expected a folder written by Adapter.save"
            )
        about = json.loads((folder / ADAPTER_CONFIG).read_text())
        if about.pop("schema", None) != "rvlm.adapter/1":
            raise ValueError(f"{folder / ADAPTER_CONFIG} is no adapter of this version (rvlm.adapter/1)")
        return cls(AdapterConfig(**about), load((folder / ADAPTER_WEIGHTS).read_bytes()).get("anchor"))


def apply_adapter(clip: "Clip", adapter: "Adapter | str | Path") -> "Clip":
    """The model, with an adapter or the one in a folder around its tower (in place)."""
    (adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)).attach(clip)
    return clip


def attention_output(clip: "Clip", x: Tensor, block: int = 0) -> Tensor:
    """Output of the attention of a block [B, N, D], after its projection, for pixels x [B, 3, S, S]."""
    seen: list[Tensor] = []
    handle = anchorable_block(clip, block).ls_1.register_forward_hook(lambda module, given, o: seen.append(o))
    try:
        with torch.no_grad():
            clip.encode_pixels(x)
    finally:
        handle.remove()
    return seen[0]


def anchorable_block(clip: "Clip", number: int) -> nn.Module:
    """A block of the tower, from 0; ValueError where the tower has none that can be anchored."""
    blocks = getattr(getattr(clip.model.visual, "transformer", None), "resblocks", None)
    parts = ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2", "attention")
    if blocks is None or not all(hasattr(blocks[0], part) for part in parts):
        raise ValueError(
            f"{clip.name} ({type(clip.model.visual).__name__}) has no blocks that can be anchored: expected a "
            "VisionTransformer of open_clip with ResidualAttentionBlocks, such as ViT-B-32 or ViT-L-14"
        )
    if not -len(blocks) <= number < len(blocks):
        raise ValueError(f"{clip.name} has {len(blocks)} blocks, got block {number}")
    return blocks[number]


def _mix_hook(adapter: Adapter, module: nn.Module, given: tuple, o: Tensor) -> Tensor:
    return adapter.mixed(o)


def _anchored_forward(block: nn.Module, adapter: Adapter, q_x: Tensor, k_x=None, v_x=None, attn_mask=None) -> Tensor:
    """The forward of a ResidualAttentionBlock with an anchor behind its attention."""
    o = block.ls_1(block.attention(q_x=block.ln_1(q_x), k_x=k_x, v_x=v_x, attn_mask=attn_mask))
    config, norm = adapter.config, block.ln_2
    x, normed = ops.anchored_residual(
        q_x, o.to(q_x.dtype), adapter.anchor, config.alpha, config.mix, norm.weight, norm.bias, norm.eps
    )
    return x + block.ls_2(block.mlp(normed))
