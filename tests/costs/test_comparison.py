# SPDX-License-Identifier: Apache-2.0
"""QLoRA's memory against that of full fine-tuning, for stated ranks and precisions."""

import pytest

from jax_qlora.config import Config, replaced
from jax_qlora.costs.comparison import MIXED_PRECISION, full_bytes, times_less
from jax_qlora.costs.formula import estimate
from jax_qlora.costs.gpus import GIB
from jax_qlora.models.presets import LLAMA_2_7B, PRESETS
from jax_qlora.planner.plan import DEFAULTS
from jax_qlora.train.start import find_decoder_targets


def times(name: str, rank: int, *, a_weight: int = MIXED_PRECISION) -> float:
    decoder, config = PRESETS[name], replaced(DEFAULTS, {"lora.rank": rank})
    targets = find_decoder_targets(decoder, Config())
    return times_less(decoder, estimate(decoder, config, targets, seq=512), a_weight=a_weight)


def test_full_fine_tuning_of_65b_takes_what_the_paper_says():
    """QLoRA, section 1: more than 780 GB."""
    assert 780e9 < full_bytes(PRESETS["llama-65b"]) < 790e9
    assert full_bytes(LLAMA_2_7B) / GIB == pytest.approx(75.3, abs=0.1)


def test_twelve_times_less_depends_on_rank_and_precision():
    """A 7B at 512 tokens: more than 12 times with rank 16, less with rank 64 against 12 bytes."""
    assert times("llama-2-7b", 16) > 15
    assert 11 < times("llama-2-7b", 64) < 12
    assert times("llama-2-7b", 64, a_weight=16) > 15  # against float32 weights and gradients
    assert times("llama-65b", 16) > 19
