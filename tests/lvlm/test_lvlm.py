"""Small LVLMs with random weights, of the real classes: what they see, what they say, what attacks and adapters do."""

import json
import shutil
import sys

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from PIL import Image

from rvlm import cli
from rvlm.attacks import apgd, pgd
from rvlm.attacks.losses import given
from rvlm.lvlm import (
    AnswerLoss,
    evaluate_answers,
    load_lvlm,
    load_questions,
    token_f1,
    vqa_accuracy,
    white_adapter,
)  # fmt: skip
from rvlm.lvlm import evaluate as answers
from rvlm.lvlm.pixels import Pixels, QwenPixels
from rvlm.models import Adapter, apply_adapter
from rvlm.models.adapter import AdapterConfig
from rvlm.models.towers import attention_output, tower_of
from rvlm.models.weights import differing, settings_of, weights_sha

KINDS = ("llava", "qwen2_5_vl", "qwen3_vl")
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>",
           "<|im_start|>", "<|im_end|>", "<|video_pad|>"]  # fmt: skip
WORDS = SPECIAL + [f"w{k}" for k in range(40)]
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "vocab_size": len(WORDS), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
        "initializer_range": 0.3}  # fmt: skip
QWEN = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "depth": 3, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "initializer_range": 0.3}  # fmt: skip
TOKENS = {"image_token_id": 5, "video_token_id": 10, "vision_start_token_id": 6, "vision_end_token_id": 7}


def tokenizer(kind):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "llava":  # which begins texts, as Llama's does
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
    )  # fmt: skip


def model_and_processor(kind):
    torch.manual_seed(0)
    if kind == "llava":
        vision = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 3,
                  "image_size": 32, "patch_size": 8, "initializer_factor": 3.0}  # fmt: skip
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.LlamaConfig(**TEXT),
            image_token_id=4,
        )  # fmt: skip
        sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        return transformers.LlavaForConditionalGeneration(config), transformers.CLIPImageProcessor(**sizes)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = TEXT | {"rope_parameters": rope, "head_dim": 16}
    sizes = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 65536}}
    if kind == "qwen2_5_vl":
        vision = QWEN | {"window_size": 16, "fullatt_block_indexes": [1]}
        config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **TOKENS)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:
        vision = QWEN | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        config = transformers.Qwen3VLConfig(vision_config=vision, text_config=text, **TOKENS)
        model = transformers.Qwen3VLForConditionalGeneration(config)
        sizes |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return model, transformers.Qwen2VLImageProcessor(**sizes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind, as a user has it."""
    made = {}
    for kind in KINDS:
        made[kind] = tmp_path_factory.mktemp(kind)
        for part in (*model_and_processor(kind), tokenizer(kind)):
            part.save_pretrained(made[kind])
    return made


@pytest.fixture(params=KINDS)
def lvlm(request, folders):
    return load_lvlm(str(folders[request.param]), size=32)


@pytest.fixture
def x():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


QUESTIONS, ANSWERS = ["w1 w2", "w3", "w4 w5 w6 w7"], ["w8 w9", "w10", "w11 w12 w13"]


def anchored(lvlm, seed=0, **settings):
    anchor = torch.randn(tower_of(lvlm).shape("out"), generator=torch.Generator().manual_seed(seed)) / 2
    return Adapter(AdapterConfig(base="", size=32, **settings), anchor)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_sees_is_what_its_processor_makes(kind):
    _, processor = model_and_processor(kind)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = (Pixels if kind == "llava" else QwenPixels)(processor, 32)
    ours, theirs = pixels(images / 255), processor(images=list(images), return_tensors="pt")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "to the bit"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [20, 45, 100])
def test_resized_images_differ_by_a_level_at_most(kind, side):
    _, processor = model_and_processor(kind)
    images = torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = processor(images=list(images), return_tensors="pt")
    size = 32 if kind == "llava" else int(theirs["image_grid_thw"][0, 1]) * processor.patch_size
    ours = (Pixels if kind == "llava" else QwenPixels)(processor, size)(images / 255)
    level = 1 / (255 * min(processor.image_std))
    assert (ours["pixel_values"] - theirs["pixel_values"]).abs().max() <= 1.25 * level
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "pixel_values")


def test_pixels_are_in_the_graph(lvlm, x):
    leaf = x.double().requires_grad_()
    (grad,) = torch.autograd.grad(lvlm.see(leaf)["pixel_values"].sum(), leaf)
    copies = 1 if lvlm.family.tower.endswith("vision_tower") else 2  # every frame twice
    expected = copies / lvlm.pixels.std.double() * lvlm.pixels.levels
    torch.testing.assert_close(grad, expected.expand_as(grad), rtol=1e-5, atol=0)


def test_questions_are_read_as_the_models_processor_reads_them(lvlm, folders):
    """With the prompt without a template, and with a chat template like the models' own."""
    image, kind = Image.new("RGB", (32, 32)), lvlm.model.config.model_type
    _, images = model_and_processor(kind)
    if kind == "llava":
        processor = transformers.LlavaProcessor(
            images, lvlm.tokenizer, patch_size=8, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )  # fmt: skip
        token = "<image>"
    else:
        name = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}[kind]
        videos = transformers.Qwen2VLVideoProcessor if kind == "qwen2_5_vl" else transformers.Qwen3VLVideoProcessor
        processor = getattr(transformers, name)(images, lvlm.tokenizer, videos())
        token = "<|vision_start|><|image_pad|><|vision_end|>"
    theirs = processor(text=lvlm.family.prompt.format("w1 w2"), images=image, return_tensors="pt")
    ids = lvlm.asked("w1 w2")
    assert ids == theirs["input_ids"][0].tolist() and ids.count(lvlm.model.config.image_token_id) == lvlm.image_tokens
    if kind != "llava":
        assert torch.equal(lvlm.read([ids])["mm_token_type_ids"], theirs["mm_token_type_ids"].int())
    lvlm.tokenizer.chat_template = (
        "{% for m in messages %}w7 {% for c in m['content'] %}{% if c['type'] == 'image' %}" + token + " {% else %}"
        "{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}w8{% endif %}"
    )
    assert lvlm.asked("w1 w2") == lvlm.read([lvlm.asked("w1 w2")])["input_ids"][0].tolist()
    words = lvlm.tokenizer.decode([i for i in lvlm.asked("w1 w2") if i >= len(SPECIAL)])
    assert words.split() == ["w7", "w1", "w2", "w8"]
    assert lvlm.asked("w1 w2").count(2) == (kind == "llava"), "texts of Llama begin with a token of their own"


