# SPDX-License-Identifier: Apache-2.0
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_qlora as jq
from jax_qlora.errors import InputError
from jax_qlora.interop import load_params as module
from jax_qlora.interop.load import default_compute_dtype
from jax_qlora.models.matmul import matmul
from jax_qlora.quant import QuantizedArray
from jax_qlora.tree import flatten_paths, nbytes
from tests.helpers import GOLDEN, assert_trees_close, golden

MODELS = GOLDEN / "models"
FAMILIES = ["mistral_sharded", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "gpt2"]
EXPERTS = ["mixtral", "qwen3_moe"]
EXACT = ["llama", "llama_rope3_tied", "llama_bnb4", "llama_bnb4_nodq_fp4", *FAMILIES, *EXPERTS]
# float32 logits of magnitude 4, summed in another order
LOGITS = 1e-4


@functools.cache
def reference_outputs() -> dict[str, np.ndarray]:
    return golden("model_outputs.npz") | golden("family_outputs.npz")


def reference(name: str, side: str = "") -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """Tokens, mask and logits of transformers."""
    outputs = reference_outputs()
    ids, mask = outputs[f"{name}/{side}input_ids"], outputs[f"{name}/{side}attention_mask"]
    return jnp.array(ids, jnp.int32), mask, outputs[f"{name}/{side}logits"]


@functools.cache
def load(name: str, **settings: Any) -> Any:
    # None leaves what bitsandbytes has quantized alone only if it is not asked for
    quantization: dict[str, Any] = {} if "bnb" in name else {"quantization": None}
    return jq.load_model(MODELS / name, **(quantization | settings))


def proving(name: str) -> Any:
    column = "bnb in" if "bnb" in name else "HF in"
    return pytest.param(name, marks=pytest.mark.proves(column))


@pytest.mark.parametrize("name", [proving(name) for name in EXACT])
@pytest.mark.parametrize("side", ["", "left/"], ids=["right-padded", "left-padded"])
def test_logits_are_those_of_transformers(name: str, side: str):
    model = load(name)
    tokens, mask, want = reference(name, side)
    got = model.apply(model.params, tokens, attention_mask=jnp.array(mask))
    np.testing.assert_allclose(got[mask == 1], want[mask == 1], atol=LOGITS)


