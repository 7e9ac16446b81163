"""CIDEr: how much a caption agrees with other captions of the same picture (Vedantam et al. 2015,
https://arxiv.org/abs/1411.5726). It scores answers, and finds the typical ones among the captions by people.
"""

import re

from pycocoevalcap.cider.cider import Cider

from model.processing import language

TYPICAL = 2  # captions of a picture in one language
TOGETHER = 10_000  # pictures whose captions give the n-gram weights: more would only need more memory


def words(text: str) -> list[str]:
    """Splits text into lower-case words without punctuation; Chinese into characters."""
    return re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+(?:'\w+)?", text.lower())


def cider(captions: list[str], references: list[list[str]]) -> list[float]:
    """Returns CIDEr-D of each caption on `words`; the references of all of them give the n-gram weights."""
    given = {i: [" ".join(words(reference)) for reference in texts] for i, texts in enumerate(references)}
    _, scores = Cider().compute_score(given, {i: [" ".join(words(caption))] for i, caption in enumerate(captions)})
    return [float(score) for score in scores]


def most_typical(captions: list[tuple[str, str]]) -> list[int]:
    """Returns, in order, the numbers of the TYPICAL captions of each picture and language that agree most with its
    other ones; of all where there are no more than that. captions: (picture, text).
    """
    groups, scores = {}, {}
    for number, (picture, text) in enumerate(captions):
        groups.setdefault((language(text), picture), []).append(number)
    for spoken in {spoken for spoken, _ in groups}:
        many = [group for (each, _), group in groups.items() if each == spoken and len(group) > TYPICAL]
        for start in range(0, len(many), TOGETHER):
            cases = [(number, group) for group in many[start : start + TOGETHER] for number in group]
            others = [[captions[other][1] for other in group if other != number] for number, group in cases]
            numbers = [number for number, _ in cases]
            scores |= zip(numbers, cider([captions[number][1] for number in numbers], others))
    best = (sorted(group, key=lambda number: -scores.get(number, 0))[:TYPICAL] for group in groups.values())
    return sorted(number for group in best for number in group)
