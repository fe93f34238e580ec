# SPDX-License-Identifier: Apache-2.0
"""GPUs that the planner knows, as data: what XLA's compiler must know of a card that is not there.

Sources: the CUDA programming guide's table of technical specifications for each compute
capability, and the vendor's data sheets. `memory` is what a card offers to programs, a little less
than its name says; these figures are those that device queries report, to about 1 %.
"""

import re
from dataclasses import dataclass

from ..errors import InputError

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card.

    Attributes:
        name: What it is called.
        capability: Compute capability, (major, minor).
        cores: Streaming multiprocessors.
        lanes: float32 lanes of each.
        threads: Most threads of each.
        shared: Bytes of shared memory of each.
        l2: Bytes of the level 2 cache.
        clock: GHz.
        bandwidth: Bytes a second of its memory.
        memory: Bytes that a program can use.
        flops: Dense bfloat16 operations a second (float16 where it has no bfloat16).
    """

    name: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    threads: int
    shared: int
    l2: int
    clock: float
    bandwidth: float
    memory: int
    flops: float

    @property
    def half(self) -> bool:
        """Whether matmuls are in float16: the card has no bfloat16 units."""
        return self.capability < (8, 0)

    def describe(self) -> str:
        """XLA's own description of a target, in the text form of its protocol buffer."""
        major, minor = self.capability
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared}
  shared_memory_per_block_optin: {self.shared - (1024 if major >= 8 else 0)}
  threads_per_core_limit: {self.threads}
  core_count: {self.cores}
  fpus_per_core: {self.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(self.bandwidth)}
  l2_cache_size: {self.l2}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{self.name}"
"""


def _ampere(name: str, minor: int, **facts) -> Gpu:
    """A card of compute capability 8.6 or 8.9, whose multiprocessors are alike."""
    return Gpu(name=name, capability=(8, minor), lanes=128, threads=1536, shared=102_400, **facts)


def _server(name: str, capability: tuple[int, int], lanes: int, shared: int, **facts) -> Gpu:
    return Gpu(name=name, capability=capability, lanes=lanes, threads=2048, shared=shared, **facts)


GPUS = {
    "t4": Gpu(
        name="Tesla T4", capability=(7, 5), cores=40, lanes=64, threads=1024, shared=65_536,
        l2=4 << 20, clock=1.59, bandwidth=320e9, memory=15_843_721_216, flops=65e12,
    ),
    "rtx3090": _ampere(
        "NVIDIA GeForce RTX 3090", 6, cores=82, l2=6 << 20, clock=1.695, bandwidth=936e9,
        memory=25_438_126_080, flops=71e12,
    ),
    "rtx4090": _ampere(
        "NVIDIA GeForce RTX 4090", 9, cores=128, l2=72 << 20, clock=2.52, bandwidth=1008e9,
        memory=25_393_692_672, flops=165e12,
    ),
    "rtx5090": Gpu(
        name="NVIDIA GeForce RTX 5090", capability=(12, 0), cores=170, lanes=128, threads=1536,
        shared=102_400, l2=96 << 20, clock=2.407, bandwidth=1792e9, memory=33_670_000_000,
        flops=209e12,
    ),
    "l4": _ampere(
        "NVIDIA L4", 9, cores=58, l2=48 << 20, clock=2.04, bandwidth=300e9,
        memory=23_659_151_360, flops=121e12,
    ),
    "a10": _ampere(
        "NVIDIA A10", 6, cores=72, l2=6 << 20, clock=1.695, bandwidth=600e9,
        memory=23_600_000_000, flops=125e12,
    ),
    "a6000": _ampere(
        "NVIDIA RTX A6000", 6, cores=84, l2=6 << 20, clock=1.8, bandwidth=768e9,
        memory=51_041_271_808, flops=155e12,
    ),
    "l40s": _ampere(
        "NVIDIA L40S", 9, cores=142, l2=96 << 20, clock=2.52, bandwidth=864e9,
        memory=47_810_936_832, flops=362e12,
    ),
    "a100-40": _server(
        "NVIDIA A100-SXM4-40GB", (8, 0), 64, 167_936, cores=108, l2=40 << 20, clock=1.41,
        bandwidth=1555e9, memory=42_298_834_944, flops=312e12,
    ),
    "a100-80": _server(
        "NVIDIA A100-SXM4-80GB", (8, 0), 64, 167_936, cores=108, l2=40 << 20, clock=1.41,
        bandwidth=2039e9, memory=85_198_045_184, flops=312e12,
    ),
    "h100": _server(
        "NVIDIA H100 80GB HBM3", (9, 0), 128, 233_472, cores=132, l2=50 << 20, clock=1.98,
        bandwidth=3352e9, memory=85_052_096_512, flops=989e12,
    ),
    "h200": _server(
        "NVIDIA H200", (9, 0), 128, 233_472, cores=132, l2=50 << 20, clock=1.98,
        bandwidth=4800e9, memory=150_000_000_000, flops=989e12,
    ),
}  # fmt: skip
"""The cards by the name that the command line takes."""


def find_gpu(name: str) -> Gpu:
    """The card of that name; spelling aside, "RTX 4090" is "rtx4090".

    Raises:
        InputError: there is none (lists those there are).
    """
    for key, gpu in GPUS.items():
        if _plain(name) in (_plain(key), _plain(gpu.name)):
            return gpu
    raise InputError(
        f"GPU '{name}': expected one of {', '.join(GPUS)}, or a TPU: v5e, v5p, v6e. For another "
        "card of about the same generation give its memory with it: --gpu rtx4090 --memory 16GiB."
    )


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower()).removeprefix("nvidia").removesuffix("gb")


def parse_memory(text: str) -> int:
    """Bytes of "16GiB", "24 GB" or "15000MiB".

    Raises:
        InputError: the text says no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", text, re.I)
    units = {"": 1, "b": 1, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    units |= {"mib": 1 << 20, "gib": GIB, "tib": 1 << 40}
    size = units.get(found[2].lower()) if found else None
    if found is None or size is None or float(found[1]) * size < 1 << 28:
        raise InputError(
            f"memory '{text}': expected a size such as 16GiB or 24GB, at least 256 MiB."
        )
    return int(float(found[1]) * size)
