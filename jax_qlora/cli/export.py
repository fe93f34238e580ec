# SPDX-License-Identifier: Apache-2.0
"""`jax-qlora export OUTPUT --run runs/NAME --format gguf`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tyro.conf import Positional

from ..errors import InputError
from .arguments import parse
from .loading import (
    Source,
    complete,
    describe,
    load,
    load_adapter_alone,
    refuse_prompt,
    require_quantization,
)
from .merge import merge
from .settings import ensure_downloaded
from .writing import check_logits, progress, report, updates_note


@dataclass(frozen=True, kw_only=True)
class Arguments(Source):
    """Write a model, with its adapter folded in if there is one, or an adapter, in a format.

    hf: a Hugging Face directory, as `jax-qlora merge`. bnb: the same with the linears of the layers
    in bitsandbytes' 4 bits; what was merged is rounded to 4 bits again. gguf: one file for
    llama.cpp. peft: the adapter, as PEFT's directory. gguf-lora: the adapter, as a file for
    llama.cpp. What was written is read back, and the logits of models are compared.
    """

    output: Positional[str]
    """Directory or .gguf file to write."""
    format: Literal["hf", "bnb", "gguf", "gguf-lora", "peft"]
    """What to write."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """hf: type of the written weights."""
    gguf_type: Literal["f32", "f16", "q8_0", "q4_0"] = "f16"
    """gguf: type of the written weights."""
    shard_gb: float = 5.0
    """hf, bnb: largest file, in GB."""
    overwrite: bool = False
    """Replace a model or file that is there."""
    json: bool = False
    """Print one JSON object."""


def run(args: Sequence[str]) -> int:
    """Write.

    Raises:
        InputError: Bad arguments, model or adapter; or it is not said how the base was held.
    """
    arguments = parse(Arguments, args, prog="jax-qlora export")
    name, adapter_path, settings = complete(arguments)
    if arguments.format != "peft" or "prompt" in settings:
        refuse_prompt(adapter_path, settings)
    if arguments.format in ("peft", "gguf-lora"):
        if adapter_path is None:
            raise InputError(
                f"--format {arguments.format} writes an adapter: expected --run or --adapter."
            )
        _export_adapter(name, adapter_path, arguments)
        return 0
    if adapter_path is not None:
        require_quantization(settings)
    settings.setdefault("quantization", None)
    if arguments.format == "hf":
        merge(name, adapter_path, settings, arguments)
    elif arguments.format == "bnb":
        _export_bnb(name, adapter_path, settings, arguments)
    else:
        _export_gguf(name, adapter_path, settings, arguments)
    return 0


def _export_adapter(name: str, adapter_path: str, arguments: Arguments) -> None:
    model, adapter = load_adapter_alone(name, adapter_path)
    if arguments.format == "gguf-lora":
        from ..interop.gguf_lora import save_gguf_lora

        saved = save_gguf_lora(
            arguments.output, adapter, model.config, name=name, overwrite=arguments.overwrite
        )
        report(saved, as_json=arguments.json, notes=updates_note(saved, adapter))
        return
    from ..interop.output import check_directory
    from ..interop.peft import save_adapter

    check_directory(arguments.output, overwrite=arguments.overwrite)
    written = save_adapter(
        arguments.output, adapter, model, base_model=name, tokenizer=model.tokenizer
    )
    figures = {"output": arguments.output, "modules": written.modules, "b_norm": written.b_norm}
    text = f"Wrote '{arguments.output}': {written.modules} modules, norm of B {written.b_norm:.3g}."
    if written.virtual_tokens:
        figures = {"output": arguments.output, "virtual_tokens": written.virtual_tokens}
        text = f"Wrote '{arguments.output}': {written.virtual_tokens} virtual tokens."
    print(json.dumps(figures) if arguments.json else text)


def _export_bnb(
    name: str, adapter_path: str | None, settings: dict[str, Any], arguments: Arguments
) -> None:
    from ..interop.bnb_write import check_encoding, save_bnb
    from ..interop.load_params import Encoding
    from ..interop.model_card import Origin
    from ..interop.output import check_directory
    from ..interop.quantize_checkpoint import quantize_checkpoint

    encoding = Encoding(
        settings["quantization"] or "nf4",
        settings.get("block_size", 64),
        settings.get("double_quant", True),
    )
    check_directory(arguments.output, overwrite=arguments.overwrite)
    check_encoding(encoding)
    options: dict[str, Any] = {
        "encoding": encoding,
        "max_shard_bytes": int(arguments.shard_gb * 1e9),
        "overwrite": arguments.overwrite,
    }
    if adapter_path is None:
        ensure_downloaded(name)
        with progress("quantizing") as update:
            saved = quantize_checkpoint(name, arguments.output, progress=update, **options)
        report(saved, as_json=arguments.json, notes=[])
        return

    def write(model: Any, params: Any, update: Any) -> Any:
        origin = Origin(
            base_model=name, adapter=adapter_path, quantization=settings["quantization"]
        )
        return save_bnb(
            arguments.output,
            params,
            model.config,
            tokenizer=model.tokenizer,
            origin=origin,
            progress=update,
            **options,
        )

    _write(name, adapter_path, settings, arguments, write, quantization=encoding.format)


def _export_gguf(
    name: str, adapter_path: str | None, settings: dict[str, Any], arguments: Arguments
) -> None:
    from ..interop.gguf_config import model_metadata
    from ..interop.gguf_tokenizer import tokenizer_to_gguf
    from ..interop.gguf_write import save_gguf
    from ..interop.output import check_file

    if not arguments.output.endswith(".gguf"):
        raise InputError(f"'{arguments.output}': expected the name of a .gguf file to write.")
    check_file(arguments.output, overwrite=arguments.overwrite)
    config, tokenizer, _ = describe(name, adapter_path)
    model_metadata(config)
    if tokenizer is None:
        raise InputError(
            f"'{name}' has no tokenizer.json: expected one beside the weights. A GGUF file is of "
            "no use without."
        )
    tokenizer_to_gguf(tokenizer, config)

    def write(model: Any, params: Any, update: Any) -> Any:
        return save_gguf(
            arguments.output,
            params,
            model.config,
            kind=arguments.gguf_type,
            tokenizer=model.tokenizer,
            name=name,
            overwrite=arguments.overwrite,
            progress=update,
        )

    _write(name, adapter_path, settings, arguments, write, quantization=None)


def _write(
    name: str,
    adapter_path: str | None,
    settings: dict[str, Any],
    arguments: Arguments,
    write: Callable[[Any, Any, Any], Any],
    *,
    quantization: str | None,
) -> None:
    """Load, write, compare logits, report; `quantization` is how the written model is loaded."""
    from ..lora import attach

    model, adapter = load(name, adapter_path, settings)
    params = model.params if adapter is None else attach(model.params, adapter)
    with progress("writing") as update:
        saved = write(model, params, update)
    figures, sentence = check_logits(model, params, saved, itemsize=4, quantization=quantization)
    notes = [*updates_note(saved, adapter), sentence]
    report(saved, as_json=arguments.json, notes=notes, **figures)
