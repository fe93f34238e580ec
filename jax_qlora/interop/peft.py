# SPDX-License-Identifier: Apache-2.0
"""Adapters in the directory format of Hugging Face PEFT: adapter_config.json and safetensors.

A decoder's stacked update `[layers, rank, cols]` is PEFT's
`base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight` `[rank, cols]`, one tensor a layer.
PEFT gives each layer its own rank and scale; a stack has one. Lower ranks are padded with zeros,
which stay zero in training (each factor's gradient is a multiple of the other) and are cut off
again on saving. A differing scale is folded into `b`: the update is the same, but to an optimizer
that normalizes gradients the learning rate of that layer's `b` changes by the ratio of the scales.

Adapters of any other tree use the same format with the tree's path as the module's name, or a name
that is given. What the tensors of a module are: `peft_layers`; those of experts: `peft_parameters`.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..lora import Adapter, LoraPair, Targets, split_virtual
from ..models import Model
from .adapter_files import WEIGHTS_NAME, read_tensors, write_adapter
from .peft_config import PeftConfig, config_json, make_config, read_config, read_document
from .peft_copies import add_copies, without_copies
from .peft_layers import Slot, Update, decode, encode, find_slots, tensor_shapes
from .peft_parameters import (
    Parameter,
    bare_parameters,
    find_stems,
    join,
    parameter_shapes,
    split,
    weight_parameters,
)
from .peft_prompt import KINDS, read_prompt, write_prompt
from .peft_stacks import some, stack, unstack
from .peft_whole import PREFIX, Whole, read_whole, whole_tensors, write_whole


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """What `save_adapter` wrote, and read back to check.

    Attributes:
        path: The adapter's directory.
        modules: Number of adapted modules and parameters; there are two tensors each, three with
            DoRA.
        nbytes: Size of the weights' file.
        b_norm: Euclidean norm of all `b` factors together; 0 for an untrained adapter.
        virtual_tokens: Of a prompt or prefix, which adapts no module: its tokens.
    """

    path: Path
    modules: int
    nbytes: int
    b_norm: float
    virtual_tokens: int = 0


def save_adapter(
    path: str | os.PathLike[str],
    adapter: Mapping[str, Any],
    model: Model | Targets,
    *,
    base_model: str | None = None,
    names: Mapping[str, str] | None = None,
    tokenizer: Any = None,
) -> SavedAdapter:
    """Writes an adapter that PEFT loads onto the same model.

    Written beside `path`, read back and compared, then moved into place; an adapter that was there
    is replaced only then, and other files of its directory are kept.

    Updates of experts and routers are written as transformers 5 has them, as parameters, for which
    PEFT has no dropout and no DoRA: dropout is written as 0, and DoRA under the names of
    transformers 4.

    Args:
        path: Directory to make.
        adapter: Path -> LoraPair, and what trains beside: see `attach`. Virtual tokens are
            saved by themselves, as PEFT has them.
        model: The model it belongs to; or, for a tree that is no decoder of this library, the
            `Targets` found in it: modules are then named by path, with "/" as ".".
        base_model: Name or path of the base model to note in the configuration.
        names: What the model in PEFT calls a module, by path, where that is not the path:
            `{"conv/kernel": "conv"}`. For `Targets` alone.
        tokenizer: The model's, to be saved beside updates where tokens were added to it:
            `tokens_beside` reads them back.

    Returns:
        What was written.

    Raises:
        InputError: the adapter is of another model, has values that are not finite, nothing to
            save or something that PEFT cannot say, or the directory cannot be written.
    """
    path = Path(path)
    others, virtual = split_virtual(adapter)
    if virtual:
        return _save_virtual(path, virtual, others, model, base_model)
    slots = find_slots(model, names)
    # PEFT has no parts of kernels: their factors are written as one pair, `b` block-diagonal
    pairs = {p: x.whole() for p, x in adapter.items() if isinstance(x, LoraPair)}
    dora = {pair.magnitude is not None for pair in pairs.values()}
    if len(dora) > 1:
        raise InputError(
            f"the adapter to save at {path} has magnitudes (DoRA) for some updates and none for "
            "others: expected all or none, as in PEFT. Make them with add_magnitudes."
        )
    updates = unstack(pairs, slots)
    if not updates:
        beside = sorted(adapter.keys() - pairs.keys())
        found = f"has no update beside {some(beside)}" if beside else "changes nothing"
        raise InputError(
            f"the adapter to save at {path} {found}: PEFT's format expects at least one update "
            "that is not zero in both factors. Make one with init_adapter."
        )
    bare = bare_parameters(slots) if isinstance(model, Model) and dora == {False} else []
    tensors, ranks, scales = _encode(updates, slots, bare)
    settings: dict[str, Any] = dict(dora=dora == {True})
    if isinstance(model, Model):
        rest = {p: x for p, x in adapter.items() if p not in pairs}
        whole, more = write_whole(rest, model, updates)
        tensors, settings = tensors | whole, settings | more
        settings["tied"] = add_copies(tensors, model) or settings.get("tied", False)
    elif len(pairs) < len(adapter):
        raise InputError(
            f"the adapter to save at {path} trains whole weights or rows: expected updates alone "
            "for a tree that is no decoder of this library. Save those arrays yourself."
        )
    dropout = max(pair.dropout for pair in pairs.values())
    parameters = [parameter.name for parameter in bare]
    if not ranks.keys().isdisjoint(parameters):
        dropout = 0.0
    config = make_config(ranks, scales, slots, parameters, dropout=dropout, **settings)
    text = config_json(
        config,
        base_model=base_model,
        causal_lm=isinstance(model, Model),
        fan_in_fan_out=isinstance(model, Model) and model.config.family == "gpt2",
    )
    write_adapter(path, tensors, text, tokenizer)
    return SavedAdapter(
        path=path,
        modules=len(ranks),
        nbytes=(path / WEIGHTS_NAME).stat().st_size,
        b_norm=math.sqrt(sum(np.sum(np.square(u.b, dtype=np.float64)) for u in updates.values())),
    )


def load_adapter(
    path: str | os.PathLike[str],
    model: Model | Targets,
    *,
    names: Mapping[str, str] | None = None,
) -> Adapter:
    """Reads an adapter that PEFT or `save_adapter` wrote, or a GGUF file of llama.cpp's.

    It is one of LoRA, or a prompt or prefix.

    Every tensor of the file is used and every module that the configuration names is filled, or it
    is an error. Layers without an update get a zero one.

    Args:
        path: The adapter's directory, or its .gguf file: see `load_gguf_lora`.
        model: The model it was trained on, or the `Targets` of a tree, as for `save_adapter`.
        names: Names of modules by path, as for `save_adapter`.

    Returns:
        Path -> LoraPair, float32; and the arrays and TokenRows that are trained beside. Or
        VirtualTokens alone.

    Raises:
        InputError: files missing, damaged or not finite; a field of the configuration that changes
            the result and is not supported; or an adapter of another model (the differences are
            listed).
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return _load_gguf(path, model)
    document = read_document(path)
    if document.get("peft_type") in KINDS:
        if isinstance(model, Targets):
            raise _no_decoder(path)
        return read_prompt(path, document, model.config)
    config = read_config(path, document)
    tensors = read_tensors(path / WEIGHTS_NAME)
    slots = find_slots(model, names)
    targets = [m for m, slot in slots.items() if config.is_target(m, head=slot.head)]
    targets = [m for m in targets if not (slots[m].embedding and config.is_every_linear)]
    parameters = _target_parameters(path, config, model, slots)
    whole: dict[str, Whole] = {}
    if isinstance(model, Model):
        whole = whole_tensors(config, model, targets)
        tensors = without_copies(path, config, tensors, model)
    wanted = {key: entry.shape for key, entry in whole.items()}
    for module in targets:
        rank = config.rank_of(module)
        wanted |= tensor_shapes(module, slots[module], rank, dora=config.dora)
    for stem, parameter in parameters.items():
        wanted |= parameter_shapes(stem, parameter, slots, config.rank_of(parameter.name))
    _check_fit(path, config, tensors, wanted, slots)
    updates = {
        module: decode(
            module, slots[module], tensors, scale=config.scale_of(module), dora=config.dora
        )
        for module in targets
    }
    for stem, parameter in parameters.items():
        found = split(stem, parameter, slots, tensors, config.scale_of(parameter.name))
        _check_once(path, updates.keys() & found.keys())
        updates |= found
    beside = read_whole(whole, tensors, model) if isinstance(model, Model) else {}
    adapter = stack(updates, slots, config, model)
    _check_once(path, adapter.keys() & beside.keys())
    return adapter | beside


