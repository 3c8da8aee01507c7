"""What stands around frozen towers: a low-pass filter, an anchor in one block, prompts in the first, for texts too.

    x  -> G x                                 Gaussian filter of the pixels, cutoff D0 in DFT bins (R-Adapt)
    x1 =  x0 + mix(o, alpha A)                in one block: o the attention's output, A [N, D] one for all images
    tokens of block l  =  (image tokens, P_l) deep visual prompts [J, P, D] (Jia et al. 2022, arXiv 2203.12119): each
                                              of the first J blocks gets rows of its own, the last of which go on
    tokens of a text    =  <start> V_l words <end>    context [J, P, D] of the text tower (see rvlm.models.text)

with mix add: o + alpha A; lerp: (1 - alpha) o + alpha A; normadd: (o + alpha A) / (1 + alpha). The first prompts pass
the tower's ln_pre as image tokens do. Rows of an anchor for prompts are 0. Nothing of the tower is changed or copied:
its state dict has the same keys and values with and without an adapter, which `detach` takes away without a trace.

Where the next block replaces the prompts, or no block follows, what a block says at their places is not needed: they
are keys and values of the attention alone, the same for the whole batch (`ops.prefix_attention`), and no tokens.

An adapter is saved as adapter.safetensors (anchor, prompts, context) and adapter.json (all else), a few hundred kB.
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
from rvlm.models.weights import weights_sha
from rvlm.ops.attention import MIXES

if TYPE_CHECKING:
    from rvlm.models.clip import Clip

__all__ = [
    "ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "Adapter", "adaptable_block", "apply_adapter", "attention_output",
    "prefixed", "text_tower",
]  # fmt: skip

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter.safetensors", "adapter.json"
TENSORS = ("anchor", "prompts", "context")
PARTS = ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2", "attention")


@dataclasses.dataclass(kw_only=True)
class AdapterConfig:
    """What an adapter is, beside its tensors."""

    base: str
    """The model that it was made for, as load_clip names it."""
    base_sha: str = ""
    """Hash of that model's weights, if it is known."""
    size: int
    """Height and width of the images that anchor and cutoff belong to."""
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
    """Where the anchor comes from, in words, or which method learned the prompts."""
    sentence: str = ""
    """What follows the context in a text, with {} for the class; classes are named by no other template."""

    @classmethod
    def of(cls, clip: "Clip", **settings) -> "AdapterConfig":
        """For a model as it is without an adapter: its name (a folder in full), weights and size."""
        base = clip.name if clip.adapter is None else clip.adapter.config.base
        base = str(Path(base).resolve()) if Path(base).is_dir() else base
        return cls(base=base, base_sha=weights_sha(clip.model), size=clip.size, **settings)

    def __post_init__(self) -> None:
        if self.cutoff is not None and not 0 < self.cutoff < math.inf:
            raise ValueError(f"cutoff must be a finite number of DFT bins above 0, or None, got {self.cutoff}")
        if self.mix not in MIXES:
            raise ValueError(f"mix must be one of {', '.join(MIXES)}, got {self.mix!r}")
        if not math.isfinite(self.alpha) or (self.mix == "normadd" and self.alpha <= -1):
            raise ValueError(f"alpha must be finite, and above -1 for normadd, got {self.alpha}")
        if self.sentence and "{}" not in self.sentence:
            raise ValueError(f"sentence must contain {{}} for the class name, got {self.sentence!r}")


