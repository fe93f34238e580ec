# SPDX-License-Identifier: Apache-2.0
"""Progress for people: a live bar on a terminal, plain lines in a log."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Display:
    """Shows the phases of a run. Lines printed through it stay above the live bar.

    In a log, where nothing can be redrawn, a phase prints a line when it starts, and one about
    every ten seconds when it has something to say.
    """

    def __init__(self, console: Console):
        self.console = console
        self._live = console.is_terminal or console.is_jupyter
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._printed = 0.0

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def print(self, text: str = "") -> None:
        """Print text that stays, as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def field(self, name: str, text: str, style: str = "") -> None:
        """Print a short name and what it stands for."""
        line = Text.assemble((f"{name:>10}  ", "dim"), (text, style))
        self.console.print(line, soft_wrap=True)

    def phase(self, name: str, total: int, *, done: int = 0, brief: bool = False) -> "Phase":
        """Begin a phase of `total` parts, of which `done` are done; a brief one is not logged."""
        if not self._live and not brief:
            self.print(f"{name}: {done} of {total} done" if done else f"{name}: {total}")
        task = self._bars.add_task(name, total=total, completed=done, note="")
        return Phase(self, task, name, total)

    def _update(self, phase: "Phase", done: int, note: str) -> None:
        self._bars.update(phase.task, completed=done, note=note)
        now = time.monotonic()
        if not self._live and note and (now - self._printed > 10 or done == phase.total):
            self._printed = now
            self.print(f"{phase.name} {done}/{phase.total}  {note}")

    def _remove(self, phase: "Phase") -> None:
        self._bars.remove_task(phase.task)


class Phase:
    """One bar."""

    def __init__(self, display: Display, task: Any, name: str, total: int):
        self.display, self.task, self.name, self.total = display, task, name, total

    def __enter__(self) -> "Phase":
        return self

    def __exit__(self, *_: object) -> None:
        self.display._remove(self)

    def update(self, done: int, note: str = "") -> None:
        """Say how many parts are done, with a few words to show beside the bar."""
        self.display._update(self, done, note)
