# SPDX-License-Identifier: Apache-2.0
"""lift: the same function, over trees whose leaves may be quantized and adapted."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ..errors import InputError
from ..lora.array import is_special
from ..lora.targets import matches_name, matches_regex
from ..tree import flatten_with_path, path_name
from .interpreter import evaluate
from .rules import Allow, make_dense, make_handle
from .views import identity_view
from .weight import Weight

_ARRAY = object()


def lift(
    f: Callable[..., Any], *, materialize: str | Sequence[str] = "error"
) -> Callable[..., Any]:
    """Gives any traceable function a meaning on trees with quantized and adapted leaves.

    The function is traced on the dense shapes, and its jaxpr is evaluated with the special leaves
    standing in for weights: a matmul decodes its kernel in use and adds the low-rank update;
    nothing weight-shaped is made outside a matmul. The function itself is not changed and needs to
    know nothing. On trees of ordinary arrays the result is `f`'s own.

    Works under and over `jit`, `grad`, `vmap`, `scan` and `checkpoint`. Call it inside `jit`: each
    call outside traces `f` anew. Where a weight enters a function that has a derivative rule of its
    own (`custom_jvp`, `custom_vjp`), the function's body is differentiated instead.

    Args:
        f: Any function that jax can trace, e.g. `lambda params, x: model.apply(params, x)`. Its
            positional and keyword arguments are pytrees; leaves that are no arrays stay Python
            values.
        materialize: What to do where a weight reaches a primitive that has no rule: "error",
            "allow", or a list of paths (names or regular expressions) that may be dense there.

    Returns:
        A function of the same signature.

    Raises:
        InputError: (when called) a weight reaches a primitive that needs it dense, by path.

    >>> import jax.numpy as jnp
    >>> from jax_qlora.quant import quantize_array
    >>> params = {"w": quantize_array(jnp.eye(64))}
    >>> lift(lambda p, x: x @ p["w"])(params, jnp.ones((2, 64))).shape
    (2, 64)
    """
    allow = _allow(materialize)

    @functools.wraps(f)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        keyed, treedef = flatten_with_path((args, kwargs), is_leaf=is_special)
        leaves = [leaf for _, leaf in keyed]
        if not any(is_special(leaf) for leaf in leaves):
            return f(*args, **kwargs)
        dynamic = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

        out_tree: Any = None
        template: list[Any] = []  # what f returns: an empty place for arrays, other values as is

        def flat(*arrays: Any) -> list[Any]:
            nonlocal out_tree, template
            filled = list(leaves)
            for i, x in zip(dynamic, arrays, strict=True):
                filled[i] = x
            call_args, call_kwargs = jax.tree.unflatten(treedef, filled)
            results, out_tree = jax.tree.flatten(f(*call_args, **call_kwargs))
            template = [_ARRAY if _is_array(x) else x for x in results]
            return [x for x in results if _is_array(x)]

        closed = jax.make_jaxpr(flat)(*[_dense_shape(leaves[i]) for i in dynamic])
        values = [
            Weight(
                leaves[i], identity_view(leaves[i].shape, leaves[i].dtype), _leaf_name(keyed[i][0])
            )
            if is_special(leaves[i])
            else leaves[i]
            for i in dynamic
        ]
        outs = iter(evaluate(closed.jaxpr, closed.consts, values, handle=make_handle(allow)))
        filled = [_leave(next(outs), allow) if x is _ARRAY else x for x in template]
        return jax.tree.unflatten(out_tree, filled)

    return lifted


def _allow(materialize: str | Sequence[str]) -> Allow:
    if materialize in ("error", "allow"):
        return lambda path: materialize == "allow"
    if isinstance(materialize, str):
        raise InputError(
            f"materialize={materialize!r}: expected 'error', 'allow', or a list of paths that may "
            f"be made dense. For one path pass [{materialize!r}]."
        )
    names = tuple(materialize)
    for name in names:
        try:
            re.compile(name)
        except re.error as e:
            raise InputError(
                f"materialize: {name!r} is no regular expression ({e}): expected names or regular "
                "expressions of paths. Escape it."
            ) from e
    return lambda path: any(matches_name(path, n) or matches_regex(path, n) for n in names)


def _is_array(leaf: Any) -> bool:
    return is_special(leaf) or isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _dense_shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_special(leaf) else leaf


def _leaf_name(path: tuple[Any, ...]) -> str:
    """The path within the argument: the argument's own number or keyword is left out."""
    return path_name(path[2:]) or path_name(path[1:])


def _leave(out: Any, allow: Allow) -> Any:
    """An output of the whole function: an untouched weight leaves as the leaf that it came as."""
    if isinstance(out, Weight) and out.view == identity_view(out.leaf.shape, out.leaf.dtype):
        return out.leaf
    return make_dense(out, "the function's output", allow)
