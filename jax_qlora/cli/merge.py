# SPDX-License-Identifier: Apache-2.0
"""`jax-qlora merge OUTPUT --run runs/NAME`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tyro.conf import Positional

from .arguments import parse
from .loading import Source, complete, load, refuse_prompt, require_quantization
from .writing import check_logits, progress, report, updates_note


@dataclass(frozen=True, kw_only=True)
class Arguments(Source):
    """Fold an adapter into its model and write a directory that transformers loads.

    The sum is taken in float32 with the weights that the adapter was trained on: those of a QLoRA
    run went through 4 bits, and so does the merged model. What was written is read back: its
    tensors, and the largest difference of a logit from the model with the adapter attached.
    """

    output: Positional[str]
    """Directory to write."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the written weights."""
    shard_gb: float = 5.0
    """Largest file, in GB."""
    overwrite: bool = False
    """Replace a model that is in the directory."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> int:
    """Merge and write.

    Raises:
        InputError: Bad arguments, model or adapter; or it is not said how the base was held.
    """
    arguments = parse(Arguments, args, prog="jax-qlora merge")
    name, adapter_path, settings = complete(arguments)
    refuse_prompt(adapter_path, settings)
    require_quantization(settings)
    merge(name, adapter_path, settings, arguments)
    return 0


def merge(name: str, adapter_path: str | None, settings: dict[str, Any], arguments: Any) -> None:
    """Write the merged model as a Hugging Face directory, and say what was written.

    Args:
        name: The model, as `load` takes it.
        adapter_path: The adapter's directory, or None.
        settings: Other arguments of `load_model`.
        arguments: `output`, `dtype`, `shard_gb`, `overwrite`, `json`.
    """
    from ..interop.output import check_directory

    check_directory(arguments.output, overwrite=arguments.overwrite)
    model, adapter = load(name, adapter_path, settings)

    import jax.numpy as jnp

    from ..interop.hf_write import save_hf
    from ..interop.model_card import Origin
    from ..lora import attach

    params = model.params if adapter is None else attach(model.params, adapter)
    with progress("writing") as update:
        saved = save_hf(
            arguments.output,
            params,
            model.config,
            dtype=arguments.dtype,
            tokenizer=model.tokenizer,
            origin=Origin(
                base_model=name, adapter=adapter_path, quantization=settings.get("quantization")
            ),
            max_shard_bytes=int(arguments.shard_gb * 1e9),
            overwrite=arguments.overwrite,
            progress=update,
        )
    figures, sentence = check_logits(
        model, params, saved, itemsize=jnp.dtype(arguments.dtype).itemsize
    )
    report(
        saved,
        as_json=arguments.json,
        notes=[*updates_note(saved, adapter), sentence],
        dtype=arguments.dtype,
        **figures,
    )
