# SPDX-License-Identifier: Apache-2.0
"""Tokens added to a tokenizer, and their rows: where they are and what they start as."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora.interop.load_params import EMBEDDINGS
from jax_qlora.interop.new_tokens import GrownTensor, add_rows, add_tokens, tokens_beside
from jax_qlora.interop.safetensors import StoredTensor, read_header
from jax_qlora.interop.tokenizer import load_tokenizer
from jax_qlora.models import Model
from jax_qlora.models.presets import TINY
from tests.helpers import GOLDEN, normal

LLAMA = GOLDEN / "models" / "llama"
NEW = ("<tool>", "</tool>")


def tables(model: Model) -> list[np.ndarray]:
    """Embedding and head, a row for each token."""
    embedding, head = (model.params[path.split("/")[0]][path.split("/")[1]] for path in EMBEDDINGS)
    return [np.asarray(jq.merge({"x": x})["x"]) for x in (embedding, jnp.asarray(head).T)]


@pytest.fixture(scope="module")
def plain() -> Model:
    return jq.load_model(LLAMA, quantization=None)


def test_a_full_vocabulary_grows(plain: Model):
    model = jq.load_model(LLAMA, new_tokens=NEW)
    first = len(plain.tokenizer)
    assert model.tokenizer.convert_tokens_to_ids(list(NEW)) == [first, first + 1]
    assert model.config == replace(plain.config, vocab_size=first + 2)
    for grown, before in zip(tables(model), tables(plain), strict=True):
        np.testing.assert_array_equal(grown[:first], before[:first])
        mean = before[:first].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(grown[first:], np.stack([mean, mean]), atol=1e-7)
    tokens = jnp.array([[5, 7, first]])
    logits = model.apply(model.params, tokens)
    assert logits.shape == (1, 3, first + 2)


def test_a_token_is_one_wherever_it_stands(plain: Model):
    tokenizer = load_tokenizer(LLAMA)
    _, (tool, end) = add_tokens(tokenizer, NEW, plain.config, where="it")
    ids = tokenizer("alpha<tool>beta</tool>", add_special_tokens=False)["input_ids"]
    assert ids.count(tool) == ids.count(end) == 1
    shown = tokenizer.decode(ids, skip_special_tokens=True)
    assert "<tool>" in shown and "</tool>" in shown
    plain_ids = plain.tokenizer("alpha", add_special_tokens=False)["input_ids"]
    assert ids[: len(plain_ids)] == plain_ids


def stored(x: np.ndarray, tmp_path: Path) -> StoredTensor:
    from safetensors.numpy import save_file

    save_file({"x": x}, tmp_path / "x.safetensors")
    return read_header(tmp_path / "x.safetensors")["x"]


@pytest.mark.parametrize(("rows", "first"), [(12, 9), (10, 10), (11, 10), (13, 10)])
def test_rows_that_are_read_in_parts_are_those_of_the_whole(tmp_path: Path, rows: int, first: int):
    """Rows to spare behind the tokens, none, and some."""
    there = np.asarray(normal((10, 4)))
    grown = GrownTensor(tensor=stored(there, tmp_path), rows=rows, first=first, count=rows - first)
    whole = grown.read()
    assert whole.shape == grown.shape == (rows, 4)
    np.testing.assert_array_equal(whole[:first], there[:first])
    mean = there[:first].astype(np.float64).mean(axis=0).astype(np.float32)
    np.testing.assert_array_equal(whole[first:], np.tile(mean, (rows - first, 1)))
    for start in range(rows):
        for stop in range(start, rows + 1):
            np.testing.assert_array_equal(grown.read(start, stop), whole[start:stop])


def test_rows_to_spare_are_used_first(plain: Model):
    roomy = replace(plain.config, vocab_size=len(plain.tokenizer) + 8)
    config, numbers = add_tokens(load_tokenizer(LLAMA), NEW, roomy, where="it")
    assert config == roomy and numbers[0] == len(plain.tokenizer)


def test_an_embedding_in_four_bits_grows_too():
    model = jq.load_model(LLAMA, embeddings=True, new_tokens=NEW)
    table = model.params["embed_tokens"]["embedding"]
    assert isinstance(table, jq.QuantizedArray) and table.shape[0] == model.config.vocab_size
    row = jq.dequantize(table)[-1]
    assert float(jnp.abs(row - jq.dequantize(table)[-2]).max()) == 0


def test_what_cannot_be_added():
    tokenizer = load_tokenizer(LLAMA)
    there = next(iter(tokenizer.get_vocab()))
    with pytest.raises(jq.InputError, match="that the tokenizer lacks, found .*, which is its tok"):
        add_tokens(tokenizer, [there], TINY, where="it")
    with pytest.raises(
        jq.InputError, match="expected a model with a tokenizer to add to, found it"
    ):
        add_tokens(None, NEW, TINY, where="it")
    with pytest.raises(jq.InputError, match="the embedding 9 rows: expected a row for each token"):
        add_tokens(tokenizer, NEW, replace(TINY, vocab_size=9), where="it")


def test_an_embedding_in_4_bits_on_disk_does_not_grow():
    header = read_header(GOLDEN / "models" / "llama_bnb4" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {
        k.replace(name, "lm_head.weight"): x for k, x in header.items() if k.startswith(name)
    }
    with pytest.raises(jq.InputError, match="'lm_head.weight' of the checkpoint is in 4 bits"):
        add_rows(tensors, TINY, [96])


def test_tokens_beside_an_adapter(tmp_path: Path):
    assert tokens_beside(tmp_path, LLAMA) == ()
    tokenizer = load_tokenizer(LLAMA)
    tokenizer.save_pretrained(tmp_path)
    assert tokens_beside(tmp_path, LLAMA) == ()
    add_tokens(tokenizer, NEW, replace(TINY, vocab_size=len(tokenizer)), where="it")
    tokenizer.save_pretrained(tmp_path)
    assert tokens_beside(tmp_path, LLAMA) == NEW
    bare = tmp_path / "bare"
    shutil.copytree(LLAMA, bare)
    (bare / "tokenizer.json").unlink()
    assert tokens_beside(tmp_path, bare) == ()


def test_an_adapter_with_its_tokenizer(plain: Model, tmp_path: Path):
    model = jq.load_model(LLAMA, quantization=None, new_tokens=NEW)
    found = jq.find_targets(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    adapter: Any = jq.init_adapter(jax.random.key(0), found, rank=2)
    adapter = {path: replace(pair, b=pair.b + 0.1) for path, pair in adapter.items()}
    first = len(plain.tokenizer)
    everywhere = {target.path: target for target in found.found}
    for path in EMBEDDINGS:
        adapter[path] = jq.train_tokens(model.params, everywhere[path], [first, first + 1])
    jq.save_adapter(tmp_path / "a", adapter, model, tokenizer=model.tokenizer)
    (tmp_path / "a" / "mine.txt").write_text("kept")
    jq.save_adapter(tmp_path / "a", adapter, model, tokenizer=model.tokenizer)
    assert (tmp_path / "a" / "mine.txt").read_text() == "kept"
    assert tokens_beside(tmp_path / "a", LLAMA) == NEW
    again = jq.load_adapter(tmp_path / "a", model)
    assert again["lm_head/kernel"].indices == (first, first + 1)
    with pytest.raises(jq.InputError, match=f"trains row {first} of .*, which has {first} rows"):
        jq.load_adapter(tmp_path / "a", plain)
