# SPDX-License-Identifier: Apache-2.0
"""Array annotations, and the legend of dimension names used across the package.

Dimension names:
    lead     leading layer and expert axes of a stacked kernel, zero or more
    rows     product of a kernel's output dimensions (torch's `out_features`)
    cols     product of a kernel's contraction dimensions (torch's `in_features`)
    packed   `cols` rounded up to whole blocks, divided by two: two 4-bit codes a byte
    blocks   blocks of `block_size` elements in one row
    groups   groups of `group_size` blocks that share a second-level constant
    rank     rank of a low-rank update
    batch, seq, d_model, vocab, n_heads, head_dim   as everywhere

Shapes are checked at run time in the tests only (jaxtyping's import hook with beartype); without
jaxtyping the annotations are inert, so the core needs nothing but jax and numpy.
"""

from typing import Any

import jax

try:
    from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Int, Key, PyTree, Shaped, UInt8
except ModuleNotFoundError:  # the core installs without jaxtyping

    class _Inert:
        def __class_getitem__(cls, item: Any) -> Any:
            return Any

    Array = jax.Array
    ArrayLike = Any
    Bool = Float = Float32 = Int = Key = Shaped = UInt8 = PyTree = _Inert  # type: ignore[misc,assignment]

__all__ = [
    "Array",
    "ArrayLike",
    "Bool",
    "Float",
    "Float32",
    "Int",
    "Key",
    "PyTree",
    "Shaped",
    "UInt8",
]
