# SPDX-License-Identifier: Apache-2.0
import json
import random
import shutil
import struct
import subprocess
import sys

import gguf
import pytest

from jax_qlora.data import encode, encode_prompt, load_examples
from jax_qlora.errors import InputError
from jax_qlora.interop.download import resolve
from jax_qlora.interop.gguf_metadata import read_gguf_metadata
from jax_qlora.interop.tokenizer import load_tokenizer, tokenizer_from_gguf
from tests.helpers import GOLDEN

LLAMA = GOLDEN / "models/llama"
EXPECTED = json.loads((GOLDEN / "tokenizer_outputs.json").read_text())


@pytest.fixture
def metadata():
    """The golden tokenizer as GGUF metadata."""
    tokenizer = json.loads((LLAMA / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": (LLAMA / "chat_template.jinja").read_text(),
    }


def write_gguf(path, metadata):
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def check_golden(tokenizer):
    for case in EXPECTED["texts"]:
        assert tokenizer(case["text"])["input_ids"] == case["ids"]
        no_special = tokenizer(case["text"], add_special_tokens=False)["input_ids"]
        assert no_special == case["ids_no_special"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        skipped = tokenizer.decode(case["ids"], skip_special_tokens=True)
        assert skipped == case["decoded_skip_special"]
    for case in EXPECTED["chats"]:
        rendered = tokenizer.apply_chat_template(case["messages"], tokenize=False)
        assert rendered == case["rendered"]
        assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == case["ids"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.model_max_length == 128


def test_a_directory_equals_the_reference():
    check_golden(load_tokenizer(LLAMA))


def test_the_chat_template_may_be_in_the_config(tmp_path):
    shutil.copy(LLAMA / "tokenizer.json", tmp_path)
    config = json.loads((LLAMA / "tokenizer_config.json").read_text())
    config["chat_template"] = (LLAMA / "chat_template.jinja").read_text()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    check_golden(load_tokenizer(tmp_path))


def test_a_gguf_file_equals_the_reference(tmp_path, metadata):
    path = write_gguf(tmp_path / "model.gguf", metadata)
    assert metadata.items() <= read_gguf_metadata(path).items()
    check_golden(load_tokenizer(path))


def test_splitting_rules_of_gguf(metadata):
    def words(pre, text):
        tokenizer = tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": pre})
        splits = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return [word.replace("Ġ", " ") for word, _ in splits]

    assert words("gpt-2", "in 1234 don't") == ["in", " 1234", " don", "'t"]
    assert words("smollm", "in 1234 don't") == ["in", " ", "1", "2", "3", "4", " don", "'t"]
    assert words("qwen2", "in 12 DON'T") == ["in", " ", "1", "2", " DON", "'T"]
    assert words("llama-bpe", "in 1234 DON'T") == ["in", " ", "123", "4", " DON", "'T"]


def pieces_of(text, vocab, scores):
    """SentencePiece's BPE: join the neighbors that make the piece of the highest score."""
    pieces = list(text)
    while True:
        joined = ["".join(pieces[i : i + 2]) for i in range(len(pieces) - 1)]
        pairs = [(scores[vocab[x]], -i) for i, x in enumerate(joined) if x in vocab]
        if not pairs:
            return pieces
        i = -max(pairs)[1]
        pieces[i : i + 2] = ["".join(pieces[i : i + 2])]


@pytest.mark.parametrize("space_prefix", [False, True], ids=["gemma", "llama"])
def test_sentencepiece_in_gguf(space_prefix):
    space = "\u2581"
    letters = [space, *"abc"]
    made = [a + b for a in letters for b in letters if b != space]
    made += ["abc", f"{space}ab", f"{space}abc", "abab", "cab"]
    tokens = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", *letters, *made, "<end>"]
    kinds = [2, 3, 3, 6, 6, *[1] * (len(letters) + len(made)), 4]
    order = random.Random(0).sample(range(len(made)), len(made))
    scores = [0.0] * 9 + [-float(i) for i in order] + [-1000.0]
    tokenizer = tokenizer_from_gguf(
        {
            "general.architecture": "gemma3",
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.add_space_prefix": space_prefix,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
    )
    vocab = {token: i for i, token in enumerate(tokens)}
    for text in ("abcab cab", "aabbcc  abc", "ccab abab ab"):
        want = pieces_of(space * space_prefix + text.replace(" ", space), vocab, scores)
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *(vocab[piece] for piece in want)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    ids = tokenizer("aé<end>", add_special_tokens=False)["input_ids"]
    assert ids[-3:] == [3, 4, len(tokens) - 1]  # bytes of what is no piece, and a whole token
    assert tokenizer.decode(ids) == "aé<end>"


def test_a_beginning_of_sequence_is_added_only_where_the_file_says_so(metadata):
    tokenizer = tokenizer_from_gguf(metadata | {"tokenizer.ggml.add_bos_token": True})
    assert tokenizer("a")["input_ids"] == [
        1,
        *tokenizer("a", add_special_tokens=False)["input_ids"],
    ]
    tokenizer = tokenizer_from_gguf(metadata | {"tokenizer.ggml.add_bos_token": False})
    assert tokenizer("a")["input_ids"][0] != 1


def test_user_defined_tokens_stay_whole_and_visible(metadata):
    kinds = list(metadata["tokenizer.ggml.token_type"])
    kinds[6] = 4  # <|end|>
    tokenizer = tokenizer_from_gguf(metadata | {"tokenizer.ggml.token_type": kinds})
    ids = tokenizer("a<|end|>")["input_ids"]
    assert ids[-1] == 6
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<|end|>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokenizer.ggml.model": "bert"},
            "'bert' with .* expected 'llama', or 'gpt2'",
        ),
        ({"tokenizer.ggml.model": "llama"}, "expected tokenizer.ggml.tokens and .scores"),
        ({"tokenizer.ggml.pre": "qwen9"}, "pre 'qwen9' is not read"),
        ({"tokenizer.ggml.tokens": None}, "holds no complete tokenizer"),
        ({"tokenizer.ggml.merges": None}, "holds no complete tokenizer"),
        ({"tokenizer.ggml.token_type": [1]}, "holds no complete tokenizer"),
        ({"tokenizer.ggml.token_type": 1}, "holds no complete tokenizer"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "holds no complete tokenizer"),
        (
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]},
            "one .token_type and score a token",
        ),
        ({"tokenizer.ggml.merges": ["no such"]}, "merges do not fit its tokens"),
        ({"tokenizer.ggml.bos_token_id": 2**32 - 1}, "bos_token_id is 4294967295; expected the"),
        ({"tokenizer.ggml.eos_token_id": "</s>"}, "eos_token_id is '</s>'; expected the number"),
    ],
)
def test_unknown_gguf_tokenizers_are_refused(metadata, change, message):
    with pytest.raises(InputError, match=message):
        tokenizer_from_gguf(metadata | change)


