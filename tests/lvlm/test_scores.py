"""Scores of answers, against values worked out by hand."""

import math

import pytest

from rvlm.lvlm.scores import SCORES, cider, normalised, vqa_accuracy


@pytest.mark.parametrize("text, plain", [
    ("The Cat!", "cat"),
    ("Two  dogs, one cat.", "2 dogs 1 cat"),
    ("none", "0"),
    ("100,978 people", "100978 people"),
    ("3.5 m.", "3.5 m"),
    (".5", ".5"),
    ("dont", "don't"),
    ("Isn't it the man's?", "isn't it man's"),
    ("well its hell", "well its hell"),
    ("10:30 a.m.", "10:30 am"),
    ("black/white-ish", "black white ish"),
    ("a", ""),
])  # fmt: skip
def test_answers_are_normalised(text, plain):
    assert normalised(text) == plain


@pytest.mark.parametrize("same, score", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_out_one_annotator_after_the_other(same, score):
    """Of ten with k that agree: k leave one out who agreed, (k - 1) / 3, and 10 - k one who did not, k / 3."""
    assert vqa_accuracy("Two", ["2"] * same + ["dog"] * (10 - same)) == pytest.approx(score)


def test_cider_by_hand():
    references = [["a b"], ["c d"]]
    # Unigrams and bigrams are the reference's; there are no longer ones.
    assert cider(["A b.", "x"], references) == pytest.approx([10 * (1 + 1 + 0 + 0) / 4, 0.0])
    # One word more, which no image has: log 2 is the weight of every n-gram.
    longer = 10 / 4 * (2 / math.sqrt(3 * 2) + 1 / math.sqrt(2 * 1)) * math.exp(-1 / 72)
    assert cider(["a b x", "c d"], references) == pytest.approx([longer, 5.0])
    # Twice a word that the reference has once: the minimum is 1 of 2, norms are 2 and 1.
    twice = 10 / 4 * (2 - 1) / 2 * math.exp(-1 / 72)
    assert cider(["a a", "c"], [["a"], ["c"]])[0] == pytest.approx(twice)


def test_cider_weighs_words_by_how_rare_they_are():
    references = [["dog runs", "dog"], ["dog sits"], ["cat sits", "bird"]]
    dog, runs = math.log(3 / 2), math.log(3)
    first, second = cider(["dog"] * 3, references)[:2]
    # "dog runs": 1-grams dog and runs, one word longer; "dog": the same
    likeness = dog * dog / (dog * math.hypot(dog, runs))
    assert first == pytest.approx(10 / 2 / 4 * (likeness * math.exp(-1 / 72) + 1))
    assert second == pytest.approx(10 / 4 * dog / math.hypot(dog, dog) * math.exp(-1 / 72))
    assert cider(["dog"], [["dog"]]) == [0.0], "of one image no word says anything"
    assert cider(["", "dog"], [["dog"], [""]]) == [0.0, 0.0]


def test_a_sentence_is_its_own_best_caption():
    references = [["a man rides a horse on the beach"], ["two cats sleep on a sofa"], ["a plate of food on a table"]]
    assert cider([own[0] for own in references], references) == pytest.approx([10.0] * 3)
    moved = cider([references[1][0], references[2][0], references[0][0]], references)
    assert max(moved) < 0.5
    assert SCORES["vqa"](["Yes.", "no"], [["yes"], ["yes"]]) == [1.0, 0.0]
