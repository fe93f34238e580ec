# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_qlora as jq
from jax_qlora.errors import InputError
from jax_qlora.interop.bnb import bnb_parts, check_quantization, read_bnb
from jax_qlora.interop.safetensors import read_directory
from jax_qlora.quant import QuantizedArray, dequantize
from tests.helpers import GOLDEN, golden

MODELS = GOLDEN / "models"
QUANTIZED = ["llama_bnb4", "llama_bnb4_bf16", "llama_bnb4_nodq_fp4"]
NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_are_those_that_bitsandbytes_multiplies_with(name: str):
    model = jq.load_model(MODELS / name)
    outputs = golden("model_outputs.npz")
    dtype = jnp.bfloat16 if name.endswith("bf16") else jnp.float32
    for proj in ("q_proj", "k_proj", "v_proj", "o_proj"):
        kernel = model.params["layers"]["self_attn"][proj]["kernel"]
        assert isinstance(kernel, QuantizedArray) and kernel.dtype == dtype
        first = jax.tree.map(lambda x: x[0], kernel)
        want = outputs[f"{name}/dequant/model.layers.0.self_attn.{proj}.weight"]
        got = dequantize(first, dtype).T.astype(jnp.float32)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_are_kept(name: str):
    stored = load_file(MODELS / name / "model.safetensors")
    kernel = jq.load_model(MODELS / name).params["layers"]["mlp"]["down_proj"]["kernel"]
    np.testing.assert_array_equal(kernel.codes[1].reshape(-1), stored[NAME].reshape(-1))
    assert kernel.format == ("fp4" if "fp4" in name else "nf4")
    assert kernel.double_quant == ("nodq" not in name)
    # rows of 176 in blocks of 64: the blocks straddle rows, and are kept as blocks of 16
    assert kernel.block_size == 16 and kernel.shape == (2, 176, 64)
    assert not kernel.double_quant or kernel.group_size == 1024


def test_quantization_none_makes_the_weights_dense():
    packed = jq.load_model(MODELS / "llama_bnb4")
    dense = jq.load_model(MODELS / "llama_bnb4", quantization=None)
    kernel = dense.params["layers"]["mlp"]["down_proj"]["kernel"]
    want = dequantize(packed.params["layers"]["mlp"]["down_proj"]["kernel"])
    np.testing.assert_array_equal(kernel, want)
    assert isinstance(kernel, jax.Array)


def copy(tmp_path: Path, name: str = "llama_bnb4") -> tuple[Path, dict[str, np.ndarray]]:
    shutil.copytree(MODELS / name, tmp_path / name)
    return tmp_path / name, load_file(tmp_path / name / "model.safetensors")


def state_of(tensors: dict[str, np.ndarray], name: str = NAME) -> tuple[str, dict[str, Any]]:
    key = f"{name}.quant_state.bitsandbytes__nf4"
    return key, json.loads(bytes(tensors[key]))


