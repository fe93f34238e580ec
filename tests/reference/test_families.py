# SPDX-License-Identifier: Apache-2.0
"""Every family on both sides: transformers, PEFT and bitsandbytes compute the same logits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora.interop.hf import is_linear
from jax_qlora.interop.hf_families import FAMILIES
from jax_qlora.interop.hf_write import save_hf
from jax_qlora.interop.load_params import Encoding
from jax_qlora.interop.quantize_checkpoint import quantize_checkpoint
from tests.helpers import GOLDEN

from .test_peft import load_in_peft, logits_of

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
FIXTURES = {"llama": "llama", "mistral": "mistral_sharded"} | {
    name: name for name in FAMILIES if name not in ("llama", "mistral")
}
EXPERTS = ("mixtral", "qwen3_moe")
DENSE = [family for family in FAMILIES if family not in EXPERTS]


def golden_model(family: str) -> Path:
    return GOLDEN / "models" / FIXTURES[family]


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).integers(3, 90, (2, 20), dtype=np.int32))


def random_adapter(model: Any, tokens: jax.Array) -> Any:
    """An adapter that changes much."""
    targets = jq.find_targets(model.apply, model.params, tokens)
    fresh = jq.init_adapter(jax.random.key(3), targets, rank=2, alpha=4)
    rng = np.random.default_rng(4)
    return {
        path: replace(pair, b=jnp.asarray(0.2 * rng.standard_normal(pair.b.shape), jnp.float32))
        for path, pair in fresh.items()
    }


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_no_linears_in_transformers(torch: Any, theirs: Any, family: str):
    """So its bitsandbytes integration cannot load them in 4 bits, as `docs/formats.md` says."""
    model = theirs(golden_model(family))
    linears = [name for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)]
    assert any("q_proj" in name for name in linears)
    assert not any("experts" in name for name in linears)
    experts = [x.ndim for name, x in model.named_parameters() if "experts" in name]
    assert experts and set(experts) == {3}


@pytest.mark.proves("HF out")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_the_same_model_in_transformers(
    torch: Any, theirs: Any, tokens: jax.Array, tmp_path: Path, family: str
):
    model = jq.load_model(golden_model(family), quantization=None)
    adapter = random_adapter(model, tokens)
    assert all(is_linear(path) for path in adapter)
    params = jq.attach(model.params, adapter)
    save_hf(tmp_path / "merged", params, model.config, dtype=jnp.float32)
    want = np.asarray(model.apply(params, tokens))
    got = logits_of(torch, theirs(tmp_path / "merged"), tokens)
    np.testing.assert_allclose(got, want, atol=5e-4)
    assert np.abs(want - np.asarray(model.apply(model.params, tokens))).max() > 0.1


@pytest.mark.proves("PEFT out")
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_made_here_is_the_same_model_in_peft(
    torch: Any, peft: Any, theirs: Any, tokens: jax.Array, tmp_path: Path, family: str
):
    path = golden_model(family)
    model = jq.load_model(path, quantization=None, dtype="float32")
    adapter = random_adapter(model, tokens)
    jq.save_adapter(tmp_path / "a", adapter, model)
    base = logits_of(torch, theirs(path), tokens)
    want = logits_of(torch, load_in_peft(peft, theirs(path), tmp_path / "a"), tokens)
    got = np.asarray(model.apply(jq.attach(model.params, adapter), tokens))
    np.testing.assert_allclose(got, want, atol=5e-4)
    assert np.abs(want - base).max() > 0.1  # the adapter does something


@pytest.mark.proves("PEFT in")
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_made_by_peft_is_the_same_model_here(
    torch: Any, peft: Any, theirs: Any, tokens: jax.Array, tmp_path: Path, family: str
):
    torch.manual_seed(6)
    path = golden_model(family)
    base = theirs(path)
    without = logits_of(torch, base, tokens)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "a")
    want = logits_of(torch, adapted, tokens)
    model = jq.load_model(path, quantization=None, dtype="float32")
    adapter = jq.load_adapter(tmp_path / "a", model)
    got = np.asarray(model.apply(jq.attach(model.params, adapter), tokens))
    np.testing.assert_allclose(got, want, atol=5e-4)
    assert np.abs(want - without).max() > 0.1


@pytest.fixture
def whole_blocks(torch: Any, tmp_path: Path) -> Any:
    """Saves a random model of a family, whose rows are whole blocks of 64: see `numerics.md`."""

    def save(family: str) -> Path:
        import transformers

        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(golden_model(family))
        if family == "gpt2":
            config.n_embd, config.n_inner = 64, 192
        else:
            config.intermediate_size = 192
        config.dtype = torch.float32
        config.initializer_range = 0.15  # far from uniform logits
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    return save


def exact(model: Any) -> Any:
    """Without the path of their CPU kernels that rewrites the weights in place."""
    packed = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for module in packed:
        module.support_avx512bf16_for_cpu = False
    assert packed and packed[0].weight.element_size() == 1
    return model


@pytest.mark.proves("bnb in")
@pytest.mark.parametrize("family", DENSE)
def test_what_bitsandbytes_quantized_is_the_same_model_here(
    torch: Any, theirs: Any, whole_blocks: Any, tokens: jax.Array, tmp_path: Path, family: str
):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    path = whole_blocks(family)
    base = exact(theirs(path, quantization_config=config, device_map="cpu"))
    base.save_pretrained(tmp_path / "bnb")
    model = jq.load_model(tmp_path / "bnb")
    got = np.asarray(model.apply(model.params, tokens))
    np.testing.assert_allclose(got, logits_of(torch, base, tokens), atol=5e-4)
    dense = logits_of(torch, theirs(path), tokens)
    assert np.abs(got - dense).max() > 0.02  # the quantization does something


@pytest.mark.proves("bnb out")
@pytest.mark.parametrize("family", DENSE)
def test_what_is_quantized_here_is_the_same_model_in_bitsandbytes(
    torch: Any, theirs: Any, whole_blocks: Any, tokens: jax.Array, tmp_path: Path, family: str
):
    pytest.importorskip("bitsandbytes")
    quantize_checkpoint(whole_blocks(family), tmp_path / "q", encoding=Encoding("nf4", 64, True))
    base = exact(theirs(tmp_path / "q", device_map="cpu"))
    model = jq.load_model(tmp_path / "q")
    got = np.asarray(model.apply(model.params, tokens))
    np.testing.assert_allclose(got, logits_of(torch, base, tokens), atol=5e-4)
    dense = logits_of(torch, theirs(tmp_path / "dense"), tokens)
    assert np.abs(got - dense).max() > 0.02
