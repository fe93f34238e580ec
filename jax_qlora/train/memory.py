# SPDX-License-Identifier: Apache-2.0
"""A run's memory against that of its own device: checked before step 1, explained when it runs out.

What a step needs is the compiler's word. What other settings would need is the formula's, shifted
by what was measured.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from ..config import Config
from ..costs.advice import MARGIN, cheapest_changes, verdict
from ..costs.formula import Bytes, estimate
from ..costs.gpus import GIB
from ..costs.held import held, program_bytes
from ..errors import InputError
from ..lora import Targets
from ..models import DecoderConfig
from ..typing import PyTree

_HOST_FULL = "the host's memory is full"

_PARTS = {
    "base": "base",
    "constants": "constants of its blocks",
    "trainable": "what trains",
    "optimizer": "optimizer",
    "temporaries": "activations and temporaries",
}


def device_memory() -> int | None:
    """Bytes that a program may use on the first device; None where it does not say.

    On a CPU that is the machine's memory, or less in a container that is limited.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _machine_memory()
    return (device.memory_stats() or {}).get("bytes_limit")


def _machine_memory() -> int | None:
    sizes: list[int] = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            sizes.append(int(Path(path).read_text()))
    return min(sizes, default=None)


@contextlib.contextmanager
def on_shortage(explain: Callable[[str], InputError]) -> Iterator[None]:
    """Turn running out of memory, of the device or of the host, into an error that explains it.

    Args:
        explain: From what was reported to the error.

    Raises:
        InputError: Memory ran out.
    """
    try:
        yield
    except MemoryError as error:
        raise explain(f"{_HOST_FULL} ({error})" if str(error) else _HOST_FULL) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise explain(str(error).splitlines()[0].rstrip(".")) from error


class MemoryCheck:
    """What the steps of one run need, and what its device has."""

    def __init__(self, decoder: DecoderConfig, config: Config, targets: Targets, *, seq: int):
        """Estimate; a compiled step then says exactly.

        Args:
            decoder: The model's shape.
            config: Settings of the run.
            targets: Kernels to adapt, now or with another method.
            seq: Tokens of the longest row.
        """
        self._decoder, self._config, self._targets, self._seq = decoder, config, targets, seq
        self._apart = jax.devices()[0].platform != "cpu"  # a CPU's host memory is its own
        self._measured = False
        self.limit = device_memory()
        self.planned = self._estimate(config, seq)

    def measure(self, compiled: Any, state: Any, frozen: PyTree | None) -> str:
        """Take what the compiler plans for a step, and compare it with the device.

        Args:
            compiled: From `jax.jit(step).lower(state, frozen, batch).compile()`.
            state: A `TrainState`.
            frozen: The base.

        Returns:
            A few words: what it needs, what there is, and whether that fits.

        Raises:
            InputError: It does not.
        """
        memory = compiled.memory_analysis()
        if memory is None:
            return "the compiler does not say what it needs"
        device, host = program_bytes(memory)
        paged = self._config.optim.placement == "host"
        parts = held(state.trainable, state.optimizer, frozen, paged=paged and self._apart)
        if not self._apart:  # streamed from where everything is
            parts = dataclasses.replace(parts, base=parts.base + parts.host)
        rest = device - parts.device
        self.planned = dataclasses.replace(parts, temporaries=rest, host=host)
        self._measured = True
        if self.limit is None:
            return f"it needs {_size(device)}"
        word = verdict(device, self.limit)
        if word == "does not fit":
            raise self.explain(f"the step needs {_size(device)}")
        note = f" (less than {_size(MARGIN)} to spare)" if word == "tight" else ""
        return f"it needs {_size(device)} of {_size(self.limit)}: {word}{note}"

    def explain(self, why: str) -> InputError:
        """Say what takes the memory, and which changes of settings would fit at the least cost.

        Args:
            why: What happened.
        """
        train = self._config.train
        host_full = _HOST_FULL in why or "pinned" in why
        has = "" if host_full or self.limit is None else f"; the device has {_size(self.limit)}"
        lines = [
            f"Not enough memory for batches of {train.batch_size} x {self._seq} tokens: {why}{has}."
        ]
        source = "as compiled" if self._measured else "estimated"
        lines.append(f"A step of this run ({source}):")
        lines += [
            f"  {_size(getattr(self.planned, name)):>11}  {words}" for name, words in _PARTS.items()
        ]
        if self.planned.host:
            lines.append(f"  {_size(self.planned.host):>11}  in host memory")
        changes = self._changes(host=self._apart and not host_full)
        lines.append(
            "Changes that would fit, the cheapest first (estimates):"
            if changes
            else "No change of settings would make it fit: take a smaller model or a larger device."
        )
        lines += [
            f"  {change}: {_size(change.needed.device)} "
            f"({_size(change.needed.device - self.planned.device)}); {change.cost}"
            for change in changes
        ]
        if changes:
            lines.append(
                "All but optim.placement and quant.streamed make another run: where this one has "
                "saved checkpoints, choose another --output too."
            )
        if host_full and self.planned.host:
            lines.append(
                'What waits in host memory can go back to the device: optim.placement = "device", '
                'quant.streamed = false, train.remat = "full".'
            )
        if jax.devices()[0].platform == "gpu" and _FRACTION not in os.environ:
            lines.append(
                f"jax takes three quarters of the card. {_FRACTION}=0.95 in the environment "
                "gives it more."
            )
        return InputError("\n".join(lines))

    def _changes(self, *, host: bool) -> list[Any]:
        room = self.planned.device if self.limit is None else min(self.limit, self.planned.device)
        for budget in (max(room - MARGIN, room // 2), room - 1):
            changes = cheapest_changes(
                self._need, self._config, seq=self._seq, limit=budget, host=host
            )
            if changes:
                return changes
        return []

    def _estimate(self, config: Config, seq: int) -> Bytes:
        targets = None if config.method == "full" else self._targets
        return estimate(self._decoder, config, targets, seq=seq)

    def _need(self, config: Config, seq: int) -> Bytes:
        """The formula for other settings, shifted by what was measured for these."""
        now, then = self._estimate(self._config, self._seq), self._estimate(config, seq)
        scale = self.planned.temporaries / max(now.temporaries, 1)
        parts = {
            name: max(getattr(self.planned, name) + getattr(then, name) - getattr(now, name), 0)
            for name in ("base", "constants", "trainable", "optimizer", "host")
        }
        return Bytes(**parts, temporaries=int(then.temporaries * scale))


_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def _size(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if abs(size) >= GIB / 8 else f"{size / (1 << 20):,.1f} MiB"
