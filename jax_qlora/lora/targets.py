# SPDX-License-Identifier: Apache-2.0
"""Targets: the kernels of a model that can be quantized and adapted, and how people name them."""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
        alias: Another path that it answers to, e.g. its name in checkpoints; empty: none.
        parts: Of a fused kernel, the name of each part and how many rows are its own, in the order
            of the rows; empty: none are named.
        chosen: Names of the parts to adapt; empty: the kernel as a whole.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    layout: KernelLayout
    kind: str = "linear"
    head: bool = False
    router: bool = False
    conv: Convolution | None = None
    alias: str = ""
    parts: tuple[tuple[str, int], ...] = ()
    chosen: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that it answers to."""
        return (self.path, self.alias) if self.alias else (self.path,)

    @property
    def chosen_rows(self) -> tuple[tuple[int, int], ...]:
        """First row and end of each chosen part; empty: all rows, as one."""
        ends = list(itertools.accumulate(width for _, width in self.parts))
        return tuple(
            (end - width, end)
            for (name, width), end in zip(self.parts, ends, strict=True)
            if name in self.chosen
        )

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

        rows = [
            (t.path, _shape(t.shape), t.dtype, _use(t), ", ".join(t.chosen) or "yes")
            for t in self.selected
        ]
        rows += [
            (t.path, _shape(t.shape), t.dtype, _use(t), "")
            for t in self.found
            if t.path not in self
        ]
        return table(("path", "shape", "dtype", "use", "target"), rows)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _use(target: Target) -> str:
    parts = f" of {', '.join(name for name, _ in target.parts)}" if target.parts else ""
    return target.kind + parts + " (head)" * target.head + " (router)" * target.router


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


def answers_pattern(target: Target, pattern: str) -> bool:
    """Whether `matches_pattern` holds for one of a target's paths."""
    return _answers(target, matches_pattern, pattern)


def select_targets(found: Iterable[Target], match: Match) -> Targets:
    """Chooses among the kernels found in a model.

    Args:
        found: All kernels.
        match: "all-linear" (every matmul kernel but the output head and routers), a list of names
            each of which is a module name or a suffix of one, or a regular expression that matches
            whole names. Names are dotted or slashed paths, with or without the last part. In a
            list, "c_attn[q,v]" means those parts of a fused kernel.

    Raises:
        InputError: a name or pattern matches no kernel (the nearest names are listed), or a kernel
            has no part of a name (its parts are listed).
    """
    found = tuple(found)
    if match == "all-linear":
        selected = [t for t in found if t.kind == "linear" and not (t.head or t.router)]
        if not selected:
            raise _no_match("all-linear", found, "the model multiplies by no kernel of its tree")
    elif isinstance(match, str):
        try:
            selected = [t for t in found if _answers(t, matches_regex, match)]
        except re.error as e:
            raise InputError(
                f"target pattern {match!r} is no regular expression ({e}): expected 'all-linear', "
                "a list of names, or a regular expression. Escape it, or pass a list of names."
            ) from e
        if not selected:
            why = f"the expression must match a whole name; for the end of one pass ['{match}']"
            raise _no_match(match, found, why)
    else:
        selected = _select_names(found, match)
        if not selected:
            raise _no_match("[]", found, "the list is empty")
    return Targets(tuple(selected), found)


def name_parts(
    found: Iterable[Target], parts: Mapping[str, Mapping[str, int]]
) -> tuple[Target, ...]:
    """Names the parts of fused kernels, so that some of them can be chosen.

    Args:
        found: All kernels of a model.
        parts: For a module's name, or the end of one, the name of each part and its number of
            outputs, in their order, e.g. {"c_attn": {"q": 768, "k": 768, "v": 768}}. Where a kernel
            has several output axes they count as one.

    Raises:
        InputError: a name matches no kernel, or its parts are not all outputs of a kernel.
    """
    found = tuple(found)
    named = {t.path: t for t in found}
    for module, widths in parts.items():
        hits = [t for t in found if t.kind == "linear" and _answers(t, matches_name, module)]
        if not hits:
            raise _no_match(module, found, "its parts were given, and must be those of a kernel")
        for t in hits:
            counts = list(widths.values())
            if sum(counts) != t.layout.rows or not all(type(n) is int and n > 0 for n in counts):
                raise InputError(
                    f"parts {dict(widths)} of '{t.path}': expected the number of outputs of each, "
                    f"in all the {t.layout.rows} of a kernel of shape {t.shape}."
                )
            named[t.path] = dataclasses.replace(t, parts=tuple(widths.items()))
    return tuple(named.values())


def _answers(target: Target, rule: Callable[[str, str], bool], name: str) -> bool:
    return any(rule(path, name) for path in target.paths)


def _select_names(found: tuple[Target, ...], names: Sequence[str]) -> list[Target]:
    chosen: dict[str, set[tuple[str, ...]]] = {}
    for name in names:
        hits, parts = [t for t in found if _answers(t, matches_name, name)], ()
        if not hits and (fused := re.fullmatch(r"(.+)\[(.*)\]", name)):
            parts = tuple(part.strip() for part in fused[2].split(","))
            hits = [t for t in found if _answers(t, matches_name, fused[1])]
        if not hits:
            raise _no_match(name, found, "a name is a module or the end of one")
        for t in hits:
            _check_parts(t, parts, name)
            chosen.setdefault(t.path, set()).add(parts)
    for path, several in chosen.items():
        if () in several and len(several) > 1:
            raise InputError(
                f"targets {list(names)} name '{path}' as a whole and some of its parts: expected "
                "one or the other."
            )
    return [_with_parts(t, set().union(*chosen[t.path])) for t in found if t.path in chosen]


def _check_parts(target: Target, parts: tuple[str, ...], name: str) -> None:
    known = [part for part, _ in target.parts]
    wrong = [part for part in parts if part not in known]
    if not wrong:
        return
    if known:
        example = f"{name.partition('[')[0]}[{','.join(known[:2])}]"
        hint = f"expected some of {', '.join(known)}, e.g. '{example}'."
    else:
        hint = (
            "its parts have no names. Leave the brackets out, or give them names: "
            "find_targets(..., parts={'c_attn': {'q': 768, 'k': 768, 'v': 768}})."
        )
    raise InputError(f"target '{name}': '{target.path}' has no part '{wrong[0]}'; {hint}")


def _with_parts(target: Target, parts: set[str]) -> Target:
    return dataclasses.replace(target, chosen=tuple(n for n, _ in target.parts if n in parts))


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


def pick_by_pattern(target: Target, patterns: Mapping[str, Any], default: Any) -> Any:
    """The value of the first pattern that matches a target's name, else the default."""
    for pattern, value in patterns.items():
        if answers_pattern(target, pattern):
            return value
    return default
