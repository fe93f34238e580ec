# SPDX-License-Identifier: Apache-2.0
"""AdamW whose moments are held in 8 or 16 bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_qlora.lora as lora
from jax_qlora import checkpoint
from jax_qlora.errors import InputError
from jax_qlora.optim import (
    Moment8,
    adamw,
    lora_mask,
    scale_by_adam_8bit,
    scale_by_adam_bfloat16,
    train_only,
)
from jax_qlora.optim.moments import hash_bits, nearest_codes, round_stochastically
from jax_qlora.quant.codebook import DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP
from jax_qlora.quant.layout import KernelLayout
from jax_qlora.tree import flatten_paths, nbytes

from .helpers import assert_trees_close, golden, normal

pytestmark = pytest.mark.usefixtures("standard_promotion")
STATES = ["float32", "bfloat16", "8bit"]
BITS8: Any = {"state": "8bit", "min_8bit_size": 512}


@pytest.fixture
def standard_promotion():
    """Optax itself mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def pair(seed: int, lead: tuple[int, ...] = (), rank: int = 16) -> lora.LoraPair:
    """`a` of 1024 elements a layer and `b` of 768."""
    return lora.LoraPair(
        a=normal((*lead, rank, 64), seed),
        b=normal((*lead, 48, rank), seed + 1),
        layout=KernelLayout(shape=(64, 48), in_axes=(-2,)),
        scale=2.0,
        dropout=0.0,
    )


def steps(optimizer: optax.GradientTransformation, params: Any, gradients: Any) -> Any:
    """Parameters and state after the given gradients, one jitted step each."""
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params, state


def gradients_like(tree: Any, count: int) -> list[Any]:
    return [
        jax.tree.map(lambda x, i=i: normal(x.shape, seed=100 + i) * 0.1, tree) for i in range(count)
    ]


def same_bits(left: Any, right: Any) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


# --- bitsandbytes -----------------------------------------------------------------------------


def bnb_cpu_codes(scaled, levels):
    """How bitsandbytes' CPU kernel rounds: by a table of 65536 points, so off by one at times."""
    midpoints = (levels[:-1] + levels[1:]) / np.float32(2)
    grid = np.float32(-1) + np.float32(2) * np.arange(65536, dtype=np.float32) / np.float32(65535)
    table = np.searchsorted(midpoints, grid, side="left").astype(np.uint8)
    half = (scaled + jnp.float32(1)) * jnp.float32(0.5)
    return jnp.asarray(table)[(half * jnp.float32(65535) + jnp.float32(0.5)).astype(jnp.uint16)]


def adamw8_of_the_fixture(data, count, **kwargs):
    optimizer = optax.chain(
        scale_by_adam_8bit(b1=0.9, b2=0.95, eps=1e-8, **kwargs),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(1e-2),
    )
    return steps(optimizer, jnp.asarray(data["param0"]), map(jnp.asarray, data["grads"][:count]))


def test_adamw8bit_is_that_of_bitsandbytes_but_for_its_approximate_codes():
    """With its rounding, bitsandbytes' parameters, codes and constants; with ours, near them."""
    data = golden("optim.npz")
    params, state = adamw8_of_the_fixture(data, 6, find_codes=bnb_cpu_codes)
    np.testing.assert_allclose(params, data["bnb_adamw8/param"], rtol=0, atol=1.25e-7)
    for name, number in (("mu", 1), ("nu", 2)):
        moment = getattr(state[0], name)
        np.testing.assert_array_equal(moment.codes, data[f"bnb_adamw8/state/state{number}"])
        absmax = data[f"bnb_adamw8/state/absmax{number}"]
        np.testing.assert_allclose(moment.absmax, absmax, rtol=3e-7)

    params, _ = adamw8_of_the_fixture(data, 6)
    distance = np.abs(params - data["bnb_adamw8/param"])
    assert distance.max() < 0.04 and distance.mean() < 8e-4  # they moved by up to 0.06
    chained, _ = steps(
        adamw(1e-2, b1=0.9, b2=0.95, weight_decay=0.1, state="8bit"),
        jnp.asarray(data["param0"]),
        map(jnp.asarray, data["grads"]),
    )
    assert same_bits(chained, params)


