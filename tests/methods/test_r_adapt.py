"""R-Adapt: where anchors come from, what learns, the losses against their formulas, which images are learned from."""

import copy
import dataclasses
import json

import open_clip
import pytest
import torch
from torch.nn import functional as F

from rvlm import cli
from rvlm.attacks import pgd
from rvlm.data import load_data
from rvlm.methods import Batch, build_method
from rvlm.models import Adapter, Clip, ZeroShotClassifier, apply_adapter, load_clip, tiny
from rvlm.models.adapter import AdapterConfig
from rvlm.models.towers import attention_output
from rvlm.ops import gaussian_filter
from rvlm.ranks import Ranks
from rvlm.training import train

QUICK = {"epochs": 1, "batch_size": 32, "warmup_steps": 1, "steps": 2}
WHITE = torch.ones(1, 3, 32, 32)


@pytest.fixture(scope="module")
def data():
    return load_data("digits", "train", limit=64)


def build(**settings):
    return build_method("r_adapt", **(QUICK | settings))


def test_anchors_without_training(data):
    student, guide = load_clip("tiny-vit", seed=1), load_clip("tiny-vit", seed=2)
    own, theirs = (attention_output(clip, WHITE)[0] for clip in (student, guide))
    for settings, expected, alpha in (
        ({"anchor": "white"}, own, 1.6),
        ({"anchor": "model", "guide": guide}, theirs, 1.2),
        ({"anchor": "model", "guide": guide, "alpha_anchor": 0.5}, theirs, 0.5),
    ):
        if student.adapter is not None:
            student.adapter.detach(student)
        result = train(student, data, build(**settings), progress=False)
        adapter = result.student.adapter
        assert torch.equal(adapter.anchor, expected) and adapter.config.alpha == alpha
        assert result.images == 0 and result.history == []
        assert adapter.config.cutoff == pytest.approx(40 * 32 / 224)
    with pytest.raises(ValueError, match="has an adapter already"):
        train(student, data, build(anchor="white"), progress=False)
    with pytest.raises(ValueError, match="tecoa trains weights of tiny-vit, which has an adapter"):
        train(student, data, build_method("tecoa", epochs=1), progress=False)
    student.adapter.detach(student)
    train(student, data, build(anchor="white", cutoff=6.0, cutoff_at=None, block=1), progress=False)
    config = student.adapter.config
    assert (config.cutoff, config.block, config.base, config.size) == (6.0, 1, "tiny-vit", 32)
    assert build(anchor="white").config.cutoff_at == 224
    with pytest.raises(ValueError, match="no blocks that can be adapted"):
        train(load_clip("tiny-rn"), data, build(anchor="white"), progress=False)


@pytest.mark.parametrize(
    "adversary, site", [("offline", "out"), ("online", "out"), ("online", "heads"), ("online", "map")]
)
def test_the_anchor_alone_learns(data, adversary, site):
    student, before = load_clip("tiny-vit", seed=1), load_clip("tiny-vit", seed=1)
    own = attention_output(before, WHITE, site=site)[0]
    result = train(student, data, build(adversary=adversary, site=site, lr=1e-2, epochs=3), progress=False)
    assert all(torch.equal(t, student.model.state_dict()[key]) for key, t in before.model.state_dict().items())
    assert not torch.equal(student.adapter.anchor, own) and not student.adapter.anchor.requires_grad
    assert result.history[-1]["adv"] < result.history[0]["adv"]


@pytest.mark.parametrize("init, expected", [("white", "own"), ("zero", 0.0), ("model", "theirs")])
def test_what_a_learned_anchor_starts_from(data, init, expected):
    student, guide = load_clip("tiny-vit", seed=1), load_clip("tiny-vit", seed=2)
    method = build(init=init, guide=guide, adversary="online")
    values = {"own": attention_output(student, WHITE)[0], "theirs": attention_output(guide, WHITE)[0]}
    method.setup(student, data)
    assert torch.equal(student.adapter.anchor, values.get(expected, torch.zeros(17, 96)))
    assert student.adapter.config.source == f"learned from {init}"


