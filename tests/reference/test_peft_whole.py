# SPDX-License-Identifier: Apache-2.0
"""What trains beside updates, both ways: PEFT's files here, and ours in PEFT."""

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq

from .test_peft import logits_of

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 96, (2, 12), dtype=np.int32))
KINDS: dict[str, dict[str, Any]] = {
    "modules": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "input_layernorm"]),
    "embedding": dict(target_modules=["embed_tokens", "v_proj"]),
    "head": dict(target_modules=["lm_head", "v_proj"]),
    "embedding and head": dict(target_modules=["embed_tokens", "lm_head"]),
    "tied embedding": dict(target_modules=["embed_tokens", "v_proj"], ensure_weight_tying=True),
    "tied module": dict(
        target_modules=["v_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "tokens": dict(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [5]}
    ),
    "tied tokens": dict(target_modules=["q_proj"], trainable_token_indices=[3, 7, 90]),
    "all biases": dict(target_modules=["q_proj"], bias="all"),
    "biases of targets": dict(target_modules=["q_proj", "v_proj"], bias="lora_only"),
    "dora": dict(target_modules="all-linear", use_dora=True),
}


@pytest.fixture(scope="module")
def checkpoints(torch: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A model with biases, untied and tied."""
    import transformers

    paths = {}
    for tied in (False, True):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            attention_bias=True,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
            max_position_embeddings=64,
            initializer_range=0.15,
            tie_word_embeddings=tied,
        )
        paths[tied] = tmp_path_factory.mktemp("model")
        transformers.LlamaForCausalLM(config).save_pretrained(paths[tied])
    return paths


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_is_the_same_model_here_and_back(
    torch: Any, peft: Any, theirs: Any, checkpoints: Any, tmp_path: Path, kind: str
):
    checkpoint = checkpoints[kind.startswith("tied")]
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **KINDS[kind])
    model = peft.get_peft_model(theirs(checkpoint), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "theirs")
    want = logits_of(torch, model, TOKENS)

    ours = jq.load_model(checkpoint, quantization=None)
    adapter = jq.load_adapter(tmp_path / "theirs", ours)
    got = np.asarray(ours.apply(jq.attach(ours.params, adapter), TOKENS))
    np.testing.assert_allclose(got, want, atol=5e-4)
    assert np.abs(got - np.asarray(ours.apply(ours.params, TOKENS))).max() > 0.1

    jq.save_adapter(tmp_path / "ours", adapter, ours)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        back = peft.PeftModel.from_pretrained(theirs(checkpoint), tmp_path / "ours")
    messages = [str(w.message) for w in caught if "key" in str(w.message)]
    assert not [m for m in messages if "base_layer" not in m], messages
    np.testing.assert_allclose(logits_of(torch, back, TOKENS), want, atol=5e-4)


def test_magnitudes_start_as_pefts(torch: Any, peft: Any, theirs: Any, checkpoints: Any):
    model = peft.get_peft_model(
        theirs(checkpoints[False]), peft.LoraConfig(target_modules=["down_proj"], use_dora=True)
    )
    want = {n: p for n, p in model.named_parameters() if "magnitude" in n}
    ours = jq.load_model(checkpoints[False], quantization=None)
    targets = jq.find_targets(ours.apply, ours.params, TOKENS, match=["down_proj"])
    adapter = jq.init_adapter(jax.random.key(0), targets, rank=8)
    got = jq.add_magnitudes(ours.params, adapter)["layers/mlp/down_proj/kernel"].magnitude
    np.testing.assert_allclose(
        np.asarray(got), np.stack([p.detach().numpy() for p in want.values()]), rtol=1e-6
    )