def test_what_differs_from_bitsandbytes_is_the_order_of_the_decay():
    """It multiplies parameters by `1 - lr * decay`, then adds the update: two roundings of them.
    Optax adds the decay to the update first: one. Ours in its order are its own almost everywhere.
    """
    data = golden("optim.npz")
    adam = scale_by_adam_8bit(b1=0.9, b2=0.95, eps=1e-8, find_codes=bnb_cpu_codes)
    params, state = data["param0"], adam.init(jnp.asarray(data["param0"]))
    update = jax.jit(adam.update)
    for gradient in data["grads"]:  # in NumPy, which fuses nothing into one rounding
        step, state = update(jnp.asarray(gradient), state)
        params = params * np.float32(1 - 1e-2 * 0.1) - np.float32(1e-2) * np.asarray(step)
    want = data["bnb_adamw8/param"]
    last_place = np.spacing(np.abs(want).max())
    in_its_order, in_ours = (
        np.abs(x - want) / last_place
        for x in (params, adamw8_of_the_fixture(data, 6, find_codes=bnb_cpu_codes)[0])
    )
    assert in_its_order.max() <= 3 and np.sum(in_its_order > 1) < 0.005 * want.size
    assert in_ours.max() <= 4 and np.sum(in_ours > 1) > 0.02 * want.size


def test_the_first_step_is_that_of_float32():
    """The update is made of the moments before they are rounded."""
    data = golden("optim.npz")
    params, _ = adamw8_of_the_fixture(data, 1)
    np.testing.assert_allclose(params, data["bnb_adamw8/param_step1"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(params, data["torch_adamw/param_step1"], rtol=0, atol=1e-7)


# --- rounding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP], ids=["signed", "unsigned"])
def test_codes_are_the_nearest(levels):
    """Every midpoint, its neighbors in float32, every level, and random values."""
    middle = (levels[:-1] + levels[1:]) / np.float32(2)
    near = [np.nextafter(middle, np.float32(side)) for side in (-2, 2)]
    random = np.random.default_rng(0).uniform(levels[0], 1, 5000).astype(np.float32)
    values = np.concatenate([middle, *near, levels, random, random * 1e-5])
    codes = np.asarray(nearest_codes(jnp.asarray(values), levels))
    np.testing.assert_array_equal(codes, np.searchsorted(middle, values, side="left"))
    np.testing.assert_array_equal(codes[255 * 3 : 255 * 3 + 256], np.arange(256))


def test_stochastic_rounding_keeps_the_mean_and_what_fits():
    x = jnp.full(100_000, 1 + 2**-8 * 0.75, jnp.float32)  # 3/8 of the way to the next bfloat16
    rounded = round_stochastically(x, hash_bits(x.shape, jnp.int32(3), 0)).astype(jnp.float32)
    assert set(np.unique(rounded)) == {1.0, 1.0 + 2**-7}
    share = float(jnp.mean((rounded > 1).astype(jnp.float32)))
    assert share == pytest.approx(0.375, abs=4 * (0.375 * 0.625 / 1e5) ** 0.5)
    fits = jnp.float32([0.0, -0.0, 1.0, -3.5, 1e-30, jnp.inf, -jnp.inf]).astype(jnp.bfloat16)
    for noise in (0, 0x7FFF, 0xFFFF):
        kept = round_stochastically(fits.astype(jnp.float32), jnp.full(7, noise, jnp.uint32))
        assert same_bits(kept, fits)
    assert np.isnan(float(round_stochastically(jnp.float32(jnp.nan), jnp.uint32(0xFFFF))))


def test_noise_is_uniform_and_independent():
    """Of places, steps and streams, by their means and correlations."""
    rows = [hash_bits((64, 64), jnp.int32(c), s).reshape(-1) for c in range(6) for s in range(3)]
    noise = np.stack(rows).astype(np.float64) / 2**16 - 0.5
    assert np.abs(noise.mean(axis=1)).max() < 5 * (1 / 12 / 4096) ** 0.5
    correlation = np.corrcoef(np.concatenate([noise, np.roll(noise, 1, axis=1)]))
    assert np.abs(correlation - np.eye(36)).max() < 5 / 64
    assert noise.std() == pytest.approx((1 / 12) ** 0.5, rel=0.01)


def test_a_second_moment_in_bfloat16_shrinks_as_it_should():
    """Rounded to nearest it would stay at 1: a step takes a thousandth, half a gap is more."""
    optimizer = scale_by_adam_bfloat16(b2=0.999)
    params = jnp.zeros((64, 64))
    state: Any = optimizer.init(params)
    state = state._replace(nu=jnp.ones((64, 64), jnp.bfloat16))

    def step(state, _):
        return optimizer.update(params, state)[1], None

    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=500))(state)
    assert state.nu.dtype == jnp.bfloat16
    assert float(jnp.mean(state.nu.astype(jnp.float32))) == pytest.approx(0.999**500, rel=0.003)
    assert float((jnp.bfloat16(1) * 0.999).astype(jnp.bfloat16)) == 1.0