def test_in_bf16(folders, lvlm, x):
    low = load_lvlm(lvlm.name, dtype="bf16", size=32)
    apply_adapter(low, anchored(low, alpha=0.5, cutoff=8.0))
    loss, reference = AnswerLoss(low, QUESTIONS, ANSWERS), AnswerLoss(lvlm, QUESTIONS, ANSWERS)
    apply_adapter(lvlm, anchored(lvlm, alpha=0.5, cutoff=8.0))
    assert loss(x).dtype == torch.float32 and next(low.model.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(loss(x), reference(x), rtol=0.1, atol=0.1)
    found = pgd(loss, x, eps=8 / 255, steps=10, loss=given, best="loss", return_info=True)
    assert found.x_adv.dtype == torch.float32 and found.loss.mean() > loss(x).mean()


def test_a_model_that_is_stored_in_fp16_runs_in_bf16(folders, tmp_path):
    parts = model_and_processor("llava")
    for part in (parts[0].half(), parts[1], tokenizer("llava")):
        part.save_pretrained(tmp_path)
    types = {dtype: load_lvlm(str(tmp_path), dtype=dtype).model.dtype for dtype in ("auto", "fp32")}
    assert types == {"auto": torch.bfloat16, "fp32": torch.float32}
    assert load_lvlm(str(folders["llava"])).model.dtype == torch.float32


def test_the_loss_is_the_models_own(lvlm, x):
    """One sample at a time, without padding, through the labels of transformers."""
    losses = AnswerLoss(lvlm, QUESTIONS, ANSWERS)(x)
    for k in range(3):
        asked, said = lvlm.asked(QUESTIONS[k]), lvlm.said(ANSWERS[k])
        inputs = lvlm.read([asked + said])
        labels = torch.tensor([[-100] * len(asked) + said])
        expected = lvlm.model(**lvlm.see(x[k : k + 1]), **inputs, labels=labels).loss
        torch.testing.assert_close(losses[k], expected, rtol=1e-4, atol=1e-5)


def test_an_answer_begins_with_the_likeliest_word(lvlm, x):
    answers = lvlm.answer(x, QUESTIONS, max_tokens=1)
    for k in range(3):
        logits = lvlm.model(**lvlm.see(x[k : k + 1]), **lvlm.read([lvlm.asked(QUESTIONS[k])])).logits
        assert answers[k] == lvlm.tokenizer.decode(logits[0, -1:].argmax(1), skip_special_tokens=True)
    again = lvlm.answer(x[1:2], QUESTIONS[1:2], max_tokens=4)
    assert again == lvlm.answer(x, QUESTIONS, max_tokens=4)[1:2], "alone as in a batch"


def test_answers_are_the_likeliest_words_whatever_is_stored_beside_the_model(lvlm, x, monkeypatch):
    """Qwen2.5-VL's generation_config.json has a repetition_penalty."""
    questions = ["w1 w2 w3"] * len(x)
    plain = lvlm.answer(x, questions, 6)
    monkeypatch.setattr(lvlm.model.generation_config, "repetition_penalty", 20.0)
    assert lvlm.answer(x, questions, 6) == plain


def test_attacks_raise_a_loss_and_lower_a_targets(lvlm, x):
    loss = AnswerLoss(lvlm, QUESTIONS, ANSWERS)
    clean = loss(x)
    found = pgd(loss, x, eps=8 / 255, steps=5, loss=given, best="loss", return_info=True)
    assert (found.loss > clean).all() and (found.x_adv - x).abs().max() <= 8 / 255 + 1e-6
    aimed = apgd(loss, x, eps=8 / 255, steps=10, loss=given, targeted=True, best="loss", return_info=True)
    assert (aimed.loss < clean).all()
    torch.testing.assert_close(loss(aimed.x_adv), aimed.loss, rtol=1e-4, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch(lvlm, x):
    settings = dict(eps=4 / 255, steps=2, loss=given)
    together = pgd(AnswerLoss(lvlm, QUESTIONS, ANSWERS), x, generator=torch.Generator().manual_seed(0), **settings)
    alone = pgd(
        AnswerLoss(lvlm, QUESTIONS[1:2], ANSWERS[1:2]), x[1:2], generator=torch.Generator().manual_seed(0),
        sample_ids=torch.tensor([1]), **settings,
    )  # fmt: skip
    assert (alone - together[1:2]).abs().gt(1e-6).float().mean() < 0.01


@pytest.mark.parametrize("mix", ["add", "lerp", "normadd"])
def test_the_fused_block_is_the_hooked_one(lvlm, x, mix):
    before = lvlm.encode_pixels(x)
    results = []
    for fused in (True, False):
        one = anchored(lvlm, alpha=0.7, mix=mix, block=1, cutoff=8.0)
        one.anchor.requires_grad_(True)
        one.attach(lvlm, fused)
        leaf = x.clone().requires_grad_()
        out = lvlm.encode_pixels(leaf)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append((out, *torch.autograd.grad((out * weight).sum(), [leaf, one.anchor])))
        one.detach(lvlm)
    for fused, hooked in zip(*results, strict=True):
        torch.testing.assert_close(fused, hooked, rtol=1e-4, atol=2e-5 * hooked.abs().max().item())
    assert (results[0][0] - before).norm() > 1e-3 * before.norm()
    assert torch.equal(lvlm.encode_pixels(x), before), "without a trace"


def test_a_white_image_and_its_own_anchor(lvlm):
    white = torch.ones(2, 3, 32, 32)
    own, plain = attention_output(lvlm, white[:1])[0], lvlm.encode_pixels(white)
    apply_adapter(lvlm, Adapter(AdapterConfig(base="", size=32, alpha=1.7, mix="lerp"), own))
    torch.testing.assert_close(lvlm.encode_pixels(white), plain, rtol=1e-4, atol=1e-4)
    one = white_adapter(load_lvlm(lvlm.name, size=32))
    assert torch.equal(one.anchor, own)
    assert (one.config.alpha, one.config.cutoff) == (1.6, pytest.approx(40 * 32 / 224))


def test_adapters_of_a_clip_fit_a_llava_of_the_same_tower(folders, x, tmp_path):
    lvlm = load_lvlm(str(folders["llava"]))
    one = anchored(lvlm, alpha=0.5, cutoff=8.0)
    one.save(tmp_path)
    loaded = load_lvlm(str(folders["llava"]), adapter=str(tmp_path))
    apply_adapter(lvlm, one)
    assert torch.equal(lvlm.encode_pixels(x), loaded.encode_pixels(x))
    inside = torch.randn(tower_of(lvlm).shape("map")) / 5
    apply_adapter(lvlm, Adapter(AdapterConfig(base="", size=32, alpha=0.5, site="map"), inside))
    assert not torch.allclose(lvlm.encode_pixels(x), loaded.encode_pixels(x), atol=1e-3)


def test_what_adapters_cannot_do(lvlm):
    width = tower_of(lvlm).width
    prompts = Adapter(AdapterConfig(base="", size=32), None, torch.zeros(1, 2, width))
    with pytest.raises(ValueError, match="tower's tokens, where prompts|prompts must see queries"):
        apply_adapter(lvlm, prompts)
    if not lvlm.family.tower.endswith("vision_tower"):
        with pytest.raises(ValueError, match="site 'heads' must see queries, keys and values, and Qwen"):
            site = AdapterConfig(base="", size=32, site="heads", alpha=1.0)
            apply_adapter(lvlm, Adapter(site, torch.zeros(tower_of(lvlm).shape("heads"))))
        with pytest.raises(ValueError, match=r"anchor is \[16, 32\]"):  # its tokens have no rows to resize
            apply_adapter(lvlm, Adapter(AdapterConfig(base="", size=16, alpha=1.0), torch.zeros(16, width)))
    assert lvlm.adapter is None


def write_questions(folder, lines=None):
    for k in range(3):
        noise = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{k}.png")
    lines = lines or [
        {"image": "0.png", "question": "w1 w2", "answers": ["w3", "w4"]},
        {"image": "1.png", "question": "w5"},
        {"image": "2.png"},
    ]
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return folder / "questions.jsonl"


def test_answers_before_and_after(lvlm, tmp_path):
    data = load_questions(write_questions(tmp_path), 32)
    results = evaluate_answers(
        lvlm, data, attack="pgd-10", eps=16 / 255, adapter=anchored(lvlm, alpha=0.5, cutoff=8.0), max_tokens=4,
        batch_size=2, progress=False,
    )  # fmt: skip
    assert [(r.name, r.target) for r in results] == [
        ("before", "white-box"), ("after", "white-box"), ("after", "transfer"),
    ]  # fmt: skip
    before, after, transfer = results
    assert all(len(r.rows) == 3 and [row["index"] for row in r.rows] == [0, 1, 2] for r in results)
    assert all(row["loss_adv"] > row["loss_clean"] for row in before.rows)
    assert [row["score_clean"] for row in before.rows[1:]] == [1.0, 1.0], "its own answer is the reference"
    assert [row["references"] for row in after.rows] == [row["references"] for row in before.rows]
    assert [row["clean"] for row in after.rows] == [row["clean"] for row in transfer.rows]
    assert after.mean("loss_adv") > transfer.mean("loss_adv") > after.mean("loss_clean")
    assert before.relative("score_clean") == pytest.approx(100) and lvlm.adapter is None
    x = data.pixels(torch.arange(3))
    assert all((torch.stack(r.x_adv) - x).abs().max() <= 16 / 255 + 1e-6 for r in results)
    images = [torch.stack(r.x_adv) for r in results]
    assert torch.equal(images[2], images[0]) and not torch.equal(images[1], images[0])
    (aimed,) = evaluate_answers(lvlm, data, attack="apgd-10", eps=16 / 255, aim="w9", max_tokens=2, progress=False)
    assert all(row["loss_adv"] < row["loss_clean"] for row in aimed.rows)
    assert all(row["aim_adv"] == ("w9" in row["adv"].split()) for row in aimed.rows)


def test_the_answer_of_most_annotators_is_attacked(folders, tmp_path):
    lvlm, answers = load_lvlm(str(folders["llava"])), (["w3", "w8 w9", "w10", "w8 w9"], ["w3", "w8 w9", "w10"])
    lines = [{"image": "0.png", "question": "w1 w2", "answers": each} for each in answers]
    data = load_questions(write_questions(tmp_path, lines), 32)
    (found,) = evaluate_answers(lvlm, data, attack="pgd-1", max_tokens=1, progress=False)
    x = data.pixels(torch.arange(2))
    expected = AnswerLoss(lvlm, data.questions, ["w8 w9", "w3"])(x)
    assert [row["loss_clean"] for row in found.rows] == pytest.approx(expected.tolist())


def test_scores():
    assert token_f1("A cat on the mat.", ["cat on mat"]) == 1.0
    assert token_f1("a cat", ["dog", "black cat"]) == pytest.approx(2 / 3)
    assert token_f1("", ["cat"]) == 0.0 and token_f1("", [""]) == 1.0
    assert vqa_accuracy("The Cat!", ["cat"]) == 1.0 and vqa_accuracy("cat", ["dog", "bird"]) == 0.0
    ten = ["cat"] * 2 + ["dog"] * 8
    assert vqa_accuracy("cat", ten) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("dog", ten) == 1.0


def test_bad_input(folders, tmp_path, x, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match=r'LVLMs need transformers: pip install "rvlm\[lvlm\]"'):
            load_lvlm(str(folders["llava"]))
    lvlm = load_lvlm(str(folders["llava"]))
    with pytest.raises(ValueError, match="takes images of 32 pixels, got size=48"):
        load_lvlm(str(folders["llava"]), size=48)
    with pytest.raises(ValueError, match="size must be a multiple of 8 for this model, got 36"):
        load_lvlm(str(folders["qwen3_vl"]), size=36)
    processor = transformers.CLIPImageProcessor(resample=2)
    with pytest.raises(ValueError, match="resizes by bicubic interpolation, got .* resample=2"):
        Pixels(processor, 32)
    with pytest.raises(ValueError, match="dtype must be one of auto, fp32, bf16, got"):
        load_lvlm(str(folders["llava"]), dtype="int8")
    with pytest.raises(FileNotFoundError, match="no LVLM with tokenizer and image processor"):
        load_lvlm(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="is a clip: expected one of llava, qwen2_5_vl, qwen3_vl"):
        load_lvlm(str(tmp_path))
    with pytest.raises(ValueError, match=r"square images that are cropped first, got \[3, 3, 32, 16\]"):
        lvlm.see(x[..., :16])
    with pytest.raises(ValueError, match="an answer for each question, got 1 and 0"):
        AnswerLoss(lvlm, ["w1"], [])
    with pytest.raises(ValueError, match="expected 1 images, one for each question, got 3"):
        AnswerLoss(lvlm, ["w1"], ["w2"])(x)
    with pytest.raises(ValueError, match="must hold its image's token once, got 2 times"):
        lvlm.asked("w1 <image>")
    data = load_questions(write_questions(tmp_path), 32)
    with pytest.raises(
        ValueError, match="attack pgd-STEPS or apgd-STEPS and a score of f1, vqa, cider, got 'square-9' and 'f1'"
    ):
        evaluate_answers(lvlm, data, attack="square-9")
    for lines, error, message in (
        ([{"image": "9.png"}], FileNotFoundError, "names 1 images that are not there"),
        ([{"question": "w1"}], ValueError, "line 1: expected"),
        ([{"image": "0.png", "answers": "w1"}], ValueError, "line 1: expected"),
        ([{"image": "0.png", "answer": ["w1"]}], ValueError, "line 1: expected"),
    ):
        with pytest.raises(error, match=message):
            load_questions(write_questions(tmp_path, lines), 32)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_questions(tmp_path / "none.jsonl", 32)


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_command_line(kind, folders, tmp_path, capsys):
    questions = write_questions(tmp_path)
    flags = f"lvlm --model {folders[kind]} --size 32 --data {questions} --adapter white --attack pgd-2 --eps 8/255"
    assert cli.main([*flags.split(), "--max-tokens", "3", "--save-png", "--out", str(tmp_path / "run")]) == 0
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert [(row["name"], row["target"]) for row in rows] == [
        ("before", "white-box"), ("after", "white-box"), ("after", "transfer"),
    ]  # fmt: skip
    for row in rows:
        record = json.loads((tmp_path / "run" / row["record"]).read_text())
        assert record["samples"] == 3 and record["clean"] == row["clean"] and record["eps"] == "8/255"
        assert len((tmp_path / "run" / record["rows"]).read_text().splitlines()) == 3
    assert len(list((tmp_path / "run" / "png").rglob("*.png"))) == 6  # made on the model and on the adapted one
    assert cli.main(["lvlm", "--model", str(folders[kind]), "--data", str(questions), "--score", "bleu"]) == 2
    assert "score" in capsys.readouterr().err


def write_benchmarks(root):
    """COCO's captions, VQAv2 and POPE of three images, in their authors' layouts."""
    for part in ("coco/val2014", "coco/annotations", "vqav2", "pope"):
        (root / part).mkdir(parents=True)
    names = [f"COCO_val2014_{k:012d}.jpg" for k in (9, 25, 42)]
    for k, name in enumerate(names):
        noise = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(root / "coco/val2014" / name, quality=95)
    images = [{"id": key, "file_name": name} for key, name in zip((9, 25, 42), names, strict=True)]
    captions = [{"image_id": key, "caption": f" w{key} w1{k} w2 "} for k in range(2) for key in (42, 9, 25)]
    told = {"images": images, "annotations": captions}
    (root / "coco/annotations/captions_val2014.json").write_text(json.dumps(told))
    asked = [{"question_id": 10 * key + k, "image_id": key, "question": f"w{k}?"} for key in (25, 9) for k in range(2)]
    (root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": asked}))
    answers = [{"question_id": one["question_id"], "answers": [{"answer": f"w{k // 4}"} for k in range(10)]}
               for one in asked[::-1]]  # fmt: skip
    (root / "vqav2/v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": answers}))
    lines = [
        {"question_id": k, "image": name, "text": "Is there a w3?", "label": "yes"} for k, name in enumerate(names)
    ]
    (root / "pope/coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return root


def test_benchmarks_in_their_authors_layouts(tmp_path, monkeypatch):
    root = write_benchmarks(tmp_path)
    captions = load_questions(f"coco-captions:{root}", 32)
    assert captions.answers == [[f"w{key} w1{k} w2" for k in range(2)] for key in (9, 25, 42)]
    assert set(captions.questions) == {"Provide a one-sentence caption for the provided image."}
    assert captions.images[2] == "coco/val2014/COCO_val2014_000000000042.jpg"
    questions = load_questions(f"vqav2:{root}", 32)
    assert [image[-6:-4] for image in questions.images] == ["25", "25", "09", "09"] and questions.name == "vqav2"
    assert questions.questions[1] == "w1?\nAnswer the question using a single word or phrase."
    assert questions.answers[0] == ["w0"] * 4 + ["w1"] * 4 + ["w2"] * 2
    monkeypatch.setenv("RVLM_DATA", str(root))
    pope = load_questions("pope-random", 32)
    assert len(pope) == 3 and pope.answers == [["yes"]] * 3 and pope.questions[0].startswith("Is there a w3?\nAnswer")
    few = questions.limited(2, seed=1)
    assert len(few) == 2 and torch.equal(few.pixels(torch.arange(2)), questions.pixels(few.index))
    assert few.questions == [questions.questions[i] for i in few.index] and few.fingerprint != questions.fingerprint
    assert questions.numbered(few.index.tolist()).fingerprint == few.fingerprint
    with pytest.raises(ValueError, match="lacks 1 of 2 questions, such as number 7"):
        questions.numbered([1, 7])
    with pytest.raises(FileNotFoundError, match="no file .*coco_pope_popular.json"):
        load_questions("pope-popular", 32)


@pytest.mark.parametrize("file, content, spec, message", [
    ("coco/annotations/captions_val2014.json", "{}", "coco-captions", "expected images with id and file_name"),
    ("coco/annotations/captions_val2014.json", "no", "coco-captions", "is no JSON"),
    ("vqav2/v2_OpenEnded_mscoco_val2014_questions.json", '{"questions": [3]}', "vqav2", "expected questions with"),
    ("vqav2/v2_mscoco_val2014_annotations.json", '{"annotations": []}', "vqav2", "has no answers to 4 of 4 questions"),
    ("pope/coco_pope_random.json", '{"image": "x"}', "pope-random", "expected lines of JSON with image, text"),
    ("pope/coco_pope_random.json", "no", "pope-random", "expected lines of JSON with image, text"),
    ("coco/val2014/COCO_val2014_000000000009.jpg", None, "vqav2", "names 1 images that are not there"),
])  # fmt: skip
def test_broken_benchmarks_are_named(tmp_path, file, content, spec, message):
    root = write_benchmarks(tmp_path)
    (root / file).unlink() if content is None else (root / file).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_questions(f"{spec}:{root}", 32)


def write_protocol(folder):
    attacks = "{apgd-2: [4/255, 8/255]}"
    (folder / "mine.yaml").write_text(
        "name: mine\nabout: a test\nn: 3\nattacks: {fgsm: [4/255]}\nparts:\n  - digits\n"
        f"  - {{data: coco-captions, task: captioning, attacks: {attacks}}}\n"
        f"  - {{data: vqav2, task: vqa, n: 2, attacks: {attacks}}}\n"
    )
    return folder / "mine.yaml"


def test_what_a_protocol_asks_of_lvlms(folders, tmp_path, capsys):
    file, root = write_protocol(tmp_path), write_benchmarks(tmp_path / "root")
    argv = ["--protocol", str(file), "--root", str(root), "--out"]
    assert cli.main(["eval", *argv, str(tmp_path / "clip"), "--model", "tiny-vit"]) == 0
    said = capsys.readouterr()
    assert "NOT MEASURED coco-captions: captioning needs an LVLM (rvlm lvlm --protocol" in said.err
    assert "NOT MEASURED vqav2: vqa needs an LVLM" in said.err
    manifest = json.loads((tmp_path / "clip" / "manifest.json").read_text())
    assert manifest["needs_lvlm"] == ["coco-captions", "vqav2"] and manifest["status"] == "incomplete"
    argv = ["lvlm", "--model", str(folders["llava"]), *argv]
    assert cli.main([*argv, str(tmp_path / "run"), "--adapter", "white"]) == 0
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    cases = {(row["data"], row["score"], row["eps"], row["name"], row["target"]) for row in rows}
    assert len(rows) == len(cases) == 2 * 2 * 3 and ("coco-captions", "cider", "4/255", "after", "transfer") in cases
    assert {row["samples"] for row in rows if row["data"] == "vqav2"} == {2}
    for row in rows:
        record = json.loads((tmp_path / "run" / row["record"]).read_text())
        assert record["protocol"]["name"] == "mine" and record["status"] == "complete"
        assert record["clean_ci"][0] <= record["clean"] <= record["clean_ci"][1]
    assert cli.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.csv")]) == 0
    assert ",cider," in (tmp_path / "r.csv").read_text()
    answers = (root / "vqav2/v2_mscoco_val2014_annotations.json").read_text()
    (root / "vqav2/v2_mscoco_val2014_annotations.json").unlink()
    assert cli.main([*argv, str(tmp_path / "less")]) == 3
    assert "NOT MEASURED vqav2: no file" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "less" / "summary.json").read_text())["rows"]) == 2
    (root / "coco/annotations/captions_val2014.json").write_text("no")
    (root / "vqav2/v2_mscoco_val2014_annotations.json").write_text(answers)
    assert cli.main([*argv, str(tmp_path / "broken")]) == 4
    assert "NOT MEASURED coco-captions: " in capsys.readouterr().err
    manifest = json.loads((tmp_path / "broken" / "manifest.json").read_text())
    assert manifest["broken"] == ["coco-captions"] and manifest["status"] == "incomplete"
    assert len(json.loads((tmp_path / "broken" / "summary.json").read_text())["rows"]) == 2
    assert cli.main([*argv, str(tmp_path / "no"), "--eps", "2/255"]) == 2
    assert cli.main([*argv[:3], "--protocol", "digits-demo"]) == 2 and "asks LVLMs nothing" in capsys.readouterr().err


