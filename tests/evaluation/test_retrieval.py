"""Retrieval: recall against a plain count, captions as Karpathy's files hold them, and runs from the command line."""

import io
import json
import math
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from rvlm.cli import main
from rvlm.data import load_data
from rvlm.data.captions import Captions, holds_captions, load_captions
from rvlm.evaluation import retrieval, retrieve
from rvlm.evaluation.compare import _compared
from rvlm.evaluation.metrics import clustered_interval, effective_size, wilson
from rvlm.ranks import Ranks

N, SIDE = 12, 8
PIXELS = torch.randint(0, 256, (N, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Toy(nn.Module):
    """Embeds an image by a random matrix, and a text "image K" as that image moved a little."""

    def __init__(self, seed=0):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3 * SIDE * SIDE, 16, generator=torch.Generator().manual_seed(seed)))

    def encode_pixels(self, x):
        return F.normalize((x.flatten(1) - 0.5) @ self.w, dim=-1)

    def encode_text(self, texts):
        pixels = torch.stack([PIXELS[int(text.split()[1])] for text in texts]).float() / 255
        moved = pixels + 0.15 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(len(texts)))
        return self.encode_pixels(moved)


@pytest.fixture
def data():
    texts = [f"image {i} {k}" for i in range(N) for k in range(1 + i % 3)]
    owner = torch.tensor([int(text.split()[1]) for text in texts])
    index = torch.arange(N)
    return Captions("toy", "test", [], torch.zeros(N), index, lambda i: PIXELS[i], n_total=N, texts=texts, owner=owner)


@pytest.mark.parametrize("rows_at_once", [3, 1000])
def test_ranks_are_those_of_a_plain_count(monkeypatch, rows_at_once):
    monkeypatch.setattr(retrieval, "ROWS", rows_at_once)
    draws = torch.Generator().manual_seed(0)
    images, texts = torch.randn(5, 4, generator=draws), torch.randn(11, 4, generator=draws)
    rows = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 1, 3])
    of_images, of_texts = retrieval._ranks(images, texts, rows)
    for i in range(5):
        order = (images[i] @ texts.T).argsort(descending=True)
        assert of_images[i] == (rows[order] == i).nonzero()[0]
    for t in range(11):
        assert of_texts[t] == (texts[t] @ images.T).argsort(descending=True).tolist().index(int(rows[t]))
    same = torch.ones(3, 4)
    assert retrieval._ranks(same, same, torch.arange(3))[0].tolist() == [2, 2, 2], "ties count against the model"
    assert retrieval._ranks(same, same, torch.arange(3))[1].tolist() == [2, 2, 2]


@pytest.mark.parametrize("attack", ["pgd-5", "sga-3", "coattack-5"])
def test_recall_falls_under_attack(data, attack):
    found = retrieve(Toy(), data, attack=attack, eps="64/255", progress=False)
    clean, robust = found.metrics["clean"], found.metrics["robust"]
    assert list(clean) == [f"{kind}_r@{k}" for kind in ("text", "image") for k in (1, 5, 10)]
    assert clean["text_r@1"]["v"] > 0.9 and robust["text_r@1"]["v"] < 0.5 and robust["image_r@1"]["v"] < 0.5
    assert clean["text_r@1"]["n"] == N and clean["image_r@1"]["n"] == len(data.texts)
    for one in (clean, robust):
        assert one["text_r@1"]["v"] <= one["text_r@5"]["v"] <= one["text_r@10"]["v"]
    assert all(check["ok"] for check in found.checks), found.checks
    assert found.linf.max() <= 64 / 255 + 1e-6 and found.linf.min() > 0
    none = retrieve(Toy(), data, attack=attack, eps="0", progress=False).metrics
    assert none["clean"] == none["robust"] == clean


