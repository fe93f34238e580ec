# SPDX-License-Identifier: Apache-2.0
"""Where training starts: pure transforms of weights and a fresh adapter.

`init_from_weights` moves a part of each weight into its update, so that training starts with what
matters most (PiSSA, OLoRA) or with what quantization lost (LoftQ). The base changes with it: what
it gives up is `scale * (b @ a)`, so base and update together are still the model.
"""

import functools
import re
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..errors import InputError
from ..quant import QuantizedArray, dequantize, quantize_array
from ..tree import flatten_paths, map_with_path
from ..typing import Array, Float, PyTree
from .adapter import Adapter, attach
from .array import is_special
from .dora import row_norms
from .pair import LoraPair

PLAIN_INITS = ("default", "gaussian")
_KNOWN = re.compile(r"pissa|pissa_niter_(\d+)|olora|loftq")
_OVERSAMPLING = 10  # directions beyond the rank in a randomized SVD
LOFTQ_STEPS = 5  # of the alternation; the paper's


def init_from_weights(
    params: PyTree,
    adapter: Mapping[str, LoraPair],
    init: str,
    *,
    format: str | None = None,
    block_size: int = 64,
    double_quant: bool = True,
) -> tuple[PyTree, Adapter]:
    """Moves a part of every adapted weight into its update: `W = base + scale * (b @ a)`.

    Args:
        params: Dense parameters.
        adapter: From `init_adapter`: gives ranks, scales and dropout; its values are replaced.
        init: "pissa": the largest singular components; "pissa_niter_N": the same by a randomized
            SVD with N iterations, far faster; "olora": the first columns of an orthogonal basis, by
            QR; "loftq": the part that quantization loses, by turns of quantization and SVD.
        format: Quantize what is left: "nf4", "fp4" or "int4". None leaves it dense; "loftq" needs
            a format.
        block_size: As in `quantize_array`.
        double_quant: As in `quantize_array`.

    Returns:
        The base, all other leaves untouched, and the adapter. Their sum is `params` up to rounding
        if the base is dense, and up to the quantization error of what is left otherwise.

    Raises:
        InputError: an unknown `init`, a weight that is quantized already, a rank above a weight's
            own, an update of parts of a kernel, or an adapter that does not fit.

    References:
        PiSSA: Meng et al. 2024, https://arxiv.org/abs/2404.02948, equations 2 to 4.
        OLoRA: Buyukakyuz 2024, https://arxiv.org/abs/2406.01775.
        LoftQ: Li et al. 2023, https://arxiv.org/abs/2310.08659, algorithm 1.
    """
    attach(params, adapter)  # says what does not fit
    check_whole(adapter, f"init {init!r}")
    pairs: Adapter = {}

    def one(path: str, leaf: Any) -> Any:
        if path not in adapter:
            return leaf
        leaf, pairs[path] = init_kernel(
            path,
            leaf,
            adapter[path],
            init,
            format=format,
            block_size=block_size,
            double_quant=double_quant,
        )
        return leaf

    base = map_with_path(one, params, is_leaf=is_special)
    return base, {path: pairs[path] for path in adapter}


def init_kernel(
    path: str,
    kernel: Any,
    pair: LoraPair,
    init: str,
    *,
    format: str | None = None,
    block_size: int = 64,
    double_quant: bool = True,
) -> tuple[Any, LoraPair]:
    """`init_from_weights` for one kernel, for those who load a model tensor by tensor.

    Args:
        path: Its path; seeds the randomized SVD.
        kernel: Dense `[*lead, *layout.shape]`; lead axes go one by one.
        pair: Its update.
        init: As in `init_from_weights`.
        format: As in `init_from_weights`.
        block_size: As in `quantize_array`.
        double_quant: As in `quantize_array`.

    Returns:
        What stays in the base, array or QuantizedArray, and the update.

    Raises:
        InputError: as `init_from_weights`.
    """
    found = check_init(init, quantized=format is not None)
    check_whole({path: pair}, f"init {init!r}")
    if isinstance(kernel, QuantizedArray):
        raise InputError(
            f"'{path}' is quantized already: init {init!r} expects dense weights to take from. "
            "Load the model with quantization=None, and let init_from_weights quantize."
        )
    layout, rank, scale = pair.layout, pair.rank, pair.scale
    if rank > min(layout.rows, layout.cols):
        raise InputError(
            f"rank {rank} for '{path}', a kernel of {layout.rows} x {layout.cols}: init {init!r} "
            f"expects a rank of at most {min(layout.rows, layout.cols)}. Lower it, or give this "
            "target its own in rank_pattern."
        )
    key = jax.random.key(zlib.crc32(path.encode()))

    def quantized(rows: Array) -> QuantizedArray:
        q = quantize_array(
            layout.from_rows(rows),
            in_axis=layout.in_axes,
            out_axis=layout.out_axes,
            format=format or "",
            block_size=block_size,
            double_quant=double_quant,
        )
        return replace(q, dtype_name=kernel.dtype.name)

    def decoded(q: QuantizedArray) -> Array:
        return layout.to_rows(dequantize(q))

    def one(kernel: Array) -> tuple[Any, Array, Array]:
        rows = layout.to_rows(kernel).astype(jnp.float32)
        if init == "loftq":
            q = quantized(rows)
            b, a = _svd(rows - decoded(q), rank)
            for _ in range(LOFTQ_STEPS - 1):
                q = quantized(rows - _product(b, a))
                b, a = _svd(rows - decoded(q), rank)
            root = abs(scale) ** 0.5
            return q, a / root, b / root
        if init == "olora":
            b, a = jnp.linalg.qr(rows)
            b, a = b[:, :rank], a[:rank]
        else:
            iterations = found[1]
            b, a = (
                _svd(rows, rank)
                if iterations is None
                else _fast_svd(key, rows, rank, int(iterations))
            )
            b, a = b / scale**0.5, a / scale**0.5
        rest = rows - scale * _product(b, a)
        if format is not None:
            return quantized(rest), a, b
        return layout.from_rows(rest).astype(kernel.dtype), a, b

    each: Any = one
    for _ in pair.lead:
        each = functools.partial(lax.map, each)
    leaf, a, b = jax.jit(each)(jnp.asarray(kernel))
    return leaf, replace(pair, a=a, b=b)


