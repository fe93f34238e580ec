# SPDX-License-Identifier: Apache-2.0
"""Arguments of a command from a dataclass: its fields are the options, its docstrings the help."""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

T = TypeVar("T")


def parse(kind: type[T], args: Sequence[str], *, prog: str) -> T:
    """Return a command's own arguments; a boolean field is a flag, `--json`.

    Args:
        kind: A dataclass; its docstring describes the command.
        args: Arguments without the command's name.
        prog: The command, for usage lines.
    """
    return tyro.cli(kind, args=list(args), prog=prog, use_underscores=True)


def override(default: T, args: Sequence[str], *, prog: str, description: str) -> T:
    """Return settings with some replaced by options that are named as they are in TOML.

    `--section.key value`; true and false are spelled as in TOML. Errors are printed with the
    nearest option, and exit with status 2.

    Args:
        default: A dataclass of settings, possibly nested.
        args: The options.
        prog: The command, for usage lines.
        description: What the command does.
    """
    return tyro.cli(
        type(default),
        default=default,
        args=_python_bools(type(default), args),
        prog=prog,
        description=description,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )


def _python_bools(kind: type, args: Sequence[str]) -> list[str]:
    """Spell the values of boolean options as Python does."""
    flags = set(_flags(kind, ""))
    result: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        if equals and _plain(name) in flags and value in ("true", "false"):
            arg = f"{name}={value.capitalize()}"
        elif result and _plain(result[-1]) in flags and arg in ("true", "false"):
            arg = arg.capitalize()
        result.append(arg)
    return result


def _plain(option: str) -> str:
    return option.replace("-", "_").lstrip("_")


def _flags(kind: Any, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _flags(hints[field.name], f"{prefix}{field.name}.")
        elif hints[field.name] is bool:
            yield prefix + field.name
