# SPDX-License-Identifier: Apache-2.0
import pytest

from jax_qlora.costs.gpus import GIB, GPUS, find_gpu, parse_memory
from jax_qlora.errors import InputError


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "NVIDIA GeForce RTX 4090", "a100-80gb"])
def test_a_card_by_any_spelling(name: str):
    if name.startswith("NVIDIA GeForce"):
        assert find_gpu(name) is GPUS["rtx4090"]
    assert find_gpu(name).name.endswith(("4090", "A100-SXM4-80GB"))


def test_an_unknown_card():
    with pytest.raises(InputError, match="GPU 'rtx9090': expected one of t4, .*--memory 16GiB"):
        find_gpu("rtx9090")


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GiB", 16 * GIB), ("24 GB", 24 * 10**9), ("15000MiB", 15000 << 20), ("1.5 gib", 3 << 29)],
)
def test_memory_as_people_write_it(text: str, size: int):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["lots", "16", "-1GiB", "16 GiB of it", "1 MiB"])
def test_memory_that_is_none(text: str):
    with pytest.raises(InputError, match="expected a size such as 16GiB"):
        parse_memory(text)


@pytest.mark.parametrize("name", GPUS)
def test_every_card_has_less_memory_than_its_name_says_and_no_more_than_a_tenth_less(name: str):
    named = {
        "t4": 16, "rtx3090": 24, "rtx4090": 24, "rtx5090": 32, "l4": 24, "a10": 24, "a6000": 48,
        "l40s": 48, "a100-40": 40, "a100-80": 80, "h100": 80, "h200": 141,
    }  # fmt: skip
    assert 0.9 * named[name] <= GPUS[name].memory / GIB <= named[name]
    assert GPUS[name].half == (name == "t4")
    assert f'device_description_str: "{GPUS[name].name}"' in GPUS[name].describe()
