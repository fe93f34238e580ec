# SPDX-License-Identifier: Apache-2.0
"""Test session settings: CPU with two devices, and nothing promoted behind one's back."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the network
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # nor the user's cache
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Fixed examples by default: a failure that CI sees is a failure that everyone sees.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of the `key` fixture")


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """A random key, the same in every run unless --seed says otherwise."""
    return jax.random.key(int(str(request.config.getoption("--seed"))))
