"""What decides predictions beside the weights: each change of it is seen, by resume, kept records, repro and images."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from rvlm.cli import main
from rvlm.data import load_data
from rvlm.evaluation import evaluate, load_images, read_recorded, write_evaluation
from rvlm.evaluation.images import save_images
from rvlm.evaluation.records import measured_before, record_stem, recorded_settings
from rvlm.models import ZeroShotClassifier, apply_adapter, load_clip
from rvlm.models.adapter import Adapter, AdapterConfig
from rvlm.models.weights import differing, settings_of, weights_of, weights_sha

DIGITS = load_data("digits", limit=20)


def classifier(change=None, templates="digits", names=None):
    clip = load_clip("tiny-vit")
    if change is not None:
        change(clip)
    return ZeroShotClassifier(clip, names or DIGITS.class_names, templates).eval()


def shifted(name):
    def change(clip):
        getattr(clip, name).add_(0.01)

    return change


def larger(clip):
    clip.size = 64


def quick(clip):
    clip.config = clip.config | {"model_cfg": clip.config["model_cfg"] | {"quick_gelu": True}}


CHANGES = {
    "clip.mean": lambda: classifier(shifted("mean")),
    "clip.std": lambda: classifier(shifted("std")),
    "clip.size": lambda: classifier(larger),
    "clip.quick_gelu": lambda: classifier(quick),
    "templates": lambda: classifier(templates="plain"),
    "class_names": lambda: classifier(names=DIGITS.class_names[::-1]),
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A state, a record and images of one evaluation."""
    folder, model = tmp_path_factory.mktemp("run"), classifier()
    found = evaluate(model, DIGITS, attack="fgsm", eps="2/255", progress=False, state=folder / "state.npz")
    mark = {"name": "mine", "sha": "0", "status": "partial"}
    write_evaluation(folder, "tiny-vit", found, DIGITS, model, protocol=mark)
    found = evaluate(model, DIGITS, attack="fgsm", eps="2/255", progress=False, keep_images=True)
    save_images(folder / "images.npz", found, DIGITS, model, "tiny-vit")
    return folder, mark, record_stem("tiny-vit", DIGITS.name, "white-box", "fgsm", "2/255")


def same_as_before(folder, mark, stem, model, data=DIGITS):
    return measured_before(folder, stem, data, model, None, mark) is not None


def test_the_same_model_goes_on(run_folder):
    folder, mark, stem = run_folder
    evaluate(classifier(), DIGITS, attack="fgsm", eps="2/255", progress=False, state=folder / "state.npz")
    assert same_as_before(folder, mark, stem, classifier())
    assert load_images(folder / "images.npz").white_box_of(classifier())
    other = dataclasses.replace(DIGITS, read=lambda index: 255 - DIGITS.read(index))
    assert other.fingerprint == DIGITS.fingerprint and not same_as_before(folder, mark, stem, classifier(), other)


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_is_seen(run_folder, name):
    folder, mark, stem = run_folder
    other = CHANGES[name]()
    assert weights_of(other) == weights_of(classifier()), "the weights alone do not tell them apart"
    with pytest.raises(ValueError, match=rf"belongs to another evaluation .*classifier\.{name} was .*, is "):
        evaluate(other, DIGITS, attack="fgsm", eps="2/255", progress=False, state=folder / "state.npz")
    assert not same_as_before(folder, mark, stem, other)
    assert not load_images(folder / "images.npz").white_box_of(other)
    told = recorded_settings(json.loads((folder / "result" / f"{stem}.json").read_text()))
    assert differing(told, other)[0].startswith(f"{name} was ")


def test_an_adapter_and_other_weights_are_other_weights(run_folder):
    folder, mark, stem = run_folder
    config = AdapterConfig.of(load_clip("tiny-vit"), cutoff=5.0)
    for change in (
        lambda clip: apply_adapter(clip, Adapter(config)),
        lambda clip: clip.model.logit_scale.data.add_(0.1),
    ):
        other = classifier(change)
        with pytest.raises(ValueError, match="belongs to another evaluation .classifier was"):
            evaluate(other, DIGITS, attack="fgsm", eps="2/255", progress=False, state=folder / "state.npz")
        assert not same_as_before(folder, mark, stem, other)


def test_the_source_is_seen_too(tmp_path):
    state, model = tmp_path / "state.npz", classifier()
    given = dict(attack="fgsm", eps="2/255", progress=False, state=state)
    evaluate(model, DIGITS, source=classifier(), **given)
    with pytest.raises(ValueError, match=r"source\.clip\.mean was"):
        evaluate(model, DIGITS, source=CHANGES["clip.mean"](), **given)


def test_buffers_that_state_dicts_leave_out():
    class Net(nn.Module):
        def __init__(self, mean):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("mean", torch.full((2,), mean), persistent=False)

    nets = Net(0.1), Net(0.2)
    nets[1].load_state_dict(nets[0].state_dict())
    assert weights_sha(nets[0]) == weights_sha(nets[1])
    assert differing(settings_of(nets[0]), nets[1])[0].startswith("buffers was")
    assert settings_of(lambda x: x) == {} and "buffers" not in settings_of(nn.Linear(2, 2))


def test_records_from_before_are_readable(tmp_path):
    """They say how images were normalised, in their section input, and nothing of other settings."""
    argv = ["eval", "--model", "tiny-vit", "--limit", "10", "--attack", "fgsm", "--out", str(tmp_path)]
    assert main(argv) == 0
    path = next((tmp_path / "result").glob("*.json"))
    record = json.loads(path.read_text())
    del record["model"]["settings"]
    path.write_text(json.dumps(record))
    told, data = read_recorded(path), DIGITS.subset(torch.arange(10), "some")
    told.classifier(load_clip("tiny-vit"), data)
    clip = load_clip("tiny-vit")
    clip.std.add_(0.01)
    with pytest.raises(ValueError, match=r"the model is not the recorded one: clip\.std was"):
        told.classifier(clip, data)


def test_a_record_of_a_model_by_its_path_is_no_flag():
    assert record_stem("/models/tecoa", "white-box", "fgsm", "2/255") == "models-tecoa-white-box-fgsm-2-255"
