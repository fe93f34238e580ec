# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora.errors import InputError
from jax_qlora.generate import Sampling, answer, make_generator, pad_left, sample

from .tiny import quantized, tiny_model

PROMPTS = [[5, 17, 40, 9, 33], [21, 8], [60, 3, 70]]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    return tiny_model(n_layers=2)


@pytest.fixture(scope="module")
def apply(model):
    return jax.jit(model.apply)


def greedy_by_hand(apply, params, prompt, count):
    """Run the whole text again for each token, without a cache; what follows it has no effect."""
    tokens = list(prompt)
    for _ in range(count):
        logits = apply(params, jnp.array([tokens + [0] * (16 - len(tokens))]))
        tokens.append(int(jnp.argmax(logits[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_greedy_is_the_argmax_of_the_whole_text(model, apply):
    """Padding, the cache and the batch change nothing."""
    generate = make_generator(model, max_new_tokens=6, eos_ids=())
    new = generate(model.params, *pad_left(PROMPTS, multiple=8), KEY)
    for row, prompt in zip(np.asarray(new), PROMPTS, strict=True):
        assert row.tolist() == greedy_by_hand(apply, model.params, prompt, 6)


def test_quantized_with_adapters_swapped_without_compiling_again(model, apply):
    base, adapter = quantized(model)
    generate = make_generator(model, max_new_tokens=4, eos_ids=())
    fresh = jax.tree.map(jnp.zeros_like, adapter)
    rows = {}
    for name, pairs in {"tuned": adapter, "base": fresh}.items():
        params = jq.attach(base, pairs)
        rows[name] = np.asarray(generate(params, *pad_left(PROMPTS, multiple=8), KEY))
        dense = jq.merge(base, pairs)
        assert rows[name][0].tolist() == greedy_by_hand(apply, dense, PROMPTS[0], 4)
    assert not np.array_equal(rows["tuned"], rows["base"])
    assert generate._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


def test_stops_at_the_end_token(model):
    """A row repeats its end token to the end, and the others go on."""
    free = make_generator(model, max_new_tokens=8, eos_ids=())
    batch = pad_left(PROMPTS, multiple=8)
    rows = np.asarray(free(model.params, *batch, KEY)).tolist()
    end = next(t for t in rows[0] if any(t not in row for row in rows[1:]))
    cut = np.asarray(
        make_generator(model, max_new_tokens=8, eos_ids=[end])(model.params, *batch, KEY)
    )
    for row, whole in zip(cut.tolist(), rows, strict=True):
        if end in whole:
            first = whole.index(end)
            assert row == whole[: first + 1] + [end] * (7 - first)
        else:
            assert row == whole


def test_all_rows_ended_early(model, apply):
    tokens, mask = pad_left([PROMPTS[0]], multiple=8)
    first = greedy_by_hand(apply, model.params, PROMPTS[0], 1)
    generate = make_generator(model, max_new_tokens=5, eos_ids=first)
    assert np.asarray(generate(model.params, tokens, mask, KEY)).tolist() == [first * 5]


def test_answers_are_text_and_batches_change_nothing(model):
    generate = make_generator(model, max_new_tokens=6)
    counts = []
    texts = answer(generate, model, model.params, PROMPTS, key=KEY, batch_size=2,
                   on_batch=counts.append)  # fmt: skip
    assert counts == [2, 3]
    alone = [answer(generate, model, model.params, [p] * 2, key=KEY)[0] for p in PROMPTS]
    assert texts == alone
    assert all(text.isalpha() for text in texts)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.3, top_k=1),
        Sampling(temperature=1.3, top_p=1e-6),
        Sampling(temperature=1e-4),
    ],
)
def test_narrow_sampling_is_greedy(key, sampling):
    logits = jax.random.normal(key, (5, 50))
    np.testing.assert_array_equal(sample(logits, sampling, key), jnp.argmax(logits, axis=-1))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(temperature=0.5), [0.7246, 0.1812, 0.0652, 0.029]),
        (Sampling(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.74), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.76), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
    ],
)
def test_sampled_frequencies(key, sampling, expected):
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
    keys = jax.random.split(key, 20_000)
    drawn = jax.jit(jax.vmap(lambda key: sample(logits, sampling, key)[0]))(keys)
    found = np.bincount(np.asarray(drawn), minlength=4) / len(keys)
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert not found[np.array(expected) == 0].any()


def test_the_key_decides(model):
    generate = make_generator(model, max_new_tokens=12, sampling=Sampling(temperature=2.0))
    batch = pad_left(PROMPTS, multiple=8)
    first, again, other = (
        np.asarray(generate(model.params, *batch, jax.random.key(seed))) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected at least 0, found -1.0"),
        ({"temperature": float("nan")}, "temperature: expected at least 0"),
        ({"top_k": -2}, "top_k: expected at least 0"),
        ({"top_p": 0.0}, "top_p: expected above 0 and at most 1, found 0.0"),
    ],
)
def test_bad_sampling(model, settings, message):
    with pytest.raises(InputError, match=message):
        make_generator(model, max_new_tokens=4, sampling=Sampling(**settings))


def test_bad_lengths(model):
    with pytest.raises(InputError, match="max_new_tokens: expected at least 1, found 0"):
        make_generator(model, max_new_tokens=0)
    with pytest.raises(InputError, match="Prompt 2 is empty"):
        pad_left([[1], []])
    generate = make_generator(model, max_new_tokens=model.config.max_length)
    with pytest.raises(InputError, match="the model's context"):
        generate(model.params, *pad_left(PROMPTS), KEY)


def test_a_batch_whose_rows_use_different_adapters(model):
    """Prefill and cache, each row under its own adapter; one compilation whoever gets which."""
    base, adapter = quantized(model)
    adapters = {"one": adapter, "two": jax.tree.map(lambda x: -1.5 * x, adapter)}
    stacked = jq.stack_adapters(adapters)
    generate = make_generator(model, max_new_tokens=5, eos_ids=())
    batch = pad_left(PROMPTS, multiple=8)
    alone = {
        name: np.asarray(generate(jq.attach(base, pairs), *batch, KEY))
        for name, pairs in {**adapters, None: jax.tree.map(jnp.zeros_like, adapter)}.items()
    }
    assert len({rows.tobytes() for rows in alone.values()}) == 3
    compiled = generate._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    for names in (["two", "one", None], [None, "two", "one"]):
        params = jq.attach_many(base, stacked, jq.adapter_index(adapters, names))
        rows = np.asarray(generate(params, *batch, KEY))
        for row, name in enumerate(names):
            np.testing.assert_array_equal(rows[row], alone[name][row])
    assert generate._cache_size() == compiled + 1  # pyright: ignore[reportFunctionMemberAccess]
