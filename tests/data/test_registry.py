"""The registry and `rvlm data`: what is found on disk, that what is not as it should be is named and counted."""

import dataclasses
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from rvlm.cli import main
from rvlm.data import load_data, templates
from rvlm.data.make_wds import make_wds
from rvlm.data.prompts import fingerprint
from rvlm.data.registry import SETTINGS, entries, find, where

DIGITS = load_data("digits", "test", size=16)
PIXELS = DIGITS.read(DIGITS.index[:6])
LABELS = [0, 1, 2, 0, 1, 2]
NAMES = ["cat", "sea lion", "ice cream"]


def encoded(pixels, kind="jpeg"):
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, kind)
    return buffer.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def decoded(i, kind="jpeg"):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(encoded(PIXELS[i], kind))).convert("RGB"))).permute(2, 0, 1)


ALL = torch.stack([decoded(i) for i in range(6)])


def describe(root, name="zoo", **known):
    """ROOT/datasets.yaml with one set of 3 classes and 6 test samples."""
    known = {"title": "Zoo", "classes": 3} | known
    write(root / "datasets.yaml", yaml.safe_dump({name: known}, sort_keys=False))


def write_wds(root, rows=range(6), names=NAMES):
    for k in (0, 1):
        path = root / "test" / f"{k}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for i in [i for i in rows if i // 3 == k]:
                parts = {f"s{i:07d}.jpg": encoded(PIXELS[i]), f"s{i:07d}.cls": str(LABELS[i]).encode()}
                for name, content in parts.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    write(root / "test" / "nshards.txt", "2\n")
    write(root / "classnames.txt", "\n".join(names) + "\n")
    write(root / "zeroshot_classification_templates.txt", "a photo of a {c}.\na drawing of a {c}.\n")


def write_coop(root, rows=range(6)):
    for i in rows:
        write(root / "images" / f"{NAMES[LABELS[i]]}/{i}.jpg", encoded(PIXELS[i]))
    samples = [[f"{NAMES[LABELS[i]]}/{i}.jpg", LABELS[i], NAMES[LABELS[i]].replace(" ", "_")] for i in rows]
    write(root / "split_zhou_Zoo.json", json.dumps({"train": [], "val": [], "test": samples}))


COOP = {"at": "zoo", "list": "split_zhou_Zoo.json", "images": "images", "counts": {"test": 6}}
WDS = {"name": "animals/zoo", "counts": {"test": 6}}


def test_the_registry_holds_both_lists_and_the_shifts():
    known = entries()
    tecoa = "cifar10 cifar100 stl10 sun397 cars food101 pets flowers country211 dtd eurosat aircraft pcam hatefulmemes "
    tecoa += "imagenet caltech101 caltech256 tinyimagenet"
    coop = "imagenet caltech101 pets cars flowers food101 aircraft sun397 dtd eurosat ucf101"
    shifts = "imagenet-v2 imagenet-a imagenet-r imagenet-sketch imagenet-o objectnet"
    assert set(f"{tecoa} {coop} {shifts} flickr30k coco".split()) == set(known)
    for entry in known.values():
        assert entry.title and entry.layouts[-1].kind == ("karpathy" if entry.captions else "parquet")
        assert {layout.kind for layout in entry.layouts} <= set(SETTINGS)
        assert entry.prompt is None or templates(entry.prompt)
        for layout in entry.layouts:
            assert all(n is None or n > 0 for n in layout.counts.values())
            if layout.kind == "coop":
                assert set(layout.counts) == {"train", "val", "test"}
    tests = {name: {k.kind: k.counts.get("test") for k in entry.layouts} for name, entry in known.items()}
    assert tests["caltech101"] == {"wds": 6085, "coop": 2465, "torchvision": 8677, "parquet": None}
    assert tests["sun397"]["wds"] is None, "unknown, and not asserted"


def test_template_hashes_are_those_that_records_hold():
    assert fingerprint(templates("openai")) == "e30aa9d7fb289e07"
    layouts = {layout.kind: layout for layout in entries()["imagenet"].layouts}
    assert layouts["wds"].settings["templates"] == [80, "e30aa9d7fb289e07"]


