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
from jax.custom_derivatives import SymbolicZero

from ..tree import pytree
from ..typing import Array, Float, PyTree
from . import blockwise_attention as blockwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFunctions:
    """One layer as pure functions; the first argument of each is the layer's parameters.

    Attributes:
        keys_values: `(params, x, angles) -> (k, v)`, each `[batch, n_kv_heads, seq, head_dim]`.
        queries: `(params, x, angles) -> q`, `[batch, seq, n_heads, head_dim]`.
        finish: `(params, x, attended) -> y`, the layer's output.
        scale: Factor of the attention scores.
    """

    keys_values: Callable[..., tuple[Array, Array]]
    queries: Callable[..., Array]
    finish: Callable[..., Array]
    scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """How layers are run; static.

    Attributes:
        layer: One layer.
        chunk: Tokens that go through a layer at once, at most, rows of the batch together.
        offload: Whether the inputs of layers wait in host memory.
        fetch: Brings one layer's parameters from host memory to the device, or None where they are
            there. Each layer's are on their way while the one before computes.
    """

    layer: LayerFunctions
    chunk: int
    offload: bool = False
    fetch: Callable[[PyTree], PyTree] | None = None


class Context(NamedTuple):
    """What all layers share of the tokens; axes 0 and 1 are batch and sequence.

    Attributes:
        angles: Cosines and sines of the rotations.
        valid: Bool: which tokens are not padding.
        segment_ids: int: the document of each token, or None.
    """

    angles: tuple[Array, Array]
    valid: Array
    segment_ids: Array | None


@pytree(static=("flags",))
@dataclasses.dataclass(frozen=True)
class _Trains:
    """Which leaves of the parameters get a gradient: static, but carried among the residuals."""

    flags: tuple[bool, ...]


