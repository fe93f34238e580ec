# SPDX-License-Identifier: Apache-2.0
"""Where models are written: complete or not at all, and never over what is there unasked."""

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError

_MARKS = ("config.json", "adapter_config.json")  # what a directory that may be replaced holds


@contextlib.contextmanager
def new_directory(directory: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a directory to write in; it is moved to `directory` if the block ends well.

    Args:
        directory: Where to. Unless `overwrite`, it must not exist, or be empty.
        overwrite: Replace a model's directory that is there, with all that is in it, once the new
            one is complete.

    Yields:
        An empty directory beside it.

    Raises:
        InputError: It is in use, or cannot be written (the disk is full, no permission); what was
            there is as it was.
    """
    directory = Path(directory).resolve()
    check_directory(directory, overwrite=overwrite)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise InputError(f"'{directory}' cannot be made: {error.strerror}.") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        move_into_place(temporary, directory)
    except OSError as error:
        raise _cannot_write(directory, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(file: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a path to write at; what is there becomes `file` if the block ends well.

    Args:
        file: Where to. Unless `overwrite`, it must not exist.
        overwrite: Replace a file that is there once the new one is complete.

    Yields:
        A path beside it.

    Raises:
        InputError: As `new_directory`.
    """
    file = Path(file).resolve()
    check_file(file, overwrite=overwrite)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        raise _cannot_write(file, error) from error
    finally:
        partial.unlink(missing_ok=True)


def check_file(file: str | Path, *, overwrite: bool = False) -> None:
    """Check that `new_file` may write a file: to be asked before long work.

    Args:
        file: The file.
        overwrite: Whether one that is there may be replaced.

    Raises:
        InputError: It may not.
    """
    file = Path(file)
    if file.exists():
        _refuse(file, overwrite and file.is_file())


def check_directory(directory: str | Path, *, overwrite: bool = False) -> None:
    """Check that `new_directory` may write to a place: to be asked before long work.

    Args:
        directory: The place.
        overwrite: Whether a model's directory may be replaced.

    Raises:
        InputError: It may not.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"'{directory}' is a file: expected a directory. Choose another name.")
    if directory.exists() and any(directory.iterdir()):
        _refuse(directory, overwrite)
        if not any((directory / name).is_file() for name in _MARKS):
            raise InputError(
                f"'{directory}' is not overwritten: expected a model's directory, found no "
                f"{' or '.join(_MARKS)} in it. Choose another, or remove it first."
            )


def _refuse(path: Path, overwrite: bool) -> None:
    if not overwrite:
        raise InputError(
            f"'{path}' is in use: expected a new or an empty place, so that nothing is "
            "overwritten. Choose another, or say --overwrite (overwrite=True)."
        )


def _cannot_write(path: Path, error: OSError) -> InputError:
    full = " The disk is full." if error.errno == errno.ENOSPC else ""
    return InputError(f"'{path}' cannot be written: {error.strerror or error}.{full}")


def move_into_place(new: Path, directory: Path) -> None:
    """Put a complete directory in its place; what is there stays until then.

    Args:
        new: The directory, beside its place.
        directory: Its place.

    Raises:
        OSError: It cannot be moved; what was there is in its place again.
    """
    if not directory.exists() or not any(directory.iterdir()):
        os.replace(new, directory)
        return
    old = directory.with_name(f".{directory.name}.old.{uuid.uuid4().hex}")
    os.rename(directory, old)
    try:
        os.rename(new, directory)
    except OSError:
        os.rename(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
