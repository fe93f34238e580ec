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
    "gpt2": {
        "model": "transformer", "embed_tokens": "wte", "embed_positions": "wpe", "layers": "h",
        "input_layernorm": "ln_1", "self_attn": "attn", "qkv_proj": "c_attn", "o_proj": "c_proj",
        "post_attention_layernorm": "ln_2", "up_proj": "c_fc", "down_proj": "c_proj",
        "norm": "ln_f",
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
    name = unnumbered_name(path, config)
    if not path.startswith("layers/"):
        return (name,)
    layers, rest = name.split(".", 2)[:2], name.split(".", 2)[2]
    names = (".".join((*layers, str(i), rest)) for i in range(config.n_layers))
    if not is_expert(path):
        return tuple(names)
    pairs = (name.partition(".experts.") for name in names)
    return tuple(
        f"{layer}.experts.{i}.{module}"
        for layer, _, module in pairs
        for i in range(config.n_experts)
    )


def unnumbered_name(path: str, config: DecoderConfig) -> str:
    """Return a parameter's name in a checkpoint, but for the numbers of layers and experts.

    >>> from jax_qlora.models.presets import GPT_2
    >>> unnumbered_name("layers/self_attn/qkv_proj/kernel", GPT_2)
    'transformer.h.attn.c_attn.weight'
    """
    *module, kind = path.split("/")
    renamed = _RENAMED.get(config.family, {})
    top = [] if path.startswith("lm_head/") else ["model"]
    parts = [*top, *module, "bias" if kind == "bias" else "weight"]
    return ".".join(renamed.get(part, part) for part in parts)


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
    """Return the shape of each of a parameter's tensors in torch's layout: kernels `[out, in]`.

    That is what readers see, and what is stored unless `is_conv1d` says otherwise.

    >>> from jax_qlora.models.presets import TINY
    >>> tensor_shape("layers/mlp/up_proj/kernel", TINY)
    (64, 32)
    """
    shape = parameter_shapes(config)[path]
    shape = shape[n_lead(path) :]
    return shape[::-1] if path.endswith("/kernel") else shape


def is_conv1d(path: str, config: DecoderConfig) -> bool:
    """Return whether checkpoints have a parameter `[in, out]`: linears of GPT-2, `Conv1D` there."""
    return config.family == "gpt2" and is_linear(path)


def is_transposed(path: str, config: DecoderConfig) -> bool:
    """Return whether checkpoints have a parameter `[out, in]` and this library `[in, out]`."""
    return path.endswith("/kernel") and not is_conv1d(path, config)


def stored_shape(path: str, config: DecoderConfig) -> tuple[int, ...]:
    """Return the shape of each of a parameter's tensors as Hugging Face stores them.

    >>> from jax_qlora.models.presets import GPT_2, TINY
    >>> stored_shape("layers/mlp/up_proj/kernel", TINY)
    (64, 32)
    >>> stored_shape("layers/mlp/up_proj/kernel", GPT_2)
    (768, 3072)
    """
    shape = tensor_shape(path, config)
    return shape[::-1] if is_conv1d(path, config) else shape