def run_layers(
    loop: Loop, layers: PyTree, x: Float[Array, "batch seq d"], context: Context
) -> Float[Array, "batch seq d"]:
    """Return the residual stream after all layers.

    Args:
        loop: What a layer is, and how it is run.
        layers: Parameters, every leaf with a leading layer axis.
        x: The residual stream before the first layer.
        context: Positions, padding and documents.

    Returns:
        The residual stream after the last layer; reverse-mode differentiable in `x` and in those
        floating-point leaves of `layers` that are being differentiated, once.
    """
    batch, seq, _ = x.shape
    size = _chunk_size(seq, max(loop.chunk // batch, 1))
    padding = -seq % size
    if padding:
        x, context = jax.tree.map(
            lambda a: jnp.pad(a, [(0, 0), (0, padding)] + [(0, 0)] * (a.ndim - 2)), (x, context)
        )
    return _run(loop, size, layers, x, context)[:, :seq]


def _chunk_size(seq: int, most: int) -> int:
    """Tokens of a row in a chunk: all, or the least multiple of 256 that makes no more chunks."""
    if seq <= most:
        return seq
    chunks = -(-seq // max(most, 256))
    return -(-seq // (256 * chunks)) * 256


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(loop: Loop, size: int, layers: PyTree, x: Array, context: Context) -> Array:
    return _forward(loop, size, layers, x, context, keep=False)[0]


def _run_fwd(
    loop: Loop, size: int, layers: PyTree, x: Any, context: Context
) -> tuple[Array, tuple]:
    arguments = (layers, x, context)
    trains = _Trains(tuple(leaf.perturbed for leaf in jax.tree.leaves(layers)))
    layers, x, context = jax.tree.map(lambda leaf: leaf.value, arguments)
    y, inputs = _forward(loop, size, layers, x, context, keep=True)
    return y, (layers, inputs, context, trains)


def _forward(
    loop: Loop, size: int, layers: PyTree, x: Array, context: Context, *, keep: bool
) -> tuple[Array, Array | None]:
    """The last residual stream and, with `keep`, the inputs of all layers."""
    count = _count(layers)

    def body(carry: tuple, index: Array) -> tuple[tuple, Array | None]:
        x, ahead = carry
        params, ahead = _take(loop, layers, ahead, index, jnp.minimum(index + 1, count - 1))
        kept = None
        if keep:
            kept = jax.device_put(x, jax.memory.Space.Host) if loop.offload else x
        if size == x.shape[1]:
            return (_layer(loop.layer, params, x, context), ahead), kept
        return (_layer_in_chunks(loop.layer, size, params, x, context), ahead), kept

    first = _ahead(loop, layers, 0)
    (x, _), inputs = lax.scan(body, (x, first), jnp.arange(count, dtype=jnp.int32))
    return x, inputs


def _run_bwd(loop: Loop, size: int, residuals: tuple, dy: Any) -> tuple:
    layers, inputs, context, trains = residuals
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)
    count = _count(layers)

    def body(carry: tuple, index: Array) -> tuple[tuple, list[Array]]:
        dy, ahead = carry
        params, ahead = _take(loop, layers, ahead, index, jnp.maximum(index - 1, 0))
        x = lax.dynamic_index_in_dim(inputs, index, keepdims=False)
        if loop.offload:
            x = jax.device_put(x, jax.memory.Space.Device)
        backward = _layer_backward if size == x.shape[1] else _layer_in_chunks_backward
        dx, grads = backward(loop.layer, size, params, trains, x, context, dy)
        return (dx, ahead), grads

    last = _ahead(loop, layers, count - 1)
    indices = jnp.arange(count, dtype=jnp.int32)
    (dx, _), grads = lax.scan(body, (dy, last), indices, reverse=True)
    found, treedef = iter(grads), jax.tree.structure(layers)
    cotangents = [next(found) if trained else None for trained in trains.flags]
    return jax.tree.unflatten(treedef, cotangents), dx, None


_run.defvjp(_run_fwd, _run_bwd, symbolic_zeros=True)


def _count(layers: PyTree) -> int:
    return jax.tree.leaves(layers)[0].shape[0]


def _at(layers: PyTree, index: Array | int) -> PyTree:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), layers)


def _ahead(loop: Loop, layers: PyTree, index: int) -> PyTree:
    """The first layer's parameters to use, where they must be fetched."""
    return None if loop.fetch is None else loop.fetch(_at(layers, index))


def _take(
    loop: Loop, layers: PyTree, ahead: PyTree, index: Array, following: Array
) -> tuple[PyTree, PyTree]:
    """The parameters of a layer, and those of the following one, on their way."""
    if loop.fetch is None:
        return _at(layers, index), None
    return ahead, loop.fetch(_at(layers, following))


def _layer(layer: LayerFunctions, params: PyTree, x: Array, context: Context) -> Array:
    q = layer.queries(params, x, context.angles)
    k, v = layer.keys_values(params, x, context.angles)
    out = blockwise.blockwise_attention(layer.scale, q, k, v, context.valid, context.segment_ids)
    return layer.finish(params, x, out)


def _layer_backward(
    layer: LayerFunctions,
    size: int,
    params: PyTree,
    trains: _Trains,
    x: Array,
    context: Context,
    dy: Array,
) -> tuple[Array, list[Array]]:
    trained, rest = _split(params, trains)

    def run(trained: list[Array], x: Array) -> Array:
        return _layer(layer, rest(trained), x, context)

    _, vjp = jax.vjp(run, trained, x)
    grads, dx = vjp(dy)
    return dx, grads


def _layer_in_chunks(
    layer: LayerFunctions, size: int, params: PyTree, x: Array, context: Context
) -> Array:
    platforms = _platforms(layer, size)
    keys = _all_keys(layer, size, params, x, context)

    def one(chunk: Array, x: Array) -> Array:
        here = partial(_part, size=size, chunk=chunk)
        mine, tokens = _of_chunk(params, chunk), here(context)
        rows = here(x)
        q = layer.queries(mine, rows, tokens.angles)
        out, _ = platforms.run(blockwise.attend, chunk * size, q, tokens.segment_ids, keys)
        return _put(x, layer.finish(mine, rows, out), chunk, 1)  # no other chunk reads these rows

    return lax.fori_loop(0, x.shape[1] // size, one, x)


def _layer_in_chunks_backward(
    layer: LayerFunctions,
    size: int,
    params: PyTree,
    trains: _Trains,
    x: Array,
    context: Context,
    dy: Array,
) -> tuple[Array, list[Array]]:
    platforms = _platforms(layer, size)
    keys = _all_keys(layer, size, params, x, context)
    chunks = x.shape[1] // size

    def start(chunk: Array) -> tuple:
        here = partial(_part, size=size, chunk=chunk)
        trained, rest = _split(_of_chunk(params, chunk), trains)
        return here, trained, rest, here(context)

    def one(chunk: Array, state: tuple) -> tuple:
        dy, dk, dv, grads = state
        here, trained, rest, tokens = start(chunk)
        rows = here(x)

        def queries(trained: list[Array], rows: Array) -> Array:
            return layer.queries(rest(trained), rows, tokens.angles)

        def finish(trained: list[Array], rows: Array, out: Array) -> Array:
            return layer.finish(rest(trained), rows, out)

        q, queries_vjp = jax.vjp(queries, trained, rows)
        attention = (chunk * size, q, tokens.segment_ids, keys)
        out, lse = platforms.run(blockwise.attend, *attention)
        _, finish_vjp = jax.vjp(finish, trained, rows, out)
        more, dx, dout = finish_vjp(here(dy))
        grads = _add(grads, more)
        dq, dk, dv = platforms.run(blockwise.attend_backward, *attention, out, lse, dout, dk, dv)
        more, dx_of_q = queries_vjp(dq)
        return _put(dy, dx + dx_of_q, chunk, 1), dk, dv, _add(grads, more)

    zero = jnp.zeros(keys.k.shape, jnp.float32)
    trained = _split(params, trains)[0]
    grads = [jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)) for a in trained]
    dx, dk, dv, grads = lax.fori_loop(0, chunks, one, (dy, zero, zero, grads))

    def rest_of_keys(chunk: Array, state: tuple) -> tuple:
        dx, grads = state
        here, trained, rest, tokens = start(chunk)

        def keys_values(trained: list[Array], rows: Array) -> tuple[Array, Array]:
            return layer.keys_values(rest(trained), rows, tokens.angles)

        (k, v), vjp = jax.vjp(keys_values, trained, here(x))
        cotangents = (here(dk).reshape(k.shape), here(dv).reshape(v.shape))
        more, dx_of_kv = vjp(tuple(c.astype(k.dtype) for c in cotangents))
        return _put(dx, here(dx) + dx_of_kv, chunk, 1), _add(grads, more)

    dx, grads = lax.fori_loop(0, chunks, rest_of_keys, (dx, grads))
    return dx, [g.astype(a.dtype) for g, a in zip(grads, trained, strict=True)]


