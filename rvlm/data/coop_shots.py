"""CoOp's few-shot samples, drawn again from its lists (Zhou et al. 2022, arXiv 2109.01134).

Python's `random` is seeded with the run's seed. Then, class by class in the order in which the list of training samples
first names them, come `random.sample(samples of the class, shots)`, or where a class has fewer
`random.choices(samples, k=shots)`, in which samples repeat; then the same for the validation list with min(shots, 4).
Classes are halved (base, new) after the draw. From KaiyangZhou/CoOp, train.py and datasets/*.py, and
KaiyangZhou/Dassl.pytorch, dassl/data: data_manager.py, datasets/base_dataset.py.

Inferred, since no draw that CoOp made was at hand: that nothing between the seed and the draw uses `random`; nothing
that was read does. That samples repeat is Dassl's default in its commit 27eb2f4; in copies of it elsewhere a class with
fewer gives all that it has, which draws nothing, so that the classes after it come out otherwise, too. Python does not
promise that `sample` and `choices` stay as they are; from 3.6 to 3.13 they draw alike, and a test holds one draw. There
is none for ImageNet, whose order there is the file system's.
"""

import random

import torch
from torch import Tensor

from rvlm.data.base import Data

__all__ = ["coop_few_shot"]

LISTS = ("coop", "aircraft")  # layouts whose samples stand in CoOp's order
VALIDATION = 4


def coop_few_shot(data: Data, train: Data, shots: int, seed: int) -> Data:
    """The samples that CoOp draws with this seed from a whole split, in its order; some may be there twice.

    Args:
        data: split train or val, before its classes are halved.
        train: the split train of the same set, from which is drawn first.
        shots: samples of each class; at most 4 of them for val.
        seed: 1 or more; CoOp's own runs use 1, 2 and 3, and its seed 0 leaves the generator unseeded.

    Raises:
        ValueError: data in another order than CoOp's, another split, or a seed or shots below 1.
    """
    if data.name.partition("@")[2] not in LISTS:
        raise ValueError(f"CoOp's draws are of its own lists: expected NAME@{' or NAME@'.join(LISTS)}, got {data.name}")
    if data.split not in ("train", "val"):
        raise ValueError(f"CoOp draws from train and val, got {data.split!r}")
    if shots < 1 or seed < 1:
        raise ValueError(f"CoOp's draws have at least 1 shot and seeds from 1 on, got {shots} shots, seed {seed}")
    rng = random.Random(seed)
    rows, short = _drawn(train.y, shots, rng)
    if data.split == "val":
        shots = min(shots, VALIDATION)
        rows, short = _drawn(data.y, shots, rng)
    rule = f"CoOp's {shots} per class (seed={seed})" + (f", {short} classes have fewer and repeat" if short else "")
    return data.subset(rows, rule)


def _drawn(y: Tensor, shots: int, rng: random.Random) -> tuple[Tensor, int]:
    """Rows, class by class, and how many classes have fewer than `shots`."""
    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(y.tolist()):
        by_class.setdefault(label, []).append(row)
    drawn = [rng.sample(of, shots) if len(of) >= shots else rng.choices(of, k=shots) for of in by_class.values()]
    return torch.tensor(drawn).flatten(), sum(len(of) < shots for of in by_class.values())
