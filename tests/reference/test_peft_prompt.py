# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning and prefix tuning: PEFT computes the same logits from the same directory."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from tests.helpers import GOLDEN

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

TOKENS = 6
STARTS = {"prompt": jq.init_prompt, "prefix": jq.init_prefix}


def their_logits(torch: Any, model: Any, tokens: Any, mask: Any = None) -> np.ndarray:
    """Of the text's own tokens; a prompt's logits come first."""
    ids = torch.from_numpy(np.asarray(tokens, np.int64))
    mask = torch.ones_like(ids) if mask is None else torch.from_numpy(np.asarray(mask, np.int64))
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits.float().numpy()
    return logits[:, -ids.shape[1] :]


def our_logits(model: Any, adapter: Any, tokens: Any, mask: Any = None) -> np.ndarray:
    params = jq.attach(model.params, adapter)
    return np.asarray(jax.jit(model.apply)(params, tokens, attention_mask=mask))


def save_family(name: str, path: Path) -> None:
    """A tiny random model of another family, with a window that the text does not fit in."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=160,
        max_position_embeddings=64,
        initializer_range=0.15,
    )
    if name == "mistral":
        config = transformers.MistralConfig(**shape, sliding_window=7)
        transformers.MistralForCausalLM(config).save_pretrained(path)
    elif name == "qwen3":
        config = transformers.Qwen3Config(**shape, head_dim=32)
        transformers.Qwen3ForCausalLM(config).save_pretrained(path)
    else:
        config = transformers.Gemma3TextConfig(
            **shape,
            head_dim=32,
            sliding_window=7,
            layer_types=["sliding_attention", "full_attention"],
        )
        transformers.Gemma3ForCausalLM(config).save_pretrained(path)


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "gpt2"])
def test_what_is_written_here_is_the_same_model_in_peft(
    torch: Any,
    peft: Any,
    theirs: Any,
    checkpoint: Path,
    tokens: Any,
    tmp_path: Path,
    kind: str,
    family: str,
):
    """Positions, rotations and windows; a prefix of a longer window than tokens as well."""
    path = checkpoint
    if family == "gpt2":
        path = GOLDEN / "models" / family
    elif family != "llama":
        path = tmp_path / family
        save_family(family, path)
    ours = jq.load_model(path, quantization=None)
    tokens = tokens % ours.config.vocab_size
    virtual = STARTS[kind](jax.random.key(1), ours, tokens=TOKENS, init="random")
    jq.save_adapter(tmp_path / "a", virtual, ours, base_model=str(path))
    model = peft.PeftModel.from_pretrained(theirs(path), tmp_path / "a").eval()
    got, want = our_logits(ours, virtual, tokens), their_logits(torch, model, tokens)
    np.testing.assert_allclose(got, want, atol=5e-4)
    assert np.abs(want - our_logits(ours, {}, tokens)).max() > 0.5  # it matters


@pytest.mark.parametrize("kind", ["prompt", "prefix", "projected", "encoded"])
def test_what_peft_writes_is_the_same_model_here(
    torch: Any, peft: Any, theirs: Any, ours: Any, tokens: Any, tmp_path: Path, kind: str
):
    """A prefix's projection and P-tuning's encoder are computed when PEFT saves."""
    common: dict[str, Any] = dict(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    config = {
        "prompt": lambda: peft.PromptTuningConfig(**common, prompt_tuning_init="SAMPLE_VOCAB"),
        "prefix": lambda: peft.PrefixTuningConfig(**common),
        "projected": lambda: peft.PrefixTuningConfig(
            **common, prefix_projection=True, encoder_hidden_size=32
        ),
        "encoded": lambda: peft.PromptEncoderConfig(**common, encoder_hidden_size=32),
    }[kind]()
    torch.manual_seed(2)
    model = peft.get_peft_model(theirs(), config).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    want = their_logits(torch, model, tokens)
    model.save_pretrained(tmp_path)
    virtual = jq.load_adapter(tmp_path, ours)
    np.testing.assert_allclose(our_logits(ours, virtual, tokens), want, atol=5e-4)
    assert np.abs(want - our_logits(ours, {}, tokens)).max() > 0.1


@pytest.mark.parametrize("kind", STARTS)
def test_padding_on_the_right_and_generation(
    torch: Any, peft: Any, theirs: Any, ours: Any, tokens: Any, tmp_path: Path, kind: str
):
    from jax_qlora.generate import make_generator

    virtual = STARTS[kind](jax.random.key(1), ours, tokens=TOKENS, init="random")
    jq.save_adapter(tmp_path, virtual, ours)
    model = peft.PeftModel.from_pretrained(theirs(), tmp_path).eval()
    mask = np.ones(tokens.shape, bool)
    mask[1, 13:] = False
    got = our_logits(ours, virtual, tokens, jnp.asarray(mask))
    np.testing.assert_allclose(got[mask], their_logits(torch, model, tokens, mask)[mask], atol=5e-4)
    # on the left it changes nothing; PEFT has to be told the positions, and takes none of a prompt
    left = jnp.asarray(mask[:, ::-1])
    got = our_logits(ours, virtual, tokens[:, ::-1], left)
    alone = our_logits(ours, virtual, tokens[1:, ::-1][:, 7:])
    np.testing.assert_allclose(got[1:, 7:], alone, atol=5e-4)
    ids = torch.from_numpy(np.asarray(tokens[:, ::-1], np.int64))
    places = torch.from_numpy(np.maximum(np.cumsum(np.asarray(left), 1) - 1, 0))
    with torch.no_grad():
        want = model(ids, attention_mask=torch.from_numpy(np.asarray(left, np.int64)),
                     position_ids=places).logits.numpy()[:, -20:]  # fmt: skip
    difference = np.abs(got - want)[np.asarray(left)].max()
    assert difference < 5e-4 if kind == "prefix" else difference > 1e-2
    prompt = tokens[:1, :9]
    ids = torch.from_numpy(np.asarray(prompt, np.int64))
    with torch.no_grad():
        whole = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
    generate = make_generator(ours, max_new_tokens=8, eos_ids=())
    params = jq.attach(ours.params, virtual)
    new = generate(params, prompt, jnp.ones(prompt.shape, bool), jax.random.key(0))
    assert np.asarray(new)[0].tolist() == whole[0, -8:].tolist()
