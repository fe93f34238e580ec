# SPDX-License-Identifier: Apache-2.0
"""Operations of a model against XLA's own count, and how a run reports them."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_qlora.costs.gpus import GPUS
from jax_qlora.costs.roofline import model_flops, peak_flops
from jax_qlora.models import abstract_params, decoder_functions
from jax_qlora.models.presets import LLAMA_2_7B, TINY
from jax_qlora.train.speed import batch_flops, describe_speed, speed_figures

# wide and short: what is no matmul (norms, rope, softmax) is little
WIDE = dataclasses.replace(TINY, n_layers=2, d_model=512, d_ff=1024, n_heads=8, n_kv_heads=4,
                           head_dim=64, vocab_size=512)  # fmt: skip


@pytest.mark.parametrize(("full", "gated"), [(True, True), (False, True), (False, False)])
def test_the_count_is_that_of_the_compiler(full: bool, gated: bool):
    """Gradients of all weights, or of the activations alone; layers unrolled, for XLA's sake."""
    seq, rows = 32, 2
    config = dataclasses.replace(
        WIDE, n_layers=1, gated=gated
    )  # XLA counts the body of a loop once
    apply = decoder_functions(config).apply
    params = abstract_params(config)
    tokens = jax.ShapeDtypeStruct((rows, seq), jnp.int32)

    def loss(params: Any, tokens: Any) -> jax.Array:
        return jnp.sum(apply(params, tokens) ** 2)

    def of_activations(params: Any, tokens: Any) -> Any:
        """The gradient of the embedding: it passes through every layer and meets no weight's."""
        return jax.grad(lambda e: loss({**params, "embed_tokens": {"embedding": e}}, tokens))(
            params["embed_tokens"]["embedding"]
        )

    step = jax.grad(loss) if full else of_activations
    cost: Any = jax.jit(step).lower(params, tokens).compile().cost_analysis()
    counted = cost["flops"] if isinstance(cost, dict) else cost[0]["flops"]
    # without a flash loop nothing is skipped: every token meets every other
    expected = model_flops(config, full=full, tokens=rows * seq, answers=rows * seq,
                           pairs=rows * seq * seq)  # fmt: skip
    assert expected == pytest.approx(counted, rel=0.05)


def test_six_operations_a_weight_and_token():
    """Kaplan et al. 2020 (arXiv 2001.08361, section 2.1): 6 N a token, attention aside."""
    weights = 6.74e9 - 32_000 * 4096  # the embedding is looked up
    flops = model_flops(LLAMA_2_7B, full=True, tokens=1000, answers=1000, pairs=0)
    assert flops == pytest.approx(6 * weights * 1000, rel=1e-3)
    frozen = model_flops(LLAMA_2_7B, full=False, tokens=1000, answers=1000, pairs=0)
    assert frozen == pytest.approx(flops * 2 / 3)


def test_padding_and_prompts_do_not_count():
    mask = np.array([[[1, 1, 1, 0], [1, 1, 0, 0]]], bool)
    batch = {"attention_mask": mask, "loss_mask": mask & (np.arange(4) >= 2)}
    found = batch_flops(TINY, batch, full=False)
    assert found == model_flops(TINY, full=False, tokens=5, answers=1, pairs=6 + 3)


def test_the_share_of_a_peak_that_is_known(monkeypatch: pytest.MonkeyPatch):
    assert peak_flops("NVIDIA A100-SXM4-40GB") == GPUS["a100-40"].flops
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("cpu") is None and peak_flops("NVIDIA GeForce RTX 9090") is None
    records = [{"step": 0, "held_out_loss": 3.0}]
    assert describe_speed(speed_figures(records)) == "?"
    records += [{"step": n, "flops": 78e12, "seconds": 1.0} for n in (1, 2)]
    assert describe_speed(speed_figures(records)) == "78.0 TFLOP/s"
    card = types.SimpleNamespace(device_kind="NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(jax, "devices", lambda: [card])
    assert speed_figures(records)["model_flops_utilization"] == 0.25
    assert describe_speed(speed_figures(records)) == "78.0 TFLOP/s, 25% of the peak"
    records = [{"step": 1, "flops": 3e9, "seconds": 2.0}]
    assert describe_speed(speed_figures(records)).startswith("1.5 GFLOP/s, 0%")
