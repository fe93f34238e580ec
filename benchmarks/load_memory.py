# SPDX-License-Identifier: Apache-2.0
"""Peak memory of reading a checkpoint into NF4, above the interpreter with jax imported.

    python benchmarks/load_memory.py [--layers 24] [--shards 4] [--keep DIRECTORY]

Writes a random bfloat16 checkpoint (about 0.9 GB), then loads it in a process of its own, as a user
would. Floor: the packed parameters and twice the largest tensor.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import Report, memory_mib

MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description="peak memory of load_model")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--keep", type=Path, help="write the checkpoint here and leave it")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        load(args.worker)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.keep or Path(temporary) / "checkpoint"
        if not directory.exists():
            from jax_qlora.models.presets import LLAMA_2_7B

            shape = dict(d_model=1536, d_ff=4096, n_heads=12, n_kv_heads=4, head_dim=128)
            config = dataclasses.replace(LLAMA_2_7B, n_layers=args.layers, **shape)
            write_checkpoint(directory, config, shards=args.shards)
        command = [sys.executable, __file__, "--worker", str(directory)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    allowed = found["packed_mib"] + 2 * found["largest_tensor_mib"]
    above = found["peak_mib"] - found["jax_imported_mib"]
    report = Report("load_memory", jax=found.pop("jax"))
    report.add(**found, above_mib=above, allowed_mib=allowed)
    report.floor("peak above the interpreter / (packed + 2 x largest tensor)", above / allowed, 1.0)
    return report.finish()


def write_checkpoint(directory: Path, config: Any, *, shards: int) -> None:
    """Writes random weights of a plausible scale; no tensor outlives its writing."""
    import jax.numpy as jnp

    from jax_qlora.interop.hf import tensor_names, tensor_shape
    from jax_qlora.interop.hf_config import config_to_hf
    from jax_qlora.interop.safetensors_write import PlannedTensor, write_directory
    from jax_qlora.models import abstract_params
    from jax_qlora.tree import flatten_paths

    rng, bfloat16 = np.random.default_rng(0), np.dtype(jnp.bfloat16)
    tensors = {}
    for path in flatten_paths(abstract_params(config)):
        shape = tensor_shape(path, config)
        for name in tensor_names(path, config):
            tensors[name] = PlannedTensor(
                dtype=bfloat16,
                shape=shape,
                make=lambda s=shape: (0.02 * rng.standard_normal(s, np.float32)).astype(bfloat16),
            )
    directory.mkdir(parents=True)
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_directory(directory, tensors, max_shard_bytes=size // shards + 1)
    text = json.dumps(config_to_hf(config, dtype="bfloat16"))
    (directory / "config.json").write_text(text)


def load(directory: Path) -> None:
    """In a process of its own: prints what was held when."""
    import jax

    jax_imported, _ = memory_mib()
    start = time.perf_counter()
    import jax_qlora as jq
    from jax_qlora.interop.safetensors import read_directory
    from jax_qlora.tree import nbytes

    model = jq.load_model(directory)
    jax.block_until_ready(model.params)
    seconds = time.perf_counter() - start
    resident, peak = memory_mib()
    tensors = read_directory(directory).values()
    figures = {
        "jax": jax.__version__,
        "checkpoint_mib": sum(t.nbytes for t in tensors) / MIB,
        "largest_tensor_mib": max(t.nbytes for t in tensors) / MIB,
        "packed_mib": nbytes(model.params) / MIB,
        "jax_imported_mib": jax_imported,
        "loaded_mib": resident,
        "peak_mib": peak,
        "seconds": seconds,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    raise SystemExit(main())
