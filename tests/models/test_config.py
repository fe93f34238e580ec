# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from jax_qlora.errors import InputError
from jax_qlora.models import RopeScaling
from jax_qlora.models.config import validate_config
from jax_qlora.models.presets import PRESETS, TINY


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_possible(name: str):
    assert validate_config(PRESETS[name]) is PRESETS[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "n_layers is 0; it must be at least 1"),
        ({"n_kv_heads": 3}, r"n_heads \(4\) is not a multiple of n_kv_heads \(3\)"),
        ({"head_dim": 15}, "head_dim is 15; rotary positions need it even"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; it must be positive"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be positive"),
        ({"attention_softcap": -1.0}, "attention_softcap is -1.0"),
        ({"sliding_window": 4, "local_layers": (True,)}, "local_layers has 1 entries"),
        ({"local_layers": (True, False, True)}, "local_layers need a sliding_window"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; it must be positive and finite"),
        ({"rope_scaling": RopeScaling(kind="linear", factor=0.5)}, "factor is 0.5; expected >= 1"),
        (
            {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, high_freq_factor=1.0)},
            r"high_freq_factor \(1.0\) above low_freq_factor \(1.0\)",
        ),
    ],
)
def test_impossible_configurations_are_named(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        validate_config(dataclasses.replace(TINY, **changes))
