# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: what trains, the optimizer's state and the step, on orbax.

A checkpoint is a directory `step-000100`. It is written under another name and renamed when it is
complete and on disk, so one with that name is whole; older ones are removed only after that. The
frozen base is not in it: a fingerprint of its values is, and a resume against another base or
other settings is refused with the difference.
"""

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .config import nearest
from .errors import InputError
from .tree import flatten_paths, nbytes
from .typing import Array, PyTree

_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED = ".unfinished-"
_MARGIN = 2_000_000  # bytes kept free for the file system's own bookkeeping


def save(
    directory: str | Path,
    step: int,
    state: PyTree,
    *,
    identity: Mapping[str, str],
    keep: int = 2,
) -> Path:
    """Writes `state` as the checkpoint of `step`, then removes all but the newest `keep`.

    Args:
        directory: holds the checkpoints of one run; made when missing.
        step: steps done; a checkpoint of the same step is replaced.
        state: any tree of arrays.
        identity: settings and fingerprints that a resume must share, {name: value}.
        keep: how many checkpoints stay, this one included.

    Returns:
        The checkpoint's directory.

    Raises:
        InputError: the disk is full or not writable; what was saved before is untouched.
    """
    directory = Path(directory).absolute()
    final = directory / f"step-{step:06d}"
    unfinished = directory / f"{_UNFINISHED}{final.name}"
    arrays = flatten_paths(state)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(directory)
        if shutil.disk_usage(directory).free < 1.1 * nbytes(arrays) + _MARGIN:
            raise OSError("No space left on device.")
        _write(unfinished, arrays, {"step": step, "identity": dict(identity)})
        if final.exists():
            final.rename(directory / f"{_UNFINISHED}{final.name}-replaced")
        unfinished.rename(final)
        _sync(directory)
    except (OSError, ValueError) as error:  # orbax raises ValueError when a write fails
        shutil.rmtree(unfinished, ignore_errors=True)
        raise InputError(
            f"Cannot write the checkpoint '{final}' ({nbytes(arrays) / 1e6:.1f} MB): {error} "
            "Make room or choose another --output. Earlier checkpoints are untouched."
        ) from error
    _remove_unfinished(directory)
    for old in saved_steps(directory)[:-keep]:
        shutil.rmtree(directory / f"step-{old:06d}", ignore_errors=True)
    return final


def saved_steps(directory: str | Path) -> list[int]:
    """Returns the steps of the complete checkpoints in `directory`, ascending."""
    found = (_NAME.fullmatch(path.name) for path in _children(Path(directory)))
    return sorted(int(match[1]) for match in found if match)


def check_identity(directory: str | Path, identity: Mapping[str, str]) -> None:
    """Raises unless the newest checkpoint agrees with `identity`; cheap, reads no array.

    Args:
        directory: what `save` was given.
        identity: all or some of what `save` was given.

    Raises:
        InputError: something differs (names what), or the checkpoint is damaged.
    """
    if found := saved_steps(directory):
        path = Path(directory).absolute() / f"step-{found[-1]:06d}"
        saved = _read_meta(path, found)["identity"]
        _compare_identity(path, {name: saved.get(name) for name in identity}, identity)


def restore(
    directory: str | Path, like: PyTree, *, identity: Mapping[str, str]
) -> tuple[int, PyTree] | None:
    """Reads the newest complete checkpoint back, to the same bits.

    Args:
        directory: what `save` was given.
        like: a tree of arrays or shapes with the structure of what was saved; an array comes back
            in the memory, the device's or the host's, where that of `like` is.
        identity: what `save` was given; any difference is refused.

    Returns:
        `(step, state)`, or None when there is no checkpoint.

    Raises:
        InputError: settings, base or arrays differ (names what differs), or the files are damaged.
    """
    found = saved_steps(directory)
    if not found:
        return None
    path = Path(directory).absolute() / f"step-{found[-1]:06d}"
    meta = _read_meta(path, found)
    _compare_identity(path, meta["identity"], identity)
    wanted = flatten_paths(like)
    _check_arrays(path, meta["arrays"], wanted)
    try:
        arrays = _read(path, meta["arrays"], wanted)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, found, error) from error
    return found[-1], jax.tree.unflatten(jax.tree.structure(like), [arrays[n] for n in wanted])


def fingerprint(tree: PyTree) -> str:
    """Returns a hash of the paths, shapes, types and every bit of the arrays of `tree`.

    Each array is reduced to 32 bits where it lives, so gigabytes on an accelerator cost
    milliseconds and no copy. Of one in host memory a slice at a time visits the device.

    Args:
        tree: for example the frozen base.

    >>> fingerprint({"w": jnp.zeros(3)}) == fingerprint({"w": jnp.zeros(3)})
    True
    >>> fingerprint({"w": jnp.zeros(3)}) == fingerprint({"w": -jnp.zeros(3)})
    False
    """
    arrays = flatten_paths(tree)
    sums = {name: _checksum(jnp.asarray(x), _waits_on_host(x)) for name, x in arrays.items()}
    lines = [
        f"{name} {np.shape(x)} {jnp.asarray(x).dtype} {sums[name]}" for name, x in arrays.items()
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _waits_on_host(x: Any) -> bool:
    return isinstance(x, jax.Array) and x.sharding.memory_kind == "pinned_host" and x.ndim > 0


@functools.partial(jax.jit, static_argnums=1)
def _checksum(x: Array, on_host: bool) -> Array:
    """Sums the bits of `x` modulo 2**32, each word with an odd weight of its place.

    Args:
        x: The array.
        on_host: Whether slices of the leading axis are fetched from host memory one by one.
    """
    if not on_host:
        return _sum_of_bits(x, jnp.uint32(0))

    def add(total: Array, item: tuple[Array, Array]) -> tuple[Array, None]:
        index, part = item
        part = jax.device_put(part, jax.memory.Space.Device)
        return total + _sum_of_bits(part, index), None

    indices = jnp.arange(x.shape[0], dtype=jnp.uint32)
    return jax.lax.scan(add, jnp.uint32(0), (indices, x))[0]


def _sum_of_bits(x: Array, place: Array) -> Array:
    """The sum over an array, or over the slice of one whose place in it is `place`."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    place = jnp.full(bits.shape, place, jnp.uint32)
    for axis in range(bits.ndim):
        step = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place * jnp.uint32(0x9E3779B1) + step
    mixed = (bits ^ place * jnp.uint32(0x85EBCA6B)) * (place * jnp.uint32(2) + jnp.uint32(1))
    return jnp.sum(mixed ^ (mixed >> jnp.uint32(15)), dtype=jnp.uint32)


