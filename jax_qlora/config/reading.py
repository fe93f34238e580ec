# SPDX-License-Identifier: Apache-2.0
"""Settings from a TOML file, and what is wrong with them: all of it at once, by dotted name."""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from ..errors import InputError
from ..lora.inits import PLAIN_INITS, check_init
from .tables import Config, LoraConfig
from .values import annotations, leaves, toml_value


def load_config(path: str | Path) -> Config:
    """Read a TOML file.

    Args:
        path: the file.

    Raises:
        InputError: the file is missing or no TOML, a key is unknown, or a value has the wrong
            type or lies out of range.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        there = [str(file) for file in path.parent.glob("*.toml")]
        raise InputError(
            f"No settings file at '{path}'.{nearest(str(path), there)} Expected a TOML file such "
            "as configs/quickstart.toml."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not valid TOML: {error}.") from error
    return from_table(table, where=f"'{path}'")


def from_table(table: Mapping[str, Any], *, where: str = "settings") -> Config:
    """Build a checked `Config` from nested mappings, as a TOML file gives them.

    Args:
        table: key to value or to a table of a section.
        where: what to call the source in messages.

    Raises:
        InputError: unknown keys, values of the wrong type or out of range; all are named.
    """
    wrong: list[str] = []
    config = _build(Config, table, "", wrong)
    _refuse(wrong, where)
    check_config(config, where=where)
    return config


def check_config(config: Config, *, where: str = "settings") -> None:
    """Check that every value of `config` has its type, range and sense.

    Args:
        config: what to check, for example after overrides from a command line.
        where: what to call the source in messages.

    Raises:
        InputError: wrong types, values out of range, or values that contradict each other.
    """
    wrong: list[str] = []
    for key, value, annotation in leaves(config):
        try:
            _convert(value, annotation, key)
        except InputError as error:
            wrong.append(str(error))
    _refuse(wrong, where)
    _refuse([*_contradictions(config), *_prompt_contradictions(config)], where)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest of `known`, or "" when none is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""


def _refuse(wrong: list[str], where: str) -> None:
    if len(wrong) > 1:
        lines = "".join(f"\n  {line}" for line in wrong)
        raise InputError(f"{where}: {len(wrong)} settings are wrong:{lines}")
    if wrong:
        raise InputError(f"{where}: {wrong[0]}")


def _contradictions(config: Config) -> Iterator[str]:
    """What values, each fine by itself, cannot be together."""
    lora, data = config.lora, config.data
    if config.quant.streamed and config.method != "qlora":
        yield (
            'quant.streamed: expected method = "qlora", whose 4-bit weights are streamed, found '
            f'method = "{config.method}". Leave quant.streamed out.'
        )
    if config.method == "full":
        for key in ("adapter", "modules_to_save", "bias", "trainable_token_indices"):
            if getattr(lora, key) != getattr(type(lora), key):
                yield (
                    f'lora.{key}: expected method "qlora" or "lora", found "full", with which '
                    "every weight trains. Leave it out."
                )
    elif lora.init not in PLAIN_INITS:
        try:
            check_init(lora.init, quantized=config.method == "qlora")
        except InputError as error:
            yield f"lora.init: {error}"
    if config.method != "full" and lora.adapter is not None and lora.init != "default":
        yield (
            "lora.init: expected it left out beside lora.adapter, which says where the updates "
            f"start, found '{lora.init}'."
        )
    for key, values in (
        ("data.new_tokens", data.new_tokens),
        ("lora.trainable_token_indices", lora.trainable_token_indices),
    ):
        if twice := sorted({str(value) for value in values if values.count(value) > 1}):
            yield f"{key}: expected each once, found {', '.join(twice)} twice."
    if not all(data.new_tokens):
        yield "data.new_tokens: expected tokens, found an empty text."
    if config.optim.warmup_steps >= config.train.steps:
        yield (
            f"optim.warmup_steps: expected fewer than train.steps = {config.train.steps}, found "
            f"{config.optim.warmup_steps}. Lower the warm-up or train for more steps."
        )


def _prompt_contradictions(config: Config) -> Iterator[str]:
    """Likewise, of virtual tokens and of a run without LoRA."""
    text, lora = config.prompt.init_text, config.lora
    if text is not None and not text.strip():
        yield "prompt.init_text: expected some words, found none."
    if config.method == "full":
        if config.virtual_tokens:
            yield (
                'prompt.kind: expected method "qlora" or "lora", which freeze the base, found '
                'method = "full". Leave the prompt out, or freeze the base.'
            )
        return
    if lora.rank:
        return
    if not config.virtual_tokens:
        yield (
            "lora.rank: expected at least 1 where nothing else trains, found 0. Raise it, or set "
            'prompt.kind = "prompt" or "prefix".'
        )
    plain = dataclasses.replace(LoraConfig(), rank=0)
    for name, value in vars(lora).items():
        if value != getattr(plain, name):
            yield (
                f"lora.{name}: expected no setting of LoRA beside lora.rank = 0, which turns it "
                "off. Leave it out, or raise the rank."
            )
    if config.data.new_tokens:
        yield (
            "data.new_tokens: expected lora.rank above 0 beside them, as PEFT saves their rows "
            "with updates only, found 0. Leave them out, or raise the rank."
        )


def _build(kind: type, table: Mapping[str, Any], prefix: str, wrong: list[str]) -> Any:
    """The dataclass that a table describes; what is wrong with it goes to `wrong`."""
    hints = annotations(kind)
    values: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        if name not in hints:
            wrong.append(_unknown(key, name, hints))
        elif not dataclasses.is_dataclass(hints[name]):
            try:
                values[name] = _convert(value, hints[name], key)
            except InputError as error:
                wrong.append(str(error))
        elif isinstance(value, Mapping):
            values[name] = _build(hints[name], value, f"{key}.", wrong)  # type: ignore
        else:
            wrong.append(str(_wrong(key, f"a table [{key}]", value)))
    return kind(**values)


def _unknown(key: str, name: str, known: Mapping[str, Any]) -> str:
    """That a key is unknown, and which is meant: one of the same table, or of another."""
    everywhere: dict[str, str] = {}
    for other, _, _ in leaves(Config()):
        everywhere.setdefault(other.rpartition(".")[2], other)
    near = difflib.get_close_matches(name, [*known, *everywhere], n=1, cutoff=0.5)
    guess = ""
    if near:
        prefix = key.removesuffix(name)
        meant = prefix + near[0] if near[0] in known else everywhere[near[0]]
        guess = f" Did you mean '{meant}'?"
    return f"unknown key '{key}'.{guess} Known here: {', '.join(sorted(known))}."


def _convert(value: Any, annotation: Any, key: str) -> Any:
    """Return `value` as `annotation` wants it, or raise InputError naming the key."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        value = _convert(value, args[0], key)
        if value not in args[1]:
            raise _wrong(key, f"a number {args[1]}", value)
        return value
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in args):
            guess = nearest(value, map(str, args)) if isinstance(value, str) else ""
            raise _wrong(key, "one of " + ", ".join(map(toml_value, args)), value, guess)
        return value
    if origin in (typing.Union, types.UnionType):
        choices = [choice for choice in args if choice is not types.NoneType]
        if value is None and len(choices) < len(args):
            return None
        if len(choices) == 1:
            return _convert(value, choices[0], key)
        for choice in choices:
            try:
                return _convert(value, choice, key)
            except InputError:
                continue
        raise _wrong(key, " or ".join(map(_describe, choices)), value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(key, _describe(annotation), value)
        return tuple(_convert(item, args[0], key) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(key, "a table of names to numbers", value)
        return {name: _convert(x, args[1], f"{key}.{name}") for name, x in value.items()}
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not annotation:
        raise _wrong(key, _describe(annotation), value)
    return value


def _describe(annotation: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    if annotation in names:
        return names[annotation]
    item = typing.get_args(annotation)[0]
    return "a list of strings" if item is str else "a list of integers"


def _wrong(key: str, expected: str, found: Any, guess: str = "") -> InputError:
    shown = toml_value(found) if isinstance(found, str | int | float) else repr(found)
    return InputError(f"{key}: expected {expected}, found {shown}.{guess}")
