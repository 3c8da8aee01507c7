"""Adapters on every family of towers, and CLIPs of transformers, which say what open_clip says."""

import copy
import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rvlm.analysis import attention_map, cka_matrix
from rvlm.attacks import pgd
from rvlm.data import load_data
from rvlm.methods import build_method
from rvlm.models import Adapter, Clip, ZeroShotClassifier, apply_adapter, convert, load_clip, tiny
from rvlm.models.adapter import AdapterConfig
from rvlm.models.towers import SITES, attention_output, tower_of
from rvlm.models.weights import weights_sha
from rvlm.training import train

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def open_clip_vit(**vision) -> Clip:
    """Tiny-vit with other settings of its vision tower."""
    import open_clip

    about = tiny.ARCHITECTURES["tiny-vit"]
    torch.manual_seed(0)
    model = open_clip.CLIP(about["embed_dim"], about["vision_cfg"] | vision, about["text_cfg"])
    return Clip.wrap(model, open_clip.SimpleTokenizer(context_length=16), "vit").eval()


def timm_vit(**settings) -> Clip:
    """A CLIP whose tower is a timm VisionTransformer, 32 px, 16 patches."""
    import open_clip
    import timm

    given = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(64, given, text)
    usual = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 0}
    model.visual.trunk = timm.models.VisionTransformer(**(usual | settings))
    return Clip.wrap(model, open_clip.SimpleTokenizer(context_length=16), "timm").eval()


def next_open_clip() -> Clip:
    """Tiny-vit with attentions as open_clip's next major version calls them: keywords, and a tensor back."""

    class Attention(nn.Module):
        def __init__(self, old):
            super().__init__()
            self.num_heads, self.out_proj = old.num_heads, old.out_proj
            self.in_proj_weight, self.in_proj_bias = old.in_proj_weight, old.in_proj_bias

        def forward(self, x, k_x=None, v_x=None, attn_mask=None):
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
            return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2))

    clip = open_clip_vit()
    for block in clip.visual.transformer.resblocks:
        old = type(block)
        block.attn = Attention(block.attn)
        block.__class__ = type("ResidualAttentionBlock", (old,), {
            "attention": lambda self, q_x, k_x=None, v_x=None, attn_mask=None: self.attn(q_x, k_x, v_x, attn_mask)
        })  # fmt: skip
    return clip


@pytest.fixture(scope="session")
def transformers_clip(tmp_path_factory) -> str:
    """Spec of tiny-vit as a CLIPModel of transformers."""
    pytest.importorskip("transformers")
    return f"hf:{convert(load_clip('tiny-vit'), tmp_path_factory.mktemp('hf'), 'hf')}"


TOWERS = {
    "open_clip": lambda: load_clip("tiny-vit"),
    "next": next_open_clip,
    "custom": lambda: open_clip_vit(block_type="custom"),
    "averaged": lambda: open_clip_vit(pool_type="avg"),
    "timm": timm_vit,
    "timm-siglip": lambda: timm_vit(class_token=False, global_pool="map"),
    "timm-scaled": lambda: timm_vit(reg_tokens=2, pre_norm=True, init_values=0.3),
}


MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("averaged", "timm-scaled")]


@pytest.fixture(scope="module", params=["open_clip", "next", "custom", "timm", "timm-siglip", "transformers", *MORE])
def tower_clip(request) -> Clip:
    """A CLIP of every family whose blocks can be adapted, without grad; tests leave it as it was."""
    if request.param == "transformers":
        clip = load_clip(request.getfixturevalue("transformers_clip"))
    else:
        clip = TOWERS[request.param]()
    return clip.requires_grad_(False)


@pytest.fixture(autouse=True)
def without_adapter(request):
    yield
    if "tower_clip" in request.fixturenames:
        clip = request.getfixturevalue("tower_clip")
        if clip.adapter is not None:
            clip.adapter.detach(clip)


@pytest.fixture
def x():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def adapter(clip, site="out", prompts=None, seed=0, **settings):
    """With an anchor of the right shape at a site (None: no anchor), and prompts (J, P)."""
    tower, generator = tower_of(clip), torch.Generator().manual_seed(seed)
    anchor = None if site is None else torch.randn(tower.shape(site), generator=generator) / 5
    rows = None if prompts is None else torch.randn(*prompts, tower.width, generator=generator) / 5
    return Adapter(AdapterConfig(base="", size=clip.size, site=site or "out", **settings), anchor, rows)


