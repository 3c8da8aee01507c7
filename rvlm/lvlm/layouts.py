"""Benchmarks of captions and questions as their authors pack them, below a root where data sets lie.

    coco-captions     ROOT/coco/annotations/captions_val2014.json: {"images": [{"id", "file_name"}],
                      "annotations": [{"image_id", "caption"}]}; an entry for each image that has captions
    vqav2             ROOT/vqav2/v2_OpenEnded_mscoco_val2014_questions.json: {"questions": [{"question_id", "image_id",
                      "question"}]}, and v2_mscoco_val2014_annotations.json: {"annotations": [{"question_id", "answers":
                      [{"answer"}]}]}
    pope-adversarial, pope-popular, pope-random
                      ROOT/pope/coco_pope_KIND.json: lines {"image", "text", "label"}

All three are about the images in ROOT/coco/val2014. Nothing is downloaded.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rvlm.data.tasks import TASKS

__all__ = ["LAYOUTS", "Line"]

CAPTION, SHORT = TASKS["captioning"].prompt, TASKS["vqa"].prompt
IMAGES = "coco/val2014"
Line = tuple[str, str, list[str]]  # an image below ROOT, what is asked, and correct answers


def coco_captions(root: Path) -> list[Line]:
    file = root / "coco/annotations/captions_val2014.json"
    told = _json(file)
    with _form(file, "images with id and file_name, and annotations with image_id and caption"):
        captions: dict[Any, list[str]] = defaultdict(list)
        for one in told["annotations"]:
            captions[one["image_id"]].append(one["caption"].strip())
        images = {image["id"]: image["file_name"] for image in told["images"]}
        return [(f"{IMAGES}/{name}", CAPTION, captions[key]) for key, name in images.items() if key in captions]


def vqav2(root: Path) -> list[Line]:
    files = [root / "vqav2" / f"v2_{kind}.json" for kind in
             ("OpenEnded_mscoco_val2014_questions", "mscoco_val2014_annotations")]  # fmt: skip
    questions, annotations = map(_json, files)
    with _form(files[0], "questions with question_id, image_id and question"):
        asked = {one["question_id"]: (int(one["image_id"]), one["question"]) for one in questions["questions"]}
    with _form(files[1], "annotations with question_id and answers, each with answer"):
        answers = {one["question_id"]: [each["answer"] for each in one["answers"]]
                   for one in annotations["annotations"]}  # fmt: skip
    if lacks := [key for key in asked if not answers.get(key)]:
        raise ValueError(f"{files[1]} has no answers to {len(lacks)} of {len(asked)} questions, such as {lacks[0]}")
    return [
        (f"{IMAGES}/COCO_val2014_{image:012d}.jpg", SHORT.format(question), answers[key])
        for key, (image, question) in asked.items()
    ]


def pope(kind: str) -> Callable[[Path], list[Line]]:
    def read(root: Path) -> list[Line]:
        file = root / "pope" / f"coco_pope_{kind}.json"
        with _form(file, "lines of JSON with image, text and label"):
            lines = [json.loads(line) for line in _text(file).splitlines() if line.strip()]
            return [(f"{IMAGES}/{one['image']}", SHORT.format(one["text"]), [one["label"]]) for one in lines]

    return read


LAYOUTS: dict[str, Callable[[Path], list[Line]]] = {
    "coco-captions": coco_captions, "vqav2": vqav2,
    **{f"pope-{kind}": pope(kind) for kind in ("adversarial", "popular", "random")},
}  # fmt: skip


@contextmanager
def _form(file: Path, expected: str) -> Iterator[None]:
    """Names the file and what was expected where the block cannot read it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: expected {expected} ({error!r})") from None


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None


def _text(file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: expected the layout that rvlm.lvlm.layouts tells")
    return file.read_text()
