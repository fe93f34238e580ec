# SPDX-License-Identifier: Apache-2.0
"""Streamed weights: packed kernels stay in host memory, and each layer is fetched when it is used.

A scan over stacked layers slices the kernels in host memory and copies one layer's to the device,
forward and again backward; the device never holds more of the base than that. What crosses the bus
is 4 bits a parameter.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from .._compat import compiles_transfers
from ..errors import InputError
from .array import QuantizedArray, fetched


def host_memory(
    what: str, *, instead: str, device: Any = None, between_calls: bool = True
) -> SingleDeviceSharding:
    """Where arrays wait in the page-locked host memory of a device, for compiled code to fetch.

    Args:
        what: what is to wait there, for the message.
        instead: what to do where there is no such memory.
        device: a `jax.Device`; by default the first.
        between_calls: whether they are still there when a compiled function returns. What waits
            only while it runs is its own affair, on jax 0.10's CPU too.

    Raises:
        InputError: the device has no host memory that compiled code can copy from and to.
    """
    device = jax.devices()[0] if device is None else device
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if {"device", "pinned_host"} <= set(kinds):
        host = SingleDeviceSharding(device, memory_kind="pinned_host")
        there = SingleDeviceSharding(device, memory_kind="device")
        if not between_calls or compiles_transfers(there, host):
            return host
    raise InputError(
        f"{what} on {device.platform} ({device.device_kind}): expected memory of the kinds "
        "'device' and 'pinned_host' with copies between them in compiled code, found the kinds "
        f"{', '.join(kinds)} and jax {jax.__version__}. GPUs and TPUs have that, CPUs from jax "
        f"0.12 on. {instead}"
    )


def streaming_memory(device: Any = None) -> SingleDeviceSharding:
    """Where streamed kernels are kept.

    Args:
        device: a `jax.Device`; by default the first.

    Raises:
        InputError: the device has no host memory.
    """
    return host_memory(
        "Streamed weights",
        instead="Keep the weights on the device (quant.streamed = false).",
        device=device,
    )


def fetch(tree: Any) -> Any:
    """The same tree with every streamed kernel, or slice of one, brought to the device.

    Args:
        tree: Parameters, e.g. one layer's, with adapters or without; in compiled code.
    """

    def one(x: Any) -> Any:
        return fetched(x) if isinstance(x, QuantizedArray) else x

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, QuantizedArray))


def offload_memory(device: Any = None) -> SingleDeviceSharding:
    """Where the inputs of layers wait for the backward with `remat = "offload"`.

    Args:
        device: a `jax.Device`; by default the first.

    Raises:
        InputError: the device has no host memory.
    """
    return host_memory(
        'Inputs of layers with remat "offload"',
        instead='Use remat "full", which keeps them on the device.',
        device=device,
        between_calls=False,
    )


def check_host_memory(*, streamed: bool, remat: str) -> None:
    """Check before any work that weights can be streamed and layer inputs offloaded, if they are.

    Args:
        streamed: whether weights are.
        remat: what the backward recomputes; only "offload" needs host memory.

    Raises:
        InputError: the first device has no host memory for them.
    """
    if streamed:
        streaming_memory()
    if remat == "offload":
        offload_memory()


def stream(tree: Any, *, device: Any = None) -> Any:
    """The same tree with every stacked 4-bit kernel in host memory, fetched layer by layer in use.

    Results keep their bits. Worth it where the base does not fit the device: a step then moves all
    codes over the bus once forward and once backward.

    Args:
        tree: Parameters, e.g. what `quantize` gives. Kernels without a stacked axis stay.
        device: Whose host memory; by default the first device's.

    Raises:
        InputError: the device has no host memory.
    """
    host = streaming_memory(device)

    def one(x: Any) -> Any:
        if not isinstance(x, QuantizedArray) or not x.lead:
            return x
        return dataclasses.replace(jax.device_put(x, host), streamed=True)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, QuantizedArray))
