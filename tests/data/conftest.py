# SPDX-License-Identifier: Apache-2.0
import pytest

from jax_qlora.interop.tokenizer import load_tokenizer
from tests.helpers import GOLDEN


@pytest.fixture
def tokenizer():
    """The golden tokenizer, fresh: a test may set another chat template."""
    return load_tokenizer(GOLDEN / "models/llama")
