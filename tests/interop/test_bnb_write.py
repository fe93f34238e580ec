# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jax_qlora as jq
from jax_qlora.errors import InputError
from jax_qlora.interop.bnb_write import encode_rows, save_bnb
from jax_qlora.interop.load_params import Encoding
from jax_qlora.interop.quantize_checkpoint import quantize_checkpoint
from jax_qlora.interop.safetensors import read_directory
from jax_qlora.lora.array import is_special
from jax_qlora.quant import QuantizedArray
from jax_qlora.tree import flatten_paths
from tests.helpers import GOLDEN, assert_trees_close, normal

MODELS = GOLDEN / "models"
NF4 = Encoding("nf4", 64, True)
ENCODINGS = {
    "llama_bnb4": NF4,
    "llama_bnb4_bf16": NF4,
    "llama_bnb4_nodq_fp4": Encoding("fp4", 64, False),
}
DOWN = "model.layers.1.mlp.down_proj.weight"


def contents(directory: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint; quantization states as what their JSON says."""
    tensors = {name: tensor.read() for name, tensor in read_directory(directory).items()}
    return {k: json.loads(bytes(x)) if "quant_state" in k else x for k, x in tensors.items()}


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_checkpoint_of_bitsandbytes_is_written_as_it_was_read(tmp_path: Path, name: str):
    """Rows of 176: blocks that straddle rows are put together again."""
    model = jq.load_model(MODELS / name)
    saved = save_bnb(tmp_path / "out", model.params, model.config, encoding=ENCODINGS[name])
    got, want = contents(saved.path), contents(MODELS / name)
    assert got.keys() == want.keys() and saved.tensors == len(want)
    for key, x in want.items():
        if isinstance(x, dict):
            assert got[key] == x
        else:
            assert got[key].dtype == x.dtype
            np.testing.assert_array_equal(got[key], x, err_msg=key)
    quantization = json.loads((saved.path / "config.json").read_text())["quantization_config"]
    theirs = json.loads((MODELS / name / "config.json").read_text())["quantization_config"]
    skipped = quantization.pop("llm_int8_skip_modules")
    assert skipped == ["lm_head"] and quantization.items() <= theirs.items()
    again = jq.load_model(saved.path)
    assert_trees_close(again.params, model.params)


@pytest.mark.parametrize("name", ["llama_bnb4", "llama_bnb4_nodq_fp4"])
def test_a_dense_checkpoint_becomes_what_bitsandbytes_makes_of_it(tmp_path: Path, name: str):
    """Tensor by tensor and from a loaded model; 8-bit constants as in `test_blockwise.py`."""
    encoding = ENCODINGS[name]
    saved = quantize_checkpoint(MODELS / "llama", tmp_path / "out", encoding=encoding)
    got, want = contents(saved.path), contents(MODELS / name)
    assert got.keys() == want.keys()
    for key, x in want.items():
        if isinstance(x, dict):
            offset = x.pop("nested_offset", None)
            if offset is not None:
                np.testing.assert_allclose(got[key].pop("nested_offset"), offset, rtol=1e-6)
            assert got[key] == x
        elif key.endswith(".absmax") and x.dtype == np.uint8:
            # their CPU kernel is approximate, ours exact nearest
            off = np.abs(got[key].astype(int) - x)
            assert off.max() <= 1 and np.mean(off) < 0.02
        elif key.endswith("nested_absmax"):
            np.testing.assert_allclose(got[key], x, rtol=1e-6)
        else:
            np.testing.assert_array_equal(got[key], x, err_msg=key)
    model = jq.load_model(MODELS / "llama", quantization=None)
    other = save_bnb(tmp_path / "other", model.params, model.config, encoding=encoding)
    again = contents(other.path)
    for key, x in got.items():
        if not isinstance(x, dict):
            np.testing.assert_array_equal(again[key], x, err_msg=key)


def test_codes_are_those_of_loading_and_all_files_come_along(tmp_path: Path):
    saved = quantize_checkpoint(MODELS / "llama", tmp_path / "out", encoding=NF4)
    got = jq.load_model(saved.path)
    want = jq.load_model(MODELS / "llama")
    for part in ("self_attn", "mlp"):
        for name, module in want.params["layers"][part].items():
            if name != "down_proj":  # rows of 176 are padded on loading
                assert_trees_close(got.params["layers"][part][name], module)
    assert got.config == want.config
    assert got.tokenizer.chat_template == want.tokenizer.chat_template
    raw = json.loads((MODELS / "llama" / "config.json").read_text())
    written = json.loads((saved.path / "config.json").read_text())
    assert {k: v for k, v in written.items() if k != "quantization_config"} == raw
    assert "nf4 in 4 bits (bitsandbytes)" in (saved.path / "README.md").read_text()
    with pytest.raises(InputError, match="is in 4 bits already"):
        quantize_checkpoint(saved.path, tmp_path / "again", encoding=NF4)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["phi3", "mixtral"])
def test_other_families(tmp_path: Path, name: str):
    """Fused linears, and experts: each weight is near what it was, and routers are as they were."""
    saved = quantize_checkpoint(MODELS / name, tmp_path / "out", encoding=NF4)
    got = jq.load_model(saved.path)
    dense = jq.load_model(MODELS / name, quantization=None)
    assert got.config == dense.config
    kernels = 0
    for path, x in flatten_paths(got.params, is_leaf=is_special).items():
        want = np.asarray(flatten_paths(dense.params)[path], np.float32)
        if isinstance(x, QuantizedArray):
            kernels += 1
            error = np.abs(np.asarray(jq.dequantize(x, jnp.float32)) - want)
            assert 0 < error.max() < 0.2 * np.abs(want).max()
        else:
            np.testing.assert_array_equal(np.asarray(x, np.float32), want, err_msg=path)
    assert kernels == (4 if name == "phi3" else 7)


@pytest.mark.parametrize("shape", [(7, 30), (64, 176), (3, 64), (1, 5)])
def test_rows_are_encoded_in_pieces_as_a_whole(monkeypatch: pytest.MonkeyPatch, shape: Any):
    x = np.array(normal(shape))
    whole = encode_rows(lambda a, b: x[a:b], shape, NF4, where="x")
    monkeypatch.setattr("jax_qlora.interop.bnb_write._CHUNK", 64)
    pieces = encode_rows(lambda a, b: x[a:b], shape, NF4, where="x")
    pair: Any
    for pair in zip(pieces, whole, strict=True):
        np.testing.assert_array_equal(*pair)
    assert whole.codes.size == -(-x.size // 2)
    x[-1, -1] = np.nan
    with pytest.raises(InputError, match="x has values that are not finite"):
        encode_rows(lambda a, b: x[a:b], shape, NF4, where="x")


def test_a_merged_model_is_quantized_again(tmp_path: Path):
    model = jq.load_model(MODELS / "llama_bnb4")
    targets = jq.find_targets(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    adapter = jq.init_adapter(jax.random.key(1), targets.select(["q_proj"]), rank=2)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    params = jq.attach(model.params, adapter)
    saved = save_bnb(tmp_path / "out", params, model.config, encoding=NF4)
    assert saved.updates == 2
    got = jq.load_model(saved.path, quantization=None).params["layers"]["self_attn"]
    want = jq.merge(model.params, adapter)["layers"]["self_attn"]
    np.testing.assert_array_equal(got["k_proj"]["kernel"], want["k_proj"]["kernel"])  # kept
    difference = np.abs(got["q_proj"]["kernel"] - want["q_proj"]["kernel"])
    assert 0 < difference.max() < 0.2 * np.abs(want["q_proj"]["kernel"]).max()  # NF4's widest gap


def test_what_bitsandbytes_has_not(tmp_path: Path):
    model = jq.load_model(MODELS / "llama")
    for encoding in (Encoding("int4", 64, True), Encoding("nf4", 48, True)):
        with pytest.raises(InputError, match="bitsandbytes has nf4 and fp4, in blocks of 32, 64"):
            save_bnb(tmp_path / "out", model.params, model.config, encoding=encoding)
    with pytest.raises(InputError, match="down_proj.* rows padded by 16.* cannot be kept as nf4"):
        save_bnb(tmp_path / "out", model.params, model.config, encoding=NF4)
    packed = jq.load_model(MODELS / "llama_bnb4")
    others = [Encoding("fp4", 64, True), Encoding("nf4", 64, False), Encoding("nf4", 32, True)]
    for encoding in others:
        with pytest.raises(InputError, match="cannot be kept as"):
            save_bnb(tmp_path / "out", packed.params, packed.config, encoding=encoding)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_are_not_whole(tmp_path: Path):
    stored = load_file(MODELS / "llama" / "model.safetensors")
    source = tmp_path / "in"
    source.mkdir()
    (source / "config.json").write_text((MODELS / "llama" / "config.json").read_text())
    from safetensors.numpy import save_file

    save_file({k: v for k, v in stored.items() if k != DOWN}, source / "model.safetensors")
    with pytest.raises(InputError, match=f"1 missing: {DOWN}"):
        quantize_checkpoint(source, tmp_path / "out", encoding=NF4)
    stored[DOWN][3, 5] = np.inf
    save_file(stored, source / "model.safetensors")
    with pytest.raises(InputError, match=f"'{DOWN}' has values that are not finite"):
        quantize_checkpoint(source, tmp_path / "out", encoding=NF4)
    assert [f.name for f in tmp_path.iterdir()] == ["in"]
