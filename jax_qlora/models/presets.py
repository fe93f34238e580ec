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

MISTRAL_7B = DecoderConfig(
    family="mistral",
    vocab_size=32_000,
    d_model=4096,
    d_ff=14_336,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    max_length=32_768,
    sliding_window=4096,
    bos_token_id=1,
    eos_token_ids=(2,),
)
"""Version 0.1, the one with a window."""

MIXTRAL_8X7B = replace(
    MISTRAL_7B,
    family="mixtral",
    rope_theta=1_000_000.0,
    sliding_window=None,
    n_experts=8,
    experts_per_token=2,
)

QWEN_2_5_7B = DecoderConfig(
    family="qwen2",
    vocab_size=152_064,
    d_model=3584,
    d_ff=18_944,
    n_layers=28,
    n_heads=28,
    n_kv_heads=4,
    head_dim=128,
    max_length=32_768,
    norm_eps=1e-6,
    rope_theta=1_000_000.0,
    qkv_bias=True,
    bos_token_id=151_643,
    eos_token_ids=(151_645,),
)
_QWEN_2_5_SMALL = replace(QWEN_2_5_7B, vocab_size=151_936, tied=True, n_kv_heads=2)
QWEN_2_5_0_5B = replace(
    _QWEN_2_5_SMALL, d_model=896, d_ff=4864, n_layers=24, n_heads=14, head_dim=64
)
QWEN_2_5_1_5B = replace(_QWEN_2_5_SMALL, d_model=1536, d_ff=8960, n_heads=12)

QWEN_3_8B = DecoderConfig(
    family="qwen3",
    vocab_size=151_936,
    d_model=4096,
    d_ff=12_288,
    n_layers=36,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    max_length=40_960,
    norm_eps=1e-6,
    rope_theta=1_000_000.0,
    qk_norm=True,
    bos_token_id=151_643,
    eos_token_ids=(151_645,),
)
QWEN_3_0_6B = replace(QWEN_3_8B, d_model=1024, d_ff=3072, n_layers=28, n_heads=16, tied=True)
QWEN_3_1_7B = replace(QWEN_3_0_6B, d_model=2048, d_ff=6144)
QWEN_3_4B = replace(QWEN_3_8B, d_model=2560, d_ff=9728, tied=True)
QWEN_3_32B = replace(QWEN_3_8B, d_model=5120, d_ff=25_600, n_layers=64, n_heads=64)

QWEN_3_30B_A3B = replace(
    QWEN_3_8B,
    family="qwen3_moe",
    d_model=2048,
    d_ff=768,
    n_layers=48,
    n_kv_heads=4,
    n_experts=128,
    experts_per_token=8,
)

PHI_3_MINI = DecoderConfig(
    family="phi3",
    vocab_size=32_064,
    d_model=3072,
    d_ff=8192,
    n_layers=32,
    n_heads=32,
    n_kv_heads=32,
    head_dim=96,
    max_length=4096,
    sliding_window=2047,
    fused=True,
    bos_token_id=1,
    eos_token_ids=(32_000,),
    pad_token_id=32_000,
)
"""Phi-3-mini-4k-instruct."""

GPT_2 = DecoderConfig(
    family="gpt2",
    vocab_size=50_257,
    d_model=768,
    d_ff=3072,
    n_layers=12,
    n_heads=12,
    n_kv_heads=12,
    head_dim=64,
    max_length=1024,
    tied=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    fused=True,
    gated=False,
    layer_norm=True,
    learned_positions=True,
    activation="gelu_tanh",
    bos_token_id=50_256,
    eos_token_ids=(50_256,),
)
GPT_2_MEDIUM = replace(GPT_2, d_model=1024, d_ff=4096, n_layers=24, n_heads=16, n_kv_heads=16)
GPT_2_LARGE = replace(GPT_2, d_model=1280, d_ff=5120, n_layers=36, n_heads=20, n_kv_heads=20)
GPT_2_XL = replace(GPT_2, d_model=1600, d_ff=6400, n_layers=48, n_heads=25, n_kv_heads=25)

GEMMA_2_2B = DecoderConfig(
    family="gemma2",
    vocab_size=256_000,
    d_model=2304,
    d_ff=9216,
    n_layers=26,
    n_heads=8,
    n_kv_heads=4,
    head_dim=256,
    max_length=8192,
    norm_eps=1e-6,
    tied=True,
    sliding_window=4096,
    local_layers=(True, False) * 13,
    query_pre_attn_scalar=256.0,
    attention_softcap=50.0,
    logit_softcap=30.0,
    activation="gelu_tanh",
    norm_offset=True,
    post_norms=True,
    embed_scale=True,
    bos_token_id=2,
    eos_token_ids=(1,),
    pad_token_id=0,
)
GEMMA_2_9B = replace(
    GEMMA_2_2B,
    d_model=3584,
    d_ff=14_336,
    n_layers=42,
    n_heads=16,
    n_kv_heads=8,
    local_layers=(True, False) * 21,
)

_FIVE_TO_ONE = (True, True, True, True, True, False)
GEMMA_3_1B = replace(
    GEMMA_2_2B,
    family="gemma3_text",
    vocab_size=262_144,
    d_model=1152,
    d_ff=6912,
    n_heads=4,
    n_kv_heads=1,
    max_length=32_768,
    rope_theta=1_000_000.0,
    qk_norm=True,
    sliding_window=512,
    local_layers=(_FIVE_TO_ONE * 5)[:26],
    local_rope_theta=10_000.0,
    attention_softcap=None,
    logit_softcap=None,
)
GEMMA_3_270M = replace(
    GEMMA_3_1B, d_model=640, d_ff=2048, n_layers=18, local_layers=_FIVE_TO_ONE * 3
)

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
    "mistral-7b": MISTRAL_7B,
    "mixtral-8x7b": MIXTRAL_8X7B,
    "qwen2.5-0.5b": QWEN_2_5_0_5B,
    "qwen2.5-1.5b": QWEN_2_5_1_5B,
    "qwen2.5-7b": QWEN_2_5_7B,
    "qwen3-0.6b": QWEN_3_0_6B,
    "qwen3-1.7b": QWEN_3_1_7B,
    "qwen3-4b": QWEN_3_4B,
    "qwen3-8b": QWEN_3_8B,
    "qwen3-32b": QWEN_3_32B,
    "qwen3-30b-a3b": QWEN_3_30B_A3B,
    "phi-3-mini": PHI_3_MINI,
    "gpt2": GPT_2,
    "gpt2-medium": GPT_2_MEDIUM,
    "gpt2-large": GPT_2_LARGE,
    "gpt2-xl": GPT_2_XL,
    "gemma-2-2b": GEMMA_2_2B,
    "gemma-2-9b": GEMMA_2_9B,
    "gemma-3-270m": GEMMA_3_270M,
    "gemma-3-1b": GEMMA_3_1B,
}
"""The shapes above by name."""
