# SPDX-License-Identifier: Apache-2.0
"""Optimizers for adapters, as plain optax transformations.

The first way to freeze is not to differentiate: `jax.grad(loss)(adapter, base, batch)` gives
gradients of the adapter alone, and `adamw` here is initialized with the adapter alone. Those who
keep one joined tree use `train_only`, which holds no state for what is frozen and sets its updates
to zero. (`optax.masked` alone does not freeze: it passes the raw gradient of the unmasked leaves
on to the parameters.)
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from .lora import LoraPair
from .tree import map_with_path
from .typing import PyTree

# Leaves that never decay: the last name of a path, in the decoder's and in PEFT's vocabulary.
_NO_DECAY = ("bias", "scale", "magnitude")


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
) -> optax.GradientTransformation:
    """Return AdamW for an adapter (or any tree), with clipping, a decay mask and LoRA+.

    Equals `torch.optim.AdamW` with `lora_plus_ratio = 1` on a tree of matrices. With another
    ratio the leaves named `b` of LoRA pairs learn (and decay) at `lora_plus_ratio` times the rate
    of the others, as PEFT's `create_loraplus_optimizer` does.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of the leaves in `decay_mask`.
        clip_norm: largest global norm of the gradient; 0 turns clipping off.
        lora_plus_ratio: learning rate of B over that of A.

    References:
        LoRA+: Hayou et al. 2024, https://arxiv.org/abs/2402.12354.
    """
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    parts.append(optax.scale_by_adam(b1=b1, b2=b2, eps=eps))
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=decay_mask))
    if lora_plus_ratio != 1.0:
        parts.append(optax.masked(optax.scale(lora_plus_ratio), lora_b_mask))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*parts)


def train_only(
    optimizer: optax.GradientTransformation,
    mask: PyTree | Callable[[PyTree], PyTree],
) -> optax.GradientTransformation:
    """Return `optimizer` for the leaves where `mask` is true; all others stand still.

    For users who keep one joined tree. Frozen leaves get no optimizer state, whatever gradient
    they come with (also the `float0` of integer leaves), and an update of exact zero in their own
    type, so that `optax.apply_updates` leaves them as they are, bit for bit.

    Args:
        optimizer: what the selected leaves are trained with.
        mask: a tree of bools with the structure of the parameters, or a function that makes one,
            such as `lora_mask`.
    """

    def labels(params: PyTree) -> PyTree:
        chosen = mask(params) if callable(mask) else mask
        return jax.tree.map(lambda train: "train" if train else "freeze", chosen)

    return optax.partition({"train": optimizer, "freeze": _stand_still()}, labels)


def lora_mask(params: PyTree) -> PyTree:
    """Return True for the leaves of every `LoraPair`, False for all others.

    Args:
        params: any tree, for example `attach(base, adapter)`.
    """
    return _mark_pairs(params, lambda name: True)


def lora_b_mask(params: PyTree) -> PyTree:
    """Return True for the `b` matrix of every `LoraPair`, False for all others.

    Args:
        params: any tree, for example an adapter.
    """
    return _mark_pairs(params, lambda name: name == "b")


def decay_mask(params: PyTree) -> PyTree:
    """Return True for the leaves that weight decay acts on: all but norms, biases, magnitudes.

    Args:
        params: any tree; a leaf is judged by the last name of its path.
    """
    return map_with_path(lambda path, _: path.rpartition("/")[2] not in _NO_DECAY, params)


def _mark_pairs(params: PyTree, chosen: Callable[[str], bool]) -> PyTree:
    def mark(node: Any) -> Any:
        if isinstance(node, LoraPair):
            return map_with_path(lambda name, _: chosen(name), node)
        return False

    return jax.tree.map(mark, params, is_leaf=lambda node: isinstance(node, LoraPair))


def _stand_still() -> optax.GradientTransformation:
    """Return updates of exact zero in the type of each parameter, whatever the gradient is."""

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None):
        return jax.tree.map(jnp.zeros_like, updates if params is None else params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
