"""Adversarial images that are made once, on a model that does not change, and kept on disk.

They are crafted in chunks of a fixed size, every process its share of the chunks, and a chunk is one file of float32
pixels under a hash of all that decides its bits. So the images are the same for any number of processes, a run that was
killed goes on with the chunks that are left, the next run with the same settings finds all of them, and in memory is
what a batch asks for. On the disk an image takes 4 bytes a number: 1.2 GB for 2,000 images of 224 pixels.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rvlm.attacks import pgd
from rvlm.data import Data
from rvlm.files import cache_root, write_bytes
from rvlm.methods.base import MethodConfig
from rvlm.methods.teachers import look
from rvlm.models import ZeroShotClassifier
from rvlm.models.weights import settings_of, weights_sha
from rvlm.ranks import Ranks

__all__ = ["OfflineImages"]

SCHEMA = "rvlm.offline/1"  # another one where the attack, given all else in the key, makes other images


class OfflineImages:
    """PGD's images of a data set on cross-entropy.

    Args:
        model: what they are made on; must not change afterwards.
        data: whose samples; a sample's noise follows its number.
        chunk: images that are attacked together. Another one costs the same and may give other last bits.
        seed: of the random starts.
        precision: of the attack: "fp32" or "bf16".
        attack: further keywords of `pgd`, plain values.
    """

    def __init__(
        self, model: ZeroShotClassifier, data: Data, *, chunk: int, seed: int, precision: str = "fp32", **attack
    ) -> None:
        self.model, self.data, self.seed, self.precision, self.attack = model, data, seed, precision, attack
        self.chunks = torch.arange(len(data)).split(chunk)
        self.place = torch.full((int(data.index.max()) + 1,), -1)
        self.place[data.index] = torch.arange(len(data))
        # Names of classes, templates, tokenizer and text tower are all in the class embeddings.
        head = hashlib.sha256(model.head().detach().cpu().numpy().tobytes()).hexdigest()
        key = [
            SCHEMA, weights_sha(model), head, settings_of(model), model.clip.device.type, data.fingerprint, look(data),
            chunk, seed, precision, attack,
        ]  # fmt: skip
        self.folder = cache_root() / "offline" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]

    @classmethod
    def of(cls, config: MethodConfig, model: ZeroShotClassifier, data: Data) -> "OfflineImages":
        """By the attack of a method's config, from the run's seed; in 16 bits where that is bf16."""
        return cls(
            model, data, chunk=config.batch_size, seed=torch.initial_seed(),
            precision="bf16" if config.precision == "bf16" else "fp32", eps=float(config.eps), alpha=config.alpha,
            steps=config.steps, random_start=config.random_start,
        )  # fmt: skip

    def make(self, ranks: Ranks) -> None:
        """Crafts what the disk does not have. All processes call it, and go on when every image is there."""
        from tqdm import tqdm

        mine = [k for k in range(ranks.rank, len(self.chunks), ranks.size) if not self._file(k).is_file()]
        for k in tqdm(mine, desc="adversarial images", disable=None if ranks.first else True, unit="batch"):
            self._craft(k)
        ranks.gather(None)
        for k in range(len(self.chunks)):
            if not self._file(k).is_file():  # another machine's disk has it
                self._craft(k)

    def at(self, index: Tensor) -> Tensor:
        """The images of samples by their numbers: [B, 3, H, W] float32 on the CPU."""
        rows = self.place[index.cpu()]
        if (rows < 0).any():
            raise ValueError(f"no images were made of samples {index[rows < 0].tolist()}")
        size = len(self.chunks[0])
        needed = (rows // size).unique().tolist()
        pixels = {k: np.load(self._file(k), mmap_mode="r", allow_pickle=False) for k in needed}
        return torch.from_numpy(np.stack([pixels[row // size][row % size] for row in rows.tolist()]))

    def _file(self, k: int) -> Path:
        return self.folder / f"{k:06d}.npy"

    def _craft(self, k: int) -> None:
        device = self.model.clip.device
        x, y, index = (t.to(device) for t in self.data.batch(self.chunks[k]))
        x_adv = pgd(
            self.model, x, y, sample_ids=index, generator=torch.Generator().manual_seed(self.seed),
            precision="bf16" if self.precision == "bf16" else None, **self.attack,
        )  # fmt: skip
        buffer = io.BytesIO()
        np.save(buffer, x_adv.cpu().numpy())
        write_bytes(self._file(k), buffer.getvalue())