def test_captions_and_clean_images_are_encoded_once(data):
    class Counts(Toy):
        images = captions = 0

        def encode_pixels(self, x):
            self.images += len(x)
            return super().encode_pixels(x)

        def encode_text(self, texts):
            self.captions += len(texts)
            return Toy().encode_text(texts)

    given = dict(progress=False, batch_size=5)
    cases = [dict(attack="pgd-2", eps="8/255"), dict(attack="pgd-2", eps="8/255", source=Toy(1)),
             dict(attack="sga-2", eps="16/255"), dict(attack="pgd-2", eps="16/255", source=Toy(1))]  # fmt: skip
    clip, clean, shared = Counts(), None, []
    for case in cases:
        images = clip.images
        clean = retrieve(clip, data, clean=clean, **case, **given)
        alone = retrieve(Toy(), data, **case, **given)
        assert clean.metrics == alone.metrics and torch.equal(clean.distance, alone.distance)
        shared.append((clean.cost.shared, clean.shared_captions))
        spent, most = clip.images - images, clean.cost.most.forwards
        assert spent == most if "source" not in case else spent == 2 * N - clean.cost.shared
    captions = len(data.texts)
    assert shared == [(0, 0), (N, captions), (N, captions), (N, 2 * captions)] and clip.captions == captions
    with pytest.raises(ValueError, match="clean must be of the 5 images"):
        retrieve(clip, data.limited(5), clean=clean, **given)


def test_embeddings_with_nan_count_against_the_model(data):
    class Overflows(Toy):
        def encode_pixels(self, x):
            off_the_grid = (x * 255 - (x * 255).round()).abs().flatten(1).amax(1) > 0.01
            return super().encode_pixels(x) * torch.where(off_the_grid, torch.nan, 1.0)[:, None]

        def encode_text(self, texts):
            return Toy().encode_text(texts)

    own = retrieve(Toy(), data, attack="pgd-1", eps="1.5/255", progress=False)
    found = retrieve(Overflows(), data, attack="pgd-1", eps="1.5/255", source=Toy(), progress=False)
    assert found.metrics["clean"] == own.metrics["clean"] and found.nonfinite == N
    assert (found.text_adv >= len(data.texts) - 3).all() and (found.image_adv == N - 1).all()
    assert [check["id"] for check in found.checks if not check["ok"]] == ["embeddings_finite"]


def test_batches_and_processes_change_nothing(data, monkeypatch):
    whole = retrieve(Toy(), data, attack="pgd-3", eps="4/255", progress=False)
    small = retrieve(Toy(), data, attack="pgd-3", eps="4/255", batch_size=5, progress=False)
    assert torch.equal(whole.text_adv, small.text_adv) and torch.allclose(whole.linf, small.linf)
    gathered = []

    class Two(Ranks):
        def __init__(self):
            self.rank, self.size = len(gathered), 2

        def gather(self, mine):
            gathered.append(mine)
            return gathered

    monkeypatch.setattr(retrieval, "Ranks", Two)
    with pytest.raises((IndexError, RuntimeError)):  # the first process's share alone
        retrieve(Toy(), data, attack="pgd-3", eps="4/255", batch_size=5, progress=False)
    both = retrieve(Toy(), data, attack="pgd-3", eps="4/255", batch_size=5, progress=False)
    assert torch.equal(both.text_adv, whole.text_adv) and torch.equal(both.image_adv, whole.image_adv)


def test_transfer_uses_the_other_models_gradient_and_captions(data):
    own = retrieve(Toy(), data, attack="pgd-5", eps="64/255", progress=False)
    other = retrieve(Toy(), data, attack="pgd-5", eps="64/255", source=Toy(1), progress=False)
    assert other.target == "transfer" and other.metrics["clean"] == own.metrics["clean"]
    assert other.metrics["robust"]["text_r@1"]["v"] > own.metrics["robust"]["text_r@1"]["v"]


def test_wrong_input(data):
    with pytest.raises(ValueError, match="expected pgd-STEPS, sga-STEPS or coattack-STEPS"):
        retrieve(Toy(), data, attack="autoattack")
    with pytest.raises(ValueError, match="did you mean 4/255"):
        retrieve(Toy(), data, eps="4")
    with pytest.raises(ValueError, match="no images to evaluate"):
        retrieve(Toy(), data.subset(torch.zeros(0, dtype=torch.int64), "none"))


