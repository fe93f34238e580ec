# SPDX-License-Identifier: Apache-2.0
"""How many times less memory a run takes than full fine-tuning of the same model."""

import math

import jax

from ..models import DecoderConfig, abstract_params
from .formula import Bytes

MIXED_PRECISION = 2 + 2 + 4 + 4
"""Bytes a weight of full fine-tuning: 16-bit weights and gradients, Adam's two float32 moments.

QLoRA (arXiv 2305.14314, section 1) counts so: more than 780 GB for 65B. With weights and gradients
in float32, as `method = "full"` holds them here, it is 16."""


def full_bytes(decoder: DecoderConfig, *, a_weight: int = MIXED_PRECISION) -> int:
    """Bytes that full fine-tuning holds; activations are not counted, which favors it.

    Args:
        decoder: The model's shape.
        a_weight: Bytes of each weight, its gradient and its moments.
    """
    return a_weight * sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(decoder)))


def times_less(decoder: DecoderConfig, needed: Bytes, *, a_weight: int = MIXED_PRECISION) -> float:
    """Return bytes of full fine-tuning over those that a run needs on the device, all counted.

    Args:
        decoder: The model's shape.
        needed: From the compiler's plan, or from `estimate`.
        a_weight: Bytes of each weight in full fine-tuning, its gradient and its moments.
    """
    return full_bytes(decoder, a_weight=a_weight) / needed.device
