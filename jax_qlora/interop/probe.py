# SPDX-License-Identifier: Apache-2.0
"""A written model against the one it was written from: their logits on a few tokens."""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ..models import Model
from ..typing import PyTree
from .hf_write import count
from .load import load_model

_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Logits of two models on the same random tokens.

    Attributes:
        difference: The largest difference of a logit.
        largest: The largest magnitude of a logit, to judge it by.
    """

    difference: float
    largest: float


def compare_logits(
    model: Model, params: PyTree, path: str | Path, *, quantization: str | None = None
) -> Probe:
    """Load a written model, in the same compute dtype, and compare its logits.

    Args:
        model: The model that was written.
        params: Its parameters, with the adapter attached if one was folded in.
        path: Where it was written.
        quantization: How to load it, as `load_model`; None for dense.

    Raises:
        InputError: It cannot be loaded.
    """
    written = load_model(path, quantization=quantization, compute_dtype=model.compute_dtype)
    length = min(_TOKENS, model.config.max_length)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, model.config.vocab_size, (1, length), np.int32))
    want = np.asarray(model.apply(params, tokens), np.float32)
    got = np.asarray(written.apply(written.params, tokens), np.float32)
    return Probe(difference=float(np.abs(got - want).max()), largest=float(np.abs(want).max()))


def probe_fits(model: Model, itemsize: int) -> bool:
    """Return whether the dense model fits in what memory the host has free, as far as it tells.

    Args:
        model: The model.
        itemsize: Bytes a parameter of the written one.
    """
    memory = Path("/proc/meminfo")
    if not memory.is_file():
        return True
    fields = dict(line.split(":", 1) for line in memory.read_text("ascii").splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return 1.25 * count(model.config) * itemsize < free
