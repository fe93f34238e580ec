# SPDX-License-Identifier: Apache-2.0
"""What trains beside updates, chosen by PEFT's names and rules: whole modules, biases, rows.

A name of `modules_to_save` chooses every module whose dotted name, or that of one it is in, ends
with it, at a dot or not: "norm" also means "model.layers.0.input_layernorm" (peft 0.21,
`_set_trainable` in `utils/other.py`, which `PeftConfig.is_saved` follows).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..config import LoraConfig, nearest
from ..errors import InputError
from ..models import DecoderConfig
from .hf import parameter_shapes, tensor_names
from .load_params import EMBEDDINGS
from .peft_config import PeftConfig


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What of a decoder trains beside updates.

    Attributes:
        whole: Paths of the parameters that train as a whole.
        tokens: Path of an embedding or head -> its rows that train.
    """

    whole: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def select_modules(lora: LoraConfig, decoder: DecoderConfig) -> tuple[str, ...]:
    """The paths of the parameters of the modules that `modules_to_save` names.

    Args:
        lora: Settings.
        decoder: The model's shape.

    Raises:
        InputError: A name is that of no module, or of some of the layers that are stacked in one
            parameter.
    """
    if not lora.modules_to_save:
        return ()
    modules = {path: list(_modules(path, decoder)) for path in parameter_shapes(decoder)}
    for name in lora.modules_to_save:
        rule = PeftConfig(rank=1, alpha=1, modules_to_save=(name,))
        if not name or not any(rule.is_saved(m) for names in modules.values() for m in names):
            raise InputError(_no_module(name, modules, decoder))
    rule = PeftConfig(rank=1, alpha=1, modules_to_save=lora.modules_to_save)
    chosen = []
    for path, names in modules.items():
        saved = [name for name in names if rule.is_saved(name)]
        if saved and len(saved) < len(names):
            raise InputError(
                f"lora.modules_to_save: expected modules of all layers, whose weights are one "
                f"parameter here ('{path}'), found {len(saved)} of {len(names)}, the first being "
                f"'{saved[0]}'. Name the module without its layer."
            )
        chosen += [path] if saved else []
    return tuple(chosen)


def select_beside(
    lora: LoraConfig,
    decoder: DecoderConfig,
    targets: Iterable[str],
    *,
    new_tokens: Sequence[int] = (),
) -> Beside:
    """What the settings say trains beside the updates.

    Args:
        lora: Settings.
        decoder: The model's shape, rows for new tokens included.
        targets: Paths of the kernels that have updates; `select_modules` are none of them.
        new_tokens: Numbers of the tokens that were added, whose rows train in embedding and head.

    Raises:
        InputError: As `select_modules`; a model without biases of which biases are to train; rows
            that are not there; or rows of a weight that has an update.
    """
    targets, whole = set(targets), list(select_modules(lora, decoder))
    biases = [path for path in parameter_shapes(decoder) if path.endswith("/bias")]
    if lora.bias == "lora_only":
        kernels = {path.rpartition("/")[0] for path in targets}
        biases = [path for path in biases if path.rpartition("/")[0] in kernels]
    if lora.bias != "none":
        if not biases:
            whose = "the model" if lora.bias == "all" else "its targets"
            raise InputError(
                f'lora.bias: expected a model with biases, found "{lora.bias}" and none in {whose} '
                f'({decoder.family}). Leave it at "none".'
            )
        whole += [path for path in biases if path not in whole]
    embedding, head = EMBEDDINGS
    rows = {embedding: (*lora.trainable_token_indices, *new_tokens)}
    if not decoder.tied:
        rows[head] = tuple(new_tokens)
    tokens = {path: wanted for path, wanted in rows.items() if wanted and path not in whole}
    for path, wanted in tokens.items():
        _check_rows(path, wanted, decoder, targets)
    return Beside(whole=tuple(whole), tokens=tokens)


def _modules(path: str, decoder: DecoderConfig) -> Iterator[str]:
    return (name.rpartition(".")[0] for name in tensor_names(path, decoder))


def _table_name(path: str, decoder: DecoderConfig) -> str:
    """The module of an embedding or head as checkpoints call it."""
    return tensor_names(path, decoder)[0].split(".")[-2]


def _no_module(name: str, modules: Mapping[str, list[str]], decoder: DecoderConfig) -> str:
    parts = {part for names in modules.values() for part in names[0].split(".")}
    containers = ("model", "layers", "transformer", "h")
    known = sorted(part for part in parts if not part.isdigit() and part not in containers)
    if decoder.tied and "lm_head".endswith(name or "?"):
        own = _table_name(EMBEDDINGS[0], decoder)
        hint = f" The output head is the embedding of this model: name {own}, which is both."
    else:
        hint = nearest(name, known)
    return (
        f"lora.modules_to_save: expected the name of a module or the end of one, found '{name}', "
        f"which is none.{hint} There are {', '.join(known)}."
    )


def _check_rows(
    path: str, rows: Sequence[int], decoder: DecoderConfig, targets: Iterable[str]
) -> None:
    module = _table_name(path, decoder)
    if path in targets:
        raise InputError(
            f"lora.targets: '{module}' has an update, and rows for tokens train in it too "
            "(data.new_tokens, lora.trainable_token_indices): expected one of the two. Leave "
            f'{module} out of lora.targets, or train it whole: lora.modules_to_save = ["{module}"].'
        )
    wrong = [row for row in rows if not 0 <= row < decoder.vocab_size]
    if wrong:
        raise InputError(
            f"lora.trainable_token_indices: expected numbers of the {decoder.vocab_size} rows of "
            f"'{module}', found {', '.join(map(str, wrong[:5]))}. Tokens that are not there yet "
            "are added by data.new_tokens."
        )
    if len(set(rows)) < len(rows):
        twice = next(row for row in rows if rows.count(row) > 1)
        raise InputError(
            f"lora.trainable_token_indices: found {twice}, a token that data.new_tokens adds and "
            "trains: expected others."
        )