@pytest.mark.parametrize("kind", ["wds", "coop", "both", "named"])
def test_a_name_finds_what_is_there(tmp_path, kind, monkeypatch):
    describe(tmp_path, layouts={"wds": WDS, "coop": COOP}, prompt="coop/pets")
    if kind != "coop":
        write_wds(tmp_path / "wds_animals-zoo")
    if kind != "wds":
        write_coop(tmp_path / "zoo")
    spec, at = {"named": ("zoo@coop", "coop"), "coop": ("zoo", "coop")}.get(kind, ("zoo", "wds"))
    data = load_data(f"{spec}:{tmp_path}", "test")
    assert data.name == f"zoo@{at}" and data.class_names == NAMES and data.y.tolist() == LABELS
    assert torch.equal(data.read(data.index), ALL)
    words = {"wds": ["a photo of a {}.", "a drawing of a {}."], "coop": ["a photo of a {}, a type of pet."]}[at]
    assert templates(data.template) == words
    monkeypatch.setenv("RVLM_DATA", str(tmp_path))
    assert load_data(spec).fingerprint == data.fingerprint, "the place does not matter"


def test_what_is_missing_says_where_it_may_lie(tmp_path):
    describe(tmp_path, layouts={"wds": WDS, "coop": COOP}, dead=["http://gone"], page="http://here", licence="ours")
    with pytest.raises(FileNotFoundError) as error:
        load_data(f"zoo:{tmp_path}")
    for word in ("wds_animals-zoo", "wds/animals/zoo", "split_zhou_Zoo.json", "http://gone", "http://here", "ours"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match="has the layouts wds, coop, parquet, got 'folder'"):
        load_data(f"zoo@folder:{tmp_path}")
    with pytest.raises(ValueError, match="did you mean zoo"):
        load_data(f"zooo:{tmp_path}")
    with pytest.raises(ValueError, match="holds images with captions"):
        write(tmp_path / "coco" / "dataset_coco.json", "{}")
        load_data(f"coco:{tmp_path}")
    describe(tmp_path, "cifar10", layouts={})
    with pytest.raises(ValueError, match="describes cifar10, which rvlm knows"):
        load_data(f"cifar10:{tmp_path}")
    for wrong, message in (
        ({"layout": {}}, "zoo has layout, expected"),
        ({"layouts": {"wdz": {}}}, "zoo has the layout 'wdz', expected wds"),
        ({"layouts": {"wds": {"counts": {}}}}, "zoo, wds has .'counts'.: expected .'name'."),
        ({"layouts": {"coop": COOP | {"colour": "red"}}}, "expected .'at', 'images', 'list'. and of counts"),
    ):
        describe(tmp_path, **wrong)
        with pytest.raises(ValueError, match=message):
            load_data(f"zoo:{tmp_path}")


def test_wrong_numbers_are_named(tmp_path):
    describe(tmp_path, layouts={"wds": WDS, "coop": COOP})
    write_wds(tmp_path / "wds" / "animals" / "zoo", [0, 1, 3, 4], [*NAMES, "dog"])
    message = "4 samples, expected 6; 4 classes, expected 3; 2 classes without samples: ice cream, dog"
    with pytest.raises(ValueError, match=message):
        load_data(f"zoo:{tmp_path}")


