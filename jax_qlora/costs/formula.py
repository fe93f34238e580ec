# SPDX-License-Identifier: Apache-2.0
"""Memory of a training step by arithmetic: what is held exactly, what is temporary to about 10 %.

The planner's answer where the compiler is not installed, and its way to look at many alternatives
at once. The constants of `_temporaries` were fitted to the compiler's plans; tests compare the two.
"""

import dataclasses
import functools
import math

from ..config import Config
from ..interop.hf import parameter_shapes
from ..interop.load_params import EMBEDDINGS, is_quantized
from ..interop.peft_select import Beside, select_beside
from ..lora import Target, Targets
from ..lora.targets import pick_by_pattern
from ..models import DecoderConfig, abstract_params
from ..models.experts import block_sizes
from ..models.layer import MLP_TOKENS
from ..tree import flatten_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes of a training step by part; all on the device but `host`.

    Attributes:
        base: Frozen weights: packed codes, and what is not quantized.
        constants: Block constants of the quantized kernels.
        trainable: The adapter, or every weight.
        optimizer: Moments on the device.
        temporaries: Activations, gradients, decoded kernels.
        host: In host memory: streamed kernels, paged moments, inputs of layers.
    """

    base: int = 0
    constants: int = 0
    trainable: int = 0
    optimizer: int = 0
    temporaries: int = 0
    host: int = 0

    @property
    def device(self) -> int:
        """The sum on the device."""
        return self.base + self.constants + self.trainable + self.optimizer + self.temporaries


def estimate(decoder: DecoderConfig, config: Config, targets: Targets | None, *, seq: int) -> Bytes:
    """The bytes of a training step.

    Args:
        decoder: The model's shape, rows for `data.new_tokens` included.
        config: Settings of the run.
        targets: Adapted kernels, from `find_decoder_targets`; None where every weight trains.
        seq: Tokens of a row, without virtual ones.
    """
    seq += config.virtual_tokens
    weights = _weights(decoder)
    chosen = list(targets.values()) if targets is not None else []
    base = constants = adapter = streamed = replaced = 0
    if config.method == "full":
        trainable = 4 * weights
        parameters = weights
    else:
        beside = select_beside(config.lora, decoder, (target.path for target in chosen))
        base = 2 * weights + 2 * _norms(decoder)  # norms are float32
        for lead, rows, cols in _quantized(decoder, config, beside):
            codes, extra = (math.prod(lead) * n for n in _packed(rows, cols, config))
            base -= 2 * math.prod(lead) * rows * cols
            if config.quant.streamed and lead:
                streamed += codes + extra
            else:
                base, constants = base + codes, constants + extra
        for target in chosen:
            rank = pick_by_pattern(target, config.lora.rank_pattern, config.lora.rank)
            parts = target.chosen_rows or ((0, target.layout.rows),)
            outputs = sum(stop - start for start, stop in parts)
            inputs = len(parts) * target.layout.cols
            adapter += math.prod(target.lead) * rank * (outputs + inputs)
        replaced, rows = _trained_beside(decoder, config, beside)
        adapter += replaced + rows
        wide = {"none": 0, "prompt": decoder.d_model, "prefix": 2 * decoder.n_layers * _kv(decoder)}
        adapter += config.virtual_tokens * wide[config.prompt.kind]
        trainable, parameters = 4 * adapter, adapter
    each = {"float32": 8.0, "bfloat16": 4.0, "8bit": 2 + 8 / 256}[config.optim.state]
    moments = int(each * parameters)
    on_host = config.optim.placement == "host"
    tokens = config.train.batch_size * seq
    inputs = 2 * decoder.n_layers * tokens * decoder.d_model
    return Bytes(
        base=base,
        constants=constants,
        trainable=trainable,
        optimizer=0 if on_host else moments,
        temporaries=_temporaries(
            decoder,
            config,
            trainable,
            seq,
            fetched=streamed // decoder.n_layers + _of_experts(decoder, config, chosen),
        )
        + 2 * replaced,  # what takes the place of weights is cast to their dtype
        host=streamed
        + (moments if on_host else 0)
        + (inputs if config.train.remat == "offload" else 0),
    )


@functools.cache
def _weights(decoder: DecoderConfig) -> int:
    return sum(x.size for x in flatten_paths(abstract_params(decoder)).values())


@functools.cache
def _norms(decoder: DecoderConfig) -> int:
    leaves = flatten_paths(abstract_params(decoder))
    return sum(x.size for path, x in leaves.items() if path.endswith("/scale"))


def _kv(decoder: DecoderConfig) -> int:
    return decoder.n_kv_heads * decoder.head_dim


def _trained_beside(decoder: DecoderConfig, config: Config, beside: Beside) -> tuple[int, int]:
    """Parameters of what trains as a whole, and of the rows of tokens."""
    shapes = parameter_shapes(decoder)
    tables = [path for path in EMBEDDINGS if path in shapes and path not in beside.whole]
    rows = sum(map(len, beside.tokens.values())) + len(tables) * len(config.data.new_tokens)
    return sum(math.prod(shapes[path]) for path in beside.whole), rows * decoder.d_model


def _quantized(
    decoder: DecoderConfig, config: Config, beside: Beside
) -> list[tuple[tuple[int, ...], int, int]]:
    """What is in 4 bits: leading axes, rows and columns of each."""
    if config.method != "qlora":
        return []
    embeddings, found = config.quant.embeddings, []
    for path, x in flatten_paths(abstract_params(decoder)).items():
        if is_quantized(path, embeddings=embeddings) and path not in beside.whole:
            *lead, m, n = x.shape
            rows, cols = (n, m) if path.endswith("/kernel") else (m, n)
            found.append((tuple(lead), rows, cols))
    return found


def _packed(rows: int, cols: int, config: Config) -> tuple[int, int]:
    """The same of one matrix, whose blocks run along its rows."""
    size = config.quant.block_size
    blocks = rows * -(-cols // size)
    constants = 4 * blocks
    if config.quant.double_quant:
        constants = blocks + 4 * -(-blocks // 256) + 4
    return blocks * size // 2, constants


def _of_experts(decoder: DecoderConfig, config: Config, chosen: list[Target]) -> int:
    """What the loop over blocks of tokens holds of the experts of one layer.

    A copy of their kernels as they are stored, with the sums of gradients where they train; and
    their updates, the sums of their gradients, and what one block adds to those.
    """
    d, ff = decoder.d_model, decoder.d_ff
    kernels = {"qlora": 0, "lora": 2, "full": 8}[config.method] * 3 * d * ff
    if config.method == "qlora" and not config.quant.streamed:
        kernels = 2 * sum(_packed(ff, d, config)) + sum(_packed(d, ff, config))
    updates = 0
    for target in chosen:
        if len(target.lead) == 2:
            rank = pick_by_pattern(target, config.lora.rank_pattern, config.lora.rank)
            updates += 4 * target.lead[1] * rank * (target.layout.rows + target.layout.cols)
    return decoder.n_experts * kernels + 3 * updates


def _temporaries(
    decoder: DecoderConfig, config: Config, trainable: int, seq: int, *, fetched: int
) -> int:
    """The rest; `fetched` are bytes of one layer's parameters, on the device while it is used."""
    tokens, d, layers = config.train.batch_size * seq, decoder.d_model, decoder.n_layers
    q, kv, ff = decoder.n_heads * decoder.head_dim, _kv(decoder), decoder.d_ff
    inner = 0 if decoder.n_experts else ff  # of the MLP that every token goes through
    wide = (1 + decoder.gated) * inner  # what goes into its activation
    looped = config.train.remat in ("full", "offload")
    kept = {  # 16-bit values that a token leaves behind in each layer
        "offload": 0,
        "full": d,
        "dots": 2 * d + q + 2 * kv + wide,
        "none": 2 * d + 2 * q + 2 * kv + wide,
    }[config.train.remat]
    saved = 2 * layers * tokens * kept
    stream = 4 * tokens * d if config.train.remat == "offload" else 2 * tokens * d
    working = fetched if config.method == "lora" else fetched + 4 * max(d * ff, d * q)
    chunk = min(tokens, max(config.train.layer_chunk, 256 * config.train.batch_size))
    if looped:
        working += stream + 12 * tokens * kv + chunk * (6 * d + 4 * q + 10 * inner)
    else:
        working += tokens * (12 * d + 8 * q + 2 * kv) + _gated(seq, tokens, inner)
    if decoder.n_experts:
        rows = chunk if looped else tokens
        places = math.prod(block_sizes(rows, decoder.experts_per_token, decoder.n_experts))
        working += places * (5 * d + 4 * ff)
        saved += 0 if looped else 2 * layers * places * (d + 2 * ff)
    logits = stream + 8 * min(config.train.loss_chunk, tokens) * decoder.vocab_size
    accumulated = trainable if config.train.accumulate > 1 else 0
    return saved + max(trainable + working, logits) + accumulated


def _gated(seq: int, tokens: int, ff: int) -> int:
    """Bytes of the MLP's inner activations, which a long sequence has a chunk at a time."""
    return 10 * tokens * ff if seq <= MLP_TOKENS else 6 * MLP_TOKENS * ff
