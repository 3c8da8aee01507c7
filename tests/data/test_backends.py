"""WebDataset shards and torchvision's sets: trees written here from the digits, in the layouts of the originals."""

import io
import json
import os
import pickle
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from rvlm.data import load_data, torchvision_sets
from rvlm.data.torchvision_sets import CALLED, SETS

N = 6
DIGITS = load_data("digits", "test", size=16)
PIXELS = DIGITS.read(DIGITS.index[:N])
LABELS = [2, 0, 1, 1, 0, 2]
NAMES = ["cat", "sea_lion", "ice cream"]


def encoded(pixels, kind="png", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, {"jpg": "jpeg"}.get(kind, kind), **options)
    return buffer.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def members(rows, kind="png", **options):
    for i in rows:
        yield f"s{i:07d}.{kind}", encoded(PIXELS[i], kind, **options)
        yield f"s{i:07d}.cls", str(LABELS[i]).encode()


@pytest.fixture
def shards(tmp_path):
    """A test split of N samples in 3 tars, as CLIP_benchmark exports them."""
    root = tmp_path / "set"
    for k in range(3):
        write_tar(root / "test" / f"{k}.tar", members([2 * k, 2 * k + 1]))
    (root / "test" / "nshards.txt").write_text("3\n")
    (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    return root


def pixels(data, rows=slice(None)):
    return (data.batch(rows)[0] * 255).round().to(torch.uint8)


def check(data, expected=PIXELS, labels=LABELS):
    """The same labels, and pixels in the order of the source, in any order, and after pickling."""
    assert data.y.dtype == data.index.dtype == torch.int64 and data.y.tolist() == list(labels)
    assert data.read(data.index).dtype == torch.uint8 and data.n_total == len(data) == len(labels)
    assert torch.equal(pixels(data), expected)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    assert torch.equal(pixels(data, order), expected[order])
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(pixels(again, order), expected[order]) and again.fingerprint == data.fingerprint
    row = len(data) - 1
    kept = data.subset(torch.tensor([row]), "the last")
    assert kept.index.tolist() == [row] and torch.equal(pixels(kept), expected[row:])


# WebDataset


@pytest.mark.parametrize("kind, options", [("png", {}), ("webp", {"lossless": True}), ("jpg", {}), ("jpeg", {})])
def test_shards_hold_what_was_written(shards, kind, options):
    for k in range(3):
        write_tar(shards / "test" / f"{k}.tar", members([2 * k, 2 * k + 1], kind, **options))
    data = load_data(f"wds:{shards}")
    files = [Image.open(io.BytesIO(encoded(p, kind, **options))).convert("RGB") for p in PIXELS]
    written = torch.stack([torch.from_numpy(np.array(file)).permute(2, 0, 1) for file in files])
    assert torch.equal(written, PIXELS) == (kind in ("png", "webp")), "these two are exact"
    check(data, written)
    assert (data.name, data.split, data.class_names) == ("wds:set", "test", NAMES)


def test_shards_by_size_and_limit(shards):
    assert pixels(load_data(f"wds:{shards}", size=8)).shape == (N, 3, 8, 8)
    few = load_data(f"wds:{shards}", limit=3)
    assert len(few) == 3 and few.n_total == N and torch.equal(pixels(few), PIXELS[few.index])


def test_a_folder_of_tars_and_a_single_tar(shards, tmp_path):
    whole = load_data(f"wds:{shards}")
    inside = load_data(f"wds:{shards / 'test'}")
    check(inside)
    assert inside.class_names == NAMES, "beside the folder called test"
    one = load_data(f"wds:{shards / 'test' / '1.tar'}")
    check(one, PIXELS[2:4], LABELS[2:4])
    assert one.class_names == NAMES and one.name == "wds:1.tar"
    loose = tmp_path / "loose"
    for number, k in ((2, 0), (10, 1), (11, 2)):  # in this order: by number, not by letter
        write_tar(loose / f"{number}.tar", members([2 * k, 2 * k + 1]))
    (loose / "._2.tar").write_bytes(b"what another system left")
    data = load_data(f"wds:{loose}", "train")
    check(data)
    assert data.class_names == ["0", "1", "2"] and data.fingerprint != whole.fingerprint
    (shards / "test").rename(shards / "val")
    check(load_data(f"wds:{shards}", "test"))


def test_members_in_any_order_among_others(tmp_path):
    pairs = list(members(range(N)))
    images, labels = pairs[::2], pairs[1::2]
    others = [("README", b"x"), ("s0000001.json", b"{}"), (".png", b"x"), ("a/._s1.png", b"x"), ("a.b.png", b"x")]
    moved = [(f"./a/{name.replace('png', 'PNG')}", content) for name, content in images]
    write_tar(tmp_path / "x.tar", [*others, *((f"./a/{name}", b" %s\n" % c) for name, c in labels[::-1]), *moved])
    check(load_data(f"wds:{tmp_path / 'x.tar'}"))
    long = "k" * 150  # needs a header of its own
    write_tar(tmp_path / "x.tar", [(f"{long}.png", images[0][1]), (f"{long}.cls", b"0")])
    check(load_data(f"wds:{tmp_path / 'x.tar'}"), PIXELS[:1], [0])


def test_equal_keys_in_two_tars_are_two_samples(tmp_path):
    for k in range(2):
        write_tar(tmp_path / "set" / f"{k}.tar", [("0.png", encoded(PIXELS[k])), ("0.cls", b"1")])
    check(load_data(f"wds:{tmp_path / 'set'}"), PIXELS[:2], [1, 1])


def test_threads_do_not_mix_up_what_they_read(shards):
    get = load_data(f"wds:{shards}").read.get
    rows = torch.randint(N, (600,), generator=torch.Generator().manual_seed(2)).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(get, rows)) == [encoded(PIXELS[i]) for i in rows]