# Karpathy's files


def write_karpathy(root, change=lambda images: None, filepath=None, folder="flickr30k-images"):
    images = [
        {
            "filename": f"{i}.jpg", "split": "test" if i < 6 else "restval", "imgid": i,
            "sentences": [{"raw": f" a photo of {i}, number {k}. "} for k in range(2)],
        } | ({"filepath": filepath} if filepath else {})
        for i in range(8)
    ]  # fmt: skip
    change(images)
    place = root / folder / (filepath or "")
    place.mkdir(parents=True, exist_ok=True)
    for i in range(8):
        Image.fromarray(PIXELS[i].permute(1, 2, 0).numpy()).resize((10 + i, 12)).save(place / f"{i}.jpg")
    (root / "captions.json").write_text(json.dumps({"images": images, "dataset": "toy"}))
    return root


def test_karpathys_files(tmp_path, monkeypatch):
    write_karpathy(tmp_path, folder=".")
    data = load_captions(f"captions:{tmp_path / 'captions.json'}", size=8)
    assert len(data) == 6 and data.texts[:3] == [
        "a photo of 0, number 0.",
        "a photo of 0, number 1.",
        "a photo of 1, number 0.",
    ]
    assert data.owner.tolist() == data.rows.tolist() == [i for i in range(6) for _ in range(2)]
    assert data.batch(slice(0, 4))[0].shape == (4, 3, 8, 8)
    assert len(load_captions(f"captions:{tmp_path / 'captions.json'}", "train")) == 2, "COCO's restval is training data"
    few = data.limited(3)
    assert few.texts == [data.texts[t] for t in range(12) if data.owner[t] in few.index] and len(few.texts) == 6
    assert few.rows.tolist() == [0, 0, 1, 1, 2, 2] and few.fingerprint != data.fingerprint
    root = write_karpathy(tmp_path / "root" / "coco", filepath="val2014", folder=".")
    (root / "captions.json").rename(root / "dataset_coco.json")
    assert holds_captions(f"coco:{root.parent}") and holds_captions("captions:x") and not holds_captions("digits")
    with pytest.raises(ValueError, match="has 6 images for test, expected 5000"):
        load_captions(f"coco:{root.parent}")
    monkeypatch.setenv("RVLM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="wds_flickr30k.*flickr30k/dataset_flickr30k.json"):
        load_captions("flickr30k")


def test_captions_in_tars(tmp_path):
    layouts = {"wds": {"name": "words", "counts": {"test": 3}}, "karpathy": {"at": "x", "list": "y", "images": ["."]}}
    (tmp_path / "datasets.yaml").write_text(json.dumps({"words": {"title": "w", "layouts": layouts}}))
    shard = tmp_path / "wds_words" / "test" / "0.tar"
    shard.parent.mkdir(parents=True)

    def write(captions):
        with tarfile.open(shard, "w") as archive:
            for i, text in enumerate(captions):
                image = io.BytesIO()
                Image.fromarray(PIXELS[i].permute(1, 2, 0).numpy()).save(image, "png")
                for name, content in ((f"{i}.png", image.getvalue()), (f"{i}.txt", text.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))

    write(["a cat\none more", "a dog", "a bird\n\n"])
    data = load_captions(f"words:{tmp_path}")
    assert data.name == "words@wds" and data.texts == ["a cat", "one more", "a dog", "a bird"]
    assert data.owner.tolist() == [0, 0, 1, 2] and torch.equal(data.read(data.index), PIXELS[:3])
    assert main(["data", "check", "words", "--root", str(tmp_path)]) == 0
    with pytest.raises(ValueError, match="words holds images with captions"):
        load_data(f"words:{tmp_path}")
    write(["a cat", "a dog"])
    with pytest.raises(ValueError, match="has 2 images for test, expected 3"):
        load_captions(f"words:{tmp_path}")
    write(["a cat", " ", "a bird"])
    with pytest.raises(ValueError, match="1 images have no caption, the first is 0.tar/1.png"):
        load_captions(f"words:{tmp_path}")
    with tarfile.open(shard, "w") as archive:
        archive.addfile(tarfile.TarInfo("7.png"), io.BytesIO())
    with pytest.raises(ValueError, match="7.png has no caption; expected 7.txt with a caption on each line"):
        load_captions(f"words:{tmp_path}")


def drop(key):
    return lambda images: images[0].pop(key)


@pytest.mark.parametrize("change, message", [
    (drop("sentences"), "expected images with filename, split and sentences"),
    (drop("filename"), "expected images with filename, split and sentences"),
    (lambda images: images[0]["sentences"].append({"raw": None}), "expected images with filename, split and sentences"),
    (lambda images: images.append(images[0]), "lists 1 images twice for test: 0.jpg"),
    (lambda images: images[1].update(sentences=[]), "1 images have no caption, the first is 1.jpg"),
    (lambda images: images[2].update(filename="9.jpg"), "1 of 6 images are not in"),
    (lambda images: [image.update(split="val") for image in images], "has no images for 'test': it has val"),
])  # fmt: skip
def test_broken_files_are_named(tmp_path, change, message):
    write_karpathy(tmp_path, change, folder=".")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_captions(f"captions:{tmp_path / 'captions.json'}")


def test_check_of_captions(tmp_path, capsys):
    write_karpathy(tmp_path, folder=".")
    argv = ["data", "check", f"captions:{tmp_path}/captions.json"]
    assert main(argv) == 0 and "6 samples" in capsys.readouterr().out
    (tmp_path / "3.jpg").write_bytes(b"no image")
    assert main(argv) == 4 and "1 images cannot be decoded: 3.jpg" in capsys.readouterr().out
    layout = {"at": ".", "list": "captions.json", "images": ["."], "counts": {"test": 7}}
    (tmp_path / "datasets.yaml").write_text(json.dumps({"words": {"title": "w", "layouts": {"karpathy": layout}}}))
    assert main(["data", "check", "words", "--root", str(tmp_path)]) == 4
    assert "has 6 images for test, expected 7" in capsys.readouterr().out


def test_eval_of_captions_from_the_command_line(tmp_path, capsys):
    write_karpathy(tmp_path, folder=".")
    out = tmp_path / "run"
    argv = ["eval", "--model", "tiny-vit", "--data", f"captions:{tmp_path}/captions.json", "--size", "32"]
    assert main([*argv, "--attack", "sga-2", "--eps", "2/255,8/255", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "text_r@1 | text_r@5" in text and "sga-2, linf 8/255, white-box" in text
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert [row["eps"] for row in rows] == ["2/255", "8/255"] and {row["metric"] for row in rows} == {"text_r@1"}
    record = json.loads((out / rows[1]["record"]).read_text())
    assert record["schema"] == "rvlm.retrieval/1" and record["status"] == "complete"
    assert record["data"]["resized"] == {"size": 32, "resize": None, "interpolation": "bicubic", "squash": False}
    assert record["data"]["captions"] == 12 and record["metrics"]["robust"]["image_r@10"]["n"] == 12
    columns = np.load(out / record["samples"])
    assert columns["text_adv"].shape == (6,) and columns["image_adv"].shape == (12,)
    assert main([*argv, "--attack", "autoattack"]) == 2
    assert main(["check", "tiny-vit", "--data", f"captions:{tmp_path}/captions.json"]) == 2


def test_intervals_know_that_captions_of_an_image_stand_together():
    draws = np.random.default_rng(0)
    images, captions, truth, inside = 80, 5, 0.3, {"naive": 0, "clustered": 0}
    owner = torch.arange(images).repeat_interleave(captions)
    for _ in range(400):  # images differ in how easy they are, so that captions of one agree
        easy = draws.beta(0.5 * truth, 0.5 * (1 - truth), images)
        right = torch.from_numpy(draws.random((images, captions)) < easy[:, None]).flatten()
        share = right.double().mean().item()
        for kind, n in (("naive", len(right)), ("clustered", effective_size(right, owner))):
            low, high = wilson(share * n, n)
            inside[kind] += low <= truth <= high
    assert inside["naive"] < 0.75 * 400, "the example shows nothing"
    assert 0.92 * 400 <= inside["clustered"] <= 0.98 * 400


def test_effective_size_by_hand():
    one, two = torch.arange(10), torch.arange(10) // 2
    right = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0]).bool()
    # p = 0.4; pairs have 2, 2, 0, 0, 0 right: residuals 1.2, 1.2, -0.8 (3 times), var = 5/4 * 4.8 / 100
    assert effective_size(right, two) == pytest.approx(0.4 * 0.6 / (1.25 * 4.8 / 100))
    assert effective_size(right, one) == pytest.approx(9.0)
    mixed = torch.tensor([1, 0] * 5).bool()
    assert effective_size(mixed, two) == 10, "clusters that all say the same: no more than the samples"
    assert effective_size(right | True, two) == effective_size(right & False, two) == 5
    assert effective_size(right, torch.zeros(10, dtype=torch.int64)) == 1


def test_the_interval_of_scores_beyond_one_by_hand():
    values, image = torch.tensor([4.0, 6.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
    # mean 3; residuals 10 - 6 and 2 - 6; var = 2/1 * 32 / 16 = 4
    assert clustered_interval(values, image, 10.0) == pytest.approx((0.0, 3 + 2 * 1.959964))
    assert clustered_interval(values, image * 0, 10.0) == (0.0, 10.0)
    for same in (2.0, 10 / 3):  # a third has a mean that is rounded
        equal, images = torch.full((7,), same, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 3, 3])
        assert clustered_interval(equal, images, 10.0) == (0.0, 10.0)
    normal = clustered_interval(values, torch.arange(4), 10.0)
    assert normal[1] == pytest.approx(3 + 1.959964 * values.std().item() / 2)


def test_captions_that_repeat_each_other_are_no_evidence():
    a, b = np.arange(40) < 20, (np.arange(40) >= 14) & (np.arange(40) < 26)  # 14 and 6 that one alone gets right
    once = _compared("robust image_r@1", a, b, np.arange(40))
    again = _compared("robust image_r@1", a.repeat(5), b.repeat(5), np.arange(40).repeat(5))
    naive = _compared("robust accuracy", a.repeat(5), b.repeat(5), None)
    assert again.p == pytest.approx(once.p) == pytest.approx(math.erfc(8 / math.sqrt(20) / math.sqrt(2)))
    assert naive.p < again.p / 100
    assert again.only_a == 5 * once.only_a and again.a == once.a
    assert naive.a_ci[1] - naive.a_ci[0] < 0.6 * (again.a_ci[1] - again.a_ci[0])
    assert _compared("robust image_r@1", a, a, np.arange(40)).p == 1


def test_image_recall_has_the_wider_interval(data):
    found = retrieve(Toy(), data, attack="pgd-5", eps="40/255", progress=False).metrics["robust"]
    one = found["image_r@1"]
    assert 0 < one["v"] < 1 and one["n_eff"] < one["n"] == len(data.texts)
    assert tuple(one["ci95"]) == wilson(one["v"] * one["n_eff"], one["n_eff"])
    assert found["text_r@1"]["n_eff"] == found["text_r@1"]["n"] == N


@pytest.mark.parametrize("attack", ["pgd-3", "sga-2", "coattack-3"])
def test_the_predicted_cost_is_the_count(data, attack):
    counts = {"forwards": 0, "backwards": 0}

    class Counting(Toy):
        def encode_pixels(self, x):
            found = super().encode_pixels(x)
            counts["forwards"] += len(x)
            if x.requires_grad:
                found.register_hook(lambda grad: counts.update(backwards=counts["backwards"] + len(grad)))
            return found

        def encode_text(self, texts):
            counts["forwards"] -= len(texts)  # they go through encode_pixels, and are not images
            return super().encode_text(texts)

    found = retrieve(Counting(), data, attack=attack, eps="4/255", batch_size=5, progress=False)
    assert (found.cost.most.forwards, found.cost.most.backwards) == (counts["forwards"], counts["backwards"])
    assert found.cost.expected == found.cost.most