@pytest.mark.parametrize("site", SITES)
def test_the_fused_block_is_the_hooked_one_at_every_site(tower_clip, x, site, both_ways):
    before = tower_clip.encode_pixels(x, unit_norm=False)
    for settings in ({"mix": "add", "block": 0}, {"mix": "lerp", "block": 2}):
        out = both_ways(tower_clip, x, lambda s=settings: adapter(tower_clip, site, alpha=0.7, **s))
        assert (out - before).norm() > 1e-3 * before.norm()


@pytest.mark.parametrize("depth", [1, 3])
def test_prompts_on_every_tower(tower_clip, x, depth, both_ways):
    before = tower_clip.encode_pixels(x, unit_norm=False)
    out = both_ways(tower_clip, x, lambda: adapter(tower_clip, None, (depth, 4)))
    assert (out - before).norm() > 1e-3 * before.norm()
    if depth == 1:  # an anchor behind them, where prompts are tokens
        for site in SITES:
            both_ways(tower_clip, x, lambda s=site: adapter(tower_clip, s, (1, 4), alpha=0.5, block=2))


@needs_transformers
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_prompts_on_a_model_of_16_bits(transformers_clip, x, depth):
    clip, narrow = load_clip(transformers_clip), load_clip(transformers_clip)
    narrow.model.bfloat16()
    plain = (clip(x) - narrow(x)).norm()
    for fused in (True, False):
        for one in (clip, narrow):
            adapter(clip, "out", (depth, 4), alpha=0.5, block=2).attach(one, fused)
        assert 0 < (clip(x) - narrow(x)).norm() < 2 * plain


@pytest.mark.parametrize("site", SITES)
def test_a_white_image_and_its_own_anchor(tower_clip, site):
    """Mixing a response with itself changes nothing, for any strength; of strength 0 nothing changes any image."""
    white = torch.ones(1, 3, 32, 32)
    plain, own = tower_clip(white), attention_output(tower_clip, white, 1, site)[0]
    assert own.shape == tower_of(tower_clip).shape(site)
    for fused in (True, False):
        config = AdapterConfig(base="", size=32, alpha=1.7, mix="lerp", block=1, site=site)
        Adapter(config, own).attach(tower_clip, fused)
        torch.testing.assert_close(tower_clip(white), plain, rtol=0, atol=1e-5)
        Adapter(AdapterConfig(base="", size=32, block=1, site=site), own).attach(tower_clip, fused)
        assert torch.equal(tower_clip(white), plain)
        tower_clip.adapter.detach(tower_clip)


def test_an_anchor_of_heads_is_one_of_the_output_after_the_projection(tower_clip, x):
    """V2 of R-Adapt: Z + alpha A_h projected is o + alpha A_h W_o, without the bias, for an output without a scale."""
    tower = tower_of(tower_clip)
    block, one = tower.block(0), adapter(tower_clip, "heads", alpha=0.5)
    anchor, nothing = one.anchor[None], torch.zeros_like(one.anchor)[None]
    moved = (block.scale(block.project(anchor)) - block.scale(block.project(nothing)))[0]
    apply_adapter(tower_clip, one)
    inside = tower_clip(x)
    apply_adapter(tower_clip, Adapter(AdapterConfig(base="", size=32, alpha=0.5), moved))
    torch.testing.assert_close(tower_clip(x), inside, rtol=1e-4, atol=1e-5)


def test_what_attention_says_at_every_site(tower_clip, x):
    tower = tower_of(tower_clip)
    out, heads, weights = (attention_output(tower_clip, x, 1, site) for site in SITES)
    assert [tuple(t.shape[1:]) for t in (out, heads, weights)] == [tower.shape(site) for site in SITES]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    block = tower.block(1)
    torch.testing.assert_close(block.scale(block.project(heads)), out, rtol=1e-4, atol=1e-5)


def test_the_model_is_untouched_and_an_adapter_leaves_no_trace(tower_clip, x):
    before, state = tower_clip(x), {key: t.clone() for key, t in tower_clip.model.state_dict().items()}

    def traces():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tower_clip.model.modules()]
        return hooks, [set(vars(m)) for m in tower_clip.model.modules()]

    was = traces()
    for fused in (True, False):
        for site in ("out", "heads"):
            one = adapter(tower_clip, site, (1, 3), alpha=0.5, block=2, cutoff=6.0)
            one.attach(tower_clip, fused)
            first = tower_clip(x)
            one.attach(tower_clip, fused)  # in its own place, not on top of itself
            assert torch.equal(tower_clip(x), first) and (first - before).norm() > 1e-3
            assert tower_clip.model.state_dict().keys() == state.keys()
        copied = copy.deepcopy(tower_clip)
        copied.adapter.detach(copied)
        assert torch.equal(copied(x), before) and torch.equal(tower_clip(x), first)
        one.detach(tower_clip)
        assert torch.equal(tower_clip(x), before) and traces() == was
    assert all(torch.equal(tower_clip.model.state_dict()[key], t) for key, t in state.items())


