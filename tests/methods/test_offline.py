"""Adversarial images on disk: made once, the same for any number of processes, found again only where all is equal."""

import dataclasses

import numpy as np
import pytest
import torch

from rvlm.attacks import pgd
from rvlm.data import load_data
from rvlm.methods import offline
from rvlm.methods.offline import OfflineImages
from rvlm.models import ZeroShotClassifier, load_clip
from rvlm.ranks import Ranks

GIVEN = {"chunk": 16, "seed": 3, "eps": 4 / 255, "alpha": None, "steps": 2, "random_start": True}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_CACHE", str(tmp_path))


@pytest.fixture
def data():
    return load_data("digits", "train", limit=40)


@pytest.fixture
def model(data):
    return ZeroShotClassifier(load_clip("tiny-vit", seed=1), data.class_names).requires_grad_(False)


def rank(number, size):
    """A process of several, which does not wait for the others."""
    ranks = Ranks.alone()
    ranks.rank, ranks.size, ranks.gather = number, size, lambda mine: [mine] * size
    return ranks


@pytest.fixture
def attacks(monkeypatch):
    """Sizes of the batches that were attacked."""
    seen = []

    def counted(model, x, y, **given):
        seen.append(len(x))
        return pgd(model, x, y, **given)

    monkeypatch.setattr(offline, "pgd", counted)
    return seen


def test_they_are_the_attacks_images_and_are_made_once(model, data, attacks):
    images = OfflineImages(model, data, **GIVEN)
    images.make(Ranks())
    assert attacks == [16, 16, 8]
    x, y, index = data.batch(slice(16, 32))
    expected = pgd(model, x, y, eps=4 / 255, steps=2, sample_ids=index, generator=torch.Generator().manual_seed(3))
    assert torch.equal(images.at(index), expected) and images.at(index).dtype == torch.float32
    mixed = data.index[torch.tensor([39, 0, 17, 0])]
    assert torch.equal(images.at(mixed)[2], expected[1]) and torch.equal(images.at(mixed)[1], images.at(mixed)[3])
    again = OfflineImages(model, data, **GIVEN)
    again.make(Ranks())
    assert len(attacks) == 3 and torch.equal(again.at(mixed), images.at(mixed))
    with pytest.raises(ValueError, match="no images were made of samples"):
        images.at(torch.tensor([int(data.index[0]), 1 + int(data.index[0]), 2 + int(data.index[0])]))


def test_memory_holds_no_pixels(model, data):
    images = OfflineImages(model, data, **GIVEN)
    images.make(Ranks())
    held = [value for value in vars(images).values() if isinstance(value, torch.Tensor)] + list(images.chunks)
    assert all(t.dtype == torch.int64 and t.dim() == 1 for t in held)
    assert isinstance(np.load(images._file(0), mmap_mode="r"), np.memmap)


def test_processes_share_the_work_and_the_bits(model, data, attacks, tmp_path, monkeypatch):
    alone = OfflineImages(model, data, **GIVEN)
    alone.make(Ranks())
    files = {path.name: path.read_bytes() for path in alone.folder.iterdir()}
    monkeypatch.setenv("RVLM_CACHE", str(tmp_path / "shared"))
    attacks.clear()
    shared = OfflineImages(model, data, **GIVEN)
    waits = []

    def wait(mine):
        waits.append(sorted(path.name for path in shared.folder.iterdir()))
        shared._craft(1)  # what the second process makes meanwhile
        return [mine] * 2

    first = rank(0, 2)
    first.gather = wait
    shared.make(first)
    assert waits == [["000000.npy", "000002.npy"]] and attacks == [16, 8, 16], "every second chunk"
    assert {path.name: path.read_bytes() for path in shared.folder.iterdir()} == files


def test_what_a_killed_run_has_made_is_not_made_again(model, data, attacks):
    images = OfflineImages(model, data, **GIVEN)
    images._craft(1)
    images.make(Ranks())
    assert attacks == [16, 16, 8]


def test_a_disk_of_its_own_gets_every_image(model, data, attacks):
    images = OfflineImages(model, data, **GIVEN)
    images.make(rank(1, 2))  # whose neighbour writes elsewhere
    assert sorted(attacks) == [8, 16, 16] and len(list(images.folder.iterdir())) == 3


def test_whatever_decides_the_images_is_in_their_name(model, data):
    folder = OfflineImages(model, data, **GIVEN).folder
    assert OfflineImages(model, data, **GIVEN).folder == folder
    for name, value in {"chunk": 8, "seed": 4, "eps": 0.02, "alpha": 0.01, "steps": 3, "random_start": False,
                        "precision": "bf16"}.items():  # fmt: skip
        assert OfflineImages(model, data, **(GIVEN | {name: value})).folder != folder, name
    words = ZeroShotClassifier(model.clip, data.class_names, ["a scan of {}"])
    other = ZeroShotClassifier(load_clip("tiny-vit", seed=2), data.class_names)
    brighter = ZeroShotClassifier(load_clip("tiny-vit", seed=1), data.class_names)
    brighter.clip.mean += 0.1
    for changed in (words, other, brighter):
        assert OfflineImages(changed, data, **GIVEN).folder != folder
    fewer = data.subset(torch.arange(39), "all but one")
    inverted = dataclasses.replace(data, read=lambda index: 255 - data.read(index))
    for changed in (fewer, inverted):
        assert OfflineImages(model, changed, **GIVEN).folder != folder
