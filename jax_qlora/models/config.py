# SPDX-License-Identifier: Apache-2.0
"""The shape of a decoder, as data: all that a checkpoint's configuration says of the numbers."""

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import InputError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the pretraining ones.

    Attributes:
        kind: `"linear"` divides every frequency by `factor`; `"llama3"` divides low frequencies
            only and blends in between (Llama 3.1, as `transformers` computes it).
        factor: The stretch, at least 1.
        low_freq_factor: `"llama3"`: wavelengths above `original_length / low_freq_factor` are
            stretched in full.
        high_freq_factor: `"llama3"`: wavelengths below `original_length / high_freq_factor` are
            left alone.
        original_length: `"llama3"`: the context of the pretraining, in tokens.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A pre-norm decoder: by default RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Everything that changes the numbers is a field here, and nothing else is: two models with equal
    configurations compute the same function of their parameters.

    Attributes:
        vocab_size: Rows of the embedding.
        d_model: Width of the residual stream.
        d_ff: Width of the MLP.
        n_layers: Number of layers, stacked on the leading axis of every layer parameter.
        n_heads: Query heads.
        n_kv_heads: Key and value heads; divides `n_heads`.
        head_dim: Width of a head; even if positions are rotary. `n_heads * head_dim` need not be
            `d_model`.
        max_length: Context length in tokens.
        norm_eps: Added to the mean square in RMSNorm, to the variance in LayerNorm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: How they are stretched, or None.
        tied: Whether the output head is the embedding.
        qkv_bias: Whether the query, key and value projections have a bias.
        out_bias: Whether the attention's output projection has a bias.
        mlp_bias: Whether the linears of the MLP have a bias.
        qk_norm: Whether each head's queries and keys are normalized before they are rotated.
        fused: Whether queries, keys and values are one linear, and gate and up another.
        gated: Whether the MLP has a gate; without, it is `down(act(up(x)))`.
        layer_norm: Whether norms are LayerNorm with a bias.
        learned_positions: Whether each position has a learned vector that is added to the
            embedding, and nothing is rotated.
        sliding_window: How many tokens back a local layer sees, the token itself included; None:
            every layer sees all.
        local_layers: Which layers are local, one boolean a layer; empty: all, if there is a window.
        local_rope_theta: Base of the rotary frequencies of local layers, which are not stretched;
            None: as the others.
        query_pre_attn_scalar: Scores are divided by its square root; None: `head_dim`.
        attention_softcap: Bound of the scores, `cap * tanh(score / cap)`; None: unbounded.
        logit_softcap: Bound of the logits, likewise.
        activation: Of the MLP: SiLU, or GELU in its tanh form.
        norm_offset: Whether a norm multiplies by one plus its weight.
        post_norms: Whether attention and MLP are also normalized on their way out.
        embed_scale: Whether embeddings are multiplied by the square root of `d_model`.
        n_experts: Gated MLPs of a layer, of which each token uses a few; 0: one MLP, used by all.
        experts_per_token: How many.
        normalize_routing: Whether the weights of a token's experts are made to sum to one.
        family: The architecture, as the `model_type` of `transformers` names it.
        bos_token_id: Start-of-text token, if any.
        eos_token_ids: Tokens that end a text; may be empty.
        pad_token_id: Padding token, if any.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_length: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    gated: bool = True
    layer_norm: bool = False
    learned_positions: bool = False
    sliding_window: int | None = None
    local_layers: tuple[bool, ...] = ()
    local_rope_theta: float | None = None
    query_pre_attn_scalar: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm_offset: bool = False
    post_norms: bool = False
    embed_scale: bool = False
    n_experts: int = 0
    experts_per_token: int = 0
    normalize_routing: bool = True
    family: str = "llama"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens back each layer sees; None: all."""
        local = self.local_layers or (True,) * self.n_layers
        return tuple(self.sliding_window if is_local else None for is_local in local)

    @property
    def parts(self) -> dict[str, dict[str, int]]:
        """The outputs of each part of the fused linears, in their order, by the linear's name."""
        if not self.fused:
            return {}
        kv = self.n_kv_heads * self.head_dim
        parts = {"qkv_proj": {"q": self.n_heads * self.head_dim, "k": kv, "v": kv}}
        if self.gated:
            parts["gate_up_proj"] = {"gate": self.d_ff, "up": self.d_ff}
        return parts


def validate_config(config: DecoderConfig) -> DecoderConfig:
    """Return `config` if a decoder of that shape can exist.

    Args:
        config: The configuration to check.

    Returns:
        `config` itself.

    Raises:
        InputError: A size is not positive, or sizes do not fit each other.
    """
    sizes = (
        "vocab_size", "d_model", "d_ff", "n_layers", "n_heads", "n_kv_heads", "head_dim",
        "max_length",
    )  # fmt: skip
    for name in sizes:
        value = getattr(config, name)
        if value < 1:
            raise InputError(f"Model configuration: {name} is {value}; it must be at least 1.")
    if config.n_heads % config.n_kv_heads:
        raise InputError(
            f"Model configuration: n_heads ({config.n_heads}) is not a multiple of n_kv_heads "
            f"({config.n_kv_heads}); every key/value head serves the same number of query heads."
        )
    if config.n_experts and not 1 <= config.experts_per_token <= config.n_experts:
        raise InputError(
            f"Model configuration: experts_per_token is {config.experts_per_token}; expected 1 to "
            f"n_experts ({config.n_experts})."
        )
    if config.head_dim % 2 and not config.learned_positions:
        raise InputError(
            f"Model configuration: head_dim is {config.head_dim}; rotary positions need it even."
        )
    positive = (
        "norm_eps", "rope_theta", "local_rope_theta", "sliding_window", "query_pre_attn_scalar",
        "attention_softcap", "logit_softcap",
    )  # fmt: skip
    for name in positive:
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(
                f"Model configuration: {name} is {value}; it must be positive and finite."
            )
    if config.local_layers and len(config.local_layers) != config.n_layers:
        raise InputError(
            f"Model configuration: local_layers has {len(config.local_layers)} entries; expected "
            f"one for each of the {config.n_layers} layers, or none."
        )
    if config.local_layers and config.sliding_window is None:
        raise InputError("Model configuration: local_layers need a sliding_window; it is None.")
    scaling = config.rope_scaling
    if scaling is not None and not (scaling.factor >= 1 and math.isfinite(scaling.factor)):
        raise InputError(
            f"Model configuration: the rope scaling factor is {scaling.factor}; expected >= 1."
        )
    if scaling is not None and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise InputError(
            f"Model configuration: rope scaling needs high_freq_factor "
            f"({scaling.high_freq_factor}) above low_freq_factor ({scaling.low_freq_factor})."
        )
    return config