def test_damaged_gguf_files_are_refused(tmp_path, metadata):
    whole = write_gguf(tmp_path / "whole.gguf", metadata).read_bytes()
    path = tmp_path / "bad.gguf"
    for content in (b"", b"GGUF", b"GGUX" + whole[4:], whole[:1000], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"bad.gguf' is not a complete GGUF file"):
            read_gguf_metadata(path)
    path.write_bytes(whole[:24] + b"\xff" * 8 + whole[32:])  # a string of 2**64 - 1 bytes
    with pytest.raises(InputError, match="announces"):
        read_gguf_metadata(path)
    (tmp_path / "directory.gguf").mkdir()
    with pytest.raises(InputError, match="directory.gguf' cannot be read"):
        read_gguf_metadata(tmp_path / "directory.gguf")
    with pytest.raises(InputError, match="No GGUF file at"):
        read_gguf_metadata(tmp_path / "none.gguf")


NESTED = struct.pack("<Q1sI", 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 100_000
ALIGNED = struct.pack("<Q17sII", 17, b"general.alignment", 4, 0)
NO_AXES = struct.pack("<Q1sIIQ", 1, b"t", 0, 0, 0)
EMPTY = struct.pack("<Q1sIQIQ", 1, b"t", 1, 0, 0, 0)
FIVE_AXES = struct.pack("<Q1sI5QIQ", 1, b"t", 5, *[1] * 5, 0, 0)


@pytest.mark.parametrize(
    ("tensors", "keys", "content", "message"),
    [
        (0, 1, NESTED, "it has a list of values of kind 9"),
        (0, 1, ALIGNED, "general.alignment is 0; expected a positive number"),
        (1, 0, NO_AXES, "tensor 't' has 0 axes"),
        (1, 0, EMPTY, r"tensor 't' has 1 axes \[0\]"),
        (1, 0, FIVE_AXES, "tensor 't' has 5 axes"),
    ],
)
def test_headers_that_no_writer_makes_are_refused(tmp_path, tensors, keys, content, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys) + content)
    with pytest.raises(InputError, match=f"not a complete GGUF file .*{message}"):
        read_gguf_metadata(path)


def test_directories_without_tokenizer_are_refused(tmp_path):
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(InputError, match=r"No tokenizer.json .*found: tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="No tokenizer at"):
        load_tokenizer(tmp_path / "none")


def test_no_torch_and_no_noise():
    code = (
        "import sys; from jax_qlora.interop.tokenizer import load_tokenizer; "
        f"load_tokenizer({str(LLAMA)!r}); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_real_smollm2():
    try:
        path = resolve("smollm2-135m-instruct")
    except InputError:
        pytest.skip("not in the cache: jax-qlora download smollm2-135m-instruct")
    tokenizer = load_tokenizer(path)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    assert (len(tokenizer), tokenizer.model_max_length) == (49_152, 8_192)
    chat = [{"role": "user", "content": "Hi"}]
    # the ids that transformers gives for HuggingFaceTB/SmolLM2-135M-Instruct
    system = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018]
    system += [411, 407, 19712, 8182, 2, 198]
    assert encode_prompt(tokenizer, chat) == [
        *system,
        1,
        4093,
        198,
        26843,
        2,
        198,
        1,
        520,
        9531,
        198,
    ]
    text = "In 1611, 7 cafés\n\n\t don't 你好 😀"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    train = load_examples("modern-english")[:64] if _texts_are_there() else []
    for example in train:
        encoded = encode(tokenizer, example, 96)
        assert encoded.tokens[encoded.loss_mask][-1] == 2


def _texts_are_there():
    try:
        return bool(resolve("modern-english"))
    except InputError:
        return False
