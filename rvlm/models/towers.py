"""What adapters need to know of a vision tower: its tokens, and what its blocks are made of.

    x = ln_pre(embed(pixels))                  [B, N, D]: `lead` tokens without a place (class, registers), the grid
    x = x + o,  o = scale(attention(ln_1 x))   in every block; scale is a layer scale, or nothing
    x = x + mlp(ln_2 x)

| tower                                          | filter | anchor           | prompts |
|------------------------------------------------|--------|------------------|---------|
| open_clip's VisionTransformer                  | yes    | out, heads, map  | yes     |
| timm's VisionTransformer in open_clip          | yes    | out, heads, map  | yes     |
| CLIPVisionModel of transformers                | yes    | out, heads, map  | yes     |
| the same in LLaVA                              | yes    | out, heads, map  | no      |
| Qwen2.5-VL's and Qwen3-VL's of transformers    | yes    | out              | no      |
| any other tower of open_clip                   | yes    | no               | no      |

Heads, map and prompts need to see queries, keys and values; attentions that do more to them than project and split them
(norms, scales of heads, rotations) give `out` alone. An LVLM reads all of a tower's tokens, where prompts would be
extra ones. Qwen's towers hold the tokens of all images in one row [B N, D], in the order of their windows. Blocks are
told apart by their parts' names, not by versions.
"""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rvlm import ops

if TYPE_CHECKING:
    from rvlm.models.clip import Clip

__all__ = [
    "SITES", "Block", "OpenClipBlock", "Tower", "attention_output", "by_image", "causal_text_tower",
    "text_tower", "tower_of",
]  # fmt: skip

SITES = ("out", "heads", "map")


