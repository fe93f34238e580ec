# SPDX-License-Identifier: Apache-2.0
"""Modules that PEFT adapts: where the update of each lies in an adapter, and its tensors in a file.

| kernel | `a` here `[rank, cols]` | `b` here `[rows, rank]` |
|---|---|---|
| linear | `lora_A.weight` | `lora_B.weight` |
| embedding, rows the vocabulary | `lora_embedding_B`, transposed | `lora_embedding_A`, transposed |
| convolution | `lora_A.weight` `[rank, in, *window]` | `lora_B.weight` `[out, rank, 1, ...]` |

The tensors of a stack are one for each layer and expert where the model is a decoder of this
library, whose stacks PEFT knows as modules. In any other tree they keep the stack's axes in front.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..lora import Targets
from ..lora.array import is_special
from ..lora.targets import Convolution
from ..models import Model
from ..quant.layout import KernelLayout
from ..tree import flatten_paths
from .hf import tensor_indices, tensor_names
from .peft_whole import PREFIX

A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A kernel that PEFT knows as a module.

    Attributes:
        path: Path of the parameter it is, or is a part of.
        index: Layer, and expert, in the stack; None for the whole parameter.
        lead: Sizes of the stack's layer and expert axes.
        layout: How the kernel folds to rows and cols.
        head: Whether it is the output head.
        embedding: Whether it is the embedding.
        conv: How a convolution uses it, or None.
    """

    path: str
    index: tuple[int, ...] | None
    lead: tuple[int, ...]
    layout: KernelLayout
    head: bool = False
    embedding: bool = False
    conv: Convolution | None = None

    @property
    def own_lead(self) -> tuple[int, ...]:
        """The axes in front of each of the module's factors."""
        return self.lead if self.index is None else ()


@dataclass(frozen=True, kw_only=True)
class Update:
    """The update of one module, `scale * (b @ a)`, in float32.

    Attributes:
        a: `[*own_lead, rank, cols]`.
        b: `[*own_lead, rows, rank]`.
        scale: Its factor.
        magnitude: With DoRA `[*own_lead, rows]`.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """Its rank."""
        return self.a.shape[-2]


def find_slots(model: Model | Targets, names: Mapping[str, str] | None = None) -> dict[str, Slot]:
    """The modules of a model that can have updates, by PEFT's name for them.

    Args:
        model: A decoder of this library, or the targets of another tree.
        names: Names of modules by path, for another tree; others are named by path.

    Raises:
        InputError: names for a decoder, of a path that is no target, or one name twice.
    """
    if isinstance(model, Targets):
        return _slots_of_targets(model, names or {})
    if names:
        raise InputError(
            f"names of modules {_first(names)} for a decoder of this library: expected none, its "
            "modules have the names of its family. Leave names out."
        )
    slots: dict[str, Slot] = {}
    for path, leaf in flatten_paths(model.params, is_leaf=is_special).items():
        module, _, kind = path.rpartition("/")
        shape = tuple(leaf.shape)
        modules = [name.removesuffix(".weight") for name in tensor_names(path, model.config)]
        if kind == "embedding":
            layout = KernelLayout(shape=shape, in_axes=(-1,))
            slots[modules[0]] = Slot(path=path, index=None, lead=(), layout=layout, embedding=True)
        if kind != "kernel":
            continue
        layout = KernelLayout(shape=shape[-2:], in_axes=(-2,))
        for index, name in zip(tensor_indices(path, model.config), modules, strict=True):
            head = module == "lm_head"
            slots[name] = Slot(
                path=path, index=index or None, lead=shape[:-2], layout=layout, head=head
            )
    return slots


def _slots_of_targets(targets: Targets, names: Mapping[str, str]) -> dict[str, Slot]:
    unknown = sorted(names.keys() - {t.path for t in targets.found})
    if unknown:
        raise InputError(
            f"names has a module for {_first(unknown)}, which the model does not use as a kernel: "
            f"expected paths such as {_first(t.path for t in targets.found)}. Print the targets."
        )
    slots: dict[str, Slot] = {}
    for t in targets.found:
        name = names.get(t.path, t.path.replace("/", "."))
        if name in slots:
            raise InputError(
                f"'{slots[name].path}' and '{t.path}' are both named '{name}': expected a module "
                "of its own for each. Change names."
            )
        slots[name] = Slot(
            path=t.path, index=None, lead=t.lead, layout=t.layout, head=t.head, conv=t.conv
        )
    return slots


def _first(items: Iterable[str]) -> str:
    return repr(next(iter(items), ""))


def tensor_shapes(name: str, slot: Slot, rank: int, *, dora: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's tensors by key.

    Raises:
        InputError: PEFT has no such update of it.
    """
    stem, lead = PREFIX + name, slot.own_lead
    rows, cols = slot.layout.rows, slot.layout.cols
    if slot.embedding:
        _check_embedding(name, dora)
        return {stem + EMBEDDING_A: (rank, rows), stem + EMBEDDING_B: (cols, rank)}
    a, ones, magnitude = (rank, cols), (), (rows,)
    if slot.conv is not None:
        window = _window(name, slot)
        a, ones = (rank, *window), (1,) * (len(window) - 1)
        magnitude = (1, rows, *ones)
    shapes = {stem + A: (*lead, *a), stem + B: (*lead, rows, rank, *ones)}
    return shapes | ({stem + MAGNITUDE: (*lead, *magnitude)} if dora else {})


