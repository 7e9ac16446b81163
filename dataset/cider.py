"""CIDEr-D: how much a caption agrees with other captions of the same picture (Vedantam et al. 2015,
https://arxiv.org/abs/1411.5726). It scores answers, rewards them in `train_scst_vlm.py`, and finds the typical ones
among the captions by people.
"""

import math
import re
from collections import Counter
from statistics import fmean

from model.processing import language

TYPICAL = 2  # captions of a picture in one language
TOGETHER = 10_000  # pictures whose captions give the n-gram weights: more would only need more memory
SIGMA = 6.0  # words: by how much the length may differ


def words(text: str) -> list[str]:
    """Splits text into lower-case words without punctuation; Chinese into characters."""
    return re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+(?:'\w+)?", text.lower())


def ngrams(text: str) -> list[Counter]:
    """Counts the sequences of 1, 2, 3 and 4 words in a text."""
    each = words(text)
    return [Counter(zip(*(each[i:] for i in range(n)))) for n in range(1, 5)]


class Cider:
    """Scores captions against references, which are read once.

    A sequence of words is a direction, as long as it is frequent in the caption and rare among the pictures; the score
    of two captions is the cosine of their vectors, for 1, 2, 3 and 4 words, and lower if their lengths differ. No
    sequence counts more often than in the reference, so a repetition gains nothing.
    """

    def __init__(self, references: list[list[str]]):
        """references: the captions of each picture."""
        counted = [[ngrams(text) for text in texts] for texts in references]
        pictures = Counter(gram for texts in counted for gram in {gram for text in texts for n in text for gram in n})
        self.most = math.log(max(len(references), 1))  # the rarity of sequences that no reference has
        self.rarity = {gram: self.most - math.log(count) for gram, count in pictures.items()}
        self.references = [[self.vectors(text) for text in texts] for texts in counted]

    def vectors(self, counted: list[Counter]) -> list[tuple[dict, float, int]]:
        """(weights of its sequences, their norm, its length) for each n."""
        length = counted[1].total()
        weights = [{gram: count * self.rarity.get(gram, self.most) for gram, count in n.items()} for n in counted]
        return [(each, math.sqrt(sum(x * x for x in each.values())), length) for each in weights]

    def score(self, picture: int, caption: str) -> float:
        """CIDEr-D of a caption with the references of a picture, 0 to 10."""
        vectors = self.vectors(ngrams(caption))
        return fmean(similarity(vectors, reference) for reference in self.references[picture])


def similarity(caption: list[tuple], reference: list[tuple]) -> float:
    """CIDEr-D of a caption with one reference, 0 to 10. Both from `Cider.vectors`."""
    total = 0.0
    for (weights, norm, length), (others, other_norm, other_length) in zip(caption, reference):
        if norm and other_norm:
            shared = sum(min(x, others[gram]) * others[gram] for gram, x in weights.items() if gram in others)
            total += shared / (norm * other_norm) * math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
    return 10 * total / 4


def cider(captions: list[str], references: list[list[str]]) -> list[float]:
    """Returns CIDEr-D of each caption; the references of all of them give the n-gram weights."""
    scorer = Cider(references)
    return [scorer.score(number, caption) for number, caption in enumerate(captions)]


def most_typical(captions: list[tuple[str, str]]) -> list[int]:
    """Returns, in order, the numbers of the TYPICAL captions of each picture and language that agree most with its
    other ones; of all where there are no more than that. captions: (picture, text).
    """
    groups = {}
    for number, (picture, text) in enumerate(captions):
        groups.setdefault(language(text), {}).setdefault(picture, []).append(number)
    best = []
    for pictures in groups.values():
        numbers = list(pictures.values())  # of the captions of each picture
        for start in range(0, len(numbers), TOGETHER):
            some = numbers[start : start + TOGETHER]
            scorer = Cider([[captions[number][1] for number in group] for group in some])
            for group, vectors in zip(some, scorer.references):
                best += central(group, vectors)
    return sorted(best)


def central(group: list[int], vectors: list) -> list[int]:
    """The TYPICAL numbers of a group whose captions agree most with its other ones."""
    agreement = [sum(similarity(each, other) for other in vectors if other is not each) for each in vectors]
    return [number for _, number in sorted(zip(agreement, group), key=lambda pair: -pair[0])[:TYPICAL]]
