"""What stands around frozen towers: a low-pass filter, an anchor in one block, prompts in the first, for texts too.

    x  -> G x                                 Gaussian filter of the pixels, cutoff D0 in DFT bins (R-Adapt)
    x1 =  x0 + mix(o, alpha A)                in one block: o the attention's output, A [N, D] one for all images
    tokens of block l  =  (image tokens, P_l) deep visual prompts [J, P, D] (Jia et al. 2022, arXiv 2203.12119): each
                                              of the first J blocks gets rows of its own, the last of which go on
    tokens of a text    =  <start> V_l words <end>    context [J, P, D] of the text tower (see rvlm.models.text)

with mix add: o + alpha A; lerp: (1 - alpha) o + alpha A; normadd: (o + alpha A) / (1 + alpha). That is site "out"; at
"heads" A [H, N, d] is mixed with what the attention's heads say, before their projection, and at "map" A [H, N, N] with
its weights after the softmax (`ops.anchored_attention`). The first prompts pass the tower's ln_pre as image tokens do.
Rows of an anchor for prompts are 0. Nothing of the tower is changed or copied: its state dict has the same keys and
values with and without an adapter, which `detach` takes away without a trace. rvlm.models.towers says which towers.

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
from rvlm.models.towers import SITES, Block, Tower, by_image, text_tower, tower_of
from rvlm.models.weights import weights_sha
from rvlm.ops.attention import MIXES

if TYPE_CHECKING:
    from rvlm.models.clip import Clip

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "Adapter", "AdapterConfig", "apply_adapter"]

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter.safetensors", "adapter.json"
TENSORS = ("anchor", "prompts", "context")


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
    site: str = "out"
    """out, heads or map."""
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
        if self.site not in SITES or (self.site != "out" and self.mix == "normadd"):
            raise ValueError(
                f"site must be one of {', '.join(SITES)}, and out for normadd, got {self.site!r} and {self.mix!r}"
            )
        if not math.isfinite(self.alpha) or (self.mix == "normadd" and self.alpha <= -1):
            raise ValueError(f"alpha must be finite, and above -1 for normadd, got {self.alpha}")
        if self.sentence and "{}" not in self.sentence:
            raise ValueError(f"sentence must contain {{}} for the class name, got {self.sentence!r}")


class Adapter(nn.Module):
    """A filter, an anchor and prompts for one model.

    Args:
        config: see AdapterConfig.
        anchor: A [N, D], a row per token (class token first), [H, N, d] at site heads or [H, N, N] at map, kept in
            float32; None is no anchor.
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
        if anchor is not None and anchor.dim() != (2 if config.site == "out" else 3):
            raise ValueError(
                f"an anchor at site {config.site!r} cannot be {list(anchor.shape)}: see rvlm.models.adapter"
            )
        self.anchor, self.prompts, self.context = (
            None if t is None else nn.Parameter(t.detach().float().clone(), requires_grad=False)
            for t in (anchor, prompts, context)
        )
        choices = MIXES.index(config.mix), SITES.index(config.site)
        about = (config.alpha, config.cutoff or 0, config.size, config.clamp, config.block, *choices)
        self.register_buffer("numbers", torch.tensor([float(number) for number in about]))  # for weights_sha

    def filter(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1], low-passed."""
        if self.config.cutoff is None:
            return x
        cutoff = self.config.cutoff * x.shape[-1] / self.config.size  # the same blur at another resolution
        return ops.gaussian_filter(x, cutoff, self.config.clamp)

    def attach(self, clip: "Clip", fused: bool = True) -> None:
        """Puts itself around a model, in the place of an adapter that is there.

        fused: blocks run the passes of `ops.anchored_residual`, `ops.anchored_attention` and `ops.prefix_attention`;
            else hooks change what attentions say and append tokens, which is the specification of the other.

        Raises:
            ValueError: a tower without such blocks, or with other shapes.
        """
        tower = self._tower(clip)
        if self.prompts is not None:
            self._check_prompts(tower)
            if not clip.pools_tokens:
                raise ValueError(f"{clip.name} reads all of its tower's tokens, where prompts would be extra ones")
        if self.context is not None:
            text = text_tower(clip)
            width = text.positional_embedding.shape[1]
            _check_rows("context", self.context, len(text.transformer.resblocks), width, clip.name)
        if self.anchor is not None:
            self._check_anchor(tower)
            self._fit(tower)
        if clip.adapter is not None:
            clip.adapter.detach(clip)
        if tower is not None:
            self._hook(tower, fused)
        clip.adapter = self.to(clip.device)

    def detach(self, clip: "Clip") -> None:
        """Takes itself away; the model is as it was."""
        tower = self._tower(clip)
        for block in [] if tower is None else tower.blocks:
            vars(block.module).pop("forward", None)
            for module in (block.module, block.attn, block.out):
                # By what they are: a copy of a model has no handles of its own.
                for hooks, named in (
                    (module._forward_hooks, module._forward_hooks_with_kwargs),
                    (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
                ):
                    for key in [key for key, hook in hooks.items() if getattr(hook, "func", hook) in _HOOKS]:
                        del hooks[key]
                        named.pop(key, None)
        clip.adapter = None

    def _tower(self, clip: "Clip") -> Tower | None:
        """The tower, if any of its blocks are changed."""
        return None if self.anchor is None and self.prompts is None else tower_of(clip)

    def _hook(self, tower: Tower, fused: bool) -> None:
        depth, last = 0 if self.prompts is None else len(self.prompts), len(tower.blocks) - 1
        mixes = self.anchor is not None and self.config.alpha != 0  # else the block stays as it is, to the bit
        for number, block in enumerate(tower.blocks):
            plan = _Plan(self, block, number, tower.ln_pre, mixes and number == self._anchored(tower))
            if number < depth:
                # As tokens where they go on to blocks that have none of their own.
                plan.prompts = "tokens" if number == depth - 1 < last else "prefix"
            if fused and (plan.prompts or plan.anchored):
                block.module.forward = functools.partial(_adapted_forward, plan)
            if fused:
                continue
            if plan.prompts:
                block.module.register_forward_pre_hook(functools.partial(_prompt_hook, plan), with_kwargs=True)
            if plan.anchored and self.config.site == "out":
                block.out.register_forward_hook(functools.partial(_mix_hook, plan))
            elif plan.anchored:
                block.attn.register_forward_hook(functools.partial(_inside_hook, plan), with_kwargs=True)
        if depth and not (fused and depth > last):
            tower.blocks[last].module.register_forward_hook(functools.partial(_strip_hook, self.prompts.shape[1]))

    def _anchored(self, tower: Tower) -> int:
        return self.config.block % len(tower.blocks)

    def _check_prompts(self, tower: Tower) -> None:
        _check_rows("prompts", self.prompts, len(tower.blocks), tower.width, tower.name)
        for number in range(len(self.prompts)):
            tower.plain_block(number, "prompts")

    def _check_anchor(self, tower: Tower) -> None:
        block, site = self.config.block, self.config.site
        if site == "out":
            tower.block(block)
            return
        tower.plain_block(block, f"site {site!r}")
        if self.prompts is not None and self._anchored(tower) < len(self.prompts):
            raise ValueError(
                f"an anchor at site {site!r} cannot stand in block {block}, which has prompts of its own: "
                "their shares of it are not defined; anchor a later block, or at site 'out'"
            )

    def mixed(self, o: Tensor) -> Tensor:
        """mix(o, alpha A) of what is anchored: o [B, N, D], heads' outputs [B, H, N, d] or maps [B, H, N, N]."""
        alpha, anchor = self.config.alpha, self.padded(o.shape[-2]).to(o.dtype)
        if self.config.mix == "add":
            return o + alpha * anchor
        if self.config.mix == "lerp":
            return (1 - alpha) * o + alpha * anchor
        return (o + alpha * anchor) / (1 + alpha)

    def padded(self, tokens: int) -> Tensor:
        """A with rows (of a map, columns too) of 0 for prompts."""
        extra = tokens - self.anchor.shape[-2]
        if extra < 0:
            raise ValueError(f"the anchor has {self.anchor.shape[-2]} rows, but the block sees {tokens} tokens")
        return F.pad(self.anchor, (0, extra if self.config.site == "map" else 0, 0, extra))

    def _fit(self, tower: Tower) -> None:
        """Brings the anchor to the tower's number of tokens: the grid is resized, rows before it stay."""
        have, need, lead = tuple(self.anchor.shape), tower.shape(self.config.site), tower.lead
        if have == need:
            return
        rows, tokens = have[-2], need[-2]
        sides = [math.isqrt(max(0, n - lead)) for n in (rows, tokens)]
        resized = tower.grid and have[:-2] == need[:-2] and have[-1] == need[-1] and self.config.site != "map"
        if not resized or [s * s + lead for s in sides] != [rows, tokens]:
            raise ValueError(
                f"the adapter's anchor is {list(have)}, made for {self.config.base}, but {tower.name} has {tokens} "
                f"tokens of width {tower.width}, where site {self.config.site!r} takes {list(need)}"
            )
        first, grid = self.anchor[..., :lead, :], self.anchor[..., lead:, :].mT.unflatten(-1, (sides[0], sides[0]))
        grid = F.interpolate(
            grid.view(-1, *grid.shape[-3:]), (sides[1], sides[1]), mode="bilinear", align_corners=False
        )
        grid = grid.flatten(2).mT.reshape(*first.shape[:-2], -1, have[-1])
        self.anchor = nn.Parameter(torch.cat([first, grid], -2).detach(), requires_grad=False)

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


