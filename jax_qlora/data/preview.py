# SPDX-License-Identifier: Apache-2.0
"""What the model is shown and what it learns, in color."""

from itertools import groupby

from rich.text import Text

from .encode import Encoded, Tokenizer

_LEARNED, _GIVEN, _NOTE = "bold green", "dim", "italic"


def preview(tokenizer: Tokenizer, encoded: Encoded) -> Text:
    """Return an example's text, special tokens included, with the learned part in green.

    Where color does not show, the learned parts are those between ⟦ and ⟧. Line ends are marked ↵.

    Args:
        tokenizer: the one that encoded it.
        encoded: the example.
    """
    text = Text()
    runs = groupby(zip(encoded.tokens.tolist(), encoded.loss_mask.tolist(), strict=True), _learned)
    for learned, run in runs:
        shown = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        shown = shown.replace("\n", "↵\n")
        text.append(f"⟦{shown}⟧" if learned else shown, style=_LEARNED if learned else _GIVEN)
    count = int(encoded.loss_mask.sum())
    text.append(f"\n{len(encoded)} tokens, {count} of them learned", style=_NOTE)
    return text


def _learned(pair: tuple[int, bool]) -> bool:
    return pair[1]
