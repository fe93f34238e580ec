# SPDX-License-Identifier: Apache-2.0
"""The two files of an adapter's directory, read whole and replaced whole."""

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from .output import move_into_place
from .peft_config import CONFIG_NAME
from .safetensors import read_header
from .safetensors_write import PlannedTensor, write_file

WEIGHTS_NAME = "adapter_model.safetensors"


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """All tensors of an adapter's weights file, as float32.

    Args:
        file: The safetensors file.

    Raises:
        InputError: it is missing, damaged, or holds something that is not floating point.
    """
    if not file.is_file():
        others = sorted(p.name for p in file.parent.iterdir() if p.suffix in (".bin", ".pt"))
        hint = f"found {', '.join(others)}, pickles that are not read: " if others else ""
        raise InputError(
            f"{file} is missing: {hint}save the adapter with PEFT's save_pretrained, which writes "
            "safetensors."
        )
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in read_header(file).items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise InputError(f"{file}: '{name}' is {tensor.dtype}, expected floating point.")
        tensors[name] = np.asarray(tensor.read(), np.float32)
    return tensors


def write_adapter(
    path: Path, tensors: Mapping[str, np.ndarray], config: str, tokenizer: Any = None
) -> None:
    """Writes both files aside, reads them back, and swaps the directory in.

    Args:
        path: The adapter's directory. If it exists, its other files are kept.
        tensors: The weights, by name.
        config: The text of adapter_config.json.
        tokenizer: A `transformers` tokenizer to write too, or None.

    Raises:
        InputError: it cannot be written; what was there is as it was.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: expected a directory to save the adapter in.")
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    planned = {
        name: PlannedTensor(dtype=x.dtype, shape=x.shape, make=lambda x=x: x)
        for name, x in tensors.items()
    }
    try:
        aside.mkdir(parents=True)
        write_file(aside / WEIGHTS_NAME, planned, metadata={"format": "pt"})
        (aside / CONFIG_NAME).write_text(config, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        back = read_tensors(aside / WEIGHTS_NAME)
        if back.keys() != tensors.keys() or any(
            not np.array_equal(back[name], x) for name, x in tensors.items()
        ):
            raise OSError("what was read back differs from what was written")
        _keep_others(path, aside)
        move_into_place(aside, path)
    except OSError as e:
        raise InputError(
            f"the adapter cannot be written to {path}: {e}. Anything that was there is as it was; "
            "choose another directory."
        ) from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _keep_others(path: Path, new: Path) -> None:
    """Copies the other files of an adapter's directory, so that nothing can fail once it moves."""
    for entry in path.iterdir() if path.exists() else ():
        if (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)
