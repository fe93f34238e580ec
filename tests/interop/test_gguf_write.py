# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

import jax_qlora as jq
from jax_qlora.errors import InputError
from jax_qlora.interop.gguf import read_gguf
from jax_qlora.interop.gguf_lora import load_gguf_lora, save_gguf_lora
from jax_qlora.interop.gguf_tokenizer import tokenizer_to_gguf
from jax_qlora.interop.gguf_write import save_gguf
from jax_qlora.interop.tokenizer import SPLITS, tokenizer_from_gguf
from jax_qlora.models import RopeScaling
from jax_qlora.models.model import decoder_functions
from jax_qlora.tree import map_with_path
from tests.helpers import GOLDEN, assert_trees_close, golden
from tests.interop.test_gguf import NAMES, TOP, permute
from tests.tiny import tiny_model

MODELS = GOLDEN / "models"


@pytest.fixture(scope="module")
def llama() -> Any:
    return jq.load_model(MODELS / "llama", quantization=None)


def tensors_of(file: Path) -> dict[str, Any]:
    """By the `gguf` package's reader: kind and data of every tensor."""
    return {t.name: (t.tensor_type, np.asarray(t.data)) for t in gguf.GGUFReader(file).tensors}


def expected(config: Any) -> dict[str, np.ndarray]:
    """The fixture under GGUF's names, by the tests' own table."""
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
    tensors = {}
    for hf, x in load_file(MODELS / "llama" / "model.safetensors").items():
        module = hf.removesuffix(".weight")
        if module in TOP:
            tensors[f"{TOP[module]}.weight"] = x
        else:
            block, _, rest = module.removeprefix("model.layers.").partition(".")
            x = permute(x, heads[NAMES[rest]]) if NAMES[rest] in heads else x
            tensors[f"blk.{block}.{NAMES[rest]}.weight"] = x
    return tensors


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_tensors_are_those_of_the_checkpoint(
    tmp_path: Path, llama: Any, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jax_qlora.interop.gguf_write._CHUNK", 1 << 12)  # in pieces
    saved = save_gguf(
        tmp_path / "m.gguf", llama.params, llama.config, kind=kind, tokenizer=llama.tokenizer
    )
    found, want = tensors_of(saved.path), expected(llama.config)
    assert found.keys() == want.keys() and saved.tensors == len(want)
    assert saved.files == {"m.gguf": saved.path.stat().st_size}
    for name, x in want.items():
        stored = GGMLQuantizationType[kind.upper()] if x.ndim == 2 else GGMLQuantizationType.F32
        if kind == "q4_0" and name in ("token_embd.weight", "output.weight"):
            stored = GGMLQuantizationType.Q8_0
        if "ffn_down" in name and kind.startswith("q"):  # rows of 176 are no blocks of 32
            stored = GGMLQuantizationType.F16
        assert found[name][0] == stored, name
        np.testing.assert_array_equal(
            dequantize(found[name][1], stored), dequantize(quantize(x, stored), stored), name
        )
    fields = gguf.GGUFReader(saved.path).fields
    file_type = {"f32": 0, "f16": 1, "q8_0": 7, "q4_0": 2}[kind]
    assert fields["general.file_type"].contents() == file_type
    assert fields["general.type"].contents() == "model"


def test_the_file_is_the_same_model_here(tmp_path: Path, llama: Any):
    save_gguf(tmp_path / "m.gguf", llama.params, llama.config, kind="f32",
              tokenizer=llama.tokenizer, name="tiny")  # fmt: skip
    model = jq.load_model(tmp_path / "m.gguf", quantization=None)
    assert dataclasses.replace(model.config, family="llama") == llama.config
    assert_trees_close(model.params, llama.params)
    outputs = golden("model_outputs.npz")
    mask = outputs["llama/left/attention_mask"]
    tokens = jnp.asarray(outputs["llama/left/input_ids"], jnp.int32)
    got = model.apply(model.params, tokens, attention_mask=jnp.asarray(mask))
    np.testing.assert_allclose(got[mask == 1], outputs["llama/left/logits"][mask == 1], atol=1e-4)

    cases = json.loads((GOLDEN / "tokenizer_outputs.json").read_text())
    for case in cases["texts"]:
        assert model.tokenizer(case["text"])["input_ids"] == case["ids"]
    for chat in cases["chats"]:
        rendered = model.tokenizer.apply_chat_template(chat["messages"], tokenize=False)
        assert rendered == chat["rendered"]
    assert "generation %}" not in model.tokenizer.chat_template
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.tokenizer, name) == getattr(llama.tokenizer, name)


