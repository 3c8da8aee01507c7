"""Adapters: a filter and an anchor around a tower that stays as it is."""

import copy

import pytest
import torch

from rvlm import ops
from rvlm.attacks import pgd
from rvlm.models import Adapter, ZeroShotClassifier, apply_adapter, load_clip, tiny
from rvlm.models.adapter import AdapterConfig
from rvlm.models.clip import Clip
from rvlm.models.towers import attention_output, tower_of
from rvlm.models.weights import weights_sha


@pytest.fixture
def clip():
    return load_clip("tiny-vit")


@pytest.fixture
def x():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def adapter(anchor=True, seed=0, prompts=None, **settings):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(17, 96, generator=generator) / 5 if anchor is True else anchor
    rows = None if prompts is None else torch.randn(*prompts, 96, generator=generator) / 5
    return Adapter(AdapterConfig(**({"base": "tiny-vit", "size": 32} | settings)), values, rows)


def test_without_filter_and_anchor_the_output_is_the_same(clip, x):
    before = clip(x)
    apply_adapter(clip, adapter(None))
    assert torch.equal(clip(x), before)
    apply_adapter(clip, adapter(alpha=0.0))
    assert torch.equal(clip(x), before)


def test_the_model_is_untouched_and_an_adapter_leaves_no_trace(clip, x):
    before, state = clip(x), {key: t.clone() for key, t in clip.model.state_dict().items()}
    modules = {name: set(vars(module)) for name, module in clip.named_modules()}
    for fused in (True, False):
        one = adapter(alpha=0.5, cutoff=6.0, prompts=(2, 3))
        one.attach(clip, fused)
        first = clip(x)
        assert not torch.allclose(first, before, atol=1e-3)
        one.attach(clip, fused)  # in its own place, not on top of itself
        assert torch.equal(clip(x), first)
        adapter(seed=1, alpha=0.5).attach(clip, fused)  # in the other's place
        clip.adapter.detach(clip)
        assert torch.equal(clip(x), before)
    now = clip.model.state_dict()
    assert now.keys() == state.keys() and all(torch.equal(now[key], t) for key, t in state.items())
    assert {name: set(vars(module)) for name, module in clip.named_modules()} == modules
    assert not any(module._forward_hooks for module in clip.modules())


@pytest.mark.parametrize("mix", ["add", "lerp", "normadd"])
@pytest.mark.parametrize("block", [0, 2])
def test_the_fused_block_is_the_hooked_one(clip, x, mix, block, both_ways):
    both_ways(clip, x, lambda: adapter(alpha=0.7, mix=mix, block=block))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("anchored", [None, 0, 1, 2])
def test_prompts_as_keys_and_values_are_prompts_as_tokens(clip, x, depth, anchored, both_ways):
    """Outputs and gradients for pixels, prompts and anchor, also where prompts end before the last block."""
    given = {"anchor": None} if anchored is None else {"alpha": 0.7, "block": anchored}
    out = both_ways(clip, x, lambda: adapter(prompts=(depth, 4), **given))
    assert not torch.allclose(out, clip.encode_pixels(x, unit_norm=False), atol=1e-2)


def test_prompts_are_tokens_that_a_plain_block_sees(clip, x):
    """One block of depth, by hand: the tower runs on image tokens and prompts, and pools the class token."""
    tower = clip.model.visual
    one = adapter(None, prompts=(1, 4))
    tokens = tower._embeds((x - clip.mean) / clip.std)
    rows = tower.ln_pre(one.prompts[0]).expand(3, -1, -1)
    expected = tower.ln_post(tower.transformer(torch.cat([tokens, rows], 1)))[:, 0] @ tower.proj
    apply_adapter(clip, one)
    torch.testing.assert_close(clip.encode_pixels(x, unit_norm=False), expected, rtol=1e-4, atol=1e-5)


def test_the_anchors_gradient_is_alpha_times_the_sum_over_the_batch(clip, x):
    one, seen = adapter(alpha=0.3), []
    one.anchor.requires_grad_(True)
    one.attach(clip, fused=False)
    second = clip.model.visual.transformer.resblocks[0].ls_1.register_forward_hook(
        lambda module, given, out: seen.append(out)
    )
    out = clip(x)
    seen[0].retain_grad()
    out.pow(3).sum().backward()
    second.remove()
    torch.testing.assert_close(one.anchor.grad, 0.3 * seen[0].grad.sum(0), rtol=1e-4, atol=1e-7)


def test_a_white_image_and_its_own_anchor(clip):
    """Adding the response once more doubles it, and mixing it with itself changes nothing, for any strength."""
    white = torch.ones(1, 3, 32, 32)
    own = attention_output(clip, white)[0]
    plain = clip(white)
    apply_adapter(clip, adapter(own, alpha=1.7, mix="lerp"))
    torch.testing.assert_close(clip(white), plain, rtol=0, atol=1e-5)
    adapter(own, alpha=1.0).attach(clip, fused=False)
    torch.testing.assert_close(clip.adapter.mixed(own), 2 * own)
    assert attention_output(clip, white).shape == (1, 17, 96)


