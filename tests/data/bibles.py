# SPDX-License-Identifier: Apache-2.0
"""Two little Bibles in the form of the real modules."""

from pathlib import Path

OLD = "Thou shalt give {} unto me."
NEW = "You shall give {} to me."


def module(verses: dict[int, str]) -> str:
    """The source of a module that holds `verses` as pythonbible's generated modules do."""
    text, starts, ends = "", {}, {}
    for verse, content in verses.items():
        starts[verse] = len(text)
        text += " " + content
        ends[verse] = len(text)
    return (
        "# Generated.\nfrom pythonbible.bible.bible import Bible\n"
        "from pythonbible.versions import Version\n\n"
        f'bible = Bible(\n    Version.KING_JAMES,\n    """{text}""",\n    {starts},\n    {ends},\n'
        '    {Book.RUTH: "Ruth"},\n    False,\n)\n'
    )


def write(directory: Path, old: dict[int, str], new: dict[int, str]) -> Path:
    """Write both modules where a download puts them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "kjv.py").write_text(module(old), "utf-8")
    (directory / "web.py").write_text(module(new), "utf-8")
    return directory


def write_many(directory: Path, count: int) -> Path:
    """Write `count` good verses of Genesis, three of Ruth and two of John."""
    ids = [1_001_000 + i for i in range(count)] + [8_001_001, 8_001_002, 8_001_003]
    ids += [43_001_001, 43_001_002]
    words = [f"bread-{_letters(i)}" for i in range(len(ids))]
    old = {verse: OLD.format(word) for verse, word in zip(ids, words, strict=True)}
    new = {verse: NEW.format(word) for verse, word in zip(ids, words, strict=True)}
    return write(directory, old, new)


def _letters(number: int) -> str:
    return "".join(chr(97 + int(digit)) for digit in str(number))
