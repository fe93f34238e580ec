# SPDX-License-Identifier: Apache-2.0
"""TPU chips that the planner knows. One chip is planned for, as one GPU is.

Sources: Google's system architecture pages for each generation (operations and bandwidth a chip);
the memory is what XLA's TPU compiler says is available when a program exceeds it.
"""

from dataclasses import dataclass

from .gpus import GIB


@dataclass(frozen=True, kw_only=True)
class Tpu:
    """One chip.

    Attributes:
        name: What jax calls it.
        topology: Smallest slice with that chip, as its compiler takes it.
        bandwidth: Bytes a second of its memory.
        memory: Bytes that a program can use.
        flops: Dense bfloat16 operations a second.
    """

    name: str
    topology: str
    bandwidth: float
    memory: int
    flops: float

    @property
    def half(self) -> bool:
        """Whether matmuls are in float16: a TPU has bfloat16."""
        return False


TPUS = {
    "v5e": Tpu(
        name="TPU v5 lite", topology="v5e:2x2x1", bandwidth=819e9, memory=int(15.75 * GIB),
        flops=197e12,
    ),
    "v5p": Tpu(
        name="TPU v5", topology="v5p:2x2x1", bandwidth=2765e9, memory=int(95.73 * GIB),
        flops=459e12,
    ),
    "v6e": Tpu(
        name="TPU v6 lite", topology="v6e:2x2x1", bandwidth=1638e9, memory=int(31.24 * GIB),
        flops=918e12,
    ),
}  # fmt: skip
"""The chips by the name that the command line takes."""
