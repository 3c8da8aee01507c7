"""CLIPs in other libraries' files and other scripts' checkpoints: the same features, or an error that names why not."""

import importlib.util
import json
import sys

import open_clip
import pytest
import torch
from torch.nn import functional as F

from rvlm.cli import main
from rvlm.models import Adapter, Clip, apply_adapter, convert, load_clip, tiny
from rvlm.models.adapter import AdapterConfig
from rvlm.models.convert import difference, read_back

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
TEXTS = ["a photo of a cat.", "two dogs on a beach"]


def built(**model_cfg) -> Clip:
    """Tiny-vit with other settings and random weights, also where it begins with ones and zeros."""
    config = tiny.ARCHITECTURES["tiny-vit"] | model_cfg
    generator = torch.Generator().manual_seed(0)
    model = open_clip.CLIP(**json.loads(json.dumps(config))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    return Clip(model, tokenizer, name="built", config={"model_cfg": config, "preprocess_cfg": preprocess})


def vision(**settings) -> dict:
    return tiny.ARCHITECTURES["tiny-vit"]["vision_cfg"] | settings


@needs_transformers
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("shape", [{}, {"head_width": 48, "mlp_ratio": 2.7, "patch_size": 16, "layers": 2}])
def test_from_open_clip_to_transformers_and_back(tmp_path, quick, shape):
    from transformers import CLIPModel, CLIPProcessor

    ours = built(quick_gelu=quick, vision_cfg=vision(**shape))
    folder = convert(ours, tmp_path / "hf", "hf")
    theirs, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    assert theirs.config.vision_config.hidden_act == theirs.config.text_config.hidden_act
    assert theirs.config.vision_config.hidden_act == ("quick_gelu" if quick else "gelu")
    x = torch.rand(3, 3, 32, 32)
    words = processor(text=TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        images = theirs.get_image_features(pixel_values=(x - ours.mean) / ours.std).pooler_output
        torch.testing.assert_close(F.normalize(images, dim=-1), ours(x), rtol=0, atol=1e-5)
        texts = F.normalize(theirs.get_text_features(**words).pooler_output, dim=-1)
        torch.testing.assert_close(texts, ours.encode_text(TEXTS), rtol=0, atol=1e-5)
    assert (
        list(processor.image_processor.image_mean) == [0.4, 0.5, 0.6] and not processor.image_processor.do_center_crop
    )
    loaded = load_clip(f"hf:{folder}")
    assert difference(ours, loaded) <= 1e-5 and loaded.logit_scale == ours.logit_scale
    again = load_clip(str(convert(loaded, tmp_path / "again", "open_clip")))
    assert again.config["model_cfg"].get("quick_gelu") is quick and ("QuickGELU" in repr(again.visual)) is quick
    assert again.config["preprocess_cfg"] == ours.config["preprocess_cfg"]
    assert all(torch.equal(t, again.model.state_dict()[name]) for name, t in ours.model.state_dict().items())


@needs_transformers
def test_what_transformers_built_becomes_open_clips(tmp_path):
    """A model that never was open_clip's, with the end of text numbered as old configs do."""
    from transformers import CLIPConfig, CLIPModel

    tokens = convert(built(), tmp_path / "tokens", "hf")
    common = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "quick_gelu", "projection_dim": 24}
    config = CLIPConfig(
        projection_dim=24,
        vision_config=common | {"hidden_size": 64, "intermediate_size": 130, "image_size": 48, "patch_size": 16},
        text_config=common
        | {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 20, "eos_token_id": 2},
    )
    theirs = CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path / "tokens")
    loaded = load_clip(f"hf:{tokens}")
    again = load_clip(str(convert(loaded, tmp_path / "ours", "open_clip")))
    assert difference(loaded, again) <= 1e-5 and again.size == 48 and "QuickGELU" in repr(again.visual)
    for field, value, message in (
        ("hidden_act", "relu", "activation relu"), ("layer_norm_eps", 1e-6, "layer_norm_eps 1e-06"),
        ("eos_token_id", 7, "eos_token_id 7"),
    ):  # fmt: skip
        side = loaded.model.config.text_config
        before = getattr(side, field)
        setattr(side, field, value)
        with pytest.raises(ValueError, match=message):
            convert(loaded, tmp_path / "no", "open_clip")
        setattr(side, field, before)
    loaded.tokenizer.tokenizer.add_tokens(["<cat>"])
    with pytest.raises(ValueError, match="a tokenizer of its own"):
        convert(loaded, tmp_path / "no", "open_clip")


