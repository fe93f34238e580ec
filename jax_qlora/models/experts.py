# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts in place of the MLP: each token goes through a few of many gated MLPs.

Tokens are sorted by expert and cut into blocks, each of one expert, which a loop runs: the work is
that of the chosen experts alone, shapes are static, and of each kernel one expert's slice is in use
(and decoded, if it is in 4 bits) at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from ..typing import Array, Float, Int
from .config import DecoderConfig
from .layers import GATED, LINEAR_OUTPUT, Linear
from .matmul import matmul

_KEPT = jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT)

MAX_BLOCK = 128
"""Tokens of one block, at most."""


class ExpertLinear(nnx.Module):
    """One linear for each expert.

    Attributes:
        kernel: `[experts, d_in, d_out]`.
        dtype: dtype of the operands and of the result; sums are in float32.
    """

    def __init__(self, experts: int, d_in: int, d_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        shape = (experts, d_in, d_out)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * d_in**-0.5)
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "rows d_in"], expert: Int[Array, ""]
    ) -> Float[Array, "rows d_out"]:
        """Apply one expert's linear."""
        kernel = lax.dynamic_index_in_dim(self.kernel[...], expert, keepdims=False)
        y = matmul(x.astype(self.dtype), kernel.astype(self.dtype)).astype(self.dtype)
        return checkpoint_name(y, LINEAR_OUTPUT)


class Experts(nnx.Module):
    """The gated MLPs `down(act(gate(x)) * up(x))`, one for each expert."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(d_in: int, d_out: int) -> ExpertLinear:
            return ExpertLinear(config.n_experts, d_in, d_out, dtype=dtype, rngs=rngs)

        self.gated = GATED[config.activation]
        self.gate_proj = linear(config.d_model, config.d_ff)
        self.up_proj = linear(config.d_model, config.d_ff)
        self.down_proj = linear(config.d_ff, config.d_model)

    def __call__(self, x: Float[Array, "rows d"], expert: Int[Array, ""]) -> Array:
        """Apply one expert."""
        return self.down_proj(
            self.gated(self.gate_proj(x, expert), self.up_proj(x, expert)), expert
        )


class MixtureOfExperts(nnx.Module):
    """A router and its experts.

    References:
        Shazeer et al. (arXiv 1701.06538); Jiang et al., Mixtral of Experts (arXiv 2401.04088).
        `MixtralSparseMoeBlock` and `Qwen3MoeSparseMoeBlock` of transformers: softmax over all
        experts in float32, then the best, their weights divided by their sum or not.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.gate = Linear(config.d_model, config.n_experts, dtype=dtype, rngs=rngs)
        self.experts = Experts(config, dtype=dtype, rngs=rngs)
        self.n_experts = config.n_experts
        self.per_token = config.experts_per_token
        self.normalize = config.normalize_routing

    def __call__(self, x: Float[Array, "batch seq d"]) -> Float[Array, "batch seq d"]:
        """Apply to each token its experts, and sum their results by the router's weights."""
        rows = x.reshape(-1, x.shape[-1])
        scores = jax.nn.softmax(self.gate(rows).astype(jnp.float32), axis=-1)
        weights, chosen = lax.top_k(scores, self.per_token)
        if self.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        plan = plan_blocks(chosen, self.n_experts)
        blocks = jnp.take(rows, plan.tokens, axis=0, mode="fill", fill_value=0)

        def one(experts: Experts, x: Array, expert: Array) -> Array:
            return experts(x, expert)

        # else the backward would keep, for every block, the kernels of its expert
        one = nnx.remat(one, prevent_cse=False, policy=_KEPT)
        y = nnx.scan(one, in_axes=(None, 0, 0), out_axes=0)(self.experts, blocks, plan.experts)
        y = y.reshape(-1, x.shape[-1])[plan.slots]  # [rows, per_token, d]
        y = jnp.sum(y.astype(jnp.float32) * weights[..., None], axis=1)
        return y.astype(x.dtype).reshape(x.shape)


class Plan(NamedTuple):
    """Which tokens make which block.

    Attributes:
        tokens: int32 `[blocks, block]`: the row in each place; an index past the end: none.
        experts: int32 `[blocks]`: the expert of each block.
        slots: int32 `[rows, per_token]`: the place of each row for each of its experts, counted
            through all blocks.
    """

    tokens: Array
    experts: Array
    slots: Array


def block_sizes(rows: int, per_token: int, n_experts: int) -> tuple[int, int]:
    """How many blocks there are, whatever the router chooses, and how many tokens are in each.

    Args:
        rows: Tokens.
        per_token: Experts of each.
        n_experts: How many there are.
    """
    count = rows * per_token
    # about as many tokens as an expert has: half of the places are filled at least, on average
    block = min(1 << max(count // n_experts - 1, 0).bit_length(), MAX_BLOCK)
    return (count + min(n_experts, count) * (block - 1)) // block, block


def plan_blocks(chosen: Int[Array, "rows per_token"], n_experts: int) -> Plan:
    """Sort tokens into blocks of one expert each.

    Args:
        chosen: The experts of each row.
        n_experts: How many there are.
    """
    rows, per_token = chosen.shape
    count = rows * per_token
    blocks, block = block_sizes(rows, per_token, n_experts)
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)  # pairs of row and expert, by expert
    expert = flat[order]
    sizes = jnp.bincount(flat, length=n_experts).astype(jnp.int32)
    full = (sizes + block - 1) // block  # blocks of each expert
    ends = jnp.cumsum(full)
    rank = jnp.arange(count, dtype=jnp.int32) - (jnp.cumsum(sizes) - sizes)[expert]
    place = (ends - full)[expert] * block + rank
    tokens = jnp.full((blocks * block,), rows, jnp.int32).at[place].set(order // per_token)
    experts = jnp.searchsorted(ends, jnp.arange(blocks, dtype=jnp.int32), side="right")
    slots = jnp.zeros((count,), jnp.int32).at[order].set(place)
    return Plan(
        tokens.reshape(blocks, block),
        jnp.minimum(experts, n_experts - 1).astype(jnp.int32),  # of a block that is empty: any
        slots.reshape(rows, per_token),
    )