def comparable(run):
    """Rows, records and answers of a run, but for times."""
    rows = json.loads((run / "summary.json").read_text())["rows"]
    records = [json.loads((run / row["record"]).read_text()) | {"env": None, "seconds": 0} for row in rows]
    return [row | {"seconds": 0} for row in rows], records, [(run / one["rows"]).read_text() for one in records]


@pytest.mark.parametrize("stops_at", [1, 2, 4, 6])
def test_a_protocol_that_was_interrupted_goes_on_with_the_same_answers(folders, tmp_path, monkeypatch, stops_at):
    """Six batches: two for each of the captions' radii, then one for each of the questions'."""
    file, root = write_protocol(tmp_path), write_benchmarks(tmp_path / "root")
    argv = ["lvlm", "--model", str(folders["llava"]), "--protocol", str(file), "--root", str(root)]
    argv += ["--adapter", "white", "--batch-size", "2", "--out"]
    assert cli.main([*argv, str(tmp_path / "once")]) == 0
    batches, attacked = [], answers._Batch.attacked
    monkeypatch.setattr("rvlm.evaluation.resume.State.due", True)

    def stops(batch, *args):
        batches.append(batch)
        if len(batches) == 2 * stops_at:  # of a batch the model is attacked, then the adapted model
            raise KeyboardInterrupt
        return attacked(batch, *args)

    monkeypatch.setattr(answers._Batch, "attacked", stops)
    run = tmp_path / "twice"
    assert cli.main([*argv, str(run)]) == 130 and len(list(run.glob("state/*"))) == (stops_at in (2, 4))
    monkeypatch.setattr(answers._Batch, "attacked", attacked)
    written = {path: path.stat().st_mtime_ns for path in run.glob("result/*")}
    again, keep = [], answers._Batch.keep
    monkeypatch.setattr(answers._Batch, "keep", lambda batch, *args: (again.append(batch), keep(batch, *args))[1])
    assert cli.main([*argv, str(run)]) == 0
    assert len(again) == 3 * (7 - stops_at), "what was done is not done again"
    assert comparable(run) == comparable(tmp_path / "once") and not (run / "state").exists()
    assert {path: path.stat().st_mtime_ns for path in written} == written
    again.clear()
    assert cli.main([*argv, str(run), "--adapter", "none"]) == 3 and not again
    assert cli.main([*argv, str(run), "--limit", "1"]) == 0 and len(again) == 3 * 4, "partial records are others"


