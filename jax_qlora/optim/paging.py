# SPDX-License-Identifier: Apache-2.0
"""Paged optimizers: the moments live in the host's memory and visit the device for each step.

QLoRA (arXiv 2305.14314), section 3, pages optimizer state with CUDA's unified memory, which moves
it when the GPU runs out. Here the move is written down: the jitted step copies each moment to the
device, updates it, and copies it back, and the device holds none in between.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax
from jax.sharding import Sharding, SingleDeviceSharding

from ..quant.streaming import host_memory
from ..typing import PyTree


class Paging(NamedTuple):
    """Two functions that move an optimizer's state, inside or outside `jit`, and change no bit.

    Attributes:
        to_device: brings the moments to where they are computed with.
        to_host: puts them back to where they live.
    """

    to_device: Callable[[PyTree], PyTree]
    to_host: Callable[[PyTree], PyTree]


def make_paging(placement: Literal["device", "host"], *, device: Any = None) -> Paging:
    """Return how optimizer state moves: not at all, or between `pinned_host` memory and a device.

    Args:
        placement: where the moments live.
        device: a `jax.Device`; by default the first.

    Raises:
        InputError: the device has no host memory that compiled code can copy from.
    """
    if placement == "device":
        return Paging(to_device=lambda tree: tree, to_host=lambda tree: tree)
    device = jax.devices()[0] if device is None else device
    host = host_memory(
        'Optimizer state with placement "host"',
        instead='Use placement "device"; state "8bit" makes it four times smaller.',
        device=device,
    )
    return page_between(SingleDeviceSharding(device, memory_kind="device"), host)


def page_between(device: Sharding, host: Sharding) -> Paging:
    """Return how optimizer state moves between two places, for example of a device not present.

    Arrays with at least one axis move, one by one; scalars (counts) stay on the device.

    Args:
        device: where moments are computed with.
        host: where they live.
    """

    def move(to: Sharding) -> Callable[[PyTree], PyTree]:
        def put(x: Any) -> Any:
            return jax.device_put(x, to) if x.ndim else x

        return lambda tree: jax.tree.map(put, tree)

    return Paging(to_device=move(device), to_host=move(host))


def paged(
    optimizer: optax.GradientTransformation, paging: Paging | None = None
) -> optax.GradientTransformation:
    """Return `optimizer` whose state lives in host memory; its updates keep their bits.

    Jit the step that calls it with the state donated, and with `out_shardings` of the state it was
    given (`jax.tree.map(lambda x: x.sharding, state)`), so that memory is written in place.

    Args:
        optimizer: any transformation. This wrapper goes around all others.
        paging: how state moves; by default `make_paging("host")`.

    Raises:
        InputError: the device has no host memory that compiled code can copy from.
    """
    to_device, to_host = make_paging("host") if paging is None else paging

    def init(params: PyTree) -> PyTree:
        return to_host(optimizer.init(params))

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None):
        updates, state = optimizer.update(updates, to_device(state), params)
        return updates, to_host(state)

    return optax.GradientTransformation(init, update)
