# SPDX-License-Identifier: Apache-2.0
"""What several test files share: golden files, comparisons, and the table of tolerances."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent

needs_host = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="jax 0.10 compiles no copies to host memory on a CPU"
)


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of one golden .npz file, by key."""
    with np.load(GOLDEN / name) as archive:
        return dict(archive)


def assert_trees_close(got: Any, want: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Asserts equal structure and, leaf by leaf, equal shape and close values; names the path."""
    got_leaves, got_def = jax.tree_util.tree_flatten_with_path(got)
    want_leaves, want_def = jax.tree_util.tree_flatten_with_path(want)
    assert got_def == want_def, f"tree structures differ:\n  got  {got_def}\n  want {want_def}"
    for (path, x), (_, y) in zip(got_leaves, want_leaves, strict=True):
        name = jax.tree_util.keystr(path)
        assert np.shape(x) == np.shape(y), f"{name}: shape {np.shape(x)}, expected {np.shape(y)}"
        np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=rtol, atol=atol, err_msg=name
        )


def normal(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> jax.Array:
    """Standard normal numbers, drawn by NumPy: nothing is compiled for them."""
    numbers = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jax.numpy.asarray(numbers.astype(jax.numpy.dtype(dtype)))