def check_init(init: str, *, quantized: bool) -> re.Match[str]:
    """Reads the name of an initialization from weights.

    Args:
        init: "pissa", "pissa_niter_N", "olora" or "loftq".
        quantized: Whether what stays in the base is quantized.

    Raises:
        InputError: an unknown name, or "loftq" without quantization.
    """
    found = _KNOWN.fullmatch(init)
    if found is None:
        raise InputError(
            f"init {init!r}: expected 'pissa', 'pissa_niter_N' with a number N such as 4, 'olora' "
            "or 'loftq'; 'default' and 'gaussian' leave the weights as they are."
        )
    if init == "loftq" and not quantized:
        raise InputError(
            "init 'loftq' makes up for what quantization loses: expected a quantized base, found a "
            "dense one. Choose a format such as 'nf4', or another init."
        )
    return found


def check_whole(adapter: Mapping[str, Any], what: str) -> None:
    """Check that no update is of some parts of a kernel alone.

    Args:
        adapter: Path -> LoraPair, and what trains beside.
        what: What takes whole kernels, for the message.

    Raises:
        InputError: One is.
    """
    for path, pair in adapter.items():
        if isinstance(pair, LoraPair) and pair.parts:
            raise InputError(
                f"{what} with parts of '{path}' as targets: expected whole kernels. Leave the "
                "brackets in the targets out, or choose plain LoRA and another start."
            )


def _product(b: Array, a: Array) -> Array:
    return jnp.matmul(b, a, precision=lax.Precision.HIGHEST)


def _svd(rows: Array, rank: int) -> tuple[Float[Array, "rows rank"], Float[Array, "rank cols"]]:
    """The best approximation of a rank, as two factors of equal norm."""
    u, s, vt = jnp.linalg.svd(rows, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root[None], root[:, None] * vt[:rank]


def _fast_svd(key: Any, rows: Array, rank: int, iterations: int) -> tuple[Array, Array]:
    """The same by subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4)."""
    width = min(rank + _OVERSAMPLING, *rows.shape)
    start = jax.random.normal(key, (rows.shape[1], width), jnp.float32)
    basis = jnp.linalg.qr(_product(rows, start))[0]
    for _ in range(iterations):
        other = jnp.linalg.qr(_product(rows.T, basis))[0]
        basis = jnp.linalg.qr(_product(rows, other))[0]
    b, a = _svd(_product(basis.T, rows), rank)
    return _product(basis, b), a


def relative_to_start(adapter: Mapping[str, Any], start: Mapping[str, Any]) -> Adapter:
    """The adapter of the *original* weights that one of `init_from_weights`'s base amounts to.

    `base + s b a = W + s (b a - b0 a0)`: an update of twice the rank. The first half of its
    factors are the adapter's own. Magnitudes stay as they are, and so does what trains beside.

    Args:
        adapter: Trained.
        start: The adapter that `init_from_weights` returned.
    """
    return {
        path: replace(
            pair,
            a=jnp.concatenate([pair.a, start[path].a], axis=-2),
            b=jnp.concatenate([pair.b, -start[path].b], axis=-1),
        )
        if isinstance(pair, LoraPair)
        else pair
        for path, pair in adapter.items()
    }


def add_magnitudes(base: PyTree, adapter: Mapping[str, LoraPair]) -> Adapter:
    """The adapter as a DoRA adapter of the same model: magnitudes that change nothing yet.

    Args:
        base: Frozen parameters, quantized or not.
        adapter: From `init_adapter` or `init_from_weights`.

    Returns:
        The adapter with `magnitude = ||W + s b a||` of every output row, float32 `[*lead, rows]`.

    Raises:
        InputError: the adapter does not fit the base, or updates parts of a kernel.

    References:
        DoRA: Liu et al. 2024, https://arxiv.org/abs/2402.09353, section 4.1.
    """
    check_whole(adapter, "DoRA")
    leaves = flatten_paths(attach(base, adapter), is_leaf=is_special)
    norms = jax.jit(row_norms)
    return {
        path: replace(pair, magnitude=norms(leaves[path].base, pair))
        if isinstance(pair, LoraPair)
        else pair
        for path, pair in adapter.items()
    }
