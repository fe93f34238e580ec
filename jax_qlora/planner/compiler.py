# SPDX-License-Identifier: Apache-2.0
"""XLA's CUDA compiler on a machine without a GPU: compile a program, read what memory it plans.

Needs three wheels and no CUDA installation: `jax-cuda13-pjrt` (the compiler), `nvidia-cuda-nvcc`
(ptxas) and `nvidia-nvvm` (libdevice), and a process whose only jax platform is the CPU.
"""

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import SingleDeviceSharding

from ..costs.gpus import Gpu
from ..costs.held import program_bytes
from ..errors import InputError

PLUGIN = "jax-cuda13-pjrt"


AHEAD_OF_TIME = {"xla_gpu_autotune_level": 0}
"""What the compiler is told where nothing can be timed, on a card that is not there."""


class Planned(NamedTuple):
    """Bytes that a compiled program needs at the worst moment, on the device and on the host."""

    device: int
    host: int


def missing_wheels() -> str | None:
    """What keeps the compiler from running here, with what to do; None if nothing does.

    Looked for first: without ptxas or libdevice XLA fails with errors that name other things.
    """
    try:
        found, wanted = (importlib.metadata.version(name) for name in (PLUGIN, "jaxlib"))
    except importlib.metadata.PackageNotFoundError:
        wanted = importlib.metadata.version("jaxlib")
        return (
            f"XLA's CUDA compiler is not installed: pip install {PLUGIN}=={wanted} "
            "nvidia-cuda-nvcc nvidia-nvvm"
        )
    if found != wanted:
        return (
            f"{PLUGIN} is {found}, jaxlib {wanted}: they must be of one version. "
            f"pip install {PLUGIN}=={wanted}"
        )
    cuda = _cuda_directory()
    if not (shutil.which("ptxas") or (cuda and (cuda / "bin" / "ptxas").exists())):
        return "ptxas, CUDA's assembler, is not installed: pip install nvidia-cuda-nvcc"
    if not (cuda and (cuda / "nvvm" / "libdevice" / "libdevice.10.bc").exists()):
        if not Path("/usr/local/cuda/nvvm/libdevice/libdevice.10.bc").exists():
            return "libdevice, CUDA's math library, is not installed: pip install nvidia-nvvm"
    return None


def _cuda_directory() -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or [] if spec else []:
        if (Path(place) / "cu13").is_dir():
            return Path(place) / "cu13"
    return None


def describe_device(gpu: Gpu) -> Any:
    """The card as a device that can be compiled for, and nothing else.

    Raises:
        InputError: the compiler cannot run here, or jax has been started with other platforms.
    """
    if why := missing_wheels():
        raise InputError(why)
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        raise InputError(
            "the planner's process: expected JAX_PLATFORMS=cpu before jax is imported, found "
            f"{os.environ.get('JAX_PLATFORMS')!r}. Call jax_qlora.fit, which starts one."
        )
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=gpu.describe(), topology="1x1x1"
    )
    return topology.devices[0]


class Placed(SingleDeviceSharding):
    """A sharding that keeps its memory kind on a device that can only be compiled for.

    Such a device has no memories, so jax drops the kind silently, and with it the placement. The
    lowered program carries kinds; while it is compiled they are hidden, since XLA answers without.
    """

    hidden = False

    def __init__(self, device: Any, kind: str):
        super().__init__(device)
        self._kind = kind

    @property
    def memory_kind(self) -> str | None:  # type: ignore[override]
        """The kind of memory."""
        return None if Placed.hidden else self._kind

    def with_memory_kind(self, kind: str) -> "Placed":
        """The same device, another memory."""
        return Placed(next(iter(self.device_set)), kind)

    def __hash__(self) -> int:
        return hash((SingleDeviceSharding.__hash__(self), self._kind))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Placed)
            and other._kind == self._kind
            and SingleDeviceSharding.__eq__(self, other)
        )


def compile_lowered(lowered: Any, options: dict[str, Any]) -> Any:
    """Compiles a lowered program for the card that its arguments were placed on.

    Args:
        lowered: From `jax.jit(f).lower(...)`, arguments placed on `Placed`.
        options: What the compiler is told.
    """
    Placed.hidden = True
    try:
        return lowered.compile(compiler_options=options)
    finally:
        Placed.hidden = False


def planned(compiled: Any) -> Planned:
    """The memory that a compiled program needs."""
    device, host = program_bytes(compiled.memory_analysis())
    return Planned(device=device, host=host)
