# SPDX-License-Identifier: Apache-2.0
"""find_targets: which parameters a function multiplies by, read from its jaxpr."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..lora.array import is_special
from ..lora.targets import Match, Target, Targets, name_parts, select_targets
from ..quant.layout import KernelLayout
from ..tree import flatten_paths
from ..typing import PyTree
from .dataflow import Dataflow, Param, Use, fact_of_input
from .views import identity_view


def find_targets(
    apply: Callable[..., Any],
    params: PyTree,
    *args: Any,
    match: Match = "all-linear",
    parts: Mapping[str, Mapping[str, int]] | None = None,
    **kwargs: Any,
) -> Targets:
    """Finds the kernels of a model and chooses those to quantize or adapt.

    The model is traced on shapes only. A parameter is a kernel if it is an operand of a matmul with
    an activation ("linear"), if rows of it are looked up ("embedding"), or if it is convolved with
    ("conv").

    Args:
        apply: The model, `apply(params, *args, **kwargs)`.
        params: Its parameters: arrays or shapes (`jax.eval_shape`), or a quantized base.
        *args: Example inputs, arrays or shapes.
        match: "all-linear" (all matmul kernels but the output head and routers), a list of names or
            suffixes of names, or a regular expression; see `select_targets`. "c_attn[q,v]" in a
            list means some parts of a fused kernel.
        parts: Names of the parts of fused kernels, e.g. {"c_attn": {"q": 768, "k": 768, "v": 768}}:
            for the end of a module's name, the outputs of each part, in their order.
        **kwargs: Passed to `apply`.

    Returns:
        The chosen kernels with their contracted, output and stacked axes; prints as a table.

    Raises:
        InputError: a name or pattern matches nothing (nearest names are listed), or parts that a
            kernel does not have.

    >>> import jax.numpy as jnp
    >>> targets = find_targets(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 8))}, jnp.ones((2, 4)))
    >>> targets
    path  shape  dtype    use     target
    ----  -----  -------  ------  ------
    w     4x8    float32  linear  yes
    """
    leaves = flatten_paths(params, is_leaf=is_special)
    treedef = jax.tree.structure(params, is_leaf=is_special)
    rest, in_tree = jax.tree.flatten((args, kwargs))
    inputs = [*leaves.values(), *rest]
    shapes = {
        i: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for i, x in enumerate(inputs)
        if hasattr(x, "shape") and hasattr(x, "dtype")
    }

    def flat(arrays: list[Any]) -> list[Any]:
        filled = list(inputs)
        for i, x in zip(shapes, arrays, strict=True):
            filled[i] = x
        call_args, call_kwargs = jax.tree.unflatten(in_tree, filled[len(leaves) :])
        out = apply(jax.tree.unflatten(treedef, filled[: len(leaves)]), *call_args, **call_kwargs)
        return [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array)]

    jaxpr = jax.make_jaxpr(flat)(list(shapes.values())).jaxpr
    paths = list(leaves)
    facts = [
        Param(paths[i], identity_view(x.shape, x.dtype))
        if i < len(paths) and jnp.issubdtype(x.dtype, jax.numpy.floating)
        else fact_of_input(x)
        for i, x in shapes.items()
    ]
    flow = Dataflow()
    outs = flow.run(jaxpr, facts)
    heads = flow.heads(outs, {path: x.shape for path, x in leaves.items() if path in flow.uses})
    found = [_target(path, leaves[path], use, path in heads) for path, use in flow.uses.items()]
    found = [dataclasses.replace(t, router=t.path in flow.routers) for t in found if t is not None]
    found = sorted(found, key=lambda t: paths.index(t.path))
    return select_targets(name_parts(found, parts or {}), match)


def _target(path: str, leaf: Any, use: Use, head: bool) -> Target | None:
    shape = tuple(leaf.shape)
    used = use.in_axes + use.out_axes
    trailing = range(min(used), 0)
    # an axis of size one may have been dropped on the way
    outs = (*use.out_axes, *(a for a in trailing if a not in used and shape[a] == 1))
    if not use.in_axes or not outs or set(use.in_axes + outs) != set(trailing):
        return None  # stacked axes are not in front: no layout of rows and cols
    layout = KernelLayout(shape=shape[trailing.start :], in_axes=tuple(sorted(use.in_axes)))
    return Target(
        path=path,
        shape=shape,
        dtype=leaf.dtype.name,
        layout=layout,
        kind=use.kind,
        head=head,
        conv=use.conv,
    )