@pytest.mark.parametrize("content, message", [
    ("{", "is no JSON"),
    ({"train": []}, "has no split 'test'"),
    ({"test": []}, "lists no samples for test"),
    ({"test": [["a.jpg", 0, "cat"], ["a.jpg", 0, "cat"]]}, "lists 1 images twice for test: a.jpg"),
    ({"test": [["a.jpg", 0, "cat"], ["b.jpg", 0, "dog"]]}, "calls class 0 'dog', others 'cat'"),
    ({"test": [["a.jpg", 1, "cat"]]}, "labels must count from 0"),
    ({"test": [["a.jpg", 0]]}, "expected samples .path, label, class name."),
    ({"test": [["a.jpg", "x", "cat"]]}, "expected samples .path, label, class name."),
])  # fmt: skip
def test_broken_lists_are_named(tmp_path, content, message):
    describe(tmp_path, layouts={"coop": COOP})
    write(tmp_path / "zoo" / "split_zhou_Zoo.json", content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_data(f"zoo:{tmp_path}")


def test_aircraft_as_it_is_distributed(tmp_path):
    layout = {"at": "fgvc_aircraft", "list": "variants.txt", "counts": {"test": 6}}
    describe(tmp_path, layouts={"aircraft": layout})
    root = tmp_path / "fgvc_aircraft"
    for i in range(6):
        write(root / "images" / f"{i:07d}.jpg", encoded(PIXELS[i]))
    write(root / "variants.txt", "\n".join(NAMES) + "\n")
    write(root / "images_variant_test.txt", "".join(f"{i:07d} {NAMES[LABELS[i]]}\n" for i in range(6)))
    data = load_data(f"zoo:{tmp_path}")
    assert data.class_names == NAMES and torch.equal(data.read(data.index), ALL) and data.y.tolist() == LABELS
    with pytest.raises(FileNotFoundError, match="images_variant_train.txt"):
        load_data(f"zoo:{tmp_path}", "train")
    write(root / "images_variant_test.txt", "0000000 zebra\n")
    with pytest.raises(ValueError, match="0000000 is of class 'zebra'"):
        load_data(f"zoo:{tmp_path}")


def test_tiny_imagenet_as_it_is_distributed(tmp_path):
    layout = {"at": "tiny", "list": "val/val_annotations.txt", "counts": {"test": 6, "train": 3}}
    describe(tmp_path, layouts={"tiny": layout})
    root, synsets = tmp_path / "tiny", ["n02123045", "n02077923", "n07614500"]
    for i in range(6):
        write(root / "val" / "images" / f"val_{i}.JPEG", encoded(PIXELS[i]))
    write(root / "test" / "images" / "test_0.JPEG", encoded(PIXELS[0]))  # has no label
    for c, synset in enumerate(synsets):
        write(root / "train" / synset / "images" / f"{synset}_0.JPEG", encoded(PIXELS[c]))
        write(root / "train" / synset / f"{synset}_boxes.txt", "")
    lines = "".join(f"val_{i}.JPEG\t{synsets[LABELS[i]]}\t0\t0\t9\t9\n" for i in range(6))
    write(root / "val" / "val_annotations.txt", lines)
    write(root / "words.txt", "".join(f"{s}\t{n}, beast\n" for s, n in zip(synsets, NAMES, strict=True)))
    test, train = (load_data(f"zoo:{tmp_path}", split) for split in ("test", "train"))
    assert test.class_names == train.class_names == ["sea lion", "cat", "ice cream"], "in the order of their synsets"
    assert test.y.tolist() == [1, 0, 2, 1, 0, 2] and torch.equal(test.read(test.index), ALL)
    assert len(train) == 3
    write(root / "val" / "val_annotations.txt", "val_0.JPEG")
    with pytest.raises(ValueError, match="'val_0.JPEG' has no synset"):
        load_data(f"zoo:{tmp_path}")
    with pytest.raises(ValueError, match="unknown split 'tset': expected train, test, val"):
        load_data(f"zoo@tiny:{tmp_path}", "tset")


def test_folders_of_imagenet_get_the_names_that_clip_uses(tmp_path):
    layouts = {"folder": {"at": ["a", "b"], "names": "imagenet", "counts": {"test": 3}}}
    describe(tmp_path, layouts=layouts)
    for i, synset in enumerate(["n01440764", "n01443537", "n01498041"]):
        write(tmp_path / "b" / synset / "0.jpg", encoded(PIXELS[i]))
    data = load_data(f"zoo:{tmp_path}")
    assert data.class_names == ["tench", "goldfish", "stingray"] and data.y.tolist() == [0, 1, 2]
    describe(tmp_path, layouts=layouts, classes=1000)
    with pytest.raises(ValueError, match="3 classes, expected 1000 .without great white shark, tiger shark, "):
        load_data(f"zoo:{tmp_path}")
    describe(tmp_path, layouts=layouts)
    for i, number in enumerate(["10", "2", "1"]):  # ImageNetV2 calls its folders by number
        write(tmp_path / "a" / number / "0.jpg", encoded(PIXELS[i]))
    data = load_data(f"zoo:{tmp_path}")
    assert data.class_names == ["goldfish", "great white shark", "brambling"]
    brambling = data.read(data.index[data.y == 2])[0]
    assert torch.equal(brambling, ALL[0]), "labels moved with the names"
    with pytest.raises(ValueError, match="has the split test, got 'train'"):
        load_data(f"zoo:{tmp_path}", "train")


# Parquet


def write_parquet(path, rows, names=NAMES, label="label", plain=False):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [encoded(PIXELS[i]) if plain else {"bytes": encoded(PIXELS[i]), "path": None} for i in rows]
    table = pa.table({"image": images, label: [LABELS[i] for i in rows]})
    if names:
        about = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)