def _check_rows(what: str, rows: Tensor, blocks: int, width: int, name: str) -> None:
    if len(rows) > blocks:
        raise ValueError(f"{what} for {len(rows)} blocks, but {name} has {blocks}")
    if rows.shape[2] != width:
        raise ValueError(f"{what} of width {rows.shape[2]}, but {name} has {width}")


@dataclasses.dataclass
class _Plan:
    """What an adapter does in a block: the block and its number, the tower's ln_pre, whether it is anchored, and what
    prompts are there: None, "prefix" (keys and values alone) or "tokens"."""

    adapter: Adapter
    block: Block
    number: int
    ln_pre: nn.Module
    anchored: bool
    prompts: str | None = None

    def rows(self) -> Tensor:
        """The block's prompts [P, D], as its tokens are."""
        rows = self.adapter.prompts[self.number]
        if self.number > 0:
            return rows
        weight = next(self.ln_pre.parameters(), rows)  # some norms take no wider input than their weights
        return self.ln_pre(rows.to(weight.dtype))

    def by_image(self, x: Tensor) -> Tensor:
        return by_image(x, self.adapter.anchor.shape[-2])

    def mixed(self, o: Tensor) -> Tensor:
        """The attention's output with the anchor, in its own shape."""
        return self.adapter.mixed(self.by_image(o)).view(o.shape)


