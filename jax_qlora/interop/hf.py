# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of a decoder's tensors in Hugging Face's checkpoints."""

import itertools
from functools import lru_cache

from ..errors import InputError
from ..models import PREFIX, PROMPT, DecoderConfig, abstract_params
from ..tree import flatten_paths

# What a module is called there, where that is not its name here.
_RENAMED = {
    "mixtral": {
        "mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2",
    },
}  # fmt: skip


def tensor_names(path: str, config: DecoderConfig) -> tuple[str, ...]:
    """Return the names that a parameter's layers have in a checkpoint, or its one name.

    Those of experts come layer by layer, and in a layer expert by expert.

    >>> from jax_qlora.models.presets import TINY
    >>> tensor_names("layers/mlp/up_proj/kernel", TINY)[1]
    'model.layers.1.mlp.up_proj.weight'
    >>> tensor_names("lm_head/kernel", TINY)
    ('lm_head.weight',)

    Raises:
        InputError: it is no weight.
    """
    if path == PROMPT or path.startswith(PREFIX):
        raise InputError(
            f"'{path}': virtual tokens have no place among the weights of a model: expected "
            "parameters without them. Save them with save_adapter, beside the model."
        )
    module, _, kind = path.replace("/", ".").rpartition(".")
    name = f"{module}.{'bias' if kind == 'bias' else 'weight'}"
    renamed = _RENAMED.get(config.family, {})
    name = ".".join(renamed.get(part, part) for part in name.split("."))
    if not path.startswith("layers/"):
        return (name if path.startswith("lm_head/") else f"model.{name}",)
    rest = name.removeprefix("layers.")
    names = (f"model.layers.{i}.{rest}" for i in range(config.n_layers))
    if not is_expert(path):
        return tuple(names)
    pairs = (name.partition(".experts.") for name in names)
    return tuple(
        f"{layer}.experts.{i}.{module}"
        for layer, _, module in pairs
        for i in range(config.n_experts)
    )


def tensor_indices(path: str, config: DecoderConfig) -> tuple[tuple[int, ...], ...]:
    """Return where in the parameter the tensors of `tensor_names` are: layer, and expert.

    >>> from jax_qlora.models.presets import TINY
    >>> tensor_indices("layers/mlp/up_proj/kernel", TINY)
    ((0,), (1,), (2,))
    >>> tensor_indices("lm_head/kernel", TINY)
    ((),)
    """
    return tuple(itertools.product(*map(range, parameter_shapes(config)[path][: n_lead(path)])))


def n_lead(path: str) -> int:
    """Return how many axes in front of a parameter count layers and experts."""
    return path.startswith("layers/") + is_expert(path)


def is_expert(path: str) -> bool:
    """Return whether a parameter is one of experts: stacked by layer and expert."""
    return "/experts/" in path


def is_linear(path: str) -> bool:
    """Return whether a parameter is what is quantized: a linear of a layer, no router."""
    return (
        path.startswith("layers/")
        and path.endswith("/kernel")
        and not path.endswith("/gate/kernel")
    )


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
    shape = shape[n_lead(path) :]
    return shape[::-1] if path.endswith("/kernel") else shape