@pytest.mark.parametrize("plain", [False, True])
def test_parquet_as_on_the_hub(tmp_path, plain):
    for k in (0, 1):
        write_parquet(tmp_path / "data" / f"test-0000{k}-of-00002.parquet", range(3 * k, 3 * k + 3), plain=plain)
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [0])
    data = load_data(f"parquet:{tmp_path}", "test")
    assert data.class_names == NAMES and data.y.tolist() == LABELS
    assert torch.equal(data.read(data.index), ALL)
    order = torch.tensor([5, 0, 3])
    assert torch.equal(data.read(order), ALL[order]) and len(load_data(f"parquet:{tmp_path}", "train")) == 1
    first = tmp_path / "data" / "test-00000-of-00002.parquet"
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(ValueError, match=r"1 of 2 files .*data/test-\*.parquet are missing, the first is number 0"):
        load_data(f"parquet:{tmp_path}", "test")
    first.write_bytes(content)
    one = load_data(f"parquet:{tmp_path}/data/test-00001-of-00002.parquet")
    assert torch.equal(one.read(one.index), ALL[3:])
    describe(tmp_path / "root")
    (tmp_path / "root" / "parquet").mkdir()
    (tmp_path / "data").rename(tmp_path / "root" / "parquet" / "zoo")
    assert load_data(f"zoo:{tmp_path / 'root'}").name == "zoo@parquet"


def test_broken_parquet_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(FileNotFoundError, match="no Parquet files"):
        load_data(f"parquet:{tmp_path}")
    file = tmp_path / "test-0.parquet"
    write_parquet(file, [0], label="y")
    with pytest.raises(ValueError, match="has no column label or labels or fine_label or cls: it has image, y"):
        load_data(f"parquet:{file}")
    with pytest.raises(ValueError, match="has no split 'train'"):
        load_data(f"parquet:{tmp_path}", "train")
    write_parquet(file, [0], names=None)
    assert load_data(f"parquet:{file}").class_names == ["0"]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="no whole Parquet file"):
        load_data(f"parquet:{file}")


