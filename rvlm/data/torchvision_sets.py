"""The data sets for classification that torchvision knows, where they are on disk already. Nothing is downloaded."""

import difflib
import inspect
import re
from pathlib import Path

import torch
from torch import Tensor

from rvlm.data.base import Data
from rvlm.data.digits import WORDS
from rvlm.data.images import Fit, Reader

__all__ = ["SETS", "arguments", "load_torchvision"]

# The splits with labels that each class accepts, () for one that has no splits. Left out: EMNIST, INaturalist and
# Omniglot, where more than a split must be chosen, and what is not a choice of one class for an image.
SETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(["CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"], ("train", "test")),
    **dict.fromkeys(["FER2013", "Food101", "GTSRB", "STL10", "StanfordCars"], ("train", "test")),
    **dict.fromkeys(["DTD", "Flowers102", "PCAM", "RenderedSST2"], ("train", "val", "test")),
    **dict.fromkeys(["CLEVRClassification", "ImageNet", "Imagenette"], ("train", "val")),
    **dict.fromkeys(["Caltech101", "Caltech256", "EuroSAT", "SEMEION", "SUN397"], ()),
    "Country211": ("train", "valid", "test"),
    "FGVCAircraft": ("train", "val", "trainval", "test"),
    "OxfordIIITPet": ("trainval", "test"),
    "Places365": ("train-standard", "train-challenge", "val"),
    "SVHN": ("train", "test", "extra"),
}
# What a split is called where it is not called that. "val" is never "test": no model should be chosen on test data.
CALLED = {"train": ("trainval", "train-standard"), "val": ("valid",), "test": ("val",)}

# Names for labels that torchvision gives no names, or none that one would say.
NAMES = {
    **dict.fromkeys(["MNIST", "QMNIST", "SEMEION", "SVHN", "USPS"], WORDS),
    "FER2013": ["angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral"],
    "PCAM": ["lymph node tissue without a tumor", "lymph node tissue with a metastatic tumor"],
    "GTSRB": [
        *(f"speed limit of {v} km/h" for v in (20, 30, 50, 60, 70, 80)), "end of the speed limit of 80 km/h",
        *(f"speed limit of {v} km/h" for v in (100, 120)), "no overtaking", "no overtaking by trucks",
        "priority at the next crossing", "priority road", "yield", "stop", "no vehicles", "no trucks", "no entry",
        "danger", "curve to the left", "curve to the right", "double curve", "bumpy road", "slippery road",
        "road narrows on the right", "road work", "traffic lights ahead", "pedestrians", "children crossing",
        "bicycles crossing", "ice or snow", "wild animals crossing", "end of all limits", "turn right ahead",
        "turn left ahead", "straight ahead only", "straight ahead or right", "straight ahead or left", "keep right",
        "keep left", "roundabout", "end of no overtaking", "end of no overtaking by trucks",
    ],
}  # fmt: skip


