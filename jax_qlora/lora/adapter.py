# SPDX-License-Identifier: Apache-2.0
"""Adapters: make one, attach it to a frozen base, fold it in, take it out again."""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..quant import QuantizedArray, quantize_array
from ..tree import flatten_paths, map_with_path
from ..typing import Key, PyTree
from .array import LoraArray, frozen_rows, is_special, materialize
from .pair import LoraPair
from .targets import Target, Targets, answers_pattern, module_names, pick_by_pattern
from .tokens import TokenArray, TokenRows
from .virtual import VirtualTokens, add_leaves, refuse_virtual, split_virtual

Adapter = dict[str, Any]
"""Path -> LoraPair; or TokenRows, VirtualTokens, or an array that takes the place of the base's."""


def quantize(
    params: PyTree,
    targets: Targets,
    *,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
) -> PyTree:
    """The frozen base: `params` with the target kernels in 4 bits, all else as it is.

    Args:
        params: A model's parameters, any pytree.
        targets: Kernels to quantize, from `find_targets`.
        format: As in `quantize_array`.
        block_size: As in `quantize_array`.
        double_quant: As in `quantize_array`.

    Raises:
        InputError: a target is not in `params`, or `quantize_array` refuses it.
    """
    _check_paths(targets, params)

    def one(path: str, leaf: Any) -> Any:
        target = targets.get(path)
        if target is None or isinstance(leaf, QuantizedArray):
            return leaf
        return quantize_array(
            leaf,
            in_axis=target.layout.in_axes,
            out_axis=target.layout.out_axes,
            format=format,
            block_size=block_size,
            double_quant=double_quant,
        )

    return map_with_path(one, params, is_leaf=is_special)


def init_adapter(
    key: Key[Any, ""],
    targets: Targets,
    *,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    init: str = "default",
) -> Adapter:
    """A fresh adapter: `a` random, `b` zero, so it changes nothing.

    Args:
        key: Random key. A target's values depend on the key and its path alone.
        targets: Kernels to adapt, from `find_targets`.
        rank: Rank of the updates.
        alpha: Numerator of the scaling alpha / rank.
        dropout: Probability of zeroing an input of an update in training.
        rslora: Scale by alpha / sqrt(rank) instead (rank-stabilized LoRA, arXiv 2312.03732).
        rank_pattern: Rank by name pattern, first match wins; a pattern is a regular expression for
            the end of a module's dotted name, as in PEFT.
        alpha_pattern: Alpha by name pattern.
        init: What `a` is drawn from, as in PEFT: "default", uniform in +-1/sqrt(cols), and for
            embeddings standard normal; "gaussian", normal with deviation 1 / rank.
            `init_from_weights` has the initializations that also change the base.

    Returns:
        Path -> LoraPair, float32: a plain pytree, and the only thing that trains.

    Raises:
        InputError: rank or alpha out of range, a pattern that matches no target, or an unknown
            `init`.
    """
    if init not in ("default", "gaussian"):
        raise InputError(
            f"init {init!r}: expected 'default' or 'gaussian'. 'pissa', 'olora' and 'loftq' are "
            "made from the weights: init_from_weights(params, adapter, init)."
        )
    rank_pattern, alpha_pattern = dict(rank_pattern or {}), dict(alpha_pattern or {})
    for name, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        for pattern in patterns:
            if not any(answers_pattern(target, pattern) for target in targets.values()):
                raise InputError(
                    f"{name} '{pattern}' matches none of the {len(targets)} targets: expected the "
                    f"end of a module name such as '{module_names(next(iter(targets)))[1]}'. "
                    "Print the targets to see their names."
                )
    if not 0.0 <= dropout < 1.0:
        raise InputError(f"dropout {dropout}: expected a probability in [0, 1). 0 turns it off.")

    def one(target: Target) -> LoraPair:
        r = pick_by_pattern(target, rank_pattern, rank)
        numerator = pick_by_pattern(target, alpha_pattern, alpha)
        if not (isinstance(r, int) and 1 <= r):
            raise InputError(
                f"rank {r!r} for '{target.path}': expected a whole number of at least 1. "
                "4 to 64 are common."
            )
        if not 0 < numerator < math.inf:
            raise InputError(
                f"alpha {numerator!r} for '{target.path}': expected a positive number. "
                "Twice the rank is common."
            )
        rows, cols, parts = target.layout.rows, target.layout.cols, target.chosen_rows
        if parts:
            rows = sum(stop - start for start, stop in parts)
        path_key = jax.random.fold_in(key, zlib.crc32(target.path.encode()))
        shape = (*target.lead, max(len(parts), 1) * r, cols)
        if init == "gaussian" or target.kind == "embedding":
            deviation = 1 / r if init == "gaussian" else 1.0
            a = deviation * jax.random.normal(path_key, shape, jnp.float32)
        else:
            bound = 1 / math.sqrt(cols)
            a = jax.random.uniform(path_key, shape, jnp.float32, -bound, bound)
        return LoraPair(
            a=a,
            b=jnp.zeros((*target.lead, rows, r), jnp.float32),
            layout=target.layout,
            scale=float(numerator) / (math.sqrt(r) if rslora else r),
            dropout=float(dropout),
            parts=parts,
        )

    return {target.path: one(target) for target in targets.values()}


