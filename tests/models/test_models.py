"""Models: normalisation in the graph, exact round trips, QuickGELU, and zero-shot heads."""

import json

import open_clip
import pytest
import torch
from torch.nn import functional as F

from rvlm.cli import main
from rvlm.data import templates
from rvlm.models import Clip, Ensemble, ZeroShotClassifier, load_clip, tiny
from rvlm.models.clip import CONFIG, WEIGHTS


@pytest.fixture(params=list(tiny.ARCHITECTURES))
def clip(request):
    return load_clip(request.param)


def test_pixels_are_normalised_and_resized_inside(clip):
    x = torch.rand(3, 3, 32, 32)
    expected = F.normalize(clip.model.encode_image((x - 0.5) / 0.5), dim=-1)
    assert torch.allclose(clip.encode_pixels(x), expected, atol=1e-6)
    assert torch.allclose(clip.encode_pixels(x).norm(dim=1), torch.ones(3), atol=1e-5)
    large = torch.rand(2, 3, 48, 48, requires_grad=True)
    clip.encode_pixels(large).sum().backward()
    assert (large.grad != 0).float().mean() > 0.9, "gradients pass through the resize"
    with pytest.raises(ValueError, match="must be square"):
        clip.encode_pixels(torch.rand(1, 3, 32, 40))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        clip.encode_pixels(torch.rand(1, 1, 32, 32))


def test_random_weights_follow_the_seed_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    first, same, other = (load_clip("tiny-vit", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    key = "visual.conv1.weight"
    assert torch.equal(first.model.state_dict()[key], same.model.state_dict()[key])
    assert not torch.equal(first.model.state_dict()[key], other.model.state_dict()[key])


def test_checkpoints_load_back_exactly_here_and_in_open_clip(clip, tmp_path):
    clip.save(tmp_path / "checkpoint")
    x, texts = torch.rand(4, 3, 32, 32), ["a photo of a cat.", "three"]
    for path in (tmp_path, tmp_path / "checkpoint"):
        again = load_clip(str(path))
        assert torch.equal(again.encode_pixels(x), clip.encode_pixels(x))
        assert torch.equal(again.encode_text(texts), clip.encode_text(texts))
        assert torch.equal(again.mean, clip.mean) and again.size == clip.size
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'checkpoint'}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'checkpoint'}")(texts)
    assert torch.equal(tokens, clip.tokenizer(texts))
    torch.testing.assert_close(theirs.encode_text(tokens, normalize=True), clip.encode_text(texts))
    assert torch.equal(theirs.encode_image((x - 0.5) / 0.5, normalize=True), clip.encode_pixels(x))
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == [CONFIG, WEIGHTS], "no temporary files"


def test_weights_that_cannot_be_fetched_say_what_to_do(monkeypatch, capsys):
    def offline(arch, **given):
        raise RuntimeError("Failed to download weights for tag 'openai': no connection.")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(FileNotFoundError, match=r"no connection\. Without a network, give .* \(ViT-B-32:FILE\)"):
        load_clip("ViT-B-32:openai")
    assert main(["check", "ViT-B-32:openai"]) == 3
    assert "rvlm check: ViT-B-32:openai is not on this machine" in capsys.readouterr().err


def test_bad_specs(tmp_path):
    with pytest.raises(ValueError, match="unknown model 'ViT-B-31'"):
        load_clip("ViT-B-31")
    with pytest.raises(ValueError, match="no pretrained weights 'openaii'.*openai"):
        load_clip("ViT-B-32:openaii")
    (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError, match="lacks open_clip_model.safetensors and open_clip_config.json"):
        load_clip(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="cannot be saved"):
        Clip.wrap(load_clip("tiny-vit").model, None).save(tmp_path)


@pytest.fixture
def small_arch(tmp_path):
    """A tiny architecture registered with open_clip, in a plain and a QuickGELU version, as its model zoo has them."""
    config = tiny.ARCHITECTURES["tiny-vit"]
    for name, quick in (("rvlm-test", False), ("rvlm-test-quickgelu", True)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config | ({"quick_gelu": True} if quick else {})))
    open_clip.add_model_config(tmp_path)
    return "rvlm-test"


def test_quick_gelu_is_kept_and_a_mismatch_is_an_error(small_arch, tmp_path):
    quick = load_clip(f"{small_arch}-quickgelu")
    assert "QuickGELU" in repr(quick.model.visual)
    quick.save(tmp_path / "ck")
    assert json.loads((tmp_path / "ck" / CONFIG).read_text())["model_cfg"]["quick_gelu"] is True
    assert "QuickGELU" in repr(load_clip(str(tmp_path / "ck")).model.visual)
    weights = tmp_path / "ck" / WEIGHTS
    same = load_clip(f"{small_arch}-quickgelu:{weights}")
    x = torch.rand(2, 3, 32, 32)
    assert (
        torch.allclose(same.encode_pixels(x * 1.0), quick.encode_pixels(x), atol=1)
        and same.config["model_cfg"]["quick_gelu"]
    )
    with pytest.raises(ValueError, match=f"QuickGELU mismatch.*{small_arch}-quickgelu"):
        load_clip(f"{small_arch}:{weights}")


