"""CoOp's few-shot draws: the same calls of Python's random, in the same order, on lists in CoOp's layouts."""

import hashlib
import json
import random

import pytest
import torch
import yaml

from rvlm.cli import main
from rvlm.data import load_data
from rvlm.data.coop_shots import coop_few_shot

NAMES = ["cat", "sea_lion", "ice_cream", "owl", "fox"]
MANY = {0: 9, 1: 30, 2: 3, 3: 12, 4: 200}  # by class, in the list of training samples


def listed(split, counts):
    """Samples [path, label, class name], mixed, so that classes are not first named in the order of their labels."""
    samples = [[f"{NAMES[c]}/{split}{k}.jpg", c, NAMES[c]] for c, n in counts.items() for k in range(n)]
    return sorted(samples, key=lambda sample: hashlib.sha256(sample[0].encode()).digest())


SPLITS = {"train": listed("a", MANY), "val": listed("b", dict.fromkeys(MANY, 5)), "test": listed("c", MANY)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A set in CoOp's layout, and one like FGVC-Aircraft; no draw opens an image."""
    root = tmp_path_factory.mktemp("data")
    layouts = {
        "zoo": {"coop": {"at": "zoo", "list": "split_zhou_Zoo.json", "images": "images"}},
        "planes": {"aircraft": {"at": "planes", "list": "variants.txt"}},
    }
    known = {name: {"classes": 5, "layouts": layout} for name, layout in layouts.items()}
    (root / "datasets.yaml").write_text(yaml.safe_dump(known))
    for folder in ("zoo", "planes"):
        (root / folder).mkdir()
    (root / "zoo" / "split_zhou_Zoo.json").write_text(json.dumps(SPLITS))
    (root / "planes" / "variants.txt").write_text("\n".join(NAMES))
    for split, samples in SPLITS.items():
        lines = [f"{path.removesuffix('.jpg')} {name}\n" for path, _, name in samples]
        (root / "planes" / f"images_variant_{split}.txt").write_text("".join(lines))
    return root


def drawn_by_coop(shots, seed):
    """The global generator, whole samples instead of their numbers, train and val: as a run there goes."""
    before = random.getstate()
    random.seed(seed)
    found = {}
    for split, n in (("train", shots), ("val", min(shots, 4))):
        by_label = {}
        for sample in SPLITS[split]:
            by_label.setdefault(sample[1], []).append(sample)
        found[split] = []
        for samples in by_label.values():
            enough = len(samples) >= n
            found[split] += random.sample(samples, n) if enough else random.choices(samples, k=n)
    random.setstate(before)
    return found


def paths(data):
    return [data.read.names[i] for i in data.index.tolist()]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("spec", ["zoo@coop", "planes@aircraft"])
def test_the_draw_is_coops(root, spec, shots, seed):
    expected = drawn_by_coop(shots, seed)
    for split in ("train", "val"):
        data = load_data(f"{spec}:{root}", split, shots=shots, seed=seed, draw="coop")
        assert paths(data) == [path for path, _, _ in expected[split]], "the samples, in CoOp's order"
        assert data.y.tolist() == [label for _, label, _ in expected[split]]
        assert data.n_total == len(SPLITS[split])
        assert len(data) == 5 * (shots if split == "train" else min(shots, 4))


def test_python_still_draws_as_it_did(root):
    """Python does not promise that random.sample stays as it is: if this fails, draws of older records are others."""
    data = load_data(f"zoo@coop:{root}", shots=2, seed=1, draw="coop", split="train")
    assert paths(data) == [
        "fox/a114.jpg", "fox/a165.jpg", "owl/a9.jpg", "owl/a3.jpg", "sea_lion/a5.jpg", "sea_lion/a26.jpg",
        "cat/a0.jpg", "cat/a3.jpg", "ice_cream/a2.jpg", "ice_cream/a1.jpg",
    ]  # fmt: skip


def test_small_classes_repeat_and_say_so(root):
    data = load_data(f"zoo@coop:{root}", "train", shots=16, seed=1, draw="coop")
    assert data.index_rule == "CoOp's 16 per class (seed=1), 3 classes have fewer and repeat"
    assert data.y.bincount().tolist() == [16] * 5 and data.index.unique().numel() < len(data)
    assert load_data(f"zoo@coop:{root}", "train", shots=2, seed=1, draw="coop").index_rule.endswith("(seed=1)")


def test_classes_are_halved_after_the_draw(root):
    whole = load_data(f"zoo@coop:{root}", "train", shots=4, seed=2, draw="coop")
    halves = [load_data(f"zoo@coop:{root}+classes={part}", "train", shots=4, seed=2, draw="coop")
              for part in ("base", "new")]  # fmt: skip
    for data, keep in zip(halves, (whole.y < 3, whole.y >= 3), strict=True):
        assert data.index.tolist() == whole.index[keep].tolist()
    assert [data.n_total for data in halves] == [42, 212] and halves[1].y.unique().tolist() == [0, 1]


def test_the_global_generator_is_left_alone(root):
    random.seed(5)
    state = random.getstate()
    load_data(f"zoo@coop:{root}", "train", shots=4, seed=2, draw="coop")
    assert random.getstate() == state


def test_our_own_draw_is_what_it_was(root):
    data = load_data(f"zoo@coop:{root}", "train")
    ours = load_data(f"zoo@coop:{root}", "train", shots=4, seed=2)
    assert torch.equal(ours.index, data.few_shot(4, 2).index) and ours.index_rule == data.few_shot(4, 2).index_rule


@pytest.mark.parametrize("given, message", [
    (dict(spec="digits"), r"expected NAME@coop or NAME@aircraft, got digits"),
    (dict(split="test"), "CoOp draws from train and val, got 'test'"),
    (dict(seed=0), "at least 1 shot and seeds from 1 on, got 2 shots, seed 0"),
    (dict(shots=0), "at least 1 shot"),
    (dict(draw="dassl"), "draw must be rvlm or coop, got 'dassl'"),
    (dict(shots=None), "say how many, as shots"),
    (dict(limit=3), "limit and shots both choose the samples"),
])  # fmt: skip
def test_what_is_no_draw_of_coops_is_refused(root, given, message):
    asked = dict(spec=f"zoo@coop:{root}", split="train", shots=2, seed=1, draw="coop") | given
    with pytest.raises(ValueError, match=message):
        load_data(**asked)


def test_halves_are_not_drawn_from(root):
    half = load_data(f"zoo@coop:{root}+classes=base", "train")
    with pytest.raises(ValueError, match="got zoo@coop.classes=base"):
        coop_few_shot(half, half, 2, 1)


def test_the_command_line_takes_it(root, tmp_path, capsys):
    argv = ["train", "tecoa", "--data", f"zoo@coop:{root}", "--shots", "2", "--out", str(tmp_path / "run")]
    assert main([*argv, "--draw", "coop"]) == 2 and "seeds from 1 on" in capsys.readouterr().err
    assert main([*argv, "--draw", "dassl"]) == 2 and "rvlm or coop" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