@pytest.mark.parametrize("loss", ["l2_feat", "cos_feat", "ce", "kl_zs"])
@pytest.mark.parametrize("clean_weight", [0.0, 0.5])
def test_losses_are_their_formulas(data, loss, clean_weight):
    student, plain = load_clip("tiny-vit", seed=1), load_clip("tiny-vit", seed=1)
    method = build(loss=loss, clean_weight=clean_weight, adversary="online", templates="plain")
    method.setup(student, data)
    batch = Batch(*data.batch(slice(0, 8)))
    batch.x_adv = (batch.x + 0.05).clamp(0, 1)
    adv, clean = (student(v, method.unit_norm).detach() for v in (batch.x_adv, batch.x))
    head = (plain.logit_scale * plain.encode_text([f"a photo of a {name}." for name in data.class_names]).T).double()
    f0 = plain(batch.x, False).double()

    def distance(out):
        out = out.double()
        if loss == "l2_feat":
            return (out - f0).square().sum(1)
        if loss == "cos_feat":
            return 1 - F.cosine_similarity(out, f0)
        if loss == "ce":
            return F.cross_entropy(out @ head, batch.y, reduction="none")
        p = (F.normalize(f0, dim=1) @ head).log_softmax(1)
        return (p.exp() * (p - (out @ head).log_softmax(1))).sum(1)

    expected = (distance(adv) + clean_weight * distance(clean)).mean()
    got = method.loss(adv, clean if clean_weight else None, batch)
    assert got["total"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.allclose(method.attack(batch)(adv).double(), distance(adv), rtol=1e-3, atol=1e-5)


def test_offline_images_are_made_once_on_the_model_as_it_was(data):
    student = load_clip("tiny-vit", seed=1)
    plain = ZeroShotClassifier(load_clip("tiny-vit", seed=1), data.class_names, "digits")
    method = build(eps="4/255", steps=3, random_start=False)
    method.setup(student, data)
    method.prepare(Ranks())
    x, y, index = data.batch(slice(0, 32))
    expected = pgd(plain, x, y, eps=4 / 255, steps=3, random_start=False)
    made = method.adversary(Batch(x, y, index))
    assert (made - x).abs().max() <= 4 / 255 + 1e-6
    assert (made - expected).abs().gt(1e-6).float().mean() < 1e-3
    again = Batch(*data.batch(torch.tensor([5, 0])))
    torch.testing.assert_close(method.adversary(again), made[[5, 0]])
    online = build(adversary="online")
    online.setup(load_clip("tiny-vit"), data)
    online.prepare(Ranks())
    assert online.adversary(again) is None


def own_labels(data, clip):
    """The data with the model's own answers as labels, so that it is right everywhere."""
    model = ZeroShotClassifier(clip, data.class_names, "digits")
    with torch.no_grad():
        return dataclasses.replace(data, y=model(data.batch(slice(None))[0]).argmax(1))


@pytest.mark.parametrize("settings, failed, detail", [
    ({}, None, "cutoff 5.71 at 32 px is 40 at 224 px"),
    ({"cutoff": 60.0}, None, "is 60 at 224 px"),
    ({"cutoff": None}, None, ""),
    ({"cutoff_at": None}, "filter_scale", "is 280 at 224 px: below 10 clean accuracy is lost, above 60"),
    ({"cutoff": 5.0}, "filter_scale", "is 5 at 224 px"),
    ({"mix": "lerp", "alpha_anchor": 0.9}, None, "leaves 10% of the live attention"),
    ({"mix": "lerp", "alpha_anchor": 1.0}, "live_attention", "leaves 0% of the live attention: use add"),
    ({"mix": "lerp"}, "live_attention", "lerp with alpha 1.6 leaves -60%"),
])  # fmt: skip
def test_signs_of_bad_settings(data, settings, failed, detail):
    checks = train(load_clip("tiny-vit", seed=1), data, build(anchor="white", **settings), progress=False).checks
    assert [check["id"] for check in checks if not check["ok"]] == ([failed] if failed else [])
    assert any(detail in check["detail"] for check in checks)


@pytest.mark.parametrize("lr, learned", [(1e-2, True), (0.0, False)])
def test_a_sign_of_an_anchor_that_has_not_learned(data, lr, learned):
    checks = train(load_clip("tiny-vit", seed=1), data, build(lr=lr, epochs=3), progress=False).checks
    (found,) = (check for check in checks if check["id"] == "anchor_learned")
    assert found["ok"] == learned and found["detail"].endswith("lower lr, or train longer") != learned
    white = train(load_clip("tiny-vit", seed=1), data, build(anchor="white"), progress=False).checks
    assert "anchor_learned" not in [check["id"] for check in white]


@pytest.mark.parametrize("settings, remedy", [
    ({"cutoff": None, "alpha_anchor": 0.0}, None),
    ({"cutoff": None, "alpha_anchor": 300.0}, "lower alpha_anchor"),
    ({"cutoff": 0.5, "alpha_anchor": 0.0}, "raise cutoff"),
    ({"anchor": "learned", "cutoff": None, "alpha_anchor": 300.0}, "lower alpha_anchor, or raise clean_weight"),
])  # fmt: skip
def test_a_sign_of_lost_clean_accuracy(data, settings, remedy):
    student = load_clip("tiny-vit", seed=2)  # which tells the digits apart, if wrongly
    data = own_labels(data, student)
    method = build(**({"anchor": "white"} | settings))
    found = train(student, data, method, progress=False).checks[-1]
    assert found["id"] == "clean_kept" and found["ok"] == (remedy is None)
    assert "100.0% as it was" in found["detail"] and (remedy is None or found["detail"].endswith(remedy))
    assert method.undefended.adapter is None and student.adapter is not None, "left as they were"


def test_a_step_runs_on_the_fused_block(data):
    from torch.profiler import profile

    with profile() as seen:
        train(load_clip("tiny-vit"), data, build(adversary="online"), progress=False)
    ran = {event.key for event in seen.key_averages()}
    assert any("anchored_residual" in key for key in ran), sorted(key for key in ran if "rvlm" in key)


@pytest.mark.parametrize("settings, message", [
    ({"anchor": "black"}, "anchor must be one of white, model, learned"),
    ({"loss": "l1"}, "loss must be one of l2_feat, cos_feat, ce, kl_zs"),
    ({"adversary": "both"}, "adversary must be one of offline, online"),
    ({"clean_weight": -1.0}, "clean_weight must be at least 0"),
    ({"alpha_anchor": 0.0}, "alpha_anchor must not be 0 for an anchor that is learned"),
    ({"site": "heads", "mix": "normadd"}, "site must be one of out, heads, map, and out for normadd"),
    ({"momentum": 0.9}, "momentum is for adversary='online'"),
])  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_a_guide_of_another_architecture(data):
    config = copy.deepcopy(tiny.ARCHITECTURES["tiny-vit"])
    config["vision_cfg"]["width"] = 64
    wide = Clip.wrap(open_clip.CLIP(**config), open_clip.SimpleTokenizer(context_length=16), "wide")
    with pytest.raises(ValueError, match=r"the guide wide gives an anchor \[17, 64\], and tiny-vit needs \[17, 96\]"):
        train(load_clip("tiny-vit"), data, build(anchor="model", guide=wide), progress=False)


def enlarged(clip):
    """The same weights for images of twice the size: the grid of position embeddings is interpolated, as usual."""
    config = copy.deepcopy(tiny.ARCHITECTURES["tiny-vit"])
    config["vision_cfg"]["image_size"] = 2 * clip.size
    state = clip.model.state_dict()
    first, grid = state["visual.positional_embedding"].split([1, 16])
    grid = F.interpolate(grid.T.reshape(1, 96, 4, 4), (8, 8), mode="bicubic", align_corners=False)
    state["visual.positional_embedding"] = torch.cat([first, grid.reshape(96, 64).T])
    large = open_clip.CLIP(**config)
    large.load_state_dict(state)
    return Clip(large, clip.tokenizer, name="large", config=clip.config | {"model_cfg": config}).eval()


def test_a_learned_adapter_goes_to_another_resolution(data, tmp_path):
    small = load_clip("tiny-vit", seed=1)
    large = enlarged(small)
    large.save(tmp_path / "large")
    train(small, data, build(lr=1e-2, epochs=2), out=tmp_path / "run", progress=False)
    moved = load_clip(f"{tmp_path}/large+adapter={tmp_path}/run")
    anchor = small.adapter.anchor
    grid = F.interpolate(anchor[1:].T.reshape(1, 96, 4, 4), (8, 8), mode="bilinear", align_corners=False)
    assert torch.equal(moved.adapter.anchor, torch.cat([anchor[:1], grid.reshape(96, 64).T]))
    x = torch.rand(2, 3, 64, 64)
    expected = gaussian_filter(x, 40 * 64 / 224)
    torch.testing.assert_close(moved.adapter.filter(x), expected)  # the blur that a run at this size would have
    apply_adapter(large, Adapter(AdapterConfig(base="", size=64, alpha=0.8), moved.adapter.anchor))
    torch.testing.assert_close(moved(x), large(expected))


def test_anchors_without_training_are_made_anew_at_another_resolution(data):
    """A white image at the new size: near the resized anchor, whose grid it has, but with its own positions."""
    small = load_clip("tiny-vit", seed=1)
    large = enlarged(small)
    for clip in (small, large):
        train(clip, data, build(anchor="white"), progress=False)
    assert large.adapter.anchor.shape == (65, 96) and large.adapter.config.size == 64
    assert large.adapter.config.cutoff == pytest.approx(2 * small.adapter.config.cutoff)
    anew = large.adapter.anchor
    large.adapter.detach(large)
    apply_adapter(large, Adapter(AdapterConfig(base="", size=32, alpha=1.6), small.adapter.anchor))
    resized = large.adapter.anchor
    assert not torch.equal(anew, resized)
    ours, theirs = (rows[1:].reshape(8, 8, 96) - rows[1:].mean(0) for rows in (anew, resized))
    alike, turned = ((ours * grid).sum() / ours.norm() / grid.norm() for grid in (theirs, theirs.transpose(0, 1)))
    assert alike > 0.5 > turned, "what differs between places is in its place"
    with pytest.raises(ValueError, match=r"the guide tiny-vit gives an anchor \[17, 96\], and large needs \[65, 96\]"):
        large.adapter.detach(large)
        train(large, data, build(anchor="model", guide=load_clip("tiny-vit")), progress=False)


def test_both_targets_are_reported(tmp_path):
    load_clip("tiny-vit", seed=5).save(tmp_path / "base")
    flags = f"train r_adapt --student {tmp_path}/base --limit 32 --epochs 1 --batch_size 32 --steps 1 --eval-limit 16"
    assert cli.main([*flags.split(), "--eval-attack", "pgd-1", "--out", str(tmp_path / "run")]) == 0
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert [(row["name"], row["target"]) for row in rows] == [
        ("before", "white-box"), ("after", "white-box"), ("after", "transfer"),
    ]  # fmt: skip
    assert len({row["record"] for row in rows}) == 3
    ids = [[c["id"] for c in json.loads((tmp_path / "run" / row["record"]).read_text())["checks"]] for row in rows]
    assert ["filter_scale" in there for there in ids] == [False, True, False]
    assert ["robust_beyond_transfer" in there for there in ids] == [False, False, True]
    spec = f"{tmp_path}/run"
    flags = ["--limit", "16", "--attack", "pgd-1", "--out", str(tmp_path / "eval")]
    assert cli.main(["eval", "--model", spec, *flags]) == 0
    (row,) = json.loads((tmp_path / "eval" / "summary.json").read_text())["rows"]
    assert row["clean"] == rows[1]["clean"]


def test_signs_are_printed(tmp_path, capsys):
    flags = "train r_adapt --student tiny-vit --anchor white --mix lerp --limit 8 --eval-limit 8 --eval-attack pgd-1"
    assert cli.main([*flags.split(), "--out", str(tmp_path)]) == 0
    assert "WARNING live_attention: lerp with alpha 1.6" in capsys.readouterr().err
