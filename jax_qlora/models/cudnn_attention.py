# SPDX-License-Identifier: Apache-2.0
"""cuDNN's fused attention, through jax's public call; for NVIDIA GPUs, and only on request.

What has been tested is the call: its numbers where XLA computes the same call, and that a program
for a GPU holds cuDNN's kernels. It has not been run on a GPU. So before a run `check_device` has
the device compute a small attention by it, and compares that with attention in blocks.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ..errors import InputError
from ..typing import Array, Bool, Float, Int
from .blockwise_attention import blockwise_attention
from .config import DecoderConfig
from .per_layer import ALL

AttentionKind = Literal["blocks", "cudnn"]
"""How a layer attends: `blockwise_attention`, or `cudnn_attention`."""

KERNEL = "dot_product_attention_fwd_wrapper"
"""jax's name of the kernel, for the rematerialization policy that saves its outputs."""

_WANTED = 'train.attention = "cudnn"'
_INSTEAD = 'Leave train.attention out, or set it to "blocks".'
_TOLERANCE = 0.05
"""Relative error, in norm, that two attentions of half-precision operands may differ by."""


def cudnn_attention(
    scale: float,
    q: Float[Array, "batch seq n_heads head_dim"],
    k: Float[Array, "batch n_kv_heads seq head_dim"],
    v: Float[Array, "batch n_kv_heads seq head_dim"],
    valid: Bool[Array, "batch seq"],
    *,
    window: Int[Array, ""] | None = None,
    windows: Sequence[int | None] = (None,),
) -> Float[Array, "batch seq n_heads head_dim"]:
    """Attend causally, as `blockwise_attention` does, in one kernel of cuDNN's.

    Rows are padded on the right, if at all: then a token has no padding before it, and causality
    alone hides the padding from it. A row that is padded elsewhere gets NaN, not something else.
    What padding itself attends to differs from `blockwise_attention`, and no token reads it.

    Args:
        scale: Factor of the scores.
        q: Queries, bfloat16 or float16, like the keys and values.
        k: Keys, heads before positions.
        v: Values, likewise.
        valid: Which tokens are not padding.
        window: How many tokens back a query sees, itself included: one of `windows`, where None
            stands for `per_layer.ALL`. None: the only one of `windows`.
        windows: The windows that there are in the model.

    Returns:
        The attended values, in the dtype of `q`.

    Raises:
        RuntimeError: There is no cuDNN, or it refuses; see `check_device`.

    References:
        `jax.nn.dot_product_attention`, implementation "cudnn"; cuDNN's documentation of "Fused
        Flash Attention". Its windows count like ours: `(i - window, i]`.
    """
    seq = q.shape[1]
    attend = partial(
        jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation="cudnn"
    )
    # a kernel is compiled for one window, so a layer chooses among those that differ here
    sizes = {ALL if w is None or w >= seq else w: None for w in windows}

    def within(size: int) -> Callable[..., Array]:
        return attend if size == ALL else partial(attend, local_window_size=(size - 1, 0))

    arrays = (q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
    if len(sizes) == 1:
        out = within(*sizes)(*arrays)
    else:
        assert window is not None
        which = jnp.argmax(jnp.asarray([*sizes]) == jnp.where(window < seq, window, ALL))
        out = lax.switch(which, [within(size) for size in sizes], *arrays)
    tokens = jnp.sum(valid, axis=1, keepdims=True)
    on_the_right = jnp.all(valid == (jnp.arange(seq)[None] < tokens), axis=1)
    return jnp.where(on_the_right[:, None, None, None], out, jnp.nan)


def check_model(config: DecoderConfig, dtype: DTypeLike) -> None:
    """Check that cuDNN can do the attention of a model.

    Args:
        config: The model's shape.
        dtype: The compute dtype.

    Raises:
        InputError: It cannot.
    """
    if config.attention_softcap is not None:
        raise InputError(
            f"{_WANTED}: expected a model with unbounded attention scores, found "
            f"attention_softcap = {config.attention_softcap:g}, which cuDNN's attention has not. "
            f"{_INSTEAD}"
        )
    if jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        raise InputError(
            f"{_WANTED}: expected train.compute_dtype bfloat16 or float16, found "
            f"{jnp.dtype(dtype).name}. Set train.compute_dtype, or: {_INSTEAD}"
        )
    if config.head_dim % 8 or config.head_dim > 256:
        raise InputError(
            f"{_WANTED}: expected heads of a multiple of 8 and at most 256 elements, found "
            f"head_dim = {config.head_dim}. {_INSTEAD}"
        )


def check_device(config: DecoderConfig, dtype: DTypeLike) -> None:
    """Check that the default device does a model's attention by cuDNN, and does it right.

    A small attention with the model's heads and windows, and its gradients, are computed there both
    ways. Seconds; once for a model.

    Args:
        config: The model's shape.
        dtype: The compute dtype.

    Raises:
        InputError: The device is no NVIDIA GPU, cuDNN is absent, too old or refuses (heads of more
            than 128 elements need compute capability 9.0), or its numbers are others.
    """
    check_model(config, dtype)
    device = jax.devices()[0]
    where = f"{_WANTED} on {device.platform} ({device.device_kind})"
    if device.platform != "gpu":
        raise InputError(f"{where}: expected an NVIDIA GPU with cuDNN. {_INSTEAD}")
    heads = (config.n_heads, config.n_kv_heads, config.head_dim)
    try:
        error = _disagreement(*heads, tuple(dict.fromkeys(config.windows)), jnp.dtype(dtype).name)
    except (RuntimeError, ValueError) as refusal:  # NotImplementedError and XLA's are RuntimeErrors
        why = str(refusal).splitlines() or [type(refusal).__name__]
        raise InputError(
            f"{where}: expected a cuDNN that can do this model's attention, found: {why[0]} "
            f"{_INSTEAD}"
        ) from refusal
    if not error < _TOLERANCE:  # or NaN
        raise InputError(
            f"{where}: expected the numbers of attention in blocks to {_TOLERANCE:g}, found a "
            f"relative error of {error:.2g}. {_INSTEAD}"
        )


@cache
def _disagreement(
    n_heads: int, n_kv_heads: int, head_dim: int, windows: tuple[int | None, ...], dtype: str
) -> float:
    """The largest relative error, in norm, of cuDNN's attention and gradients against blocks'."""
    seq, scale = 256, head_dim**-0.5
    shapes = [(1, seq, n_heads, head_dim)] + 2 * [(1, n_kv_heads, seq, head_dim)]
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, [*shapes, shapes[0]], strict=True)
    )
    valid = jnp.ones((1, seq), jnp.bool_)

    @partial(jax.jit, static_argnums=0)
    def gap(window: int | None, q: Array, k: Array, v: Array, dout: Array) -> Array:
        def both(attend: Callable[..., Array], **limits: Any) -> tuple:
            out, pull = jax.vjp(partial(attend, scale, valid=valid, **limits), q, k, v)
            return (out, *pull(dout))

        got = both(cudnn_attention, windows=(window,))
        want = both(blockwise_attention, window=window)
        errors = []
        for x, y in zip(got, want, strict=True):
            x, y = x.astype(jnp.float32).ravel(), y.astype(jnp.float32).ravel()
            errors.append(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))
        return jnp.max(jnp.stack(errors))

    small = {None if w is None else min(w, seq // 2) for w in windows}
    return float(jnp.max(jnp.stack([gap(window, q, k, v, dout) for window in small])))  # or NaN
