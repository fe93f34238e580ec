# SPDX-License-Identifier: Apache-2.0
"""Parameters from a checkpoint, a few rows of a tensor at a time, in 4 bits on the way.

Rows are read, encoded, and written into stacks that are allocated once, so neither the dense model
nor a whole dense tensor ever exists: what is held beyond the parameters is two chunks, one in use
and the next (of GPT-2, whose kernels lie the other way, one matrix).
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..errors import InputError
from ..models import DecoderConfig, abstract_params
from ..quant import QuantizedArray, quantize_rows, stream
from ..quant.array import dequantize_rows
from ..quant.blockwise import quantize_absmax
from ..quant.streaming import streaming_memory
from ..tree import map_with_path
from ..typing import Array, PyTree
from .bnb import bnb_parts, read_bnb
from .hf import is_linear, n_lead, parameter_shapes, tensor_names, tensor_shape
from .safetensors import aligned_bytes

_CHUNK = 1 << 19  # elements read and encoded at a time: their temporaries stay small


@runtime_checkable
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

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read it, or some rows of it."""
        ...


EMBEDDINGS = ("embed_tokens/embedding", "lm_head/kernel")
"""Paths of the tables with one row, or column, for each token of the vocabulary."""


def is_quantized(path: str, *, embeddings: bool) -> bool:
    """Return whether a loaded model has a parameter in 4 bits.

    Args:
        path: Of the parameter.
        embeddings: Whether the embedding and the output head are quantized as well.
    """
    return is_linear(path) or (embeddings and path in EMBEDDINGS)


class Encoding(NamedTuple):
    """How the linears of the layers are quantized; as in `quantize_rows`."""

    format: str
    block_size: int
    double_quant: bool
    embeddings: bool = False
    """Whether the embedding and the output head are quantized as well."""


def load_params(
    tensors: Mapping[str, Any],
    config: DecoderConfig,
    *,
    where: str,
    encoding: Encoding | None,
    dtype: DTypeLike | None = None,
    streamed: bool = False,
    split: Mapping[str, Callable[[Array], Any]] | None = None,
) -> PyTree:
    """Read the parameters of a decoder.

    Args:
        tensors: What the checkpoint holds, by Hugging Face's names.
        config: The model's shape.
        where: What to call the checkpoint in messages.
        encoding: How to quantize the linears of the layers; None leaves them dense.
        dtype: Storage of what is not quantized, norms aside; by default each tensor's own.
        streamed: Keep the quantized kernels in host memory; see `quant.stream`.
        split: For some paths, what makes the parameter of the dense one, all its layers stacked.

    Returns:
        A nested dict of arrays and QuantizedArrays.

    Raises:
        InputError: Tensors are missing, unknown, of the wrong shape or dtype, or not finite.
    """
    check_tensors(tensors, config, where=where)
    host = streaming_memory() if streamed else None
    source = _Source(tensors, config, where, encoding, dtype, host, split or {})
    return map_with_path(lambda path, _: source.load(path), abstract_params(config))


def check_tensors(tensors: Mapping[str, Any], config: DecoderConfig, *, where: str) -> None:
    """Check that a checkpoint holds what its configuration says, before anything is read.

    Args:
        tensors: What the checkpoint holds, by Hugging Face's names.
        config: The model's shape.
        where: What to call the checkpoint in messages.

    Raises:
        InputError: Tensors are missing, unknown, of the wrong shape or dtype.
    """
    _check_names(tensors, config, where)
    _check_shapes(tensors, config, where)


def stored_dtype(
    tensors: Mapping[str, Any], config: DecoderConfig, dtype: DTypeLike | None, path: str
) -> np.dtype:
    """Return what `load_params` holds a parameter in; a quantized one, the dtype of its values.

    Args:
        tensors: As for `load_params`.
        config: Likewise.
        dtype: Likewise.
        path: Of the parameter.
    """
    name = tensor_names(path, config)[0]
    in_4_bits = bnb_parts(tensors, name) is not None
    own = tensors[tensor_names(EMBEDDINGS[0], config)[0] if in_4_bits else name].dtype
    return np.dtype(jnp.dtype(own if path.endswith("/scale") or dtype is None else dtype))


