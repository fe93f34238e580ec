# SPDX-License-Identifier: Apache-2.0
"""The least time that a step can take: arithmetic, memory traffic and the bus, each at its peak."""

import math

from ..config import Config
from ..models import DecoderConfig
from .formula import Bytes
from .gpus import GPUS, Gpu
from .tpus import TPUS, Tpu

PCIE = 25e9
"""Bytes a second between host and card: what PCIe 4.0 x16 reaches in practice, each way."""


def least_seconds(
    decoder: DecoderConfig, config: Config, gpu: Gpu | Tpu, planned: Bytes, *, seq: int
) -> dict[str, float]:
    """Seconds of one step at the peak of each resource; the largest is a bound from below.

    Args:
        decoder: The model's shape.
        config: Settings of the run.
        gpu: The card or chip.
        planned: Bytes of the run; those on the host cross the bus twice: there and back, or once
            forward and once backward.
        seq: Tokens of a row.

    Returns:
        Seconds by resource: "arithmetic", "memory", "bus". No kernel reaches any of these peaks.
    """
    q, kernels = decoder.n_heads * decoder.head_dim, _kernels(decoder)
    recompute = config.train.remat in ("full", "offload")
    passes = 2 + recompute + (config.method == "full")
    tokens = config.train.batch_size * config.train.accumulate * seq
    head = decoder.vocab_size * decoder.d_model
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


def model_flops(
    decoder: DecoderConfig, *, full: bool, tokens: int, answers: int, pairs: int
) -> float:
    """Operations that the result of a step takes, whatever is computed again to save memory.

    A multiplication and an addition for each weight and token, forward, once more for the gradient
    of activations, and once more for that of weights where these train. The adapter's own products
    are left out: with rank 16 they are one in a hundred of a 7B model. Divided by the time and the
    device's peak this is the model flops utilization of PaLM (Chowdhery et al. 2022, arXiv
    2204.02311, appendix B); a sliding window is not subtracted.

    Args:
        decoder: The model's shape.
        full: Whether every weight trains.
        tokens: Tokens that go through the layers, padding aside.
        answers: Those of them whose logits are computed.
        pairs: Pairs of tokens of which one sees the other.
    """
    passes = 3 if full else 2
    head = decoder.vocab_size * decoder.d_model
    # scores and weighted values, forward; the gradients of both factors of each in the backward
    attention = decoder.n_layers * (2 + 4) * 2 * decoder.n_heads * decoder.head_dim
    return 2.0 * passes * (_kernels(decoder) * tokens + head * answers) + attention * pairs


def _kernels(decoder: DecoderConfig) -> int:
    """Weights of the linears of the layers that a token goes through."""
    d, q = decoder.d_model, decoder.n_heads * decoder.head_dim
    kv = decoder.n_kv_heads * decoder.head_dim
    router, experts = d * decoder.n_experts, max(decoder.experts_per_token, 1)
    mlp = router + experts * (2 + decoder.gated) * d * decoder.d_ff
    return decoder.n_layers * (2 * d * q + 2 * d * kv + mlp)


def peak_flops(device_kind: str) -> float | None:
    """Dense 16-bit operations a second of a device by the name that jax gives it; None: unknown."""
    cards: list[Gpu | Tpu] = [*GPUS.values(), *TPUS.values()]
    return next((card.flops for card in cards if card.name == device_kind), None)
