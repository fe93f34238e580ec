# SPDX-License-Identifier: Apache-2.0
"""Text from a decoder: prefill the prompts once, then one token at a time from the KV cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from .errors import InputError
from .lora import RowAdapters, over_rows
from .models import Model, count_virtual
from .models.decoder import Cache
from .typing import Array, ArrayLike, Bool, Float, Int, Key, PyTree

Generator = Callable[[PyTree, ArrayLike, ArrayLike, Array], Array]
"""`(params, tokens, attention_mask, key) -> new tokens [batch, max_new_tokens]`, jitted."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token (greedy).
        top_k: Choose among this many likeliest tokens; 0 is no limit.
        top_p: Choose among the fewest likeliest tokens whose probabilities sum to this.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


GREEDY = Sampling()

CACHE_AXES = Cache(k=1, v=1, valid=0, length=None)  # type: ignore[arg-type]
"""The axis of the batch in each part of a cache."""


def make_generator(
    model: Model,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_ids: Sequence[int] | None = None,
) -> Generator:
    """Return a jitted function that continues a batch of left-padded prompts.

    It takes any parameter tree the model runs on, so one function serves the base, an adapter
    attached to it, merged weights, and an adapter for each row (`attach_many`); trees of equal
    structure share one compilation.

    Args:
        model: The decoder.
        max_new_tokens: Tokens to generate at most.
        sampling: How to choose them.
        eos_ids: Tokens that end a text, the model's own by default; empty never stops early.

    Returns:
        `generate(params, tokens, attention_mask, key)` with int32 tokens and a bool mask, both
        `[batch, seq]` and padded on the left. It gives int32 `[batch, max_new_tokens]`; a row
        holds its end token, once reached, and repeats it to the end.

    Raises:
        InputError: A sampling setting out of range; or, when called, rows that have adapters of
            their own over a base with virtual tokens.
    """
    _check_sampling(sampling, max_new_tokens)
    ends = model.config.eos_token_ids if eos_ids is None else tuple(eos_ids)
    fill = ends[0] if ends else 0
    decode = over_rows(model.decode_hidden, in_axes=(0, CACHE_AXES), out_axes=(0, CACHE_AXES))
    head = over_rows(model.head)

    def is_end(token: Array) -> Array:
        return jnp.isin(token, jnp.array(ends, jnp.int32)) if ends else jnp.zeros_like(token, bool)

    @jax.jit
    def generate(
        params: PyTree,
        tokens: Int[Array, "batch seq"],
        attention_mask: Bool[Array, "batch seq"],
        key: Key[Array, ""],
    ) -> Int[Array, "batch new"]:
        batch, seq = tokens.shape
        if isinstance(params, RowAdapters) and count_virtual(params.base, model.config):
            raise InputError(
                "Adapters of rows over a base with virtual tokens: expected a base without. Answer "
                "with one adapter at a time: attach(base, adapter | prompt)."
            )
        cache = model.init_cache(batch, seq + max_new_tokens, params)
        hidden, cache = decode(params, tokens, cache, attention_mask=attention_mask)

        def choose(hidden: Array, step: Array) -> Array:
            logits = head(params, hidden)
            return sample(logits, sampling, jax.random.fold_in(key, step))

        first = choose(hidden[:, -1], jnp.int32(0))
        out = jnp.full((batch, max_new_tokens), fill, jnp.int32).at[:, 0].set(first)

        def unfinished(carry: tuple) -> Array:
            step, _, done, _, _ = carry
            return (step < max_new_tokens) & ~jnp.all(done)

        def advance(carry: tuple) -> tuple:
            step, token, done, cache, out = carry
            hidden, cache = decode(params, token[:, None], cache)
            token = jnp.where(done, token, choose(hidden[:, 0], step))
            out = jax.lax.dynamic_update_slice(out, token[:, None], (jnp.int32(0), step))
            return step + jnp.int32(1), token, done | is_end(token), cache, out

        carry = (jnp.int32(1), first, is_end(first), cache, out)
        step, token, done, _, out = jax.lax.while_loop(unfinished, advance, carry)
        written = jnp.arange(max_new_tokens) < step
        return jnp.where(written[None], out, token[:, None])

    return generate


