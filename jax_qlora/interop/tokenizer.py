# SPDX-License-Identifier: Apache-2.0
"""Tokenizers, as transformers' fast tokenizers, without torch and without running foreign code."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .gguf_metadata import read_gguf_metadata
from .sentencepiece import sentencepiece_bpe

# Values of `tokenizer.ggml.pre` that are read: the rule that splits text into words.
_GPT2, _DIGITS, _LLAMA3 = ("gpt-2", "default"), ("smollm",), ("llama-bpe",)
_QWEN2 = ("qwen2",)
SPLITS = ("gpt-2", *_DIGITS, *_LLAMA3, *_QWEN2)  # one name for each rule
_LLAMA3_WORDS = (  # llama.cpp, src/llama-vocab.cpp
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")  # ibid.
_CONTROL, _USER_DEFINED = 3, 4  # kinds in `tokenizer.ggml.token_type`


def load_tokenizer(path: str | Path) -> Any:
    """Return the tokenizer of a model.

    Args:
        path: a Hugging Face directory with tokenizer.json (and the chat template in
            chat_template.jinja or tokenizer_config.json), or a GGUF file.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.

    Raises:
        InputError: files are missing or damaged, or the GGUF file's tokenizer is of a kind that is
            not read.
    """
    path = Path(path)
    if path.is_dir():
        return _from_directory(path)
    if path.suffix == ".gguf":
        return tokenizer_from_gguf(read_gguf_metadata(path), where=f"'{path}'")
    raise InputError(f"No tokenizer at '{path}': expected a model directory or a .gguf file.")


def tokenizer_from_gguf(metadata: Mapping[str, Any], *, where: str = "GGUF metadata") -> Any:
    """Return the tokenizer that GGUF metadata describes: a BPE of bytes, or of SentencePiece.

    Args:
        metadata: what `read_gguf_metadata` returns.
        where: what to call it in messages.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.

    Raises:
        InputError: the tokenizer is of another kind, splits text by a rule that is not known, or
            keys are missing.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    kind, split = get("model"), get("pre", "default")
    known = _GPT2 + _DIGITS + _LLAMA3 + _QWEN2
    pieces = kind == "llama"  # of SentencePiece
    if not pieces and (kind != "gpt2" or split not in known):
        raise InputError(
            f"{where}: tokenizer.ggml.model '{kind}' with tokenizer.ggml.pre '{split}' is not "
            f"read: expected 'llama', or 'gpt2' with one of {', '.join(known)}. Use the model's "
            "Hugging Face directory, which has a tokenizer.json."
        )
    ranks = "scores" if pieces else "merges"
    tokens, merges, kinds = get("tokens"), get(ranks), get("token_type") or []
    if (
        not (_list_of(tokens, str) and _list_of(kinds, int))
        or not _list_of(merges, float if pieces else str)
        or len(kinds or tokens) != len(tokens)
        or (pieces and len(merges) != len(tokens))
        or not tokens
    ):
        raise InputError(
            f"{where}: expected tokenizer.ggml.tokens and .{ranks}, and one .token_type"
            f"{' and score' * pieces} a token. "
            "The file holds no complete tokenizer; use the model's Hugging Face directory."
        )
    tokenizer: Any
    if pieces:
        tokenizer = sentencepiece_bpe(
            tokens, merges, kinds, space_prefix=get("add_space_prefix", True)
        )
    else:
        try:
            model = models.BPE(
                vocab={token: i for i, token in enumerate(tokens)},
                merges=[_pair(merge) for merge in merges],
                ignore_merges=split in _LLAMA3,
            )
        except Exception as error:  # the Rust side raises bare Exception
            raise InputError(
                f"{where}: the tokenizer's merges do not fit its tokens: {error}. Download the "
                "file again."
            ) from error
        tokenizer = Tokenizer(model)
        if split in _QWEN2:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = splitter(split)
        tokenizer.decoder = decoders.ByteLevel()
    special = {
        name: _token(tokens, get(key), f"{where}: tokenizer.ggml.{key}")
        for name, key in {
            "bos_token": "bos_token_id",
            "eos_token": "eos_token_id",
            "unk_token": "unknown_token_id",
            "pad_token": "padding_token_id",
        }.items()
        if get(key) is not None
    }
    for token, token_kind in zip(tokens, kinds, strict=False):
        if token_kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
        elif token_kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    if get("add_bos_token", pieces or split in _LLAMA3) and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokens.index(bos))]
        )
    architecture = metadata.get("general.architecture")
    with _quiet_transformers() as transformers:
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=metadata.get("tokenizer.chat_template"),
            model_max_length=metadata.get(f"{architecture}.context_length", int(1e30)),
            clean_up_tokenization_spaces=False,
            **special,
        )


def _from_directory(directory: Path) -> Any:
    if not (directory / "tokenizer.json").is_file():
        found = sorted(file.name for file in directory.glob("*token*"))
        raise InputError(
            f"No tokenizer.json in '{directory}' (found: {', '.join(found) or 'nothing like it'}). "
            "A model that has only tokenizer.model can be converted once, where sentencepiece is "
            f"installed: transformers.AutoTokenizer.from_pretrained('{directory}')"
            f".save_pretrained('{directory}')."
        )
    with _quiet_transformers() as transformers:
        try:
            # This class, and not AutoTokenizer: tokenizer.json alone says how text is split, and
            # no code of the repository is ever considered.
            return transformers.PreTrainedTokenizerFast.from_pretrained(
                directory, local_files_only=True
            )
        except Exception as error:  # the Rust side raises bare Exception
            raise InputError(
                f"The tokenizer in '{directory}' cannot be read: {error}. Download "
                "tokenizer.json and tokenizer_config.json again."
            ) from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """Import transformers without its advice to install torch."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import transformers

        yield transformers
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def splitter(split: str) -> Any:
    """Return the pre-tokenizer of a rule.

    Args:
        split: One of the values of `tokenizer.ggml.pre` that are read.
    """
    from tokenizers import Regex, pre_tokenizers

    own_words = split in _GPT2 + _DIGITS
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_words)
    if split in _GPT2:
        return byte_level
    if split in _DIGITS:
        first = pre_tokenizers.Digits(individual_digits=True)
    else:
        words = _QWEN2_WORDS if split in _QWEN2 else _LLAMA3_WORDS
        first = pre_tokenizers.Split(Regex(words), "isolated")
    return pre_tokenizers.Sequence([first, byte_level])


def _list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(x) is kind for x in values)


def _token(tokens: list[str], number: Any, what: str) -> str:
    if type(number) is int and 0 <= number < len(tokens):
        return tokens[number]
    raise InputError(f"{what} is {number!r}; expected the number of one of {len(tokens)} tokens.")


def _pair(merge: str) -> tuple[str, str]:
    first, _, second = merge.partition(" ")
    return first, second
