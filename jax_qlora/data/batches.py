# SPDX-License-Identifier: Apache-2.0
"""Batches of static shapes, in an order that is a pure function of the step.

Nothing here holds state: the examples of a step follow from (seed, step), so a run resumes from
the number of its step alone.
"""

from collections.abc import Sequence

import numpy as np

from ..errors import InputError
from .encode import Encoded


def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return a random permutation of `count` examples, the same on every machine.

    It sorts raw Philox output, which NumPy keeps stable across versions (its `permutation` is not).

    >>> order(0, 0, 5)
    array([0, 2, 1, 4, 3])

    Args:
        seed: of the run, at least 0.
        epoch: passes over the data so far.
        count: number of examples.
    """
    random = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    return np.argsort(random, kind="stable")


def batch_indices(seed: int, step: int, *, batch_size: int, count: int) -> np.ndarray:
    """Return which examples make up the batch of one step.

    The epochs follow each other without a gap, so every example is seen once an epoch and a batch
    may hold the end of one epoch and the start of the next.

    Args:
        seed: of the run.
        step: batches before this one.
        batch_size: examples in a batch; may exceed `count`.
        count: number of examples.

    Returns:
        int64[batch_size].
    """
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = {epoch: order(seed, epoch, count) for epoch in np.unique(position // count).tolist()}
    return np.array([epochs[p // count][p % count] for p in position.tolist()], np.int64)


def make_batch(
    encoded: Sequence[Encoded], length: int, *, pad_id: int = 0
) -> dict[str, np.ndarray]:
    """Return examples padded on the right to one length.

    Padding is known by position, never by token id, so `pad_id` may be any token.

    Args:
        encoded: the examples.
        length: positions of each row.
        pad_id: fills the rest of `tokens`.

    Returns:
        tokens int32[batch, length]; loss_mask and attention_mask bool[batch, length], both False
        on padding.

    Raises:
        InputError: an example is longer than `length`.
    """
    longest = max(map(len, encoded))
    if longest > length:
        raise InputError(f"An example of {longest} tokens does not fit a batch of length {length}.")
    tokens = np.full((len(encoded), length), pad_id, np.int32)
    loss_mask, attention_mask = np.zeros((2, len(encoded), length), bool)
    for row, example in enumerate(encoded):
        tokens[row, : len(example)] = example.tokens
        loss_mask[row, : len(example)] = example.loss_mask
        attention_mask[row, : len(example)] = True
    return {"tokens": tokens, "loss_mask": loss_mask, "attention_mask": attention_mask}


def padded_length(encoded: Sequence[Encoded], *, multiple: int = 32) -> int:
    """Return the longest example's length rounded up to a multiple of `multiple`.

    Of all examples: one static shape for a whole run. Of one batch: few shapes, less padding.

    >>> padded_length([Encoded(tokens=np.zeros(33, np.int32), loss_mask=np.zeros(33, bool))])
    64
    """
    return -(-max(map(len, encoded)) // multiple) * multiple


def pack(encoded: Sequence[Encoded], length: int, *, pad_id: int = 0) -> dict[str, np.ndarray]:
    """Return examples packed several to a row, longest first, each into the fullest row it fits.

    Segment ids keep the examples of a row apart in attention; positions start again at 0 in each.

    Args:
        encoded: the examples.
        length: positions of each row.
        pad_id: fills the rest of `tokens`.

    Returns:
        what `make_batch` returns, with segment_ids int32[rows, length] (1, 2, ... in a row, 0 on
        padding) and positions int32[rows, length].

    Raises:
        InputError: an example is longer than `length`.
    """
    rows = _best_fit([len(example) for example in encoded], length)
    joined = [
        Encoded(
            tokens=np.concatenate([encoded[i].tokens for i in row]),
            loss_mask=np.concatenate([encoded[i].loss_mask for i in row]),
        )
        for row in rows
    ]
    batch = make_batch(joined, length, pad_id=pad_id)
    batch["segment_ids"], batch["positions"] = np.zeros((2, len(rows), length), np.int32)
    for number, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row, 1):
            stop = start + len(encoded[i])
            batch["segment_ids"][number, start:stop] = segment
            batch["positions"][number, start:stop] = np.arange(stop - start)
            start = stop
    return batch


def _best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign items, longest first, to the row with the least room that is still enough."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = lengths[item]
        if size > capacity:
            raise InputError(f"An example of {size} tokens does not fit rows of length {capacity}.")
        room = next((room for room in range(size, capacity + 1) if by_room[room]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, capacity
        else:
            row = by_room[room].pop()
        rows[row].append(item)
        by_room[room - size].append(row)
    return rows
