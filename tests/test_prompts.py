# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens as adapters: where they start, attached, merged, and answering."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora.errors import InputError
from jax_qlora.generate import make_generator, pad_left
from jax_qlora.optim import adamw
from jax_qlora.optim.masks import lora_mask

from .tiny import Letters, quantized, tiny_model

KEY = jax.random.key(0)
STARTS = {"prompt": jq.init_prompt, "prefix": jq.init_prefix}


class Words(Letters):
    """A tokenizer that starts every text with token 1 and has one for each letter."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *(ord(letter) - 90 for letter in text)] if text else []}


@pytest.fixture(scope="module")
def model() -> Any:
    found = tiny_model(n_layers=2, embed_scale=True)
    return dataclasses.replace(found, tokenizer=Words())


@pytest.mark.parametrize(("kind", "quantization"), [("prompt", "dense"), ("prefix", "4 bits")])
def test_from_text_the_model_starts_as_one_that_has_read_it(
    model: Any, kind: str, quantization: str
):
    """Cut off at six tokens; and repeated up to six."""
    params = model.params if quantization == "dense" else quantized(model)[0]
    held, run = dataclasses.replace(model, params=params), jax.jit(model.hidden)
    tokens = jnp.asarray(np.random.default_rng(1).integers(3, 96, (2, 7), dtype=np.int32))
    for text, ids in (("obediently", [1, 21, 8, 11, 10, 15]), ("ab", [1, 7, 8, 1, 7, 8])):
        virtual = STARTS[kind](KEY, held, tokens=6, text=text)
        got = run(jq.attach(params, virtual), tokens)
        whole = jnp.concatenate([jnp.tile(jnp.asarray([ids], jnp.int32), (2, 1)), tokens], axis=1)
        np.testing.assert_allclose(got, run(params, whole)[:, 6:], atol=1e-4)


@pytest.mark.parametrize("kind", STARTS)
def test_other_starts(model: Any, kind: str):
    """From the vocabulary, what some text of the model's would give; or standard normal numbers."""
    shape = (50, 32) if kind == "prompt" else (2, 50, 2, 8)
    random = STARTS[kind](KEY, model, tokens=50, init="random")
    for entry in random.values():
        assert entry.values.shape == shape and entry.values.dtype == jnp.float32
        assert abs(float(jnp.std(entry.values)) - 1) < 0.1
    drawn, other = (STARTS[kind](key, model, tokens=50) for key in (KEY, jax.random.key(1)))
    for path, entry in drawn.items():
        assert entry.values.shape == shape and entry.values.dtype == jnp.float32
        assert not np.array_equal(entry.values, other[path].values)
    if kind == "prompt":
        table = model.params["embed_tokens"]["embedding"] * 32**0.5
        rows = drawn["prompt"].values
        distance = jnp.linalg.norm(rows[:, None] - table[None], axis=-1)
        assert float(distance.min(axis=1).max()) < 1e-4
    bad: list[tuple[dict[str, Any], str]] = [
        (dict(tokens=0), "0 virtual tokens: expected 1 to 63"),
        (dict(tokens=64), "64 virtual tokens: expected 1 to 63"),
        (dict(init="zeros"), "expected 'vocabulary' or 'random', or a text"),
        (dict(text=""), "text '' has no tokens"),
    ]
    for settings, message in bad:
        with pytest.raises(InputError, match=message):
            STARTS[kind](KEY, model, **settings)


def test_a_text_needs_a_tokenizer(model: Any):
    with pytest.raises(InputError, match="the model has no tokenizer"):
        jq.init_prompt(KEY, dataclasses.replace(model, tokenizer=None), text="hello")