def encode(name: str, slot: Slot, update: Update) -> dict[str, np.ndarray]:
    """A module's tensors by key.

    Raises:
        InputError: PEFT has no such update of it.
    """
    shapes = tensor_shapes(name, slot, update.rank, dora=update.magnitude is not None)
    a, b = update.a, update.b
    if slot.embedding:
        a, b = b.T, a.T
    elif slot.conv is not None:
        lead = a.ndim - 1
        sizes = [slot.layout.shape[axis] for axis in slot.layout.in_axes]
        order = [*range(lead), *(lead + i for i in _order(slot))]
        a = a.reshape(*a.shape[:-1], *sizes).transpose(order)
    parts = [a, b] if update.magnitude is None else [a, b, update.magnitude]
    return {
        key: np.ascontiguousarray(x).reshape(shape)
        for (key, shape), x in zip(shapes.items(), parts, strict=True)
    }


def decode(
    name: str, slot: Slot, tensors: Mapping[str, np.ndarray], *, scale: float, dora: bool
) -> Update:
    """A module's update from tensors that have the shapes of `tensor_shapes`."""
    stem, lead = PREFIX + name, slot.own_lead
    if slot.embedding:
        b, a = tensors[stem + EMBEDDING_A].T, tensors[stem + EMBEDDING_B].T
        return Update(a=a, b=b, scale=scale)
    a, b = tensors[stem + A], tensors[stem + B]
    if slot.conv is not None:
        order, rank = _order(slot), a.shape[len(lead)]
        sizes = [slot.layout.shape[slot.layout.in_axes[i]] for i in order]
        back = [*range(len(lead) + 1), *(len(lead) + 1 + int(i) for i in np.argsort(order))]
        a = a.reshape(*lead, rank, *sizes).transpose(back).reshape(*lead, rank, -1)
        b = b.reshape(*lead, -1, rank)
    magnitude = tensors[stem + MAGNITUDE].reshape(*lead, -1) if dora else None
    return Update(a=a, b=b, scale=scale, magnitude=magnitude)


def _order(slot: Slot) -> list[int]:
    """For each axis of a convolution's `a` in torch, which contracted axis of the kernel it is."""
    assert slot.conv is not None
    return [slot.layout.in_axes.index(axis) for dim in slot.conv.dims for axis in dim]


def _window(name: str, slot: Slot) -> list[int]:
    """Input channels and window of a convolution."""
    conv, layout = slot.conv, slot.layout
    assert conv is not None
    if conv.groups > 1 or conv.dilated:
        what = "in groups, where its update" if conv.groups > 1 else "dilated, where its update"
        how = "sees all input channels" if conv.groups > 1 else "is not dilated"
        raise InputError(
            f"the convolution '{name}' is {what} in PEFT {how}: expected one without groups and "
            "dilation, whose update is the same there. Leave it out of the adapter, or merge it."
        )
    if sorted(axis for dim in conv.dims for axis in dim) != list(layout.in_axes):
        raise InputError(
            f"the kernel of the convolution '{name}' {layout.shape} is cut up before it is used: "
            "expected one axis for its input channels and for each dimension of its window. Leave "
            "it out of the adapter, or merge it."
        )
    return [math.prod(layout.shape[axis] for axis in dim) for dim in conv.dims]


def _check_embedding(name: str, dora: bool) -> None:
    if dora:
        raise InputError(
            f"a DoRA adapter of the embedding '{name}': PEFT scales its columns, here DoRA scales "
            "rows. Leave the embedding out of the targets, or merge the adapter."
        )