def _write(path: Path, arrays: dict[str, Any], meta: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp  # 25 MB that a run can do without until its first checkpoint

    described = {name: _describe(x) for name, x in arrays.items()}
    items = ocp.args.Composite(
        arrays=ocp.args.StandardSave({_key(name): jnp.asarray(x) for name, x in arrays.items()}),
        meta=ocp.args.JsonSave({**meta, "arrays": described}),
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, items)
    for folder, _, files in os.walk(path):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _read(path: Path, described: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Array]:
    import orbax.checkpoint as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        _key(name): jax.ShapeDtypeStruct(
            tuple(shape), dtype, sharding=getattr(like[name], "sharding", None) or here
        )
        for name, (shape, dtype) in described.items()
    }
    items = ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        found = checkpointer.restore(path, items)["arrays"]
    return {name: found[_key(name)] for name in described}


def _key(name: str) -> str:
    """A name without separators, so that orbax stores one flat table."""
    return name.replace("/", ".")


def _read_meta(path: Path, found: list[int]) -> dict[str, Any]:
    try:
        meta = json.loads((path / "meta" / "metadata").read_text("utf-8"))
        return {"identity": dict(meta["identity"]), "arrays": dict(meta["arrays"])}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, found, error) from error


def _damaged(path: Path, found: list[int], error: Exception) -> InputError:
    return InputError(
        f"The checkpoint '{path}' is damaged: {_first_line(error)} Delete that directory to "
        + (f"resume from step {found[-2]}." if found[1:] else "start again.")
    )


def _compare_identity(path: Path, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    differ = [
        f"{name} was {saved.get(name, 'absent')}, is {now.get(name, 'absent')}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]
    if differ:
        raise InputError(
            f"The checkpoint '{path}' belongs to another run: {'; '.join(differ)}. Restore these "
            "settings to resume it, choose another --output, or delete the directory."
        )


def _check_arrays(path: Path, saved: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    for name, (shape, dtype) in saved.items():
        if name not in like:
            raise InputError(
                f"The checkpoint '{path}' holds '{name}', which this run does not have."
                f"{nearest(name, like)} It was written by another method or optimizer."
            )
        wanted = _describe(like[name])
        if [shape, dtype] != wanted:
            raise InputError(
                f"The checkpoint '{path}': '{name}': expected {wanted[1]}{wanted[0]}, "
                f"found {dtype}{shape}."
            )
    if missing := [name for name in like if name not in saved]:
        raise InputError(
            f"The checkpoint '{path}' lacks '{missing[0]}' ({len(missing)} arrays in all). "
            "It was written by another method or optimizer."
        )


def _describe(x: Any) -> list[Any]:
    """Returns [shape, dtype] of an array or a shape, as jax would hold it."""
    return [list(x.shape), str(jax.dtypes.canonicalize_dtype(x.dtype))]


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if text.endswith(".") else text + "."


def _children(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _remove_unfinished(directory: Path) -> None:
    for path in _children(directory):
        if path.name.startswith(_UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until `path` is on the disk, so that a rename never outruns the contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