def sample(
    logits: Float[Array, "batch vocab"], sampling: Sampling, key: Key[Array, ""]
) -> Int[Array, "batch"]:
    """Choose one token per row.

    Args:
        logits: float32.
        sampling: How.
        key: Random key; unused when greedy.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1)[:, ::-1]
        likely = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(likely, axis=-1) - likely
        kept = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True)
        least = jnp.take_along_axis(descending, kept - 1, axis=-1)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def pad_left(
    prompts: Sequence[Sequence[int] | np.ndarray], *, multiple: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts of different lengths as one batch, padded on the left.

    >>> pad_left([[5, 6], [7]], multiple=2)
    (array([[5, 6],
           [0, 7]], dtype=int32), array([[ True,  True],
           [False,  True]]))

    Args:
        prompts: Token ids of each row, at least one.
        multiple: The length is rounded up to a multiple of this, so that few are compiled.

    Returns:
        int32 tokens and bool mask, both `[batch, seq]`.

    Raises:
        InputError: A prompt has no token.
    """
    length = -(-max(map(len, prompts)) // multiple) * multiple
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"Prompt {row + 1} is empty: expected at least one token.")
        tokens[row, -len(prompt) :] = prompt
        mask[row, -len(prompt) :] = True
    return tokens, mask


def answer(
    generator: Generator,
    model: Model,
    params: PyTree | Callable[[np.ndarray], PyTree],
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    key: Key[Array, ""],
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda done: None,
    stop: Callable[[], int] = lambda: 0,
) -> list[str]:
    """Continue any number of prompts, batch by batch, and decode what was generated.

    Args:
        generator: From `make_generator`.
        model: Its tokenizer decodes.
        params: The parameter tree to run; or a function that gives it for the prompts of a batch,
            by their numbers, where prompts use different adapters (`attach_many`).
        prompts: Token ids, for example from `encode_prompt`.
        key: Random key for sampling.
        batch_size: Rows at once; the last batch is filled up, so one shape is compiled.
        on_batch: Called with the number of prompts answered so far.
        stop: Asked before each batch; an answer but 0 leaves the rest unanswered.

    Returns:
        The text of each answer, up to its end token.
    """
    tokens, mask = pad_left(prompts)
    size = min(batch_size, len(prompts))
    texts: list[str] = []
    for start in range(0, len(prompts), size):
        if stop():
            break
        rows = np.minimum(np.arange(start, start + size), len(prompts) - 1)
        tree = params(rows) if callable(params) else params
        new = generator(tree, tokens[rows], mask[rows], jax.random.fold_in(key, start))
        count = min(size, len(prompts) - start)
        texts += model.tokenizer.batch_decode(
            [_until_end(row, model) for row in np.asarray(new)[:count]], skip_special_tokens=True
        )
        on_batch(len(texts))
    return [text.strip() for text in texts]


def _until_end(row: np.ndarray, model: Model) -> list[int]:
    ends = np.flatnonzero(np.isin(row, model.config.eos_token_ids))
    return row[: ends[0]].tolist() if ends.size else row.tolist()


def _check_sampling(sampling: Sampling, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: expected at least 1, found {max_new_tokens}.")
    if not 0 <= sampling.temperature < float("inf"):
        raise InputError(f"temperature: expected at least 0, found {sampling.temperature}.")
    if sampling.top_k < 0:
        raise InputError(f"top_k: expected at least 0 (no limit), found {sampling.top_k}.")
    if not 0 < sampling.top_p <= 1:
        raise InputError(f"top_p: expected above 0 and at most 1, found {sampling.top_p}.")
