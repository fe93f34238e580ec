# SPDX-License-Identifier: Apache-2.0
"""All layers of a decoder, with a backward written by hand that keeps little memory.

Autodiff of a scan over layers keeps, whatever the remat policy, several copies of the residual
stream of a layer. Here the forward keeps the input of each layer and nothing else, on the device or
in host memory, and the backward goes through one layer at a time: it computes the layer's keys and
values again, then, a chunk of tokens at a time, everything else, and the cotangent of a chunk
overwrites the one that it came from. Autodiff sees no more than one chunk. What grows with the
sequence is those inputs, the residual stream, its cotangent, and one layer's keys and values.

The layer is given as functions of its parameters, which may be any pytree: lifted functions take
quantized and adapted kernels.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..errors import InputError
from ..typing import Array, Float, PyTree
from . import attention_blocks as blockwise
from .per_layer import PerLayer
from .rope import Angles
from .trained import Trained, add, cast_like, find_trained, instantiate, values_of, zeros_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFunctions:
    """One layer as pure functions; the first argument of each is the layer's parameters.

    Attributes:
        keys_values: `(params, x, angles, virtual) -> (k, v)`, each
            `[batch, n_kv_heads, seq, head_dim]`.
        queries: `(params, x, angles) -> q`, `[batch, seq, n_heads, head_dim]`.
        finish: `(params, x, attended) -> y`, the layer's output.
        queries_keys_values: All three at once, from what `keys_values` takes: a fused projection is
            one matmul then.
        attend: `(q, k, v, valid, segment_ids, *, window) -> attended`, of whole rows, without
            parameters. Of chunks attention is in blocks.
        whole_rows: Whether chunks are not attention's affair, so that rows must be one chunk.
        scale: Factor of the attention scores.
        softcap: Bound of the scores, or None.
    """

    keys_values: Callable[..., tuple[Array, Array]]
    queries: Callable[..., Array]
    queries_keys_values: Callable[..., tuple[Array, Array, Array]]
    finish: Callable[..., Array]
    attend: Callable[..., Array]
    whole_rows: bool
    scale: float
    softcap: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """How layers are run; static.

    Attributes:
        layer: One layer.
        chunk: Tokens that go through a layer at once, at most, rows of the batch together; but 256
            of each row at least.
        offload: Whether the inputs of layers wait in host memory.
        fetch: Brings one layer's parameters from host memory to the device, or None where they are
            there.
    """

    layer: LayerFunctions
    chunk: int
    offload: bool = False
    fetch: Callable[[PyTree], PyTree] | None = None


class Context(NamedTuple):
    """What all layers share of the tokens; axes 0 and 1 are batch and sequence.

    Attributes:
        angles: Cosines and sines of the rotations.
        local_angles: Those of local layers, if they are others.
        valid: Bool: which tokens are not padding.
        segment_ids: int: the document of each token, or None.
        virtual: int: the number of the virtual token at each place, -1 at a token's, or None.
    """

    angles: Angles
    local_angles: Angles | None
    valid: Array
    segment_ids: Array | None
    virtual: Array | None = None


class _LayerContext(NamedTuple):
    """What one layer takes of it: rotations that are its own, and its window, if it has one."""

    tokens: Context
    window: Array | None


Params = Callable[[Array], PyTree]
"""The parameters of a layer, for the chunk of a number."""

Rows = Callable[[Array], Array]
"""The inputs of a layer, `[batch, chunk, d]`, of the chunk of a number."""


def run_layers(
    loop: Loop,
    layers: PyTree,
    x: Float[Array, "batch seq d"],
    context: Context,
    data: PerLayer,
) -> Float[Array, "batch seq d"]:
    """Return the residual stream after all layers.

    Args:
        loop: What a layer is, and how it is run.
        layers: Parameters, every leaf with a leading layer axis.
        x: The residual stream before the first layer.
        context: Positions, padding and documents.
        data: What differs between layers beside their parameters.

    Returns:
        The residual stream after the last layer; reverse-mode differentiable in `x` and in those
        floating-point leaves of `layers` that are being differentiated, once.

    Raises:
        InputError: Rows that must be whole are longer than a chunk.
    """
    batch, seq, _ = x.shape
    if loop.layer.whole_rows:
        check_whole_rows(batch, seq, loop.chunk)
    size = _chunk_size(seq, max(loop.chunk // batch, 1))
    padding = -seq % size
    if padding:
        x, context = jax.tree.map(
            lambda a: jnp.pad(a, [(0, 0), (0, padding)] + [(0, 0)] * (a.ndim - 2)), (x, context)
        )
    y: Any = _run(loop, size, layers, x, context, data)
    return y[:, :seq]


def check_whole_rows(batch: int, seq: int, chunk: int) -> None:
    """Check that rows go through a layer whole, as cuDNN's attention needs.

    Args:
        batch: Rows.
        seq: Tokens of each.
        chunk: `Loop.chunk`.

    Raises:
        InputError: They do not.
    """
    if _chunk_size(seq, max(chunk // batch, 1)) < seq:
        raise InputError(
            f'train.attention = "cudnn" with train.remat "full" or "offload": expected '
            f"train.layer_chunk to hold {batch} x {seq} tokens, since that attention takes rows "
            f"whole, found {chunk}. Set train.layer_chunk = {batch * seq}, or train.attention = "
            '"blocks".'
        )


def _chunk_size(seq: int, most: int) -> int:
    """Tokens of a row in a chunk: all, or the least multiple of 256 that makes no more chunks."""
    most = max(most, 256)
    if seq <= most:
        return seq
    chunks = -(-seq // most)
    return -(-seq // (256 * chunks)) * 256


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(
    loop: Loop, size: int, layers: PyTree, x: Array, context: Context, data: PerLayer
) -> Array:
    return _forward(loop, size, layers, x, context, data, keep=False)[0]


def _run_fwd(
    loop: Loop, size: int, layers: PyTree, x: Any, context: Context, data: PerLayer
) -> tuple[Array, tuple]:
    trained = find_trained(layers)
    layers, x, context, data = map(values_of, (layers, x, context, data))
    y, inputs = _forward(loop, size, layers, x, context, data, keep=True)
    return y, (layers, inputs, context, data, trained)


def _forward(
    loop: Loop,
    size: int,
    layers: PyTree,
    x: Array,
    context: Context,
    data: PerLayer,
    *,
    keep: bool,
) -> tuple[Array, Array | None]:
    """The last residual stream and, with `keep`, the inputs of all layers."""

    def body(x: Array, index: Array) -> tuple[Array, Array | None]:
        params = _params(loop, layers, index)
        kept = None
        if keep:
            kept = jax.device_put(x, jax.memory.Space.Host) if loop.offload else x
        here = _of_layer(context, data, index)
        if size == x.shape[1]:
            return _layer(loop.layer, params(jnp.int32(0)), x, here), kept
        return _layer_in_chunks(loop.layer, size, params, x, here), kept

    return lax.scan(body, x, _indices(layers))


def _run_bwd(loop: Loop, size: int, residuals: tuple, dy: Any) -> tuple:
    layers, inputs, context, data, trained = residuals

    def body(dy: Array, index: Array) -> tuple[Array, list[Array]]:
        params = _params(loop, layers, index)
        if loop.offload:
            x = lax.dynamic_index_in_dim(inputs, index, keepdims=False)
            x = jax.device_put(x, jax.memory.Space.Device)
            rows = partial(_part, x, size)
        else:  # never whole
            rows = partial(_part_of_layer, inputs, size, index)
        backward = _layer_backward if size == dy.shape[1] else _layer_in_chunks_backward
        here = _of_layer(context, data, index)
        return backward(loop.layer, size, params, trained, rows, here, dy)

    dx, grads = lax.scan(body, instantiate(dy), _indices(layers), reverse=True)
    return trained.cotangents(grads, layers), dx, None, None


_run.defvjp(_run_fwd, _run_bwd, symbolic_zeros=True)


def _indices(layers: PyTree) -> Array:
    return jnp.arange(jax.tree.leaves(layers)[0].shape[0], dtype=jnp.int32)


def _of_layer(context: Context, data: PerLayer, index: Array) -> _LayerContext:
    one = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), data)
    angles = one.angles(context.angles, context.local_angles)
    return _LayerContext(context._replace(angles=angles, local_angles=None), one.window)


def _params(loop: Loop, layers: PyTree, index: Array) -> Params:
    """A layer's parameters as a function of the chunk that they are for.

    Those on the device are sliced from the stack for each chunk anew, by what reads them: sliced
    once, before the loop over chunks, they would be copied. What is on the host is fetched once.
    Random keys, which are for dropout, are the chunk's own.
    """

    def at(index: Array) -> PyTree:
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), layers)

    fetched = None if loop.fetch is None else loop.fetch(at(index))

    def params(chunk: Array) -> PyTree:
        here, _ = lax.optimization_barrier((index, chunk))
        return jax.tree.map(partial(_fold_in, chunk), at(here) if fetched is None else fetched)

    return params


def _fold_in(chunk: Array, a: Array) -> Array:
    if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        return a
    fold_in = jax.random.fold_in
    for _ in a.shape:  # a key for each expert
        fold_in = jax.vmap(fold_in, (0, None))
    return fold_in(a, chunk)


def _layer(layer: LayerFunctions, params: PyTree, x: Array, context: _LayerContext) -> Array:
    tokens = context.tokens
    q, k, v = layer.queries_keys_values(params, x, tokens.angles, tokens.virtual)
    out = layer.attend(q, k, v, tokens.valid, tokens.segment_ids, window=context.window)
    return layer.finish(params, x, out)


def _layer_backward(
    layer: LayerFunctions,
    size: int,
    params: Params,
    trained: Trained,
    rows: Rows,
    context: _LayerContext,
    dy: Array,
) -> tuple[Array, list[Array]]:
    leaves, put_back = trained.split(params(jnp.int32(0)))

    def run(leaves: list[Array], x: Array) -> Array:
        return _layer(layer, put_back(leaves), x, context)

    _, vjp = jax.vjp(run, leaves, rows(jnp.int32(0)))
    grads, dx = vjp(dy)
    return dx, grads


def _layer_in_chunks(
    layer: LayerFunctions, size: int, params: Params, x: Array, context: _LayerContext
) -> Array:
    platforms = _platforms(layer, size)
    keys = _all_keys(layer, size, params, partial(_part, x, size), context)

    def one(chunk: Array, x: Array) -> Array:
        mine, rows, tokens = (
            params(chunk),
            _part(x, size, chunk),
            _part(context.tokens, size, chunk),
        )
        q = layer.queries(mine, rows, tokens.angles)
        out, _ = platforms.run(blockwise.attend, chunk * size, q, tokens.segment_ids, keys)
        return _put(x, layer.finish(mine, rows, out), chunk)  # no other chunk reads these rows

    return lax.fori_loop(0, x.shape[1] // size, one, x)


def _layer_in_chunks_backward(
    layer: LayerFunctions,
    size: int,
    params: Params,
    trained: Trained,
    rows: Rows,
    context: _LayerContext,
    dy: Array,
) -> tuple[Array, list[Array]]:
    platforms = _platforms(layer, size)
    keys = _all_keys(layer, size, params, rows, context)
    chunks = dy.shape[1] // size

    def one(chunk: Array, state: tuple) -> tuple:
        dy, dk, dv, grads = state
        leaves, put_back = trained.split(params(chunk))
        x, tokens = rows(chunk), _part(context.tokens, size, chunk)

        def queries(leaves: list[Array], x: Array) -> Array:
            return layer.queries(put_back(leaves), x, tokens.angles)

        def finish(leaves: list[Array], x: Array, out: Array) -> Array:
            return layer.finish(put_back(leaves), x, out)

        q, queries_vjp = jax.vjp(queries, leaves, x)
        attention = (chunk * size, q, tokens.segment_ids, keys)
        out, lse = platforms.run(blockwise.attend, *attention)
        _, finish_vjp = jax.vjp(finish, leaves, x, out)
        more, dx, dout = finish_vjp(_part(dy, size, chunk))
        grads = add(grads, more)
        dq, dk, dv = platforms.run(blockwise.attend_backward, *attention, out, lse, dout, dk, dv)
        more, dx_of_q = queries_vjp(dq)
        return _put(dy, dx + dx_of_q, chunk), dk, dv, add(grads, more)

    zero = jnp.zeros(keys.k.shape, jnp.float32)
    leaves, _ = trained.split(params(jnp.int32(0)))
    dx, dk, dv, grads = lax.fori_loop(0, chunks, one, (dy, zero, zero, zeros_of(leaves)))

    def rest_of_keys(chunk: Array, state: tuple) -> tuple:
        dx, grads = state
        leaves, put_back = trained.split(params(chunk))
        angles, virtual = _part((context.tokens.angles, context.tokens.virtual), size, chunk)

        def keys_values(leaves: list[Array], x: Array) -> tuple[Array, Array]:
            return layer.keys_values(put_back(leaves), x, angles, virtual)

        (k, v), vjp = jax.vjp(keys_values, leaves, rows(chunk))
        cotangents = (_part(c, size, chunk).reshape(k.shape).astype(k.dtype) for c in (dk, dv))
        more, dx_of_kv = vjp(tuple(cotangents))
        return _put(dx, _part(dx, size, chunk) + dx_of_kv, chunk), add(grads, more)

    dx, grads = lax.fori_loop(0, chunks, rest_of_keys, (dx, grads))
    return dx, cast_like(grads, leaves)


def _all_keys(
    layer: LayerFunctions, size: int, params: Params, rows: Rows, context: _LayerContext
) -> blockwise.Keys:
    """Keys and values of the whole sequence, computed a chunk at a time."""
    tokens = context.tokens
    seq = tokens.valid.shape[1]

    def part(chunk: Array) -> tuple[Array, Array]:
        angles, virtual = _part((tokens.angles, tokens.virtual), size, chunk)
        k, v = layer.keys_values(params(chunk), rows(chunk), angles, virtual)
        return k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:])

    def one(chunk: Array, whole: tuple) -> tuple:
        return tuple(_put(a, b, chunk) for a, b in zip(whole, part(chunk), strict=True))

    shapes = jax.eval_shape(part, jnp.int32(0))
    whole = tuple(jnp.zeros((s.shape[0], seq, s.shape[2]), s.dtype) for s in shapes)
    k, v = lax.fori_loop(0, seq // size, one, whole)
    return blockwise.Keys(k, v, blockwise.Tokens(tokens.valid, tokens.segment_ids, context.window))


def _platforms(layer: LayerFunctions, size: int) -> blockwise.Platforms:
    """Blocks of attention that a chunk, a multiple of 256 tokens, holds a whole number of."""

    def fit(block: int) -> int:
        return next(b for b in range(min(block, size), 0, -128) if size % b == 0)

    def settings(block: tuple[int, int]) -> blockwise.Settings:
        return blockwise.Settings(layer.scale, layer.softcap, fit(block[0]), fit(block[1]))

    return blockwise.Platforms(settings(blockwise.CPU_BLOCK), settings(blockwise.BLOCK))


def _part(tree: PyTree, size: int, chunk: Array) -> Any:
    """One chunk of arrays whose axis 1 is the sequence."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, chunk * size, size, axis=1), tree)


def _part_of_layer(stack: Array, size: int, index: Array, chunk: Array) -> Array:
    """One chunk of one layer's array, of those of all layers."""
    _, batch, _, d = stack.shape
    zero = jnp.int32(0)
    return lax.dynamic_slice(stack, (index, zero, chunk * size, zero), (1, batch, size, d))[0]


def _put(whole: Array, part: Array, chunk: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(whole, part, chunk * part.shape[1], axis=1)
