# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept for the next command: jax's persistent cache, on by default.

jax's own variables rule it: `JAX_COMPILATION_CACHE_DIR` is another place, and
`JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
"""

import os
from pathlib import Path
from typing import Any

from ..interop.download import cache_directory

MAX_BYTES = 2 << 30
"""What the cache may take; the programs used least recently go first."""


def keep_compiled() -> Path | None:
    """Let jax keep what takes it more than a second to compile; call it before the first program.

    The key of a program has in it the program, the options, the versions of jax and the compiler,
    and the device: of a CPU, all its features, so what another machine compiled is never run. On a
    CPU it needs jax 0.12: older ones print an error for each program that they load, about two
    tuning hints that they take for missing features of the machine.

    Returns:
        Where they are kept; None where they are not, or where the environment decides.
    """
    import jax

    now: Any = jax.config
    if now.jax_compilation_cache_dir or not now.jax_enable_compilation_cache:
        return None
    if jax.__version_info__ < (0, 12) and jax.default_backend() == "cpu":
        return None
    directory = cache_directory() / "compiled"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(directory, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    return directory
