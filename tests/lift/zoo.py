# SPDX-License-Identifier: Apache-2.0
"""Models written the way users of each library write them; none knows of this project.

Each function returns `(apply, params, args)` for `apply(params, *args)`, all floats in `dtype`.
"""

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.helpers import normal

D, FF, HEADS, LAYERS, VOCAB = 32, 64, 2, 2, 24
TOKENS = jnp.asarray(np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]))


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def randomized(tree: Any, dtype: Any) -> Any:
    """The arrays of `tree` with NumPy's numbers, scaled by their fan-in: nothing is compiled."""
    leaves, treedef = jax.tree.flatten(tree)
    fresh = [
        normal(x.shape, i) / (x.shape[-2] if x.ndim > 1 else 1) ** 0.5
        if jnp.issubdtype(x.dtype, jnp.floating)
        else jnp.zeros(x.shape, x.dtype)
        for i, x in enumerate(leaves)
    ]
    return cast(jax.tree.unflatten(treedef, fresh), dtype)


# --- Flax NNX: nnx.scan over stacked layers, nnx.remat, an output head of its own or tied -------


class NNXLayer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)
        self.up = nnx.Linear(D, FF, rngs=rngs)
        self.down = nnx.Linear(FF, D, use_bias=False, rngs=rngs)

    def __call__(self, x):
        h = self.norm(x)
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attn(h, mask=mask)
        return x + self.down(nnx.silu(self.up(h)))


class NNXDecoder(nnx.Module):
    def __init__(self, *, tied: bool, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def make(rngs: nnx.Rngs):
            return NNXLayer(rngs=rngs)

        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        self.layers = make(rngs)
        self.head = None if tied else nnx.Linear(D, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(layer, x):
            return layer(x)

        x = run(self.layers, self.embed(tokens))
        return self.embed.attend(x) if self.head is None else self.head(x)


def nnx_decoder(dtype: Any = jnp.float32, *, tied: bool = False):
    abstract = nnx.eval_shape(lambda: NNXDecoder(tied=tied, rngs=nnx.Rngs(0)))
    graphdef, state, rest = nnx.split(abstract, nnx.Param, ...)
    params = randomized(state, dtype)
    rest = randomized(rest, dtype)

    def apply(params, tokens):
        return nnx.merge(graphdef, params, rest)(tokens)

    return apply, params, (TOKENS,)


def nnx_tied(dtype: Any = jnp.float32):
    return nnx_decoder(dtype, tied=True)


# --- Flax linen: nn.scan, nn.remat, DenseGeneral and MultiHeadDotProductAttention ---------------


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(h, deterministic=True)
        h = nn.DenseGeneral((2, FF), axis=-1)(h)
        h = h[:, :, 0] * nn.gelu(h[:, :, 1])
        h = h.reshape(*h.shape[:-1], 4, FF // 4)
        return x + nn.DenseGeneral(D, axis=(-2, -1), use_bias=False)(h), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens, train: bool = False):
        x = nn.Embed(VOCAB, D)(tokens)
        layers = nn.scan(
            nn.remat(LinenLayer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = layers()(x, None)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(VOCAB)(x)


def linen_model(dtype: Any = jnp.float32):
    model = LinenModel()
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS))
    return model.apply, randomized(variables, dtype), (TOKENS,)


# --- Equinox: modules as parameters, lax.scan over stacked layers -------------------------------


class EqxLayer(eqx.Module):
    attn: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        k1, k2 = jax.random.split(key)
        self.attn = eqx.nn.MultiheadAttention(HEADS, D, key=k1)
        self.mlp = eqx.nn.MLP(D, D, FF, 1, key=k2)

    def __call__(self, x):
        x = x + self.attn(x, x, x)
        return x + jax.vmap(self.mlp)(x)


class EqxModel(eqx.Module):
    embed: eqx.nn.Embedding
    layers: EqxLayer
    head: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCAB, D, key=k1)
        self.layers = eqx.filter_vmap(EqxLayer)(jax.random.split(k2, LAYERS))
        self.head = eqx.nn.Linear(D, VOCAB, key=k3)

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        arrays, rest = eqx.partition(self.layers, eqx.is_array)

        @jax.checkpoint
        def step(x, arrays):
            return eqx.combine(arrays, rest)(x), None

        x, _ = jax.lax.scan(step, x, arrays)
        return jax.vmap(self.head)(x)


def eqx_model(dtype: Any = jnp.float32):
    model = eqx.filter_eval_shape(EqxModel, jax.random.key(0))
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)  # noqa: E731
    shapes, static = eqx.partition(model, is_shape)
    params = randomized(shapes, dtype)

    def apply(params, tokens):
        return jax.vmap(eqx.combine(params, static))(tokens)

    return apply, params, (TOKENS,)