def test_missing_shards_are_named(shards, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tars in .*nothing: expected .*nothing/test/nshards.txt and"):
        load_data(f"wds:{tmp_path / 'nothing'}")
    with pytest.raises(ValueError, match="no split 'train', only test: choose"):
        load_data(f"wds:{shards}", "train")
    with pytest.raises(ValueError, match="unknown split 'dev': expected train, test or val"):
        load_data(f"wds:{shards / 'test' / '0.tar'}", "dev")
    (shards / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="no tars in .*train: expected"):
        load_data(f"wds:{shards}", "train")
    (shards / "test" / "1.tar").rename(shards / "test" / "1.gone")
    with pytest.raises(ValueError, match=r"nshards.txt says 3, but beside it are 2 tars, without 1.tar.*Complete"):
        load_data(f"wds:{shards}")
    (shards / "test" / "nshards.txt").write_text("1")
    with pytest.raises(ValueError, match=r"says 1, but beside it are 2 tars: expected 0.tar ... 0.tar"):
        load_data(f"wds:{shards}")
    (shards / "test" / "nshards.txt").write_text("many")
    with pytest.raises(ValueError, match="holds 'many': expected the number of tars"):
        load_data(f"wds:{shards}")
    write_tar(tmp_path / "empty.tar", [("notes.txt", b"x")])
    with pytest.raises(ValueError, match=r"no samples: expected KEY.jpg, .jpeg, .png, .webp and KEY.cls"):
        load_data(f"wds:{tmp_path / 'empty.tar'}")


def test_every_cut_of_a_tar_is_noticed(shards):
    tar = shards / "test" / "1.tar"
    whole = tar.read_bytes()
    with tarfile.open(tar) as archive:
        end = max(member.offset_data + 512 * -(-member.size // 512) for member in archive)
    for length in (*range(0, end, 256), end - 1, end):
        tar.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"1\.tar is not a whole, uncompressed tar .*Fetch or write it again"):
            load_data(f"wds:{shards}")
    for wrong in (whole[:1024] + b"x" * 2048, b"\x1f\x8b" + whole, bytes(100)):
        tar.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"1\.tar is not a whole, uncompressed tar"):
            load_data(f"wds:{shards}")
    tar.write_bytes(whole[: end + 512])  # one block of zeros ends it
    check(load_data(f"wds:{shards}"))


@pytest.mark.parametrize("more, message", [
    ([("a.png", b"x")], "x.tar: a.png has no label; expected a.cls"),
    ([("b/a.cls", b"1")], r"x.tar: b/a.cls has no image; expected b/a.jpg, .jpeg, .png, .webp in the same tar"),
    ([("a.png", b"x"), ("a.webp", b"x"), ("a.cls", b"1")], r"a has two images \(a.webp\)"),
    ([("s0000001.cls", b"1")], r"s0000001 has two labels"),
    ([("a.png", b"x"), ("a.cls", b"dog")], r"a.cls holds b'dog'; expected the number of a class"),
    ([("a.png", b"x"), ("a.cls", b"-1")], r"a.cls holds b'-1'"),
    ([("a.png", b"x"), ("a.cls", b"")], r"a.cls holds b''"),
    ([("a.png", b"x"), ("a.cls", b"9" * 30)], r"a.cls holds b'999"),
    ([("a.b.png", b"x"), ("a.cls", b"1")], r"a.cls has no image"),
    ([("a.png", b"x"), ("a.cls", b"3")], r"labels span 0 .. 3, but there are 3 class names. .*correct them"),
])  # fmt: skip
def test_bad_samples_are_named(tmp_path, more, message):
    write_tar(tmp_path / "x.tar", [*members(range(N)), *more])
    (tmp_path / "classnames.txt").write_text("\n".join(NAMES))
    with pytest.raises(ValueError, match=message):
        load_data(f"wds:{tmp_path / 'x.tar'}")


def test_bad_images_of_shards_are_named_when_read(tmp_path):
    good = encoded(PIXELS[0])
    write_tar(tmp_path / "x.tar", [*members(range(N)), ("a.png", good[: len(good) // 2]), ("a.cls", b"1")])
    data = load_data(f"wds:{tmp_path / 'x.tar'}")
    assert torch.equal(pixels(data, slice(0, N)), PIXELS)
    with pytest.raises(ValueError, match=r"cannot decode x.tar/a.png .*Repair or remove it"):
        data.batch(slice(N, N + 1))
    write_tar(tmp_path / "x.tar", [*members(range(N)), ("a.png", encoded(PIXELS[0][:, :9])), ("a.cls", b"1")])
    data = load_data(f"wds:{tmp_path / 'x.tar'}")
    with pytest.raises(ValueError, match=r"x.tar/a.png is 16 x 9, the first read was 16 x 16\). Pass size="):
        data.batch(slice(None))
    assert pixels(load_data(f"wds:{tmp_path / 'x.tar'}", size=8)).shape == (N + 1, 3, 8, 8)
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:1000])
    fresh = pickle.loads(pickle.dumps(data))
    with pytest.raises(ValueError, match="cannot decode x.tar/a.png .x.tar was cut off after it was indexed"):
        fresh.batch(slice(N, N + 1))


def test_an_empty_line_among_the_class_names(shards):
    (shards / "classnames.txt").write_text("cat\n\nice cream\n")
    with pytest.raises(ValueError, match="classnames.txt: line 2 is empty"):
        load_data(f"wds:{shards}")


# torchvision. Files called .jpg hold PNGs, which PIL goes by, so that pixels are exact.


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def images(folder, names):
    for name, image in zip(names, PIXELS, strict=True):
        put(folder / name, encoded(image))


def no_md5(monkeypatch, kind, **files):
    for attribute, value in files.items():
        monkeypatch.setattr(kind, attribute, value)


def write_cifar10(root, monkeypatch):
    no_md5(
        monkeypatch, datasets.CIFAR10, train_list=[["data_batch_1", None], ["data_batch_2", None]],
        test_list=[["test_batch", None]], meta={"filename": "batches.meta", "key": "label_names", "md5": None},
    )  # fmt: skip
    base, large = root / "cifar-10-batches-py", np.repeat(np.repeat(PIXELS.numpy(), 2, 2), 2, 3)
    for name, rows in (("data_batch_1", [0, 1]), ("data_batch_2", [2, 3, 4, 5]), ("test_batch", [5, 0])):
        entry = {"data": large[rows].reshape(len(rows), -1), "labels": [LABELS[i] for i in rows]}
        put(base / name, pickle.dumps(entry))
    put(base / "batches.meta", pickle.dumps({"label_names": NAMES}))
    large = torch.from_numpy(large)
    return {"train": (large, LABELS), "test": (large[[5, 0]], [LABELS[5], LABELS[0]])}


def write_mnist(root, monkeypatch):
    for prefix, rows in (("train", range(N)), ("t10k", [3, 1])):
        grey = PIXELS[rows, 0].contiguous().numpy()
        header = b"".join(int(v).to_bytes(4, "big") for v in (0x803, *grey.shape))
        put(root / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte", header + grey.tobytes())
        header = b"".join(int(v).to_bytes(4, "big") for v in (0x801, len(grey)))
        put(root / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", header + bytes(LABELS[i] for i in rows))
    return {"train": (PIXELS, LABELS), "test": (PIXELS[[3, 1]], [1, 0])}


def write_qmnist(root, monkeypatch):
    grey = PIXELS[:, 0].contiguous().numpy()
    header = b"".join(int(v).to_bytes(4, "big") for v in (0x803, *grey.shape))
    put(root / "QMNIST" / "raw" / "qmnist-test-images-idx3-ubyte", header + grey.tobytes())
    header = b"".join(int(v).to_bytes(4, "big") for v in (0xC02, N, 8))
    writers = np.array([[c, *range(100, 107)] for c in LABELS], ">i4")
    put(root / "QMNIST" / "raw" / "qmnist-test-labels-idx2-int", header + writers.tobytes())
    return {"test": (PIXELS, LABELS)}


def write_dtd(root, monkeypatch):
    files = [f"{NAMES[c].replace(' ', '_')}/{k}.jpg" for k, c in enumerate(LABELS)]
    images(root / "dtd" / "dtd" / "images", files)
    rows = {"train": [0, 1, 2, 3], "val": [5, 4, 2], "test": range(N)}
    for split, some in rows.items():
        put(root / "dtd" / "dtd" / "labels" / f"{split}1.txt", "\n".join(files[i] for i in some))
    sort = [0, 2, 1]  # by name: cat, ice cream, sea lion
    return {split: (PIXELS[some], [sort[LABELS[i]] for i in some]) for split, some in rows.items()}


def write_pets(root, monkeypatch):
    base, stems = root / "oxford-iiit-pet", [f"{NAMES[c].replace(' ', '_')}_{k}" for k, c in enumerate(LABELS)]
    images(base / "images", [f"{stem}.jpg" for stem in stems])
    for split in ("trainval", "test"):
        lines = [f"{stem} {c + 1} 1 1" for stem, c in zip(stems, LABELS, strict=True)]
        put(base / "annotations" / f"{split}.txt", "\n".join(lines))
    return {split: (PIXELS, LABELS) for split in ("trainval", "train", "test")}


def write_eurosat(root, monkeypatch):
    order = sorted(range(N), key=lambda k: (LABELS[k], k))
    images(root / "eurosat" / "2750", [f"{'abc'[c]}_x/{k}.png" for k, c in enumerate(LABELS)])
    return {"test": (PIXELS[order], sorted(LABELS))}


def write_caltech101(root, monkeypatch):
    base = root / "caltech101" / "101_ObjectCategories"
    order = sorted(range(N), key=lambda k: (LABELS[k], k))
    images(base, [f"{'abc'[c]}_x/image_{LABELS[:k].count(c) + 1:04d}.jpg" for k, c in enumerate(LABELS)])
    (base / "BACKGROUND_Google").mkdir()
    return {"test": (PIXELS[order], sorted(LABELS))}


def write_caltech256(root, monkeypatch):
    order = sorted(range(N), key=lambda k: (LABELS[k], k))
    names = [f"{c + 1:03d}.{'abc'[c]}-x/{c + 1:03d}_{LABELS[:k].count(c) + 1:04d}.jpg" for k, c in enumerate(LABELS)]
    images(root / "caltech256" / "256_ObjectCategories", names)
    return {"test": (PIXELS[order], sorted(LABELS))}


def write_sun397(root, monkeypatch):
    put(root / "SUN397" / "ClassName.txt", "/a/abbey\n/b/bar/indoor\n/s/ski_slope\n")
    names = [f"{['a/abbey', 'b/bar/indoor', 's/ski_slope'][c]}/sun_{9 - k}.jpg" for k, c in enumerate(LABELS)]
    images(root / "SUN397", names)
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(listed(self, pattern), reverse=True))
    order = sorted(range(N), key=lambda k: (LABELS[k], -k))
    return {"test": (PIXELS[order], sorted(LABELS))}


def write_food101(root, monkeypatch):
    stems = [f"{NAMES[c].replace(' ', '_')}/{k}" for k, c in enumerate(LABELS)]
    images(root / "food-101" / "images", [f"{stem}.jpg" for stem in stems])
    order = sorted(range(N), key=lambda k: (LABELS[k], k))
    listed = {name.replace(" ", "_"): [stems[k] for k in order if LABELS[k] == c] for c, name in enumerate(NAMES)}
    for split in ("train", "test"):
        put(root / "food-101" / "meta" / f"{split}.json", json.dumps(listed))
    labels = [[0, 2, 1][LABELS[k]] for k in order]
    return {"train": (PIXELS[order], labels), "test": (PIXELS[order], labels)}


def write_gtsrb(root, monkeypatch):
    order = sorted(range(N), key=lambda k: (LABELS[k], k))
    images(root / "gtsrb" / "GTSRB" / "Training", [f"{c:05d}/{k}.ppm" for k, c in enumerate(LABELS)])
    images(root / "gtsrb" / "GTSRB" / "Final_Test" / "Images", [f"{k}.ppm" for k in range(N)])
    rows = "\n".join(f"{k}.ppm;{c}" for k, c in enumerate(LABELS))
    put(root / "gtsrb" / "GT-final_test.csv", f"Filename;ClassId\n{rows}\n")
    return {"train": (PIXELS[order], sorted(LABELS)), "test": (PIXELS, LABELS)}


def write_stl10(root, monkeypatch):
    no_md5(
        monkeypatch, datasets.STL10, train_list=[["train_X.bin", None], ["train_y.bin", None]],
        test_list=[["test_X.bin", None], ["test_y.bin", None]],
    )  # fmt: skip
    large = PIXELS.repeat_interleave(6, 2).repeat_interleave(6, 3)
    for split in ("train", "test"):
        put(root / "stl10_binary" / f"{split}_X.bin", large.transpose(2, 3).contiguous().numpy().tobytes())
        put(root / "stl10_binary" / f"{split}_y.bin", bytes(c + 1 for c in LABELS))
    put(root / "stl10_binary" / "class_names.txt", "\n".join(NAMES))
    return {"train": (large, LABELS), "test": (large, LABELS)}


def write_svhn(root, monkeypatch):
    from scipy.io import savemat

    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda path, md5: os.path.isfile(path))
    arrays = {"X": PIXELS.permute(2, 3, 1, 0).numpy(), "y": np.array([[10 if c == 0 else c] for c in LABELS])}
    savemat(root / "extra_32x32.mat", arrays)
    return {"extra": (PIXELS, LABELS)}


def write_imagenet(root, monkeypatch):
    torch.save(({"n01": ("tench", "Tinca tinca"), "n02": ("sea_lion",), "n03": ("stove",)}, []), root / "meta.bin")
    order = sorted(range(N), key=lambda k: (LABELS[k], k))
    for split in ("train", "val"):
        images(root / split, [f"n0{c + 1}/{k}.JPEG" for k, c in enumerate(LABELS)])
    return {split: (PIXELS[order], sorted(LABELS)) for split in ("train", "val", "test")}


def write_country211(root, monkeypatch):
    order = sorted(range(N), key=lambda k: (LABELS[k], k))
    images(root / "country211" / "valid", [f"{'ABC'[c]}D/{k}.jpg" for k, c in enumerate(LABELS)])
    return {"val": (PIXELS[order], sorted(LABELS)), "valid": (PIXELS[order], sorted(LABELS))}


DIGIT_WORDS = DIGITS.class_names
WRITTEN = {
    "CIFAR10": (write_cifar10, ["cat", "sea lion", "ice cream"]),
    "MNIST": (write_mnist, DIGIT_WORDS),
    "QMNIST": (write_qmnist, DIGIT_WORDS),
    "DTD": (write_dtd, ["cat", "ice cream", "sea lion"]),
    "OxfordIIITPet": (write_pets, ["Cat", "Sea Lion", "Ice Cream"]),
    "EuroSAT": (write_eurosat, ["a x", "b x", "c x"]),
    "Caltech101": (write_caltech101, ["a x", "b x", "c x"]),
    "Caltech256": (write_caltech256, ["a-x", "b-x", "c-x"]),
    "SUN397": (write_sun397, ["abbey", "bar/indoor", "ski slope"]),
    "Food101": (write_food101, ["cat", "ice cream", "sea lion"]),
    "GTSRB": (write_gtsrb, None),
    "STL10": (write_stl10, NAMES[:1] + ["sea lion"] + NAMES[2:]),
    "SVHN": (write_svhn, DIGIT_WORDS),
    "ImageNet": (write_imagenet, ["tench", "sea lion", "stove"]),
    "Country211": (write_country211, ["AD", "BD", "CD"]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_torchvision_sets_hold_what_was_written(name, tmp_path, monkeypatch):
    write, names = WRITTEN[name]
    for split, (expected, labels) in write(tmp_path, monkeypatch).items():
        data = load_data(f"torchvision:{name.lower()}:{tmp_path}", split)
        check(data, expected, labels)
        assert (data.name, data.split) == (f"torchvision:{name}", split)
        assert len(data.class_names) == 43 if names is None else data.class_names == names
        assert pixels(load_data(f"torchvision:{name}:{tmp_path}", split, size=8)).shape[1:] == (3, 8, 8)
        few = load_data(f"torchvision:{name}:{tmp_path}", split, limit=1)
        assert len(few) == 1 and torch.equal(pixels(few), expected[few.index])


def test_signs_have_their_names(tmp_path, monkeypatch):
    write_gtsrb(tmp_path, monkeypatch)
    names = load_data(f"torchvision:GTSRB:{tmp_path}").class_names
    known = {0: "20", 5: "80 km/h", 6: "end of", 8: "120", 12: "priority road", 14: "stop", 17: "no entry",
             25: "road work", 30: "ice", 38: "keep right", 40: "roundabout", 42: "trucks"}  # fmt: skip
    assert all(word in names[c] for c, word in known.items()) and len(set(names)) == 43


@pytest.mark.parametrize("name", SETS)
def test_the_table_of_splits_is_torchvisions(name, tmp_path):
    kind = getattr(datasets, name)
    if not SETS[name] or SETS[name] == ("train", "test") and "train" in kind.__init__.__code__.co_varnames:
        with pytest.raises(TypeError, match="split"):
            kind(tmp_path, split="x", download=False)
        return
    with pytest.raises((ValueError, RuntimeError)) as caught:
        kind(tmp_path, split="no such split")
    if "h5py" in str(caught.value):
        pytest.skip("h5py is not installed")
    accepted = set(re.findall(r"'([^']+)'", str(caught.value).partition("Valid values are")[2]))
    without_labels = {"STL10": {"unlabeled", "train+unlabeled"}, "CLEVRClassification": {"test"}, "Places365": {"test"}}
    assert set(SETS[name]) == accepted - without_labels.get(name, set())


@pytest.mark.parametrize("name", SETS)
def test_a_set_that_is_not_there_is_not_fetched(name, tmp_path, monkeypatch):
    for call in ("socket.socket.connect", "socket.getaddrinfo"):
        monkeypatch.setattr(call, lambda *_, **__: pytest.fail("a connection was asked for"))
    split = SETS[name][0] if SETS[name] else "test"
    with pytest.raises(FileNotFoundError, match=f"no folder .*nowhere: expected the one with the files of {name}"):
        load_data(f"torchvision:{name}:{tmp_path / 'nowhere'}", split)
    assert not (tmp_path / "nowhere").exists()
    if name == "PCAM" and find_spec("h5py") is None:
        with pytest.raises(ImportError, match="pip install h5py"):
            load_data(f"torchvision:{name}:{tmp_path}", split)
        return
    with pytest.raises(
        FileNotFoundError, match=f"no complete {name} .{split}. in .*. rvlm downloads nothing"
    ) as caught:
        load_data(f"torchvision:{name}:{tmp_path}", split)
    assert str(tmp_path) in str(caught.value) and f"torchvision.datasets.{name}" in str(caught.value)


def test_unknown_sets_and_splits(tmp_path):
    for wrong, right in (("CIFAR-10", "CIFAR10"), ("oxfordpets", "OxfordIIITPet"), ("FGVC_Aircraft", "FGVCAircraft")):
        with pytest.raises(ValueError, match=f"unknown torchvision set '{wrong}'; did you mean {right}.: expected one"):
            load_data(f"torchvision:{wrong}:{tmp_path}")
    with pytest.raises(ValueError, match="unknown torchvision set 'zzz': expected one of CIFAR10, .*SVHN"):
        load_data(f"torchvision:zzz:{tmp_path}")
    for name in ("Caltech101", "Caltech256", "EuroSAT", "SEMEION", "SUN397"):
        for split in ("train", "val"):
            with pytest.raises(ValueError, match=f"{name} has no splits: ask for all of it as test, not for '{split}'"):
                load_data(f"torchvision:{name}:{tmp_path}", split)
    for name, split, accepted in (
        ("CIFAR10", "val", "train, test"),
        ("OxfordIIITPet", "val", "trainval, test"),
        ("DTD", "dev", "train, val, test"),
        ("STL10", "unlabeled", "train, test"),
    ):
        with pytest.raises(ValueError, match=f"{name} has the splits {accepted}, got '{split}'"):
            load_data(f"torchvision:{name}:{tmp_path}", split)
    assert "test" not in CALLED["val"] and "test" not in CALLED["train"]


def test_a_set_that_this_torchvision_lacks(tmp_path, monkeypatch):
    monkeypatch.delattr(datasets, "DTD")
    with pytest.raises(ValueError, match="this torchvision has no DTD: upgrade it"):
        load_data(f"torchvision:DTD:{tmp_path}")


def test_damaged_sets_are_named(tmp_path, monkeypatch):
    write_dtd(tmp_path, monkeypatch)
    labels = tmp_path / "dtd" / "dtd" / "labels"
    (labels / "train1.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no complete DTD \(train\) in .*train1.txt"):
        load_data(f"torchvision:DTD:{tmp_path}", "train")
    (labels / "train1.txt").write_text("")
    with pytest.raises(ValueError, match=r"DTD \(train\) in .* holds no samples"):
        load_data(f"torchvision:DTD:{tmp_path}", "train")
    (labels / "train1.txt").write_text("no folder\n")
    with pytest.raises(ValueError, match=r"torchvision cannot read DTD \(train\) in .*ValueError"):
        load_data(f"torchvision:DTD:{tmp_path}", "train")
    (tmp_path / "dtd" / "dtd" / "images" / "cat" / "1.jpg").write_bytes(b"nothing")
    (tmp_path / "dtd" / "dtd" / "images" / "cat" / "4.jpg").unlink()
    data = load_data(f"torchvision:DTD:{tmp_path}")
    assert torch.equal(pixels(data, slice(0, 1)), PIXELS[:1]), "the others can still be read"
    for row in (1, 4):
        with pytest.raises(ValueError, match=f"DTD in .*: cannot decode sample {row} .*Repair or remove it"):
            data.batch(slice(row, row + 1))
    put(tmp_path / "dtd" / "dtd" / "images" / "cat" / "1.jpg", encoded(PIXELS[0][:, :9]))
    with pytest.raises(ValueError, match=r"differ in size \(sample 1 is 16 x 9, the first .* 16 x 16\). Pass size="):
        load_data(f"torchvision:DTD:{tmp_path}").batch(slice(0, 3))


class InMemory:
    """A set as PCAM is one: it does not say where its labels are. Images are arrays."""

    samples = [(PIXELS[i].permute(1, 2, 0).numpy(), LABELS[i]) for i in range(N)]

    def __init__(self, root, split, download):
        assert split == "test" and download is False

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


def test_labels_of_a_set_that_does_not_show_them(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "PCAM", InMemory)
    monkeypatch.setitem(torchvision_sets.NAMES, "PCAM", NAMES)
    check(load_data(f"torchvision:PCAM:{tmp_path}"))
    monkeypatch.setattr(InMemory, "samples", [(PIXELS[i, 0].numpy(), c) for i, c in enumerate(LABELS)])
    check(load_data(f"torchvision:PCAM:{tmp_path}"))
    monkeypatch.setattr(InMemory, "samples", [(None, 0), (None, None)])
    with pytest.raises(ValueError, match=r"PCAM \(test\) in .* samples without a label, the first is sample 1"):
        load_data(f"torchvision:PCAM:{tmp_path}")
    monkeypatch.setattr(InMemory, "samples", [(None, 9)])
    with pytest.raises(ValueError, match="labels span 9 .. 9, but there are 3 class names"):
        load_data(f"torchvision:PCAM:{tmp_path}")


def test_nothing_of_this_machine_is_in_a_name(shards, tmp_path, monkeypatch):
    write_dtd(tmp_path, monkeypatch)
    for spec in (f"wds:{shards}", f"wds:{shards / 'test' / '0.tar'}", f"torchvision:DTD:{tmp_path}"):
        data = load_data(spec)
        assert str(tmp_path) not in data.name and data.fingerprint == load_data(spec).fingerprint
