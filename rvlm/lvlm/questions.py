"""Questions about images, from a file of JSON lines."""

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from rvlm.data.images import Reader

__all__ = ["CAPTION", "Questions", "load_questions"]

CAPTION = "Provide a one-sentence caption for the provided image."  # what a line without a question asks


@dataclasses.dataclass
class Questions:
    """N questions.

    Attributes:
        read: index [B] -> pixels [B, 3, S, S] uint8.
        images: paths, as the file has them.
        questions: what is asked.
        answers: correct answers; an empty list where the model's own answer to the clean image is to be kept.
        index: int64 [N], number of each line in the file.
    """

    read: Reader
    images: list[str]
    questions: list[str]
    answers: list[list[str]]
    index: Tensor

    def __len__(self) -> int:
        return len(self.questions)

    def pixels(self, rows: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1]."""
        return self.read(rows).float() / 255


def load_questions(path: str | Path, size: int, limit: int | None = None) -> Questions:
    """Reads lines {"image": PATH, "question": TEXT, "answers": [TEXT, ...]}; paths are relative to the file.

    Without a question a caption is asked for. Without answers the model's own, to the clean image, is what an attack is
    to change.

    Args:
        size: images are resized (shorter side) and cropped to this.
        limit: only the first so many.

    Raises:
        FileNotFoundError: no such file, or image. ValueError: a line, which is named, is not of this form.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f'no file {file}: expected JSON lines {{"image": PATH, "question": ..., "answers": [...]}}'
        )
    lines = [(n, line) for n, line in enumerate(file.read_text().splitlines(), 1) if line.strip()][:limit]
    found = [_line(line, f"{file}, line {n}") for n, line in lines]
    if not found:
        raise ValueError(f"{file} holds no questions")
    images, questions, answers = (list(column) for column in zip(*found, strict=True))
    paths = [file.parent / image for image in images]
    if missing := [str(image) for image in paths if not image.is_file()]:
        raise FileNotFoundError(f"{file} names {len(missing)} images that are not there, the first is {missing[0]}")
    read = Reader(lambda i: paths[i].read_bytes(), file, images, size)
    return Questions(read, images, questions, answers, torch.tensor([n - 1 for n, _ in lines]))


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
