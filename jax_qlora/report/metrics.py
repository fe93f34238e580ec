# SPDX-License-Identifier: Apache-2.0
"""The record of a run: one JSON object a line, appended as it happens."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from ..errors import InputError

Record = dict[str, Any]


class Metrics:
    """Appends records to a file that any reader may follow while the run goes on."""

    def __init__(self, path: Path, *, resume_step: int = 0):
        """Open `path`; records of steps after `resume_step`, which will happen again, are dropped.

        Args:
            path: The file; made when missing.
            resume_step: Steps done; 0 starts a new record.
        """
        kept = [r for r in read_metrics(path) if r["step"] <= resume_step] if resume_step else []
        self.path = path
        self.records: list[Record] = kept
        write_text(path, "".join(map(_line, kept)))

    def add(self, **values: Any) -> Record:
        """Append one record and return it; numbers that are not finite become null.

        Raises:
            InputError: The file cannot be written.
        """
        self.records.append(values)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(values))
        except OSError as error:
            raise InputError(f"Cannot write '{self.path}': {error}.") from error
        return values


def read_metrics(path: Path) -> list[Record]:
    """Return the records of a metrics file; a last line that was cut short is left out.

    Args:
        path: The file; a missing one has no records.

    Raises:
        InputError: A line is not a JSON object with a step.
    """
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError("step is no integer")
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            if number == len(lines):  # no newline yet: the writer died within the line
                break
            raise InputError(
                f"'{path}' line {number}: expected a JSON object with a step, found {line[:80]!r}. "
                "Delete the file to start a new record."
            ) from error
        records.append(record)
    return records


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically.

    Args:
        path: The file.
        value: Anything JSON can hold.
    """
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str | bytes) -> None:
    """Write a file atomically: whoever reads `path` sees the old or the new contents, whole.

    Args:
        path: The file; its directory is made when missing.
        text: The contents.

    Raises:
        InputError: The disk is full or not writable; the old file is untouched.
    """
    data = text.encode() if isinstance(text, str) else text
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise InputError(
            f"Cannot write '{path}' ({len(data)} bytes): {error}. Make room or choose another "
            "--output."
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _line(record: Record) -> str:
    return json.dumps(_finite(record), ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
