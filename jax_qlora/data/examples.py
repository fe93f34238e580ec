# SPDX-License-Identifier: Apache-2.0
"""Examples to learn from: chats, prompts with completions, or plain text, from files or by name."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..interop.download import resolve
from .modern_english import SYSTEM_PROMPT, modern_english_splits
from .verses import VersePair

_NAMED = "modern-english"
_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
_FORMS = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    '{"prompt": "...", "completion": "..."} or {"text": "..."}'
)


Example = dict[str, Any]
"""One thing to learn. Exactly one of these holds:

  * `messages` is a list of {"role": ..., "content": ...}; the assistant's turns are learned
  * `prompt` and `completion` are strings; the completion is learned
  * `text` is a string; all of it is learned

`where` may say where it came from, for messages: "'data.jsonl' line 3".
"""


def load_examples(
    source: str | Path | Iterable[Mapping[str, Any]], *, split: str = "train"
) -> list[Example]:
    """Return the examples of a file, of a named data set, or of rows in memory.

    A row is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}; prompt and
    completion may also be lists of messages, which are joined. Other columns are left out.

    Args:
        source: "modern-english" (after `jax-qlora download modern-english`); a .jsonl file (one
            JSON object a line), a .json file (a list of objects) or a .parquet file; or an
            iterable of rows such as a `datasets.Dataset`.
        split: of "modern-english": "train", "held_out" or "held_out_books". A file has only
            "train".

    Raises:
        InputError: the source or split does not exist, is empty, or a row is not understood (the
            message names the file and line).
    """
    if not isinstance(source, str | Path):
        return [parse_row(row, f"row {i}") for i, row in enumerate(source, 1)] or _none("the rows")
    if source == _NAMED:
        splits = _named_splits()
        if split not in splits:
            raise InputError(f"'{_NAMED}' has no split '{split}'. It has: {', '.join(splits)}.")
        return splits[split]
    if split != "train":
        raise InputError(
            f"'{source}' has no split '{split}': a file holds one set of examples. "
            "Name another file for held-out examples."
        )
    return _load_file(Path(source).expanduser())


def load_splits(
    source: str | Path, *, held_out_source: str | Path | None = None, held_out: int = 128
) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on and those to evaluate on.

    Args:
        source: as in `load_examples`.
        held_out_source: a file of held-out examples. Without it a named data set gives its own
            "held_out" split, and a file its last `held_out` examples, which are then not trained
            on.
        held_out: most examples to evaluate on.

    Returns:
        (train, held out).

    Raises:
        InputError: as `load_examples`, or nothing is left to train on.
    """
    if source == _NAMED and held_out_source is None:
        splits = _named_splits()
        return splits["train"], splits["held_out"][:held_out]
    train = load_examples(source)
    if held_out_source is not None:
        return train, load_examples(held_out_source)[:held_out]
    if held_out >= len(train):
        raise InputError(
            f"'{source}' holds {len(train)} examples, and {held_out} are to be held out: none is "
            "left to train on. Hold out fewer (eval.examples), name a file of held-out ones "
            "(data.eval_source), or add examples."
        )
    return train[: len(train) - held_out], train[len(train) - held_out :]


def verse_example(pair: VersePair) -> Example:
    """Return a pair of verses as a chat: instruction, archaic verse, modern verse."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": pair.archaic},
            {"role": "assistant", "content": pair.modern},
        ],
        "where": f"'{_NAMED}' verse {pair.verse}",
    }


def parse_row(row: Any, where: str) -> Example:
    """Return one row as an `Example`.

    Args:
        row: a mapping in one of the three forms.
        where: what to call it in messages.

    Raises:
        InputError: it is in none of the forms.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected {_FORMS}, found {_shown(row)}.")
    present = {key: value for key, value in row.items() if value is not None}
    if "messages" in present:
        return {"messages": _messages(present["messages"], where, "messages"), "where": where}
    if {"prompt", "completion"} <= present.keys():
        prompt, completion = present["prompt"], present["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            _not_blank(completion, where, "completion")
            return {"prompt": prompt, "completion": completion, "where": where}
        joined = [*_messages(prompt, where, "prompt"), *_messages(completion, where, "completion")]
        return {"messages": joined, "where": where}
    if "text" in present:
        _not_blank(present["text"], where, "text")
        return {"text": present["text"], "where": where}
    raise InputError(f"{where}: expected {_FORMS}, found the keys {sorted(map(str, row))}.")


def _named_splits() -> dict[str, list[Example]]:
    splits = modern_english_splits(resolve(_NAMED))
    return {name: [verse_example(pair) for pair in pairs] for name, pairs in splits.items()}


def _messages(value: Any, where: str, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InputError(f"{where}: '{key}': expected a list of messages, found {_shown(value)}.")
    messages = []
    for i, message in enumerate(value):
        name = f"{where}: '{key}[{i}]'"
        if not isinstance(message, Mapping) or "role" not in message:
            raise InputError(
                f'{name}: expected {{"role": ..., "content": ...}}, found {_shown(message)}.'
            )
        if message["role"] not in _ROLES:
            raise InputError(
                f"{name}: role: expected one of {', '.join(_ROLES)}, found "
                f"{_shown(message['role'])}."
            )
        present = {str(key): value for key, value in message.items() if value is not None}
        if not isinstance(present.get("content", ""), str) or len(present) < 2:
            raise InputError(
                f"{name}: content: expected a string, found {_shown(message.get('content'))}."
            )
        if present.keys() <= {"role", "content"} and not present["content"].strip():
            if present["role"] == "assistant":
                raise InputError(f"{name}: content: expected an answer, found nothing.")
        messages.append(present)
    return messages


def _not_blank(value: Any, where: str, key: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: '{key}': expected text, found {_shown(value)}.")


def _load_file(path: Path) -> list[Example]:
    readers = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json}
    readers[".parquet"] = _read_parquet
    if path.suffix.lower() not in readers:
        raise InputError(
            f"'{path}' is no data: expected a .jsonl, .json or .parquet file, or the name "
            f"'{_NAMED}'. (A data set of the Hugging Face Hub: save it with "
            "`datasets.load_dataset(...).to_json('data.jsonl')`.)"
        )
    if not path.is_file():
        raise InputError(
            f"No data file at '{path}'. Check data.source; the current directory is '{Path.cwd()}'."
        )
    try:
        rows = readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text: {error}. Save it as UTF-8.") from error
    return [parse_row(row, where) for where, row in rows] or _none(f"'{path}'")


def _read_jsonl(path: Path) -> list[tuple[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                rows.append((f"'{path}' line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise InputError(
                    f"'{path}' line {number}: not valid JSON: {error.msg} at column {error.colno}. "
                    f"Expected one object a line, found {_shown(line)}."
                ) from error
    return rows


def _read_json(path: Path) -> list[tuple[str, Any]]:
    text = path.read_text("utf-8-sig")
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " One object a line? Then name the file .jsonl." if error.msg == "Extra data" else ""
        raise InputError(
            f"'{path}' line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}."
            f"{hint}"
        ) from error
    if not isinstance(rows, list):
        raise InputError(f"'{path}': expected a list of examples, found {_shown(rows)}.")
    return [(f"'{path}' example {i}", row) for i, row in enumerate(rows, 1)]


def _read_parquet(path: Path) -> list[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"'{path}' is not a readable parquet file: {error}.") from error
    return [(f"'{path}' row {i}", row) for i, row in enumerate(rows, 1)]


def _none(where: str) -> list[Example]:
    raise InputError(f"{where} hold no examples: expected at least one of {_FORMS}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