def test_saved_and_loaded_at_every_site(x, tmp_path):
    clip = load_clip("tiny-vit")
    shas = set()
    for site in SITES:
        apply_adapter(clip, adapter(clip, site, alpha=0.5)).save(tmp_path / site)
        loaded = load_clip(f"tiny-vit+adapter={tmp_path / site}")
        assert torch.equal(loaded(x), clip(x)) and loaded.adapter.config.site == site
        shas.add(weights_sha(loaded))
    assert len(shas) == 3


def test_anchors_of_heads_go_to_another_resolution_and_maps_do_not():
    small, large = timm_vit(), timm_vit(img_size=64)
    large.size = 64
    one = adapter(small, "heads", alpha=0.5)
    values = one.anchor.clone()
    apply_adapter(large, one)
    assert one.anchor.shape == (2, 65, 32) and torch.equal(one.anchor[:, 0], values[:, 0])
    torch.testing.assert_close(one.anchor[:, 1], values[:, 1])  # bilinear: a corner keeps its value
    assert large(torch.rand(1, 3, 64, 64)).isfinite().all()
    with pytest.raises(ValueError, match=r"anchor is \[2, 17, 17\].* where site 'map' takes \[2, 65, 65\]"):
        apply_adapter(large, adapter(small, "map", alpha=0.5))


def test_attentions_that_do_more_have_an_anchor_at_their_output_only(x, both_ways):
    for clip in (timm_vit(qk_norm=True), open_clip_vit(qk_norm=True)):
        both_ways(clip, x, lambda c=clip: adapter(c, "out", alpha=0.7))
        with pytest.raises(ValueError, match="site 'map' must see queries, keys and values, and Attention of block 0"):
            apply_adapter(clip, adapter(clip, "map", alpha=0.7))
        with pytest.raises(ValueError, match="prompts must see queries, keys and values"):
            apply_adapter(clip, adapter(clip, None, (1, 2)))


def test_bad_settings(tower_clip):
    with pytest.raises(ValueError, match="site must be one of out, heads, map, and out for normadd"):
        adapter(tower_clip, site="heads", mix="normadd")
    with pytest.raises(ValueError, match=r"an anchor at site 'map' cannot be \[4, 5\]"):
        Adapter(AdapterConfig(base="", size=32, site="map"), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="cannot stand in block 0, which has prompts of its own"):
        apply_adapter(tower_clip, adapter(tower_clip, "map", (1, 2)))


def test_towers_that_have_no_blocks_to_adapt():
    with pytest.raises(ValueError, match=r"tiny-rn \(ModifiedResNet\) .*open_clip or timm .* a CLIPVisionModel"):
        tower_of(load_clip("tiny-rn"))
    import timm

    other = timm_vit()
    other.model.visual.trunk = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=0,
        block_fn=timm.models.vision_transformer.ParallelScalingBlock,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"timm \(TimmModel\) has no blocks that can be adapted"):
        tower_of(other)


