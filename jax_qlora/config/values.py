# SPDX-License-Identifier: Apache-2.0
"""Settings by their dotted names: listed, replaced, compared, and written as TOML."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from .tables import Config

# Settings that leave the weights of every step as they are: a run may resume with other values.
_OBSERVING = (
    "output",
    "optim.placement",
    "quant.streamed",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "eval.",
)


def flat_settings(config: Config) -> dict[str, Any]:
    """Return every setting as {"section.key": value}."""
    return {key: value for key, value, _ in leaves(config)}


def replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """Return `config` with other values, given as {"section.key": value}; nothing is checked."""
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        part = dataclasses.replace(getattr(config, section) if section else config, **{leaf: value})
        config = dataclasses.replace(config, **{section: part}) if section else part
    return config


def run_identity(config: Config) -> dict[str, str]:
    """Return the settings that decide the weights of every step, as {"section.key": "value"}.

    Two configurations with equal identity train through the same weights, so a run started with
    one may be resumed with the other.
    """
    return {
        key: str(value)
        for key, value in flat_settings(config).items()
        if not key.startswith(_OBSERVING)
    }


def to_toml(config: Config) -> str:
    """Return `config` as TOML with every setting spelled out; `load_config` reads it back."""
    lines: list[str] = []
    section = ""
    for key, value, _ in leaves(config):
        head, _, name = key.rpartition(".")
        if head != section:
            lines += ["", f"[{head}]"]
            section = head
        if value is not None:
            lines.append(f"{name} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """Return a setting's value as TOML spells it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, dict):
        pairs = (f"{toml_value(key)} = {toml_value(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    return repr(value)


def annotations(table: type) -> dict[str, Any]:
    """Return the annotation of each setting of a table, bounds included."""
    return typing.get_type_hints(table, include_extras=True)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value, annotation), plain settings of a table before its own tables."""
    hints = annotations(type(config))
    names = [item.name for item in dataclasses.fields(config)]
    for name in sorted(names, key=lambda name: dataclasses.is_dataclass(hints[name])):
        value = getattr(config, name)
        if dataclasses.is_dataclass(hints[name]):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, hints[name]


def describe_adapter(config: Config) -> str:
    """Return in words what of a run trains beside a frozen base.

    >>> from jax_qlora.config import PromptConfig
    >>> describe_adapter(Config(prompt=PromptConfig(kind="prefix")))
    'rank 16, prefix of 20 tokens'
    """
    parts = [f"rank {config.lora.rank}"] if config.lora.rank else []
    if config.virtual_tokens:
        parts.append(f"{config.prompt.kind} of {config.prompt.tokens} tokens")
    return ", ".join(parts)
