"""Scores of answers in words: of each answer, given its references.

    f1      words in common with the best reference
    vqa     VQA accuracy: min(1, annotators who said the same / 3)
    cider   CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726) of captions, which is 10 for the only reference itself if
            that has at least four words

CIDEr-D of a candidate c with references s_1 .. s_m, where g^n are the TF-IDF weights of n-grams (how often one stands
in the sentence, times the logarithm of all images over those whose references hold it) and l is a sentence's length:

    10 / m * mean_{n = 1 .. 4} sum_j exp(-(l(c) - l(s_j))^2 / (2 * 6^2)) min(g^n(c), g^n(s_j)) . g^n(s_j)
                                                                        / (|g^n(c)| |g^n(s_j)|)

As in its authors' code counts are not divided by the sentence's length, which would change nothing but the minimum.
Sentences are cut at spaces, in lower case and without punctuation; theirs are cut by Stanford's tokenizer, which needs
Java, so that figures differ a little. Weights come from the references of the data that is scored: of one image alone,
or of other images, another number comes out.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable

__all__ = ["HIGHEST", "SCORES", "cider", "token_f1", "vqa_accuracy"]

NGRAMS, SIGMA = 4, 6.0
ARTICLES = ("a", "an", "the")
DIGITS = {
    word: str(k)
    for k, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
} | {"none": "0"}
# With apostrophes; those that are other words without one (its, were, well, ill, shell, wed, id, hell) are left alone.
CONTRACTIONS = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how's i'm i've "
    "isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't o'clock oughtn't shan't she's should've "
    "shouldn't somebody's someone's something's that'd that's there'd there're there's they'd they'll they're they've "
    "wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've "
    "why'd why's won't would've wouldn't y'all you'd you'll you're you've"
)
APOSTROPHES = {word.replace("'", ""): word for word in CONTRACTIONS.split()}


def token_f1(answer: str, references: list[str]) -> float:
    """Harmonic mean of precision and recall of an answer's words, of the reference that fits best; in [0, 1]."""

    def f1(reference: str) -> float:
        ours, theirs = (without_articles(text) for text in (answer, reference))
        common = sum((Counter(ours) & Counter(theirs)).values())
        return 2 * common / (len(ours) + len(theirs)) if ours or theirs else 1.0

    return max(map(f1, references))


def vqa_accuracy(answer: str, references: list[str]) -> float:
    """min(1, others who said the same / 3), the mean over leaving out each of the annotators (Antol et al. 2015).

    With fewer than four references: whether one of them is the answer. What is compared is normalised as the
    benchmark's page says: lower case; no full stops but in decimals, no commas in numbers, spaces for other punctuation
    but apostrophes and colons; digits for number words up to ten; no articles; contractions with their apostrophe, of a
    list of our own. The benchmark's code leaves answers on which all annotators agree as they are.
    """
    said = normalised(answer)
    same = [normalised(reference) == said for reference in references]
    if len(same) < 4:
        return float(any(same))
    return sum(min(1.0, (sum(same) - one) / 3) for one in same) / len(same)


def normalised(text: str) -> str:
    """An answer as `vqa_accuracy` compares it."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower().replace("\n", " ").replace("\t", " "))
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s':.]|_", " ", text)
    words = (DIGITS.get(word, word) for word in text.split() if word not in ARTICLES)
    return " ".join(APOSTROPHES.get(word, word) for word in words)


def cider(answers: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D of every answer, in [0, 10]; see the module. All answers of a data set must come at once."""
    told = [[_grams(text) for text in own] for own in references]
    seen = Counter(gram for own in told for gram in set().union(*(grams for grams, _ in own)))
    rarity = {gram: math.log(len(references) / count) for gram, count in seen.items()}
    unseen = math.log(max(len(references), 1))

    def weighed(counts: Counter) -> list[dict]:
        """TF-IDF by the length of n-grams."""
        found: list[dict] = [{} for _ in range(NGRAMS)]
        for gram, count in counts.items():
            found[len(gram) - 1][gram] = count * rarity.get(gram, unseen)
        return found

    scores = []
    for answer, own in zip(answers, told, strict=True):
        counts, length = _grams(answer)
        ours, total = weighed(counts), 0.0
        for their_counts, their_length in own:
            likeness = sum(map(_likeness, ours, weighed(their_counts)))
            total += math.exp(-((length - their_length) ** 2) / (2 * SIGMA**2)) * likeness / NGRAMS
        scores.append(10 * total / len(own))
    return scores


def _likeness(ours: dict, theirs: dict) -> float:
    norms = math.sqrt(sum(v * v for v in ours.values()) * sum(v * v for v in theirs.values()))
    return sum(min(value, theirs[gram]) * theirs[gram] for gram, value in ours.items() if gram in theirs) / (norms or 1)


def _grams(text: str) -> tuple[Counter, int]:
    """Counts of 1- to 4-grams, and the number of words."""
    words = _words(text)
    return Counter(
        tuple(words[k : k + n]) for n in range(1, NGRAMS + 1) for k in range(len(words) - n + 1)
    ), len(words)  # fmt: skip


def without_articles(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and articles."""
    return [word for word in _words(text) if word not in ARTICLES]


def _words(text: str) -> list[str]:
    return text.lower().translate(str.maketrans("", "", string.punctuation)).split()


def _each(score: Callable[[str, list[str]], float]) -> Callable[[list[str], list[list[str]]], list[float]]:
    return lambda answers, references: [score(*pair) for pair in zip(answers, references, strict=True)]


SCORES: dict[str, Callable[[list[str], list[list[str]]], list[float]]] = {
    "f1": _each(token_f1), "vqa": _each(vqa_accuracy), "cider": cider,
}  # fmt: skip
HIGHEST = {"f1": 1.0, "vqa": 1.0, "cider": 10.0}
