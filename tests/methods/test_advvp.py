"""AdvVP: prompts alone learn, by TeCoA's loss, on keys and values that the batch shares."""

import pytest
import torch
from torch.nn import functional as F

from rvlm.data import load_data
from rvlm.methods import Batch, build_method
from rvlm.models import load_clip
from rvlm.training import train

QUICK = {"epochs": 1, "batch_size": 32, "warmup_steps": 1, "depth": 2, "tokens": 4}


@pytest.fixture(scope="module")
def data():
    return load_data("digits", "train", limit=64)


def test_prompts_alone_learn_and_follow_the_seed(data):
    before, results = load_clip("tiny-vit", seed=1), []
    for seed in (0, 0, 1):
        student = load_clip("tiny-vit", seed=1)
        method = build_method("advvp", **QUICK)
        train(student, data, method, seed=seed, progress=False)
        results.append(student.adapter.prompts.detach())
        assert all(torch.equal(t, student.model.state_dict()[key]) for key, t in before.model.state_dict().items())
    assert results[0].shape == (2, 4, 96)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_it_learns(data):
    settings = QUICK | {"epochs": 6, "lr": 2e-2, "eps": "1/255"}
    result = train(load_clip("tiny-vit", seed=1), data, build_method("advvp", **settings), progress=False)
    assert result.history[-1]["loss"] < 0.985 * result.history[0]["loss"]


def test_the_loss_is_its_formula(data):
    student, method = load_clip("tiny-vit", seed=1), build_method("advvp", **QUICK)
    method.setup(student, data)
    x, y, index = data.batch(slice(0, 8))
    embedding = student(x).detach()
    texts = [student.encode_text([t.format(n) for n in data.class_names]) for t in method.training_templates(data)]
    text = F.normalize(torch.stack(texts).mean(0), dim=1)
    expected = F.cross_entropy(student.logit_scale * embedding @ text.T, y)
    torch.testing.assert_close(
        method.loss(embedding, None, Batch(x, y, index))["total"], expected, rtol=1e-4, atol=1e-5
    )


def test_saved_as_an_adapter(data, tmp_path):
    result = train(load_clip("tiny-vit"), data, build_method("advvp", **QUICK), out=tmp_path, progress=False)
    x = data.batch(slice(0, 4))[0]
    assert torch.equal(load_clip(str(tmp_path))(x), result.student(x))
    assert (tmp_path / "checkpoint" / "adapter.safetensors").stat().st_size < 10_000


def test_bad_settings_and_towers(data):
    for settings, message in (({"tokens": 0}, "tokens must be at least 1"), ({"depth": 0}, "depth must be at least 1")):
        with pytest.raises(ValueError, match=message):
            build_method("advvp", **settings)
    for student, settings, message in (
        ("tiny-rn", {}, "no blocks that can be adapted"),
        ("tiny-vit", {"depth": 4}, "tiny-vit has 3 blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            train(load_clip(student), data, build_method("advvp", **(QUICK | settings)), progress=False)
    student = load_clip("tiny-vit")
    train(student, data, build_method("advvp", **QUICK), progress=False)
    with pytest.raises(ValueError, match="has an adapter already"):
        train(student, data, build_method("advvp", **QUICK), progress=False)
