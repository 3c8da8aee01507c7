"""Questions about images, from a file of JSON lines or a benchmark (`rvlm.lvlm.layouts`)."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from rvlm.data.images import Reader
from rvlm.data.registry import data_root
from rvlm.data.rows import Places
from rvlm.lvlm.layouts import CAPTION, LAYOUTS, Line

__all__ = ["CAPTION", "Questions", "load_questions"]


@dataclasses.dataclass
class Questions:
    """N questions.

    Attributes:
        name: of the data, for records.
        read: index [B] -> pixels [B, 3, S, S] uint8.
        images: paths, as the file has them.
        questions: what is asked.
        answers: correct answers; an empty list where the model's own answer to the clean image is to be kept.
        index: int64 [N], number of each line in the file, or of the benchmark's question.
        rows: int64 [N], what `read` calls them.
    """

    name: str
    read: Reader
    images: list[str]
    questions: list[str]
    answers: list[list[str]]
    index: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.questions)

    def pixels(self, rows: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1]."""
        return self.read(self.rows[rows]).float() / 255

    @property
    def fingerprint(self) -> str:
        """Hash of images' names, questions, answers and numbers, and of the first image's pixels."""
        text = json.dumps([self.images, self.questions, self.answers, self.index.tolist()])
        first = self.read(self.rows[:1]).contiguous().numpy().tobytes()
        return hashlib.sha256(text.encode() + first).hexdigest()[:16]

    def limited(self, n: int | None, seed: int = 0) -> "Questions":
        """n questions drawn without replacement, in their old order, as `rvlm.data.Data.limited` draws."""
        if n is None or n >= len(self):
            return self
        return self.subset(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n].sort().values)

    def numbered(self, index: list[int]) -> "Questions":
        """The questions with these numbers, in this order.

        Raises:
            ValueError: some are not there.
        """
        wanted = torch.tensor(index)
        rows = Places(self.index)(wanted)
        if lacks := wanted[rows < 0].tolist():
            raise ValueError(f"{self.name} lacks {len(lacks)} of {len(index)} questions, such as number {lacks[0]}")
        return self.subset(rows)

    def subset(self, rows: Tensor) -> "Questions":
        """The questions at `rows`, which keep their numbers."""
        images, questions, answers = (
            [column[i] for i in rows.tolist()] for column in (self.images, self.questions, self.answers)
        )
        return Questions(self.name, self.read, images, questions, answers, self.index[rows], self.rows[rows])


def load_questions(path: str | Path, size: int, limit: int | None = None) -> Questions:
    """Reads lines {"image": PATH, "question": TEXT, "answers": [TEXT, ...]}; paths are relative to the file.

    Without a question a caption is asked for. Without answers the model's own, to the clean image, is what an attack is
    to change.

    Args:
        path: of the file; or NAME[:ROOT], a benchmark of `rvlm.lvlm.layouts`.
        size: images are resized (shorter side) and cropped to this.
        limit: only the first so many.

    Raises:
        FileNotFoundError: no such file, or image. ValueError: a line, which is named, is not of this form.
    """
    benchmark, _, place = str(path).partition(":")
    if benchmark in LAYOUTS:
        root = Path(place) if place else data_root()
        return _questions(benchmark, root, LAYOUTS[benchmark](root)[:limit], size)
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f'no file {file}: expected JSON lines {{"image": PATH, "question": ..., "answers": [...]}}'
        )
    lines = [(n, line) for n, line in enumerate(file.read_text().splitlines(), 1) if line.strip()][:limit]
    found = [_line(line, f"{file}, line {n}") for n, line in lines]
    return _questions(str(path), file.parent, found, size, [n - 1 for n, _ in lines])


def _questions(name: str, folder: Path, found: list[Line], size: int, index: list[int] | None = None) -> Questions:
    """Of lines whose images lie below a folder."""
    if not found:
        raise ValueError(f"{name} holds no questions")
    images, questions, answers = (list(column) for column in zip(*found, strict=True))
    if missing := [image for image in dict.fromkeys(images) if not (folder / image).is_file()]:
        raise FileNotFoundError(
            f"{name} names {len(missing)} images that are not there, the first is {folder / missing[0]}"
        )
    read, rows = Reader(lambda i: (folder / images[i]).read_bytes(), folder, images, size), torch.arange(len(images))
    return Questions(name, read, images, questions, answers, rows if index is None else torch.tensor(index), rows)


def _line(line: str, where: str) -> tuple[str, str, list[str]]:
    try:
        about = json.loads(line)
        unknown = set(about) - {"image", "question", "answers"}
        image, question, answers = about["image"], about.get("question", CAPTION), about.get("answers", [])
        words = [image, question, *answers]
        if unknown or isinstance(answers, str) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"has {sorted(about)}")
    except (ValueError, KeyError, TypeError) as error:
        form = '{"image": PATH, "question": TEXT, "answers": [TEXT, ...]}'
        raise ValueError(f"{where}: expected {form}, question and answers optional ({error})") from None
    return image, question, answers
