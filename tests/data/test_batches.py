# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_qlora.data import Encoded, batch_indices, make_batch, order, pack, padded_length
from jax_qlora.errors import InputError


def example(length: int, first: int = 1) -> Encoded:
    mask = np.arange(length) >= max(1, length // 2)
    return Encoded(tokens=np.arange(first, first + length, dtype=np.int32), loss_mask=mask)


lengths = st.lists(st.integers(2, 16), min_size=1, max_size=30)


def test_order_is_a_permutation_that_depends_on_seed_and_epoch():
    assert sorted(order(0, 0, 100).tolist()) == list(range(100))
    assert order(0, 0, 100).tolist() == order(0, 0, 100).tolist()
    assert order(0, 0, 100).tolist() != order(0, 1, 100).tolist() != order(1, 0, 100).tolist()


@given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 20))
def test_each_epoch_holds_every_example_once(seed, batch_size, count):
    steps = -(-3 * count // batch_size)
    seen = np.concatenate(
        [batch_indices(seed, step, batch_size=batch_size, count=count) for step in range(steps)]
    )
    for epoch in range(3):
        np.testing.assert_array_equal(
            seen[epoch * count : (epoch + 1) * count], order(seed, epoch, count)
        )


def test_a_batch_pads_on_the_right_with_any_token():
    batch = make_batch([example(3), example(5)], 6, pad_id=2)
    assert batch["tokens"].tolist() == [[1, 2, 3, 2, 2, 2], [1, 2, 3, 4, 5, 2]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    assert batch["loss_mask"][0].tolist() == [False, True, True, False, False, False]
    assert batch["tokens"].dtype == np.int32
    with pytest.raises(InputError, match="An example of 5 tokens does not fit a batch of length 4"):
        make_batch([example(5)], 4)


def test_padded_length():
    assert padded_length([example(2), example(33)]) == 64
    assert padded_length([example(32)]) == 32
    assert padded_length([example(9)], multiple=8) == 16


@given(lengths)
def test_packing_keeps_every_example_whole_and_apart(sizes):
    encoded = [example(size, first=100 * i + 1) for i, size in enumerate(sizes)]
    packed = pack(encoded, 16)
    found = []
    for row in range(len(packed["tokens"])):
        segments = packed["segment_ids"][row]
        np.testing.assert_array_equal(segments > 0, packed["attention_mask"][row])
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            tokens, mask = packed["tokens"][row, at], packed["loss_mask"][row, at]
            original = encoded[tokens[0] // 100]
            np.testing.assert_array_equal(tokens, original.tokens)
            np.testing.assert_array_equal(mask, original.loss_mask)
            np.testing.assert_array_equal(packed["positions"][row, at], np.arange(len(tokens)))
            assert not mask[0], "nothing of another example predicts its first token"
            found.append(tokens[0] // 100)
    assert sorted(found) == list(range(len(sizes)))
    assert not packed["loss_mask"][packed["segment_ids"] == 0].any()


@given(lengths)
def test_packing_wastes_less_than_half(sizes):
    packed = pack([example(size) for size in sizes], 16)
    rows = len(packed["tokens"])
    assert rows == 1 or packed["attention_mask"].mean() > 0.5


def test_packing_names_what_does_not_fit():
    with pytest.raises(InputError, match="An example of 17 tokens does not fit rows of length 16"):
        pack([example(17)], 16)
