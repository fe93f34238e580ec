# SPDX-License-Identifier: Apache-2.0
"""The table of a tree: every parameter, how it is held, and what of it trains."""

import jax
import jax.numpy as jnp
import pytest

import jax_qlora as jq
from jax_qlora.tree import nbytes


@pytest.fixture
def parts(key):
    params = {
        "norm": jnp.ones(64, jnp.bfloat16),
        "up": jax.random.normal(key, (2, 64, 128)),
        "down": jax.random.normal(key, (2, 128, 64)),
    }

    def apply(p, x):
        x, _ = jax.lax.scan(
            lambda x, w: (x @ w["up"] @ w["down"], None), x, {k: p[k] for k in ("up", "down")}
        )
        return x * p["norm"].astype(x.dtype)[None]

    targets = jq.find_targets(apply, params, jnp.ones((1, 64)))
    base = jq.quantize(params, targets.select(["up"]))
    return base, jq.init_adapter(key, targets, rank=4)


def rows(text):
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()[2:-1]}


def test_every_parameter_its_storage_and_its_update(parts):
    base, adapter = parts
    text = jq.summary(jq.attach(base, adapter))
    assert text.splitlines()[0].split() == ["path", "shape", "format", "bits", "rank", "trainable"]
    table = rows(text)
    assert table["norm"] == ["64", "bfloat16", "16.000"]
    assert table["down"] == ["2x128x64", "float32", "32.000", "4", "1,536"]
    assert table["up"] == ["2x64x128", "nf4", "b64", "dq", "4.133", "4", "1,536"]
    total = 64 + 2 * 2 * 64 * 128
    share = 100 * 3072 / (total + 3072)
    assert f"trainable 3,072 of {total + 3072:,} parameters ({share:.3f}%)" in text
    assert f"{(nbytes(base) + nbytes(adapter)) / 2**20:,.1f} MiB held" in text


def test_base_and_adapter_apart_say_the_same(parts):
    base, adapter = parts
    assert jq.summary(base, adapter) == jq.summary(jq.attach(base, adapter))
    assert "trainable 0 of" in jq.summary(base)
    assert rows(jq.summary(adapter))["up"] == ["4", "1,536"]


def test_shapes_are_enough(parts):
    base, adapter = parts
    assert jq.summary(jax.eval_shape(lambda: base), adapter) == jq.summary(base, adapter)


def test_leaves_that_are_no_arrays_are_left_out(parts):
    base, _ = parts
    text = jq.summary({**base, "activation": jax.nn.relu, "eps": 1e-5, "key": jax.random.key(0)})
    assert "activation" not in text and "eps" not in text
    assert rows(text)["key"][0] == "key<fry>"
