# SPDX-License-Identifier: Apache-2.0
"""load_model: a checkpoint on disk, quantized on the way, as a Model.

Tensors are read one at a time, quantized, and written into stacks that are allocated once, so the
dense model never exists whole: beyond the packed parameters there is room for one tensor and its
encoding.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..errors import InputError
from ..lift import lift
from ..models import DecoderConfig, Model, abstract_params, decoder_functions
from ..quant import QuantizedArray, quantize_rows
from ..quant.array import dequantize_rows
from ..tree import flatten_paths, map_with_path
from ..typing import Array, PyTree
from .bnb import bnb_parts, check_quantization, read_bnb
from .hf import tensor_names, tensor_shape
from .hf_config import read_config
from .safetensors import read_directory


class Tensor(Protocol):
    """A tensor on disk, in whatever format."""

    @property
    def name(self) -> str:
        """Its name there."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, `[out, in]` for a linear."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Its dtype once read."""
        ...

    def read(self) -> np.ndarray:
        """Read it."""
        ...


def load_model(
    path: str | Path,
    *,
    quantization: str | None = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: DTypeLike | None = None,
    dtype: DTypeLike | None = None,
    remat: str = "none",
) -> Model:
    """Load a decoder, its linears in 4 bits.

    Args:
        path: A Hugging Face directory (safetensors), a .gguf file, a name that `jax-qlora download`
            knows, or a Hub id.
        quantization: "nf4", "fp4" or "int4" for the linears of the layers; the embedding, the head,
            norms and biases stay as they are. None loads everything dense. Weights that
            bitsandbytes has quantized keep their own format and codes (None makes them dense).
        block_size: Elements that share a constant: 32, 64, 128 or 256.
        double_quant: Also quantize the constants.
        compute_dtype: Operands of the matmuls. By default float32 on a CPU, bfloat16 on
            accelerators that have it and float16 on those that do not.
        dtype: Storage of what is not quantized, norms aside. By default the checkpoint's; that of a
            GGUF file is bfloat16, and float32 without quantization.
        remat: What the backward recomputes: "none", "dots" (all but the linears' outputs) or
            "full".

    Returns:
        The model; `model.params` is the frozen base, and its methods take that tree, also with
        adapters attached. They are jitted and lifted.

    Raises:
        InputError: There is no such model; its files are damaged or contradict each other; its
            architecture or a setting is not implemented; a weight is not finite.
    """
    from .download import resolve

    path = resolve(path)
    if path.suffix == ".gguf":
        from .gguf import read_gguf

        config, tensors = read_gguf(path)
        dtype = dtype or (jnp.float32 if quantization is None else jnp.bfloat16)
    else:
        config, raw = read_config(path)
        check_quantization(raw, where=f"'{path / 'config.json'}'")
        tensors = read_directory(path)
    compute = jnp.dtype(default_compute_dtype() if compute_dtype is None else compute_dtype)
    functions = decoder_functions(config, compute_dtype=compute, remat=remat)
    encode = None
    if quantization is not None:
        encode = {"format": quantization, "block_size": block_size, "double_quant": double_quant}
    params = load_params(tensors, config, where=f"'{path}'", encode=encode, dtype=dtype)
    return Model(
        config=config,
        params=params,
        functions=functions.map(lambda f: jax.jit(lift(f))),
        compute_dtype=compute,
        tokenizer=_tokenizer(path),
    )


def default_compute_dtype() -> Any:
    """Return the dtype for matmuls on the default device: one that it multiplies natively."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return jnp.float32
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability and float(capability) < 8.0:
        return jnp.float16  # e.g. T4: XLA would widen bfloat16 to float32
    return jnp.bfloat16


def load_params(
    tensors: Mapping[str, Any],
    config: DecoderConfig,
    *,
    where: str,
    encode: Mapping[str, Any] | None,
    dtype: DTypeLike | None = None,
) -> PyTree:
    """Read the parameters of a decoder, tensor by tensor.

    Args:
        tensors: What the checkpoint holds, by Hugging Face's names.
        config: The model's shape.
        where: What to call the checkpoint in messages.
        encode: Arguments of `quantize_rows` for the linears of the layers; None leaves them dense.
        dtype: Storage of what is not quantized, norms aside; by default each tensor's own.

    Returns:
        A nested dict of arrays and QuantizedArrays.

    Raises:
        InputError: Tensors are missing, unknown, of the wrong shape or dtype, or not finite.
    """
    tensors = _check_names(tensors, config, where)
    _check_shapes(tensors, config, where)
    specs = flatten_paths(abstract_params(config))
    loaded: dict[str, Any] = {}
    # the largest first: what is read last is held beside everything else
    for path in sorted(specs, key=lambda p: -int(np.prod(tensor_shape(p, config)))):
        loaded[path] = _load(path, tensors, config, where, encode, dtype)
    return map_with_path(lambda p, _: loaded[p], abstract_params(config))


def _load(
    path: str,
    tensors: Mapping[str, Any],
    config: DecoderConfig,
    where: str,
    encode: Mapping[str, Any] | None,
    dtype: DTypeLike | None,
) -> Any:
    """One parameter: all its layers, stacked."""
    names, shape = tensor_names(path, config), tensor_shape(path, config)
    stacked, kernel = path.startswith("layers/"), path.endswith("/kernel")
    norm = path.endswith("/scale")
    stack: Any = None
    for i, name in enumerate(names):
        own = None if norm else dtype
        if bnb_parts(tensors, name):
            q = read_bnb(tensors, name, shape, dtype=own or tensors_dtype(tensors))
            part = q if encode is not None else _dense_bnb(q, own)
        else:
            host = tensors[name].read()
            own = jnp.dtype(own or host.dtype)
            if kernel and stacked and encode is not None:
                part, finite = _encode(host, own.name, tuple(encode.items()))
            else:
                part, finite = _convert(host, own.name, kernel)
            del host
            if not finite:  # waits for the device, so that one tensor is in flight at a time
                raise InputError(
                    f"{where}: tensor '{tensors[name].name}' has values that are not finite (NaN "
                    "or infinity). The checkpoint is damaged, or its training diverged."
                )
        if not stacked:
            return part
        if stack is None:
            stack = jax.tree.map(lambda x: jnp.zeros((len(names), *x.shape), x.dtype), part)
        if jax.tree.structure(stack) != jax.tree.structure(part):
            raise InputError(
                f"{where}: tensor '{name}' is {part!r}, unlike '{names[0]}': expected all layers "
                "to be quantized alike. Load with quantization=None to make all of them dense."
            )
        stack = _place(stack, jnp.int32(i), part)
    return stack


@partial(jax.jit, static_argnums=(1, 2))
def _encode(
    rows: Array, dtype: str, encode: tuple[tuple[str, Any], ...]
) -> tuple[QuantizedArray, Array]:
    part = quantize_rows(rows, dtype=jnp.dtype(dtype), **dict(encode))
    return part, jnp.all(jnp.isfinite(rows))


@partial(jax.jit, static_argnums=(1, 2))
def _convert(tensor: Array, dtype: str, transpose: bool) -> tuple[Array, Array]:
    part = (tensor.T if transpose else tensor).astype(dtype)
    return part, jnp.all(jnp.isfinite(part))


@partial(jax.jit, donate_argnums=0)
def _place(stack: Any, index: Array, part: Any) -> Any:
    """Write one layer into the stack, in place."""
    return jax.tree.map(
        lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, index, 0), stack, part
    )


