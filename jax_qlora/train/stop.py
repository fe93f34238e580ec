# SPDX-License-Identifier: Apache-2.0
"""Stopping between steps: Ctrl-C and SIGTERM ask, the loop obeys when it is safe."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Stop = Callable[[], int]
"""Returns the number of the signal that asked to stop, or 0."""


@contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """Make sure that a Ctrl-C is not lost before there is anything to save.

    It raises `KeyboardInterrupt` as ever. But Python drops an exception that happens to rise inside
    a garbage collector's callback, of which jax has one: so the request is remembered as well.

    Yields:
        A function to call now and then.

    Raises:
        KeyboardInterrupt: at Ctrl-C, and from the yielded function if it has been pressed.
    """
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a question that the loop asks between steps.

    A second Ctrl-C raises `KeyboardInterrupt` at once. Outside the main thread, where Python
    delivers no signals, nothing changes.

    Args:
        say: Called with a line for the user when a signal arrives.

    Yields:
        A function that returns the signal's number once one has arrived, and 0 before.

    Raises:
        KeyboardInterrupt: at the second Ctrl-C.
    """
    asked = 0

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = number
        say("Stopping: this step is finished and saved first. Press Ctrl-C again to stop at once.")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
