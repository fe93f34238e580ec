# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of a decoder's tensors in Hugging Face's checkpoints."""

from functools import lru_cache

from ..models import DecoderConfig, abstract_params
from ..tree import flatten_paths


def tensor_names(path: str, config: DecoderConfig) -> tuple[str, ...]:
    """Return the names that a parameter's layers have in a checkpoint, or its one name.

    >>> from jax_qlora.models.presets import TINY
    >>> tensor_names("layers/mlp/up_proj/kernel", TINY)[1]
    'model.layers.1.mlp.up_proj.weight'
    >>> tensor_names("lm_head/kernel", TINY)
    ('lm_head.weight',)
    """
    module, _, kind = path.replace("/", ".").rpartition(".")
    name = f"{module}.{'bias' if kind == 'bias' else 'weight'}"
    if path.startswith("layers/"):
        rest = name.removeprefix("layers.")
        return tuple(f"model.layers.{i}.{rest}" for i in range(config.n_layers))
    return (name if path.startswith("lm_head/") else f"model.{name}",)


@lru_cache(maxsize=8)
def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by path, in tree order.

    >>> from jax_qlora.models.presets import TINY
    >>> parameter_shapes(TINY)["layers/mlp/up_proj/kernel"]
    (3, 32, 64)
    """
    return {path: x.shape for path, x in flatten_paths(abstract_params(config)).items()}


def tensor_shape(path: str, config: DecoderConfig) -> tuple[int, ...]:
    """Return the shape of each of a parameter's tensors in a checkpoint: kernels are `[out, in]`.

    >>> from jax_qlora.models.presets import TINY
    >>> tensor_shape("layers/mlp/up_proj/kernel", TINY)
    (64, 32)
    """
    shape = parameter_shapes(config)[path]
    shape = shape[1:] if path.startswith("layers/") else shape
    return shape[::-1] if path.endswith("/kernel") else shape