def _all_keys(
    layer: LayerFunctions, size: int, params: PyTree, x: Array, context: Context
) -> blockwise.Keys:
    """Keys and values of the whole sequence, computed a chunk at a time."""

    def part(chunk: Array) -> tuple[Array, Array]:
        here = partial(_part, size=size, chunk=chunk)
        k, v = layer.keys_values(_of_chunk(params, chunk), here(x), here(context).angles)
        return k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:])

    def one(chunk: Array, whole: tuple) -> tuple:
        return tuple(_put(a, b, chunk, 1) for a, b in zip(whole, part(chunk), strict=True))

    shapes = jax.eval_shape(part, jnp.int32(0))
    whole = tuple(jnp.zeros((s.shape[0], x.shape[1], s.shape[2]), s.dtype) for s in shapes)
    k, v = lax.fori_loop(0, x.shape[1] // size, one, whole)
    return blockwise.Keys(k, v, blockwise.Tokens(context.valid, context.segment_ids, None))


def _platforms(layer: LayerFunctions, size: int) -> blockwise.Platforms:
    """Blocks of attention that a chunk, a multiple of 256 tokens, holds a whole number of."""

    def fit(block: int) -> int:
        return next(b for b in range(min(block, size), 0, -128) if size % b == 0)

    def settings(block: tuple[int, int]) -> blockwise.Settings:
        return blockwise.Settings(layer.scale, None, fit(block[0]), fit(block[1]))

    return blockwise.Platforms(settings(blockwise.CPU_BLOCK), settings(blockwise.BLOCK))


def _part(tree: PyTree, *, size: int, chunk: Array) -> Any:
    """One chunk of arrays whose axis 1 is the sequence."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, chunk * size, size, axis=1), tree)


def _put(whole: Array, part: Array, chunk: Array, axis: int) -> Array:
    place = chunk * part.shape[axis]
    return lax.dynamic_update_slice_in_dim(whole, part, place, axis=axis)


def _of_chunk(params: PyTree, chunk: Array) -> PyTree:
    """The parameters for one chunk: random keys, which are for dropout, are the chunk's own."""

    def one(a: Array) -> Array:
        return jax.random.fold_in(a, chunk) if _is_key(a) else a

    return jax.tree.map(one, params)


def _is_key(a: Array) -> bool:
    return jnp.issubdtype(a.dtype, jax.dtypes.prng_key)


def _split(params: PyTree, trains: _Trains) -> tuple[list[Array], Callable[[list[Array]], PyTree]]:
    """What gets a gradient, and how to put it back among the rest."""
    leaves, treedef = jax.tree.flatten(params)
    trained = [leaf for leaf, flag in zip(leaves, trains.flags, strict=True) if flag]

    def rest(trained: list[Array]) -> PyTree:
        given = iter(trained)
        filled = (
            next(given) if flag else leaf for leaf, flag in zip(leaves, trains.flags, strict=True)
        )
        return jax.tree.unflatten(treedef, filled)

    return trained, rest


def _add(total: list[Array], more: list[Array]) -> list[Array]:
    return [a + b.astype(a.dtype) for a, b in zip(total, more, strict=True)]