def _save_virtual(
    path: Path,
    virtual: Mapping[str, Any],
    others: Mapping[str, Any],
    model: Model | Targets,
    base_model: str | None,
) -> SavedAdapter:
    if others:
        raise InputError(
            f"the adapter to save at {path} has the virtual tokens {some(virtual)} beside updates "
            f"of {some(others)}: expected one of the two, as PEFT has them in directories of "
            "their own. Save both parts that jax_qlora.lora.split_virtual gives."
        )
    if isinstance(model, Targets):
        raise _no_decoder(path)
    tokens = write_prompt(path, virtual, model.config, base_model=base_model)
    nbytes = (path / WEIGHTS_NAME).stat().st_size
    return SavedAdapter(path=path, modules=0, nbytes=nbytes, b_norm=0.0, virtual_tokens=tokens)


def _no_decoder(path: Path) -> InputError:
    return InputError(
        f"the adapter at {path} has virtual tokens: expected the Model that they are for, found "
        "the targets of some other tree."
    )


def _load_gguf(path: Path, model: Model | Targets) -> Adapter:
    from .gguf_lora import load_gguf_lora

    if isinstance(model, Model):
        return load_gguf_lora(path, model.config)
    raise InputError(
        f"the adapter at {path} is a GGUF file, whose names are those of decoders: expected one in "
        "PEFT's format for a tree that is no decoder of this library."
    )


