# SPDX-License-Identifier: Apache-2.0
"""What the commands that write a model share: progress, and what is said afterwards."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..report import Display

if TYPE_CHECKING:
    from ..interop.hf_write import SavedModel
    from ..models import Model


_QUICK = 2.0  # seconds that need no progress


@contextlib.contextmanager
def progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show on standard error how many parts of a job are done, if it takes long.

    Args:
        name: The job, e.g. "writing".

    Yields:
        A function of the number of parts that are done, and of all.
    """
    with Display(Console(stderr=True)) as show:
        phase: Any = None
        began = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal phase
            if time.monotonic() - began < _QUICK:
                return
            phase = phase or show.phase(name, total, brief=True)
            phase.update(done, "tensors")

        yield update


def report(saved: "SavedModel", *, as_json: bool, notes: list[str], **figures: Any) -> None:
    """Print what was written.

    Args:
        saved: What was written.
        as_json: Print one JSON object.
        notes: Sentences for people.
        **figures: What else is known.
    """
    record = {
        "output": str(saved.path),
        "tensors": saved.tensors,
        "bytes": saved.nbytes,
        "files": saved.files,
        "updates": saved.updates,
        **figures,
    }
    if as_json:
        print(json.dumps(record))
        return
    print(f"Wrote '{saved.path}': {saved.tensors} tensors, {size(saved.nbytes)}.")
    for name, count in saved.files.items():
        print(f"  {name}  {size(count)}")
    for note in notes:
        print(note)


def check_logits(
    model: "Model",
    params: Any,
    saved: "SavedModel",
    *,
    itemsize: int,
    quantization: str | None = None,
) -> tuple[dict[str, Any], str]:
    """Compare the written model's logits with those of the one it was written from.

    Args:
        model: The model that was written.
        params: Its parameters, with the adapter attached.
        saved: Where it is.
        itemsize: Bytes a parameter of the written one, dense.
        quantization: How to load it; None for dense.

    Returns:
        Figures, and a sentence; both say so if there was not memory enough.
    """
    from ..interop.probe import compare_logits, probe_fits

    if not probe_fits(model, itemsize):
        return {"logit_difference": None}, (
            "Its logits were not compared: the dense model does not fit in the free memory."
        )
    probe = compare_logits(model, params, saved.path, quantization=quantization)
    figures = {"logit_difference": probe.difference, "largest_logit": probe.largest}
    return figures, (
        f"Largest difference of a logit on a probe: {probe.difference:.2g} (logits reach "
        f"{probe.largest:.3g})."
    )


def updates_note(saved: "SavedModel", adapter: Any) -> list[str]:
    """A sentence on what of an adapter was folded in, if there was one."""
    from ..lora import LoraPair

    if adapter is None:
        return []
    others = sum(not isinstance(entry, LoraPair) for entry in adapter.values())
    if others:
        weights = "1 weight" if others == 1 else f"{others} weights"
        return [f"{saved.updates} updates folded in, and {weights} trained beside."]
    if not saved.updates:
        return ["The adapter changes nothing: all of its updates are zero."]
    return [f"{saved.updates} updates folded in."]


def size(count: int) -> str:
    """Bytes, as people read them."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.2f} {unit}"
    return f"{count} bytes"