@pytest.mark.parametrize("name", EXACT)
def test_greedy_continuation_is_that_of_transformers(name: str):
    """Of a left-padded batch, through the cache."""
    model = load(name)
    tokens, mask, _ = reference(name, "left/")
    decode = jax.jit(model.decode, donate_argnums=2)
    cache = model.init_cache(tokens.shape[0], tokens.shape[1] + 12)
    logits, cache = decode(model.params, tokens, cache, attention_mask=jnp.array(mask))
    generated = []
    for _ in range(12):
        token = jnp.argmax(logits[:, -1], axis=-1)
        generated.append(token)
        logits, cache = decode(model.params, token[:, None], cache)
    want = reference_outputs()[f"{name}/greedy"]
    np.testing.assert_array_equal(jnp.stack(generated, axis=1), want)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_a_bfloat16_checkpoint_in_4_bits(compute_dtype: str):
    """Loosely: the reference's residual stream is bfloat16 in both cases, and ours in one."""
    name = "llama_bnb4_bf16"
    model = load(name, compute_dtype=compute_dtype)
    suffix = "_computef32" if compute_dtype == "float32" else ""
    tokens, mask, want = reference(name + suffix)
    got = model.apply(model.params, tokens, attention_mask=jnp.array(mask))
    got, want = np.asarray(got)[mask == 1], want[mask == 1]
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)
    assert model.params["embed_tokens"]["embedding"].dtype == jnp.bfloat16
    assert model.params["norm"]["scale"].dtype == jnp.bfloat16
    assert model.init_cache(1, 2).k.dtype == compute_dtype


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("chunk", [1 << 19, 1000])
def test_quantizing_on_the_way_is_quantizing_afterwards(
    double_quant: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    settings = {"format": "nf4", "block_size": 32, "double_quant": double_quant}
    dense = load("llama")
    targets = jq.find_targets(dense.apply, dense.params, jnp.ones((1, 4), jnp.int32))
    want = jq.quantize(dense.params, targets, **settings)
    got = jq.load_model(
        MODELS / "llama", quantization="nf4", block_size=32, double_quant=double_quant
    )
    leaves = flatten_paths(got.params, is_leaf=lambda x: isinstance(x, QuantizedArray))
    kinds = {path for path, leaf in leaves.items() if isinstance(leaf, QuantizedArray)}
    assert kinds == set(targets)
    assert_trees_close(got.params, want, rtol=1e-6)  # the mean of absmax, by an ulp or two
    assert nbytes(got.params) == nbytes(want)


@pytest.mark.parametrize("double_quant", [True, False])
def test_experts_are_quantized_one_by_one(double_quant: bool):
    dense = load("mixtral")
    targets = jq.find_targets(dense.apply, dense.params, jnp.ones((1, 4), jnp.int32))
    assert "layers/mlp/experts/up_proj/kernel" in targets and len(targets) == 7  # no router
    settings: dict[str, Any] = dict(block_size=32, double_quant=double_quant)
    want = jq.quantize(dense.params, targets, **settings)
    got = jq.load_model(MODELS / "mixtral", **settings)
    assert got.params["layers"]["mlp"]["experts"]["up_proj"]["kernel"].lead == (2, 4)
    assert_trees_close(got.params, want, rtol=1e-6)


def test_chunks_that_overlap_change_nothing(monkeypatch: pytest.MonkeyPatch):
    want = load("llama_rope3_tied").params
    load.cache_clear()
    monkeypatch.setattr(module, "_CHUNK", 64 * 37)  # 37 rows: divides no tensor
    assert_trees_close(load("llama_rope3_tied").params, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_half_precision_matmul_is_lifted(dtype: Any, key: jax.Array):
    """Its own derivative rule gives way to that of the quantized and adapted kernel."""

    def loss(adapter: Any, base: Any, x: jax.Array) -> jax.Array:
        tree = jq.attach(base, adapter)
        return jnp.sum(jnp.sin(jq.lift(lambda p, x: matmul(x, p["w"].astype(x.dtype)))(tree, x)))

    w, x = jax.random.normal(key, (64, 32)) / 8, jax.random.normal(key, (6, 64))
    targets = jq.find_targets(lambda p, x: matmul(x, p["w"]), {"w": w}, x)
    base = jq.quantize({"w": w}, targets)
    adapter = jax.tree.map(lambda x: x + 0.05, jq.init_adapter(key, targets, rank=4))
    wide = jax.grad(loss, (0, 2))(adapter, base, x)
    half = jax.grad(loss, (0, 2))(adapter, base, x.astype(dtype))
    assert half[1].dtype == dtype
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(half), strict=True):
        b = b.astype(jnp.float32)
        assert jnp.linalg.norm(a - b) < 0.03 * jnp.linalg.norm(a)


def copy(tmp_path: Path, name: str = "llama") -> tuple[Path, dict[str, np.ndarray]]:
    shutil.copytree(MODELS / name, tmp_path / name)
    return tmp_path / name, load_file(tmp_path / name / "model.safetensors")


def save(directory: Path, tensors: dict[str, np.ndarray]):
    save_file(tensors, directory / "model.safetensors")


def test_storage_dtypes(tmp_path: Path):
    directory, tensors = copy(tmp_path)
    save(directory, {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()})
    model = jq.load_model(directory)
    assert {x.dtype.name for x in jax.tree.leaves(model.params)} == {
        "bfloat16", "uint8", "float32",  # the last two in QuantizedArrays
    }  # fmt: skip
    assert model.params["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.bfloat16
    wide = jq.load_model(directory, dtype="float32", quantization=None)
    assert wide.params["lm_head"]["kernel"].dtype == jnp.float32
    assert wide.params["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.float32
    assert wide.params["norm"]["scale"].dtype == jnp.bfloat16


def test_buffers_of_old_checkpoints_are_no_surprise(tmp_path: Path):
    directory, tensors = copy(tmp_path)
    save(directory, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8)})
    assert jq.load_model(directory).tokenizer is not None


def test_a_redundant_tied_head(tmp_path: Path):
    directory, tensors = copy(tmp_path, "llama_rope3_tied")
    table = tensors["model.embed_tokens.weight"]
    save(directory, tensors | {"lm_head.weight": table.copy()})
    model = jq.load_model(directory)
    assert "lm_head" not in model.params and model.tokenizer is None
    save(directory, tensors | {"lm_head.weight": table + 1})
    with pytest.raises(InputError, match="tie_word_embeddings, but 'lm_head.weight' differs"):
        jq.load_model(directory)


def test_missing_and_unknown_tensors_are_listed(tmp_path: Path):
    directory, tensors = copy(tmp_path)
    moved = tensors.pop("model.layers.1.self_attn.q_proj.weight")
    save(directory, tensors | {"model.layers.1.self_attn.query.weight": moved})
    with pytest.raises(InputError) as caught:
        jq.load_model(directory)
    message = str(caught.value)
    assert "1 missing: model.layers.1.self_attn.q_proj.weight" in message
    assert "1 without a use: model.layers.1.self_attn.query.weight" in message
    del tensors["lm_head.weight"]
    save(directory, tensors)
    with pytest.raises(
        InputError, match="2 missing: model.layers.1.self_attn.q_proj.weight, lm_head"
    ):
        jq.load_model(directory)


def test_a_config_of_another_depth(tmp_path: Path):
    directory, _ = copy(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match="9 missing: model.layers.2.* of a llama model with 3"):
        jq.load_model(directory)


@pytest.mark.parametrize("quantization", ["nf4", None])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite(tmp_path: Path, quantization: Any, bad: float, name: str):
    directory, tensors = copy(tmp_path)
    tensors[name].reshape(-1)[5] = bad
    save(directory, tensors)
    with pytest.raises(InputError, match=f"tensor '{name}' has values that are not finite"):
        jq.load_model(directory, quantization=quantization)


def test_wrong_shapes_and_dtypes(tmp_path: Path):
    directory, tensors = copy(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    save(directory, tensors | {name: tensors[name].T.copy()})
    with pytest.raises(InputError, match=r"shape \[64, 176\], expected \[176, 64\] from the conf"):
        jq.load_model(directory)
    save(directory, tensors | {name: tensors[name].astype(np.int8)})
    with pytest.raises(InputError, match="dtype int8, expected float32, bfloat16 or float16"):
        jq.load_model(directory)


def test_settings_that_do_not_exist():
    with pytest.raises(InputError, match="format 'int3'"):
        jq.load_model(MODELS / "llama", quantization="int3")
    with pytest.raises(InputError, match="block size 48"):
        jq.load_model(MODELS / "llama", block_size=48)
    with pytest.raises(InputError, match="compute_dtype is int8"):
        jq.load_model(MODELS / "llama", compute_dtype=jnp.int8)
    with pytest.raises(InputError, match="remat is 'half'"):
        jq.load_model(MODELS / "llama", remat="half")
    with pytest.raises(InputError, match="No model at"):
        jq.load_model("nowhere.gguf")


def test_a_damaged_file_stops_before_any_tensor_is_read(tmp_path: Path):
    directory, _ = copy(tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a complete safetensors file: tensor"):
        jq.load_model(directory)


def test_default_compute_dtype_on_a_cpu():
    assert default_compute_dtype() == jnp.float32


@pytest.mark.parametrize("name", ["llama", "llama_rope3_tied"])
def test_embedding_and_head_in_four_bits(name: str):
    """Logits are those of the decoded tables: a table of rows, and a kernel."""
    model = load(name, quantization="nf4", embeddings=True, block_size=32)
    plain = load(name, quantization="nf4", block_size=32)
    assert ("lm_head" in model.params) != model.config.tied
    dense = dict(plain.params)
    for path in module.EMBEDDINGS[: 1 if model.config.tied else 2]:
        module_name, leaf = path.split("/")
        packed, exact = (m.params[module_name][leaf] for m in (model, plain))
        assert isinstance(packed, QuantizedArray)
        assert packed.shape == exact.shape and 3 * nbytes(packed) < nbytes(exact)
        decoded = jq.dequantize(packed)
        assert jnp.linalg.norm(decoded - exact) < 0.1 * jnp.linalg.norm(exact)
        dense[module_name] = {leaf: decoded}
    tokens, mask, _ = reference(name)
    got, want = (
        model.apply(params, tokens, attention_mask=jnp.array(mask))
        for params in (model.params, dense)
    )
    np.testing.assert_allclose(got[mask == 1], want[mask == 1], atol=LOGITS)
