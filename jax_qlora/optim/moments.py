# SPDX-License-Identifier: Apache-2.0
"""Adam whose moments are held in 8 or 16 bits between steps, and computed with in float32.

Each step decodes both moments, takes optax's own Adam step with them, and encodes the new ones:
the update of a step is made of moments that are not rounded yet. The state is optax's
`ScaleByAdamState`, a tree of plain arrays, so it is saved, masked and partitioned like any other.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ..quant.blockwise import pad_to_multiple, reciprocal
from ..quant.codebook import DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP
from ..typing import Array, Float32, PyTree, UInt8

T = TypeVar("T")

BLOCK_SIZE = 256
MIN_8BIT_SIZE = 4096
_CHUNK = 1024  # blocks whose moments are float32 at once: 1 MB each, which stays in a CPU's cache

FindCodes = Callable[[Array, np.ndarray], Array]
"""From scaled values in [-1, 1] and a map (ascending float32 [256]) to codes, uint8."""


class Moment8(NamedTuple):
    """A moment in 8 bits: `map[codes] * absmax`, one absmax for each block.

    Blocks of 256 run over the flattened last two axes; the axes before them (stacked layers,
    experts) stay in front in both arrays, so slicing or sharding them slices complete moments.

    Attributes:
        codes: uint8 of the parameter's own shape.
        absmax: float32 [*lead, blocks], the largest magnitude of each block.
    """

    codes: Array
    absmax: Array


def scale_by_adam_8bit(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    min_8bit_size: int = MIN_8BIT_SIZE,
    find_codes: FindCodes | None = None,
) -> optax.GradientTransformation:
    """Return `optax.scale_by_adam` whose moments are held in 8 bits: 2.03 bytes a parameter, not 8.

    Equals bitsandbytes' `AdamW8bit` (`optimizer_update_8bit_blockwise`) but for its CPU kernel's
    approximate codes: blocks of 256, the first moment in the signed and the second in the unsigned
    dynamic map, codes the exact nearest. A block of zeros has absmax 0. A leaf is updated 1024
    blocks at a time and in place, so no float32 moment of a whole leaf exists.

    Within a block, second moments below 1.6e-7 of the largest round to 0, also as in bitsandbytes.
    Gradients there differ by a factor above 2500; where some also vanish in single steps, as those
    of the rows of an embedding, steps can become as large as `first moment / eps`: such a leaf
    wants another form, through `optax.partition`.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        min_8bit_size: matrices (the last two axes of a leaf) of fewer elements stay float32, as
            with bitsandbytes.
        find_codes: how scaled values become codes; by default `nearest_codes`.

    References:
        Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    find = nearest_codes if find_codes is None else find_codes

    def zeros(x: Array) -> Array | Moment8:
        size = math.prod(x.shape[-2:])
        if size < min_8bit_size:
            return jnp.zeros(x.shape, jnp.float32)
        absmax = jnp.zeros((*x.shape[:-2], -(-size // BLOCK_SIZE)), jnp.float32)
        return Moment8(codes=jnp.zeros(x.shape, jnp.uint8), absmax=absmax)

    def step(g: Array, mu: Any, nu: Any, count: Array, index: int) -> tuple[Array, Any, Any]:
        if not isinstance(mu, Moment8):
            return _adam_step(adam, g, mu, nu, count)

        def update(blocks: tuple[Array, Moment8, Moment8]) -> tuple[Array, Moment8, Moment8]:
            g, mu, nu = blocks
            first = dequantize_blocks(mu, DYNAMIC_MAP)
            second = dequantize_blocks(nu, UNSIGNED_DYNAMIC_MAP)
            g, first, second = _adam_step(adam, g, first, second, count)
            mu = quantize_blocks(first, DYNAMIC_MAP, find_codes=find)
            return g, mu, quantize_blocks(second, UNSIGNED_DYNAMIC_MAP, find_codes=find)

        blocks = (_to_blocks(g), _moment_to_blocks(mu), _moment_to_blocks(nu))
        out, new_mu, new_nu = _map_in_place(update, blocks, chunk=_CHUNK)
        return (
            _from_blocks(out, g.shape),
            _moment_from_blocks(new_mu, mu),
            _moment_from_blocks(new_nu, nu),
        )

    return _adam_by_leaf(zeros, step)


def scale_by_adam_bfloat16(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Return `optax.scale_by_adam` whose moments are held in bfloat16: 4 bytes a parameter, not 8.

    They are rounded stochastically: up or down to a neighbor in bfloat16, with probabilities that
    make the expected value exact. Rounding to nearest would not do, for a second moment shrinks by
    at most `1 - b2`, a thousandth, in a step while neighbors in bfloat16 lie 1/256 to 1/128 apart:
    it would never shrink at all. The random bits are a hash of the step, the leaf and the place in
    it, so the same steps give the same bits, resumed or not.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def zeros(x: Array) -> Array:
        return jnp.zeros(x.shape, jnp.bfloat16)

    def step(g: Array, mu: Array, nu: Array, count: Array, index: int) -> tuple[Array, ...]:
        wide = mu.astype(jnp.float32), nu.astype(jnp.float32)
        g, first, second = _adam_step(adam, g, *wide, count)
        noise = [hash_bits(g.shape, count, 2 * index + i) for i in range(2)]
        return g, round_stochastically(first, noise[0]), round_stochastically(second, noise[1])

    return _adam_by_leaf(zeros, step)


def quantize_blocks(
    x: Float32[Array, "blocks 256"], levels: np.ndarray, *, find_codes: FindCodes
) -> Moment8:
    """Return `x` in 8 bits: each block times `float32(1 / absmax)`, then the code of its level.

    Args:
        x: blocks of a moment.
        levels: ascending float32 [256].
        find_codes: `nearest_codes`, or another rounding.
    """
    absmax = jnp.max(jnp.abs(x), axis=-1)
    scaled = jnp.clip(x * reciprocal(absmax)[:, None], -1.0, 1.0)
    return Moment8(codes=find_codes(scaled, levels), absmax=absmax)


def dequantize_blocks(moment: Moment8, levels: np.ndarray) -> Float32[Array, "blocks 256"]:
    """Return `levels[code] * absmax`.

    Args:
        moment: codes [blocks, 256] and absmax [blocks].
        levels: ascending float32 [256].
    """
    values = jnp.asarray(levels).at[moment.codes].get(mode="promise_in_bounds")  # any byte is
    return values * moment.absmax[:, None]


def nearest_codes(scaled: Float32[Array, "..."], levels: np.ndarray) -> UInt8[Array, "..."]:
    """Return the index of the level nearest to each value; a tie takes the lower one.

    A binary search in 8 steps, which XLA fuses into one loop over the elements;
    `jnp.searchsorted` holds 16 bytes more for each of them and takes twice as long.

    Args:
        scaled: values within the range of `levels`.
        levels: ascending float32 [256].

    >>> nearest_codes(jnp.float32([-1, 0, 1]), DYNAMIC_MAP)
    Array([  0, 127, 255], dtype=uint8)
    """
    midpoints = jnp.asarray((levels[:-1] + levels[1:]) / np.float32(2), jnp.float32)
    code = jnp.zeros(scaled.shape, jnp.uint8)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        higher = code + jnp.uint8(step)
        below = midpoints.at[higher - jnp.uint8(1)].get(mode="promise_in_bounds")
        code = jnp.where(scaled > below, higher, code)
    return code


def round_stochastically(x: Float32[Array, "..."], noise: Array) -> Array:
    """Return `x` in bfloat16, rounded away from zero where its lower half plus `noise` carries.

    What bfloat16 can hold, zeros and infinities included, is kept whatever the noise.

    Args:
        x: what to round.
        noise: uint32 of the same shape, below 2**16.

    >>> x = jnp.float32([1, 1 + 2**-8])  # the second lies midway between two neighbors
    >>> [round_stochastically(x, jnp.full(2, n, jnp.uint32)).tolist() for n in (0x7FFF, 0x8000)]
    [[1.0, 1.0], [1.0, 1.0078125]]
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)


def hash_bits(shape: tuple[int, ...], count: Array, stream: int) -> Array:
    """Return 16 pseudorandom bits, as uint32 below 2**16, for each place in `shape`.

    An integer hash ("lowbias32") and not `jax.random`: XLA fuses it into the rounding that uses
    it, so that it takes no memory.

    Args:
        shape: of the result.
        count: the step, an integer.
        stream: which of the arrays of this step.
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        here = lax.broadcasted_iota(jnp.uint32, shape, axis)
        place = place * jnp.uint32(size) + here
    seed = count.astype(jnp.uint32) * jnp.uint32(0x85EBCA6B) + jnp.uint32(stream)
    return _mix(place ^ _mix(seed)) >> 16


def _mix(h: Array) -> Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)


def _to_blocks(x: Array) -> Array:
    """[*lead, rows, cols] as [blocks, 256]; the last block of each matrix is padded with zeros."""
    flat = x.reshape(*x.shape[:-2], math.prod(x.shape[-2:]))
    return pad_to_multiple(flat, BLOCK_SIZE).reshape(-1, BLOCK_SIZE)


def _from_blocks(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Inverse of `_to_blocks`."""
    size = math.prod(shape[-2:])
    return blocks.reshape(*shape[:-2], -(-size // BLOCK_SIZE) * BLOCK_SIZE)[..., :size].reshape(
        shape
    )


def _moment_to_blocks(moment: Moment8) -> Moment8:
    return Moment8(codes=_to_blocks(moment.codes), absmax=moment.absmax.reshape(-1))


def _moment_from_blocks(blocks: Moment8, like: Moment8) -> Moment8:
    codes = _from_blocks(blocks.codes, like.codes.shape)
    return Moment8(codes=codes, absmax=blocks.absmax.reshape(like.absmax.shape))


def _map_in_place(f: Callable[[T], T], tree: T, *, chunk: int) -> T:
    """Apply `f` to slices of the leading axis, each written back over what it was made of.

    A loop, not one expression: XLA would compute all leaves side by side, and hold 16 bytes a
    parameter for it. So there are at least two slices.
    """
    size = jax.tree.leaves(tree)[0].shape[0]
    chunk = min(chunk, -(-size // 2))

    def apply(start: Any, length: int, tree: T) -> T:
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, length), tree)
        return jax.tree.map(
            lambda x, new: lax.dynamic_update_slice_in_dim(x, new, start, 0), tree, f(part)
        )

    whole, rest = divmod(size, chunk)
    tree = lax.fori_loop(0, whole, lambda i, tree: apply(i * chunk, chunk, tree), tree)
    return apply(whole * chunk, rest, tree) if rest else tree


def _adam_step(
    adam: optax.GradientTransformation, g: Array, mu: Array, nu: Array, count: Array
) -> tuple[Array, Array, Array]:
    state: Any = optax.ScaleByAdamState(count=count, mu=mu, nu=nu)
    update, state = adam.update(g, state)
    return update, state.mu, state.nu  # type: ignore[return-value]


def _adam_by_leaf(
    zeros: Callable[[Array], Any],
    step: Callable[[Array, Any, Any, Array, int], tuple[Any, ...]],
) -> optax.GradientTransformation:
    """Adam from what is held before the first step and from the step of one leaf.

    Args:
        zeros: a parameter, to a moment of it.
        step: float32 gradient, both moments, step count and number of the leaf, to update and both
            moments.
    """

    def init(params: PyTree) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(zeros, params) for _ in range(2))
        return optax.ScaleByAdamState(count=jnp.zeros([], jnp.int32), mu=mu, nu=nu)

    def update(updates: PyTree, state: Any, params: PyTree | None = None):
        grads, structure = jax.tree.flatten(updates)
        mu, nu = structure.flatten_up_to(state.mu), structure.flatten_up_to(state.nu)
        new = [
            step(g.astype(jnp.float32), first, second, state.count, index)
            for index, (g, first, second) in enumerate(zip(grads, mu, nu, strict=True))
        ]
        updates, mu, nu = (
            jax.tree.unflatten(structure, [leaf[part] for leaf in new]) for part in range(3)
        )
        count: Any = optax.safe_increment(state.count)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)