def test_a_run_that_was_interrupted_is_not_taken_for_another(folders, tmp_path, monkeypatch, capsys):
    """Records are named by neither data nor attack, so that another run would write over them."""
    argv = ["lvlm", "--model", str(folders["llava"]), "--data", str(write_questions(tmp_path)), "--batch-size", "1"]
    argv += ["--attack", "pgd-2", "--eps", "8/255", "--out"]
    assert cli.main([*argv, str(tmp_path / "once")]) == 0
    batches, attacked, run = [], answers._Batch.attacked, tmp_path / "twice"
    monkeypatch.setattr("rvlm.evaluation.resume.State.due", True)

    def stops(batch, *args):
        batches.append(batch)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return attacked(batch, *args)

    monkeypatch.setattr(answers._Batch, "attacked", stops)
    assert cli.main([*argv, str(run)]) == 130 and len(list(run.glob("state/*"))) == 1
    capsys.readouterr()
    other = shutil.copy(tmp_path / "questions.jsonl", tmp_path / "other.jsonl")
    for name, value in {"attack": "pgd-3", "eps": "4/255", "data": str(other)}.items():
        assert cli.main([*argv, str(run), f"--{name}", value]) == 2
        assert f"belongs to another evaluation ({name} was" in capsys.readouterr().err
    assert cli.main([*argv, str(run)]) == 0 and len(batches) == 4
    assert comparable(run) == comparable(tmp_path / "once") and not (run / "state").exists()


