# SPDX-License-Identifier: Apache-2.0
"""The codec: bit for bit the reference's, equal to a float64 reference, and its laws."""

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from jax_qlora.quant import blockwise
from jax_qlora.quant.blockwise import pack_codes, unpack_codes
from jax_qlora.quant.codebook import CODEBOOKS, DYNAMIC_MAP
from tests.helpers import golden

FORMATS = list(CODEBOOKS)
BLOCK_SIZES = [32, 64, 128, 256]
VECTORS = golden("nf4_vectors.npz")
SCHEMES = sorted({tuple(k.split("/")[:2]) for k in VECTORS if k.endswith("/packed")})
few = settings(max_examples=25)

# compiled, as the package uses them; fusion must not change a bit
quantize_blockwise = jax.jit(blockwise.quantize_blockwise, static_argnames=("format", "block_size"))
dequantize_blockwise = jax.jit(
    blockwise.dequantize_blockwise, static_argnames=("format", "block_size", "dtype")
)
quantize_absmax = jax.jit(blockwise.quantize_absmax)
dequantize_absmax = jax.jit(blockwise.dequantize_absmax)


def parse(scheme: str) -> tuple[str, int]:
    """'nf4_b64' or 'bf16_nf4_b64' -> ('nf4', 64)."""
    format, block = scheme.removeprefix("bf16_").split("_b")
    return format, int(block)


def vector(tensor: str, scheme: str) -> dict[str, np.ndarray]:
    prefix = f"{tensor}/{scheme}/"
    return {k.removeprefix(prefix): v for k, v in VECTORS.items() if k.startswith(prefix)}