def test_the_filter_stands_before_the_tower_and_keeps_its_share_of_the_image(clip, x):
    expected = clip(ops.gaussian_filter(x, 6.0))
    apply_adapter(clip, adapter(None, cutoff=6.0))
    torch.testing.assert_close(clip(x), expected)
    wide = Adapter(AdapterConfig(base="", size=64, cutoff=12.0))
    torch.testing.assert_close(wide.filter(x), ops.gaussian_filter(x, 6.0))
    constant = torch.full((1, 3, 32, 32), 0.4)
    torch.testing.assert_close(clip.adapter.filter(constant), constant)


def test_an_anchor_goes_to_another_resolution(x):
    config = copy.deepcopy(tiny.ARCHITECTURES["tiny-vit"])
    config["vision_cfg"]["image_size"] = 64
    import open_clip

    large = Clip.wrap(open_clip.CLIP(**config), open_clip.SimpleTokenizer(context_length=16), "large")
    values = torch.randn(17, 96)
    one = adapter(values, alpha=0.5)
    apply_adapter(large, one)
    assert one.anchor.shape == (65, 96) and torch.equal(one.anchor[0], values[0])
    corner = one.anchor[1:].reshape(8, 8, 96)[0, 0]
    torch.testing.assert_close(corner, values[1])  # bilinear: a corner keeps its value
    assert large(torch.rand(1, 3, 64, 64)).isfinite().all()
    with pytest.raises(
        ValueError, match=r"anchor is \[17, 32\], made for tiny-vit, but large has 65 tokens of width 96"
    ):
        apply_adapter(large, adapter(torch.zeros(17, 32)))


def test_saved_and_loaded(clip, x, tmp_path):
    apply_adapter(clip, adapter(alpha=0.5, cutoff=6.0, mix="lerp", block=1, source="a test", prompts=(2, 3)))
    expected, sha = clip(x), weights_sha(clip)
    clip.save(tmp_path / "run" / "checkpoint")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoint").iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
    ]
    for spec in (f"tiny-vit+adapter={tmp_path}/run", f"{tmp_path}/run", f"{tmp_path}/run/checkpoint"):
        loaded = load_clip(spec)
        assert torch.equal(loaded(x), expected) and loaded.name == spec and weights_sha(loaded) == sha
    given = {"alpha": 0.5, "cutoff": 6.0, "mix": "lerp", "block": 1}
    for change in ({"alpha": 0.6}, {"cutoff": 5.0}, {"mix": "add"}, {"block": 0}, {"clamp": False}, {"size": 64}):
        assert weights_sha(apply_adapter(clip, adapter(prompts=(2, 3), **(given | change)))) != sha, change
    with pytest.raises(FileNotFoundError, match="lacks adapter.json and adapter.safetensors"):
        load_clip(f"tiny-vit+adapter={tmp_path}")
    (tmp_path / "run" / "checkpoint" / "adapter.json").write_text('{"schema": "other"}')
    with pytest.raises(ValueError, match="no adapter of this version"):
        load_clip(f"{tmp_path}/run")


def test_a_folder_is_one_model_and_knows_its_base(x, tmp_path):
    clip = load_clip("tiny-vit", seed=3)
    apply_adapter(clip, Adapter(AdapterConfig.of(clip, cutoff=6.0)))
    clip.save(tmp_path / "one")
    with pytest.raises(ValueError, match="was made for other weights of tiny-vit"):
        load_clip(str(tmp_path / "one"))  # tiny-vit alone means seed 0
    clip.adapter.detach(clip)
    clip.save(tmp_path / "one")
    assert sorted(p.suffix for p in (tmp_path / "one").iterdir()) == [".json", ".safetensors"]
    base = load_clip(str(tmp_path / "one"))
    assert torch.equal(base(x), clip(x)), "the later save counts"
    apply_adapter(base, Adapter(AdapterConfig.of(base, cutoff=6.0)))
    base.save(tmp_path / "two")
    assert torch.equal(load_clip(str(tmp_path / "two"))(x), base(x))
    assert AdapterConfig.of(base).base == str(tmp_path / "one"), "an adapted model's base is what it stands on"


def test_a_copy_has_an_adapter_of_its_own(clip, x):
    for fused in (True, False):
        adapter(alpha=0.5, prompts=(2, 3)).attach(clip, fused)
        expected = clip(x)
        other = copy.deepcopy(clip)
        with torch.no_grad():
            other.adapter.anchor.zero_()
        assert torch.equal(clip(x), expected) and not torch.allclose(other(x), expected, atol=1e-3)
        other.adapter.detach(other)
        assert torch.equal(clip(x), expected)
        clip.adapter.detach(clip)