# --- Haiku: transform, layer_stack, remat -------------------------------------------------------


def haiku_model(dtype: Any = jnp.float32):
    def forward(tokens):
        x = hk.Embed(VOCAB, D)(tokens)

        def layer(x):
            h = hk.LayerNorm(-1, True, True)(x)
            x = x + hk.MultiHeadAttention(HEADS, D // HEADS, w_init=hk.initializers.Constant(0))(
                h, h, h
            )
            h = hk.remat(lambda h: hk.Linear(D)(jax.nn.relu(hk.Linear(FF)(h))))(h)
            return x + h

        x = hk.experimental.layer_stack(LAYERS)(layer)(x)
        return hk.Linear(VOCAB)(x)

    model = hk.without_apply_rng(hk.transform(forward))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS))
    return model.apply, randomized(params, dtype), (TOKENS,)


# --- plain jax ---------------------------------------------------------------------------------


def einsum_kernels(dtype: Any = jnp.float32):
    """Kernels with several input or output axes, in several orders."""
    params = {
        "qkv": normal((3, D, HEADS, 16), 1) / 6,  # the three are outputs: one kernel, no lead axis
        "out": normal((HEADS, 16, D), 2) / 6,
        "mixed": normal((4, D, 8), 3) / 6,  # contracted in the middle
        "ends": normal((4, D, 8), 4) / 6,  # contracted at both ends
        "left": normal((FF, D), 5) / 6,
        "swapped": normal((D, FF), 6) / 8,  # used transposed
    }

    def apply(p, x):
        q, k, v = jnp.einsum("btd,cdnh->cbtnh", x, p["qkv"])
        scores = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
        x = x + jnp.einsum("nhd,bnts,bsnh->btd", p["out"], scores, v)
        h = jnp.einsum("btd,edf->btfe", x, p["mixed"])
        x = x + jnp.einsum("edf,btfe->btd", p["ends"], jax.nn.relu(h))
        h = jax.nn.relu(p["left"] @ jnp.moveaxis(x, -1, -2))
        return jnp.moveaxis(h, -1, -2) @ p["swapped"].T

    return apply, cast(params, dtype), (cast(normal((2, 5, D), 7), dtype),)


def experts(dtype: Any = jnp.float32):
    """A mixture of experts: kernels stacked by expert, in layers stacked again."""
    n = 4
    params = {
        "router": normal((LAYERS, D, n), 1) / 6,
        "up": normal((LAYERS, n, D, FF), 2) / 6,
        "down": normal((LAYERS, n, FF, D), 3) / 8,
    }

    def apply(p, x):
        def layer(x, p):
            weights = jax.nn.softmax(x @ p["router"])
            slots = jnp.einsum("te,td->etd", weights, x)
            h = jax.nn.silu(jnp.einsum("etd,edf->etf", slots, p["up"]))
            return x + jax.vmap(jnp.matmul)(h, p["down"]).sum(0), None

        return jax.lax.scan(layer, x, p)[0]

    return apply, cast(params, dtype), (cast(normal((6, D), 4), dtype),)


def chosen_experts(dtype: Any = jnp.float32):
    """Each token fetches the kernel of its expert: a gather over the expert axis."""
    params = {"w": normal((4, D, FF), 1) / 6, "v": normal((4, FF, D), 2) / 8}
    ids = jnp.asarray(np.array([2, 0, 3, 2, 1, 1]))

    def apply(p, x, ids):
        h = jnp.einsum("td,tdf->tf", x, jnp.take(p["w"], ids, axis=0))
        return jnp.einsum("tf,tfd->td", jax.nn.relu(h), p["v"][ids])

    return apply, cast(params, dtype), (cast(normal((6, D), 3), dtype), ids)