def _dense_bnb(q: QuantizedArray, dtype: DTypeLike | None) -> Array:
    return dequantize_rows(q, dtype or q.dtype).T


def tensors_dtype(tensors: Mapping[str, Any]) -> np.dtype:
    """Return the dtype of a checkpoint's embedding: that of its unquantized tensors."""
    return tensors["model.embed_tokens.weight"].dtype


def _check_names(
    tensors: Mapping[str, Any], config: DecoderConfig, where: str
) -> Mapping[str, Any]:
    """Every tensor has a use and every parameter a tensor, or none is read."""
    used, missing = set(), []
    for path in flatten_paths(abstract_params(config)):
        for name in tensor_names(path, config):
            used.update(bnb_parts(tensors, name) or (name,))
            missing += [] if name in tensors else [name]
    # a buffer that old versions of transformers saved: it follows from the configuration
    unused = [n for n in tensors if n not in used and not n.endswith("rotary_emb.inv_freq")]
    if config.tied and "lm_head.weight" in unused:
        _check_tied(tensors, where)
        unused.remove("lm_head.weight")
    if missing or unused:
        lists = [
            f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for what, names in (("missing", missing), ("without a use", unused))
            if names
        ]
        raise InputError(
            f"{where} does not hold the tensors of its configuration: {'; '.join(lists)}. Expected "
            f"those of a {config.family} model with {config.n_layers} layers; download it again, "
            "or check config.json."
        )
    return tensors


def _check_tied(tensors: Mapping[str, Any], where: str) -> None:
    head, table = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    if head.shape != table.shape or not np.array_equal(head.read(), table.read()):
        raise InputError(
            f"{where}: config.json says tie_word_embeddings, but 'lm_head.weight' differs from "
            "'model.embed_tokens.weight'. Set tie_word_embeddings to false in config.json if the "
            "head is its own."
        )


def _check_shapes(tensors: Mapping[str, Any], config: DecoderConfig, where: str) -> None:
    for path in flatten_paths(abstract_params(config)):
        shape = tensor_shape(path, config)
        for name in tensor_names(path, config):
            tensor = tensors[name]
            if bnb_parts(tensors, name):
                continue  # its quantization state tells
            if tuple(tensor.shape) != shape:
                raise InputError(
                    f"{where}: tensor '{tensor.name}' has shape {list(tensor.shape)}, expected "
                    f"{list(shape)} from the configuration. They belong to different models."
                )
            if tensor.dtype.name not in ("float32", "bfloat16", "float16"):
                raise InputError(
                    f"{where}: tensor '{tensor.name}' has dtype {tensor.dtype.name}, expected "
                    "float32, bfloat16 or float16. Use the unquantized checkpoint."
                )


def _tokenizer(path: Path) -> Any:
    """The tokenizer beside the weights, or None where there is none."""
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        return None
    from .tokenizer import load_tokenizer

    return load_tokenizer(path)
