"""Analyses of towers: their formulas, what they must not change, and the files that the command writes."""

import json

import pytest
import torch

from rvlm import cli
from rvlm.analysis import (
    attention_map,
    cka_matrix,
    drift,
    insensitivity,
    linear_cka,
    replacements,
    spectral_shift,
    units,
)
from rvlm.data import load_data
from rvlm.evaluation import evaluate
from rvlm.models import Adapter, ZeroShotClassifier, apply_adapter, load_clip
from rvlm.models.adapter import AdapterConfig


@pytest.fixture(scope="module")
def data():
    return load_data("digits", "test", limit=24)


@pytest.fixture
def pair():
    return load_clip("tiny-vit", seed=1), load_clip("tiny-vit", seed=2)


def noise(n, p, seed=0):
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cka_is_its_formula_and_does_not_feel_rotation_and_scale():
    x, y = noise(40, 5), noise(40, 7, 1) + 1
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert linear_cka(x, y) == pytest.approx(expected.item(), rel=1e-9)
    rotation = torch.linalg.qr(noise(7, 7, 2)).Q
    for unbiased in (False, True):
        assert linear_cka(x, 3 * x + 2, unbiased) == pytest.approx(1, abs=1e-9)
        assert linear_cka(x, 5 * y @ rotation, unbiased) == pytest.approx(linear_cka(x, y, unbiased), rel=1e-9)
    wide = noise(20, 50)  # fewer samples than dimensions: through the gram matrices
    a, b = wide - wide.mean(0), y[:20] - y[:20].mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert linear_cka(wide, y[:20]) == pytest.approx(expected.item(), rel=1e-9)


def test_the_unbiased_estimator_sees_nothing_in_noise_and_may_be_taken_in_parts():
    x, y = noise(100, 400), noise(100, 400, 1)
    assert linear_cka(x, y) > 0.7 and abs(linear_cka(x, y, unbiased=True)) < 0.05
    shared = noise(600, 20, 2)
    x, y = shared + 0.5 * noise(600, 20, 3), shared + 0.5 * noise(600, 20, 4)
    whole = linear_cka(x, y, unbiased=True)
    assert linear_cka(x, y, unbiased=True, batch_size=50) == pytest.approx(whole, abs=0.03)
    for bad in ((x, y[:5]), (x[0], y[0])):
        with pytest.raises(ValueError, match="of the same samples"):
            linear_cka(*bad)
    with pytest.raises(ValueError, match="at least 4 samples"):
        linear_cka(x, y, unbiased=True, batch_size=3)


def test_cka_of_layers(pair, data):
    first, second = pair
    values, ours, theirs = cka_matrix(first, first, data)
    assert ours == theirs == ["B1", "B2", "B3"]
    torch.testing.assert_close(values.diagonal(), torch.ones(3))
    torch.testing.assert_close(values, values.T)
    for tokens in ("cls", "mean", "all"):
        assert (cka_matrix(first, second, data, tokens)[0] <= 1).all()
    whole = cka_matrix(first, second, data, batch_size=24)[0]
    torch.testing.assert_close(cka_matrix(first, second, data, batch_size=5)[0], whole, rtol=1e-3, atol=1e-4)
    resnet = load_clip("tiny-rn")
    values, ours, _ = cka_matrix(resnet, first, data, "mean")
    assert values.shape == (4, 3) and ours == ["layer1", "layer2", "layer3", "layer4"]
    with pytest.raises(ValueError, match="tiny-rn has no class token: choose tokens='mean'"):
        cka_matrix(resnet, first, data)
    with pytest.raises(ValueError, match="tokens must be one of cls, mean, all"):
        cka_matrix(first, second, data, "patch")
    assert not any(module._forward_hooks for clip in (*pair, resnet) for module in clip.modules())


def test_units_are_all_of_the_tower_once(pair):
    found = units(pair[0])
    assert list(found) == ["Emb", "B1-Attn", "B1", "B2", "B3", "Head"]
    names = [name for group in found.values() for name in group]
    assert sorted(names) == sorted(pair[0].model.visual.state_dict())
    assert "conv1.weight" in found["Emb"] and "transformer.resblocks.0.attn.in_proj_weight" in found["B1-Attn"]
    assert "transformer.resblocks.0.ln_2.weight" in found["B1"] and "proj" in found["Head"]
    with pytest.raises(ValueError, match="expected a VisionTransformer"):
        units(load_clip("tiny-rn"))


@pytest.mark.parametrize("cumulative", [True, False])
def test_replacements_end_where_they_should(pair, data, cumulative):
    base, robust = pair
    before = [{key: t.clone() for key, t in clip.state_dict().items()} for clip in pair]
    found = replacements(base, robust, data, cumulative=cumulative, attack="fgsm", eps="8/255", progress=False)
    assert found.steps == ["base", "Emb", "B1-Attn", "B1", "B2", "B3", "Head"]
    hybrid = load_clip("tiny-vit", seed=1)
    names = found.steps[1:] if cumulative else ["Head"]
    theirs = robust.model.visual.state_dict()
    hybrid.model.visual.load_state_dict(
        hybrid.model.visual.state_dict() | {name: theirs[name] for unit in names for name in units(base)[unit]}
    )
    classifier = ZeroShotClassifier(hybrid, data.class_names, "plain")
    expected = evaluate(classifier, data, attack="fgsm", eps="8/255", progress=False)
    assert torch.equal(found.white_box[-1].pred_clean, expected.pred_clean)
    assert found.white_box[-1].target == "white-box" and found.transfer[-1].target == "transfer"
    assert torch.equal(found.white_box[0].pred_adv, found.transfer[0].pred_adv), "the base's own images"
    for clip, state in zip(pair, before, strict=True):
        assert all(torch.equal(t, state[key]) for key, t in clip.state_dict().items())
    with pytest.raises(ValueError, match="different vision towers"):
        replacements(base, load_clip("tiny-rn"), data)