@needs_transformers
def test_what_transformers_has_no_place_for(tmp_path):
    for config, message in (
        ({"vision_cfg": vision(ls_init_value=0.1)}, "no place for vision_cfg.ls_init_value"),
        ({"vision_cfg": vision(pool_type="avg")}, "no place for vision_cfg.pool_type"),
        ({"vision_cfg": tiny.ARCHITECTURES["tiny-rn"]["vision_cfg"]}, "vision_cfg.layers of a ResNet"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(built(**config), tmp_path / "no", "hf")
    clip = built()
    clip.config["preprocess_cfg"]["resize_mode"] = "longest"
    with pytest.raises(ValueError, match="images resized by longest, bilinear"):
        convert(clip, tmp_path / "no", "hf")
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_converted(tmp_path, monkeypatch):
    clip = load_clip("tiny-vit")
    with pytest.raises(ValueError, match="cannot convert to 'onnx': expected open_clip, hf, visual"):
        convert(clip, tmp_path / "new", "onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is there and not empty"):
        convert(clip, tmp_path, "open_clip")
    with pytest.raises(ValueError, match="has no open_clip config"):
        convert(Clip.wrap(clip.model, None), tmp_path / "new", "visual")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "rvlm\[hf\]"'):
        convert(clip, tmp_path / "new", "hf")
    with pytest.raises(ValueError, match="has an adapter.*convert its base"):
        convert(apply_adapter(clip, Adapter(AdapterConfig.of(clip, cutoff=6.0))), tmp_path / "new", "open_clip")
    assert not (tmp_path / "new").exists()


def layouts(state: dict) -> dict:
    """A vision tower as training scripts save it."""
    visual = {f"visual.{name}": value for name, value in state.items()}
    prompter = {"module.pad_up": torch.zeros(1)}
    return {
        "RobustVLM, MMT-ARD": state,
        "TeCoA": {"epoch": 3, "state_dict": prompter, "vision_encoder_state_dict": state, "best_acc1": 0.5},
        "state_dict": {"state_dict": state},
        "DataParallel": {"state_dict": {f"module.{name}": value for name, value in visual.items()}},
        "a wrapper, compiled": {f"module._orig_mod.model.{name}": value for name, value in state.items()},
        "visual": visual,
        "half": {name: value.half() for name, value in state.items()},
    }


def test_vision_towers_of_training_scripts(tmp_path):
    trained, base = built(), load_clip("tiny-vit")
    x = torch.rand(2, 3, 32, 32)
    for name, found in layouts(trained.visual.state_dict()).items():
        torch.save(found, tmp_path / "tower.pt")
        clip = load_clip(f"tiny-vit+weights={tmp_path / 'tower.pt'}")
        for key, value in clip.visual.state_dict().items():
            tolerance = 1e-3 if name == "half" else 0
            torch.testing.assert_close(value, trained.visual.state_dict()[key], rtol=tolerance, atol=tolerance)
        assert torch.equal(clip.encode_text(TEXTS), base.encode_text(TEXTS)), "the base's"
        assert not torch.equal(clip(x), base(x))
    whole = {f"module.{name}": value for name, value in trained.model.state_dict().items()}
    torch.save({"state_dict": whole}, tmp_path / "whole.pt")
    clip = load_clip(f"tiny-vit+weights={tmp_path / 'whole.pt'}")
    assert torch.equal(clip.encode_text(TEXTS), trained.encode_text(TEXTS)), "its own"
    assert load_clip(str(clip.save(tmp_path / "saved"))).name == str(tmp_path / "saved")


def test_checkpoints_that_do_not_fit(tmp_path):
    file = tmp_path / "tower.pt"

    def fails(found, *messages):
        torch.save(found, file)
        with pytest.raises(ValueError) as error:
            load_clip(f"tiny-vit+weights={file}")
        assert all(message in str(error.value) for message in messages), error.value

    state = dict(load_clip("tiny-vit").visual.state_dict())
    fails(
        {k: v for k, v in state.items() if k != "proj"} | {"pad": torch.zeros(1)},
        "1 missing: proj",
        "1 unexpected: pad",
    )
    fails(state | {"proj": torch.zeros(96, 8)}, "1 of another shape: proj [96, 8] instead of [96, 64]")
    fails(load_clip("tiny-rn").visual.state_dict(), "missing: class_embedding", "more; ", "unexpected: attnpool.c_proj")
    fails({"epoch": 3}, "holds no weights", "it has epoch")
    fails([1], "holds a list")
    fails({"state_dict": state, "args": Adapter}, "never run")
    with pytest.raises(FileNotFoundError, match="no file /nope.pt"):
        load_clip("tiny-vit+weights=/nope.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"12")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_clip(f"tiny-vit+weights={tmp_path / 'broken.safetensors'}")


def test_an_architecture_with_a_tower_alone_asks_for_the_texts(tmp_path):
    (tmp_path / "rvlm-convert.json").write_text(json.dumps(tiny.ARCHITECTURES["tiny-vit"]))
    open_clip.add_model_config(tmp_path / "rvlm-convert.json")
    trained = built()
    torch.save(trained.visual.state_dict(), tmp_path / "tower.pt")
    with pytest.raises(ValueError, match=r"a vision tower alone.*rvlm-convert:openai\+weights="):
        load_clip(f"rvlm-convert:{tmp_path / 'tower.pt'}")
    whole = {f"_orig_mod.{name}": value for name, value in trained.model.state_dict().items()}
    torch.save(whole, tmp_path / "whole.pt")
    clip = load_clip(f"rvlm-convert:{tmp_path / 'whole.pt'}")
    assert torch.equal(clip.model.visual.proj, trained.model.visual.proj)
    torch.save(whole | {"_orig_mod.more": torch.zeros(1)}, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match="1 unexpected: more"):
        load_clip(f"rvlm-convert:{tmp_path / 'whole.pt'}")


@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_a_vision_tower_alone(name, tmp_path):
    clip = load_clip(name, seed=3)
    folder = convert(clip, tmp_path, "visual")
    state = torch.load(folder / "visual.pt", weights_only=True)
    assert state.keys() == clip.visual.state_dict().keys()
    assert difference(clip, read_back(clip, folder, "visual")) == 0
    assert torch.equal(
        load_clip(f"{name}+weights={folder / 'visual.pt'}").visual.conv1.weight, clip.visual.conv1.weight
    )


def test_the_command_writes_a_model_card(tmp_path, capsys):
    def run(*argv):
        return main([str(word) for word in argv])

    trained = tmp_path / "run"
    quick = ["--student", "tiny-vit", "--epochs", "1", "--limit", "32", "--eval_limit", "20", "--eval_attack", "fgsm"]
    assert run("train", "tecoa", *quick, "--out", trained) == 0
    more = ["--attack", "pgd-2", "--eps", "4/255", "--limit", "20", "--out", tmp_path / "eval"]
    assert (
        run("eval", "--model", trained, *more)
        == run("eval", "--model", "tiny-vit", *more[:-1], tmp_path / "other")
        == 0
    )
    (record,) = (trained / "result").glob("after*.json")
    assert run("repro", record, "--out", tmp_path / "repro") == 0
    runs = f"{trained},{tmp_path / 'eval'},{tmp_path / 'other'}"
    assert run("convert", trained, tmp_path / "open", "--runs", runs) == 0
    assert "embeddings differ by at most 0" in capsys.readouterr().out
    card = (tmp_path / "open" / "README.md").read_text()
    assert "std 0.5, 0.5, 0.5; GELU in its transformers." in card
    assert "Base: `tiny-vit`. Method: tecoa, preset rvlm." in card and "library_name: open_clip" in card
    rows = [line for line in card.splitlines() if line.startswith("| digits")]
    assert len(rows) == 2 and "| fgsm | white-box | 20 | partial |" in rows[0], "of these weights alone"
    assert "| 4/255 | linf | pgd-2 | white-box | 20 |" in rows[1] and "batch_size:" in card and "device" not in card
    assert run("convert", trained, tmp_path / "rerun", "--runs", f"{trained},{tmp_path / 'repro'}") == 0
    assert "Method: tecoa" in (tmp_path / "rerun" / "README.md").read_text(), "a rerun trains nothing"
    assert run("convert", tmp_path / "open", tmp_path / "tower", "--to", "visual") == 0
    assert "Not measured" in (tmp_path / "tower" / "README.md").read_text()
    tower = tmp_path / "tower" / "visual.pt"
    assert run("convert", tower, tmp_path / "no") == 2
    assert "--base ViT-B-32:openai" in capsys.readouterr().err
    assert run("convert", tower, tmp_path / "again", "--base", "tiny-vit") == 0
    assert difference(load_clip(str(tmp_path / "again")), load_clip(str(trained))) == 0, "the text tower never learned"
    assert run("convert") == 2 and "rvlm convert SRC DST" in capsys.readouterr().err