def test_an_adapter_is_folded_in(tmp_path: Path, llama: Any):
    model = jq.load_model(MODELS / "llama")
    targets = jq.find_targets(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    adapter = jq.init_adapter(jax.random.key(1), targets, rank=2, alpha=4)
    adapter = jax.tree.map(lambda x: x + 0.05, adapter)
    params = jq.attach(model.params, adapter)
    saved = save_gguf(
        tmp_path / "m.gguf", params, model.config, kind="f32", tokenizer=model.tokenizer
    )
    assert saved.updates == 14
    again = jq.load_model(saved.path, quantization=None)
    assert_trees_close(again.params, jq.merge(model.params, adapter), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_rotary_frequencies(tmp_path: Path, llama: Any, factor: float):
    for scaling in (
        RopeScaling(kind="llama3", factor=factor),
        RopeScaling(kind="linear", factor=factor),
    ):
        config = dataclasses.replace(llama.config, rope_scaling=scaling)
        file = tmp_path / f"{scaling.kind}.gguf"
        save_gguf(file, llama.params, config, kind="q8_0", tokenizer=llama.tokenizer)
        assert read_gguf(file)[0].rope_scaling == scaling


def with_rows(model: Any, rows: int) -> Any:
    """The model with a row of zeros for each further token of the golden tokenizer."""
    more = rows - model.config.vocab_size
    pads = {"embed_tokens/embedding": [(0, more), (0, 0)], "lm_head/kernel": [(0, 0), (0, more)]}
    params = map_with_path(lambda p, x: jnp.pad(x, pads[p]) if p in pads else x, model.params)
    config = dataclasses.replace(model.config, vocab_size=rows, eos_token_ids=(2,))
    return dataclasses.replace(model, config=config, params=params)


def with_six_layers(model: Any) -> Any:
    """Gemma 3's fixture, its three layers twice, with the windows of the real models."""
    layers = jax.tree.map(lambda x: jnp.concatenate([x, x]), model.params["layers"])
    config = dataclasses.replace(model.config, n_layers=6, local_layers=(True,) * 5 + (False,))
    return dataclasses.replace(
        model,
        config=config,
        params=model.params | {"layers": layers},
        functions=decoder_functions(config, transform=jq.lift),
    )


def test_windows_that_llama_cpp_would_not_see(tmp_path: Path, llama: Any):
    """It reads a period and no list, and not every version reads that: six is what all have."""
    model = with_rows(jq.load_model(MODELS / "gemma3_text", quantization=None), 320)
    assert model.config.local_layers == (True, True, False)
    with pytest.raises(InputError, match=r"each sixth; .* found \[True, True, False\]"):
        save_gguf(tmp_path / "m.gguf", model.params, model.config, tokenizer=llama.tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_rotary_factors_that_no_reader_would_take(tmp_path: Path, llama: Any):
    """Found before the file is written: factors of no known model, or where they have no place."""
    for name, factor in (("llama", 4.0), ("qwen2", 8.0)):
        model = with_rows(jq.load_model(MODELS / name, quantization=None), 320)
        scaling = RopeScaling(kind="llama3", factor=factor)
        config = dataclasses.replace(model.config, rope_scaling=scaling)
        with pytest.raises(InputError, match=f"of a {name} model cannot say rope_scaling = Rope"):
            save_gguf(tmp_path / "m.gguf", model.params, config, tokenizer=llama.tokenizer)
    assert list(tmp_path.iterdir()) == []


def sayable(name: str) -> Any:
    """A fixture with a row for each token, and what no GGUF file can say of it changed."""
    model = with_rows(jq.load_model(MODELS / name, quantization=None), 320)
    if name == "gemma3_text":
        return with_six_layers(model)
    changes: dict[str, dict[str, Any]] = {
        "gemma2": {"query_pre_attn_scalar": float(model.config.head_dim)},
        "mixtral": {"sliding_window": None},
        "mistral_sharded": {"sliding_window": None},
    }
    config = dataclasses.replace(model.config, **changes.get(name, {}))
    functions = decoder_functions(config, transform=jq.lift)
    return dataclasses.replace(model, config=config, functions=functions)


OTHERS = ["mistral_sharded", "qwen2", "qwen3", "qwen3_moe", "phi3", "gemma2", "gemma3_text",
          "mixtral"]  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(tmp_path: Path, llama: Any, name: str):
    """Read back as the same function of the same parameters; `test_gguf_families.py` has logits."""
    model = sayable(name)
    file = tmp_path / "m.gguf"
    save_gguf(file, model.params, model.config, kind="f32", tokenizer=llama.tokenizer)
    again = jq.load_model(file, quantization=None)
    same = {"bos_token_id": 1, "eos_token_ids": (2,), "pad_token_id": 0}
    family = "llama" if name == "mistral_sharded" else model.config.family
    assert dataclasses.replace(again.config, **same) == dataclasses.replace(
        model.config, family=family, **same
    )
    want = jax.tree.map(lambda x: x.astype(jnp.float32), model.params)
    assert_trees_close(again.params, want, atol=1e-7)  # one plus the weight, and minus one


@pytest.mark.parametrize("name", OTHERS)
def test_updates_of_other_architectures(tmp_path: Path, name: str):
    model = sayable(name)
    targets = jq.find_targets(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    adapter = jq.init_adapter(jax.random.key(1), targets, rank=2, alpha=3)
    adapter = jax.tree.map(lambda x: x + 0.05, adapter)
    saved = save_gguf_lora(tmp_path / "a.gguf", adapter, model.config)
    assert saved.updates == sum(int(np.prod(pair.lead)) for pair in adapter.values())
    found = tensors_of(saved.path)
    if name not in ("phi3", "mistral_sharded", "mixtral"):  # rows as they are
        b = found["blk.0.attn_q.weight.lora_b"][1]
        np.testing.assert_array_equal(b, adapter["layers/self_attn/q_proj/kernel"].b[0])
    if model.config.n_experts:
        a, b = (found[f"blk.1.ffn_gate_exps.weight.lora_{x}"][1] for x in "ab")
        pair = adapter["layers/mlp/experts/gate_proj/kernel"]
        np.testing.assert_array_equal(a, pair.a[1])
        np.testing.assert_array_equal(b, pair.b[1])
    again = load_gguf_lora(saved.path, model.config)
    assert again.keys() == adapter.keys()
    for path, pair in adapter.items():
        np.testing.assert_allclose(again[path].delta(), pair.delta(), rtol=1e-6, err_msg=path)


def test_routers_stay_in_float32_and_experts_are_quantized(tmp_path: Path, llama: Any):
    model = sayable("mixtral")
    save_gguf(tmp_path / "m.gguf", model.params, model.config, kind="q8_0",
              tokenizer=llama.tokenizer)  # fmt: skip
    found = tensors_of(tmp_path / "m.gguf")
    assert found["blk.0.ffn_gate_inp.weight"][0] == GGMLQuantizationType.F32
    kind, data = found["blk.1.ffn_up_exps.weight"]
    assert kind == GGMLQuantizationType.Q8_0 and data.shape[:2] == (4, 32)
    kernel = model.params["layers"]["mlp"]["experts"]["up_proj"]["kernel"]
    for expert in range(4):
        want = quantize(np.asarray(kernel[1, expert].T, np.float32), kind)
        np.testing.assert_array_equal(data[expert], want)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mistral_sharded", "cannot say sliding_window = 6"),
        ("mixtral", "cannot say sliding_window = 6"),
        ("gemma2", "cannot say query_pre_attn_scalar = 24.0"),
    ],
)
def test_architectures_that_are_not_written(tmp_path: Path, llama: Any, name: str, message: str):
    model = jq.load_model(MODELS / name, quantization=None)
    with pytest.raises(InputError, match=message):
        save_gguf(tmp_path / "m.gguf", model.params, model.config, tokenizer=llama.tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written(tmp_path: Path, llama: Any):
    file = tmp_path / "m.gguf"

    def write(params: Any = llama.params, config: Any = llama.config, **options: Any) -> None:
        save_gguf(file, params, config, **{"tokenizer": llama.tokenizer} | options)

    with pytest.raises(InputError, match="GGUF type 'q3': expected one of f32, f16, q8_0, q4_0"):
        write(kind="q3")
    with pytest.raises(InputError, match="needs a tokenizer"):
        write(tokenizer=None)
    with pytest.raises(InputError, match="expected a SentencePiece BPE, or a byte.* found Letters"):
        write(tokenizer=tiny_model().tokenizer)
    small = tiny_model()  # of 96 tokens
    with pytest.raises(InputError, match="a token of number 319, and the model's embedding 96"):
        write(small.params, small.config)
    huge = jax.tree.map(lambda x: x * 1e6, llama.params)
    with pytest.raises(InputError, match="values that are not finite in float16"):
        write(huge, kind="f16")
    assert list(tmp_path.iterdir()) == []
    write(kind="f16")
    with pytest.raises(InputError, match="is in use"):
        write(kind="f32")
    write(kind="f32", overwrite=True)
    assert tensors_of(file)["output.weight"][0] == GGMLQuantizationType.F32


@pytest.mark.parametrize("rule", SPLITS)
@pytest.mark.parametrize("bos", [True, False])
def test_a_tokenizer_comes_back(llama: Any, rule: str, bos: bool):
    metadata = tokenizer_to_gguf(llama.tokenizer, llama.config)
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    metadata |= {"tokenizer.ggml.pre": rule, "tokenizer.ggml.add_bos_token": bos}
    again = tokenizer_to_gguf(tokenizer_from_gguf(metadata), llama.config)
    assert again == metadata
    padded = dataclasses.replace(llama.config, vocab_size=322, eos_token_ids=(2, 6))
    wider = tokenizer_to_gguf(llama.tokenizer, padded)
    assert wider["tokenizer.ggml.tokens"][320:] == ["[PAD320]", "[PAD321]"]
    assert wider["tokenizer.ggml.token_type"][319:] == [1, 5, 5]
    assert wider["tokenizer.ggml.eot_token_id"] == 6


@pytest.mark.parametrize("space_prefix", [False, True], ids=["gemma", "llama"])
def test_a_sentencepiece_tokenizer_comes_back(llama: Any, space_prefix: bool):
    space = "\u2581"
    pieces = ["<unk>", "<s>", "</s>", "<0x61>", "<0xC3>", "<0xA9>", space, "b", "c", "bc"]
    pieces += [space + "b", space + "bc", "cb", "<end>"]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * 9 + [-1.0, -0.5, -2.0, -0.25, 0.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 6, 6, 1, 1, 1, 1, 1, 1, 1, 4],
        "tokenizer.ggml.add_space_prefix": space_prefix,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = tokenizer_from_gguf(metadata)
    config = dataclasses.replace(llama.config, vocab_size=15, eos_token_ids=(2,))
    written = tokenizer_to_gguf(tokenizer, config)
    assert written["tokenizer.ggml.tokens"] == [*pieces, "[PAD14]"]
    assert written["tokenizer.ggml.token_type"] == [*metadata["tokenizer.ggml.token_type"], 5]
    assert written["tokenizer.ggml.add_space_prefix"] == space_prefix
    again = tokenizer_from_gguf({"general.architecture": "llama"} | written)
    for text in ("bc b cbc", "cb  bcb", "ab\u00e9<end>c", "", " b"):
        ids = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids and ids[0] == 1
