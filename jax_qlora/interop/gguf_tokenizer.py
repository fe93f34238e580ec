# SPDX-License-Identifier: Apache-2.0
"""A BPE tokenizer, of bytes or of SentencePiece, as GGUF metadata: what `tokenizer.py` reads.

References:
    `get_vocab_base` in `conversion/base.py` of https://github.com/ggml-org/llama.cpp.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..models import DecoderConfig
from .tokenizer import SPLITS, splitter

# `tokenizer.ggml.token_type`
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTES = range(1, 7)
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SPACE = "\u2581"  # SentencePiece's letter for a space
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
        InputError: It is no such BPE, or splits text by a rule that has no name in GGUF here; or
            has more tokens than the model's embedding rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    kind = _pieces(content, tokenizer) or _byte_level(content, backend)
    if kind is None:
        raise InputError(
            "The tokenizer cannot be written to GGUF: expected a SentencePiece BPE, or a "
            f"byte-level one that splits text as one of {', '.join(SPLITS)}, found "
            f"{content.get('model', {}).get('type', type(tokenizer).__name__)}. Write a Hugging "
            "Face directory and convert it with llama.cpp's convert_hf_to_gguf.py."
        )
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    size = config.vocab_size
    if max(names, default=0) >= size:
        raise InputError(
            f"The tokenizer has a token of number {max(names)}, and the model's embedding {size} "
            "rows: expected a row for each token. They belong to different models."
        )
    added = {x["id"]: x["special"] for x in content.get("added_tokens", [])}

    def token_type(i: int) -> int:
        if i not in names:
            return _UNUSED
        if names[i] == content["model"].get("unk_token"):
            return _UNKNOWN
        if i in added:
            return _CONTROL if added[i] else _USER_DEFINED
        is_byte = kind["model"] == "llama" and _BYTE.fullmatch(names[i])
        return _BYTES if is_byte else _NORMAL

    metadata: dict[str, Any] = {
        **kind,
        "tokens": [names.get(i, f"[PAD{i}]") for i in range(size)],
        "token_type": [token_type(i) for i in range(size)],
        "add_bos_token": _adds_bos(tokenizer),
    }
    if kind["model"] == "llama":
        ranks = _ranks(content)
        metadata["scores"] = [-float(ranks.get(t, len(ranks))) for t in metadata["tokens"]]
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


def _byte_level(content: Mapping[str, Any], backend: Any) -> dict[str, Any] | None:
    """The keys of a BPE of bytes, or None if the tokenizer is none that is known."""
    model, rule = content.get("model", {}), _split_rule(backend)
    normalizer = {"type": "NFC"} if rule == "qwen2" else None
    if model.get("type") != "BPE" or content.get("normalizer") != normalizer or rule is None:
        return None
    merges = [x if isinstance(x, str) else " ".join(x) for x in model["merges"]]
    return {"model": "gpt2", "pre": rule, "merges": merges}


def _pieces(content: Mapping[str, Any], tokenizer: Any) -> dict[str, Any] | None:
    """The keys of a SentencePiece BPE, or None if the tokenizer is none."""
    model = content.get("model", {})
    rules = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    if model.get("type") != "BPE" or not model.get("byte_fallback") or "\\u2581" not in rules:
        return None
    first = tokenizer.tokenize("a", add_special_tokens=False)[0]
    return {"model": "llama", "pre": "default", "add_space_prefix": first.startswith(_SPACE)}


def _ranks(content: Mapping[str, Any]) -> dict[str, int]:
    """When each piece is merged: the order of the scores, which tokenizer.json does not keep."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(content["model"]["merges"]):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(first + second, rank)
    return ranks


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