def test_a_state_of_answers_belongs_to_one_evaluation(folders, tmp_path, monkeypatch):
    lvlm, data = load_lvlm(str(folders["llava"])), load_questions(write_questions(tmp_path), 32)
    given = dict(attack="pgd-2", max_tokens=2, batch_size=2, progress=False, keep_images=False)
    whole = evaluate_answers(lvlm, data, **given)
    state = tmp_path / "state.npz"
    assert evaluate_answers(lvlm, data, state=state, **given)[0].rows == whole[0].rows
    monkeypatch.setattr(answers, "_Batch", None)
    (found,) = evaluate_answers(lvlm, data, state=state, **given)
    assert found.rows == whole[0].rows and found.undefended == whole[0].undefended and not found.x_adv
    with pytest.raises(ValueError, match="belongs to another evaluation .seed was 0, is 1"):
        evaluate_answers(lvlm, data, state=state, **given | {"seed": 1})
    with pytest.raises(ValueError, match="belongs to another evaluation .adapter was None"):
        evaluate_answers(lvlm, data, state=state, adapter=white_adapter(lvlm), **given)
    with pytest.raises(ValueError, match="keep_images holds images"):
        evaluate_answers(lvlm, data, state=state, **given | {"keep_images": True})


def test_the_words_around_a_question_are_a_setting_of_the_model(folders):
    lvlm, other = load_lvlm(str(folders["qwen3_vl"]), size=32), load_lvlm(str(folders["qwen3_vl"]), size=32)
    assert differing(settings_of(lvlm), other) == []
    other.tokenizer.chat_template = "{{ messages }}"
    assert ["prompt was" in line for line in differing(settings_of(lvlm), other)] == [True]