def one_row(packed: np.ndarray, blocks: int, block_size: int) -> jax.Array:
    """The reference's codes as one row of whole blocks; the padding decodes to anything."""
    out = np.zeros(blocks * block_size // 2, np.uint8)
    out[: packed.size] = packed.ravel()
    return jnp.asarray(out)


# --- bit-exact with bitsandbytes ---------------------------------------------------------------


@pytest.mark.parametrize(("tensor", "scheme"), SCHEMES)
def test_codes_and_constants_are_the_reference_to_the_bit(tensor, scheme):
    format, block_size = parse(scheme)
    want = vector(tensor, scheme)
    x = jnp.asarray(VECTORS[f"{tensor}/input"]).reshape(-1)
    if scheme.startswith("bf16"):
        x = x.astype(jnp.bfloat16)
    codes, absmax = quantize_blockwise(x, format=format, block_size=block_size)
    np.testing.assert_array_equal(absmax, want["absmax"])
    packed = want["packed"].ravel()
    got = np.array(codes)[: packed.size]
    if x.size % 2:  # no vector has an odd size; a last lone code would share its byte with padding
        got, packed = got[:-1], packed[:-1]
    np.testing.assert_array_equal(got, packed)


@pytest.mark.parametrize(("tensor", "scheme"), SCHEMES)
def test_decoding_stored_codes_is_the_reference_to_the_bit(tensor, scheme):
    format, block_size = parse(scheme)
    want = vector(tensor, scheme)
    dtype = jnp.bfloat16 if scheme.startswith("bf16") else jnp.float32
    absmax = jnp.asarray(want["absmax"])
    row = one_row(want["packed"], absmax.size, block_size)
    out = dequantize_blockwise(row, absmax, format=format, block_size=block_size, dtype=dtype)
    n = want["dequant"].size  # the first rows only, for the large tensors
    np.testing.assert_array_equal(np.asarray(out, np.float32)[:n], want["dequant"].ravel())


@pytest.mark.parametrize(("tensor", "scheme"), SCHEMES)
def test_decoding_double_quantized_codes_is_the_reference_to_the_bit(tensor, scheme):
    format, block_size = parse(scheme)
    want = vector(tensor, scheme)
    absmax = dequantize_absmax(
        jnp.asarray(want["dq_absmax_u8"]),
        jnp.asarray(want["dq_nested_absmax"]),
        jnp.asarray(want["dq_offset"]),
    )
    np.testing.assert_array_equal(absmax, want["dq_absmax_restored"])
    dtype = jnp.bfloat16 if scheme.startswith("bf16") else jnp.float32
    row = one_row(want["packed"], absmax.size, block_size)
    out = dequantize_blockwise(row, absmax, format=format, block_size=block_size, dtype=dtype)
    n = want["dq_dequant"].size
    np.testing.assert_array_equal(np.asarray(out, np.float32)[:n], want["dq_dequant"].ravel())


@pytest.mark.parametrize(("tensor", "scheme"), SCHEMES)
def test_double_quantization_is_the_exact_nearest_reference(tensor, scheme):
    """The offset is a float32 mean: its last bits depend on the order of summation."""
    want = vector(tensor, scheme)
    absmax = jnp.asarray(want["absmax"])
    codes, scale, offset = quantize_absmax(absmax)
    np.testing.assert_allclose(offset, want["dq_offset"], rtol=1e-6)
    ulp = 1e-6 * float(np.abs(want["absmax"]).max())
    np.testing.assert_allclose(scale, want["dq_nested_absmax"], rtol=1e-6, atol=ulp)
    if np.all(want["dq_nested_absmax"] == 0):  # all blocks alike: every code decodes to the offset
        np.testing.assert_array_equal(dequantize_absmax(codes, scale, offset), absmax)
        return
    off = np.abs(np.asarray(codes, np.int32) - want["dq_absmax_u8_exact"].astype(np.int32))
    assert off.max() <= 1
    assert (off > 0).sum() <= max(2, absmax.size // 500)


def test_a_restored_constant_may_be_slightly_negative():
    """As in the reference, where the scales of the blocks differ a lot."""
    want = vector("big", "nf4_b64")
    codes, scale, offset = quantize_absmax(jnp.asarray(want["absmax"]))
    restored = dequantize_absmax(codes, scale, offset)
    assert float(restored.min()) < 0 < float(want["absmax"].min())


# --- against an independent reference ----------------------------------------------------------


def nearest_levels(x: np.ndarray, format: str, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest representable value of each element, and the distance to the runner-up's tie."""
    levels = np.unique(CODEBOOKS[format].levels.astype(np.float64))
    blocks = x.astype(np.float64).reshape(-1, block_size)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    scaled = blocks / np.where(absmax == 0, 1, absmax)
    distance = np.abs(scaled[..., None] - levels)
    ordered = np.sort(distance, axis=-1)
    margin = ordered[..., 1] - ordered[..., 0]
    return (levels[distance.argmin(-1)] * absmax).ravel(), margin.ravel()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_rounds_to_the_nearest_level_of_a_float64_reference(format, block_size):
    rng = np.random.default_rng(block_size)
    x = (rng.standard_t(3, (8, 512)) * 10.0 ** rng.integers(-6, 6, (8, 1))).astype(np.float32)
    codes, absmax = quantize_blockwise(jnp.asarray(x), format=format, block_size=block_size)
    got = dequantize_blockwise(codes, absmax, format=format, block_size=block_size)
    want, margin = nearest_levels(x, format, block_size)
    clear = margin > 1e-6  # elsewhere float32 rounding may choose either neighbor
    assert clear.mean() > 0.99
    np.testing.assert_allclose(np.asarray(got).ravel()[clear], want[clear], rtol=1e-6)


# --- laws --------------------------------------------------------------------------------------

byte_arrays = hnp.arrays(np.uint8, (2, 24))


@few
@given(byte_arrays)
def test_packing_undoes_unpacking(packed):
    codes = unpack_codes(jnp.asarray(packed))
    assert int(codes.max()) < 16
    np.testing.assert_array_equal(pack_codes(codes), packed)


def test_the_first_element_is_in_the_high_nibble():
    assert int(pack_codes(jnp.array([0xA, 0x3], jnp.uint8))[0]) == 0xA3


floats = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@few
@given(hnp.arrays(np.float32, (2, 64), elements=floats), st.sampled_from(FORMATS))
def test_quantizing_a_decoded_array_changes_nothing(x, format):
    codes, absmax = quantize_blockwise(jnp.asarray(x), format=format, block_size=32)
    decoded = dequantize_blockwise(codes, absmax, format=format, block_size=32)
    if format == "int4":  # -8/7 is a code that nothing is rounded to
        assert int(unpack_codes(codes).min()) >= 1
    codes2, absmax2 = quantize_blockwise(decoded, format=format, block_size=32)
    again = dequantize_blockwise(codes2, absmax2, format=format, block_size=32)
    np.testing.assert_array_equal(absmax2, absmax)
    np.testing.assert_array_equal(again, decoded)


@few
@given(hnp.arrays(np.float32, (2, 64), elements=floats), st.sampled_from(FORMATS))
def test_the_error_is_at_most_half_the_widest_gap(x, format):
    codes, absmax = quantize_blockwise(jnp.asarray(x), format=format, block_size=64)
    decoded = dequantize_blockwise(codes, absmax, format=format, block_size=64)
    levels = np.sort(CODEBOOKS[format].levels)
    gap = np.diff(levels[levels >= -1]).max()
    bound = np.asarray(absmax) * (gap / 2 * (1 + 1e-5)) + 1e-30
    assert (np.abs(np.asarray(decoded) - x) <= bound).all()


@pytest.mark.parametrize("format", FORMATS)
def test_the_largest_element_of_a_block_is_kept_exactly(format):
    x = jnp.asarray(VECTORS["normal_small/input"])
    codes, absmax = quantize_blockwise(x, format=format)
    decoded = np.asarray(dequantize_blockwise(codes, absmax, format=format))
    where = np.abs(np.asarray(x)).argmax(axis=1)
    rows = np.arange(len(where))
    np.testing.assert_array_equal(decoded[rows, where], np.asarray(x)[rows, where])


@pytest.mark.parametrize("format", FORMATS)
def test_a_zero_block_decodes_to_zero(format):
    codes, absmax = quantize_blockwise(jnp.zeros((2, 64)), format=format)
    assert not absmax.any()
    assert not dequantize_blockwise(codes, absmax, format=format).any()
    if format == "nf4":
        assert (np.asarray(codes) == 0x77).all()


def test_denormals_and_large_values_stay_finite():
    x = jnp.asarray(np.array([[1e-45, -1e-40, 0.0, 1e37] * 16], np.float32))
    codes, absmax = quantize_blockwise(x)
    decoded = dequantize_blockwise(codes, absmax)
    assert np.isfinite(np.asarray(decoded)).all()
    assert float(decoded[0, 3]) == np.float32(1e37)


@pytest.mark.parametrize("cols", [30, 96, 70])
def test_a_short_last_block_is_padded_with_zeros(cols):
    x = jax.random.normal(jax.random.key(0), (3, cols))
    codes, absmax = quantize_blockwise(x)
    blocks = -(-cols // 64)
    assert codes.shape == (3, blocks * 32) and absmax.shape == (3, blocks)
    decoded = dequantize_blockwise(codes, absmax)
    assert not decoded[:, cols:].any()
    padded = jnp.pad(x, ((0, 0), (0, blocks * 64 - cols)))
    np.testing.assert_array_equal(quantize_blockwise(padded)[0], codes)


@few
@given(hnp.arrays(np.float32, st.sampled_from([1, 256, 300]), elements=st.floats(0, 100, width=32)))
def test_double_quantization_error_is_within_the_map(absmax):
    codes, scale, offset = quantize_absmax(jnp.asarray(absmax))
    restored = np.asarray(dequantize_absmax(codes, scale, offset))
    gap = np.diff(DYNAMIC_MAP).max()
    bound = np.repeat(np.asarray(scale), 256)[: absmax.size] * gap / 2
    # nothing below the map's smallest value but its zero, and the offset is added in float32
    assert (np.abs(restored - absmax) <= bound * 1.001 + 1e-5 * (1 + np.abs(absmax).max())).all()


# --- transforms --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_jit_vmap_and_scan_give_the_same_bits(format, dtype):
    x = jax.random.normal(jax.random.key(1), (3, 4, 96)).astype(dtype)

    def both(x):
        how: dict[str, Any] = dict(format=format, block_size=32)
        codes, absmax = blockwise.quantize_blockwise(x, **how)
        return codes, blockwise.dequantize_blockwise(codes, absmax, **how, dtype=dtype)

    want = both(x)  # op by op
    ways = {
        "jit": jax.jit(both),
        "vmap": jax.jit(jax.vmap(both)),
        "scan": lambda x: jax.lax.scan(lambda _, x: (None, both(x)), None, x)[1],
    }
    for name, way in ways.items():
        codes, decoded = way(x)
        np.testing.assert_array_equal(codes, want[0], err_msg=name)
        np.testing.assert_array_equal(decoded, want[1], err_msg=name)
        assert decoded.dtype == dtype


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_input_is_quantized_as_its_float32_value(dtype):
    x = jax.random.normal(jax.random.key(2), (4, 64)).astype(dtype)
    for got, want in zip(
        quantize_blockwise(x), quantize_blockwise(x.astype(jnp.float32)), strict=True
    ):
        np.testing.assert_array_equal(got, want)
