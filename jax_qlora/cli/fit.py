# SPDX-License-Identifier: Apache-2.0
"""`jax-qlora fit --model llama-2-7b --gpu rtx4090`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .settings import ensure_downloaded, read_settings

_ABOUT = """Plan the memory of a training run on a GPU that need not be there. Compiles the
trainer's own step for it with XLA's compiler and prints what the card would hold, whether that
fits, and what would change it. Reads no weights. Besides the options of this command (--gpu NAME,
--memory SIZE, --seq TOKENS, --quick: do not compile, --json, --picture FILE.png) it takes those of
`jax-qlora train`; without a TOML file a row of 512 tokens is planned, layers recomputed."""

_OWN = {"gpu": "rtx4090", "memory": None, "seq": None, "picture": None}
_FLAGS: tuple[str, ...] = ("quick", "json")


def run(args: Sequence[str]) -> int:
    """Plan and print.

    Raises:
        InputError: Unknown model, GPU or setting, or a value out of range.
    """
    from ..planner.plan import DEFAULTS, fit
    from ..report import write_text

    own, flags, rest = _split(args)
    config = read_settings(rest, prog="jax-qlora fit", description=_ABOUT, default=DEFAULTS)
    ensure_downloaded(config.model)
    seq = own["seq"]
    if seq is not None and not (seq.isdigit() and int(seq) > 1):
        raise InputError(f"--seq: expected a number of tokens, at least 2, found '{seq}'.")
    if not flags["json"] and not flags["quick"] and sys.stderr.isatty():
        print("Compiling the step (10 to 40 seconds; minutes for a TPU) ...", file=sys.stderr)
    report = fit(
        config.model,
        gpu=own["gpu"] or "rtx4090",
        memory=own["memory"],
        seq=int(seq) if seq else None,
        config=config,
        prove=not flags["quick"],
    )
    if own["picture"]:
        write_text(Path(own["picture"]), report.picture())
    print(json.dumps(report.to_json()) if flags["json"] else report)
    return 0


def _split(args: Sequence[str]) -> tuple[dict[str, str | None], dict[str, bool], list[str]]:
    """This command's own options, its flags, and what is left.

    Raises:
        InputError: an option without its value.
    """
    own: dict[str, str | None] = dict(_OWN)
    flags: dict[str, bool] = dict.fromkeys(_FLAGS, False)
    rest: list[str] = []
    items = iter(args)
    for arg in items:
        name, equals, value = arg.removeprefix("--").partition("=")
        if arg.startswith("--") and name in own:
            own[name] = value if equals else next(items, None)
            if own[name] is None:
                raise InputError(f"--{name}: expected a value after it, found none.")
        elif arg.startswith("--") and name in flags:
            flags[name] = True
        else:
            rest.append(arg)
    return own, flags, rest
