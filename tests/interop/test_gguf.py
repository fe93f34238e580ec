# SPDX-License-Identifier: Apache-2.0
import contextlib
import json
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

import jax_qlora as jq
from jax_qlora.errors import InputError
from jax_qlora.interop.download import cache_directory, resolve
from jax_qlora.interop.gguf import GGUFTensor, check_entries, read_gguf
from jax_qlora.interop.gguf_config import config_from_gguf
from jax_qlora.interop.gguf_metadata import read_gguf_header
from jax_qlora.interop.hf_config import read_config
from jax_qlora.models import RopeScaling
from jax_qlora.models.presets import SMOLLM2_135M
from jax_qlora.models.rope import rope_frequencies
from jax_qlora.quant import QuantizedArray
from tests.helpers import GOLDEN, assert_trees_close, golden

MODELS = GOLDEN / "models"
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter does it."""
    pairs = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:])
    return pairs.swapaxes(1, 2).reshape(w.shape)


def write_gguf(
    file: Path,
    name: str = "llama",
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    drop: tuple[str, ...] = (),
    add: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """A Hugging Face fixture as a GGUF file, by the `gguf` package's own writer."""
    config, _ = read_config(MODELS / name)
    writer = gguf.GGUFWriter(file, "llama")
    keys = {
        "block_count": config.n_layers,
        "context_length": config.max_length,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    } | (add or {})
    for key, value in keys.items():
        if key in drop:
            continue
        if isinstance(value, str):
            writer.add_string(f"llama.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"llama.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"llama.{key}", value)
        else:
            writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32("llama.rope.freq_base", config.rope_theta)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    tokens = ["t", "1", "t1", *(f"t{i}" for i in range(3, config.vocab_size))]
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.merges", ["t 1"])
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
    tensors = {}
    for hf, x in load_file(MODELS / name / "model.safetensors").items():
        module = hf.removesuffix(".weight")
        if module in TOP:
            tensors[f"{TOP[module]}.weight"] = x
        else:
            block, _, rest = module.removeprefix("model.layers.").partition(".")
            x = permute(x, heads[NAMES[rest]]) if NAMES[rest] in heads else x
            tensors[f"blk.{block}.{NAMES[rest]}.weight"] = x
    for tensor, x in (tensors | (extra or {})).items():
        if tensor in drop:
            continue
        if kind != GGMLQuantizationType.F32 and x.ndim == 2:
            writer.add_tensor(tensor, quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.proves("GGUF in", "llama")
@pytest.mark.parametrize("side", ["", "left/"], ids=["right-padded", "left-padded"])
def test_logits_are_those_of_the_same_model_from_hugging_face(tmp_path: Path, side: str):
    model = jq.load_model(write_gguf(tmp_path / "m.gguf"), quantization=None)
    outputs = golden("model_outputs.npz")
    mask = outputs[f"llama/{side}attention_mask"]
    tokens = jnp.array(outputs[f"llama/{side}input_ids"], jnp.int32)
    got = model.apply(model.params, tokens, attention_mask=jnp.array(mask))
    np.testing.assert_allclose(got[mask == 1], outputs[f"llama/{side}logits"][mask == 1], atol=1e-4)
    want = jq.load_model(MODELS / "llama", quantization=None)
    assert_trees_close(model.params, want.params)
    assert model.tokenizer is not None


def test_config_is_that_of_the_same_model_from_hugging_face(tmp_path: Path):
    config, tensors = read_gguf(write_gguf(tmp_path / "m.gguf"))
    want, _ = read_config(MODELS / "llama")
    assert (config.norm_eps, config.rope_theta, config.tied) == (1e-5, 10_000, False)
    assert {k for k in vars(config) if getattr(config, k) != getattr(want, k)} == {"pad_token_id"}
    assert set(tensors) == set(load_file(MODELS / "llama" / "model.safetensors"))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_tensors_are_decoded_as_the_package_does(tmp_path: Path, kind: str):
    quantized = GGMLQuantizationType[kind]
    _, tensors = read_gguf(write_gguf(tmp_path / "m.gguf", "llama_rope3_tied", kind=quantized,
                                      extra={"rope_freqs.weight": llama3_factors()}))  # fmt: skip
    want = load_file(MODELS / "llama_rope3_tied" / "model.safetensors")
    config, _ = read_config(MODELS / "llama_rope3_tied")
    for name, x in want.items():
        got = tensors[name].read()
        assert got.shape == x.shape
        heads = {"q_proj.weight": config.n_heads, "k_proj.weight": config.n_kv_heads}
        n = next((n for end, n in heads.items() if name.endswith(end)), 0)
        if x.ndim == 2:
            x = permute(x, n) if n else x
            x = dequantize(quantize(x, quantized), quantized)
            x = tensors[name]._reorder(x)
        np.testing.assert_array_equal(got.astype(np.float32), x, err_msg=name)
        np.testing.assert_array_equal(tensors[name].read(3, 21), got[3:21])
        np.testing.assert_array_equal(tensors[name].read(5), got[5:])


def decoded() -> list[GGMLQuantizationType]:
    found = []
    for kind in GGMLQuantizationType:
        with contextlib.suppress(NotImplementedError):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            found.append(kind)
    assert len(found) > 20
    return found


@pytest.mark.parametrize("kind", decoded(), ids=lambda kind: kind.name)
def test_every_type_that_the_package_decodes(tmp_path: Path, kind: GGMLQuantizationType):
    """Of any bytes: three rows of two blocks of the widest type, whole and by parts."""
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    raw = rng.integers(0, 256, (3, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, entries = read_gguf_header(tmp_path / "m.gguf")
    check_entries(entries, tmp_path / "m.gguf")
    tensor = GGUFTensor(entry=entries["x"], file=tmp_path / "m.gguf")
    assert tensor.shape == (3, 512) and tensor.stored_bytes == raw.nbytes
    with np.errstate(all="ignore"):  # scales may be anything
        want = dequantize(raw, kind)
        np.testing.assert_array_equal(tensor.read().astype(np.float32), want)
        np.testing.assert_array_equal(tensor.read(1, 2).astype(np.float32), want[1:2])


def test_lengths_that_no_file_has(tmp_path: Path):
    """Of a string, a list, the tables and a shape: refused, not allocated."""
    file = tmp_path / "m.gguf"
    long = (1 << 60).to_bytes(8, "little")
    head = b"GGUF" + (3).to_bytes(4, "little")
    one, none = (1).to_bytes(8, "little"), (0).to_bytes(8, "little")
    key = (1).to_bytes(8, "little") + b"k"
    shape = key + (2).to_bytes(4, "little") + long + long + bytes(4 + 8)
    for data in (
        head + none + one + long,
        head + none + one + key + (8).to_bytes(4, "little") + long,
        head + none + one + key + (9).to_bytes(4, "little") + bytes(4) + long,
        head + none + one + key + (9).to_bytes(4, "little") + (8).to_bytes(4, "little") + long,
        head + none + long,
        head + long + none,
    ):
        file.write_bytes(data)
        with pytest.raises(InputError, match="not a complete GGUF file"):
            read_gguf_header(file)
    file.write_bytes(head + one + none + shape)
    with pytest.raises(InputError, match="is truncated: tensor 'k' ends at byte"):
        check_entries(read_gguf_header(file)[1], file)


def llama3_factors(factor: float = 32.0) -> np.ndarray:
    """What llama.cpp's converter stores for the fixture's heads under Llama 3.2's parameters."""
    import dataclasses

    config, _ = read_config(MODELS / "llama_rope3_tied")
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    scaling = RopeScaling(kind="llama3", factor=factor)
    scaled = rope_frequencies(dataclasses.replace(config, rope_scaling=scaling))
    return (plain / scaled).astype(np.float32)


def test_llama3_scaling_is_recognized_by_its_result(tmp_path: Path):
    file = write_gguf(
        tmp_path / "m.gguf", "llama_rope3_tied", extra={"rope_freqs.weight": llama3_factors()}
    )
    config, _ = read_gguf(file)
    assert config.tied and config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("llama3", 32.0)
    file = write_gguf(
        tmp_path / "x.gguf", "llama_rope3_tied", extra={"rope_freqs.weight": llama3_factors(5.0)}
    )
    with pytest.raises(InputError, match="'rope_freqs.weight' are not those of a known Llama 3"):
        read_gguf(file)


def test_linear_scaling_and_biases(tmp_path: Path):
    bias = np.arange(64, dtype=np.float32)
    extra = {f"blk.{i}.attn_{p}.bias": permute(bias, 4) if p == "q" else bias[: 64 if p == "output"
             else 32] for i in range(2) for p in ("q", "k", "v", "output")}  # fmt: skip
    file = write_gguf(
        tmp_path / "m.gguf",
        add={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        extra=extra,
    )
    model = jq.load_model(file)
    assert model.config.rope_scaling is not None and model.config.rope_scaling.factor == 4
    assert model.config.qkv_bias and model.config.out_bias
    np.testing.assert_array_equal(
        model.params["layers"]["self_attn"]["q_proj"]["bias"][1].astype(jnp.float32), bias
    )


def test_a_rotary_factor_without_a_type_is_linear(tmp_path: Path):
    """As llama.cpp takes it, to which 0 is none."""
    for factor, want in ((4.0, RopeScaling(kind="linear", factor=4.0)), (1.0, None), (0.0, None)):
        file = write_gguf(tmp_path / "m.gguf", add={"rope.scaling.factor": factor})
        assert read_gguf(file)[0].rope_scaling == want


def test_storage_of_a_quantized_model(tmp_path: Path):
    model = jq.load_model(write_gguf(tmp_path / "m.gguf"))
    assert isinstance(model.params["layers"]["mlp"]["up_proj"]["kernel"], QuantizedArray)
    assert model.params["embed_tokens"]["embedding"].dtype == jnp.bfloat16
    assert model.params["layers"]["input_layernorm"]["scale"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop": ("block_count",)}, "the key 'llama.block_count' is missing"),
        ({"add": {"expert_count": 8}}, "the key 'llama.expert_used_count' is missing"),
        ({"add": {"logit_scale": 0.5}}, "'llama.logit_scale' is 0.5"),
        ({"add": {"attention.head_count": [4, 2]}}, "head_count' differs between layers"),
        ({"add": {"rope.scaling.type": "yarn"}}, "rope scaling of type 'yarn'"),
        ({"add": {"rope.dimension_count": 8}}, "only a part of each head is rotated"),
        ({"add": {"attention.value_length": 8}}, "values and keys have different widths"),
        ({"add": {"attention.head_count_kv": 3}}, r"n_heads \(4\) is not a multiple"),
        ({"add": {"attention.head_count": 0}}, "head_count' is 0; expected a whole number above 0"),
        ({"add": {"embedding_length": "64"}}, "embedding_length' is '64'; expected a whole"),
        ({"add": {"block_count": 2.0}}, "block_count' is 2.0; expected a whole number above 0"),
        ({"add": {"rope.scaling.factor": float("nan")}}, "factor' is nan; expected a finite num"),
        ({"extra": {"blk.0.ssm.weight": np.ones((2, 2), np.float32)}}, "'blk.0.ssm.weight' is not"),
    ],
)
def test_what_would_change_results_is_refused_by_name(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        read_gguf(write_gguf(tmp_path / "m.gguf", **settings))


def test_missing_tensors_are_listed(tmp_path: Path):
    file = write_gguf(tmp_path / "m.gguf", drop=("blk.1.ffn_up.weight",))
    with pytest.raises(InputError, match="1 missing: model.layers.1.mlp.up_proj.weight"):
        jq.load_model(file)


def test_a_token_whose_number_is_none():
    keys = {
        "block_count": 1, "context_length": 8, "embedding_length": 8, "feed_forward_length": 8,
        "attention.head_count": 1, "attention.layer_norm_rms_epsilon": 1e-6, "vocab_size": 8,
    }  # fmt: skip
    metadata = {"general.architecture": "llama"} | {f"llama.{k}": v for k, v in keys.items()}
    assert config_from_gguf(metadata, {}).eos_token_ids == ()
    with pytest.raises(InputError, match=r"eos_token_id' is \[2\]; expected the number of a tok"):
        config_from_gguf(metadata | {"tokenizer.ggml.eos_token_id": [2]}, {})


def test_another_architecture():
    with pytest.raises(InputError, match="the architecture is 'mamba'"):
        config_from_gguf({"general.architecture": "mamba"}, {})


def test_truncated_and_damaged_files(tmp_path: Path):
    file = write_gguf(tmp_path / "m.gguf")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is truncated: tensor '.*' ends at byte"):
        jq.load_model(file)
    file.write_bytes(whole[:300])
    with pytest.raises(InputError, match="not a complete GGUF file"):
        jq.load_model(file)
    file.write_bytes(whole)
    _, tensors = read_gguf(file)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        for tensor in tensors.values():
            tensor.read()
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        tensors["model.norm.weight"].read()


def test_types_that_are_not_known(tmp_path: Path):
    file = write_gguf(tmp_path / "m.gguf")
    _, entries = read_gguf_header(file)
    name = b"blk.0.attn_q.weight"
    data = bytearray(file.read_bytes())
    at = data.index(name) + len(name) + 4 + 2 * 8
    assert entries[name.decode()].kind == 0
    data[at : at + 4] = (250).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(InputError, match="is of type 250, which the installed gguf package"):
        read_gguf(file)
    data[at : at + 4] = int(GGMLQuantizationType.Q4_K).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(
        InputError, match="rows of 64 in tensor .* no multiple of the block of Q4_K"
    ):
        read_gguf(file)


def smollm2() -> Path:
    """The real model, if `jax-qlora download smollm2-135m-instruct` has been run."""
    try:
        return resolve("smollm2-135m-instruct")
    except InputError:
        pytest.skip(f"smollm2-135m-instruct is not in {cache_directory()}")


def test_a_real_model_answers():
    import dataclasses

    model = jq.load_model(smollm2(), quantization=None)
    assert dataclasses.replace(SMOLLM2_135M, pad_token_id=2) == model.config
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    step = jax.jit(model.decode, donate_argnums=2)
    cache = model.init_cache(1, len(ids) + 10)
    logits, cache = step(model.params, jnp.array([ids]), cache)
    answer = []
    for _ in range(8):
        answer.append(int(jnp.argmax(logits[0, -1])))
        logits, cache = step(model.params, jnp.array([[answer[-1]]]), cache)
    assert model.tokenizer.decode(answer).startswith("The capital of France is Paris.")


def test_metadata_of_the_fixture_is_json_safe(tmp_path: Path):
    """Values are plain Python ones, whatever the file's number types."""
    metadata, _ = read_gguf_header(write_gguf(tmp_path / "m.gguf"))
    assert json.loads(json.dumps(metadata))["llama.block_count"] == 2
