# SPDX-License-Identifier: Apache-2.0
"""XLA's TPU compiler on a machine without a TPU: the wheel `libtpu` is enough.

A chip that is not there has its memories, so placement needs nothing special. What it lacks is room
for a program that does not fit: the compiler then fails, and says how much was wanted.
"""

import importlib.metadata
import re
from typing import Any

from ..costs.gpus import GIB
from ..costs.tpus import Tpu

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Keeps libtpu from asking a cloud's metadata server which TPU it runs on; any type will do."""


def missing_wheel() -> str | None:
    """What keeps the compiler from running here, with what to do; None if nothing does."""
    wanted = next(
        requirement.partition(";")[0].strip()
        for requirement in importlib.metadata.requires("jax") or []
        if requirement.startswith("libtpu")
    )
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return f"XLA's TPU compiler is not installed: pip install '{wanted}'"
    if not found.startswith(wanted.partition("==")[2].rstrip("*")):
        return f"libtpu is {found}, jax wants '{wanted}': pip install '{wanted}'"
    return None


def describe_chip(tpu: Tpu) -> Any:
    """The chip as a device that can be compiled for, and nothing else."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=tpu.topology).devices[0]


def wanted_bytes(error: str) -> int | None:
    """Bytes that a program wanted for which the compiler had no room; None for another error.

    >>> wanted_bytes("RESOURCE_EXHAUSTED: ... temporaries (32.00G) exceeds available HBM (15.75G).")
    34359738368
    """
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", error)
    units = {"K": GIB >> 20, "M": GIB >> 10, "G": GIB, "T": GIB << 10}
    return int(float(found[1]) * units[found[2]]) if found else None