def loops(dtype: Any = jnp.float32):
    """A stacked kernel indexed in Python, in fori_loop, in while_loop; a kernel carried along."""
    params = {
        "python": normal((LAYERS, D, D), 1) / 6,
        "fori": normal((LAYERS, D, D), 2) / 6,
        "while": normal((D, D), 3) / 6,
        "carried": normal((D, D), 4) / 6,
        "shared": normal((D, D), 5) / 6,
    }

    def apply(p, x):
        for i in range(LAYERS):
            x = jnp.tanh(x @ p["python"][i])
        x = jax.lax.fori_loop(0, LAYERS, lambda i, x: jnp.tanh(x @ p["fori"][i]), x)

        def body(state):
            i, w, x = state
            return i + 1, w, jnp.tanh(x @ p["while"] + x @ w)

        # differentiated in x only after the loop: reverse mode does not pass a while_loop
        stopped = jax.lax.stop_gradient(x)
        *_, y = jax.lax.while_loop(lambda s: s[0] < 2, body, (0, p["carried"], stopped))

        def step(carry, _):
            w, x = carry
            return (w, jnp.tanh(x @ w)), x.sum()

        (_, x), sums = jax.lax.scan(step, (p["shared"], x), None, length=3)
        return x + jax.lax.stop_gradient(y), sums

    return apply, cast(params, dtype), (cast(normal((5, D), 6), dtype),)


def branches(dtype: Any = jnp.float32):
    """Kernels used in conditionals: different ones, the same one, under a traced predicate."""
    params = {"a": normal((D, D), 1) / 6, "b": normal((D, D), 2) / 6, "c": normal((D, D), 3) / 6}

    def apply(p, x):
        x = jax.lax.cond(x.sum() > 0, lambda: x @ p["a"], lambda: jnp.tanh(x @ p["b"]))
        return jax.lax.switch(
            jnp.asarray(1),
            [lambda w, x: x, lambda w, x: x @ w, lambda w, x: x @ w.T],
            p["c"],
            x,
        )

    return apply, cast(params, dtype), (cast(normal((5, D), 4), dtype),)


def custom_rules(dtype: Any = jnp.float32):
    """Functions with derivative rules of their own, with kernels inside and outside."""
    params = {"a": normal((D, FF), 1) / 6, "b": normal((FF, D), 2) / 8}

    @jax.custom_jvp
    def square(x):
        return x * x

    square.defjvp(lambda primals, tangents: (square(*primals), 2 * primals[0] * tangents[0]))

    @jax.custom_vjp
    def linear(x, w):
        return x @ w

    linear.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))

    @jax.custom_jvp
    def project(x, w):
        return x @ w

    @project.defjvp
    def _(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        return x @ w, dx @ w + x @ dw

    def apply(p, x):
        return project(square(linear(x, p["a"])), p["b"])

    return apply, cast(params, dtype), (cast(normal((5, D), 3), dtype),)


def rearranged(dtype: Any = jnp.float32):
    """Casts, new axes of size one, reshapes and transposes between a kernel and its use."""
    params = {"a": normal((1, D, 1, FF), 1) / 6, "b": normal((8, 8, D), 2) / 8, "c": normal((D, 1))}

    def apply(p, x):
        h = x @ p["a"].reshape(D, FF).astype(x.dtype)
        h = jnp.einsum("btf,fd->btd", h, p["b"].reshape(FF, D)[None][0])
        return h @ jnp.squeeze(p["c"], 1)

    return apply, cast(params, dtype), (cast(normal((2, 5, D), 3), dtype),)


MODELS = {
    f.__name__: f
    for f in (
        nnx_decoder,
        nnx_tied,
        linen_model,
        eqx_model,
        haiku_model,
        einsum_kernels,
        experts,
        chosen_experts,
        loops,
        branches,
        custom_rules,
        rearranged,
    )
}
