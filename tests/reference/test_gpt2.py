# SPDX-License-Identifier: Apache-2.0
"""GPT-2 in transformers, and adapters of parts of fused kernels in PEFT."""

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora.interop.hf_write import save_hf
from tests.helpers import GOLDEN

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
TOKENS = np.random.default_rng(5).integers(3, 90, (2, 16))


def logits_of(torch: Any, model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.float().numpy()


def ours_of(model: Any, params: Any) -> np.ndarray:
    return np.asarray(model.apply(params, jnp.asarray(TOKENS, jnp.int32)))


def random_model(torch: Any, path: Path, **settings: Any) -> Any:
    """A model of transformers, saved; no bias is zero and no norm one."""
    import transformers

    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=90, n_positions=40, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
        **settings,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_inner": 20, "scale_attn_weights": False, "activation_function": "gelu_pytorch_tanh"},
        {"tie_word_embeddings": False, "reorder_and_upcast_attn": True, "layer_norm_epsilon": 0.1},
    ],
    ids=["plain", "unscaled", "untied"],
)
def test_random_models_of_transformers(torch: Any, theirs: Any, tmp_path: Path, settings: Any):
    """Read, and written again; the second with the names of the first checkpoints."""
    from safetensors.numpy import load_file, save_file

    model = random_model(torch, tmp_path / "m", n_embd=24, n_layer=3, n_head=3, **settings)
    want = logits_of(torch, model)
    ours = jq.load_model(tmp_path / "m", quantization=None)
    np.testing.assert_allclose(ours_of(ours, ours.params), want, atol=2e-4)
    save_hf(tmp_path / "again", ours.params, ours.config)
    np.testing.assert_allclose(logits_of(torch, theirs(tmp_path / "again")), want, atol=2e-4)
    file = tmp_path / "m" / "model.safetensors"
    old = {name.removeprefix("transformer."): x for name, x in load_file(file).items()}
    save_file(old, file)
    ours = jq.load_model(tmp_path / "m", quantization=None)
    np.testing.assert_allclose(ours_of(ours, ours.params), want, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("gpt2", ["qkv_proj[q,v]"]),
        ("gpt2", ["qkv_proj[k]", "o_proj", "down_proj"]),
        ("phi3", ["qkv_proj[q,v]", "gate_up_proj[up]", "down_proj"]),
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_parts_of_fused_kernels_have_the_logits_of_peft(
    torch: Any, peft: Any, theirs: Any, tmp_path: Path, name: str, match: list, rslora: bool
):
    directory = GOLDEN / "models" / name
    model = jq.load_model(directory, quantization=None)
    tokens = jnp.asarray(TOKENS, jnp.int32)
    targets = jq.find_targets(
        model.apply, model.params, tokens, match=match, parts=model.config.parts
    )
    fresh = jq.init_adapter(jax.random.key(1), targets, rank=3, alpha=4, rslora=rslora)
    rng = np.random.default_rng(4)
    adapter = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype("f"), fresh)
    jq.save_adapter(tmp_path / "a", adapter, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned = peft.PeftModel.from_pretrained(theirs(directory), tmp_path / "a")
    messages = [str(w.message) for w in caught]
    assert not [m for m in messages if "key" in m or "fan_in_fan_out" in m]
    want = logits_of(torch, tuned)
    got = ours_of(model, jq.attach(model.params, adapter))
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert np.abs(want - logits_of(torch, theirs(directory))).max() > 0.1
    again = jq.load_adapter(tmp_path / "a", model)
    np.testing.assert_allclose(ours_of(model, jq.attach(model.params, again)), want, atol=2e-4)


def test_an_adapter_of_peft_on_gpt2_loads_here(torch: Any, peft: Any, theirs: Any, tmp_path: Path):
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4,
        target_modules=["c_attn", "mlp.c_proj"],
        fan_in_fan_out=True,
        modules_to_save=["ln_f"],
        bias="lora_only",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    tuned = peft.get_peft_model(theirs(GOLDEN / "models" / "gpt2"), config)
    for parameter in tuned.parameters():
        if parameter.requires_grad and parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned.eval().save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["fan_in_fan_out"]
    model = jq.load_model(GOLDEN / "models" / "gpt2", quantization=None)
    adapter: Any = jq.load_adapter(tmp_path / "a", model)
    assert {"layers/self_attn/qkv_proj/kernel", "layers/self_attn/qkv_proj/bias",
            "norm/scale", "norm/bias"} <= set(adapter)  # fmt: skip
    got = ours_of(model, jq.attach(model.params, adapter))
    np.testing.assert_allclose(got, logits_of(torch, tuned), atol=2e-4)