def test_attacks_see_filter_and_anchor_and_leave_them_alone(clip, x):
    apply_adapter(clip, adapter(alpha=0.5, cutoff=4.0))
    classifier = ZeroShotClassifier(clip, ["cat", "dog", "owl"])
    before = {key: t.clone() for key, t in clip.state_dict().items()}
    x_adv = pgd(classifier, x, torch.tensor([0, 1, 2]), eps=0.1, steps=3, random_start=False)
    assert all(torch.equal(t, before[key]) for key, t in clip.state_dict().items())
    # The gradient passed the filter, so it is as smooth as what the filter lets through.
    leaf = x.clone().requires_grad_()
    grad = torch.autograd.grad(clip(leaf)[:, 0].sum(), leaf)[0]
    torch.testing.assert_close(ops.gaussian_filter(grad, 400.0, clamp=False), grad, atol=1e-6, rtol=1e-3)
    high = grad - ops.gaussian_filter(grad, 8.0, clamp=False)
    assert high.norm() < 0.2 * grad.norm() and (x_adv - x).abs().max() > 0.05


@pytest.mark.parametrize("site, shape", [("heads", (3, 17, 32)), ("map", (3, 17, 17))])
def test_anchors_inside_the_attention_run_on_its_op(clip, x, monkeypatch, site, shape):
    calls, attention = [], ops.anchored_attention
    monkeypatch.setattr(ops, "anchored_attention", lambda *args: (calls.append(args[5]), attention(*args))[1])
    anchor = torch.rand(shape, generator=torch.Generator().manual_seed(0)) / 17
    plain = clip(x)
    apply_adapter(clip, adapter(anchor, alpha=0.5, site=site))
    assert not torch.allclose(clip(x), plain, atol=1e-4) and calls == [site]


@pytest.mark.slow
def test_compiles_into_one_graph(clip, x):
    apply_adapter(clip, adapter(alpha=0.5, cutoff=6.0, prompts=(2, 3)))
    compiled = torch.compile(clip.encode_pixels, fullgraph=True)
    torch.testing.assert_close(compiled(x), clip(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name, width, depth, tokens", [
    ("ViT-B-32-quickgelu", 768, 12, 50), ("ViT-B-16-quickgelu", 768, 12, 197), ("ViT-L-14-quickgelu", 1024, 24, 257),
])  # fmt: skip
def test_the_usual_towers(name, width, depth, tokens):
    """Random weights; prompts of the labs' number and depth. Compiled without code, which would only cost time."""
    clip, x = load_clip(name), torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    tower, generator = tower_of(clip), torch.Generator().manual_seed(1)
    assert (tower.width, len(tower.blocks), tower.tokens) == (width, depth, tokens)
    shapes = ((tokens, width), (9, 2, width), (9, 2, clip.model.positional_embedding.shape[1]))
    rows = [torch.randn(shape, generator=generator) * 0.1 for shape in shapes]
    config = AdapterConfig.of(clip, alpha=0.5, cutoff=40.0, sentence="of a {}.")
    with torch.no_grad():
        plain, keys = clip(x), list(clip.model.state_dict())
        Adapter(AdapterConfig.of(clip)).attach(clip)
        assert torch.equal(clip(x), plain)
        results = []
        for fused in (False, True):
            Adapter(config, *rows).attach(clip, fused)
            results.append(clip(x))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(results[1], plain, atol=1e-3) and list(clip.model.state_dict()) == keys
        torch._dynamo.reset()
        compiled = torch.compile(clip.encode_pixels, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), results[1], rtol=1e-4, atol=1e-5)
        assert clip.encode_text(["of a cat.", "of a very large dog."]).shape == (2, plain.shape[1])
        clip.adapter.detach(clip)
        assert torch.equal(clip(x), plain)


@pytest.mark.parametrize("settings, message", [
    ({"mix": "sum"}, "mix must be one of add, lerp, normadd"),
    ({"cutoff": 0.0}, "cutoff must be a finite number"),
    ({"alpha": float("nan")}, "alpha must be finite"),
    ({"alpha": -1.0, "mix": "normadd"}, "above -1 for normadd"),
])  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        adapter(**settings)


def test_towers_that_cannot_be_anchored(clip):
    with pytest.raises(
        ValueError, match=r"tiny-rn \(ModifiedResNet\) has no blocks that can be adapted: expected a Vis"
    ):
        apply_adapter(load_clip("tiny-rn"), adapter(alpha=1.0))
    with pytest.raises(ValueError, match=r"prompts must be \[J, P, D\], none of them 0, got \[0, 4, 96\]"):
        adapter(prompts=(0, 4))
    with pytest.raises(ValueError, match="prompts of width 64, but tiny-vit has 96"):
        apply_adapter(clip, Adapter(AdapterConfig(base="", size=32), None, torch.zeros(1, 2, 64)))
    with pytest.raises(ValueError, match="prompts for 4 blocks, but tiny-vit has 3"):
        apply_adapter(clip, adapter(None, prompts=(4, 2)))
    with pytest.raises(ValueError, match="tiny-vit has 3 blocks, got block 3"):
        apply_adapter(clip, adapter(alpha=1.0, block=3))
    resnet = apply_adapter(load_clip("tiny-rn"), adapter(None, cutoff=6.0))  # a filter needs no blocks
    assert resnet(torch.rand(1, 3, 32, 32)).isfinite().all()