def _adapted_forward(plan: _Plan, x: Tensor, *given, **named) -> Tensor:
    """The forward of a block with prompts and an anchor; given and named go on to its attention."""
    block, config = plan.block, plan.adapter.config
    if plan.prompts == "tokens":
        x = torch.cat([x, plan.rows().to(x.dtype).expand(len(x), -1, -1)], 1)
    h = block.ln_1(x)
    if plan.prompts == "prefix":
        o = block.prefixed(h, block.ln_1(plan.rows().to(x.dtype)))
    elif plan.anchored and config.site != "out":
        q, k, v = block.qkv(h)
        anchor = plan.adapter.padded(x.shape[1])
        o = block.project(ops.anchored_attention(q, k, v, anchor, config.alpha, config.site, config.mix))
    else:
        o = block.attend(h, *given, **named)
    o = block.scale(o)
    norm, outside = block.ln_2, plan.anchored and config.site == "out"
    if not outside or not isinstance(norm, nn.LayerNorm):
        x = x + (plan.mixed(o) if outside else o)
        return x + block.feed(norm(x))
    shape, x, o = x.shape, plan.by_image(x), plan.by_image(o)
    x, normed = ops.anchored_residual(
        x, o.to(x.dtype), plan.adapter.padded(x.shape[1]), config.alpha, config.mix, norm.weight, norm.bias, norm.eps
    )
    return x.view(shape) + block.feed(normed.view(shape))


def _mix_hook(plan: _Plan, module: nn.Module, given: tuple, o: Tensor | tuple) -> Tensor | tuple:
    return plan.mixed(o) if isinstance(o, Tensor) else (plan.mixed(o[0]), *o[1:])


def _inside_hook(plan: _Plan, module: nn.Module, given: tuple, named: dict, o: Tensor | tuple) -> Tensor | tuple:
    """Computes the attention anew, with the anchor in its map or its heads."""
    q, k, v = plan.block.qkv(given[0] if given else named["hidden_states"])
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    on_map = plan.adapter.config.site == "map"
    z = plan.adapter.mixed(weights) @ v if on_map else plan.adapter.mixed(weights @ v)
    anchored = plan.block.project(z)
    return anchored if isinstance(o, Tensor) else (anchored, *o[1:])


def _prompt_hook(plan: _Plan, module: nn.Module, given: tuple, named: dict) -> tuple[tuple, dict]:
    """Appends prompts before the first block, and puts others in their places before the next ones."""
    x, *rest = given
    rows = plan.rows().to(x.dtype).expand(len(x), -1, -1)
    x = x if plan.number == 0 else x[:, : -rows.shape[1]]
    return (torch.cat([x, rows], 1), *rest), named


def _strip_hook(count: int, module: nn.Module, given: tuple, x: Tensor) -> Tensor:
    """Takes prompts away behind the last block, for towers that average their tokens."""
    return x[:, :-count]


_HOOKS = (_mix_hook, _inside_hook, _prompt_hook, _strip_hook)