def test_ls_shows_what_is_there(tmp_path, capsys, monkeypatch):
    describe(tmp_path, layouts={"coop": COOP})
    write_coop(tmp_path / "zoo")
    monkeypatch.setenv("RVLM_DATA", str(tmp_path))
    assert main(["ls", "datasets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("zoo" in line and "coop 6" in line for line in lines)
    assert any("caltech101" in line and "wds 6085" in line and "torchvision 8677" in line for line in lines)
    assert any("sun397" in line and "wds unknown" in line for line in lines)
    assert find(entries()["zoo"], tmp_path)[0].path == tmp_path / "zoo"
    assert where(entries()["cifar10"], tmp_path, "torchvision") == [f"torchvision {tmp_path}/cifar-10-batches-py"]


# rvlm data check, get and make-wds


def run(*argv):
    return main(["data", *map(str, argv)])


def test_check_names_what_is_there_partly_there_and_missing(tmp_path, capsys):
    describe(tmp_path, layouts={"wds": WDS, "coop": COOP})
    write_wds(tmp_path / "wds_animals-zoo")
    assert run("check", "zoo", "--root", tmp_path) == 0
    assert f"ok       zoo@wds                    6 samples (expected 6) {tmp_path}/wds_" in capsys.readouterr().out
    write_coop(tmp_path / "zoo")
    assert run("check", "zoo", "--root", tmp_path) == 0 and "2 ok, 0 partly, 0 missing" in capsys.readouterr().out
    (tmp_path / "wds_animals-zoo" / "test" / "1.tar").unlink()
    jpeg = tmp_path / "zoo" / "images" / "cat" / "0.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-60])  # truncated
    (tmp_path / "zoo" / "images" / "ice cream" / "5.jpg").unlink()
    assert run("check", "zoo@wds", "zoo@coop", "--root", tmp_path) == 4
    text = capsys.readouterr().out
    assert "says 2, but beside it are 1 tars, without 1.tar" in text
    assert "2 images cannot be decoded: cat/0.jpg (image file is truncated" in text and "ice cream/5.jpg" in text
    assert "0 ok, 2 partly, 0 missing" in text
    assert run("check", "zoo@coop", "--root", tmp_path, "--no-images") == 0, "images were not asked for"
    assert run("check", "zoo", "cifar10", "--root", tmp_path) == 3
    assert "missing  cifar10" in capsys.readouterr().out
    assert run("check", "zoo@folder", "--root", tmp_path) == 3
    assert run("check", "zooo", "--root", tmp_path) == 2 and "did you mean" in capsys.readouterr().err


def test_check_all_is_every_set(tmp_path, capsys):
    write_wds(tmp_path / "wds_vtab-cifar10")
    assert run("check", "all", "--root", tmp_path) == 3
    text = capsys.readouterr().out
    assert "6 samples, expected 10000" in text and "3 classes, expected 10" in text
    assert "0 ok, 1 partly, 26 missing" in text


def test_check_of_torchvision_and_of_plain_specs(tmp_path, capsys):
    describe(tmp_path, layouts={"torchvision": {"name": "EuroSAT", "at": "eurosat/2750", "counts": {"test": 6}}})
    for i in range(6):
        write(tmp_path / "eurosat" / "2750" / NAMES[LABELS[i]] / f"{i}.jpg", encoded(PIXELS[i]))
    assert run("check", "zoo", f"folder:{tmp_path}/eurosat/2750", "digits", "--root", tmp_path) == 0
    assert "ok       zoo@torchvision" in capsys.readouterr().out
    (tmp_path / "eurosat" / "2750" / "dog").mkdir()
    write(tmp_path / "eurosat" / "2750" / "cat" / "9.jpg", b"no image")
    assert run("check", "zoo", f"folder:{tmp_path}/eurosat/2750", "--root", tmp_path) == 4
    text = capsys.readouterr().out
    assert "class folder(s) without images: dog" in text and "Found no valid file for the classes dog" in text
    (tmp_path / "eurosat" / "2750" / "dog").rmdir()
    assert run("check", "zoo", "--root", tmp_path) == 4
    text = capsys.readouterr().out
    assert "7 samples, expected 6" in text and "1 images cannot be decoded: sample " in text
    assert run("check", "folder:/nowhere") == 3


def test_duplicates_are_named(tmp_path, capsys):
    describe(tmp_path, layouts={"coop": COOP})
    write_coop(tmp_path / "zoo")
    file = tmp_path / "zoo" / "split_zhou_Zoo.json"
    split = json.loads(file.read_text())
    split["test"] += split["test"][:2]
    file.write_text(json.dumps(split))
    assert run("check", "zoo", "--root", tmp_path) == 4
    assert "lists 2 images twice for test: cat/0.jpg, sea lion/1.jpg" in capsys.readouterr().out


def test_get_says_where_it_comes_from(tmp_path, capsys, monkeypatch):
    from torchvision import datasets

    calls = []

    class Fake:
        def __init__(self, root, train=True, download=False):
            calls.append((root, train, download))
            if root.endswith("offline"):
                raise RuntimeError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    assert run("get", "cifar10", "--root", tmp_path) == 0
    assert calls == [(str(tmp_path), True, True), (str(tmp_path), False, True)]
    text = capsys.readouterr().out
    assert (
        "licence   unknown" in text
        and "pixels    32 x 32" in text
        and "clip-benchmark/wds_vtab-cifar10" in text
        and "(samples: test 10000)" in text
    )
    assert "templates of CLIP_benchmark: 18, hash 20da23be985f68bb" in text and "found     nothing yet" in text
    assert run("get", "cifar10", "--root", tmp_path, "--no-download") == 0 and len(calls) == 2
    assert run("get", "cifar10", "--root", tmp_path / "offline") == 3
    assert "could not fetch CIFAR10 (train): no route to host" in capsys.readouterr().err
    assert run("get", "cars", "sun397", "--root", tmp_path) == 0, "whose addresses are dead: nothing is tried"
    assert "dead      http://ai.stanford.edu" in capsys.readouterr().out
    assert run("get", "--root", tmp_path) == 0 and len(calls) == 3, "all are shown, none is fetched"
    assert run("get", "nothing", "--root", tmp_path) == 2


@pytest.mark.parametrize("source", ["folder", "digits", "limited", "resized", "npz"])
def test_shards_are_read_back_bit_for_bit(tmp_path, source):
    kinds = ["jpeg", "png", "webp"]
    for i in range(6):
        name = f"{NAMES[LABELS[i]]}/{i}.{kinds[i % 3]}"
        write(tmp_path / "set" / name, encoded(PIXELS[i][:, : 10 + i], kinds[i % 3]))  # of different sizes
    np.savez(tmp_path / "a.npz", x=PIXELS.permute(0, 2, 3, 1).numpy(), y=np.array(LABELS))
    settings = {"size": 8} if source == "resized" else {"limit": 30} if source == "limited" else {}
    spec = {"digits": "digits", "limited": "digits", "npz": f"npz:{tmp_path}/a.npz"}.get(
        source, f"folder:{tmp_path}/set"
    )
    data = load_data(spec, **settings)
    tars = make_wds(data, tmp_path / "out", count=4)
    again = load_data(f"wds:{tmp_path / 'out'}")
    assert len(tars) == -(-len(data) // 4) and again.y.tolist() == data.y.tolist()
    assert again.class_names == data.class_names and templates(again.template) == templates(data.template)
    for row in range(len(data)):
        here, there = (each.read(each.index[row : row + 1]) for each in (data, again)) if source != "folder" else (
            torch.from_numpy(np.array(each.read.image(row))) for each in (data, again)
        )  # fmt: skip
        assert torch.equal(here, there)
    if source == "folder":
        paths = [tmp_path / "set" / name for name in data.read.names]
        assert [again.read.get(i) for i in range(6)] == [path.read_bytes() for path in paths], "files as they were"
    with pytest.raises(ValueError, match="is not empty"):
        make_wds(data, tmp_path / "out")
    with pytest.raises(ValueError, match="tars are of the splits train, test, val"):
        make_wds(dataclasses.replace(data, split="extra"), tmp_path / "out")


def test_make_wds_from_the_command_line(tmp_path, capsys):
    describe(tmp_path, layouts={"coop": COOP, "wds": WDS})
    write_coop(tmp_path / "zoo")
    assert run("make-wds", "zoo", tmp_path / "wds_animals-zoo", "--root", tmp_path) == 0
    assert "1 tars in" in capsys.readouterr().out
    data = load_data(f"zoo@wds:{tmp_path}")
    assert torch.equal(data.read(data.index), ALL) and torch.equal(ALL[3], decoded(3))
    assert run("make-wds", "zoo") == 2 and "takes a data spec and a folder" in capsys.readouterr().err
    assert run("bake", "zoo") == 2 and "expected check, get, make-wds" in capsys.readouterr().err


@pytest.mark.parametrize("spec, message", [
    ("pets@bogus", "unknown layout 'bogus': expected wds, folder"),
    ("pets+classes=base", "leave .classes= out"), ("digits+classes=new", "leave .classes= out"),
    ("petz", "did you mean pets"),
])  # fmt: skip
def test_what_cannot_be_looked_through(tmp_path, capsys, spec, message):
    assert run("check", spec, "--root", tmp_path) == 2
    assert re.search(message, capsys.readouterr().err)


def test_tars_that_were_not_finished_are_refused(tmp_path):
    """Also where writing ended between two of them, so that each is whole."""
    for i in range(6):
        write(tmp_path / "set" / "a" / f"{i}.png", encoded(PIXELS[i], "png") if i != 4 else b"broken")
    with pytest.raises(ValueError, match="cannot decode a/4.png"):
        make_wds(load_data(f"folder:{tmp_path}/set"), tmp_path / "out", count=2)
    assert len([*(tmp_path / "out" / "test").glob("*.tar")]) == 2
    with pytest.raises(ValueError, match="nshards.txt holds 'unfinished': expected the number of tars"):
        load_data(f"wds:{tmp_path / 'out'}")


def test_splits_of_one_folder_have_the_same_classes(tmp_path):
    test, train = load_data("digits", limit=4), load_data("digits", "train", limit=4)
    make_wds(test, tmp_path)
    with pytest.raises(ValueError, match="classnames.txt names other classes"):
        make_wds(train.of_classes("base"), tmp_path)
    make_wds(train, tmp_path)
    assert [len(load_data(f"wds:{tmp_path}", split)) for split in ("train", "test")] == [4, 4]


def test_a_tar_is_closed_when_it_is_full(tmp_path):
    data = load_data("digits", limit=30)
    tars = make_wds(data, tmp_path, megabytes=0)
    assert len(tars) == 30 and load_data(f"wds:{tmp_path}").y.tolist() == data.y.tolist()


def test_a_set_of_ones_own_as_the_docs_describe_it(tmp_path, capsys):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (tmp_path / "datasets.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    for c in range(12):
        for split, n in (("train", 100), ("test", 25)):
            for k in range(n):
                write(tmp_path / "birds" / split / f"bird {c:02d}" / f"{k}.png", encoded(PIXELS[0, :, :4, :4], "png"))
    assert run("check", "birds", "--root", tmp_path) == 0, capsys.readouterr().out
    assert templates(load_data(f"birds:{tmp_path}", "train").template) == ["a photo of a {}."]