# --- what is held -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [((64, 64), (16,)), ((3, 64, 16), (3, 4)), ((2, 3, 10, 60), (2, 3, 3)), ((600,), (3,))],
)
def test_stacked_layers_are_held_as_if_alone(shape, blocks):
    """Each layer's moments, scale constants and updates are those of the layer by itself."""
    params = normal(shape)
    grads = gradients_like(params, 3)
    optimizer = adamw(1e-2, **BITS8)
    moved, state = steps(optimizer, params, grads)
    moment = state[0].mu
    assert moment.codes.shape == shape and moment.codes.dtype == jnp.uint8
    assert moment.absmax.shape == blocks and moment.absmax.dtype == jnp.float32
    if params.ndim > 2:
        alone, first = steps(optimizer, params[0], [g[0] for g in grads])
        np.testing.assert_array_equal(moved[0], alone)
        assert same_bits(jax.tree.map(lambda x: x[0], moment), first[0].mu)


def test_small_matrices_stay_float32():
    params = {"small": normal((63, 65)), "large": normal((64, 64)), "stack": normal((9, 16, 60))}
    params["scalar"] = jnp.float32(1)
    grads = gradients_like(params, 3)
    moved, state = steps(adamw(1e-2, state="8bit"), params, grads)
    held = {name: isinstance(moment, Moment8) for name, moment in state[0].nu.items()}
    assert held == {"small": False, "large": True, "stack": False, "scalar": False}
    plain, plain_state = steps(adamw(1e-2), params, grads)
    for name in ("small", "scalar", "stack"):
        np.testing.assert_allclose(moved[name], plain[name], atol=1e-7)
        np.testing.assert_allclose(state[0].nu[name], plain_state[0].nu[name], rtol=1e-6)


def test_bytes_a_parameter():
    params = jax.ShapeDtypeStruct((4, 1024, 1024), jnp.float32)
    size = {
        state: nbytes(jax.eval_shape(adamw(1e-3, state=state).init, params)) / 2**22
        for state in STATES
    }
    assert size == pytest.approx({"float32": 8, "bfloat16": 4, "8bit": 2 + 8 / 256}, abs=1e-5)


def test_an_8bit_update_holds_no_float32_moment_of_a_whole_leaf():
    """Beyond the update itself, a few chunks are there at once, however many leaves there are."""
    params = {str(i): jax.ShapeDtypeStruct((1024, 1024), jnp.float32) for i in range(4)}
    optimizer = adamw(1e-3, state="8bit")
    state = jax.eval_shape(optimizer.init, params)

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < nbytes(params) + 10e6
    assert memory.alias_size_in_bytes >= nbytes(params) + nbytes(state)


def test_an_unknown_state_is_refused():
    with pytest.raises(InputError, match="expected 'float32', 'bfloat16' or '8bit', found '4bit'"):
        adamw(1e-3, state="4bit")


# --- composed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{"state": "bfloat16"}, BITS8], ids=["bfloat16", "8bit"])
def test_moves_nearly_as_float32_does(kwargs):
    """Gradients with a steady direction: where they lead is where float32 leads."""
    params = {"q": pair(0, (2,)), "k": pair(5)}
    steady = gradients_like(params, 1)[0]
    grads = [jax.tree.map(lambda g, n: g + 0.2 * n, steady, n) for n in gradients_like(params, 20)]
    full: Any = {"weight_decay": 0.1, "clip_norm": 1.0, "lora_plus_ratio": 4.0}
    want, _ = steps(adamw(1e-3, **full), params, grads)
    got, _ = steps(adamw(1e-3, **full, **kwargs), params, grads)
    for x, y, start in zip(*map(jax.tree.leaves, (got, want, params)), strict=True):
        off = np.abs(np.asarray(x - y)).mean() / np.abs(np.asarray(y - start)).mean()
        assert off < 0.03


@pytest.mark.parametrize("kwargs", [{"state": "bfloat16"}, BITS8], ids=["bfloat16", "8bit"])
def test_lora_plus_scales_the_rate_of_b_alone(kwargs):
    params = {"q": pair(0)}
    grads = gradients_like(params, 1)
    plain, _ = steps(adamw(1e-3, **kwargs), params, grads)
    plus, _ = steps(adamw(1e-3, lora_plus_ratio=16.0, **kwargs), params, grads)
    np.testing.assert_array_equal(plus["q"].a, plain["q"].a)
    moved = plain["q"].b - params["q"].b
    np.testing.assert_allclose(plus["q"].b - params["q"].b, 16 * moved, rtol=2e-3)


