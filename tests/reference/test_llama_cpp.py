# SPDX-License-Identifier: Apache-2.0
"""GGUF files run by llama.cpp itself, where the package llama-cpp-python is installed."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora.interop.gguf_lora import save_gguf_lora
from jax_qlora.interop.gguf_write import save_gguf
from jax_qlora.models import decoder_functions
from tests.helpers import GOLDEN
from tests.interop.test_gguf_write import OTHERS, sayable

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

TOKENS = list(range(3, 40))


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    """llama_cpp, or the test is skipped."""
    return pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def model() -> Any:
    """The fixture, dense."""
    return jq.load_model(GOLDEN / "models" / "llama", quantization=None)


@pytest.fixture(scope="module")
def adapter(model: Any) -> Any:
    """An adapter that changes much, of several ranks and scales."""
    targets = jq.find_targets(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    fresh = jq.init_adapter(
        jax.random.key(1),
        targets,
        rank=4,
        alpha=6,
        rslora=True,
        rank_pattern={"q_proj": 3},
        alpha_pattern={"k_proj": 11},
    )
    rng = np.random.default_rng(4)
    return jax.tree.map(lambda x: x + 0.1 * jnp.asarray(rng.standard_normal(x.shape, "f")), fresh)


def run(llama_cpp: Any, file: Path, lora: Path | None = None) -> Any:
    float32 = 0  # of the cache, too
    return llama_cpp.Llama(
        str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=float32,
        type_v=float32, lora_path=None if lora is None else str(lora),
    )  # fmt: skip


def write(file: Path, model: Any, params: Any, kind: str = "f32") -> Path:
    save_gguf(file, params, model.config, kind=kind, tokenizer=model.tokenizer)
    return file


def logits(llm: Any) -> np.ndarray:
    llm.reset()
    llm.eval(TOKENS)
    return np.array(llm.scores[: len(TOKENS)])


def greedy(llm: Any, count: int) -> list[int]:
    found = []
    for token in llm.generate(TOKENS, temp=0.0, reset=True):
        found.append(int(token))
        if len(found) == count:
            return found
    return found


def ours(model: Any, params: Any) -> np.ndarray:
    return np.asarray(model.apply(params, jnp.asarray([TOKENS]))[0])


@pytest.mark.proves("GGUF out", "llama")
@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 5e-5), ("f16", 1e-2), ("q8_0", 0.2)])
def test_a_model(llama_cpp: Any, model: Any, tmp_path: Path, kind: str, tolerance: float):
    """Products with F16 and Q8_0 weights are computed with rounded activations there."""
    llm = run(llama_cpp, write(tmp_path / "m.gguf", model, model.params, kind))
    want = ours(model, model.params)
    np.testing.assert_allclose(logits(llm), want, atol=tolerance)
    assert np.ptp(want) > 20 * tolerance
    text = "tau omega"
    assert llm.tokenize(text.encode(), add_bos=True) == model.tokenizer(text)["input_ids"]


# llama.cpp looks the GELU of Gemma up in float16; all else is float32 on both sides
TOLERANCES = {name: 5e-3 if name.startswith("gemma") else 5e-5 for name in OTHERS}


def other(name: str, tokenizer: Any) -> Any:
    return dataclasses.replace(sayable(name), tokenizer=tokenizer)


@pytest.mark.proves("GGUF out")
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(llama_cpp: Any, model: Any, tmp_path: Path, name: str):
    """Windows of Gemma are shorter than the text."""
    own = other(name, model.tokenizer)
    llm = run(llama_cpp, write(tmp_path / "m.gguf", own, own.params))
    want = ours(own, own.params)
    np.testing.assert_allclose(logits(llm), want, atol=TOLERANCES[name])
    assert np.ptp(want) > 1


def test_phi3_is_computed_without_its_window(llama_cpp: Any, model: Any, tmp_path: Path):
    """As docs/formats.md says: should this fail, llama.cpp has it now."""
    own = other("phi3", model.tokenizer)
    config = dataclasses.replace(own.config, sliding_window=9)
    windowed = dataclasses.replace(
        own, config=config, functions=decoder_functions(config, transform=jq.lift)
    )
    got = logits(run(llama_cpp, write(tmp_path / "m.gguf", windowed, own.params)))
    np.testing.assert_allclose(got, ours(own, own.params), atol=TOLERANCES["phi3"])
    assert np.abs(got - ours(windowed, own.params)).max() > 0.1


@pytest.mark.proves("GGUF LoRA in")
@pytest.mark.proves("GGUF LoRA out")
@pytest.mark.parametrize("name", OTHERS)
def test_adapters_of_other_architectures(llama_cpp: Any, model: Any, tmp_path: Path, name: str):
    """Experts and fused kernels included: every linear of the layers is adapted."""
    own = other(name, model.tokenizer)
    targets = jq.find_targets(own.apply, own.params, jnp.ones((1, 4), jnp.int32))
    fresh = jq.init_adapter(jax.random.key(1), targets, rank=3, alpha=6)
    rng = np.random.default_rng(4)
    changed = jax.tree.map(
        lambda x: x + 0.1 * jnp.asarray(rng.standard_normal(x.shape, "f")), fresh
    )
    base = write(tmp_path / "m.gguf", own, own.params)
    save_gguf_lora(tmp_path / "a.gguf", changed, own.config)
    want = ours(own, jq.attach(own.params, changed))
    llm = run(llama_cpp, base, tmp_path / "a.gguf")
    np.testing.assert_allclose(logits(llm), want, atol=TOLERANCES[name])
    assert np.abs(want - ours(own, own.params)).max() > 0.1
    again = ours(own, jq.attach(own.params, jq.load_adapter(tmp_path / "a.gguf", own)))
    np.testing.assert_allclose(logits(llm), again, atol=TOLERANCES[name])


@pytest.mark.proves("GGUF LoRA out", "llama")
def test_an_adapter(llama_cpp: Any, model: Any, adapter: Any, tmp_path: Path):
    base = write(tmp_path / "m.gguf", model, model.params)
    save_gguf_lora(tmp_path / "a.gguf", adapter, model.config)
    params = jq.attach(model.params, adapter)
    want = ours(model, params)
    llm = run(llama_cpp, base, tmp_path / "a.gguf")
    np.testing.assert_allclose(logits(llm), want, atol=5e-5)
    assert np.abs(want - ours(model, model.params)).max() > 0.5
    merged = run(llama_cpp, write(tmp_path / "x.gguf", model, params))
    np.testing.assert_allclose(logits(merged), want, atol=5e-5)
    assert greedy(merged, 8) == greedy(llm, 8)

    tokens, expected = list(TOKENS), []
    for _ in range(8):
        row = jnp.zeros((1, 48), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens))
        expected.append(int(jnp.argmax(model.apply(params, row)[0, len(tokens) - 1])))
        tokens.append(expected[-1])
    assert greedy(llm, 8) == expected
