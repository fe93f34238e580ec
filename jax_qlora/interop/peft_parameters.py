# SPDX-License-Identifier: Apache-2.0
"""Updates of bare parameters in PEFT's files: experts and routers as transformers 5 holds them.

There the kernels of all experts of a layer are one parameter, gate and up side by side, and PEFT
adapts parameters by `target_parameters`. With E experts and rank r for each

- `lora_A.weight` is `[E * r, in]`, expert by expert;
- `lora_B.weight` is `[out, r * E]`, its columns component by component: expert e has every E-th;
- the update of expert e is `alpha / r * (B_e @ A_e)`.

Here gate and up have updates of their own, of ranks g and u. Their parameter's has rank g + u: the
rows of A are those of both, B has two blocks. That is exact, and read back it is cut where the
blocks meet. An update of PEFT without such blocks becomes two here, of equal A.

In transformers 4 experts are modules, which PEFT names one by one ("experts.0.gate_proj",
"block_sparse_moe.experts.0.w1" of Mixtral). Those names are read, and written for DoRA, which PEFT
does not have for parameters.

References:
    `ParamWrapper` in `tuners/lora/layer.py`, `BaseTuner._inject_parameters` and
    `PeftConcatenate` in `utils/transformers_weight_conversion.py` of peft 0.21.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from .hf import is_expert
from .peft_config import PeftConfig
from .peft_layers import A, B, Slot, Update
from .peft_whole import PREFIX

# the parameters of experts, in the order in which the module has them, and what is in each
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter that PEFT can adapt.

    Attributes:
        name: Its name in transformers 5.
        parts: The modules whose kernels it holds: for each part of its rows, one for each expert.
    """

    name: str
    parts: tuple[tuple[str, ...], ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules whose kernels it holds."""
        return tuple(module for part in self.parts for module in part)


def bare_parameters(slots: Mapping[str, Slot]) -> list[Parameter]:
    """The parameters of a decoder that are in no linear module: those of experts, and routers."""
    found: list[Parameter] = []
    experts: dict[str, dict[str, list[str]]] = {}
    for module, slot in slots.items():
        if slot.path.endswith("/gate/kernel"):
            found.append(Parameter(name=f"{_renamed(module)}.weight", parts=((module,),)))
        elif is_expert(slot.path):
            parent = f"{_renamed(module).partition('.experts.')[0]}.experts"
            projection = slot.path.split("/")[-2]
            experts.setdefault(parent, {}).setdefault(projection, []).append(module)
    for parent, by_projection in experts.items():
        for name, projections in _FUSED.items():
            parts = tuple(tuple(by_projection[p]) for p in projections)
            found.append(Parameter(name=f"{parent}.{name}", parts=parts))
    return found


def weight_parameters(slots: Mapping[str, Slot]) -> list[Parameter]:
    """The weights of a decoder's linear modules, which PEFT can adapt as parameters too."""
    bare = {module for parameter in bare_parameters(slots) for module in parameter.modules}
    return [
        Parameter(name=f"{module}.weight", parts=((module,),))
        for module, slot in slots.items()
        if module not in bare and not slot.embedding
    ]


def _renamed(module: str) -> str:
    """A module's name in transformers 5, from that in transformers 4."""
    return module.replace(".block_sparse_moe.", ".mlp.")


def find_stems(names: Iterable[str]) -> dict[str, str]:
    """What the keys of adapted parameters start with.

    PEFT wraps a module once for each of its parameters, so the first is the innermost.

    Args:
        names: The adapted parameters, those of one module in its own order.

    >>> find_stems(["experts.gate_up_proj", "experts.down_proj"])["experts.gate_up_proj"]
    'base_model.model.experts.base_layer'
    """
    stems = {}
    for module, group in groupby(names, key=lambda name: name.rpartition(".")[0]):
        for depth, name in enumerate(reversed(list(group))):
            stems[name] = f"{PREFIX}{module}{'.base_layer' * depth}"
    return stems


def parameter_shapes(
    stem: str, parameter: Parameter, slots: Mapping[str, Slot], rank: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of a parameter's tensors by key."""
    n_experts, cols = len(parameter.parts[0]), slots[parameter.parts[0][0]].layout.cols
    rows = sum(_rows(parameter, slots))
    return {stem + A: (n_experts * rank, cols), stem + B: (rows, rank * n_experts)}


def _rows(parameter: Parameter, slots: Mapping[str, Slot]) -> list[int]:
    return [slots[part[0]].layout.rows for part in parameter.parts]


def join(
    stem: str, parameter: Parameter, slots: Mapping[str, Slot], updates: Mapping[str, Update]
) -> tuple[dict[str, np.ndarray], int, float]:
    """The tensors of a parameter by key, its rank, and its scale.

    Args:
        stem: What its keys start with.
        parameter: The parameter.
        slots: The model's modules.
        updates: The updates by module; one that is missing is zero.
    """
    mine = [updates[module] for module in parameter.modules if module in updates]
    scale = max((update.scale for update in mine), key=abs)
    ranks = [
        max((updates[module].rank for module in part if module in updates), default=0)
        for part in parameter.parts
    ]
    rows, n_experts = _rows(parameter, slots), len(parameter.parts[0])
    a = np.zeros((n_experts, sum(ranks), mine[0].a.shape[-1]), np.float32)
    b = np.zeros((n_experts, sum(rows), sum(ranks)), np.float32)
    for i, part in enumerate(parameter.parts):
        row, column = sum(rows[:i]), sum(ranks[:i])
        for expert, module in enumerate(part):
            if (update := updates.get(module)) is not None:
                columns = slice(column, column + update.rank)
                a[expert, columns] = update.a
                b[expert, row : row + rows[i], columns] = rescaled(update, scale)
    tensors = {
        stem + A: a.reshape(-1, a.shape[-1]),
        stem + B: np.ascontiguousarray(b.transpose(1, 2, 0)).reshape(b.shape[1], -1),
    }
    return tensors, sum(ranks), scale


def rescaled(update: Update, scale: float) -> np.ndarray:
    """An update's `b` under another scale."""
    return update.b if update.scale == scale else update.b * np.float64(update.scale / scale)


def split(
    stem: str,
    parameter: Parameter,
    slots: Mapping[str, Slot],
    tensors: Mapping[str, np.ndarray],
    scale: float,
) -> dict[str, Update]:
    """The updates of a parameter's modules, from tensors of the shapes of `parameter_shapes`."""
    rows, n_experts = _rows(parameter, slots), len(parameter.parts[0])
    a, b = tensors[stem + A], tensors[stem + B]
    a = a.reshape(n_experts, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, n_experts).transpose(2, 0, 1)
    found = {}
    for i, (part, columns) in enumerate(zip(parameter.parts, _columns(b, rows), strict=True)):
        if columns.start == columns.stop:
            continue
        row = sum(rows[:i])
        for expert, module in enumerate(part):
            found[module] = Update(
                a=a[expert, columns], b=b[expert, row : row + rows[i], columns], scale=scale
            )
    return found


def _columns(b: np.ndarray, rows: Sequence[int]) -> list[slice]:
    """The components that each part of a parameter's rows uses: all, or those of its block.

    Args:
        b: `[experts, rows, rank]`.
        rows: How many rows each part has; there are one or two.
    """
    rank = b.shape[-1]
    every = [slice(0, rank)] * len(rows)
    if len(rows) == 1 or not b.any():
        return every
    first, second = (
        np.flatnonzero(np.any(part, axis=(0, 1))) for part in np.split(b, rows[:1], axis=1)
    )
    end, start = np.max(first, initial=-1) + 1, np.min(second, initial=rank)
    if end > start:
        return every
    cut = rank // 2 if end <= rank // 2 <= start else int(end)  # equal blocks, if it can be
    return [slice(0, cut), slice(cut, rank)]


def name_experts(
    shapes: Mapping[str, tuple[int, ...]], config: PeftConfig
) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors; `a` of experts by parameter, as it is for one expert.

    Keys do not name parameters: which one is meant follows from how often a module is wrapped.

    Args:
        shapes: Shapes by key.
        config: The adapter's configuration.
    """
    found = dict(shapes)
    modules = (key.removesuffix(A).replace(".base_layer", "") for key in shapes if key.endswith(A))
    for module in dict.fromkeys(m.removeprefix(PREFIX) for m in modules if m.endswith(".experts")):
        names = [f"{module}.{name}" for name in _FUSED]
        for name, stem in find_stems(filter(config.is_target_parameter, names)).items():
            if (shape := found.pop(stem + A, None)) is not None:
                found[f"{PREFIX}{name}{A}"] = (config.rank_of(name), *shape[1:])
    return found
