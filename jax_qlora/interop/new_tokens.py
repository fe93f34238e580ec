# SPDX-License-Identifier: Apache-2.0
"""Tokens that a model's tokenizer lacks: added to it, with rows of the embedding and the head.

A tokenizer numbers them behind its own. Where the embedding has spare rows they take those, else it
grows; either way their rows are the mean of the rows before them, computed when they are read.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..models import DecoderConfig
from .bnb import bnb_parts
from .hf import tensor_names
from .open import find_tokenizer
from .tokenizer import load_tokenizer

_CHUNK = 4096  # rows whose mean is taken at once


def add_tokens(
    tokenizer: Any, tokens: Sequence[str], config: DecoderConfig, *, where: str
) -> tuple[DecoderConfig, tuple[int, ...]]:
    """Add tokens to a tokenizer, in place.

    They are matched in text as they are written, and are no "special" tokens of transformers, which
    decoding may leave out.

    Args:
        tokenizer: A `transformers` fast tokenizer, or None, which takes none.
        tokens: What to add, in order.
        config: The model's shape.
        where: What to call the model in messages.

    Returns:
        The shape with a row of the embedding for each token, and the tokens' numbers.

    Raises:
        InputError: There is no tokenizer, it has such a token already, or it has more tokens than
            the embedding has rows.
    """
    if not tokens:
        return config, ()
    if tokenizer is None:
        raise InputError(
            f"data.new_tokens: expected a model with a tokenizer to add to, found {where}, which "
            "has no tokenizer.json."
        )
    known = tokenizer.get_vocab()
    if there := [token for token in tokens if token in known]:
        raise InputError(
            f"data.new_tokens: expected tokens that the tokenizer lacks, found '{there[0]}', which "
            f"is its token {known[there[0]]}. To train its row name that number in "
            "lora.trainable_token_indices."
        )
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    numbers = tuple(int(i) for i in tokenizer.convert_tokens_to_ids(list(tokens)))
    if numbers[0] > config.vocab_size:
        raise InputError(
            f"{where}: the tokenizer has {numbers[0]} tokens, and the embedding "
            f"{config.vocab_size} rows: expected a row for each token. They belong to different "
            "models."
        )
    return replace(config, vocab_size=max(config.vocab_size, numbers[-1] + 1)), numbers


def add_rows(
    tensors: Mapping[str, Any], config: DecoderConfig, numbers: Sequence[int]
) -> dict[str, Any]:
    """The tensors of a checkpoint with the rows of added tokens.

    Args:
        tensors: What the checkpoint holds, by Hugging Face's names.
        config: The shape that `add_tokens` returned.
        numbers: The tokens' numbers, consecutive.

    Raises:
        InputError: The embedding or the head is in 4 bits in the checkpoint.
    """
    grown = dict(tensors)
    (embedding,) = tensor_names("embed_tokens/embedding", config)
    for name in (embedding, "lm_head.weight") if numbers else ():
        if name not in tensors:  # a tied head
            continue
        if bnb_parts(tensors, name) is not None:
            raise InputError(
                f"data.new_tokens: '{name}' of the checkpoint is in 4 bits: expected a dense one "
                "to add rows to. Use the unquantized checkpoint."
            )
        grown[name] = GrownTensor(
            tensor=tensors[name], rows=config.vocab_size, first=numbers[0], count=len(numbers)
        )
    return grown


@dataclass(frozen=True, kw_only=True)
class GrownTensor:
    """An embedding or head on disk, with rows for added tokens that are the mean of those before.

    Attributes:
        tensor: The one on disk, `[rows there, d]`.
        rows: Rows in all.
        first: The first added token.
        count: How many there are.
    """

    tensor: Any
    rows: int
    first: int
    count: int

    @property
    def name(self) -> str:
        """Its name on disk."""
        return self.tensor.name

    @property
    def dtype(self) -> np.dtype:
        """Its dtype once read."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape with the rows."""
        return (self.rows, *self.tensor.shape[1:])

    @functools.cached_property
    def mean(self) -> np.ndarray:
        """The mean of the rows before the first added one, taken in float64."""
        total = np.zeros(self.shape[1:], np.float64)
        for start in range(0, self.first, _CHUNK):
            part = self.tensor.read(start, min(start + _CHUNK, self.first))
            total += part.astype(np.float64).sum(axis=0)
        return (total / self.first).astype(self.dtype)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read it, or some rows of it.

        Args:
            start: First row to read.
            stop: First row not to read; the end by default.
        """
        start, stop, _ = slice(start, stop).indices(self.rows)
        out = np.empty((max(stop - start, 0), *self.shape[1:]), self.dtype)
        there = min(stop, self.tensor.shape[0])
        if start < there:
            out[: there - start] = self.tensor.read(start, there)
        new = slice(max(self.first - start, 0), max(self.first + self.count - start, 0))
        if len(out[new]):
            out[new] = self.mean
        return out


def tokens_beside(adapter: str | Path, model: Path) -> tuple[str, ...]:
    """The tokens that the tokenizer beside an adapter has behind those of its model's.

    Args:
        adapter: The adapter's directory.
        model: The model's directory, or its .gguf file.

    Raises:
        InputError: A tokenizer cannot be read, or the numbers of those tokens do not follow.
    """
    file = Path(adapter) / "tokenizer.json"
    if not file.is_file() or (tokenizer := find_tokenizer(model)) is None:
        return ()
    known, there = tokenizer.get_vocab(), load_tokenizer(adapter).get_vocab()
    first = max(known.values(), default=-1) + 1
    added = {i: token for token, i in there.items() if i >= first and token not in known}
    if sorted(added) != list(range(first, first + len(added))):
        numbers = ", ".join(map(str, sorted(added)[:4]))
        raise InputError(
            f"'{file}': expected the tokens of '{model}', and others from number {first} on, found "
            f"{numbers}. It belongs to another model; if the adapter does not, remove that file."
        )
    return tuple(added[i] for i in sorted(added))