def test_records_of_answers_are_rerun(folders, tmp_path, capsys):
    root = write_benchmarks(tmp_path / "root")
    argv = ["lvlm", "--model", str(folders["llava"]), "--data", f"coco-captions:{root}", "--score", "cider"]
    argv += ["--adapter", "white", "--attack", "pgd-2", "--eps", "16/255", "--seed", "3", "--max-tokens", "5"]
    assert cli.main([*argv, "--batch-size", "2", "--out", str(tmp_path / "run")]) == 0
    for stem in ("before-white-box", "after-white-box", "after-transfer"):
        path = tmp_path / "run" / "result" / f"{stem}.json"
        assert cli.main(["repro", str(path), "--out", str(tmp_path / stem)]) == 0
        again = json.loads((tmp_path / stem / "result" / f"{stem}.json").read_text())
        same = ("clean", "robust", "loss_robust", "seed", "attack", "max_tokens", "model_sha", "adapter_sha", "data")
        assert all(again[key] == json.loads(path.read_text())[key] for key in same)
        assert "holds: here every verdict" in capsys.readouterr().out or torch.cuda.is_available()
    other = tmp_path / "other"
    shutil.copytree(folders["llava"], other)
    changed = load_lvlm(str(other))
    changed.model.get_input_embeddings().weight.data.neg_()
    changed.model.save_pretrained(other)
    repro = ["repro", str(path), "--out", str(tmp_path / "no"), "--model", str(other)]
    assert cli.main(repro) == 2 and "the model is not the recorded one" in capsys.readouterr().err
    record = json.loads(path.read_text())
    record["model_sha"] = weights_sha(load_lvlm(str(other)))  # as if these weights had made the record
    path.write_text(json.dumps(record))
    assert cli.main(repro) == 4 and "DOES NOT HOLD" in capsys.readouterr().out
    found = json.loads((tmp_path / "no" / "repro.json").read_text())
    assert found["samples"]["clean"] and set(found["samples"]["clean"]) <= {0, 1, 2}
    (root / "coco/val2014/COCO_val2014_000000000009.jpg").write_bytes(
        (root / "coco/val2014/COCO_val2014_000000000042.jpg").read_bytes()
    )
    assert cli.main(["repro", str(tmp_path / "run/result/before-white-box.json")]) == 2
    assert "is not the recorded data" in capsys.readouterr().err
    assert cli.main(["repro", str(tmp_path / "run/result/before-white-box.json"), "--adapter", "white"]) == 2
    (tmp_path / "run/samples/before-white-box.jsonl").unlink()
    assert cli.main(["repro", str(tmp_path / "run/result/before-white-box.json")]) == 3
