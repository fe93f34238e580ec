# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: frozen dataclasses that are the schema of `configs/*.toml`.

The same names work in the TOML file and on the command line (`--lora.rank 8`); the command line
wins over the file and the file over the defaults written here. Nothing is read from the
environment and no key is ever ignored.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from .errors import InputError
from .lora.inits import PLAIN_INITS, check_init


@dataclass(frozen=True)
class Range:
    """Bounds of a number, inclusive unless `open_low`; part of a field's annotation."""

    low: int | float
    high: int | float = math.inf
    open_low: bool = False

    def __contains__(self, value: int | float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        return low if math.isinf(self.high) else f"{low} and at most {self.high:g}"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How the frozen base is stored (method "qlora" only)."""

    format: Literal["nf4", "fp4", "int4"] = "nf4"
    """Codebook of the 4-bit codes."""
    block_size: Literal[32, 64, 128, 256] = 64
    """Weights that share one scale."""
    double_quant: bool = True
    """Quantize the scales as well (saves 0.37 bits a weight)."""
    embeddings: bool = False
    """Quantize the embedding and the output head too."""
    streamed: bool = False
    """Keep the 4-bit weights in host memory, each layer fetched when it is used: a model far larger
    than the device trains on it, while codes cross the bus twice a step."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapter (methods "qlora" and "lora")."""

    rank: Count = 16
    """Inner dimension of the update B A."""
    alpha: Positive = 32.0
    """Numerator of the scale: the update is multiplied by alpha / rank."""
    dropout: Annotated[float, Range(0, 0.999)] = 0.0
    """Probability of dropping an input of A while training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, so that high ranks do not fade."""
    init: str = "default"
    """Start of the adapter: "default", "gaussian", "pissa", "pissa_niter_N" (faster, N = 4 is
    common), "olora" or "loftq". The last four take a part out of the weights they read, and the
    adapter is written for the original weights, with twice the rank."""
    dora: bool = False
    """DoRA: the update turns each output row of a weight, and its length trains apart. Slower: the
    rows of each weight are summed anew in every step."""
    targets: str | tuple[str, ...] = "all-linear"
    """Weights to adapt: "all-linear" (every linear but the head), name suffixes, or one regex."""
    rank_pattern: dict[str, Count] = field(default_factory=dict)
    """Rank of the targets whose name matches, for example {"v_proj" = 8}."""
    alpha_pattern: dict[str, Positive] = field(default_factory=dict)
    """Alpha of the targets whose name matches."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned."""

    source: str = "modern-english"
    """A .jsonl, .json or .parquet file of chats, or the name of a data set that comes packaged."""
    eval_source: str | None = None
    """A file of held-out chats; absent: the data set's own, or the last `eval.examples` chats."""
    max_length: Annotated[int, Range(8)] | None = None
    """Longest example in tokens; longer ones are an error. Absent: the model's context."""
    length_multiple: Count = 32
    """A batch is padded to its longest example, rounded up to a multiple of this. Each length is
    compiled once, so a larger multiple compiles less and pads more."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    learning_rate: Positive = 2e-4
    """Peak learning rate."""
    lora_plus_ratio: Positive = 1.0
    """LoRA+: the learning rate of B divided by that of A; 16 is the paper's, 1 is plain LoRA."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_steps: CountOrZero = 10
    """Steps over which the learning rate rises from zero."""
    final_fraction: Fraction = 0.0
    """Learning rate at the end, as a fraction of the peak (schedules "linear" and "cosine")."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of matrices; norms and biases never decay."""
    b1: Annotated[float, Range(0, 0.999999)] = 0.9
    """Decay of the mean of gradients."""
    b2: Annotated[float, Range(0, 0.999999)] = 0.999
    """Decay of the mean of squared gradients."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    clip_norm: NotNegative = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    state: Literal["float32", "bfloat16", "8bit"] = "float32"
    """How the two moments are held between steps: 8, 4 or 2.03 bytes a trained parameter. With
    "8bit", matrices of fewer than 4096 elements stay float32."""
    placement: Literal["device", "host"] = "device"
    """Where the moments live: "host" keeps them in the host's memory, and every step copies them to
    the device and back (QLoRA's paged optimizer)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: Count = 100
    """Optimizer steps."""
    batch_size: Count = 8
    """Examples that go through the model at once."""
    accumulate: Count = 1
    """Batches that make one optimizer step; the loss is averaged over all their answer tokens."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the matmuls; "auto" is the fastest that the device is known to do well."""
    remat: Literal["none", "dots", "full", "offload"] = "none"
    """What the backward computes again to save memory: nothing that costs a matmul, all but the
    outputs of linears, or everything but the input of each layer; "offload" also keeps these inputs
    in host memory."""
    attention: Literal["blocks", "cudnn"] = "blocks"
    """How layers attend: in blocks, on any device, or by cuDNN's kernel on an NVIDIA GPU, which is
    asked first whether it can. That kernel takes rows whole: with remat "full" and "offload",
    `layer_chunk` must hold `batch_size` rows of the longest example. Not run on a GPU yet."""
    layer_chunk: Annotated[int, Range(256)] = 2048
    """With remat "full" and "offload": tokens that go through a layer at once, all rows of a batch
    together, but 256 of each row at least. Fewer take less memory; the 4-bit weights are decoded
    once for each chunk."""
    loss_chunk: Count = 1024
    """Answer tokens whose logits exist at once."""
    checkpoint_every: Count = 50
    """Steps between checkpoints; one is always written at the end and on Ctrl-C."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that are kept."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured on held-out examples."""

    every: Count = 50
    """Steps between measurements of the held-out loss; it is always measured first and last."""
    examples: Count = 128
    """Held-out examples for the loss."""
    answers: CountOrZero = 128
    """Held-out prompts answered by the base and by the tuned model and scored (chrF)."""
    answer_batch: Count = 16
    """Prompts answered at once: more is faster, and takes memory for their keys and values."""
    samples: CountOrZero = 4
    """Of these answers, how many are printed."""
    max_new_tokens: Count = 64
    """Longest answer."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of one fine-tuning run."""

    method: Literal["qlora", "lora", "full"] = "qlora"
    """LoRA on a 4-bit base, LoRA on a dense base, or training every weight."""
    model: str = "smollm2-135m-instruct"
    """A local directory, a .gguf file, a known name, or a Hugging Face Hub id."""
    output: str = "runs/default"
    """Directory of the run; the same settings with the same directory resume it."""
    seed: CountOrZero = 0
    """Seed of the adapter, the order of examples and dropout."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


# Settings that leave the weights of every step as they are: a run may resume with other values.
_OBSERVING = (
    "output",
    "optim.placement",
    "quant.streamed",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "eval.",
)


def load_config(path: str | Path) -> Config:
    """Read a TOML file.

    Args:
        path: the file.

    Raises:
        InputError: the file is missing or no TOML, a key is unknown, or a value has the wrong
            type or lies out of range.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(
            f"No settings file at '{path}'. Expected a TOML file such as configs/quickstart.toml."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not valid TOML: {error}.") from error
    return from_table(table, where=f"'{path}'")


def from_table(table: Mapping[str, Any], *, where: str = "settings") -> Config:
    """Build a checked `Config` from nested mappings, as a TOML file gives them.

    Args:
        table: key to value or to a table of a section.
        where: what to call the source in messages.

    Raises:
        InputError: unknown key, wrong type, or value out of range.
    """
    config = _build(Config, table, where, "")
    check_config(config, where=where)
    return config


def check_config(config: Config, *, where: str = "settings") -> None:
    """Check that every value of `config` has its type, range and sense.

    Args:
        config: what to check, for example after overrides from a command line.
        where: what to call the source in messages.

    Raises:
        InputError: wrong type, value out of range, or values that contradict each other.
    """
    for key, value, annotation in _leaves(config, ""):
        _convert(value, annotation, where, key)
    if config.quant.streamed and config.method != "qlora":
        raise InputError(
            f'{where}: quant.streamed: expected method = "qlora", whose 4-bit weights are '
            f'streamed, found method = "{config.method}". Leave quant.streamed out.'
        )
    if config.method != "full" and config.lora.init not in PLAIN_INITS:
        try:
            check_init(config.lora.init, quantized=config.method == "qlora")
        except InputError as error:
            raise InputError(f"{where}: lora.init: {error}") from error
    if config.optim.warmup_steps >= config.train.steps:
        raise InputError(
            f"{where}: optim.warmup_steps: expected fewer than train.steps = {config.train.steps}, "
            f"found {config.optim.warmup_steps}. Lower the warm-up or train for more steps."
        )


def to_toml(config: Config) -> str:
    """Return `config` as TOML with every setting spelled out; `load_config` reads it back."""
    lines: list[str] = []
    section = ""
    for key, value, _ in _leaves(config, ""):
        head, _, name = key.rpartition(".")
        if head != section:
            lines += ["", f"[{head}]"]
            section = head
        if value is not None:
            lines.append(f"{name} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def flat_settings(config: Config) -> dict[str, Any]:
    """Return every setting as {"section.key": value}."""
    return {key: value for key, value, _ in _leaves(config, "")}


def replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """Return `config` with other values, given as {"section.key": value}; nothing is checked."""
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        part = dataclasses.replace(getattr(config, section) if section else config, **{leaf: value})
        config = dataclasses.replace(config, **{section: part}) if section else part
    return config


def run_identity(config: Config) -> dict[str, str]:
    """Return the settings that decide the weights of every step, as {"section.key": "value"}.

    Two configurations with equal identity train through the same weights, so a run started with
    one may be resumed with the other.
    """
    return {
        key: str(value)
        for key, value in flat_settings(config).items()
        if not key.startswith(_OBSERVING)
    }


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest of `known`, or "" when none is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _leaves(config: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value, annotation), plain settings of a section before its sections."""
    hints = _hints(type(config))
    names = [item.name for item in dataclasses.fields(config)]
    for name in sorted(names, key=lambda name: dataclasses.is_dataclass(hints[name])):
        value = getattr(config, name)
        if dataclasses.is_dataclass(hints[name]):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, hints[name]


def _build(cls: type, table: Mapping[str, Any], where: str, prefix: str) -> Any:
    hints = _hints(cls)
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in hints:
            everywhere = [key.rpartition(".")[2] for key, _, _ in _leaves(Config(), "")]
            guess = nearest(name, hints) or nearest(name, everywhere)
            raise InputError(
                f"{where}: unknown key '{prefix}{name}'.{guess} "
                f"Known here: {', '.join(sorted(hints))}."
            )
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise _wrong(where, prefix + name, f"a table [{prefix}{name}]", value)
            values[name] = _build(hints[name], value, where, f"{prefix}{name}.")  # type: ignore
        else:
            values[name] = _convert(value, hints[name], where, prefix + name)
    return cls(**values)


def _convert(value: Any, annotation: Any, where: str, key: str) -> Any:
    """Return `value` as `annotation` wants it, or raise InputError naming the key."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        value = _convert(value, args[0], where, key)
        if value not in args[1]:
            raise _wrong(where, key, f"a number {args[1]}", value)
        return value
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in args):
            guess = nearest(value, map(str, args)) if isinstance(value, str) else ""
            raise _wrong(where, key, "one of " + ", ".join(map(toml_value, args)), value, guess)
        return value
    if origin in (typing.Union, types.UnionType):
        choices = [choice for choice in args if choice is not types.NoneType]
        if value is None and len(choices) < len(args):
            return None
        if len(choices) == 1:
            return _convert(value, choices[0], where, key)
        for choice in choices:
            try:
                return _convert(value, choice, where, key)
            except InputError:
                continue
        raise _wrong(where, key, " or ".join(map(_describe, choices)), value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(where, key, "a list", value)
        return tuple(_convert(item, args[0], where, key) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, key, "a table of names to numbers", value)
        return {name: _convert(x, args[1], where, f"{key}.{name}") for name, x in value.items()}
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not annotation:
        raise _wrong(where, key, _describe(annotation), value)
    return value


def _describe(annotation: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(annotation, "a list of strings")


def _wrong(where: str, key: str, expected: str, found: Any, guess: str = "") -> InputError:
    shown = toml_value(found) if isinstance(found, str | int | float) else repr(found)
    return InputError(f"{where}: {key}: expected {expected}, found {shown}.{guess}")


def toml_value(value: Any) -> str:
    """Return a setting's value as TOML spells it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, dict):
        pairs = (f"{toml_value(key)} = {toml_value(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    return repr(value)
