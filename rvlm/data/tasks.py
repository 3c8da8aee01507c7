"""What protocols ask LVLMs: by task, the words that a question is put in, and what counts as an answer."""

import dataclasses

__all__ = ["TASKS", "Task"]


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of question.

    Attributes:
        prompt: what is asked; {} stands for the benchmark's question.
        score: of the answers, a name in `rvlm.lvlm.SCORES`.
        max_tokens: of an answer.
    """

    prompt: str
    score: str
    max_tokens: int


TASKS = {
    "captioning": Task("Provide a one-sentence caption for the provided image.", "cider", 20),
    "vqa": Task("{}\nAnswer the question using a single word or phrase.", "vqa", 20),  # as LLaVA-1.5 is asked
}
