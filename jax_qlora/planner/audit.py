# SPDX-License-Identifier: Apache-2.0
"""An audit of the compiled training step: every large buffer and why it exists.

Three properties of QLoRA's step are read off XLA's optimized program, not assumed: that no
weight is ever held in float32, or dense in 16 bits longer than its product takes; that decoding is
one fused kernel which reads packed codes and feeds one product; that what the optimizer replaces is
overwritten in place. With streamed weights also that copies from the host run beside products.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from ..config import Config
from ..models import DecoderConfig
from ..models.attention_blocks import BLOCK
from ..quant import QuantizedArray
from ..train.shapes import Run
from .program import Instruction, Program, Shape, is_buffer

_HALF = ("bf16", "f16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many elements the values of a training step have; what a buffer is told by.

    Attributes:
        kernels: Of one layer's kernels.
        packed: Bytes of their codes.
        constants: Of their block constants.
        layers: How many layers are stacked.
        held: Arrays that are held between steps, as (elements, bytes), and what they are.
        adapter: Axes of the adapter's matrices, all layers, smallest first.
        rows: Tokens, and answer tokens, of a batch.
        widths: Features of a token: of the residual stream, of projections, of the MLP.
        kept: Features that a token leaves behind in each layer for the backward.
        scores: Of a block of attention's scores.
        vocab: Of one token's logits.
        chunk: Tokens whose logits exist at once.
    """

    kernels: frozenset[int]
    packed: frozenset[int]
    constants: frozenset[int]
    layers: int
    held: dict[tuple[int, int], str]
    adapter: frozenset[tuple[int, ...]]
    rows: tuple[int, int]
    widths: tuple[int, ...]
    kept: tuple[int, ...]
    scores: int
    vocab: int
    chunk: int

    @property
    def threshold(self) -> int:
        """Bytes from which on a buffer must be explained: a quarter of the largest kernel."""
        return max(self.kernels) * 2 // 4


class Finding(NamedTuple):
    """One large buffer.

    Attributes:
        shape: What it holds.
        where: "step", "forward" or "backward", the latter two being the loops over layers.
        opcode: What writes it; "parameter": an argument.
        why: What it is; empty if no rule explains it.
        origin: Where in the traced function it comes from.
    """

    shape: Shape
    where: str
    opcode: str
    why: str
    origin: str


class Decode(NamedTuple):
    """One dequantization.

    Attributes:
        where: As in `Finding`.
        kernels: How many kernels the one fused operation decodes.
        products: How many products read the result.
        others: What else reads it, by opcode.
    """

    where: str
    kernels: int
    products: int
    others: tuple[str, ...]


class Copy(NamedTuple):
    """One asynchronous copy from host memory.

    Attributes:
        where: As in `Finding`.
        shape: What is copied.
        beside: Products between its start and its end.
    """

    where: str
    shape: Shape
    beside: int


class Audit(NamedTuple):
    """What was found.

    Attributes:
        findings: Buffers above the threshold, largest first.
        decodes: Dequantizations in one pass of each loop.
        copies: Copies of packed codes from the host.
        in_place: Arrays of the training state that are overwritten, and how many there are.
        threshold: Bytes.
    """

    findings: list[Finding]
    decodes: list[Decode]
    copies: list[Copy]
    in_place: tuple[int, int]
    threshold: int

    def problems(self) -> list[str]:
        """What should not be, one sentence each."""
        found = [
            f"{f.shape} in the {f.where} ({f.opcode}, {f.origin}): no rule explains it"
            for f in self.findings
            if not f.why
        ]
        for d in self.decodes:
            if (d.kernels, d.products, d.others) != (1, 1, ()):
                readers = ", ".join((f"{d.products} products", *d.others))
                found.append(
                    f"one operation of the {d.where} decodes {d.kernels} kernels, read by "
                    f"{readers}: expected one kernel and one product"
                )
        have, want = self.in_place
        if have < want:
            found.append(f"{want - have} of {want} arrays of the training state are not donated")
        alone, total = (sum(c.shape.nbytes for c in self.copies if some or not c.beside)
                        for some in (False, True))  # fmt: skip
        if 2 * alone >= total > 0:
            found.append(
                f"{alone / total:.0%} of the bytes copied from the host have no product beside "
                "them: expected less than half"
            )
        return found


