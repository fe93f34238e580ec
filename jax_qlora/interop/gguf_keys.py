# SPDX-License-Identifier: Apache-2.0
"""The keys of a GGUF file's architecture, taken one by one, so that none is left unread."""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import InputError

# Keys after the architecture that would change the numbers, and the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
    "rope.scaling.finetuned": (False, True),
}


class GGUFKeys:
    """The keys that have not been understood yet.

    Args:
        metadata: Key to value.
        architecture: What the keys to take start with.
        where: What to call the file in messages.
    """

    def __init__(self, metadata: Mapping[str, Any], architecture: str, where: str):
        self.where = where
        self.prefix = f"{architecture}."
        self.rest = {
            key.removeprefix(self.prefix): value
            for key, value in metadata.items()
            if key.startswith(self.prefix)
        }

    def pop(self, key: str, default: Any) -> Any:
        """Take a value as it is, or the default where there is none."""
        return self.rest.pop(key, default)

    def take(self, key: str, *default: Any) -> Any:
        """Take a value that is the same for all layers; without a default it must be there.

        Raises:
            InputError: It is missing, or a list.
        """
        value = self.rest.pop(key, *default) if default or key in self.rest else None
        if value is None and not default:
            raise InputError(f"{self.where}: the key '{self.prefix}{key}' is missing.")
        if isinstance(value, list):
            raise InputError(
                f"{self.where}: '{self.prefix}{key}' differs between layers ({value[:4]}...), "
                "which is not implemented; expected one number."
            )
        return value

    def whole(self, key: str, *default: Any) -> Any:
        """Take a whole number above 0, or the default.

        Raises:
            InputError: It is something else.
        """
        value = self.take(key, *default)
        if default == (value,) or (type(value) is int and value > 0):
            return value
        raise InputError(
            f"{self.where}: '{self.prefix}{key}' is {value!r}; expected a whole number above 0."
        )

    def real(self, key: str, *default: Any) -> Any:
        """Take a finite number, or the default.

        Raises:
            InputError: It is something else.
        """
        value = self.take(key, *default)
        if default == (value,) or (type(value) in (int, float) and math.isfinite(value)):
            return value
        raise InputError(
            f"{self.where}: '{self.prefix}{key}' is {value!r}; expected a finite number."
        )

    def refuse_rest(self) -> None:
        """Refuse the first key that is left and may change what is computed.

        Raises:
            InputError: There is one.
        """
        for key, value in self.rest.items():
            if value not in _NEUTRAL.get(key, ()):
                raise InputError(
                    f"{self.where}: '{self.prefix}{key}' is {value!r}, which is not implemented "
                    "and may change what the model computes."
                )
