# SPDX-License-Identifier: Apache-2.0
"""The examples of a run as tokens, and the batch of any step as a pure function of its number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..data.batches import batch_indices, make_batch, padded_length
from ..data.encode import Encoded, encode_all
from ..data.examples import Example, load_splits
from ..errors import InputError
from ..evaluate import Batch, answer_width
from ..interop.download import resolve
from ..interop.new_tokens import add_tokens
from ..interop.open import find_tokenizer, read_shape
from ..models import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class Data:
    """Encoded examples and the settings that make batches of them.

    Attributes:
        config: Settings of batches; the seed.
        train: Examples to learn.
        held_out: Examples to measure on.
        held_out_examples: The same as they were read.
    """

    config: Config
    train: list[Encoded]
    held_out: list[Encoded]
    held_out_examples: list[Example]

    @property
    def longest(self) -> int:
        """Length of the longest batch there can be."""
        return padded_length(self.train, multiple=self.config.data.length_multiple)

    @property
    def longest_held_out(self) -> int:
        """Length of a batch of held-out examples."""
        return padded_length(self.held_out, multiple=self.config.data.length_multiple)

    @property
    def width(self) -> int:
        """Most answer tokens in any example."""
        return answer_width([*self.train, *self.held_out])

    def batch(self, step: int, *, length: int | None = None) -> Batch:
        """Return the arrays of one optimizer step, each `[accumulate, batch, seq]`.

        Args:
            step: Steps before this one.
            length: `seq`; by default what the batch's longest example needs.
        """
        rows, parts = self.config.train.batch_size, self.config.train.accumulate
        chosen = batch_indices(
            self.config.seed, step, batch_size=rows * parts, count=len(self.train)
        )
        examples = [self.train[i] for i in chosen]
        length = length or padded_length(examples, multiple=self.config.data.length_multiple)
        batch = make_batch(examples, length)
        return {name: x.reshape(parts, rows, length) for name, x in batch.items()}


def read_description(
    name: str, new_tokens: Sequence[str] = ()
) -> tuple[DecoderConfig, Any, tuple[int, ...]]:
    """Return a model's shape, its tokenizer and the numbers of added tokens; no weights are read.

    Args:
        name: What `load_model` takes.
        new_tokens: Tokens to add, as `load_model` does.

    Returns:
        The shape with a row for each added token; the tokenizer, None if the model has none; and
        the numbers of the added tokens.

    Raises:
        InputError: There is no such model, its description is not understood, or tokens cannot be
            added.
    """
    path = resolve(name)
    tokenizer = find_tokenizer(path)
    decoder, numbers = add_tokens(tokenizer, new_tokens, read_shape(path), where=f"'{name}'")
    return decoder, tokenizer, numbers


def load_data(config: Config, tokenizer: Any, *, context: int) -> Data:
    """Read and encode the examples that `config` names.

    Args:
        config: Settings; `data` and `eval`.
        tokenizer: The model's; None if it has none.
        context: Tokens that the model can take, virtual ones included.

    Raises:
        InputError: Missing or malformed data, an example that does not fit, no tokenizer.
    """
    context -= config.virtual_tokens
    longest = context if config.data.max_length is None else config.data.max_length
    if longest > context:
        raise InputError(
            f"data.max_length: expected at most {context}, the context of '{config.model}', found "
            f"{longest}. Lower it."
        )
    if tokenizer is None:
        raise InputError(
            f"'{config.model}' has no tokenizer.json, so text cannot be turned into tokens. Put "
            "the model's tokenizer files beside its weights."
        )
    train, held_out = load_splits(
        config.data.source,
        held_out_source=config.data.eval_source,
        held_out=config.eval.examples,
    )
    return Data(
        config=config,
        train=encode_all(tokenizer, train, longest),
        held_out=encode_all(tokenizer, held_out, longest),
        held_out_examples=held_out,
    )