def test_layers_of_every_tower_are_compared(tower_clip):
    data = load_data("digits", "test", limit=8)
    tokens = "cls" if tower_of(tower_clip).lead else "mean"
    values, ours, theirs = cka_matrix(tower_clip, tower_clip, data, tokens)
    assert ours == theirs == ["B1", "B2", "B3"]
    torch.testing.assert_close(values.diagonal(), torch.ones(3))
    if tokens == "mean":
        with pytest.raises(ValueError, match="timm has no class token: choose tokens='mean'"):
            cka_matrix(tower_clip, tower_clip, data, "cls")
        with pytest.raises(ValueError, match="timm has no class token: choose reduce='received'"):
            attention_map(tower_clip, torch.ones(1, 3, 32, 32))
    assert attention_map(tower_clip, torch.ones(2, 3, 32, 32), 0, "received").shape == (2, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_compiles_into_one_graph(tower_clip, x, site):
    torch._dynamo.reset()  # which counts what other models made of the same code
    apply_adapter(tower_clip, adapter(tower_clip, site, (1, 3), alpha=0.5, block=1, cutoff=6.0))
    compiled = torch.compile(tower_clip.encode_pixels, fullgraph=True)
    torch.testing.assert_close(compiled(x), tower_clip(x), rtol=1e-4, atol=1e-5)


@needs_transformers
def test_a_clip_of_transformers_says_what_open_clips_says(transformers_clip, x):
    ours, theirs = load_clip("tiny-vit"), load_clip(transformers_clip)
    texts = ["a photo of a cat.", "it's 3 o'clock", "a " * 40]
    with torch.no_grad():
        for unit_norm in (True, False):
            torch.testing.assert_close(theirs(x, unit_norm), ours(x, unit_norm), rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.encode_text(texts), ours.encode_text(texts), rtol=0, atol=1e-5)
    assert theirs.logit_scale == ours.logit_scale and theirs.size == ours.size
    assert torch.equal(theirs.mean, ours.mean) and torch.equal(theirs.std, ours.std)
    assert torch.equal(theirs.tokenizer(texts[:2]).ne(49407).sum(1) + 1, ours.tokenizer(texts[:2]).ne(0).sum(1))
    assert not theirs.training and theirs.name == transformers_clip
    names = (ZeroShotClassifier(clip, ["cat", "dog", "owl"]) for clip in (ours, theirs))
    y = torch.tensor([0, 1, 2])
    images = [pgd(classifier, x, y, eps=8 / 255, steps=3, random_start=False) for classifier in names]
    assert (images[0] - images[1]).abs().gt(1e-6).float().mean() < 1e-2


@pytest.mark.slow
@needs_transformers
def test_a_vit_b_32_of_transformers_says_what_open_clips_says(tmp_path):
    """At the size of OpenAI's, with its activation and its tokenizer's context."""
    ours = load_clip("ViT-B-32-quickgelu")
    theirs = load_clip(f"hf:{convert(ours, tmp_path, 'hf')}")
    x, texts = torch.rand(2, 3, 224, 224), ["a photo of a cat.", "two dogs on a beach"]
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.encode_text(texts), ours.encode_text(texts), rtol=0, atol=1e-5)


@needs_transformers
def test_an_adapter_made_for_one_library_fits_the_other(transformers_clip, x):
    ours, theirs = load_clip("tiny-vit"), load_clip(transformers_clip)
    for site in SITES:
        for clip in (ours, theirs):
            apply_adapter(clip, adapter(ours, site, (1, 3), alpha=0.5, block=1, cutoff=6.0))
        torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=2e-5)


@needs_transformers
def test_an_adapted_clip_of_transformers_is_loaded_by_its_folder(transformers_clip, x, tmp_path):
    clip = load_clip(transformers_clip)
    apply_adapter(clip, Adapter(AdapterConfig.of(clip, cutoff=6.0))).save(tmp_path)
    assert torch.equal(load_clip(str(tmp_path))(x), clip(x))
    clip.adapter.detach(clip)
    with pytest.raises(ValueError, match="cannot be saved"):
        clip.save(tmp_path)


@needs_transformers
def test_methods_that_freeze_the_backbone_take_clips_of_transformers(transformers_clip, x, tmp_path):
    data, student = load_data("digits", "train", limit=16), load_clip(transformers_clip)
    quick = {"epochs": 1, "batch_size": 16, "steps": 1}
    train(student, data, build_method("r_adapt", anchor="white", site="map", **quick), out=tmp_path, progress=False)
    assert torch.equal(load_clip(str(tmp_path))(x), student(x)) and student.adapter.config.site == "map"
    student.adapter.detach(student)
    train(student, data, build_method("advvp", visual_depth=2, visual_tokens=2, **quick), progress=False)
    assert student.adapter.prompts.shape == (2, 2, 96)
    student.adapter.detach(student)
    with pytest.raises(ValueError, match="has no open_clip config, so it could not be saved"):
        train(student, data, build_method("tecoa", **quick), out=tmp_path / "tecoa", progress=False)


@needs_transformers
def test_what_is_no_clip_of_transformers(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no CLIPModel with its tokenizer at .*expected a folder of transformers"
    ):
        load_clip(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ValueError, match="is a siglip: expected a CLIPModel"):
        load_clip(f"hf:{tmp_path}")


@needs_transformers
@pytest.mark.parametrize("change", [
    {"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}, {"resample": 1},
])  # fmt: skip
def test_images_that_a_clip_of_transformers_prepares_in_another_way(transformers_clip, tmp_path, change):
    import json
    import shutil

    shutil.copytree(transformers_clip.removeprefix("hf:"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"image processor with .*{next(iter(change))}=.*expected one that rescales"):
        load_clip(f"hf:{tmp_path}")


def test_without_transformers(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "rvlm.models.hf", raising=False)
    with pytest.raises(ImportError, match=r'hf:somewhere needs transformers: pip install "rvlm\[hf\]"'):
        load_clip("hf:somewhere")
