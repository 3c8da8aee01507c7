"""Class texts through a frozen text tower, behind a learned context, at the cost of what differs between them.

    tokens of a text in block l  =  <start> V_l words <end>      l < J;  V [J, P, D], one context for all classes

The context of the first block is given its places' embeddings as words are; each of the next J - 1 blocks gets rows of
its own, and the last go on (CoOp, Zhou et al. 2022, arXiv 2109.01134, has J = 1; MaPLe, Khattak et al. 2023, arXiv
2210.03117, is deep, and replaces "a photo" in "a photo of a {}." by P = 2 rows, which is the sentence "of a {}." here).

Attention is causal, so two things are exact and save most of the work: what follows <end> is left out, and what all
texts begin with, <start> and context and the words before the first that differs, is the same for all classes in every
block. It runs once; the classes see it as keys and values (`ops.prefix_attention`). Of 77 tokens a class keeps the few
of its name.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rvlm.models.towers import OpenClipBlock, text_tower

if TYPE_CHECKING:
    from rvlm.models.clip import Clip

__all__ = ["Texts", "encode", "tokenized", "word_embeddings"]


@dataclasses.dataclass(frozen=True)
class Texts:
    """Tokens of C texts.

    Attributes:
        begin: int64 [S], what all of them begin with, at least <start>.
        rest: int64 [C, R], what follows, up to the end of the longest.
        end: int64 [C], the place of <end> in rest.
    """

    begin: Tensor
    rest: Tensor
    end: Tensor


def tokenized(clip: "Clip", texts: list[str]) -> Texts:
    """Texts, as `encode` takes them, on the model's device."""
    ids = clip.tokenizer(texts)
    end = ids.argmax(1)  # the end-of-text token has the highest number
    common = int((ids == ids[0]).all(0).cumprod(0).sum())
    common = min(common, int(end.min()))
    parts = (ids[0, :common], ids[:, common : int(end.max()) + 1], end - common)
    return Texts(*(part.to(clip.device) for part in parts))


def word_embeddings(clip: "Clip", words: str) -> Tensor:
    """Embeddings [P, D] of the tokens of some words, without their places."""
    ids = clip.tokenizer([words])[0]
    return text_tower(clip).token_embedding(ids[1 : int(ids.argmax())].to(clip.device))


def encode(clip: "Clip", texts: Texts, context: Tensor | None = None, chunk: int | None = None) -> Tensor:
    """Unit-norm embeddings [C, E], differentiable with respect to the context.

    Args:
        clip: a model with a causal text tower of open_clip.
        texts: of `tokenized`.
        context: V [J, P, D], which stands behind <start>; None encodes the texts as they are.
        chunk: classes that are run at a time, and run again in the backward pass, which then needs the memory of so
            many; None keeps everything.

    Raises:
        ValueError: texts that are too long with the context, or another text tower.
    """
    tower = text_tower(clip)
    blocks, places = tower.transformer.resblocks, tower.positional_embedding
    rows = 0 if context is None else context.shape[1]
    begins = len(texts.begin) + rows
    length = begins + texts.rest.shape[1]
    if length > len(places):
        raise ValueError(f"{clip.name} reads {len(places)} tokens, but context and longest text have {length}")
    states = _begin(blocks, tower, texts.begin, context, rows)

    def classes(ids: Tensor, end: Tensor) -> Tensor:
        x = tower.token_embedding(ids) + places[begins:length]
        for block, before in zip(map(OpenClipBlock, blocks), states, strict=True):
            x = x + block.scale(block.prefixed(block.ln_1(x), block.ln_1(before), causal=True))
            x = x + block.feed(block.ln_2(x))
        x = tower.ln_final(x[torch.arange(len(x), device=x.device), end])
        if tower.text_projection is None:
            return x
        return tower.text_projection(x) if isinstance(tower.text_projection, nn.Linear) else x @ tower.text_projection

    if chunk is None or len(texts.rest) <= chunk:
        found = classes(texts.rest, texts.end)
    else:
        parts = zip(texts.rest.split(chunk), texts.end.split(chunk), strict=True)
        found = torch.cat([checkpoint(classes, *part, use_reentrant=False) for part in parts])
    return F.normalize(found, dim=-1)


def _begin(blocks: nn.ModuleList, tower: nn.Module, ids: Tensor, context: Tensor | None, rows: int) -> list[Tensor]:
    """What the common tokens are at the entry of each block, [S + P, D]."""
    x = tower.token_embedding(ids)
    if context is not None:
        x = torch.cat([x[:1], context[0], x[1:]])
    x = x + tower.positional_embedding[: len(x)]
    mask, states = tower.attn_mask[: len(x), : len(x)], [x]
    for number, block in enumerate(blocks[:-1], 1):
        x = block(x[None], attn_mask=mask)[0]
        if context is not None and number < len(context):
            x = torch.cat([x[:1], context[number], x[1 + rows :]])
        states.append(x)
    return states
