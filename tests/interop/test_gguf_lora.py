# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in GGUF files: llama.cpp's formula, both ways."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

import jax_qlora as jq
from jax_qlora.errors import InputError
from jax_qlora.interop.gguf_lora import load_gguf_lora, save_gguf_lora
from tests.helpers import GOLDEN, assert_trees_close
from tests.interop.test_gguf import permute
from tests.interop.test_gguf_write import tensors_of
from tests.tiny import quantized, tiny_model

MODELS = GOLDEN / "models"


@pytest.fixture(scope="module")
def llama() -> Any:
    return jq.load_model(MODELS / "llama", quantization=None)


@pytest.fixture(scope="module")
def targets(llama: Any) -> Any:
    tokens = jnp.ones((1, 4), jnp.int32)
    return jq.find_targets(llama.apply, llama.params, tokens)


def test_updates_in_a_file_of_their_own(tmp_path: Path, llama: Any, targets: Any):
    """`alpha / rank * b @ a` as llama.cpp computes it, of the rows in llama.cpp's order."""
    adapter = jq.init_adapter(
        jax.random.key(1), targets.select(["q_proj", "k_proj", "down_proj", "lm_head"]),
        rank=4, alpha=6, rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"k_proj": 11.5},
    )  # fmt: skip
    adapter = jax.tree.map(lambda x: x + 0.05, adapter)
    path = "layers/mlp/down_proj/kernel"
    none = jax.tree.map(lambda x: x.at[0].set(0.0), adapter[path])
    adapter |= {path: none}  # of one layer
    saved = save_gguf_lora(tmp_path / "a.gguf", adapter, llama.config, name="mine")
    found = {k: x for k, (_, x) in tensors_of(saved.path).items()}
    assert saved.updates == 2 + 2 + 1 + 1 and len(found) == saved.tensors == 12
    fields = {k: v.contents() for k, v in gguf.GGUFReader(saved.path).fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama" and fields["general.name"] == "mine"
    heads = {"attn_q": llama.config.n_heads, "attn_k": llama.config.n_kv_heads}
    for hf, name in {"self_attn/q_proj": "attn_q", "self_attn/k_proj": "attn_k",
                     "mlp/down_proj": "ffn_down"}.items():  # fmt: skip
        delta = np.asarray(adapter[f"layers/{hf}/kernel"].delta_rows())
        for layer in range(2):
            stem = f"blk.{layer}.{name}.weight"
            if stem == "blk.0.ffn_down.weight":
                assert f"{stem}.lora_a" not in found
                continue
            a, b = found[f"{stem}.lora_a"], found[f"{stem}.lora_b"]
            got = fields["adapter.lora.alpha"] / a.shape[0] * (b @ a)
            want = permute(delta[layer], heads[name]) if name in heads else delta[layer]
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert found["output.weight.lora_b"].shape == (llama.config.vocab_size, 4)


def test_updates_that_cannot_be_written(tmp_path: Path, llama: Any):
    base, adapter = quantized(tiny_model())
    with pytest.raises(InputError, match=r"for a kernel of shape .*; expected \(2, 176, 64\)"):
        save_gguf_lora(tmp_path / "a.gguf", adapter, llama.config)
    path = "layers/mlp/up_proj/kernel"
    zero = {path: jax.tree.map(jnp.zeros_like, adapter[path])}
    config = tiny_model().config
    with pytest.raises(InputError, match="changes nothing"):
        save_gguf_lora(tmp_path / "a.gguf", zero, config)
    with pytest.raises(InputError, match="changes nothing"):
        save_gguf_lora(tmp_path / "a.gguf", {}, config)
    bad = {path: dataclasses.replace(adapter[path], b=adapter[path].b * jnp.nan)}
    with pytest.raises(InputError, match="blk.0.ffn_up.weight' has values not fin"):
        save_gguf_lora(tmp_path / "a.gguf", bad, config)
    dora = dataclasses.replace(adapter[path], magnitude=jnp.ones((3, 64)))
    with pytest.raises(InputError, match="is no plain LoRA"):
        save_gguf_lora(tmp_path / "a.gguf", {path: dora}, config)
    with pytest.raises(InputError, match="is no plain LoRA"):  # a weight that trained whole
        save_gguf_lora(tmp_path / "a.gguf", {"lm_head/kernel": jnp.ones((32, 96))}, config)
    assert list(tmp_path.iterdir()) == []


SETTINGS = {
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": 6.0,
}


def write(
    file: Path,
    tensors: dict[str, np.ndarray],
    *,
    architecture: str = "llama",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    **changes: Any,
) -> Path:
    """An adapter by the `gguf` package's own writer; None drops a key."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in (SETTINGS | {k.replace("__", "."): v for k, v in changes.items()}).items():
        add = {str: writer.add_string, float: writer.add_float32, list: writer.add_array}
        if value is not None:
            add[type(value)](key, value)
    for name, x in tensors.items():
        if kind == GGMLQuantizationType.F32:
            writer.add_tensor(name, x)
        else:
            writer.add_tensor(name, quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def factors(ranks: dict[str, int], config: Any) -> dict[str, np.ndarray]:
    """Random factors of some weights of the fixture."""
    rng = np.random.default_rng(3)
    d, kv, ff = config.d_model, config.n_kv_heads * config.head_dim, config.d_ff
    shapes = {"attn_q": (d, d), "attn_k": (kv, d), "attn_v": (kv, d), "ffn_down": (d, ff)}
    tensors = {}
    for stem, rank in ranks.items():
        rows, cols = shapes[stem.split(".")[2]]
        tensors[f"{stem}.lora_a"] = rng.standard_normal((rank, cols), np.float32)
        tensors[f"{stem}.lora_b"] = rng.standard_normal((rows, rank), np.float32)
    return tensors


RANKS = {"blk.0.attn_q.weight": 3, "blk.1.attn_q.weight": 5, "blk.1.attn_k.weight": 2,
         "blk.0.ffn_down.weight": 4}  # fmt: skip


@pytest.mark.proves("GGUF LoRA in", "llama")
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_updates_are_those_of_the_formula(tmp_path: Path, llama: Any, kind: str):
    stored = GGMLQuantizationType[kind]
    wide = {name: 32 for name in RANKS if "ffn_down" not in name}  # blocks of Q8_0
    tensors = factors(wide if kind == "Q8_0" else RANKS, llama.config)
    file = write(tmp_path / "a.gguf", tensors, kind=stored)
    adapter = load_gguf_lora(file, llama.config)
    paths = {"attn_q": "self_attn/q_proj", "attn_k": "self_attn/k_proj"}
    paths |= {"ffn_down": "mlp/down_proj"}
    assert adapter.keys() == {f"layers/{paths[n.split('.')[2]]}/kernel" for n in tensors}
    heads = {"attn_q": llama.config.n_heads, "attn_k": llama.config.n_kv_heads}
    exact = {k: dequantize(quantize(x, stored), stored) for k, x in tensors.items()}
    for name, path in paths.items():
        pair: Any = adapter.get(f"layers/{path}/kernel")
        if pair is None:  # no blocks of Q8_0
            continue
        delta = np.asarray(pair.delta_rows())
        for layer in range(2):
            stem = f"blk.{layer}.{name}.weight"
            if f"{stem}.lora_a" not in tensors:
                assert not delta[layer].any()
                continue
            a, b = exact[f"{stem}.lora_a"], exact[f"{stem}.lora_b"]
            want = 6.0 / len(a) * (b @ a)
            got = permute(delta[layer], heads[name]) if name in heads else delta[layer]
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_written_adapter_comes_back(tmp_path: Path, llama: Any, targets: Any):
    chosen = targets.select(["q_proj", "k_proj", "down_proj", "lm_head"])
    adapter = jq.init_adapter(
        jax.random.key(1), chosen, rank=4, alpha=6, rslora=True, rank_pattern={"q_proj": 3},
        alpha_pattern={"k_proj": 11.5},
    )  # fmt: skip
    adapter = jax.tree.map(lambda x: x + 0.05, adapter)
    saved = save_gguf_lora(tmp_path / "a.gguf", adapter, llama.config)
    again = jq.load_adapter(saved.path, llama)
    assert {p: x.rank for p, x in again.items()} == {p: x.rank for p, x in adapter.items()}
    deltas = ({p: x.delta() for p, x in a.items()} for a in (again, adapter))
    assert_trees_close(*deltas, rtol=1e-5, atol=1e-6)
    # and is an adapter like others: in PEFT's format it is the same
    jq.save_adapter(tmp_path / "peft", again, llama)
    peft = jq.load_adapter(tmp_path / "peft", llama)
    deltas = ({p: x.delta() for p, x in a.items()} for a in (peft, again))
    assert_trees_close(*deltas, rtol=1e-5, atol=1e-6)


def test_what_is_no_adapter_of_the_model(tmp_path: Path, llama: Any, targets: Any):
    tensors = factors(RANKS, llama.config)
    file = tmp_path / "a.gguf"

    def refused(message: str, tensors: Any = tensors, **changes: Any) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load_gguf_lora(write(file, tensors, **changes), llama.config)
        assert "a.gguf" in str(caught.value)

    refused("is no LoRA adapter: general.type is 'model'", general__type="model")
    refused("is no LoRA adapter: adapter.type is None", adapter__type=None)
    refused("adapter.lora.alpha is None: expected a finite number", adapter__lora__alpha=None)
    refused("adapter.lora.alpha is 0.0: expected a finite", adapter__lora__alpha=0.0)
    refused("adapter.lora.alpha is nan", adapter__lora__alpha=float("nan"))
    refused(
        "'adapter.alora.invocation_tokens' is .*, which is not implemented",
        adapter__alora__invocation_tokens=[1, 2],
    )
    refused("of the architecture 'qwen2': expected 'llama', that of a llama", architecture="qwen2")
    alone = {k: x for k, x in tensors.items() if k != "blk.1.attn_k.weight.lora_b"}
    refused("the update of 'blk.1.attn_k.weight' has lora_a alone", alone)
    refused("has no updates", {})
    norm = {"blk.0.attn_norm.weight": np.ones(64, np.float32)}
    refused("1 tensors are no updates of the model's linears: blk.0.attn_norm", tensors | norm)
    later = {k.replace("blk.1", "blk.2"): x for k, x in tensors.items()}
    refused("4 tensors are no updates .*: blk.2.attn_q.weight.lora_a", later)
    wide = tensors | {"blk.0.attn_q.weight.lora_a": np.ones((3, 65), np.float32)}
    refused(r"attn_q.weight.lora_a' has shape \[3, 65\], expected \[3, 64\]", wide)
    rank = tensors | {"blk.0.attn_q.weight.lora_b": np.ones((64, 4), np.float32)}
    refused(r"attn_q.weight.lora_b' has shape \[64, 4\], expected \[64, 3\]", rank)
    flat = tensors | {"blk.0.attn_q.weight.lora_a": np.ones(64, np.float32)}
    refused(r"attn_q.weight.lora_a' has shape \[64\]", flat)
    infinite = {k: x * np.float32(np.inf if k.endswith("q.weight.lora_b") else 1)
                for k, x in tensors.items()}  # fmt: skip
    refused("attn_q.weight.lora_b' has values that are not finite", infinite)
    data = write(file, tensors).read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="is truncated: tensor"):
        load_gguf_lora(file, llama.config)
    with pytest.raises(InputError, match="No GGUF file at '.*absent.gguf'"):
        jq.load_adapter(tmp_path / "absent.gguf", llama)
    with pytest.raises(InputError, match="names are those of decoders: expected one in PEFT's"):
        jq.load_adapter(file, targets)
