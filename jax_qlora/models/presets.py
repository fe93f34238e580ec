# SPDX-License-Identifier: Apache-2.0
"""Shapes of published models, for benchmarks, memory estimates and tests; no weights."""

from dataclasses import replace

from .config import DecoderConfig, RopeScaling

TINY = DecoderConfig(
    vocab_size=96,
    d_model=32,
    d_ff=64,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    max_length=64,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=0,
)
"""A model for tests: it runs in milliseconds."""

SMOLLM2_135M = DecoderConfig(
    vocab_size=49_152,
    d_model=576,
    d_ff=1536,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    head_dim=64,
    max_length=8192,
    rope_theta=100_000.0,
    tied=True,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=2,
)

LLAMA_3_2_1B = DecoderConfig(
    vocab_size=128_256,
    d_model=2048,
    d_ff=8192,
    n_layers=16,
    n_heads=32,
    n_kv_heads=8,
    head_dim=64,
    max_length=131_072,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(kind="llama3", factor=32.0),
    tied=True,
    bos_token_id=128_000,
    eos_token_ids=(128_001,),
)

LLAMA_3_1_8B = DecoderConfig(
    vocab_size=128_256,
    d_model=4096,
    d_ff=14_336,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    max_length=131_072,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(kind="llama3", factor=8.0),
    bos_token_id=128_000,
    eos_token_ids=(128_001,),
)

LLAMA_2_7B = DecoderConfig(
    vocab_size=32_000,
    d_model=4096,
    d_ff=11_008,
    n_layers=32,
    n_heads=32,
    n_kv_heads=32,
    head_dim=128,
    max_length=4096,
    bos_token_id=1,
    eos_token_ids=(2,),
)

LLAMA_2_13B = replace(LLAMA_2_7B, d_model=5120, d_ff=13_824, n_layers=40, n_heads=40, n_kv_heads=40)
LLAMA_33B = replace(
    LLAMA_2_7B, d_model=6656, d_ff=17_920, n_layers=60, n_heads=52, n_kv_heads=52, max_length=2048
)
LLAMA_65B = replace(
    LLAMA_2_7B, d_model=8192, d_ff=22_016, n_layers=80, n_heads=64, n_kv_heads=64, max_length=2048
)
LLAMA_3_1_70B = replace(LLAMA_3_1_8B, d_model=8192, d_ff=28_672, n_layers=80, n_heads=64)

PRESETS = {
    "tiny": TINY,
    "smollm2-135m": SMOLLM2_135M,
    "llama-3.2-1b": LLAMA_3_2_1B,
    "llama-3.1-8b": LLAMA_3_1_8B,
    "llama-3.1-70b": LLAMA_3_1_70B,
    "llama-2-7b": LLAMA_2_7B,
    "llama-2-13b": LLAMA_2_13B,
    "llama-33b": LLAMA_33B,
    "llama-65b": LLAMA_65B,
}
"""The shapes above by name."""