def _encode(
    updates: Mapping[str, Update], slots: Mapping[str, Slot], bare: Sequence[Parameter]
) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, float]]:
    """Tensors by key, and rank and scale by module or parameter."""
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    inside = {module for parameter in bare for module in parameter.modules}
    for module, update in updates.items():
        if module not in inside:
            tensors |= encode(module, slots[module], update)
            ranks[module], scales[module] = update.rank, update.scale
    adapted = {p.name: p for p in bare if not updates.keys().isdisjoint(p.modules)}
    for name, stem in find_stems(adapted).items():
        found, ranks[name], scales[name] = join(stem, adapted[name], slots, updates)
        tensors |= found
    return tensors, ranks, scales


def _target_parameters(
    path: Path, config: PeftConfig, model: Model | Targets, slots: Mapping[str, Slot]
) -> dict[str, Parameter]:
    """The parameters that a configuration names, by what their keys start with."""
    if not config.target_parameters:
        return {}
    known: list[Parameter] = []
    if isinstance(model, Model):
        known = [*bare_parameters(slots), *weight_parameters(slots)]
    for name in config.target_parameters:
        if not any(config.is_target_parameter(p.name, (name,)) for p in known):
            raise InputError(
                f"the adapter at {path} has target_parameters '{name}', which is no parameter of "
                f"the model that can have an update: expected the end of one of "
                f"{some(p.name for p in known)}. Load it on the model it was trained on."
            )
    if config.dora:
        raise InputError(
            f"the adapter at {path} has target_parameters and use_dora: expected one of the two, "
            "PEFT has no DoRA for parameters. Its configuration was changed."
        )
    found = {p.name: p for p in known if config.is_target_parameter(p.name)}
    return {stem: found[name] for name, stem in find_stems(found).items()}


def _check_fit(
    path: Path,
    config: PeftConfig,
    tensors: Mapping[str, np.ndarray],
    want: Mapping[str, tuple[int, ...]],
    slots: Mapping[str, Slot],
) -> None:
    """Every tensor used, every target filled, every shape right."""
    missing = [k for k in want if k not in tensors]
    unused = [k for k in tensors if k not in want]
    shapes = [
        f"{k.removeprefix(PREFIX)}: expected {want[k]}, found {x.shape}"
        for k, x in tensors.items()
        if k in want and x.shape != want[k]
    ]
    if missing or unused or shapes:
        lines = [
            f"{title} ({len(items)}): {some(items)}"
            for title, items in (
                ("missing", missing),
                ("not in the model or not a target", unused),
                ("of another shape", shapes),
            )
            if items
        ]
        hint = "The adapter was trained on another model, or its configuration was changed."
        raise InputError(
            f"the adapter at {path} does not fit the model: its configuration asks for "
            f"{len(want)} tensors, the file has {len(tensors)}. " + "; ".join(lines) + f". {hint}"
        )
    if not want:
        raise InputError(
            f"the adapter at {path} has no target in the model: target_modules "
            f"{config.target_modules!r} match none of {some(slots)}."
        )
    bad = [k for k, x in tensors.items() if not np.isfinite(x).all()]
    if bad:
        raise InputError(
            f"{path / WEIGHTS_NAME}: {some(bad)} have values that are not finite. Train again, "
            "with a lower learning rate."
        )


def _check_once(path: Path, twice: Iterable[str]) -> None:
    if twice := sorted(twice):
        raise InputError(f"the adapter at {path} has two updates of {some(twice)}: expected one.")