class Block:
    """A residual block.

    Attributes:
        module: the block itself.
        ln_1, ln_2: its norms.
        attn: its attention.
        out: the module whose output, or its first entry, is o.
    """

    names: ClassVar[tuple[str, str, str, str]]  # of ln_1, attn, out and ln_2 in the module
    weights: ClassVar[frozenset[str]]  # of an attention that does nothing but project and split

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.ln_1, self.attn, self.out, self.ln_2 = (getattr(module, name) for name in self.names)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in cls.names)

    @property
    def plain(self) -> bool:
        """Whether `qkv` and `project` are all that the attention does."""
        kinds = ("MultiheadAttention", "Attention", "CLIPAttention")
        weights = {name for name, _ in self.attn.named_parameters()}
        return type(self.attn).__name__ in kinds and weights <= self.weights

    def attend(self, h: Tensor, *given, **named) -> Tensor:
        """The attention's output as the block computes it, before `scale`; given and named as the block got them."""
        raise NotImplementedError

    def scale(self, o: Tensor) -> Tensor:
        """What follows the attention in its branch."""
        return o

    def feed(self, h: Tensor) -> Tensor:
        """The second branch, of ln_2's output."""
        return self.module.mlp(h)

    def qkv(self, h: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values [B, H, N, d] of ln_1's output h [B, N, D]; of a plain attention."""
        return tuple(t.unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2) for t in self._projected(h))

    def _projected(self, h: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def project(self, z: Tensor) -> Tensor:
        """The attention's output of what its heads say, z [B, H, N, d]; of a plain attention."""
        return self._last(z.transpose(1, 2).flatten(2))

    def _last(self, z: Tensor) -> Tensor:
        return self.attn.out_proj(z)

    def prefixed(self, h: Tensor, prompts: Tensor, causal: bool = False) -> Tensor:
        """Self-attention of h [B, N, D] that also sees prompts [P, D] before it, whose own outputs nobody needs."""
        _, prefix_k, prefix_v = self.qkv(prompts[None])
        return self.project(ops.prefix_attention(*self.qkv(h), prefix_k[0], prefix_v[0], causal))


class OpenClipBlock(Block):
    """With nn.MultiheadAttention, or open_clip's own Attention in custom blocks and its next major version."""

    names = ("ln_1", "attn", "ls_1", "ln_2")
    weights = frozenset({"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"})

    @classmethod
    def fits(cls, module):
        return super().fits(module) and (hasattr(module, "attention") or hasattr(module, "ln_attn"))

    def attend(self, h, *given, **named):
        call = self.module.attention if hasattr(self.module, "attention") else self.attn
        return call(h, *given, **named)

    def scale(self, o):
        return self.module.ls_1(self.module.ln_attn(o) if hasattr(self.module, "ln_attn") else o)

    def feed(self, h):
        return self.module.ls_2(self.module.mlp(h))

    def _projected(self, h):
        return F.linear(h, self.attn.in_proj_weight, self.attn.in_proj_bias).chunk(3, -1)


class _TimmBlock(Block):
    names = ("norm1", "attn", "drop_path1", "norm2")
    weights = frozenset({"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"})

    @classmethod
    def fits(cls, module):
        return type(module).__name__ == "Block" and super().fits(module)  # others have parts of the same names

    def attend(self, h, *given, **named):
        return self.attn(h, *given, **named)

    def scale(self, o):
        return self.module.drop_path1(self.module.ls1(o))

    def feed(self, h):
        return self.module.drop_path2(self.module.ls2(self.module.mlp(h)))

    def _projected(self, h):
        return self.attn.qkv(h).chunk(3, -1)

    def _last(self, z):
        return self.attn.proj_drop(self.attn.proj(z))


class _TransformersBlock(Block):
    names = ("layer_norm1", "self_attn", "self_attn", "layer_norm2")
    weights = frozenset(f"{name}_proj.{part}" for name in ("q", "k", "v", "out") for part in ("weight", "bias"))

    def attend(self, h, *given, **named):
        return self.attn(h, *given, **named)[0]

    def _projected(self, h):
        return self.attn.q_proj(h), self.attn.k_proj(h), self.attn.v_proj(h)


class _QwenBlock(Block):
    names = ("norm1", "attn", "attn", "norm2")
    weights = frozenset()  # it turns queries and keys

    def attend(self, h, *given, **named):
        return self.attn(h, *given, **named)


@dataclasses.dataclass
class Tower:
    """A vision tower.

    Attributes:
        name: the model's.
        blocks: in order.
        ln_pre: what stands before the first block.
        tokens: N, of one image.
        lead: how many of them come before the grid.
        width: D.
        grid: whether the others are in the order of their rows.
    """

    name: str
    blocks: list[Block]
    ln_pre: nn.Module
    tokens: int
    lead: int
    width: int
    grid: bool = True

    def block(self, number: int) -> Block:
        """A block, from 0; negative numbers count from the end."""
        if not -len(self.blocks) <= number < len(self.blocks):
            raise ValueError(f"{self.name} has {len(self.blocks)} blocks, got block {number}")
        return self.blocks[number]

    def plain_block(self, number: int, what: str) -> Block:
        """A block whose queries, keys and values can be seen, or an error that says who wants to."""
        block = self.block(number)
        if not block.plain:
            raise ValueError(
                f"{self.name}: {what} must see queries, keys and values, and {type(block.attn).__name__} of block "
                f"{number} does more to them than to project and split them; an anchor at site 'out' is possible"
            )
        return block

    def shape(self, site: str) -> tuple[int, ...]:
        """Of an anchor: [N, D] at "out", [H, N, d] at "heads", [H, N, N] at "map"."""
        if site == "out":
            return self.tokens, self.width
        heads = self.blocks[0].attn.num_heads
        return heads, self.tokens, self.width // heads if site == "heads" else self.tokens


def tower_of(clip: "Clip") -> Tower:
    """The vision tower of a model.

    Raises:
        ValueError: a tower whose blocks cannot be adapted.
    """
    for family in (_open_clip, _timm, _transformers, _qwen):
        if (tower := family(clip)) is not None:
            return tower
    raise ValueError(
        f"{clip.name} ({type(clip.visual).__name__}) has no blocks that can be adapted: expected a VisionTransformer "
        "of open_clip or timm (such as ViT-B-32, ViT-L-14, ViT-B-16-SigLIP), a CLIPVisionModel of transformers or the "
        "tower of Qwen2.5-VL or Qwen3-VL"
    )


def text_tower(clip: "Clip") -> nn.Module:
    """The module that has a text tower's parts; ValueError where texts cannot be given a context."""
    if (tower := causal_text_tower(clip)) is None:
        raise ValueError(
            f"{clip.name} has no text tower whose texts can begin with a context: expected a causal transformer of "
            "open_clip that is read at the end-of-text token, as CLIP's own"
        )
    return tower


def causal_text_tower(clip: "Clip") -> nn.Module | None:
    """The module that has the parts of a causal text tower which is read at the end-of-text token, if it is one."""
    tower = getattr(clip.model, "text", clip.model)
    blocks = _blocks(getattr(getattr(tower, "transformer", None), "resblocks", None), OpenClipBlock)
    pool = getattr(tower, "pool_type", getattr(tower, "text_pool_type", None))
    known = (
        blocks is not None
        and all(block.plain for block in blocks)
        and getattr(tower, "attn_mask", None) is not None
        and getattr(tower, "cls_emb", None) is None
        and pool == "argmax"
    )
    return tower if known else None


def attention_output(clip: "Clip", x: Tensor, block: int = 0, site: str = "out") -> Tensor:
    """What a block's attention says of pixels x [B, 3, S, S], without prompts.

    Args:
        site: "out", o after its projection and scale [B, N, D]; "heads", its heads' outputs [B, H, N, d]; "map", its
            weights over keys [B, H, N, N].
    """
    tower = tower_of(clip)
    at = tower.block(block) if site == "out" else tower.plain_block(block, f"site {site!r}")
    seen: list[Tensor | tuple] = []
    module = at.out if site == "out" else at.ln_1
    handle = module.register_forward_hook(lambda module, given, out: seen.append(out))
    try:
        with torch.no_grad():
            clip.encode_pixels(x)
    finally:
        handle.remove()
    found = seen[0] if isinstance(seen[0], Tensor) else seen[0][0]
    found = by_image(found, tower.tokens)[:, : tower.tokens]
    if site == "out":
        return found
    with torch.no_grad():
        q, k, v = at.qkv(found)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return weights if site == "map" else weights @ v


def by_image(x: Tensor, tokens: int) -> Tensor:
    """Tokens [B, N, D], of towers that hold those of all images in one row [B N, D] too."""
    return x if x.dim() == 3 else x.unflatten(0, (-1, tokens))


def _open_clip(clip: "Clip") -> Tower | None:
    visual = clip.visual
    blocks = _blocks(getattr(getattr(visual, "transformer", None), "resblocks", None), OpenClipBlock)
    if blocks is None:
        return None
    tokens, width = visual.positional_embedding.shape
    return Tower(clip.name, blocks, visual.ln_pre, tokens, 1, width)


def _timm(clip: "Clip") -> Tower | None:
    trunk = getattr(clip.visual, "trunk", None)
    blocks = _blocks(getattr(trunk, "blocks", None), _TimmBlock)
    if blocks is None:
        return None
    lead = trunk.num_prefix_tokens
    return Tower(clip.name, blocks, trunk.norm_pre, trunk.patch_embed.num_patches + lead, lead, trunk.embed_dim)


def _transformers(clip: "Clip") -> Tower | None:
    visual = getattr(clip.visual, "vision_model", clip.visual)
    blocks = _blocks(getattr(getattr(visual, "encoder", None), "layers", None), _TransformersBlock)
    if blocks is None or not hasattr(visual, "pre_layrnorm"):
        return None
    tokens, width = visual.embeddings.position_embedding.weight.shape
    return Tower(clip.name, blocks, visual.pre_layrnorm, tokens, 1, width)


def _qwen(clip: "Clip") -> Tower | None:
    visual = clip.visual
    blocks = _blocks(getattr(visual, "blocks", None), _QwenBlock)
    if blocks is None or not hasattr(visual, "merger"):
        return None
    tokens, width = (clip.size // visual.patch_size) ** 2, visual.config.hidden_size
    return Tower(clip.name, blocks, nn.Identity(), tokens, 0, width, grid=False)


def _blocks(modules: nn.ModuleList | None, kind: type[Block]) -> list[Block] | None:
    return [kind(module) for module in modules] if modules is not None and all(map(kind.fits, modules)) else None
