# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning and prefix tuning: virtual tokens before every text, which train; no weight does.

Of a prompt the embeddings train, of a prefix the keys and values in every layer. Both are entries
of an adapter: `attach(base, prompt)`, or `attach(base, lora | prompt)` with LoRA beside.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .errors import InputError
from .lift import lift
from .lora import Adapter, VirtualTokens
from .models import PREFIX, PROMPT, Model
from .typing import Array, Int, Key


def init_prompt(
    key: Key[Array, ""],
    model: Model,
    *,
    tokens: int = 20,
    init: str = "vocabulary",
    text: str | None = None,
) -> Adapter:
    """A prompt: embeddings that the model reads before every text.

    Args:
        key: Random key.
        model: The decoder it is for; its `params`, quantized or not, are the frozen base.
        tokens: How many.
        init: "vocabulary", embeddings of tokens drawn from the vocabulary; "random", standard
            normal, as PEFT draws them, which is far from any token.
        text: Embeddings of this text's tokens instead, repeated or cut off: the model then starts
            as one that has read it.

    Returns:
        An adapter of one entry, float32 `[tokens, d_model]`.

    Raises:
        InputError: no token, no such `init`, or a text that has no tokens.

    References:
        Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning (arXiv 2104.08691),
        sections 2 and 3.2; `PromptEmbedding` of PEFT.
    """
    ids = _start(key, model, tokens, init, text)
    if ids is None:
        shape = (tokens, model.config.d_model)
        return {PROMPT: VirtualTokens(jax.random.normal(key, shape, jnp.float32))}

    def look_up(table: Array, ids: Array) -> Array:
        return jnp.take(table, ids, axis=0)

    dtype = model.compute_dtype  # as the decoder looks a token up
    scale = jnp.asarray(model.config.d_model**0.5 if model.config.embed_scale else 1.0, dtype)
    rows = lift(look_up)(model.params["embed_tokens"]["embedding"], ids).astype(dtype) * scale
    return {PROMPT: VirtualTokens(rows.astype(jnp.float32))}


def init_prefix(
    key: Key[Array, ""],
    model: Model,
    *,
    tokens: int = 20,
    init: str = "vocabulary",
    text: str | None = None,
) -> Adapter:
    """A prefix: keys and values that the model sees before every text, in every layer.

    Args:
        key: Random key.
        model: The decoder it is for; its `params`, quantized or not, are the frozen base.
        tokens: How many.
        init: "vocabulary", what the model computes for tokens drawn from the vocabulary; "random",
            standard normal, as PEFT draws them.
        text: What it computes for this text's tokens instead, repeated or cut off: the model then
            starts as one that has read it.

    Returns:
        An adapter of two entries, each float32 `[n_layers, tokens, n_kv_heads, head_dim]`. Keys are
        as after the rotation: no position is added to them.

    Raises:
        InputError: no token, no such `init`, or a text that has no tokens.

    References:
        Li and Liang, Prefix-Tuning (arXiv 2101.00190), sections 4 and 7.4; `PrefixEncoder` of PEFT.
    """
    ids = _start(key, model, tokens, init, text)
    if ids is None:
        config = model.config
        shape = (config.n_layers, tokens, config.n_kv_heads, config.head_dim)
        k, v = (jax.random.normal(part, shape, jnp.float32) for part in jax.random.split(key))
    else:
        k, v = _keys_values(model, ids)
    return {f"{PREFIX}/k": VirtualTokens(k), f"{PREFIX}/v": VirtualTokens(v)}


def _keys_values(model: Model, ids: Int[Array, " tokens"]) -> tuple[Array, Array]:
    """What a cache holds of some tokens, `[layers, tokens, n_kv_heads, head_dim]` each."""
    cache = model.init_cache(1, ids.shape[0])
    _, cache = jax.jit(model.decode_hidden)(model.params, ids[None], cache)
    k, v = (jnp.swapaxes(x[:, 0], 1, 2).astype(jnp.float32) for x in (cache.k, cache.v))
    return k, v


def _start(
    key: Key[Array, ""], model: Model, tokens: int, init: str, text: str | None
) -> Int[Array, " tokens"] | None:
    """The tokens to start from, or None for random values."""
    if not (isinstance(tokens, int) and 1 <= tokens < model.config.max_length):
        raise InputError(
            f"{tokens!r} virtual tokens: expected 1 to {model.config.max_length - 1}, so that the "
            "model's context has room for a text. 10 to 100 are common."
        )
    if text is not None:
        return jnp.asarray(_text_ids(model, text, tokens))
    if init not in ("vocabulary", "random"):
        raise InputError(f"init {init!r}: expected 'vocabulary' or 'random', or a text.")
    if init == "random":
        return None
    return jax.random.randint(key, (tokens,), 0, model.config.vocab_size, jnp.int32)


def _text_ids(model: Model, text: str, tokens: int) -> Int[np.ndarray, " tokens"]:
    """A text as exactly so many token ids: cut off, or repeated.

    Args:
        model: Its tokenizer is used, with the special tokens that it adds.
        text: The text.
        tokens: How many.

    Raises:
        InputError: the model has no tokenizer, or the text no tokens.
    """
    if model.tokenizer is None:
        raise InputError(
            "text: the model has no tokenizer to read it with: expected one beside its weights. "
            "Start from init='vocabulary'."
        )
    ids = list(model.tokenizer(text)["input_ids"])
    if not ids:
        raise InputError(f"text {text!r} has no tokens: expected some words. Start from others.")
    return np.resize(np.asarray(ids, np.int32), tokens)
