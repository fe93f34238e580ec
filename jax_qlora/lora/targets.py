# SPDX-License-Identifier: Apache-2.0
"""Targets: the kernels of a model that can be quantized and adapted, and how people name them."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..quant.layout import KernelLayout

Match = str | Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution:
    """How a convolution uses its kernel.

    Attributes:
        dims: The kernel's axes, counted from the end, that make up its input channels, and those of
            each dimension of its window.
        groups: Number of groups; outputs of one see the input channels of one.
        dilated: Whether the window or the input has gaps.
    """

    dims: tuple[tuple[int, ...], ...]
    groups: int = 1
    dilated: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One kernel and how the model uses it.

    Attributes:
        path: Its path in the parameter tree, e.g. "layers/self_attn/q_proj/kernel".
        shape: Its shape, stacked layer and expert axes included.
        dtype: Its dtype, as a name.
        layout: Which trailing axes are contracted.
        kind: "linear", "embedding" (looked up; a tied one is also multiplied) or "conv".
        head: Whether it produces the model's vocabulary logits.
        router: Whether its results choose, by `top_k`, among experts.
        conv: Of a "conv", how it is used.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    layout: KernelLayout
    kind: str = "linear"
    head: bool = False
    router: bool = False
    conv: Convolution | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the stacked layer and expert axes."""
        return self.shape[: len(self.shape) - len(self.layout.shape)]


@dataclasses.dataclass(frozen=True)
class Targets(Mapping[str, Target]):
    """The selected kernels by path, in tree order; prints as a table.

    Attributes:
        selected: The chosen ones.
        found: All kernels that the model multiplies by or looks up in.
    """

    selected: tuple[Target, ...]
    found: tuple[Target, ...]

    def __getitem__(self, path: str) -> Target:
        for target in self.selected:
            if target.path == path:
                return target
        raise KeyError(path)

    def __iter__(self) -> Iterator[str]:
        return (target.path for target in self.selected)

    def __len__(self) -> int:
        return len(self.selected)

    def select(self, match: Match) -> "Targets":
        """Other kernels of the same model, chosen as `find_targets` does.

        Raises:
            InputError: nothing matches.
        """
        return select_targets(self.found, match)

    def __repr__(self) -> str:
        from .summary import table  # the table formatter reads Target

        rows = [(t.path, _shape(t.shape), t.dtype, _use(t), "yes") for t in self.selected]
        rows += [
            (t.path, _shape(t.shape), t.dtype, _use(t), "")
            for t in self.found
            if t.path not in self
        ]
        return table(("path", "shape", "dtype", "use", "target"), rows)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _use(target: Target) -> str:
    return target.kind + " (head)" * target.head + " (router)" * target.router


def module_names(path: str) -> tuple[str, str]:
    """The dotted names that a path answers to: itself, and its module (without the last part).

    >>> module_names("layers/self_attn/q_proj/kernel")
    ('layers.self_attn.q_proj.kernel', 'layers.self_attn.q_proj')
    """
    dotted = path.replace("/", ".")
    return dotted, dotted.rpartition(".")[0] or dotted


def matches_name(path: str, name: str) -> bool:
    """PEFT's rule for a list of target modules: the name itself, or a dotted suffix of it."""
    name = name.replace("/", ".")
    return any(n == name or n.endswith("." + name) for n in module_names(path))


def matches_regex(path: str, pattern: str) -> bool:
    """PEFT's rule for a string of target modules: the whole name, dotted or with slashes."""
    names = {*module_names(path), path, path.rpartition("/")[0] or path}
    return any(re.fullmatch(pattern, n) for n in names)


def matches_pattern(path: str, pattern: str) -> bool:
    r"""PEFT's rule for rank and alpha patterns: `(.*\.)?(pattern)$` on the dotted name."""
    return any(re.match(rf"(.*\.)?({pattern})$", n) for n in module_names(path))


def select_targets(found: Iterable[Target], match: Match) -> Targets:
    """Chooses among the kernels found in a model.

    Args:
        found: All kernels.
        match: "all-linear" (every matmul kernel but the output head and routers), a list of names
            each of which is a module name or a suffix of one, or a regular expression that matches
            whole names. Names are dotted or slashed paths, with or without the last part.

    Raises:
        InputError: a name or pattern matches no kernel (the nearest names are listed).
    """
    found = tuple(found)
    if match == "all-linear":
        selected = [t for t in found if t.kind == "linear" and not (t.head or t.router)]
        if not selected:
            raise _no_match("all-linear", found, "the model multiplies by no kernel of its tree")
    elif isinstance(match, str):
        try:
            selected = [t for t in found if matches_regex(t.path, match)]
        except re.error as e:
            raise InputError(
                f"target pattern {match!r} is no regular expression ({e}): expected 'all-linear', "
                "a list of names, or a regular expression. Escape it, or pass a list of names."
            ) from e
        if not selected:
            why = f"the expression must match a whole name; for the end of one pass ['{match}']"
            raise _no_match(match, found, why)
    else:
        for name in match:
            if not any(matches_name(t.path, name) for t in found):
                raise _no_match(name, found, "a name is a module or the end of one")
        selected = [t for t in found if any(matches_name(t.path, name) for name in match)]
        if not selected:
            raise _no_match("[]", found, "the list is empty")
    return Targets(tuple(selected), found)


def _no_match(pattern: str, found: tuple[Target, ...], why: str) -> InputError:
    names = [module_names(t.path)[1] for t in found]
    short = sorted({n.rpartition(".")[2] for n in names})
    near = difflib.get_close_matches(pattern.rpartition(".")[2], short, n=4, cutoff=0.4)
    near = [n for n in names if n.rpartition(".")[2] in near] or names
    listed = ", ".join(list(dict.fromkeys(near))[:8]) or "none"
    return InputError(
        f"target '{pattern}' matches no kernel of the model: {why}. Nearest names: {listed}. "
        "Print find_targets(...) to see every kernel; output heads and embeddings must be named."
    )


def pick_by_pattern(path: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """The value of the first pattern that matches `path`, else the default."""
    for pattern, value in patterns.items():
        if matches_pattern(path, pattern):
            return value
    return default
