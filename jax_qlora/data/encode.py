# SPDX-License-Identifier: Apache-2.0
"""From examples to tokens, with the loss on the answers only.

The loss mask comes from rendering prefixes of a chat with the tokenizer's own template: what the
template adds for an answer is the answer. It therefore needs no `{% generation %}` mark in the
template, and no token is ever masked by its id (a padding token that is also the end of turn stays
in the loss, so the model learns to stop).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from ..typing import Bool, Int

Tokenizer = Any  # transformers.PreTrainedTokenizerFast, which takes a second to import


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One example as tokens.

    The following conditions hold:
      * there are at least two tokens
      * loss_mask[i] says that token i is to be predicted (from those before it)
      * loss_mask[0] is False, since nothing comes before; some other entry is True
    """

    tokens: Int[np.ndarray, " seq"]
    loss_mask: Bool[np.ndarray, " seq"]

    def __len__(self) -> int:
        return len(self.tokens)


def encode(tokenizer: Tokenizer, example: Mapping[str, Any], max_length: int) -> Encoded:
    """Return an example's tokens and which of them the model learns to produce.

    Of a chat these are the assistant's turns with their end-of-turn token; whatever follows the
    last of them is dropped. A prompt with a completion is a chat of one turn when the tokenizer
    has a chat template, and plain text that ends with the end-of-sequence token otherwise. There
    is at most one beginning-of-sequence token.

    Args:
        tokenizer: a fast tokenizer, with a chat template if the example is a chat.
        example: what `load_examples` gives.
        max_length: most tokens that the model can take.

    Raises:
        InputError: the tokenizer has no chat template, the template does not render the example or
            not turn by turn, nothing is left to learn, or the example is too long.
    """
    where = example.get("where", "example")
    messages = example.get("messages")
    if messages is None and "prompt" in example and tokenizer.chat_template:
        messages = [
            {"role": "user", "content": example["prompt"]},
            {"role": "assistant", "content": example.get("completion", "")},
        ]
    if messages is not None:
        text, spans = _render_chat(tokenizer, messages, where)
        tokens, mask = _tokenize(tokenizer, text, spans)
    else:
        prompt = example.get("prompt", "")
        answer = example.get("completion") or example.get("text") or ""
        text, spans = prompt + answer, [(len(prompt), len(prompt) + len(answer))]
        tokens, mask = _tokenize(tokenizer, text, spans, add_special_tokens=True)
        if tokenizer.eos_token_id is not None and (
            not tokens or tokens[-1] != tokenizer.eos_token_id
        ):
            tokens.append(tokenizer.eos_token_id)
            mask.append(True)
        elif tokens:
            mask[-1] = True
    if tokens[:2] == [tokenizer.bos_token_id] * 2:
        tokens, mask = tokens[1:], mask[1:]
    mask[:1] = [False] * len(mask[:1])
    if not any(mask):
        raise InputError(
            f"{where}: no token is left to learn: the answer is empty once it is rendered. Give it "
            f"content. Rendered: {text!r}."
        )
    if len(tokens) > max_length:
        raise InputError(
            f"{where}: {len(tokens)} tokens, and at most {max_length} fit. Shorten or remove it, "
            "or raise data.max_length (up to the model's context length)."
        )
    return Encoded(tokens=np.array(tokens, np.int32), loss_mask=np.array(mask, bool))


def encode_all(
    tokenizer: Tokenizer,
    examples: Iterable[Mapping[str, Any]],
    max_length: int,
) -> list[Encoded]:
    """Return `encode` of every example, in order."""
    return [encode(tokenizer, example, max_length) for example in examples]


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the token ids after which the model answers, exactly as `encode` has them.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: the chat so far; an answer at its end is left out.

    Raises:
        InputError: there is no chat template, or it does not render these messages.
    """
    asked = list(messages)
    while asked and asked[-1].get("role") == "assistant":
        asked.pop()
    text = _render(tokenizer, asked, "prompt", add_generation_prompt=True)
    tokens, _ = _tokenize(tokenizer, text, [])
    return tokens[1:] if tokens[:2] == [tokenizer.bos_token_id] * 2 else tokens


def _tokenize(
    tokenizer: Tokenizer,
    text: str,
    spans: Sequence[tuple[int, int]],
    *,
    add_special_tokens: bool = False,
) -> tuple[list[int], list[bool]]:
    """Token ids, and whether each overlaps one of the character spans."""
    output = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # it would warn of lengths that are checked here
    )
    mask = [
        any(start < stop and begin < end for begin, stop in spans)
        for start, end in output["offset_mapping"]
    ]
    return list(output["input_ids"]), mask


def _render_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The chat as text, and the character span of each answer with its end of turn."""
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers:
        raise InputError(
            f"{where}: no message has the role 'assistant', so there is nothing to learn. Found "
            f"the roles: {', '.join(str(message.get('role')) for message in messages)}."
        )
    if answers[0] == 0:
        raise InputError(f"{where}: the chat starts with an answer. Put a user message first.")
    text = _render(tokenizer, messages[: answers[-1] + 1], where)
    spans = []
    for i in answers:
        prompt = _render(tokenizer, messages[:i], where, add_generation_prompt=True)
        turn = text if i == answers[-1] else _render(tokenizer, messages[: i + 1], where)
        end = len(_without_tail(tokenizer, turn))
        if not (turn.startswith(prompt) and text.startswith(turn[:end])):
            raise InputError(
                f"{where}: the chat template renders 'messages[{i}]' differently once the chat "
                "goes on, so its tokens in training would not be those in use. Give one example "
                "per answer, each ending with that answer (or change the template)."
            )
        spans.append((len(prompt), end))
    return text[: spans[-1][1]], spans


def _without_tail(tokenizer: Tokenizer, turn: str) -> str:
    """A rendered turn without the white space that some templates put after its end mark."""
    stripped = turn.rstrip()
    ends = tuple(token for token in tokenizer.get_added_vocab() if token.strip())
    return stripped if ends and stripped.endswith(ends) else turn


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    where: str,
    *,
    add_generation_prompt: bool = False,
) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: the tokenizer has no chat template, so a chat cannot be written as text. "
            "Put a chat_template.jinja next to tokenizer.json (instruction-tuned models bring "
            'one), or give {"prompt": ..., "completion": ...} or {"text": ...}.'
        )
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise InputError(
            f"{where}: the chat template does not take these messages (roles: {roles}): {error}."
        ) from error
