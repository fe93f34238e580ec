# SPDX-License-Identifier: Apache-2.0
"""Convolutional models written the way users of each library write them.

As in `zoo`, each function returns `(apply, params, args)` for `apply(params, *args)`. Sizes are
such that no activation and no factor of rank 5 has as many elements as a kernel.
"""

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

from tests.helpers import normal
from tests.lift.zoo import cast, randomized

CLASSES, LAYERS = 7, 2


class NNXBlock(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(8, 8, (3, 3), kernel_dilation=2, rngs=rngs)

    def __call__(self, x):
        return x + self.conv(nnx.relu(x))


class NNXNet(nnx.Module):
    """A strided stem, scanned residual blocks under remat, a depthwise convolution, a linear."""

    def __init__(self, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def make(rngs: nnx.Rngs):
            return NNXBlock(rngs=rngs)

        self.stem = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.blocks = make(rngs)
        self.depthwise = nnx.Conv(
            8, 16, (3, 3), feature_group_count=8, padding="VALID", use_bias=False, rngs=rngs
        )
        self.out = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(block, x):
            return block(x)

        x = run(self.blocks, self.stem(x))
        return self.out(nnx.relu(self.depthwise(x)).mean((1, 2)))


def nnx_net(dtype: Any = jnp.float32):
    abstract = nnx.eval_shape(lambda: NNXNet(rngs=nnx.Rngs(0)))
    graphdef, state, rest = nnx.split(abstract, nnx.Param, ...)
    params, rest = randomized(state, dtype), randomized(rest, dtype)

    def apply(params, x):
        return nnx.merge(graphdef, params, rest)(x)

    return apply, params, (cast(normal((2, 9, 9, 3), 1), dtype),)


class LinenNet(nn.Module):
    """Along a signal: causal, in two groups, of one sample, and transposed."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (5,), strides=2, padding="CAUSAL")(x))
        x = nn.relu(nn.Conv(8, (3,), kernel_dilation=2, feature_group_count=2)(x))
        x = nn.relu(nn.Conv(12, (1,), use_bias=False)(x))
        return nn.ConvTranspose(6, (4,), strides=(2,))(x)


def linen_net(dtype: Any = jnp.float32):
    model, x = LinenNet(), normal((2, 21, 4), 2)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
    return model.apply, randomized(variables, dtype), (cast(x, dtype),)


class EqxNet(eqx.Module):
    """Kernels `[out, in, height, width]`, an image at a time."""

    convs: list
    act: Any = eqx.field(static=True, default=jax.nn.relu)

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.convs = [
            eqx.nn.Conv2d(3, 8, 3, stride=2, padding=1, key=keys[0]),
            eqx.nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, key=keys[1]),
            eqx.nn.Conv2d(8, 12, 1, use_bias=False, key=keys[2]),
        ]

    def __call__(self, x):
        for conv in self.convs:
            x = self.act(conv(x))
        return x


def eqx_net(dtype: Any = jnp.float32):
    model = eqx.filter_eval_shape(EqxNet, jax.random.key(0))
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)  # noqa: E731
    shapes, static = eqx.partition(model, is_shape)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return apply, randomized(shapes, dtype), (cast(normal((2, 3, 9, 9), 3), dtype),)


def haiku_net(dtype: Any = jnp.float32):
    def forward(x):
        x = jax.nn.relu(hk.Conv2D(8, 3, stride=2)(x))
        x = jax.nn.relu(hk.Conv2D(8, (1, 3), rate=2, with_bias=False)(x))
        x = jax.nn.relu(hk.DepthwiseConv2D(2, 3)(x))
        return hk.Linear(CLASSES)(x.mean((1, 2)))

    model, x = hk.without_apply_rng(hk.transform(forward)), normal((2, 9, 9, 3), 4)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
    return model.apply, randomized(params, dtype), (cast(x, dtype),)


MODELS = {f.__name__: f for f in (nnx_net, linen_net, eqx_net, haiku_net)}
