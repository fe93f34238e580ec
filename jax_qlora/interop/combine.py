# SPDX-License-Identifier: Apache-2.0
"""Adapters in PEFT's format combined into one, module by module; the base model is not needed."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..lora.combine_factors import Factors, Settings, checked, combine_factors
from .adapter_files import WEIGHTS_NAME, read_tensors, write_adapter
from .output import check_directory
from .peft_config import CONFIG_NAME, PeftConfig, config_json, make_config, read_config

_A, _B = ".lora_A.weight", ".lora_B.weight"
_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class CombinedAdapter:
    """What `combine_adapter_files` wrote.

    Attributes:
        path: The adapter's directory.
        modules: Number of adapted modules.
        rank: The largest rank of a module.
        nbytes: Size of the weights' file.
    """

    path: Path
    modules: int
    rank: int
    nbytes: int


def combine_adapter_files(
    output: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    settings: Settings,
    *,
    overwrite: bool = False,
) -> CombinedAdapter:
    """Combines adapters of one model and writes the result in PEFT's format.

    The same as `combine_adapters` of the adapters loaded, but for the random masks of DARE, which
    depend on the names of modules.

    Args:
        output: Directory to write, complete or not at all.
        adapters: Directories of the adapters.
        weights: One number each.
        settings: How to combine; see `combine_adapters`.
        overwrite: Replace an adapter that is there.

    Returns:
        What was written.

    Raises:
        InputError: as `combine_adapters`; one adapter given twice; an adapter that cannot be read,
            or has more than the factors of linear modules; or the directory is in use.
    """
    output, paths = Path(output), [Path(p) for p in adapters]
    check_directory(output, overwrite=overwrite)
    settings = checked(settings, weights, len(paths))
    real = [p.resolve() for p in paths]
    for path in paths:
        if real.count(path.resolve()) > 1:
            raise InputError(
                f"the adapter '{path}' is given {real.count(path.resolve())} times: expected "
                "different ones. Give it once, with the sum of its weights."
            )
    configs = [read_config(path) for path in paths]
    read = [_factors(path, config) for path, config in zip(paths, configs, strict=True)]
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module in dict.fromkeys(module for factors in read for module in factors):
        parts = [
            (factors[module], weight)
            for factors, weight in zip(read, weights, strict=True)
            if module in factors
        ]
        a, b = combine_factors(module, parts, settings)
        tensors[f"{_PREFIX}{module}{_A}"], tensors[f"{_PREFIX}{module}{_B}"] = a, b
        ranks[module] = a.shape[0]
    config = make_config(ranks, dict.fromkeys(ranks, 1.0), ranks, dropout=configs[0].dropout)
    config = replace(config, target_modules=_targets(configs, list(ranks)))
    first = json.loads((paths[0] / CONFIG_NAME).read_text(encoding="utf-8"))
    base, task = first.get("base_model_name_or_path"), first.get("task_type")
    text = config_json(config, base_model=base, causal_lm=task == "CAUSAL_LM")
    write_adapter(output, tensors, text)
    return CombinedAdapter(
        path=output,
        modules=len(ranks),
        rank=max(ranks.values()),
        nbytes=(output / WEIGHTS_NAME).stat().st_size,
    )


def _factors(path: Path, config: PeftConfig) -> dict[str, Factors]:
    """The update of each module of one adapter.

    Raises:
        InputError: the file holds something else as well, or factors that do not fit together.
    """
    tensors = read_tensors(path / WEIGHTS_NAME)
    if config.target_parameters:
        raise InputError(
            f"{path} has updates of parameters ({', '.join(config.target_parameters)}): expected "
            "the factors of linear modules alone, as PEFT combines no others. Load it and use "
            "combine_adapters, or merge it into the model."
        )
    if config.dora:
        raise InputError(
            f"{path} is a DoRA adapter, whose magnitudes have no weighted combination: expected "
            "plain LoRA adapters. Merge it into its base instead."
        )
    other = [k for k in tensors if not (k.startswith(_PREFIX) and k.endswith((_A, _B)))]
    if other:
        raise InputError(
            f"{path / WEIGHTS_NAME} holds '{other[0]}': expected the factors of linear modules "
            f"alone ('{_PREFIX}...{_A}' and '{_B}'). Merge that adapter into the model instead."
        )
    modules = dict.fromkeys(
        k.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B) for k in tensors
    )
    if not modules:
        raise InputError(f"{path / WEIGHTS_NAME} holds no update: expected an adapter.")
    factors = {}
    for module in modules:
        a, b = tensors.get(f"{_PREFIX}{module}{_A}"), tensors.get(f"{_PREFIX}{module}{_B}")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            shapes = [None if x is None else x.shape for x in (a, b)]
            raise InputError(
                f"{path / WEIGHTS_NAME}: the factors of '{module}' are {shapes[0]} and "
                f"{shapes[1]}: expected [rank, in] and [out, rank]. Save the adapter again."
            )
        if a.shape[0] != config.rank_of(module):
            raise InputError(
                f"{path}: '{module}' has rank {a.shape[0]}, and {config.rank_of(module)} in "
                f"{CONFIG_NAME}: expected one rank. Save the adapter again."
            )
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise InputError(f"{path / WEIGHTS_NAME}: '{module}' has values that are not finite.")
        factors[module] = Factors(a, b, config.scale_of(module))
    return factors


def _targets(configs: Sequence[PeftConfig], modules: Sequence[str]) -> tuple[str, ...]:
    """The adapters' own lists together; the modules in full if they select in another way."""
    names: set[str] = set()
    for config in configs:
        if isinstance(config.target_modules, str) or config.exclude_modules or config.layers:
            return tuple(sorted(modules))
        names |= set(config.target_modules)
    return tuple(sorted(names))