class Adapter(nn.Module):
    """A filter, an anchor and prompts for one model.

    Args:
        config: see AdapterConfig.
        anchor: A [N, D], a row per token (class token first), kept in float32; None is no anchor.
        prompts: [J, P, D], P rows for each of the first J blocks, kept in float32; None is no prompts.
        context: [J, P, D] of the text tower, likewise; it needs a sentence in the config.
    """

    def __init__(
        self, config: AdapterConfig, anchor: Tensor | None = None, prompts: Tensor | None = None,
        context: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        for name, t in (("prompts", prompts), ("context", context)):
            if t is not None and (t.dim() != 3 or 0 in t.shape):
                raise ValueError(f"{name} must be [J, P, D], none of them 0, got {list(t.shape)}")
        if (context is None) != (not config.sentence):
            raise ValueError("context and sentence go together: the one stands before the other in every text")
        self.anchor, self.prompts, self.context = (
            None if t is None else nn.Parameter(t.detach().float().clone(), requires_grad=False)
            for t in (anchor, prompts, context)
        )
        about = (config.alpha, config.cutoff or 0, config.size, config.clamp, MIXES.index(config.mix), config.block)
        self.register_buffer("numbers", torch.tensor([float(number) for number in about]))  # for weights_sha

    def filter(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1], low-passed."""
        if self.config.cutoff is None:
            return x
        cutoff = self.config.cutoff * x.shape[-1] / self.config.size  # the same blur at another resolution
        return ops.gaussian_filter(x, cutoff, self.config.clamp)

    def attach(self, clip: "Clip", fused: bool = True) -> None:
        """Puts itself around a model, in the place of an adapter that is there.

        fused: blocks run the passes of `ops.anchored_residual` and `ops.prefix_attention`; else hooks change the
            attention's output and append tokens, which is the specification of the other.

        Raises:
            ValueError: a tower without such blocks, or with other shapes.
        """
        if self.prompts is not None:
            self._check_prompts(clip)
        if self.context is not None:
            tower = text_tower(clip)
            _check_rows("context", self.context, len(tower.transformer.resblocks), tower.positional_embedding, clip)
        if self.anchor is not None:
            adaptable_block(clip, self.config.block)
            self._fit(clip)
        if clip.adapter is not None:
            clip.adapter.detach(clip)
        self._hook(clip, fused)
        clip.adapter = self.to(clip.device)

    def _hook(self, clip: "Clip", fused: bool) -> None:
        blocks, tower = self._blocks(clip), clip.model.visual
        depth = 0 if self.prompts is None else len(self.prompts)
        for number, block in blocks.items():
            plan = _Plan(self, number, tower.ln_pre, self.anchor is not None and number == self._anchored(clip))
            if number < depth:
                # As tokens where they go on to blocks that have none of their own.
                plan.prompts = "tokens" if number == depth - 1 < len(tower.transformer.resblocks) - 1 else "prefix"
            if fused:
                block.forward = functools.partial(_adapted_forward, block, plan)
                continue
            if plan.prompts:
                block.register_forward_pre_hook(functools.partial(_prompt_hook, plan), with_kwargs=True)
            if plan.anchored:
                block.ls_1.register_forward_hook(functools.partial(_mix_hook, plan))
        if depth:
            tower.transformer.register_forward_hook(_strip_hook)

    def detach(self, clip: "Clip") -> None:
        """Takes itself away; the model is as it was."""
        blocks = self._blocks(clip)
        for block in blocks.values():
            vars(block).pop("forward", None)
        modules = [m for block in blocks.values() for m in (block, block.ls_1)]
        for module in [*modules, *([clip.model.visual.transformer] if blocks else [])]:
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                # By what they are: a copy of a model has no handles of its own.
                for key in [key for key, hook in hooks.items() if getattr(hook, "func", hook) in _HOOKS]:
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        clip.adapter = None

    def _anchored(self, clip: "Clip") -> int:
        return self.config.block % len(clip.model.visual.transformer.resblocks)

    def _blocks(self, clip: "Clip") -> dict[int, nn.Module]:
        """The blocks that are changed, by number."""
        numbers = set(range(0 if self.prompts is None else len(self.prompts)))
        numbers |= set() if self.anchor is None else {self._anchored(clip)}
        return {number: adaptable_block(clip, number) for number in sorted(numbers)}

    def _check_prompts(self, clip: "Clip") -> None:
        block, tower = adaptable_block(clip, 0), clip.model.visual
        _check_rows("prompts", self.prompts, len(tower.transformer.resblocks), tower.positional_embedding, clip)
        if not _one_projection(block.attn):
            raise ValueError(f"{clip.name}: prompts need attentions with one projection to queries, keys and values")

    def mixed(self, o: Tensor) -> Tensor:
        """mix(o, alpha A)."""
        alpha, anchor = self.config.alpha, self.padded(o.shape[-2]).to(o.dtype)
        if self.config.mix == "add":
            return o + alpha * anchor
        if self.config.mix == "lerp":
            return (1 - alpha) * o + alpha * anchor
        return (o + alpha * anchor) / (1 + alpha)

    def padded(self, tokens: int) -> Tensor:
        """A with rows of 0 for prompts."""
        if tokens < len(self.anchor):
            raise ValueError(f"the anchor has {len(self.anchor)} rows, but the block sees {tokens} tokens")
        return F.pad(self.anchor, (0, 0, 0, tokens - len(self.anchor)))

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
        tensors = {name: t for name in TENSORS if (t := getattr(self, name)) is not None}
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
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
        return cls(AdapterConfig(**about), **load((folder / ADAPTER_WEIGHTS).read_bytes()))


def apply_adapter(clip: "Clip", adapter: "Adapter | str | Path") -> "Clip":
    """The model, with an adapter or the one in a folder around its tower (in place)."""
    (adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)).attach(clip)
    return clip


def attention_output(clip: "Clip", x: Tensor, block: int = 0) -> Tensor:
    """Output of a block's attention [B, N, D], after its projection, for pixels x [B, 3, S, S]; without prompts."""
    seen: list[Tensor] = []
    handle = adaptable_block(clip, block).ls_1.register_forward_hook(lambda module, given, o: seen.append(o))
    try:
        with torch.no_grad():
            clip.encode_pixels(x)
    finally:
        handle.remove()
    return seen[0][:, : len(clip.model.visual.positional_embedding)]


def adaptable_block(clip: "Clip", number: int) -> nn.Module:
    """A block of the tower, from 0; ValueError where the tower has none that can be adapted."""
    blocks = getattr(getattr(clip.model.visual, "transformer", None), "resblocks", None)
    if blocks is None or not all(hasattr(blocks[0], part) for part in PARTS):
        raise ValueError(
            f"{clip.name} ({type(clip.model.visual).__name__}) has no blocks that can be adapted: expected a "
            "VisionTransformer of open_clip with ResidualAttentionBlocks, such as ViT-B-32 or ViT-L-14"
        )
    if not -len(blocks) <= number < len(blocks):
        raise ValueError(f"{clip.name} has {len(blocks)} blocks, got block {number}")
    return blocks[number]


def text_tower(clip: "Clip") -> nn.Module:
    """The module that has a text tower's parts; ValueError where texts cannot be given a context."""
    tower = getattr(clip.model, "text", clip.model)
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    pool = getattr(tower, "pool_type", getattr(tower, "text_pool_type", None))
    if (
        blocks is None
        or not all(hasattr(blocks[0], part) for part in PARTS)
        or not _one_projection(blocks[0].attn)
        or getattr(tower, "attn_mask", None) is None
        or getattr(tower, "cls_emb", None) is not None
        or pool != "argmax"
    ):
        raise ValueError(
            f"{clip.name} has no text tower whose texts can begin with a context: expected a causal transformer of "
            "open_clip that is read at the end-of-text token, as CLIP's own"
        )
    return tower


def _one_projection(attn: nn.Module) -> bool:
    """Whether one matrix makes queries, keys and values."""
    parts = [getattr(attn, name, None) for name in ("in_proj_weight", "in_proj_bias")]
    return isinstance(attn, nn.MultiheadAttention) and all(part is not None for part in parts)


def _check_rows(name: str, rows: Tensor, blocks: int, places: Tensor, clip: "Clip") -> None:
    if len(rows) > blocks:
        raise ValueError(f"{name} for {len(rows)} blocks, but {clip.name} has {blocks}")
    if rows.shape[2] != places.shape[1]:
        raise ValueError(f"{name} of width {rows.shape[2]}, but {clip.name} has {places.shape[1]}")


@dataclasses.dataclass
class _Plan:
    """What an adapter does in a block: its number, the tower's ln_pre, whether it is anchored, and what prompts are
    there: None, "prefix" (keys and values alone) or "tokens"."""

    adapter: Adapter
    number: int
    ln_pre: nn.Module
    anchored: bool
    prompts: str | None = None

    def rows(self) -> Tensor:
        """The block's prompts [P, D], as its tokens are."""
        rows = self.adapter.prompts[self.number]
        return self.ln_pre(rows) if self.number == 0 else rows


def _adapted_forward(
    block: nn.Module, plan: _Plan, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The forward of a ResidualAttentionBlock with prompts and an anchor."""
    if plan.prompts == "tokens":
        q_x = torch.cat([q_x, plan.rows().to(q_x.dtype).expand(len(q_x), -1, -1)], 1)
    h = block.ln_1(q_x)
    if plan.prompts == "prefix":
        o = prefixed(block.attn, h, block.ln_1(plan.rows().to(q_x.dtype)))
    else:
        o = block.attention(q_x=h, k_x=k_x, v_x=v_x, attn_mask=attn_mask)
    o = block.ls_1(o)
    if not plan.anchored:
        x = q_x + o
        return x + block.ls_2(block.mlp(block.ln_2(x)))
    config, norm, anchor = plan.adapter.config, block.ln_2, plan.adapter.padded(q_x.shape[1])
    x, normed = ops.anchored_residual(
        q_x, o.to(q_x.dtype), anchor, config.alpha, config.mix, norm.weight, norm.bias, norm.eps
    )
    return x + block.ls_2(block.mlp(normed))


def prefixed(attn: nn.MultiheadAttention, h: Tensor, prompts: Tensor, causal: bool = False) -> Tensor:
    """Self-attention of h [B, N, D] that also sees prompts [P, D] before it, whose own outputs nobody needs here."""
    width, heads = h.shape[-1], attn.num_heads

    def by_heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (heads, -1)).transpose(-2, -3)

    q, k, v = F.linear(h, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
    prefix_k, prefix_v = F.linear(prompts, attn.in_proj_weight[width:], attn.in_proj_bias[width:]).chunk(2, -1)
    o = ops.prefix_attention(*map(by_heads, (q, k, v, prefix_k, prefix_v)), causal)
    return attn.out_proj(o.transpose(1, 2).flatten(2))


def _mix_hook(plan: _Plan, module: nn.Module, given: tuple, o: Tensor) -> Tensor:
    return plan.adapter.mixed(o)


def _prompt_hook(plan: _Plan, module: nn.Module, given: tuple, named: dict) -> tuple[tuple, dict]:
    """Appends prompts before the first block, and puts others in their places before the next ones."""
    x, *rest = given
    rows = plan.rows().to(x.dtype).expand(len(x), -1, -1)
    x = x if plan.number == 0 else x[:, : -rows.shape[1]]
    return (torch.cat([x, rows], 1), *rest), named


def _strip_hook(module: nn.Module, given: tuple, x: Tensor) -> Tensor:
    """Takes prompts away behind the last block, for towers that average their tokens."""
    return x[:, : given[0].shape[1]]


_HOOKS = (_mix_hook, _prompt_hook, _strip_hook)
