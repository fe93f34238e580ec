# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file

import jax_qlora as jq
from jax_qlora.cli.main import main
from jax_qlora.errors import InputError
from jax_qlora.interop.gguf_lora import save_gguf_lora
from jax_qlora.interop.gguf_write import save_gguf
from jax_qlora.interop.inspect import inspect
from jax_qlora.interop.safetensors import read_directory
from jax_qlora.tree import nbytes
from tests.helpers import GOLDEN

MODELS = GOLDEN / "models"


def test_a_dense_checkpoint():
    found = inspect(MODELS / "llama")
    stored = load_file(MODELS / "llama" / "model.safetensors")
    assert (found["kind"], found["family"], found["format"]) == ("model", "llama", "safetensors")
    assert found["parameters"] == sum(x.size for x in stored.values())
    assert found["bytes"] == sum(x.nbytes for x in stored.values())
    assert found["bits_per_parameter"] == 32 and list(found["formats"]) == ["float32"]
    assert found["formats"]["float32"]["tensors"] == len(stored)
    down = {"name": "mlp.down_proj", "shape": [64, 176], "count": 2, "formats": {"float32": 2}}
    assert down in found["linears"] and len(found["linears"]) == 8  # and the head
    assert found["shape"]["n_layers"] == 2 and found["shape"]["vocab_size"] == 320


@pytest.mark.parametrize("name", ["llama", "llama_rope3_tied"])
def test_memory_is_that_of_the_loaded_model(name: str):
    """To the bytes, where what is not quantized is in 16 bits and norms in 32."""
    params = jq.load_model(MODELS / name, dtype=jnp.bfloat16).params
    assert inspect(MODELS / name)["memory"]["nf4"] == nbytes(params)
    dense = jq.load_model(MODELS / name, quantization=None).params
    assert inspect(MODELS / name)["memory"]["32 bits"] == nbytes(dense)


def test_a_checkpoint_of_bitsandbytes():
    found = inspect(MODELS / "llama_bnb4_bf16")
    stored = read_directory(MODELS / "llama_bnb4_bf16")
    assert list(found["formats"]) == ["bfloat16", "nf4"]
    nf4 = found["formats"]["nf4"]
    assert nf4["tensors"] == 14
    assert nf4["bytes"] == sum(x.nbytes for name, x in stored.items() if "_proj" in name)
    assert nf4["parameters"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 176)
    assert inspect(MODELS / "llama_bnb4_nodq_fp4")["formats"]["fp4"]["tensors"] == 14


def test_gguf_files(tmp_path: Path):
    model = jq.load_model(MODELS / "llama", quantization=None)
    save_gguf(
        tmp_path / "m.gguf", model.params, model.config, kind="q8_0", tokenizer=model.tokenizer
    )
    found = inspect(tmp_path / "m.gguf")
    assert found["format"] == "GGUF" and found["family"] == "llama"
    assert {k: v["tensors"] for k, v in found["formats"].items()} == {
        "Q8_0": 14,
        "F32": 5,
        "F16": 2,
    }
    targets = jq.find_targets(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    adapter = jq.init_adapter(jax.random.key(1), targets.select(["v_proj"]), rank=3, alpha=6)
    saved = save_gguf_lora(tmp_path / "a.gguf", adapter, model.config)
    found = inspect(tmp_path / "a.gguf")
    assert found["kind"] == "adapter" and found["alpha"] == 6
    assert found["targets"] == {"attn_v": {3: 2}} and found["bytes"] == saved.nbytes
    assert found["loads"] is True
    data = bytearray(saved.path.read_bytes())
    name = b"blk.0.attn_v.weight.lora_a"
    at = data.index(name) + len(name) + 4 + 2 * 8
    data[at : at + 4] = (250).to_bytes(4, "little")
    saved.path.write_bytes(data)
    with pytest.raises(InputError, match="is of type 250, which the installed gguf package"):
        inspect(saved.path)


def test_adapters():
    found = inspect(GOLDEN / "adapters" / "patterns")
    config = json.loads((GOLDEN / "adapters" / "patterns" / "adapter_config.json").read_text())
    stored = load_file(GOLDEN / "adapters" / "patterns" / "adapter_model.safetensors")
    assert found["kind"] == "adapter" and found["alpha"] == config["lora_alpha"]
    assert found["parameters"] == sum(x.size for x in stored.values())
    ranks = {
        name: x.shape[0]
        for name, x in stored.items()
        if name.endswith("layers.0.self_attn.q_proj.lora_A.weight")
    }
    assert found["targets"]["self_attn.q_proj"] == dict.fromkeys(ranks.values(), 2)
    assert found["loads"] is True
    assert inspect(GOLDEN / "adapters" / "modules_to_save")["whole"] == {"lm_head.weight": 1}
    found = inspect(GOLDEN / "adapters" / "mixtral_experts")
    assert found["targets"] == {  # of one expert
        "self_attn.q_proj": {2: 2},
        "mlp.gate": {2: 2},
        "mlp.experts.gate_up_proj": {2: 2},
        "mlp.experts.down_proj": {3: 2},
    }
    assert found["loads"] is True and found["tensors"] == 16


def test_what_is_no_model(tmp_path: Path):
    with pytest.raises(InputError, match="No config.json"):
        inspect(tmp_path)
    shutil.copytree(GOLDEN / "adapters" / "qv_r4", tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert "IA3" in inspect(tmp_path / "a")["loads"]
    prompt = '{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 0}'
    (tmp_path / "a" / "adapter_config.json").write_text(prompt)
    assert "num_virtual_tokens is 0" in inspect(tmp_path / "a")["loads"]
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        inspect(tmp_path / "a")


def test_the_command(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(MODELS / "llama_bnb4")]) == 0
    text = capsys.readouterr().out
    assert "a llama model (safetensors)" in text and "2 x [64, 176]  nf4" in text
    assert main(["inspect", str(GOLDEN / "adapters" / "qv_r4")]) == 0
    assert "2 of rank 4" in capsys.readouterr().out
    assert main(["inspect", str(MODELS / "llama"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "llama"
    assert main(["inspect", "/nowhere/at/all"]) == 2
