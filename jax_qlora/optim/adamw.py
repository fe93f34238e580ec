# SPDX-License-Identifier: Apache-2.0
"""AdamW with LoRA+, and its schedules."""

from typing import Literal

import optax

from ..errors import InputError
from .masks import decay_mask, lora_b_mask
from .moments import MIN_8BIT_SIZE, scale_by_adam_8bit, scale_by_adam_bfloat16


def make_schedule(
    kind: Literal["constant", "linear", "cosine"],
    *,
    learning_rate: float,
    steps: int,
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Return a learning rate as a function of the step, counted from 0.

    The rate rises linearly, `learning_rate * (step + 1) / (warmup_steps + 1)`, reaches its peak
    at step `warmup_steps`, and then stays ("constant") or falls ("linear", "cosine") to
    `final_fraction * learning_rate` at step `steps`. The first step is not lost to a rate of 0.

    Args:
        kind: course after the warm-up.
        learning_rate: the peak.
        steps: length of the run, warm-up included.
        warmup_steps: steps before the peak.
        final_fraction: the end as a fraction of the peak.
    """
    rest = max(steps - warmup_steps, 1)
    if kind == "constant":
        after = optax.constant_schedule(learning_rate)
    elif kind == "linear":
        after = optax.linear_schedule(learning_rate, learning_rate * final_fraction, rest)
    else:
        after = optax.cosine_decay_schedule(learning_rate, rest, alpha=final_fraction)
    if not warmup_steps:
        return after
    first = learning_rate / (warmup_steps + 1)
    rise = optax.linear_schedule(first, learning_rate, warmup_steps)
    return optax.join_schedules([rise, after], [warmup_steps])


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    lora_plus_ratio: float = 1.0,
    state: str = "float32",
    min_8bit_size: int = MIN_8BIT_SIZE,
) -> optax.GradientTransformation:
    """Return AdamW for an adapter (or any tree), with clipping, a decay mask and LoRA+.

    Equals `torch.optim.AdamW` with `lora_plus_ratio = 1` on a tree of matrices. With another
    ratio the leaves named `b` of LoRA pairs learn (and decay) at `lora_plus_ratio` times the rate
    of the others, as with PEFT's `create_loraplus_optimizer`. That one also gives the rate of B to
    all vectors (biases, norms, magnitudes), and one of its own to updates of embeddings; here these
    learn as all others do.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of the leaves in `decay_mask`.
        clip_norm: largest global norm of the gradient; 0 turns clipping off.
        lora_plus_ratio: learning rate of B over that of A.
        state: how the two moments are held between steps: "float32" (8 bytes a parameter),
            "bfloat16" (4, see `scale_by_adam_bfloat16`) or "8bit" (2.03, see
            `scale_by_adam_8bit`). Arithmetic is float32 in all.
        min_8bit_size: with "8bit", matrices of fewer elements stay float32.

    Raises:
        InputError: an unknown `state`.

    References:
        LoRA+: Hayou et al. 2024, https://arxiv.org/abs/2402.12354.
        8-bit state: Dettmers et al. 2022, https://arxiv.org/abs/2110.02861.
    """
    if state == "float32":
        adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    elif state == "bfloat16":
        adam = scale_by_adam_bfloat16(b1=b1, b2=b2, eps=eps)
    elif state == "8bit":
        adam = scale_by_adam_8bit(b1=b1, b2=b2, eps=eps, min_8bit_size=min_8bit_size)
    else:
        raise InputError(
            f"adamw(): state: expected 'float32', 'bfloat16' or '8bit', found {state!r}."
        )
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    parts.append(adam)
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=decay_mask))
    if lora_plus_ratio != 1.0:
        parts.append(optax.masked(optax.scale(lora_plus_ratio), lora_b_mask))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*parts)
