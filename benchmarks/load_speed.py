# SPDX-License-Identifier: Apache-2.0
"""How fast a checkpoint becomes NF4, beside a plain read of it and bitsandbytes on the CPU.

    python benchmarks/load_speed.py [--layers 6] [--rounds 3] [--torch-python PYTHON]

Writes random bfloat16 weights of Llama 2 7B's shapes (0.5 GB and 0.4 GB a layer), then takes turns,
each in a process of its own and with the files dropped from the page cache: reading the files,
`load_model`, `quantize_checkpoint` (from disk to disk), and with --torch-python (an interpreter
with torch, safetensors and bitsandbytes) `quantize_4bit` of the same tensors, reading included.
Floors: `load_model` at half the speed of the plain read, or four times that of bitsandbytes,
whichever is faster; peak memory above the interpreter's at most the packed parameters and twice the
largest tensor.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import Report, memory_mib

MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description="speed of load_model and quantize_checkpoint")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch-python", help="an interpreter with torch and bitsandbytes")
    parser.add_argument("--directory", type=Path, help="where to write temporarily")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        what, directory = args.worker
        print(json.dumps(WORKERS[what](Path(directory))))
        return 0
    with tempfile.TemporaryDirectory(dir=args.directory) as temporary:
        directory = Path(temporary) / "checkpoint"
        write(directory, args.layers)
        contenders = {what: sys.executable for what in ("read", "load", "quantize")}
        if args.torch_python:
            contenders["bitsandbytes"] = args.torch_python
        found: dict[str, list[dict[str, Any]]] = {what: [] for what in contenders}
        for _ in range(args.rounds):
            for what, python in contenders.items():
                drop_from_cache(directory)
                command = [python, __file__, "--worker", what, str(directory)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[what].append(json.loads(out.splitlines()[-1]))
    return report(found, args.layers)


def report(found: dict[str, list[dict[str, Any]]], layers: int) -> int:
    result = Report("load_speed", layers=layers, jax=found["load"][0]["jax"])
    mib = found["load"][0]["checkpoint_mib"]
    seconds = {
        what: statistics.median(run["seconds"] for run in runs) for what, runs in found.items()
    }
    speed = {what: mib / value for what, value in seconds.items()}
    for what, runs in found.items():
        result.add(
            what=what,
            checkpoint_mib=mib,
            median_s=seconds[what],
            mib_per_s=speed[what],
            peak_above_mib=max(run["peak_mib"] - run["start_mib"] for run in runs),
        )
    load = found["load"][0]
    wanted = 0.5 * speed["read"]
    if "bitsandbytes" in speed:
        wanted = max(wanted, 4 * speed["bitsandbytes"])
    result.floor("wanted speed / speed of load_model", wanted / speed["load"], 1.0)
    allowed = load["packed_mib"] + 2 * load["largest_tensor_mib"]
    above = max(run["peak_mib"] - run["start_mib"] for run in found["load"])
    result.floor("peak of load_model / (packed + 2 x largest tensor)", above / allowed, 1.0)
    return result.finish()


def write(directory: Path, layers: int) -> None:
    from load_memory import write_checkpoint

    from jax_qlora.models.presets import LLAMA_2_7B

    config = dataclasses.replace(LLAMA_2_7B, n_layers=layers)
    write_checkpoint(directory, config, shards=4)


def drop_from_cache(directory: Path) -> None:
    """Asks the kernel to forget the files, so that they are read from the disk."""
    for file in directory.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(directory: Path) -> dict[str, Any]:
    start_mib, _ = memory_mib()
    buffer = bytearray(16 * MIB)
    start = time.perf_counter()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return {
        "seconds": time.perf_counter() - start,
        "start_mib": start_mib,
        "peak_mib": memory_mib()[1],
    }


def load(directory: Path) -> dict[str, Any]:
    import jax

    import jax_qlora as jq
    from jax_qlora.interop.safetensors import read_directory
    from jax_qlora.tree import nbytes

    tensors = read_directory(directory).values()
    start_mib, _ = memory_mib()
    start = time.perf_counter()
    model = jq.load_model(directory)
    jax.block_until_ready(model.params)
    return {
        "seconds": time.perf_counter() - start,
        "start_mib": start_mib,
        "peak_mib": memory_mib()[1],
        "jax": jax.__version__,
        "checkpoint_mib": sum(t.nbytes for t in tensors) / MIB,
        "largest_tensor_mib": max(t.nbytes for t in tensors) / MIB,
        "packed_mib": nbytes(model.params) / MIB,
    }


def quantize(directory: Path) -> dict[str, Any]:
    from jax_qlora.interop.load_params import Encoding
    from jax_qlora.interop.quantize_checkpoint import quantize_checkpoint

    start_mib, _ = memory_mib()
    start = time.perf_counter()
    encoding = Encoding("nf4", 64, True)
    quantize_checkpoint(directory, directory.parent / "nf4", encoding=encoding, overwrite=True)
    return {
        "seconds": time.perf_counter() - start,
        "start_mib": start_mib,
        "peak_mib": memory_mib()[1],
    }


def bitsandbytes(directory: Path) -> dict[str, Any]:
    from bitsandbytes.functional import quantize_4bit
    from safetensors import safe_open

    start_mib, _ = memory_mib()
    start = time.perf_counter()
    kept = []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                x = tensors.get_tensor(name)
                if name.startswith("model.layers.") and x.ndim == 2:
                    kept.append(quantize_4bit(x, quant_type="nf4", compress_statistics=True))
                else:
                    kept.append(x.clone())
    return {
        "seconds": time.perf_counter() - start,
        "start_mib": start_mib,
        "peak_mib": memory_mib()[1],
    }


WORKERS = {"read": read, "load": load, "quantize": quantize, "bitsandbytes": bitsandbytes}

if __name__ == "__main__":
    raise SystemExit(main())