def test_the_tag_of_a_pretrained_model_decides_about_quick_gelu(monkeypatch):
    asked = {}

    def create_model(arch, pretrained=None, force_quick_gelu=False):
        asked.update(arch=arch, pretrained=pretrained, quick=force_quick_gelu)
        model = load_clip("tiny-vit").model
        model.visual.preprocess_cfg = {"mean": (0.1, 0.2, 0.3), "std": (1, 1, 1), "interpolation": "bicubic"}
        return model

    monkeypatch.setattr(open_clip, "create_model", create_model)
    clip = load_clip("ViT-B-32:openai")
    assert asked == {"arch": "ViT-B-32", "pretrained": "openai", "quick": True}
    assert clip.config["model_cfg"]["quick_gelu"] is True and torch.allclose(
        clip.mean.flatten(), torch.tensor([0.1, 0.2, 0.3])
    )
    load_clip("ViT-B-32:laion2b_s34b_b79k")
    assert asked["quick"] is False
    load_clip("ViT-B-32-quickgelu:openai")
    assert asked["quick"] is True


def test_zero_shot_classifier(clip):
    names = ["cat", "dog", "ship"]
    classifier = ZeroShotClassifier(clip, names, ["a photo of a {}.", "one {}"])
    x = torch.rand(5, 3, 32, 32)
    each = torch.stack([clip.encode_text([t.format(n) for n in names]) for t in classifier.templates]).mean(0)
    expected = clip.logit_scale * clip.encode_pixels(x) @ F.normalize(each, dim=1).T
    assert torch.allclose(classifier(x), expected, atol=1e-5)
    assert torch.allclose(classifier.embed(x) @ classifier.head(), classifier(x))
    assert classifier.head().shape == (64, 3)
    assert ZeroShotClassifier(clip, names, "openai").templates == templates("openai")
    assert "text" not in classifier.state_dict(), "derived, not stored"


def test_text_is_encoded_once(clip):
    calls = []
    classifier = ZeroShotClassifier(clip, ["a", "b"])
    clip.model.transformer.register_forward_hook(lambda *_: calls.append(1))
    classifier(torch.rand(2, 3, 32, 32))
    assert not calls


def test_bad_classifiers(clip):
    with pytest.raises(ValueError, match="class_names is empty"):
        ZeroShotClassifier(clip, [])
    with pytest.raises(ValueError, match="must contain {}"):
        ZeroShotClassifier(clip, ["a"], ["a photo"])
    with pytest.raises(ValueError, match="unknown templates"):
        ZeroShotClassifier(clip, ["a"], "a photo")


def test_an_ensemble_averages_log_probabilities():
    torch.manual_seed(0)
    first, second = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
    x = torch.randn(5, 6)
    expected = (first(x).softmax(1) * second(x).softmax(1)).sqrt()
    ensemble = Ensemble([first, second])
    torch.testing.assert_close(ensemble(x).softmax(1), expected / expected.sum(1, keepdim=True))
    assert len(list(ensemble.parameters())) == 4  # what an attack has to freeze
    with pytest.raises(ValueError, match="at least one model"):
        Ensemble([])
    with pytest.raises(ValueError, match=r"same classes, got logits \[5, 4\], \[5, 3\]"):
        Ensemble([first, torch.nn.Linear(6, 3)])(x)


@pytest.mark.parametrize("spec", ["tiny-vit", "tiny-rn"])
@pytest.mark.parametrize("kind", ["bf16", "pure_bf16", "fp16"])
def test_models_with_weights_of_16_bits_are_attacked_in_fp32_pixels(spec, kind):
    from open_clip.model import convert_weights_to_lp

    from rvlm.attacks import pgd

    wide, clip = load_clip(spec), load_clip(spec)
    if kind == "pure_bf16":
        clip.model.bfloat16()
    else:
        convert_weights_to_lp(clip.model, torch.bfloat16 if kind == "bf16" else torch.float16)
    names = ["zero", "one", "two"]
    narrow, plain = ZeroShotClassifier(clip, names).eval(), ZeroShotClassifier(wide, names).eval()
    assert clip.dtype == (torch.float16 if kind == "fp16" else torch.bfloat16) and wide.dtype == torch.float32
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    slopes = []
    for model in (narrow, plain):
        leaf = x.clone().requires_grad_()
        embedding = model.embed(leaf)
        assert embedding.dtype == torch.float32 and model(x).dtype == torch.float32
        weight = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
        slopes.append(torch.autograd.grad((embedding * weight).sum(), leaf)[0])
    assert slopes[0].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*(slope.flatten(1) for slope in slopes)).min() > 0.98
    torch.testing.assert_close(narrow.embed(x), plain.embed(x), rtol=0, atol=0.03)
    result = pgd(narrow, x, steps=3, return_info=True)
    assert result.x_adv.dtype == result.loss.dtype == torch.float32 and result.zero_gradients == 0