def attach(base: PyTree, adapter: Mapping[str, Any], *, dropout_key: Any = None) -> PyTree:
    """The tree for `lift(apply)`: `base` with every adapted kernel wrapped with its update.

    Costs nothing and copies nothing; call it inside the jitted step. One base serves any number of
    adapters, and adapters of equal structure share one compilation.

    Args:
        base: Frozen parameters; leaves may be arrays or QuantizedArray.
        adapter: Path -> LoraPair; or TokenRows, whose rows replace some of the weight's; or an
            array that replaces the weight, for whole modules and biases that train; or
            VirtualTokens, which are put beside the weights.
        dropout_key: Random key for dropout in this step; None turns dropout off.

    Raises:
        InputError: the adapter names a path that is not in `base`, or a kernel of another shape.
    """
    _check_adapter(adapter)
    adapter, virtual = split_virtual(adapter)
    _check_paths(adapter, base)

    def one(path: str, leaf: Any) -> Any:
        pair = adapter.get(path)
        if pair is None:
            return leaf
        if isinstance(leaf, LoraArray | TokenArray):
            raise InputError(
                f"'{path}' has an adapter attached already: expected a frozen base. "
                "Attach to the base, or merge the first adapter."
            )
        shape = _kernel_shape(pair)
        if tuple(leaf.shape) != shape:
            raise InputError(
                f"the adapter's update of '{path}' is for a kernel of shape {shape}, found "
                f"{tuple(leaf.shape)}. The adapter was made for another model or layout."
            )
        if not isinstance(pair, LoraPair | TokenRows):
            return jnp.asarray(pair).astype(leaf.dtype)
        if isinstance(leaf, QuantizedArray) and leaf.layout != pair.layout:
            raise InputError(
                f"'{path}' is quantized along other axes than its update contracts: expected "
                f"{pair.layout}, found {leaf.layout}. Quantize with the targets that the adapter "
                "was made for: quantize(params, targets)."
            )
        if isinstance(pair, TokenRows):
            return TokenArray(base=leaf, tokens=pair)
        keys = None
        if dropout_key is not None and pair.dropout > 0:
            path_key = jax.random.fold_in(dropout_key, zlib.crc32(path.encode()))
            keys = jax.random.split(path_key, pair.lead)
        return LoraArray(base=leaf, pair=pair, dropout_key=keys)

    return add_leaves(map_with_path(one, base, is_leaf=is_special), virtual)


def merge(base: PyTree, adapter: Mapping[str, Any] | None = None, *, dtype: Any = None) -> PyTree:
    """Dense parameters with the updates folded in: no adapter, no latency at inference.

    The sum is taken in float32 with the *dequantized* base, which is what the adapter was trained
    on.

    Args:
        base: Frozen parameters, quantized or not, or a tree with an adapter attached.
        adapter: Path -> LoraPair; None only makes the tree dense.
        dtype: dtype of the kernels that were quantized or adapted; their own by default.

    Raises:
        InputError: as `attach`; or the adapter has virtual tokens, which no weight can take in.
    """
    refuse_virtual(adapter or {}, "merge")
    tree = attach(base, adapter) if adapter else base
    return jax.tree.map(
        lambda x: materialize(x, dtype) if is_special(x) else x, tree, is_leaf=is_special
    )


