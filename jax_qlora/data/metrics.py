# SPDX-License-Identifier: Apache-2.0
"""Metrics of generated text: chrF, and the share of texts with an archaic word."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError

_LONGEST_NGRAM = 6
_BETA = 2

_ARCHAIC = frozenset(
    """
    thou thee thy thine thyself ye hath hast hadst doth dost didst shalt wilt wast wert canst
    couldest mayest mightest shouldest wouldest durst unto saith saidst spake spakest sware brake
    begat gat clave drave forgat wist wot shew shewed shewing yea verily whither thither hither
    thence whence wherefore wherein whereunto wherewith whereupon thereof therein thereon hereof
    hereby whosoever whatsoever whomsoever whoso whithersoever wheresoever soever howbeit
    peradventure insomuch forasmuch oft alway twain brethren nigh ere betwixt kine raiment damsel
    straightway forthwith privily straitly asunder builded digged wroth waxed smote smitten
    threescore fourscore nought beseech besought tarry tarried hearken hearkened lo knowest goest
    doest sayest seest comest camest makest gavest sawest dwellest speakest wentest broughtest
    heardest givest lovest madest seekest takest hearest judgest teachest
    """.split()
)
# Third persons ("he knoweth"), but not "teeth", "twentieth" or the ends of hyphenated names.
_VERB_IN_ETH = re.compile(r"(?<!-)\b(?!teeth\b|beth\b|seth\b|\w*tieth\b)[a-z]{2,}eth\b")


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Return the corpus-level character n-gram F-score chrF2, between 0 and 100.

    N-grams of 1 to 6 characters without white space, recall weighted twice: the same figure as
    sacrebleu's `corpus_chrf` with its defaults and one reference.

    >>> round(chrf(["He knows."], ["He knew."]), 2)
    32.34

    Args:
        hypotheses: answers.
        references: one right answer each.

    Raises:
        InputError: the two differ in length, or are empty.

    References:
        Popović, "chrF: character n-gram F-score for automatic MT evaluation", WMT 2015.
    """
    if len(hypotheses) != len(references) or not references:
        raise InputError(
            f"chrF needs one reference per answer: found {len(hypotheses)} answers and "
            f"{len(references)} references."
        )
    precisions, recalls = [], []
    for length in range(1, _LONGEST_NGRAM + 1):
        found = wanted = matched = 0
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            have, want = _ngrams(hypothesis, length), _ngrams(reference, length)
            if want:
                found += have.total()
                wanted += want.total()
                matched += (have & want).total()
        if found and wanted:
            precisions.append(matched / found)
            recalls.append(matched / wanted)
    if not sum(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 100 * (1 + _BETA**2) * precision * recall / (_BETA**2 * precision + recall)


def archaic_share(texts: Sequence[str]) -> float:
    """Return the share, between 0 and 1, of texts that hold an archaic word.

    Args:
        texts: for example a model's answers.

    Raises:
        InputError: there are none.
    """
    if not texts:
        raise InputError("The share of archaic answers needs at least one answer, found none.")
    return sum(map(is_archaic, texts)) / len(texts)


def copy_baseline(examples: Sequence[Mapping[str, Any]]) -> float:
    """Return the chrF of answering each chat by repeating its last question.

    Where question and answer are alike, as in rewriting, this is what a model has to beat.

    Args:
        examples: chats, each ending with a question and its answer.
    """
    ends = [example["messages"][-2:] for example in examples]
    return chrf([asked["content"] for asked, _ in ends], [said["content"] for _, said in ends])


def is_archaic(text: str) -> bool:
    """Whether the text holds an archaic English word or verb form (thou, unto, knoweth).

    >>> is_archaic("He that cometh unto me"), is_archaic("A man of the twentieth century")
    (True, False)
    """
    words = re.findall(r"[a-z]+", text.lower())
    return not _ARCHAIC.isdisjoint(words) or _VERB_IN_ETH.search(text) is not None


def _ngrams(text: str, length: int) -> Counter[str]:
    text = "".join(text.split())
    return Counter(text[i : i + length] for i in range(len(text) - length + 1))
