# SPDX-License-Identifier: Apache-2.0
"""What is measured: the loss of answers, and answers to held-out prompts."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .data.batches import make_batch, padded_length
from .data.encode import Encoded
from .lora import attach
from .models import Model, chunked_loss, head_params
from .typing import Array, Float, PyTree

Batch = dict[str, Any]


def assemble(trainable: PyTree, frozen: PyTree | None, *, dropout_key: Any = None) -> PyTree:
    """Return the parameter tree to run: an adapter on its base, or weights that all train.

    Args:
        trainable: An adapter, or with `frozen=None` the whole parameter tree.
        frozen: The base, or None.
        dropout_key: Random key of this step's dropout; None for none.
    """
    return trainable if frozen is None else attach(frozen, trainable, dropout_key=dropout_key)


def answer_loss(
    model: Model,
    params: PyTree,
    batch: Batch,
    *,
    width: int,
    chunk: int = 1024,
    scale: float | Array = 1.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the summed cross-entropy of the answer tokens of a batch, and how many they are.

    Only the hidden states before answer tokens meet the output head, at most `chunk` of them at
    once, so logits of all positions never exist.

    Args:
        model: The decoder.
        params: The parameter tree, from `assemble`.
        batch: From `make_batch`: tokens, loss_mask and attention_mask, each `[batch, seq]`.
        width: Answer tokens of a row that are counted, from its start; `answer_width` gives the
            least that counts all.
        chunk: Positions whose logits exist at once.
        scale: Factor of the sum, there already when gradients are rounded to half precision.

    Returns:
        float32 sum of negative log-likelihoods in nats, times `scale`; float32 count.
    """
    hidden = model.hidden(params, batch["tokens"], attention_mask=batch["attention_mask"])
    rows, seq, d = hidden.shape
    wanted = batch["loss_mask"][:, 1:]  # the hidden state at t predicts token t + 1
    places = jnp.argsort(~wanted, axis=1, stable=True)[:, :width].astype(jnp.int32)
    weights = jnp.take_along_axis(wanted, places, axis=1).astype(jnp.float32)
    targets = jnp.take_along_axis(batch["tokens"][:, 1:], places, axis=1)
    starts = jnp.arange(rows, dtype=jnp.int32)[:, None] * seq

    def loss(params: PyTree, states: Array, data: tuple[Array, Array]) -> Array:
        targets, weights = data
        logits = model.head(params, states)
        # a masked sum, not a look-up, whose gradient is a scatter into an array of all logits
        places = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1)
        chosen = jnp.where(places == targets[:, None], logits, jnp.float32(0)).sum(axis=-1)
        return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * weights)

    total = chunked_loss(
        loss,
        head_params(params),
        hidden.reshape(rows * seq, d),
        (starts + places).reshape(-1),
        (targets.reshape(-1), (weights * scale).reshape(-1)),
        chunk=chunk,
    )
    return total, jnp.sum(weights)


def answer_width(encoded: Sequence[Encoded], *, multiple: int = 4) -> int:
    """Return the largest number of answer tokens in an example, rounded up to a multiple.

    Args:
        encoded: The examples.
        multiple: What to round up to.
    """
    most = max(int(example.loss_mask.sum()) for example in encoded)
    return -(-most // multiple) * multiple


def held_out_batches(
    encoded: Sequence[Encoded], *, batch_size: int, length_multiple: int
) -> list[Batch]:
    """Return batches of one shape that count every example once.

    Args:
        encoded: The examples, at least one.
        batch_size: Rows of a batch.
        length_multiple: The length is the longest example's, rounded up to a multiple of this.
    """
    length = padded_length(encoded, multiple=length_multiple)
    batches = []
    for start in range(0, len(encoded), batch_size):
        rows = range(start, start + batch_size)
        batch = make_batch([encoded[row % len(encoded)] for row in rows], length)
        batch["loss_mask"][len(encoded) - start :] = False
        batches.append(batch)
    return batches


def held_out_loss(
    loss: Callable[[Batch], tuple[Array, Array]],
    batches: Sequence[Batch],
    *,
    on_batch: Callable[[int], None] = lambda done: None,
    stop: Callable[[], int] = lambda: 0,
) -> float:
    """Return the mean loss per answer token over all batches.

    Args:
        loss: `answer_loss` of one batch, jitted, parameters bound.
        batches: From `held_out_batches`.
        on_batch: Called with the number of batches done.
        stop: Asked before each batch; an answer but 0 ends early, with NaN.
    """
    total, count = 0.0, 0.0
    for done, batch in enumerate(batches, 1):
        if stop():
            return float("nan")
        part, tokens = loss(batch)
        total, count = total + float(part), count + float(tokens)
        on_batch(done)
    return total / max(count, 1.0)


def split_answer(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens before an example's last answer, and that answer.

    >>> mask = np.array([False, True, False, True, True])
    >>> split_answer(Encoded(tokens=np.arange(5, dtype=np.int32), loss_mask=mask))
    (array([0, 1, 2], dtype=int32), array([3, 4], dtype=int32))

    Args:
        encoded: The example; with plain text to learn, the prompt is its first token.
    """
    last = int(np.flatnonzero(encoded.loss_mask)[-1])
    others = np.flatnonzero(~encoded.loss_mask[: last + 1])
    start = int(others[-1]) + 1 if others.size else 0
    return encoded.tokens[:start], encoded.tokens[start : last + 1]
