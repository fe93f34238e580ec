# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of GPT-2 as those of the other families: full names, linears `[out, in]`, no buffers.

Its linears are `Conv1D` in transformers, which holds the transpose of what a `Linear` holds; in
bitsandbytes' 4 bits they are as any other. The first checkpoints were saved from the model without
its head, so their names lack "transformer.".
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..models import DecoderConfig
from .bnb import bnb_parts
from .hf import is_conv1d, parameter_shapes, tensor_names
from .safetensors import StoredTensor

_PREFIX = "transformer."
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, and the score of what it hides


def gpt2_tensors(tensors: Mapping[str, StoredTensor], config: DecoderConfig) -> Mapping[str, Any]:
    """Return the tensors of a checkpoint, those of GPT-2 by their full names and transposed.

    Args:
        tensors: What the checkpoint holds.
        config: The model's shape; other families' tensors are returned as they are.
    """
    if config.family != "gpt2":
        return tensors
    prefix = "" if any(name.startswith(_PREFIX) for name in tensors) else _PREFIX
    linears = {
        name
        for path in parameter_shapes(config)
        if is_conv1d(path, config)
        for name in tensor_names(path, config)
    }
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.endswith(_BUFFERS):
            continue
        name = name if name.startswith("lm_head.") else prefix + name
        dense = len(tensor.shape) == 2 and not bnb_parts(tensors, tensor.name)
        found[name] = Transposed(tensor) if dense and name in linears else tensor
    return found


class Transposed:
    """The transpose of a stored matrix, which is read once for runs of rows that reach its end.

    Attributes:
        tensor: The matrix `[in, out]`.
    """

    def __init__(self, tensor: StoredTensor):
        self.tensor = tensor
        self._held: np.ndarray | None = None

    @property
    def name(self) -> str:
        """Its name in the file."""
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out, in)`."""
        return self.tensor.shape[::-1]

    @property
    def dtype(self) -> np.dtype:
        """Its dtype."""
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.tensor.nbytes

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read it, or some rows of it."""
        whole = self.tensor.read() if self._held is None else self._held
        stop = self.shape[0] if stop is None else stop
        self._held = whole if stop < self.shape[0] else None
        return np.ascontiguousarray(whole[:, start:stop].T)