class _Source(NamedTuple):
    """What a parameter is read from, and how it is to be stored."""

    tensors: Mapping[str, Any]
    config: DecoderConfig
    where: str
    encoding: Encoding | None
    dtype: DTypeLike | None
    host: Any = None
    """Where quantized kernels stay, if not on the device."""
    split: Mapping[str, Callable[[Array], Any]] = {}
    """What makes the parameter at a path of the dense one."""

    def load(self, path: str) -> Any:
        """One parameter, all its layers stacked."""
        names = tensor_names(path, self.config)
        if path in self.split:
            leaf = self.split[path](self.dense(path, names))
            return stream(leaf) if self.host is not None else leaf
        pre = [self.is_bnb(name) for name in names]
        if any(pre) and not all(pre) and self.encoding is not None:
            raise InputError(
                f"{self.where}: '{names[pre.index(True)]}' is in 4 bits and "
                f"'{names[pre.index(False)]}' is not: expected all layers to be stored alike. "
                "Load with quantization=None, which makes all of them dense."
            )
        if self.encoding is not None and all(pre):
            stacked, lead = self.read_bnb(path, names), self.lead(path)
            if len(lead) == 1:
                return stacked
            return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), stacked)
        if self.encoding is not None and is_linear(path):
            return self.encode(path, names, self.encoding, self.host)
        if self.encoding is not None and self.encoding.embeddings and path in EMBEDDINGS:
            return self.encode(path, names, self.encoding, None)
        return self.dense(path, names)

    def lead(self, path: str) -> tuple[int, ...]:
        """Sizes of a parameter's layer and expert axes."""
        return parameter_shapes(self.config)[path][: n_lead(path)]

    def is_bnb(self, name: str) -> bool:
        return bnb_parts(self.tensors, name) is not None

    def read_bnb(self, path: str, names: tuple[str, ...]) -> QuantizedArray:
        """Weights that are in 4 bits already, stacked."""
        dtype = stored_dtype(self.tensors, self.config, self.dtype, path)
        shape = tensor_shape(path, self.config)
        return read_bnb(self.tensors, names, shape, dtype=dtype, host=self.host)

    def dense(self, path: str, names: tuple[str, ...]) -> Array:
        """The tensors as they are, kernels transposed, in the storage dtype."""
        dtype = stored_dtype(self.tensors, self.config, self.dtype, path)
        shape = parameter_shapes(self.config)[path]
        out = _aligned(shape, dtype)
        stack = out.reshape(len(names), *shape[n_lead(path) :])
        for name, layer in zip(names, stack, strict=True):
            rows = layer.T if path.endswith("/kernel") else layer
            if self.is_bnb(name):
                packed = _first(self.read_bnb(path, (name,)))
                rows[:] = np.asarray(dequantize_rows(packed, jnp.dtype(dtype)))
                continue
            for start, chunk in _chunks(self.tensors[name]):
                values = chunk.astype(dtype, copy=False)
                if not np.all(np.isfinite(values)):
                    raise self.not_finite(name)
                rows[start : start + len(chunk)] = values
        return jax.device_put(out)

    def encode(
        self, path: str, names: tuple[str, ...], encoding: Encoding, host: Any
    ) -> QuantizedArray:
        """The tensors in 4 bits, stacked, in host memory or, without it, on the device."""
        format, block_size, double_quant, _ = encoding
        (rows, cols), n, lead = tensor_shape(path, self.config), len(names), self.lead(path)
        blocks = -(-cols // block_size)
        codes = _aligned((n, rows, blocks * block_size // 2), np.uint8)
        constants = _aligned((n, rows, blocks), np.uint8 if double_quant else np.float32)
        scales, offsets = [], []
        for layer, name in enumerate(names):
            absmax = np.empty((rows, blocks), np.float32)
            for start, chunk in _chunks(self.tensors[name]):
                part, finite = _encode(chunk, format, block_size)
                if not finite:
                    raise self.not_finite(name)
                place = slice(start, start + len(chunk))
                codes[layer, place], absmax[place] = np.asarray(part.codes), np.asarray(part.absmax)
            if double_quant:
                codes8, scale, offset = _encode_absmax(absmax.reshape(-1))
                constants[layer] = np.asarray(codes8).reshape(rows, blocks)
                scales.append(scale)
                offsets.append(offset)
            else:
                constants[layer] = absmax
        kernel = path.endswith("/kernel")
        second = [None, None]
        if double_quant:
            stacks = (jnp.stack(scales), jnp.stack(offsets))
            second = [x.reshape(*lead, *x.shape[1:]) for x in stacks]
        scale, offset = jax.device_put(second, host)
        return QuantizedArray.from_parts(
            codes=jax.device_put(codes.reshape(*lead, *codes.shape[1:]), host),
            absmax=jax.device_put(constants.reshape(*lead, *constants.shape[1:]), host),
            absmax_scale=scale,
            absmax_offset=offset,
            kernel_shape=(cols, rows) if kernel else (rows, cols),
            in_axes=(-2,) if kernel else (-1,),
            format=format,
            block_size=block_size,
            dtype=jnp.dtype(stored_dtype(self.tensors, self.config, self.dtype, path)),
            streamed=host is not None,
        )

    def not_finite(self, name: str) -> InputError:
        return InputError(
            f"{self.where}: tensor '{self.tensors[name].name}' has values that are not finite (NaN "
            "or infinity). The checkpoint is damaged, or its training diverged."
        )


def _chunks(tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """Cut a tensor into runs of rows, each with the number of its first.

    All are of one size, so that one compilation encodes them; the last may overlap the one before.
    While one is used, the next is read.
    """
    rows = tensor.shape[0]
    step = min(rows, max(1, _CHUNK // int(np.prod(tensor.shape[1:]))))
    starts = [*range(0, rows - step, step), rows - step]
    if len(starts) == 1:  # nothing to read ahead
        yield 0, tensor.read()
        return
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(tensor.read, 0, step)
        for start, following in zip(starts, [*starts[1:], None], strict=True):
            chunk = ahead.result()
            if following is not None:
                ahead = reader.submit(tensor.read, following, following + step)
            yield start, chunk


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Allocate memory that becomes a jax array on a CPU without being copied."""
    dtype = np.dtype(dtype)
    return aligned_bytes(int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)


@partial(jax.jit, static_argnums=(1, 2))
def _encode(rows: Array, format: str, block_size: int) -> tuple[QuantizedArray, Array]:
    part = quantize_rows(rows, format=format, block_size=block_size, double_quant=False)
    # not told by absmax: on a CPU, XLA's maximum may drop a NaN
    return part, jnp.all(jnp.isfinite(rows))


_encode_absmax = jax.jit(quantize_absmax)


def _first(stacked: QuantizedArray) -> QuantizedArray:
    return jax.tree.map(lambda x: x[0], stacked)


def _check_names(tensors: Mapping[str, Any], config: DecoderConfig, where: str) -> None:
    """Every tensor has a use and every parameter a tensor, or none is read."""
    used, missing = set(), []
    for path in parameter_shapes(config):
        for name in tensor_names(path, config):
            used.update(bnb_parts(tensors, name) or (name,))
            missing += [] if name in tensors else [name]
    # a buffer that old versions of transformers saved: it follows from the configuration
    unused = [n for n in tensors if n not in used and not n.endswith("rotary_emb.inv_freq")]
    if config.tied and "lm_head.weight" in unused:
        _check_tied(tensors, tensor_names("embed_tokens/embedding", config)[0], where)
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


def _check_tied(tensors: Mapping[str, Any], embedding: str, where: str) -> None:
    head, table = tensors["lm_head.weight"], tensors[embedding]
    if head.shape != table.shape or not np.array_equal(head.read(), table.read()):
        raise InputError(
            f"{where}: config.json says tie_word_embeddings, but 'lm_head.weight' differs from "
            f"'{embedding}'. Set tie_word_embeddings to false in config.json if the "
            "head is its own."
        )


def _check_shapes(tensors: Mapping[str, Any], config: DecoderConfig, where: str) -> None:
    for path in parameter_shapes(config):
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
