# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: frozen dataclasses that are the schema of `configs/*.toml`.

The same names work in the TOML file and on the command line (`--lora.rank 8`); the command line
wins over the file and the file over the defaults written here. Nothing is read from the
environment and no key is ever ignored.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal


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

    rank: CountOrZero = 16
    """Inner dimension of the update B A; 0: no update, where a prompt trains alone."""
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
    adapter: str | None = None
    """Go on from this adapter: a directory of PEFT's, such as a run's adapter/, or a .gguf file.
    The other settings of this table describe it: targets, rank, alpha."""
    dora: bool = False
    """DoRA: the update turns each output row of a weight, and its length trains apart. Slower: the
    rows of each weight are summed anew in every step."""
    targets: str | tuple[str, ...] = "all-linear"
    """Weights to adapt: "all-linear" (every linear but the head), name suffixes, or one regex.
    "qkv_proj[q,v]" in a list of names means those parts of a fused weight."""
    rank_pattern: dict[str, Count] = field(default_factory=dict)
    """Rank of the targets whose name matches, for example {"v_proj" = 8}."""
    alpha_pattern: dict[str, Positive] = field(default_factory=dict)
    """Alpha of the targets whose name matches."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that train as a whole beside the updates, by name or the end of one as in PEFT:
    "embed_tokens" (with a tied one the head too), "lm_head", "norm" (every norm), "model.norm" (the
    last). They are held dense and have no update."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that train: all of the model, or those of the targets."""
    trainable_token_indices: tuple[CountOrZero, ...] = ()
    """Rows of the embedding (with a tied one of the head too) that train, all others frozen."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Virtual tokens before every text, which train beside LoRA, or alone with lora.rank = 0."""

    kind: Literal["none", "prompt", "prefix"] = "none"
    """What of them trains: "prompt", embeddings (prompt tuning); "prefix", keys and values in every
    layer (prefix tuning); "none": there are none."""
    tokens: Count = 20
    """How many."""
    init: Literal["vocabulary", "random"] = "vocabulary"
    """Start: what the model has for tokens drawn from the vocabulary, or standard normal values."""
    init_text: str | None = None
    """Start from this text's tokens instead, repeated or cut off to `tokens`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned."""

    source: str = "modern-english"
    """A .jsonl, .json or .parquet file of chats, or the name of a data set that comes packaged."""
    eval_source: str | None = None
    """A file of held-out chats; absent: the data set's own, or the last `eval.examples` chats."""
    max_length: Annotated[int, Range(8)] | None = None
    """Longest example in tokens; longer ones are an error. Absent: the model's context."""
    new_tokens: tuple[str, ...] = ()
    """Tokens that the tokenizer lacks, such as ["<tool>", "</tool>"]: added to it, with rows of the
    embedding and the head that start at the mean of the others and train."""
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
    prompt: PromptConfig = field(default_factory=PromptConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def virtual_tokens(self) -> int:
        """How many virtual tokens stand before every text."""
        return 0 if self.prompt.kind == "none" else self.prompt.tokens
