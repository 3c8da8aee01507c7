"""What a data set is to the rest of the library."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable

import torch
from torch import Tensor

from rvlm import profiling
from rvlm.data.rows import Places, number_sha, number_text, short_sha

__all__ = ["Data"]


@dataclasses.dataclass(frozen=True)
class Data:
    """A split of a data set: labels in memory, pixels read when a batch is asked for.

    Attributes:
        name, split: for records; the spec and the split that it was loaded from.
        class_names: C names, in label order.
        y: int64 [N], labels in 0 .. C-1.
        index: int64 [N], numbers that name the samples in the full split and survive `subset`.
        read: index [B] -> uint8 pixels [B, 3, H, W].
        template: id of the default prompt templates.
        n_total: samples in the full split.
        index_rule: how the samples were chosen, "all" or a rule in words.
        file_sha: hash of the user's file that made it, of FILE.py:NAME.
    """

    name: str
    split: str
    class_names: list[str]
    y: Tensor
    index: Tensor
    read: Callable[[Tensor], Tensor]
    template: str = "plain"
    n_total: int = 0
    index_rule: str = "all"
    file_sha: str | None = None

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels [B, 3, H, W] fp32 in [0, 1] on the grid k/255, labels [B], sample numbers [B]."""
        index = self.index[rows]
        with profiling.phase("data", len(index)):
            return self.read(index).float() / 255, self.y[rows], index

    def subset(self, rows: Tensor, rule: str) -> "Data":
        """The samples at `rows`, which keep their numbers."""
        return dataclasses.replace(self, y=self.y[rows], index=self.index[rows], index_rule=rule)

    def numbered(self, index: Tensor, rule: str) -> "Data":
        """The samples with these numbers, in this order.

        Raises:
            ValueError: some are not there.
        """
        rows = Places(self.index)(index)
        if len(lacks := index[rows < 0]):
            raise ValueError(
                f"{self.name}, {self.split} lacks {len(lacks)} of {len(index)} samples, such as {int(lacks[0])}"
            )
        return self.subset(rows, rule)

    def limited(self, n: int | None, seed: int = 0) -> "Data":
        """n samples drawn without replacement, in their old order: the same ones for any batch size."""
        if n is None or n >= len(self):
            return self
        if n < 1:
            raise ValueError(f"limit must be at least 1, got {n}")
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n].sort().values
        before = "" if self.index_rule == "all" else f"{self.index_rule}, then "
        return self.subset(rows, f"{before}perm(seed={seed})[:{n}]")

    def held_out(self, n: int, seed: int = 0) -> tuple["Data", "Data"]:
        """Two parts: all but n samples, and those n, drawn without replacement; the same ones for the same seed."""
        if not 0 < n < len(self):
            raise ValueError(f"cannot hold out {n} of {len(self)} samples")
        few = self.limited(n, seed)
        rest = (~torch.isin(self.index, few.index)).nonzero().flatten()
        return self.subset(rest, f"all but {few.index_rule}"), few

    def few_shot(self, shots: int, seed: int = 0) -> "Data":
        """`shots` samples of every class, drawn without replacement, in their old order; fixed by the seed.

        The setting of CoOp (Zhou et al. 2022, arXiv 2109.01134), with a draw of our own; `load_data(draw="coop")` has
        CoOp's. A class that has fewer samples gives all of them, and `index_rule` counts such classes.
        """
        if shots < 1:
            raise ValueError(f"shots must be at least 1, got {shots}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        by_class = [order[self.y[order] == c] for c in range(len(self.class_names))]
        short = sum(len(rows) < shots for rows in by_class)
        rule = f"{shots} per class (seed={seed})" + (f", {short} classes have fewer" if short else "")
        return self.subset(torch.cat([rows[:shots] for rows in by_class]).sort().values, rule)

    def of_classes(self, part: str) -> "Data":
        """The "base" or the "new" half of the classes, as in base-to-new generalisation (Zhou et al. 2022, arXiv
        2203.05557): the first half of them, rounded up, and the rest. Labels count from 0 in each.
        """
        half = (len(self.class_names) + 1) // 2
        if part not in ("base", "new"):
            raise ValueError(f"classes must be base or new, got {part!r}")
        first, last = (0, half) if part == "base" else (half, len(self.class_names))
        rows = ((self.y >= first) & (self.y < last)).nonzero().flatten()
        return dataclasses.replace(
            self.subset(rows, self.index_rule), name=f"{self.name}+classes={part}", y=self.y[rows] - first,
            class_names=self.class_names[first:last], n_total=len(rows),
        )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """Hash of names, labels and sample numbers: equal for equal evaluations."""
        about = json.dumps([self.name, self.split, self.class_names])[:-1]
        numbers = itertools.chain(number_text(self.y), [b", "], number_text(self.index))
        return short_sha(itertools.chain([about.encode(), b", "], numbers, [b"]"]))

    @property
    def index_sha(self) -> str:
        """Hash of the sample numbers."""
        return number_sha(self.index)

    @property
    def first_image(self) -> str:
        """Hash of the first sample's pixels, by which data that differ in their images alone are told apart."""
        return hashlib.sha256(self.read(self.index[:1]).contiguous().numpy().tobytes()).hexdigest()[:16]
