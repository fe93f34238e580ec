# SPDX-License-Identifier: Apache-2.0
"""What is written here, transformers loads to the same logits: every family."""

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
from tests.helpers import GOLDEN

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
FIXTURES = {"llama": "llama", "mistral": "mistral_sharded"} | {
    name: name for name in FAMILIES if name not in ("llama", "mistral")
}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_no_linears_in_transformers(torch: Any, theirs: Any, family: str):
    """So its bitsandbytes integration cannot load them in 4 bits, as `docs/formats.md` says."""
    model = theirs(GOLDEN / "models" / family)
    linears = [name for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)]
    assert any("q_proj" in name for name in linears)
    assert not any("experts" in name for name in linears)
    experts = [x.ndim for name, x in model.named_parameters() if "experts" in name]
    assert experts and set(experts) == {3}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_the_same_model_in_transformers(
    torch: Any, theirs: Any, tmp_path: Path, family: str
):
    model = jq.load_model(GOLDEN / "models" / FIXTURES[family], quantization=None)
    tokens = jnp.asarray(np.random.default_rng(2).integers(3, 90, (2, 20), dtype=np.int32))
    targets = jq.find_targets(model.apply, model.params, tokens)
    assert all(is_linear(path) for path in targets)
    fresh = jq.init_adapter(jax.random.key(3), targets, rank=2, alpha=4)
    rng = np.random.default_rng(4)
    adapter = {
        path: replace(pair, b=jnp.asarray(0.2 * rng.standard_normal(pair.b.shape), jnp.float32))
        for path, pair in fresh.items()
    }
    params = jq.attach(model.params, adapter)
    save_hf(tmp_path / "merged", params, model.config, dtype=jnp.float32)
    want = np.asarray(model.apply(params, tokens))
    with torch.no_grad():
        ids = torch.from_numpy(np.asarray(tokens, np.int64))
        loaded = theirs(tmp_path / "merged")
        got = loaded(ids).logits.float().numpy()
    np.testing.assert_allclose(got, want, atol=5e-4)
    assert np.abs(want - np.asarray(model.apply(model.params, tokens))).max() > 0.1