def json_bytes(content: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def test_storage_in_another_dtype_is_the_same_bytes(tmp_path: Path):
    """`bnb_4bit_quant_storage`, as FSDP wants it."""
    directory, tensors = copy(tmp_path)
    tensors[NAME] = tensors[NAME].reshape(-1).view(np.float32)
    save_file(tensors, directory / "model.safetensors")
    got = jq.load_model(directory).params["layers"]["mlp"]["down_proj"]["kernel"]
    want = jq.load_model(MODELS / "llama_bnb4").params["layers"]["mlp"]["down_proj"]["kernel"]
    np.testing.assert_array_equal(got.codes, want.codes)


def test_missing_part(tmp_path: Path):
    directory, tensors = copy(tmp_path)
    del tensors[f"{NAME}.nested_quant_map"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match="4-bit tensor without its part '.*nested_quant_map'"):
        jq.load_model(directory)
    assert bnb_parts(read_directory(MODELS / "llama_bnb4"), "lm_head.weight") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [64, 64]}, r"has shape \[64, 64\], expected \[64, 176\] from config.json"),
        ({"blocksize": 128}, "in blocks of 128 has .* block constants"),
        ({"blocksize": 0}, "contradicts itself: 'nf4' under the name of nf4, blocks of 0"),
        ({"blocksize": 10**15}, "contradicts itself"),
        ({"quant_type": "fp4"}, "contradicts itself: 'fp4' under the name of nf4"),
        ({"nested_blocksize": 0}, "contradicts itself.* groups of 0"),
        ({"nested_blocksize": 16}, "has 1 constants of groups; expected 11"),
        ({"nested_offset": "much"}, "quantization state that cannot be read"),
        ({"nested_blocksize": None}, "quantization state that cannot be read"),
        ({"nested_offset": float("nan")}, "block constants that are not finite"),
    ],
)
def test_a_state_that_contradicts_the_rest(tmp_path: Path, change: dict, message: str):
    directory, tensors = copy(tmp_path)
    key, state = state_of(tensors)
    tensors[key] = json_bytes(state | change)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match=message):
        jq.load_model(directory)


def test_a_state_that_is_no_json(tmp_path: Path):
    directory, tensors = copy(tmp_path)
    tensors[state_of(tensors)[0]] = np.frombuffer(b"{shape", np.uint8)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match="quantization state that cannot be read"):
        jq.load_model(directory)


@pytest.mark.parametrize("part", ["quant_map", "nested_quant_map"])
def test_foreign_levels_are_refused(tmp_path: Path, part: str):
    directory, tensors = copy(tmp_path)
    tensors[f"{NAME}.{part}"] = tensors[f"{NAME}.{part}"] * np.float32(1.01)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match=f"has a {part} that is not the standard one"):
        jq.load_model(directory)


def test_layers_that_are_not_alike(tmp_path: Path):
    directory, tensors = copy(tmp_path)
    _, donor = copy(tmp_path, "llama_bnb4_nodq_fp4")
    kept = {k: v for k, v in tensors.items() if not k.startswith(NAME)}
    save_file(
        kept | {k: v for k, v in donor.items() if k.startswith(NAME)},
        directory / "model.safetensors",
    )
    with pytest.raises(InputError, match="layers are quantized differently"):
        jq.load_model(directory)
    dense = load_file(MODELS / "llama" / "model.safetensors")[NAME]
    save_file(kept | {NAME: dense}, directory / "model.safetensors")
    with pytest.raises(InputError, match="is in 4 bits and '.*' is not"):
        jq.load_model(directory)
    model = jq.load_model(directory, quantization=None)  # skipped modules are a reason for it
    np.testing.assert_array_equal(model.params["layers"]["mlp"]["down_proj"]["kernel"][1], dense.T)


def test_rows_of_odd_length(tmp_path: Path):
    tensors = read_directory(MODELS / "llama_bnb4")
    with pytest.raises(InputError, match=r"has shape \[64, 176\], expected \[64, 177\]"):
        read_bnb(tensors, [NAME], (64, 177), dtype=jnp.float32)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            r"quantized \(gptq\), which is not read.* Use the unq",
        ),
        ({"quant_method": "awq", "bits": 4}, r"quantized \(awq\), which is not read"),
        ([4], r"quantization_config is \[4\]; expected an object"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
            r"\(bitsandbytes, 8 bits\)",
        ),
    ],
)
def test_other_quantizations_are_refused(quantization: Any, message: str):
    with pytest.raises(InputError, match=message):
        check_quantization({"quantization_config": quantization}, where="config.json")
    check_quantization({}, where="config.json")


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8"])
def test_a_directory_in_another_quantization_is_named_before_it_is_read(
    tmp_path: Path, method: str
):
    directory, _ = copy(tmp_path, "llama")
    (directory / "model.safetensors").unlink()
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"config.json'.*quantized \({method}\), which is not re"):
        jq.load_model(directory)