@pytest.mark.parametrize("kind", STARTS)
def test_generation_is_the_argmax_of_the_whole_text(model: Any, kind: str):
    params = jq.attach(model.params, STARTS[kind](KEY, model, tokens=5))
    prompts = [[5, 17, 40, 9, 33], [21, 8]]
    generate = make_generator(model, max_new_tokens=4, eos_ids=())
    new = np.asarray(generate(params, *pad_left(prompts, multiple=4), KEY))
    apply = jax.jit(model.apply)
    for row, prompt in zip(new, prompts, strict=True):
        text = list(prompt)
        for token in row.tolist():
            logits = apply(params, jnp.array([text + [0] * (12 - len(text))]))
            assert token == int(jnp.argmax(logits[0, len(text) - 1]))
            text.append(token)
    alone = np.asarray(generate(model.params, *pad_left(prompts, multiple=4), KEY))
    assert not np.array_equal(new, alone)


@pytest.mark.parametrize("kind", STARTS)
def test_virtual_tokens_train_and_nothing_else(model: Any, kind: str):
    """A few steps of AdamW; state is allocated for them alone, and no leaf is taken for LoRA."""
    base, lora = quantized(model)
    adapter = STARTS[kind](KEY, model, tokens=4)
    tokens = jnp.asarray(np.random.default_rng(1).integers(3, 96, (4, 9), dtype=np.int32))
    optimizer = adamw(0.05, weight_decay=0.01, lora_plus_ratio=16.0)

    def loss(adapter: Any) -> jax.Array:
        logits = model.apply(jq.attach(base, adapter), tokens)[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -jnp.mean(chosen)

    @jax.jit
    @jax.numpy_dtype_promotion("standard")  # optax counts in integers
    def step(adapter: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(adapter)
        updates, state = optimizer.update(grads, state, adapter)
        return jax.tree.map(jnp.add, adapter, updates), state, value

    state, losses = optimizer.init(adapter), []
    size = sum(x.size for x in jax.tree.leaves(adapter))
    assert sum(x.size for x in jax.tree.leaves(state)) <= 2 * size + 2
    for _ in range(20):
        adapter, state, value = step(adapter, state)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    marked = lora_mask(lora | adapter)
    assert all(jax.tree.leaves(marked[path]) == [False] for path in adapter)


def test_attach_puts_them_beside_and_refuses_what_has_no_place(model: Any):
    base, lora = quantized(model)
    prompt = jq.init_prompt(KEY, model, tokens=3)
    params = jq.attach(base, lora | prompt)
    assert params["prompt"] is prompt["prompt"].values and "prompt" not in base
    assert params["norm"]["scale"] is base["norm"]["scale"]
    with pytest.raises(InputError, match="'prompt' has virtual tokens attached already"):
        jq.attach(params, prompt)
    prefix = jq.init_prefix(KEY, model, tokens=3)
    with pytest.raises(InputError, match="no place in the parameters"):
        jq.attach({"w": jnp.ones((2, 2))}, prefix)
    for refused in (
        lambda: jq.merge(base, lora | prompt),
        lambda: jq.unmerge(jq.merge(base), lora | prompt),
        lambda: jq.stack_adapters([lora | prompt]),
    ):
        with pytest.raises(InputError, match="found the virtual tokens 'prompt'"):
            refused()
    with pytest.raises(InputError, match="VirtualTokens: expected a LoraPair"):
        jq.combine_adapters([prompt, prompt], [0.5, 0.5], method="cat")
    assert "prompt" in jq.summary(base, lora | prompt)
    assert "trainable 96 of" in jq.summary(model.params, prompt)
    assert repr(prompt["prompt"]) == "VirtualTokens(3, 32)"


def test_rows_with_adapters_of_their_own_are_refused(model: Any):
    base, lora = quantized(model)
    stacked = jq.stack_adapters([lora])
    generate = make_generator(model, max_new_tokens=2)
    rows = jq.attach_many(jq.attach(base, jq.init_prompt(KEY, model)), stacked, jnp.array([0, -1]))
    with pytest.raises(InputError, match="over a base with virtual tokens"):
        generate(rows, *pad_left([[5, 6], [7]]), KEY)
