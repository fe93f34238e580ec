# SPDX-License-Identifier: Apache-2.0
"""What quantization loses of a weight, and how much of it an update of rank 16 makes up for.

    python benchmarks/init_error.py

Relative error, in the Frobenius norm, of 4-bit base and update together. Weights are drawn.
"""

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import Report

import jax_qlora as jq

SHAPE = (512, 1408)


def weights(kind: str) -> jax.Array:
    """A kernel of normal numbers, or of Student's t with 3 degrees of freedom."""
    rng = np.random.default_rng(3)
    numbers = rng.standard_normal(SHAPE) if kind == "normal" else rng.standard_t(3, SHAPE)
    return jnp.asarray(0.02 * numbers, jnp.float32)


def main(rank: int) -> int:
    """Prints the table; fails if LoftQ does not lose less than quantization alone."""
    report = Report("init_error", jax=jax.__version__, shape=str(SHAPE), rank=rank)
    for kind in ("normal", "heavy-tailed"):
        params: Any = {"w": weights(kind)}
        targets = jq.find_targets(lambda p, x: x @ p["w"], params, jnp.ones((1, SHAPE[0])))
        adapter = jq.init_adapter(jax.random.key(0), targets, rank=rank, alpha=rank)
        started = {"NF4": (jq.quantize(params, targets), adapter)}
        for init in ("loftq", "pissa"):
            started[init] = jq.init_from_weights(params, adapter, init, format="nf4")
        errors = {
            name: float(
                jnp.linalg.norm(jq.merge(base, update)["w"] - params["w"])
                / jnp.linalg.norm(params["w"])
            )
            for name, (base, update) in started.items()
        }
        report.add(weights=kind, **{name: f"{error:.4f}" for name, error in errors.items()})
        report.floor(f"LoftQ over NF4, {kind}", errors["loftq"] / errors["NF4"], 0.97)
    return report.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, default=16)
    sys.exit(main(parser.parse_args().rank))
