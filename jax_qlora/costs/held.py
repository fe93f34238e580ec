# SPDX-License-Identifier: Apache-2.0
"""Bytes that are told, not estimated: of arrays between steps, and of a compiled program."""

from typing import Any

import jax

from ..quant import QuantizedArray
from ..tree import nbytes
from ..typing import PyTree
from .formula import Bytes


def held(trainable: PyTree, optimizer: PyTree, frozen: PyTree | None, *, paged: bool) -> Bytes:
    """The bytes that a run holds between steps, exactly; nothing temporary.

    Args:
        trainable: What trains, as arrays or shapes.
        optimizer: Moments.
        frozen: The base; its streamed kernels are in host memory.
        paged: Whether the moments are there too.
    """
    constants = streamed = 0
    for x in jax.tree.leaves(frozen, is_leaf=lambda x: isinstance(x, QuantizedArray)):
        if isinstance(x, QuantizedArray) and x.streamed:
            streamed += nbytes(x)
        elif isinstance(x, QuantizedArray):
            constants += nbytes((x.absmax, x.absmax_scale, x.absmax_offset))
    moments = nbytes(optimizer)
    return Bytes(
        base=nbytes(frozen) - constants - streamed,
        constants=constants,
        trainable=nbytes(trainable),
        optimizer=0 if paged else moments,
        host=streamed + (moments if paged else 0),
    )


def program_bytes(memory: Any) -> tuple[int, int]:
    """Bytes of a compiled program at the worst moment: on the device, and in host memory.

    Args:
        memory: From `memory_analysis()`.
    """

    def total(side: str) -> int:
        argument, output, alias, temp = (
            getattr(memory, f"{side}{name}_size_in_bytes")
            for name in ("argument", "output", "alias", "temp")
        )
        return argument + output - alias + temp

    return total(""), total("host_")
