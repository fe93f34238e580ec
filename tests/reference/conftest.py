# SPDX-License-Identifier: Apache-2.0
"""Both sides in one process: a tiny random model of transformers, and the same model here.

These tests need torch, peft, transformers and bitsandbytes in an environment of their own
(`make test-reference`); the ordinary run deselects them, and only fixtures import torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq


@pytest.fixture(scope="session")
def torch() -> Any:
    """torch, on one thread, or the test is skipped."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="session")
def peft(torch: Any) -> Any:
    """peft, or the test is skipped."""
    return pytest.importorskip("peft")


@pytest.fixture(scope="session")
def checkpoint(torch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model: grouped-query attention, an untied head, rows of whole 64-element blocks."""
    import transformers

    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=160,
        max_position_embeddings=64,
        initializer_range=0.15,  # far from uniform logits
        attn_implementation="eager",
    )
    path = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(**settings)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def theirs(checkpoint: Path) -> Callable[..., Any]:
    """Loads the model, or another directory, in transformers."""

    def load(path: Path = checkpoint, **options: Any) -> Any:
        from transformers import AutoModelForCausalLM

        options = {"attn_implementation": "eager", "dtype": "float32", **options}
        return AutoModelForCausalLM.from_pretrained(path, **options)

    return load


@pytest.fixture(scope="session")
def ours(checkpoint: Path) -> Any:
    """The same model here, dense."""
    return jq.load_model(checkpoint, quantization=None)


@pytest.fixture(scope="session")
def tokens() -> jax.Array:
    """Two rows of token ids."""
    return jnp.asarray(np.random.default_rng(1).integers(0, 160, (2, 20), dtype=np.int32))


@pytest.fixture(scope="session")
def targets(ours: Any) -> Any:
    """The linears of the model's layers."""
    return jq.find_targets(ours.apply, ours.params, jnp.ones((1, 4), jnp.int32))
