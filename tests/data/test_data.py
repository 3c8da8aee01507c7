"""Data sets: what they yield, that it never changes, and that what is wrong with them is named."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from rvlm.data import TEMPLATES, Fit, load_data, templates


@pytest.fixture
def tree(tmp_path):
    """A folder of 2 classes x 3 images of 12 x 10 pixels, each of one colour that tells them apart."""
    for c, name in enumerate(("cat", "sea_lion")):
        for k in range(3):
            path = tmp_path / "set" / name / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((10, 12, 3), 100 * c + k, np.uint8)).save(path)
    return tmp_path / "set"


def test_digits_are_real_fixed_and_split():
    train, test = load_data("digits", "train"), load_data("digits", "test")
    assert (len(train), len(test)) == (1297, 500)
    assert not set(train.index.tolist()) & set(test.index.tolist())
    assert test.class_names[3] == "three" and sorted(set(test.y.tolist())) == list(range(10))
    x, y, index = test.batch(slice(0, 7))
    assert x.shape == (7, 3, 32, 32) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    assert torch.equal((x * 255).round() / 255, x), "on the uint8 grid"
    assert torch.equal(y, test.y[:7]) and torch.equal(index, test.index[:7])
    assert test.fingerprint == load_data("digits").fingerprint != train.fingerprint
    with pytest.raises(ValueError, match="splits train and test"):
        load_data("digits", "val")


def test_limit_is_a_fixed_draw_that_keeps_numbers():
    full, some = load_data("digits"), load_data("digits", limit=20)
    assert len(some) == 20 and some.n_total == 500 and some.index_rule == "perm(seed=0)[:20]"
    assert set(some.index.tolist()) <= set(full.index.tolist())
    assert torch.equal(some.index, load_data("digits", limit=20).index)
    assert len(set(some.y.tolist())) > 3, "not the first class only"
    row = full.index.tolist().index(int(some.index[5]))
    assert torch.equal(some.batch(slice(5, 6))[0], full.batch(slice(row, row + 1))[0])
    assert len(load_data("digits", limit=10**6)) == 500
    with pytest.raises(ValueError, match="at least 1"):
        load_data("digits", limit=0)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW", "float"])
def test_npz_layouts(tmp_path, layout):
    pixels = np.arange(4 * 5 * 6 * 3, dtype=np.uint8).reshape(4, 5, 6, 3)
    x = {"NHWC": pixels, "NCHW": pixels.transpose(0, 3, 1, 2), "NHW": pixels[..., 0], "float": pixels / 255}[layout]
    np.savez(tmp_path / "d.npz", x=x, y=np.array([0, 1, 1, 2], np.int32), class_names=np.array(["a", "b", "c"]))
    data = load_data(f"npz:{tmp_path / 'd.npz'}")
    got = (data.batch(slice(None))[0] * 255).round().to(torch.uint8)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.equal(got, expected[:, :1].expand(-1, 3, -1, -1) if layout == "NHW" else expected)
    assert data.class_names == ["a", "b", "c"] and data.y.dtype == torch.int64


def test_npz_class_names_beside_and_resize(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 8, 8, 3), np.uint8), y=np.array([0, 1]))
    assert load_data(f"npz:{tmp_path / 'd.npz'}").class_names == ["0", "1"]
    (tmp_path / "classes.json").write_text(json.dumps(["left", "right"]))
    data = load_data(f"npz:{tmp_path / 'd.npz'}", size=6)
    assert data.class_names == ["left", "right"] and data.batch(slice(None))[0].shape == (2, 3, 6, 6)


@pytest.mark.parametrize("arrays, message", [
    (dict(x=np.zeros((2, 4, 4, 3), np.uint8)), "lacks"),
    (dict(x=np.zeros((2, 4, 4, 3), np.uint8), y=np.zeros(3, int)), r"shape \[2\]"),
    (dict(x=np.zeros((2, 4, 4, 3), np.int64), y=np.zeros(2, int)), "uint8 or floats"),
    (dict(x=np.full((2, 4, 4, 3), 2.0), y=np.zeros(2, int)), r"\[0, 1\]"),
    (dict(x=np.full((2, 4, 4, 3), np.nan), y=np.zeros(2, int)), r"\[0, 1\]"),
    (dict(x=np.zeros((2, 4), np.uint8), y=np.zeros(2, int)), "shape"),
    (dict(x=np.zeros((2, 4, 4, 5), np.uint8), y=np.zeros(2, int)), "channels"),
    (dict(x=np.zeros((0, 4, 4, 3), np.uint8), y=np.zeros(0, int)), "no samples"),
    (dict(x=np.zeros((2, 4, 4, 3), np.uint8), y=np.array([0, 4]), class_names=np.array(["a"])), "1 class names"),
    (dict(x=np.zeros((2, 4, 4, 3), np.uint8), y=np.array([-1, 0])), "labels span -1"),
])  # fmt: skip
def test_bad_npz_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_data(f"npz:{tmp_path / 'bad.npz'}")


def test_folder_and_zip(tree):
    data = load_data(f"folder:{tree}")
    assert data.class_names == ["cat", "sea lion"] and data.y.tolist() == [0, 0, 0, 1, 1, 1]
    x = data.batch(torch.tensor([5, 0]))[0]
    assert (
        x.shape == (2, 3, 10, 12) and (x[0] * 255).unique().tolist() == [102] and (x[1] * 255).unique().tolist() == [0]
    )
    assert load_data(f"folder:{tree}", size=8).batch(slice(None))[0].shape == (6, 3, 8, 8)
    archive = tree.parent / "set.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(tree.rglob("*.png")):
            file.write(path, f"train/{path.relative_to(tree)}")
    zipped = load_data(f"folder:{archive}", "train")
    assert torch.equal(zipped.batch(slice(None))[0], data.batch(slice(None))[0])
    with pytest.raises(ValueError, match="no split 'test', only train"):
        load_data(f"folder:{archive}", "test")


def test_folder_names_from_json(tree):
    (tree / "classes.json").write_text(json.dumps({"cat": "domestic cat", "sea_lion": ["seal", "sea lion"]}))
    assert load_data(f"folder:{tree}").class_names == ["domestic cat", "seal"]


def test_broken_folders_are_named(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected .*<class>/<image>"):
        load_data(f"folder:{tmp_path / 'nothing'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        load_data(f"folder:{tmp_path / 'empty'}")
    (tree / "dog").mkdir()
    with pytest.raises(ValueError, match="without images: dog"):
        load_data(f"folder:{tree}")
    (tree / "dog").rmdir()
    (tree / "cat" / "9.png").write_bytes((tree / "cat" / "0.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="cannot decode cat/9.png"):
        load_data(f"folder:{tree}").batch(slice(None))
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tree / "cat" / "9.png")
    with pytest.raises(ValueError, match="differ in size.*Pass size="):
        load_data(f"folder:{tree}").batch(slice(None))
    (tree / "cat" / "9.png").rename(tree / "9.png")
    with pytest.raises(ValueError, match="9.png is in no class folder"):
        load_data(f"folder:{tree}")


def test_folders_may_be_links(tree, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "test").symlink_to(tree, target_is_directory=True)
    linked, plain = load_data(f"folder:{tmp_path / 'linked'}"), load_data(f"folder:{tree}")
    assert linked.class_names == plain.class_names and torch.equal(linked.read(linked.index), plain.read(plain.index))


def test_unknown_specs():
    for spec in ("cifar", "npz:", "wds:", "torchvision:DTD", "torchvision:DTD:", "torchvision::x", "zip:x"):
        with pytest.raises(ValueError, match="expected digits, npz:PATH, folder:PATH, wds:PATH, parquet:PATH"):
            load_data(spec)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_data("npz:/nowhere.npz")


def test_templates():
    for name in TEMPLATES:
        assert all("{}" in template for template in templates(name))
    assert len(templates("openai")) == 80 and templates("openai")[0] == "a bad photo of a {}."
    with pytest.raises(ValueError, match="unknown templates"):
        templates("imagenet")


def test_real_photographs(shared_data):
    test = load_data(f"npz:{shared_data / 'cifar10' / 'test2000.npz'}")
    assert (
        len(test) == 2000 and test.class_names[0] == "airplane" and test.batch(slice(0, 4))[0].shape == (4, 3, 32, 32)
    )
    train = load_data(f"folder:{shared_data / 'cifar10' / 'train20000_jpeg.zip'}", "train")
    assert len(train) == 20000 and train.class_names == test.class_names
    tiny = load_data(f"folder:{shared_data / 'tiny_imagenet' / 'val2000_dev.zip'}")
    assert len(tiny) == 2000 and len(tiny.class_names) == 200 and not tiny.class_names[0].startswith("n0")
    assert tiny.batch(slice(0, 2))[0].shape == (2, 3, 64, 64)


def test_few_shots_are_a_fixed_draw_of_every_class():
    full = load_data("digits", "train")
    few = full.few_shot(16, seed=1)
    assert few.y.bincount().tolist() == [16] * 10 and few.index_rule == "16 per class (seed=1)"
    assert torch.equal(few.index, few.index.sort().values) and len(few.index.unique()) == 160
    assert torch.equal(few.index, full.few_shot(16, seed=1).index)
    assert not torch.equal(few.index, full.few_shot(16, seed=2).index)
    fewer = set(full.few_shot(4, seed=1).index.tolist())
    assert fewer < set(few.index.tolist()), "one draw, cut where it is asked for"
    assert (
        dict(zip(full.index.tolist(), full.y.tolist(), strict=True)).items()
        >= dict(zip(few.index.tolist(), few.y.tolist(), strict=True)).items()
    )
    assert full.few_shot(131).index_rule == "131 per class (seed=0), 4 classes have fewer"
    with pytest.raises(ValueError, match="at least 1"):
        full.few_shot(0)


def test_base_and_new_classes_are_data_sets_of_their_own():
    full, base, new = (load_data(f"digits{part}") for part in ("", "+classes=base", "+classes=new"))
    assert base.class_names + new.class_names == full.class_names and len(base) + len(new) == len(full)
    assert base.name == "digits+classes=base" and base.index_rule == "all" and base.n_total == len(base)
    assert sorted(new.y.unique().tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(new.y + 5, full.y[full.y >= 5]) and torch.equal(new.index, full.index[full.y >= 5])
    assert load_data("digits+classes=new", limit=20).index_rule == "perm(seed=0)[:20]"
    with pytest.raises(ValueError, match="classes must be base or new, got 'old'"):
        load_data("digits+classes=old")


@pytest.mark.parametrize("width, height", [(40, 30), (31, 47), (33, 32), (32, 32), (200, 33), (20, 20)])
@pytest.mark.parametrize("resize, interpolation", [(None, "bicubic"), (37, "bilinear")])
def test_fit_is_what_torchvisions_transforms_do(width, height, resize, interpolation):
    from torchvision import transforms

    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    mode = transforms.InterpolationMode(interpolation)
    theirs = transforms.Compose([transforms.Resize(resize or 32, interpolation=mode), transforms.CenterCrop(32)])
    expected = torch.from_numpy(np.array(theirs(image))).permute(2, 0, 1)
    assert torch.equal(Fit(32, resize, interpolation)(image), expected)


def test_squashed_images_keep_all_that_is_in_them():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    expected = torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert torch.equal(Fit(32, squash=True)(image), expected)


def test_fit_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="cannot cut 32 pixels out of 31"):
        Fit(32, 31)
    with pytest.raises(ValueError, match="bicubic or bilinear, got 'nearest'"):
        Fit(32, interpolation="nearest")