def load_torchvision(name: str, root: str, split: str, size: int | Fit | None = None) -> Data:
    """The set that class `name` of torchvision.datasets (in any case) finds in `root`. Images are decoded when read.

    Splits are those of the class. "train" is "trainval" for the pets and "train-standard" for Places365, "test" is
    "val" for sets that have no labelled test split, "val" is "valid" for Country211. Caltech101, Caltech256, EuroSAT,
    SEMEION and SUN397 have no splits: all of it is "test", and any other split is an error.

    Raises:
        FileNotFoundError: not there, or not complete. ValueError: unknown set or split, or files that cannot be read.
        ImportError: the set needs a package (PCAM: h5py).
    """
    from torchvision import datasets

    known = {each.lower(): each for each in SETS}
    if name.lower() not in known:
        close = difflib.get_close_matches(name.lower(), known, 1)
        hint = f"; did you mean {known[close[0]]}?" if close else ""
        raise ValueError(f"unknown torchvision set {name!r}{hint}: expected one of {', '.join(SETS)}")
    name = known[name.lower()]
    kind = getattr(datasets, name, None)
    if kind is None:
        raise ValueError(f"this torchvision has no {name}: upgrade it")
    settings = arguments(name, split)
    if not Path(root).is_dir():
        raise FileNotFoundError(f"no folder {root}: expected the one with the files of {name}. {_advice(name)}")
    try:
        dataset = kind(root, **settings)
    except (RuntimeError, OSError) as error:
        if isinstance(error.__context__, ImportError):  # the set needs a package, which the message names
            raise ImportError(str(error)) from error
        reason = str(error).partition(". ")[0]
        raise FileNotFoundError(f"no complete {name} ({split}) in {root} ({reason}). {_advice(name)}") from error
    except Exception as error:  # whatever broken files lead to
        raise ValueError(f"torchvision cannot read {name} ({split}) in {root} ({error!r}). {_advice(name)}") from error
    if name == "SUN397":  # listed as the file system lists it: sample numbers would differ between machines
        order = sorted(range(len(dataset)), key=lambda i: dataset._image_files[i])
        dataset._image_files = [dataset._image_files[i] for i in order]
        dataset._labels = [dataset._labels[i] for i in order]
    y = _labels(dataset, f"{name} ({split}) in {root}")
    names = NAMES.get(name) or _class_names(dataset) or [str(c) for c in range(int(y.max()) + 1)]
    reader = Reader(_Images(dataset), f"{name} in {root}", size=size)
    return Data(f"torchvision:{name}", split, names, y, torch.arange(len(y)), reader, "plain", len(y))


class _Images:
    """number of a sample -> its image."""

    def __init__(self, dataset) -> None:
        self.dataset = dataset

    def __call__(self, i: int):
        return self.dataset[i][0]


def arguments(name: str, split: str) -> dict[str, object]:
    """What the class of the set is called with for a split."""
    from torchvision import datasets

    chosen, accepts = _choose(name, split), inspect.signature(getattr(datasets, name)).parameters
    found: dict[str, object] = {"download": False} if "download" in accepts else {}
    if chosen:
        found |= {"train": chosen == "train"} if "train" in accepts else {"split": chosen}
    return found


def _choose(name: str, split: str) -> str | None:
    """What the class of the set calls the split; None for a set without splits."""
    accepted = SETS[name]
    if not accepted:
        if split != "test":
            raise ValueError(f"{name} has no splits: ask for all of it as test, not for {split!r}")
        return None
    for candidate in (split, *CALLED.get(split, ())):
        if candidate in accepted:
            return candidate
    raise ValueError(f"{name} has the splits {', '.join(accepted)}, got {split!r}")


def _advice(name: str) -> str:
    return (
        f"rvlm downloads nothing: lay the files out as torchvision.datasets.{name} documents it, or let torchvision "
        "fetch them, where it can, with download=True."
    )


def _labels(dataset, where: str) -> Tensor:
    """int64 [N], without decoding images where the set keeps its labels."""
    from tqdm import tqdm

    kept = (getattr(dataset, name, None) for name in ("targets", "labels", "_labels", "y"))
    labels = next((found for found in kept if found is not None), None)
    if labels is None and hasattr(dataset, "_samples"):
        labels = [sample[1] for sample in dataset._samples]
    if labels is None:
        steps = tqdm(range(len(dataset)), desc="reading labels", disable=None, leave=False, unit="image")
        labels = [dataset[i][1] for i in steps]
    if len(labels) == 0:
        raise ValueError(f"{where} holds no samples")
    if isinstance(labels, list) and None in labels:
        raise ValueError(f"{where} has samples without a label, the first is sample {labels.index(None)}")
    y = torch.as_tensor(labels, dtype=torch.int64)
    return y[:, 0] if y.ndim == 2 else y  # QMNIST: the class, and seven columns on who wrote it


def _class_names(dataset) -> list[str] | None:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)  # Caltech's are categories
    first = [name if isinstance(name, str) else name[0] for name in names or []]  # ImageNet: tuples of synonyms
    return [re.sub(r"^(/\w/|\d+\.)", "", name).replace("_", " ").strip() for name in first]  # "/a/airfield", "001.ak47"