@pytest.mark.parametrize("kwargs", [{"state": "bfloat16"}, BITS8], ids=["bfloat16", "8bit"])
def test_nothing_frozen_moves_and_nothing_is_kept_for_it(kwargs):
    joined = {"w": {"base": normal((64, 48)), "lora": pair(0)}, "norm": {"scale": jnp.ones(8)}}
    optimizer = train_only(adamw(0.1, weight_decay=0.5, lora_plus_ratio=4.0, **kwargs), lora_mask)
    grads = gradients_like(joined, 2)
    moved, state = steps(optimizer, joined, grads)
    assert same_bits(moved["w"]["base"], joined["w"]["base"])
    assert same_bits(moved["norm"], joined["norm"])
    alone = adamw(0.1, weight_decay=0.5, lora_plus_ratio=4.0, **kwargs)
    want, want_state = steps(alone, joined["w"]["lora"], [g["w"]["lora"] for g in grads])
    assert nbytes(state) == nbytes(want_state)
    assert_trees_close(moved["w"]["lora"], want, rtol=1e-6)


@pytest.mark.parametrize("kwargs", [{"state": "bfloat16"}, BITS8], ids=["bfloat16", "8bit"])
def test_two_forms_in_one_tree(kwargs):
    """`optax.partition` and `optax.masked` choose the form of each leaf."""
    params = {"embed": normal((64, 64)), "kernel": normal((64, 64), 1)}
    grads = gradients_like(params, 3)
    parts: Any = {"wide": adamw(1e-2), "narrow": adamw(1e-2, **kwargs)}
    moved, _ = steps(optax.partition(parts, {"embed": "wide", "kernel": "narrow"}), params, grads)
    for label, name in (("wide", "embed"), ("narrow", "kernel")):
        want, _ = steps(parts[label], params[name], [g[name] for g in grads])
        np.testing.assert_array_equal(moved[name], want)
    masked = optax.masked(parts["narrow"], {"embed": False, "kernel": True})
    assert nbytes(masked.init(params)) == nbytes(parts["narrow"].init(params["kernel"]))


@pytest.mark.parametrize("kwargs", [{"state": "bfloat16"}, BITS8], ids=["bfloat16", "8bit"])
def test_scan_over_steps_is_the_loop(kwargs):
    params = {"q": pair(0, (2,)), "bias": normal((5,), 3)}
    grads = gradients_like(params, 4)
    optimizer = adamw(1e-2, weight_decay=0.1, **kwargs)

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    start = (params, optimizer.init(params))
    scanned, _ = jax.jit(lambda start: jax.lax.scan(step, start, stacked))(start)
    looped = steps(optimizer, params, grads)
    assert jax.tree.structure(scanned) == jax.tree.structure(looped)
    assert_trees_close(scanned[0], looped[0], rtol=1e-6)
    unjitted = start
    for gradient in grads:
        unjitted, _ = step(unjitted, gradient)
    assert_trees_close(unjitted[0], looped[0], atol=1e-4)


@pytest.mark.parametrize("kwargs", [{"state": "bfloat16"}, BITS8], ids=["bfloat16", "8bit"])
def test_resumes_from_a_checkpoint_to_the_same_bits(kwargs, tmp_path):
    params = {"layers/q": pair(0, (2,)), "bias": normal((5,), 3)}
    grads = gradients_like(params, 6)
    optimizer = adamw(1e-2, weight_decay=0.1, lora_plus_ratio=2.0, **kwargs)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    now = (params, optimizer.init(params))
    shapes = jax.eval_shape(lambda: now)
    for i, gradient in enumerate(grads):
        if i == 3:
            checkpoint.save(tmp_path, i, now, identity={})
        now = step(*now, gradient)
    found = checkpoint.restore(tmp_path, shapes, identity={})
    assert found is not None and found[0] == 3
    resumed: Any = found[1]
    assert jax.tree.structure(resumed) == jax.tree.structure(now)
    for gradient in grads[3:]:
        resumed = step(*resumed, gradient)
    assert same_bits(resumed, now)
    dtypes = {str(x.dtype) for x in flatten_paths(now[1]).values()}
    assert dtypes >= ({"uint8"} if "min_8bit_size" in kwargs else {"bfloat16"})


def test_bfloat16_parameters_are_accepted():
    params = normal((64, 64), dtype=jnp.bfloat16)
    for state in STATES[1:]:
        moved, _ = steps(adamw(1e-1, state=state), params, [params])
        assert moved.dtype == jnp.bfloat16 and not np.array_equal(moved, params)
