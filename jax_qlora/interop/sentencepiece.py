# SPDX-License-Identifier: Apache-2.0
"""A SentencePiece BPE, given as pieces and scores, as a tokenizer of the `tokenizers` package.

References:
    `SpmConverter` and `generate_merges` in transformers, `convert_slow_tokenizer.py`.
"""

from collections.abc import Sequence
from typing import Any

_SPACE = "\u2581"  # SentencePiece's letter for a space
_NORMAL = 1  # kind of a piece that merges make


def sentencepiece_bpe(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], *, space_prefix: bool
) -> Any:
    """Return the tokenizer, without special tokens.

    Args:
        pieces: Text of each token; bytes are written as <0x0A>.
        scores: The higher, the earlier a piece is made of two others.
        kinds: Kind of each token, as in `tokenizer.ggml.token_type`; empty: all are normal.
        space_prefix: Whether a text is taken to start with a space.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {piece: i for i, piece in enumerate(pieces)}
    bytes_too = any(piece.startswith("<0x") for piece in pieces)
    unknown = "<unk>" if "<unk>" in vocab else None
    tokenizer: Any = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(vocab, scores, kinds),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=bytes_too,
        )
    )
    make_sequence: Any = normalizers.Sequence
    replace = normalizers.Replace(" ", _SPACE)
    prepend = [normalizers.Prepend(_SPACE)] if space_prefix else []
    tokenizer.normalizer = make_sequence([*prepend, replace])
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _merges(
    vocab: dict[str, int], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, those of high scores first."""
    found = []
    for piece, i in vocab.items():
        if kinds and kinds[i] != _NORMAL:
            continue
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [half for half in halves if half[0] in vocab and half[1] in vocab]
        known.sort(key=lambda half: (vocab[half[0]], vocab[half[1]]))
        found += [(-scores[i], half) for half in known]
    return [half for _, half in sorted(found, key=lambda pair: pair[0])]