def unmerge(params: PyTree, adapter: Mapping[str, Any], *, dtype: Any = None) -> PyTree:
    """Inverse of `merge` for dense parameters, up to rounding: subtracts the updates.

    DoRA cannot be undone: merging replaces the length of each row, which is nowhere else.

    Args:
        params: Dense parameters with the updates folded in.
        adapter: The adapter that was merged.
        dtype: dtype of the adapted kernels; their own by default.

    Raises:
        InputError: as `attach`; a kernel is quantized, from which nothing can be subtracted; or
            the adapter is a DoRA adapter, replaces weights, or has virtual tokens.
    """
    _check_adapter(adapter)
    refuse_virtual(adapter, "unmerge")
    _check_paths(adapter, params)

    def one(path: str, leaf: Any) -> Any:
        if path not in adapter:
            return leaf
        if is_special(leaf):
            raise InputError(
                f"'{path}' is {leaf!r}: expected a dense kernel to subtract the update from. "
                "Keep the base, or unmerge before quantizing."
            )
        if not isinstance(adapter[path], LoraPair):
            raise InputError(
                f"'{path}' was replaced by a trained weight: expected an adapter of updates alone "
                "to take out again. Keep the base, and attach."
            )
        if adapter[path].magnitude is not None:
            raise InputError(
                f"'{path}' was merged with DoRA, which replaced the length of each row: expected "
                "an adapter without magnitudes to take out again. Keep the base, and attach."
            )
        delta = adapter[path].delta()
        return (jnp.asarray(leaf, jnp.float32) - delta).astype(dtype or leaf.dtype)

    return map_with_path(one, params, is_leaf=is_special)


def train_whole(params: PyTree, paths: Iterable[str]) -> Adapter:
    """Weights that train as a whole beside the updates: PEFT's `modules_to_save` and `bias`.

    Args:
        params: Frozen parameters; a quantized weight is decoded.
        paths: Which; each becomes a float32 copy.

    Raises:
        InputError: a path is not in `params`.
    """
    paths = tuple(paths)
    _check_paths(dict.fromkeys(paths), params)
    leaves = flatten_paths(params, is_leaf=is_special)
    # a copy, also of what is float32: what trains is donated to the step, and the base stays
    return {path: jnp.array(materialize(leaves[path], jnp.float32)) for path in paths}


def train_tokens(params: PyTree, target: Target, indices: Sequence[int]) -> TokenRows:
    """Rows of an embedding or head that train, for new tokens; all others stay frozen.

    Args:
        params: Frozen parameters.
        target: The weight, from `find_targets`; a tied one is trained in both its uses.
        indices: Row numbers, each once.

    Raises:
        InputError: the weight is not in `params`, is stacked, or has no such rows.
    """
    _check_paths({target.path: None}, params)
    rows = target.layout.rows
    if target.lead or len(set(indices)) != len(indices) or not all(0 <= i < rows for i in indices):
        raise InputError(
            f"rows {list(indices)[:8]} of '{target.path}' {target.shape}: expected distinct "
            f"numbers in [0, {rows}) of a weight that is not stacked in layers."
        )
    leaf = flatten_paths(params, is_leaf=is_special)[target.path]
    found = frozen_rows(leaf, target.layout, jnp.asarray(indices, jnp.int32), jnp.float32)
    return TokenRows(rows=found, indices=tuple(map(int, indices)), layout=target.layout)


def _kernel_shape(entry: Any) -> tuple[int, ...]:
    if isinstance(entry, LoraPair):
        return (*entry.lead, *entry.layout.shape)
    return entry.layout.shape if isinstance(entry, TokenRows) else tuple(entry.shape)


def _check_adapter(adapter: Any) -> None:
    bad = adapter
    if isinstance(adapter, Mapping):
        kinds = LoraPair | TokenRows | VirtualTokens | jax.Array | np.ndarray
        wrong = [path for path, entry in adapter.items() if not isinstance(entry, kinds)]
        if not wrong:
            return
        bad = f"{type(adapter[wrong[0]]).__name__} at '{wrong[0]}'"
    raise InputError(
        f"the adapter is no mapping from paths to LoraPair: found {bad}. Expected what "
        "init_adapter returns, in the order (base, adapter)."
    )


def _check_paths(wanted: Mapping[str, Any], tree: Any) -> None:
    have = flatten_paths(tree, is_leaf=is_special)
    missing = [path for path in wanted if path not in have]
    if missing:
        listed = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        some = ", ".join(list(have)[:4])
        raise InputError(
            f"{len(missing)} of {len(wanted)} adapted or target paths are not in the parameters: "
            f"{listed}. The parameters have e.g. {some}. They belong to another model, or the tree "
            "was wrapped ('params/...'): pass the tree that find_targets was given."
        )
