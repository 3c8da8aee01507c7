"""Texts behind a learned context: equal to the whole sentences through open_clip, at every depth; gradients; memory."""

import functools

import pytest
import torch
from torch.nn import functional as F

from rvlm.models import Adapter, Clip, ZeroShotClassifier, apply_adapter, load_clip, text
from rvlm.models.adapter import AdapterConfig

CLASSES = ["cat", "very large dog", "zero"]


@pytest.fixture(scope="module")
def clip():
    return load_clip("tiny-vit", seed=1)


@pytest.fixture(scope="module")
def exact():
    """Rounding does not hide differences."""
    return load_clip("tiny-vit", seed=1).double()


def context(depth=2, rows=2, seed=0):
    return torch.randn(depth, rows, 64, generator=torch.Generator().manual_seed(seed)) * 0.1


def adapted(rows, sentence="of a {}.", seed=1):
    clip = load_clip("tiny-vit", seed=seed)
    return apply_adapter(clip, Adapter(AdapterConfig.of(clip, sentence=sentence), context=rows))


def by_hooks(clip, texts, rows):
    """Whole sequences through open_clip, with other rows written over the places behind <start>."""
    rows = rows.requires_grad_()
    places = clip.model.positional_embedding

    def write(number, module, given, named):
        x = given[0]
        mine = rows[number] + places[1 : 1 + rows.shape[1]] if number == 0 else rows[number]
        return (torch.cat([x[:, :1], mine.expand(len(x), -1, -1), x[:, 1 + rows.shape[1] :]], 1), *given[1:]), named

    handles = [
        block.register_forward_pre_hook(functools.partial(write, number), with_kwargs=True)
        for number, block in enumerate(clip.model.transformer.resblocks[: len(rows)])
    ]
    try:
        return F.normalize(clip.model.encode_text(clip.tokenizer(texts)), dim=-1), rows
    finally:
        for handle in handles:
            handle.remove()


def test_texts_without_a_context_are_open_clips(clip):
    for texts in (CLASSES, ["one alone"], ["the same", "the same"], ["a", "a b c d e f g h i j k l m n o p q r s t"]):
        expected = F.normalize(clip.model.encode_text(clip.tokenizer(texts)), dim=-1)
        torch.testing.assert_close(text.encode(clip, text.tokenized(clip, texts)), expected, rtol=1e-5, atol=1e-6)


def test_what_all_texts_begin_with_is_kept_apart(clip):
    texts = text.tokenized(clip, ["a photo of a cat.", "a photo of a very large dog."])
    assert [len(texts.begin), *texts.rest.shape] == [5, 2, 5] and texts.end.tolist() == [2, 4]
    assert (texts.rest.gather(1, texts.end[:, None]) == clip.tokenizer([""])[0].max()).all()


@pytest.mark.parametrize("depth", (1, 2))
@pytest.mark.parametrize("rows", (1, 2, 5))
def test_a_context_is_rows_written_over_words(exact, depth, rows):
    given = context(depth, rows).double().requires_grad_()
    written, theirs = by_hooks(exact, [f"{'x ' * rows}of a {name}." for name in CLASSES], given.detach().clone())
    out = text.encode(exact, text.tokenized(exact, [f"of a {name}." for name in CLASSES]), given)
    torch.testing.assert_close(out, written)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours, expected = (torch.autograd.grad((o * weights).sum(), t)[0] for o, t in ((out, given), (written, theirs)))
    torch.testing.assert_close(ours, expected)


def test_words_are_the_context_of_their_sentence(clip):
    words = text.word_embeddings(clip, "a photo")
    out = adapted(words[None]).encode_text([f"of a {name}." for name in CLASSES])
    torch.testing.assert_close(out, clip.encode_text([f"a photo of a {name}." for name in CLASSES]))


def test_chunks_change_memory_and_nothing_else(exact):
    texts = text.tokenized(exact, [f"of a {name}." for name in CLASSES])
    results = []
    for chunk in (None, 1, 2, 3):
        rows = context().double().requires_grad_()
        out = text.encode(exact, texts, rows, chunk)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            text.encode(exact, texts, rows, chunk)
        results.append((out.detach(), torch.autograd.grad(out.square().cumsum(1).sum(), rows)[0], sum(kept)))
    for out, grad, kept in results[1:3]:
        torch.testing.assert_close(out, results[0][0])
        torch.testing.assert_close(grad, results[0][1])
        assert kept < 0.8 * results[0][2]


def test_a_context_is_the_template(clip):
    prompted = adapted(context())
    one, other = (ZeroShotClassifier(prompted, CLASSES, template) for template in ("plain", ["{}"]))
    assert one.templates == other.templates == ["of a {}."] and torch.equal(one.text, other.text)
    assert not torch.allclose(one.text, ZeroShotClassifier(clip, CLASSES, ["of a {}."]).text)


def test_saved_and_taken_away(tmp_path, clip):
    prompted = adapted(context())
    prompted.save(tmp_path)
    texts = ["of a cat."]
    again = apply_adapter(load_clip("tiny-vit", seed=1), tmp_path)
    assert torch.equal(again.encode_text(texts), prompted.encode_text(texts))
    again.adapter.detach(again)
    assert torch.equal(again.encode_text(texts), clip.encode_text(texts))


def test_towers_and_texts_that_cannot():
    with pytest.raises(ValueError, match="reads 16 tokens, but context and longest text have 20"):
        adapted(context(1, 14)).encode_text(["of a cat."])
    with pytest.raises(ValueError, match="context for 3 blocks, but tiny-vit has 2"):
        adapted(context(3))
    with pytest.raises(ValueError, match="context of width 32, but tiny-vit has 64"):
        adapted(context()[..., :32])
    with pytest.raises(ValueError, match="go together"):
        Adapter(AdapterConfig(base="tiny-vit", size=32), context=context())
    with pytest.raises(ValueError, match="sentence must contain {}"):
        AdapterConfig(base="tiny-vit", size=32, sentence="of a cat")


@pytest.mark.parametrize("other", ({"no_causal_mask": True}, {"embed_cls": True}, {"pool_type": "last"}))
def test_other_text_towers_are_refused(other):
    import open_clip

    from rvlm.models.tiny import ARCHITECTURES

    config = ARCHITECTURES["tiny-vit"]
    model = open_clip.CustomTextCLIP(64, dict(config["vision_cfg"]), config["text_cfg"] | other)
    clip = Clip.wrap(model, open_clip.SimpleTokenizer(context_length=16))
    with pytest.raises(ValueError, match="no text tower whose texts can begin with a context"):
        apply_adapter(clip, Adapter(AdapterConfig.of(clip, sentence="a {}"), context=context()))


def test_custom_text_towers_of_the_same_kind():
    import open_clip

    from rvlm.models.tiny import ARCHITECTURES

    config = ARCHITECTURES["tiny-vit"]
    model = open_clip.CustomTextCLIP(64, dict(config["vision_cfg"]), dict(config["text_cfg"]))
    clip = Clip.wrap(model, open_clip.SimpleTokenizer(context_length=16)).eval()
    out = text.encode(clip, text.tokenized(clip, CLASSES))
    expected = F.normalize(model.encode_text(clip.tokenizer(CLASSES)), dim=-1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
