# SPDX-License-Identifier: Apache-2.0
"""`jax-qlora train CONFIG.toml [--section.key value ...]`."""

import shlex
import sys
from collections.abc import Sequence

from .settings import ensure_downloaded, read_settings

_ABOUT = """Fine-tune a model. The options are the keys of the TOML file; the command line wins.
Ctrl-C finishes the step and saves; the same command resumes."""


def run(args: Sequence[str]) -> int:
    """Fine-tune; a rerun of the same command resumes."""
    config = read_settings(args, prog="jax-qlora train", description=_ABOUT)
    ensure_downloaded(config.model, config.data.source)

    from ..train import train
    from .compiled import keep_compiled

    keep_compiled()
    result = train(config)
    if result.interrupted:
        print(f"Resume with: {shlex.join(['jax-qlora', 'train', *args])}", file=sys.stderr)
        return 128 + result.interrupted
    return 0
