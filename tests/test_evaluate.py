# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora.data.batches import make_batch
from jax_qlora.data.encode import Encoded
from jax_qlora.evaluate import (
    answer_loss,
    answer_width,
    assemble,
    held_out_batches,
    held_out_loss,
    split_answer,
)

from .helpers import assert_trees_close
from .tiny import tiny_model


def example(tokens, learned):
    mask = np.isin(np.arange(len(tokens)), learned)
    return Encoded(tokens=np.array(tokens, np.int32), loss_mask=mask)


EXAMPLES = [
    example([5, 17, 40, 9, 33, 2], [3, 4, 5]),
    example([21, 8, 30], [2]),
    example([60, 3, 70, 12, 2, 11, 13, 2], [1, 6, 7]),  # two turns
]


@pytest.fixture(scope="module")
def model():
    return tiny_model(n_layers=2)


def plain_loss(model, params):
    """Cross-entropy of the answer tokens, example by example, from all logits."""
    batch = make_batch(EXAMPLES, 8)
    likely = jax.nn.log_softmax(model.apply(params, jnp.asarray(batch["tokens"]))[:, :-1])
    total, count = jnp.float32(0), 0
    for row, encoded in zip(likely, EXAMPLES, strict=True):
        picked = row[np.arange(len(encoded) - 1), encoded.tokens[1:]]
        total -= jnp.sum(jnp.where(encoded.loss_mask[1:], picked, 0.0))
        count += int(encoded.loss_mask.sum())
    return total / count


@pytest.fixture(scope="module")
def expected(model):
    return jax.jit(jax.value_and_grad(lambda params: plain_loss(model, params)))(model.params)


@pytest.mark.parametrize("chunk", [1024, 5, 2])
def test_loss_and_gradients_are_those_of_all_logits(model, expected, chunk):
    batch = make_batch(EXAMPLES, 10)

    @jax.jit
    @jax.value_and_grad
    def loss(params, batch):
        width = answer_width(EXAMPLES)
        total, count = answer_loss(model, params, batch, width=width, chunk=chunk)
        assert count.dtype == total.dtype == jnp.float32
        return total / count

    assert_trees_close(loss(model.params, batch), expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def loss(model):
    def loss(batch, width):
        return answer_loss(model, model.params, batch, width=width)

    return jax.jit(loss, static_argnames="width")


def test_a_larger_width_changes_nothing(loss):
    assert answer_width(EXAMPLES) == 4
    assert answer_width(EXAMPLES, multiple=1) == 3
    results = [loss(make_batch(EXAMPLES, 10), width) for width in (3, 4, 9)]
    assert [float(count) for _, count in results] == [7.0, 7.0, 7.0]
    np.testing.assert_allclose(
        [float(total) for total, _ in results], float(results[0][0]), rtol=1e-6
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_held_out_loss_counts_every_token_once(model, loss, batch_size):
    batches = held_out_batches(EXAMPLES, batch_size=batch_size, length_multiple=4)
    assert {batch["tokens"].shape for batch in batches} == {(batch_size, 8)}
    found = held_out_loss(lambda batch: loss(batch, 4), batches)
    assert found == pytest.approx(float(plain_loss(model, model.params)), rel=1e-5)
    assert np.isnan(
        held_out_loss(lambda batch: (jnp.ones(()), jnp.ones(())), batches, stop=lambda: True)
    )


def test_assemble(model):
    targets = jq.find_targets(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    adapter = jq.init_adapter(jax.random.key(0), targets, rank=2)
    assert assemble(model.params, None) is model.params
    tree = assemble(adapter, model.params)
    assert isinstance(tree["layers"]["mlp"]["up_proj"]["kernel"], jq.LoraArray)


def test_split_answer():
    prompts = [split_answer(encoded) for encoded in EXAMPLES]
    assert [p.tolist() for p, _ in prompts] == [[5, 17, 40], [21, 8], [60, 3, 70, 12, 2, 11]]
    assert [a.tolist() for _, a in prompts] == [[9, 33, 2], [30], [13, 2]]
