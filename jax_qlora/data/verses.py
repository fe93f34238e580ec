# SPDX-License-Identifier: Apache-2.0
"""Pairs of verses that make good examples: cleaning and choosing.

Most pairs of verses make poor examples: the two sentences end in different places, nothing had to
be modernized, or the modern side was left half revised.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .metrics import is_archaic

_MOST = 58  # words, marks and names of both sides: every example fits 96 tokens of SmolLM2
_SHORT_NAMES = frozenset({"I", "LORD", "Yahweh", "God"})
_SIMILARITY = 0.25, 0.80  # outside: another meaning (or boundary), or little to rewrite

# Verses that the World English Bible left half revised, and that would teach two styles at once:
# speech without quotation marks, and imperatives with a pronoun ("Hear you this").
_BARE_SPEECH = re.compile(
    r"\b(?:said|saying|says?|spoke|answered|asked|cried|commanded|swore|told)"
    r"(?: [\w']+){0,4}[,:] [A-Z]"
)
_BEFORE_YOU = re.compile(r"(?:^|(?<=[.;:!?,] )|(?<=\"))([A-Za-z]+) you\b")
_NO_IMPERATIVES = frozenset(
    """all also although am and are as because before behold both but can could did do even for have
    having how however if in lest like may might moreover must neither nevertheless nor now of only
    or says shall should since so surely than that then there therefore though thus to until was
    were what whatever when whenever where whether which while who whoever whom why will with would
    yes yet""".split()
)


@dataclass(frozen=True, kw_only=True)
class VersePair:
    """One verse in both translations, cleaned."""

    verse: int
    """Book * 1,000,000 + chapter * 1,000 + verse."""
    archaic: str
    """King James Version."""
    modern: str
    """World English Bible."""


def clean_pairs(archaic: dict[int, str], modern: dict[int, str]) -> Iterator[VersePair]:
    """Yield the verses that make good examples, cleaned, in the order of `archaic`.

    Kept are short whole sentences, the archaic one with an archaic word and the modern one
    without, neither nearly equal nor hardly alike.

    Args:
        archaic: verse id -> raw text of the King James Version.
        modern: verse id -> raw text of the World English Bible.
    """
    common = _common_words(modern.values())
    for verse, raw in archaic.items():
        source = clean_archaic(raw)
        if verse not in modern or not _is_whole(source) or not is_archaic(source):
            continue
        target = clean_modern(modern[verse], common)
        if target is None or not _is_whole(target) or is_archaic(target):
            continue
        if _size(source) + _size(target) > _MOST or _is_half_revised(source, target):
            continue
        if _SIMILARITY[0] <= _similarity(source, target) < _SIMILARITY[1]:
            yield VersePair(verse=verse, archaic=source, modern=target)


def clean_archaic(text: str) -> str:
    """Return a King James verse without the brackets around supplied words.

    >>> clean_archaic(" For the LORD’s portion [is] his people; ( Selah.) ")
    "For the LORD's portion is his people; (Selah.)"
    """
    text = re.sub(r"(?<=\])(?=[(\w])", " ", text)
    text = text.translate(str.maketrans({"[": "", "]": "", "’": "'", "æ": "ae", "Æ": "Ae"}))
    return re.sub(r"\( ", "(", " ".join(text.split()))


def clean_modern(text: str, common: frozenset[str] = frozenset()) -> str | None:
    r"""Return a World English verse as plain prose, or None when its quotation marks make no sense.

    Headings of the next psalm, names of acrostic letters, brackets, backticks for apostrophes and
    line breaks of poetry go; a quotation that runs on beyond the verse is closed.

    >>> clean_modern(' He said,    "Don`t [go]      Psalm 3  By David.')
    'He said, "Don\'t go"'

    Args:
        text: raw verse.
        common: words that start a line of poetry in lower case (the prose spelling).
    """
    text = re.sub(r"\s{2,}(BOOK [IVX]+\s+)?Psalm \d+.*$", "", text)
    text = re.sub(r"\s{2,}[A-Z]{2,}( AND [A-Z]+)?\s*$", "", text)
    text = re.sub(r"(?<![.?!\"`\s])(\s{2,})([A-Z][a-z]*)", lambda m: _lower(m, common), text)
    text = re.sub(r"(?<=[,;:])( )([A-Z][a-z]*)", lambda m: _lower(m, common), text)
    if _unmatched_single_quotes(text):
        return None
    text = text.translate(str.maketrans({"[": "", "]": "", "`": "'"})).replace(" -- ", " \u2014 ")
    return _close_quotes(" ".join(text.split()))


def _lower(match: re.Match[str], common: frozenset[str]) -> str:
    word = match[2]
    return match[1] + (word.lower() if word.lower() in common else word)


def _common_words(texts: Iterable[str]) -> frozenset[str]:
    """Words that within a line are nearly always written in lower case."""
    counts = Counter(word for text in texts for word in re.findall(r"(?<=[a-z,] )[A-Za-z]+", text))
    lower = {word for word in counts if word.islower()}
    return frozenset(word for word in lower if counts[word] > 20 * counts[word.capitalize()])


def _unmatched_single_quotes(text: str) -> bool:
    """Whether a quotation inside a quotation does not begin and end in this verse."""
    opening = len(re.findall(r"(?:^|(?<=[\s\"(]))`(?=\w)", text))
    closing = len(re.findall(r"(?<=[.,!?;:])`", text))
    return opening != closing


def _close_quotes(text: str) -> str | None:
    """Complete or drop the double quotation marks whose partner is in another verse.

    >>> _close_quotes('said, "Go'), _close_quotes('Go," he said.'), _close_quotes('"Go there.')
    ('said, "Go"', '"Go," he said.', 'Go there.')
    """
    inner = text.strip('"')
    if '"' not in inner:  # all of the verse is spoken, or none
        return inner if text.startswith('"') or text == inner else _complete(text)
    return _complete(text)


def _complete(text: str) -> str | None:
    marks = [
        "open" if not text[:i].rstrip("'") or text[:i].rstrip("'")[-1] in " (\u2014" else "close"
        for i, character in enumerate(text)
        if character == '"'
    ]
    if marks[0] == "close":
        if len(marks) == 1 and text.endswith('"'):
            return text[:-1]
        text, marks = '"' + text, ["open", *marks]
    if marks[-1] == "open":
        text, marks = text + '"', [*marks, "close"]
    return text if marks == ["open", "close"] * (len(marks) // 2) else None


def _is_half_revised(source: str, target: str) -> bool:
    if _BARE_SPEECH.search(re.sub(r'"[^"]*"', "", target)):
        return True
    verbs = {verb.lower() for verb in _BEFORE_YOU.findall(target)} - _NO_IMPERATIVES
    return any(re.search(rf"\b{verb} (ye|thou|thee|you)\b", source.lower()) for verb in verbs)


def _is_whole(text: str) -> bool:
    """Whether the text starts with a capital and ends with a full stop, inside any quotes."""
    first, last = text.lstrip("\"'("), text.rstrip("\"')")
    return first[:1].isupper() and last[-1:] in {".", "?", "!"}


def _size(text: str) -> int:
    """About as many tokens: words, punctuation marks, and names once more."""
    words = re.findall(r"\w+", text)
    names = [word for word in words[1:] if word[0].isupper() and word not in _SHORT_NAMES]
    return len(text.split()) + len(re.findall(r"[^\w\s]", text)) + len(names)


def _similarity(source: str, target: str) -> float:
    """Share of words in common, in order (Ratcliff and Obershelp), between 0 and 1."""
    first, second = (re.findall(r"[a-z']+", text.lower()) for text in (source, target))
    return difflib.SequenceMatcher(None, first, second, autojunk=False).ratio()