def sizes(decoder: DecoderConfig, config: Config, run: Run, *, seq: int) -> Sizes:
    """The sizes of a QLoRA run's values."""

    def is_quantized(x: object) -> bool:
        return isinstance(x, QuantizedArray)

    frozen = jax.tree.leaves(run.frozen, is_leaf=is_quantized)
    quantized = [x for x in frozen if is_quantized(x)]
    held: dict[tuple[int, int], str] = {}

    def hold(tree: object, what: str) -> None:
        for x in jax.tree.leaves(tree):
            held.setdefault((x.size, x.size * x.dtype.itemsize), what)

    hold([x.codes for x in quantized], "packed codes, all layers")
    hold([(x.absmax, x.absmax_scale, x.absmax_offset) for x in quantized], "block constants")
    hold(run.state.optimizer, "moments of the adapter")
    hold(run.state.trainable, "adapter, and its moments")
    hold([x for x in frozen if not is_quantized(x)], "embedding, head, norms")
    q, kv = decoder.n_heads * decoder.head_dim, decoder.n_kv_heads * decoder.head_dim
    d, ff, batch = decoder.d_model, decoder.d_ff, config.train.batch_size
    rows = batch * seq, batch * (seq - 1)
    recomputed = config.train.remat in ("full", "offload")
    return Sizes(
        kernels=frozenset(x.layout.rows * n for x in quantized
                          for n in (x.layout.cols, 2 * x.codes.shape[-1])),  # without padding, with
        packed=frozenset(x.codes.size // math.prod(x.lead) for x in quantized),
        constants=frozenset(x.absmax.size // math.prod(x.lead) for x in quantized),
        layers=decoder.n_layers,
        held=held,
        adapter=frozenset(tuple(sorted(x.shape)) for x in jax.tree.leaves(run.state.trainable)),
        rows=rows,
        widths=(d, q, kv, ff, q + 2 * kv, 2 * ff),
        kept=(d,) if recomputed else (d, q, kv, ff),
        scores=batch * decoder.n_heads * min(seq, BLOCK[0]) * min(seq, BLOCK[1]),
        vocab=decoder.vocab_size,
        chunk=min(config.train.loss_chunk, rows[0]),
    )  # fmt: skip


def audit(program: Program, sizes: Sizes, run: Run) -> Audit:
    """Looks at a compiled step.

    Args:
        program: The step, compiled for a GPU.
        sizes: From `sizes`, of the same run.
        run: The run, whose state is the first argument of the step, donated.
    """
    findings = [
        Finding(shape, "step", "parameter", sizes.held.get((shape.elements, shape.nbytes), ""), "")
        for one in program.arguments()
        for shape in one.results
        if shape.nbytes >= sizes.threshold
    ]
    decodes, copies = [], []
    for name, lines in program.executed():
        where = _place(name, lines, program)
        scope = _Scope(program, lines)
        for place, one in enumerate(lines):
            if is_buffer(one):
                decoded = [s for s in one.results if s.dtype in _HALF and _of_kernel(s, sizes)]
                reads_codes = bool(decoded) and scope.reads_codes(one, sizes)
                for shape in one.results:
                    if shape.nbytes >= sizes.threshold:
                        why = _explain(one, shape, sizes, decoded=reads_codes)
                        findings.append(Finding(shape, where, one.opcode, why, one.origin))
                if reads_codes:
                    products, others = scope.readers(one)
                    decodes.append(Decode(where, len(decoded), products, others))
            if (shape := scope.copied(one)) and shape.elements in sizes.packed:
                copies.append(Copy(where, shape, scope.beside(one, place)))
    state = len(jax.tree.leaves(run.state))
    in_place = len([n for n in program.aliased if n < state])
    findings.sort(key=lambda f: -f.shape.nbytes)
    return Audit(findings, decodes, copies, (in_place, state), sizes.threshold)


def _explain(one: Instruction, shape: Shape, sizes: Sizes, *, decoded: bool) -> str:
    """What a buffer is; empty if no rule says so."""
    n, half, single = shape.elements, shape.dtype in _HALF, shape.dtype == "f32"
    if _of_kernel(shape, sizes) and (half or single):  # only this makes a kernel dense
        return "decoded kernel of this layer" if half and decoded else ""
    if shape.dtype == "u8" and n in sizes.packed:
        return "packed codes of this layer"
    if shape.dtype in ("u8", "f32") and n in sizes.constants:
        return "block constants of this layer"
    if single and tuple(sorted(shape.dims)) in sizes.adapter:
        return "gradients, moments or update of the adapter, all layers"
    if half and n in {sizes.layers * sizes.rows[0] * width for width in sizes.kept}:
        return "kept for the backward, all layers"
    if not (half or single):
        return ""
    if n % sizes.vocab == 0 and n // sizes.vocab <= sizes.chunk:
        return "logits of a chunk"
    if n == sizes.scores:
        return "a block of attention scores"
    for rows in sizes.rows:
        if n % rows == 0 and n // rows <= max(sizes.widths):
            return "activations of this layer"
        if single and len(shape.dims) > 2 and shape.dims[-2] == rows:
            if shape.dims[-1] in sizes.widths and shape.dims[0] <= 64:
                return "partial sums of a product, split over what it sums"
    return ""


def _of_kernel(shape: Shape, sizes: Sizes) -> bool:
    return shape.elements in sizes.kernels


def _place(name: str, lines: list[Instruction], program: Program) -> str:
    """Which part of a training step a computation is."""
    if name == program.entry:
        return "step"
    return "backward" if any("transpose(jvp" in one.origin for one in lines) else "forward"


class _Scope:
    """One computation: who makes what, and who reads it."""

    def __init__(self, program: Program, lines: list[Instruction]):
        self._program = program
        self._lines = lines
        self._made = {one.name: one for one in lines}
        self._readers: dict[str, list[Instruction]] = {}
        for one in lines:
            for name in one.operands:
                self._readers.setdefault(name, []).append(one)

    def reads_codes(self, one: Instruction, sizes: Sizes) -> bool:
        """Whether a kernel's packed codes, or those of all layers, are among the operands."""
        counts = {n * k for n in sizes.packed for k in (1, sizes.layers)}
        return any(
            shape.dtype == "u8" and shape.elements in counts
            for name in one.operands
            if name in self._made
            for shape in self._made[name].results
        )

    def readers(self, one: Instruction) -> tuple[int, tuple[str, ...]]:
        """How many products read a result, and the opcodes of all else that does."""
        products, others = 0, []
        for reader in self._uses(one):
            if self._is_product(reader):
                products += 1
            else:
                others.append(reader.opcode)
        return products, tuple(others)

    def copied(self, one: Instruction) -> Shape | None:
        """What an asynchronous copy from host memory brings; None if this is none."""
        if not one.opcode.endswith("-start") or len(one.results) != 1 or one.results[0].host:
            return None
        source = [s for name in one.operands[:1] for s in self._made[name].results]
        return one.results[0] if any(s.host for s in source) else None

    def beside(self, start: Instruction, place: int) -> int:
        """Products between the start of an asynchronous operation and its end."""
        products = 0
        for one in self._lines[place + 1 :]:
            if one.opcode.endswith("-done") and start.name in one.operands:
                break
            products += self._is_product(one)
        return products

    def _uses(self, one: Instruction) -> Iterator[Instruction]:
        for reader in self._readers.get(one.name, []):
            if reader.opcode in ("bitcast", "get-tuple-element"):
                yield from self._uses(reader)
            else:
                yield reader

    def _is_product(self, one: Instruction) -> bool:
        if one.opcode == "custom-call":
            return "gemm" in one.text or "matmul" in one.text
        return one.opcode == "dot" or any(x.opcode == "dot" for x in self._program.inside(one))
