# SPDX-License-Identifier: Apache-2.0
"""The least time that a step can take: arithmetic, memory traffic and the bus, each at its peak."""

import math

from ..config import Config
from ..models import DecoderConfig
from .formula import Bytes
from .gpus import Gpu

PCIE = 25e9
"""Bytes a second between host and card: what PCIe 4.0 x16 reaches in practice, each way."""


def least_seconds(
    decoder: DecoderConfig, config: Config, gpu: Gpu, planned: Bytes, *, seq: int
) -> dict[str, float]:
    """Seconds of one step at the peak of each resource; the largest is a bound from below.

    Args:
        decoder: The model's shape.
        config: Settings of the run.
        gpu: The card.
        planned: Bytes of the run; those on the host cross the bus twice: there and back, or once
            forward and once backward.
        seq: Tokens of a row.

    Returns:
        Seconds by resource: "arithmetic", "memory", "bus". No kernel reaches any of these peaks.
    """
    d, q = decoder.d_model, decoder.n_heads * decoder.head_dim
    kv = decoder.n_kv_heads * decoder.head_dim
    kernels = decoder.n_layers * (2 * d * q + 2 * d * kv + 3 * d * decoder.d_ff)
    recompute = config.train.remat in ("full", "offload")
    passes = 2 + recompute + (config.method == "full")
    tokens = config.train.batch_size * config.train.accumulate * seq
    head = decoder.vocab_size * d
    # causal scores and values: 2 products forward, 2 again in the backward, 4 of gradients
    attention = decoder.n_layers * 2 * q * seq * (2 + 2 + 4 + 2 * recompute) / 2
    flops = tokens * (2 * passes * kernels + 4 * head + attention)
    stored = 0.53 if config.method == "qlora" else 2.0
    decoded = 4.0 if config.method == "qlora" else 0.0  # written and read again in 16 bits
    rows = max(config.train.layer_chunk // config.train.batch_size, 256)
    chunks = math.ceil(seq / rows) if recompute else 1  # kernels are decoded for each
    parts = config.train.accumulate * passes * chunks
    traffic = parts * kernels * (stored + decoded) + 3 * (planned.trainable + planned.optimizer)
    return {
        "arithmetic": flops / gpu.flops,
        "memory": traffic / gpu.bandwidth,
        "bus": 2 * planned.host / PCIE,
    }
