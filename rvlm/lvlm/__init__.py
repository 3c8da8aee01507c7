"""Vision-language models that answer in words: LLaVA-1.5, Qwen2.5-VL and Qwen3-VL of transformers (extra [lvlm]).

    lvlm = load_lvlm("llava-hf/llava-1.5-7b-hf", "cuda", dtype="bf16")
    loss = AnswerLoss(lvlm, ["What is this?"], ["a cat"])                    # pixels [B, 3, S, S] in [0, 1] -> [B]
    x_adv = pgd(loss, x, eps=4 / 255, loss=given, best="loss")               # rvlm.attacks, rvlm.attacks.losses.given
    lvlm.answer(x_adv, ["What is this?"])
    apply_adapter(lvlm, white_adapter(lvlm))                                 # R-Adapt's filter and anchor

To an attack, an `AnswerLoss` is a model that maps pixels to losses.
"""

from rvlm.lvlm.evaluate import AnswerScores, evaluate_answers, white_adapter
from rvlm.lvlm.model import AnswerLoss, Lvlm, load_lvlm
from rvlm.lvlm.questions import Questions, load_questions
from rvlm.lvlm.scores import SCORES, cider, token_f1, vqa_accuracy

__all__ = [
    "SCORES", "AnswerLoss", "AnswerScores", "Lvlm", "Questions", "cider", "evaluate_answers", "load_lvlm",
    "load_questions", "token_f1", "vqa_accuracy", "white_adapter",
]  # fmt: skip