def test_adapters_are_refused_or_left_out(pair, data):
    base, adapted = load_clip("tiny-vit", seed=1), pair[1]
    plain = cka_matrix(base, adapted, data, "mean")[0]
    rows = torch.zeros(1, 3, 96)
    apply_adapter(adapted, Adapter(AdapterConfig.of(adapted), prompts=rows))
    for call in (drift, spectral_shift, lambda *towers: replacements(*towers, data)):
        with pytest.raises(ValueError, match="has an adapter, which is no part of the weights"):
            call(base, adapted)
    with pytest.raises(ValueError, match="has prompts, whose share of the attention"):
        attention_map(adapted, data.batch(slice(0, 1))[0])
    assert cka_matrix(base, adapted, data, "all")[0].isfinite().all()
    assert not torch.allclose(cka_matrix(base, adapted, data, "mean")[0], plain)
    assert 0 < insensitivity(adapted, data) < 1


def test_drift(pair):
    base, robust = pair
    assert set(drift(base, base).values()) == {0.0}
    with torch.no_grad():
        for p in (twice := load_clip("tiny-vit", seed=1)).model.visual.parameters():
            p.mul_(2)
    assert all(value == pytest.approx(1.0) for value in drift(base, twice).values())


def test_spectral_shift(pair):
    base, _ = pair
    assert spectral_shift(base, base).abs().max() == 0
    changed = load_clip("tiny-vit", seed=1)
    with torch.no_grad():
        changed.model.visual.conv1.weight.mul_(3)
    torch.testing.assert_close(spectral_shift(base, changed), torch.full((8, 8), 2.0))
    with torch.no_grad():  # the mean of a filter is its frequency 0
        changed.model.visual.conv1.weight.copy_(base.model.visual.conv1.weight).add_(0.1)
    raw = spectral_shift(base, changed, "raw").abs()
    assert raw[4, 4] > 1 and raw.flatten().sort().values[-2] < 1e-5
    with pytest.raises(ValueError, match="normalise must be relative or raw"):
        spectral_shift(base, base, "log")
    with pytest.raises(ValueError, match="no patch embeddings of one shape"):
        spectral_shift(base, load_clip("tiny-rn"))


@pytest.mark.parametrize("block", [0, 1])
def test_attention_maps_are_those_of_the_module(pair, data, block):
    clip, x = pair[0], data.batch(slice(0, 3))[0]
    seen = []
    module = clip.model.visual.transformer.resblocks[block]
    handle = module.ln_1.register_forward_hook(lambda m, given, out: seen.append(out))
    clip(x)
    handle.remove()
    _, weights = module.attn(seen[0], seen[0], seen[0], need_weights=True)  # the mean of the heads
    torch.testing.assert_close(attention_map(clip, x, block).flatten(1), weights[:, 0, 1:].detach())
    received = attention_map(clip, x, block, "received").flatten(1)
    torch.testing.assert_close(received, weights.mean(1)[:, 1:].detach())
    with pytest.raises(ValueError, match="reduce must be cls or received"):
        attention_map(clip, x, block, "max")


def test_insensitivity(pair, data):
    clip = pair[0]
    assert 0 < insensitivity(clip, data, batch_size=7) < 1
    assert insensitivity(clip, data, batch_size=7) == pytest.approx(insensitivity(clip, data), rel=1e-5)
    with torch.no_grad():
        clip.model.visual.transformer.resblocks[0].attn.out_proj.weight.zero_()
        clip.model.visual.transformer.resblocks[0].attn.out_proj.bias.fill_(0.3)
    assert insensitivity(clip, data) == pytest.approx(1.0)


@pytest.mark.parametrize("what", ["cka", "replace", "spectrum", "attention", "insensitivity", "drift"])
def test_the_command(what, tmp_path, capsys):
    load_clip("tiny-vit", seed=2).save(tmp_path / "other")
    flags = ["--models", f"tiny-vit,{tmp_path}/other", "--limit", "8", "--attack", "fgsm", "--out", str(tmp_path)]
    assert cli.main(["analyze", what, *flags]) == 0
    record = json.loads((tmp_path / "result" / f"{what}.json").read_text())
    assert record["what"] == what and record["data"]["samples"] == 8 and len(record["models"]) == 2
    assert (tmp_path / f"{what}.png").stat().st_size > 1000 and (tmp_path / f"{what}.csv").read_text()
    assert "written to" in capsys.readouterr().out


def test_the_command_on_bad_input(capsys, monkeypatch):
    assert cli.main(["analyze", "magic"]) == 2
    assert "expected transfer, cka, replace" in capsys.readouterr().err
    assert cli.main(["analyze", "cka", "--models", "tiny-vit"]) == 2
    assert "a base and a robust one, got tiny-vit" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["analyze", "drift"]) == 2
    assert "runs in one process" in capsys.readouterr().err
