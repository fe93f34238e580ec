# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE tokenizer as GGUF metadata: the inverse of `tokenizer_from_gguf`.

References:
    `get_vocab_base` in `conversion/base.py` of https://github.com/ggml-org/llama.cpp.
"""

import json
import re
from typing import Any

from ..errors import InputError
from ..models import DecoderConfig
from .tokenizer import SPLITS, splitter

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # `tokenizer.ggml.token_type`
# What tells the rules apart that split text into words.
_PROBE = (
    "Hello I'm HE'S we'll\n\n  \t 3 33 333 3333 1.5 a1b22c333 ...!?\r\n x  y   z "
    "naïve Ünïcode 你好 123٤٥ #$%& _under_score (x)[y]{z} \u00a0 end \n"
)
_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


def tokenizer_to_gguf(tokenizer: Any, config: DecoderConfig) -> dict[str, Any]:
    """Return the metadata of a tokenizer, the chat template included.

    The tags by which transformers marks what an assistant says are replaced: other engines do not
    know them.

    Args:
        tokenizer: A `transformers` fast tokenizer.
        config: The model's shape: rows of the embedding without a token are marked unused.

    Raises:
        InputError: It is no byte-level BPE, or splits text by a rule that GGUF has no name for
            here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    model, pre = content.get("model", {}), _split_rule(backend)
    if model.get("type") != "BPE" or content.get("normalizer") is not None or pre is None:
        raise InputError(
            "The tokenizer cannot be written to GGUF: expected a byte-level BPE without a "
            f"normalizer that splits text as one of {', '.join(SPLITS)}, found "
            f"{model.get('type', type(tokenizer).__name__)}. Write a Hugging Face directory and "
            "convert it with llama.cpp's convert_hf_to_gguf.py."
        )
    vocab = tokenizer.get_vocab()
    names = {i: token for token, i in vocab.items()}
    size = max(config.vocab_size, len(vocab))
    added = {x["id"]: x["special"] for x in content.get("added_tokens", [])}
    kinds = [
        _UNUSED
        if i not in names
        else _NORMAL
        if i not in added
        else _CONTROL
        if added[i]
        else _USER_DEFINED
        for i in range(size)
    ]
    metadata: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [names.get(i, f"[PAD{i}]") for i in range(size)],
        "token_type": kinds,
        "merges": [x if isinstance(x, str) else " ".join(x) for x in model["merges"]],
        "add_bos_token": _adds_bos(tokenizer),
    }
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    ends = [i for i in config.eos_token_ids if i != ids["eos"]]
    ids["eot"] = ends[0] if ends else None
    metadata |= {f"{name}_token_id": i for name, i in ids.items() if i is not None}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = _portable(tokenizer.chat_template)
    return metadata


def _split_rule(backend: Any) -> str | None:
    """The rule that splits the probe as the tokenizer does."""
    pre_tokenizer = getattr(backend, "pre_tokenizer", None)
    if pre_tokenizer is None:
        return None
    want = [text for text, _ in pre_tokenizer.pre_tokenize_str(_PROBE)]
    for rule in SPLITS:
        if [text for text, _ in splitter(rule).pre_tokenize_str(_PROBE)] == want:
            return rule
    return None


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _portable(template: str) -> str:
    """The template with blocks that are always taken in place of `generation` blocks."""
    return _GENERATION.sub(
        lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", template
    )
