# SPDX-License-Identifier: Apache-2.0
"""load_model: a checkpoint on disk, quantized on the way, as a Model."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..lift import lift
from ..models import Model, decoder_functions
from ..models.cudnn_attention import check_device
from ..quant.streaming import check_host_memory, fetch
from ..typing import Array
from .load_params import Encoding, check_tensors, load_params, stored_dtype
from .new_tokens import add_rows, add_tokens
from .open import find_tokenizer, open_checkpoint


def load_model(
    path: str | Path,
    *,
    quantization: str | None = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    embeddings: bool = False,
    compute_dtype: DTypeLike | None = None,
    dtype: DTypeLike | None = None,
    remat: str = "none",
    attention: str = "blocks",
    layer_chunk: int = 2048,
    streamed: bool = False,
    split: Mapping[str, Callable[[Array], Any]] | None = None,
    new_tokens: Sequence[str] = (),
) -> Model:
    """Load a decoder, its linears in 4 bits.

    Args:
        path: A Hugging Face directory (safetensors), a .gguf file, a name that `jax-qlora download`
            knows, or a Hub id.
        quantization: "nf4", "fp4" or "int4" for the linears of the layers; norms, biases and,
            unless `embeddings` says so, the embedding and the head stay as they are. None loads
            everything dense. Weights that bitsandbytes has quantized keep their own format and
            codes (None makes them dense).
        block_size: Elements that share a constant: 32, 64, 128 or 256.
        double_quant: Also quantize the constants.
        embeddings: Also quantize the embedding and the output head.
        compute_dtype: Operands of the matmuls. By default float32 on a CPU, bfloat16 on
            accelerators that have it and float16 on those that do not.
        dtype: Storage of what is not quantized, norms aside. By default the checkpoint's; that of a
            GGUF file is bfloat16, and float32 without quantization.
        remat: What the backward recomputes: "none", "dots", "full" or "offload"; see
            `decoder_functions`.
        attention: "blocks", or "cudnn" on an NVIDIA GPU; see `decoder_functions`.
        layer_chunk: With "full" and "offload", tokens that go through a layer at once.
        streamed: Keep the 4-bit kernels in host memory; each layer is fetched when it is used.
        split: For some paths of the parameter tree, what makes the parameter of the dense one, all
            its layers stacked, in place of quantizing it; `init_kernel` is such a function.
        new_tokens: Tokens that the tokenizer lacks: added to it, with rows of the embedding and the
            head that are the mean of the others. The vocabulary grows where it has no rows to
            spare, so the model's `config` may differ from the checkpoint's.

    Returns:
        The model; `model.params` is the frozen base, and its methods take that tree, also with
        adapters attached. They are jitted and lifted.

    Raises:
        InputError: There is no such model; its files are damaged or contradict each other; its
            architecture or a setting is not implemented; a weight is not finite; the device has
            no host memory for what is to wait there, or no cuDNN that can do the attention; or a
            token is there already.
    """
    check_host_memory(streamed=streamed, remat=remat)
    path, config, tensors, raw = open_checkpoint(path)
    tokenizer = find_tokenizer(path)
    config, numbers = add_tokens(tokenizer, new_tokens, config, where=f"'{path}'")
    dtype = _default_dtype(raw, quantization) if dtype is None else dtype
    compute = jnp.dtype(default_compute_dtype() if compute_dtype is None else compute_dtype)
    if attention == "cudnn":
        check_device(config, compute)
    functions = decoder_functions(
        config,
        compute_dtype=compute,
        remat=remat,
        attention=attention,
        transform=lift,
        fetch=fetch if streamed else None,
        layer_chunk=layer_chunk,
    )
    encoding = None
    if quantization is not None:
        encoding = Encoding(quantization, block_size, double_quant, embeddings)
    params = load_params(
        add_rows(tensors, config, numbers),
        config,
        where=f"'{path}'",
        encoding=encoding,
        dtype=dtype,
        streamed=streamed,
        split=split,
    )
    return Model(
        config=config,
        params=params,
        functions=functions.map(jax.jit),
        compute_dtype=compute,
        tokenizer=tokenizer,
    )


def stored_dtypes(
    path: str | Path, *, quantization: str | None, new_tokens: Sequence[str] = ()
) -> Callable[[str], np.dtype]:
    """Return what `load_model` holds each parameter in, without reading weights.

    Args:
        path: As for `load_model`.
        quantization: Likewise.
        new_tokens: Likewise.

    Returns:
        A function of a parameter's path; of what is quantized it gives the dtype of its values.

    Raises:
        InputError: As for `load_model`, of what is wrong with the description of the weights, or
            an embedding that takes no new tokens.
    """
    path, config, tensors, raw = open_checkpoint(path)
    check_tensors(tensors, config, where=f"'{path}'")
    add_rows(tensors, config, range(len(new_tokens)))  # refuses what cannot grow
    return functools.partial(stored_dtype, tensors, config, _default_dtype(raw, quantization))


def _default_dtype(raw: Any, quantization: str | None) -> DTypeLike | None:
    """None: each tensor's own. A .gguf file says nothing of how weights were held."""
    if raw is not None:
        return None
    return jnp.float32 if quantization is None else jnp.bfloat16


def default_compute_dtype() -> Any:
    """Return the dtype for matmuls on the default device: one that it multiplies natively."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return jnp.float32
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability and float(capability) < 8.0:
        return jnp.float16  # e.g. T4: XLA would widen bfloat16 to float32
    return jnp.bfloat16


def training_compute_dtype() -> Any:
    """Return the fastest dtype for matmuls on the default device.

    As `default_compute_dtype`, but also bfloat16 on a CPU that multiplies it (AVX512-BF16, AMX).
    """
    flags = Path("/proc/cpuinfo")
    if jax.devices()[0].platform == "cpu" and flags.exists():
        if {"avx512_bf16", "amx_bf16"} & set(flags.read_text("utf-8").split()):
            return jnp.bfloat16
    return default_compute_dtype()
