# SPDX-License-Identifier: Apache-2.0
"""XLA's optimized program as data: which code runs, in what order, and what it writes to memory.

Reads the text that `compiled.as_text()` gives for a GPU. What happens inside a fusion stays in
registers; only the results of instructions that are executed one by one are buffers.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
          "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip

# these name what exists already, or are counted where the work begins
_NO_BUFFER = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}


class Shape(NamedTuple):
    """The type of one array.

    Attributes:
        dtype: XLA's name, e.g. "bf16".
        dims: Sizes of its axes.
        host: Whether it is in host memory (space 5).
    """

    dtype: str
    dims: tuple[int, ...]
    host: bool

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes; 0 for what is no array, such as a token."""
        return self.elements * _BYTES.get(self.dtype, 0)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]" + (" (host)" if self.host else "")


class Instruction(NamedTuple):
    """One line of the program.

    Attributes:
        name: What others call it.
        opcode: "fusion", "while"...
        results: The arrays that it makes; those of an asynchronous start without its operands.
        operands: Names.
        calls: The computation of a fusion, or the bodies of a loop, branch or call.
        origin: Where in the traced function it comes from (`op_name`).
        text: The whole line.
    """

    name: str
    opcode: str
    results: tuple[Shape, ...]
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    origin: str
    text: str


class Program:
    """A compiled program.

    Attributes:
        computations: Instructions by the computation's name, in the order of execution.
        entry: Name of the first.
        aliased: Numbers of the arguments whose memory is taken over by a result.
    """

    def __init__(self, text: str):
        """Read the text of a scheduled module."""
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self.aliased = _aliased(text)
        lines: list[Instruction] | None = None
        for line in text.splitlines():
            if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                lines = self.computations.setdefault(found[2], [])
                if found[1]:
                    self.entry = found[2]
            elif line.startswith("}"):
                lines = None
            elif lines is not None and " = " in line:
                lines.append(_instruction(line))

    def executed(self) -> Iterator[tuple[str, list[Instruction]]]:
        """The computations that run instruction by instruction: the entry, loops, branches."""
        waiting, seen = [self.entry], set()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            yield name, self.computations[name]
            for one in self.computations[name]:
                if one.opcode in ("while", "conditional", "call"):
                    waiting += one.calls

    def arguments(self) -> list[Instruction]:
        """The entry's parameters by number."""
        found = [one for one in self.computations[self.entry] if one.opcode == "parameter"]
        return sorted(found, key=lambda one: int(one.text.split(" parameter(")[1].split(")")[0]))

    def inside(self, one: Instruction) -> list[Instruction]:
        """What a fusion computes."""
        return [line for name in one.calls for line in self.computations.get(name, [])]


def is_buffer(one: Instruction) -> bool:
    """Whether an executed instruction writes memory of its own."""
    return one.opcode not in _NO_BUFFER and not one.opcode.endswith("-done")


def _aliased(text: str) -> set[int]:
    found = re.search(r"input_output_alias=\{ (.*?) \}, ", text.split("\n", 1)[0])
    return {int(n) for n in re.findall(r": \((\d+), ", found[1])} if found else set()


def _instruction(line: str) -> Instruction:
    left, right = line.split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    kind, rest = right[:end], right[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    close = _closing("(" + rest, 0) - 1
    operands, attributes = rest[:close], rest[close:]
    calls = re.findall(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)", attributes)
    for group in re.findall(r"branch_computations=\{([^}]*)\}", attributes):
        calls += re.findall(r"%?([\w.\-]+)", group)
    origin = re.search(r'op_name="([^"]*)"', attributes)
    if opcode.endswith("-start"):
        parts = _parts(kind)
        kind = parts[0] if opcode == "copy-start" else parts[1]
    return Instruction(
        name=left.split()[-1].lstrip("%"),
        opcode=opcode,
        results=_shapes(kind),
        operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
        calls=tuple(calls),
        origin=origin[1] if origin else "",
        text=line,
    )


def _shapes(kind: str) -> tuple[Shape, ...]:
    """The arrays of a type, tuples flattened."""
    return tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n), "S(5)" in layout)
        for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", kind)
    )


def _parts(kind: str) -> list[str]:
    """The members of a tuple type, each as text."""
    parts, depth, begun = [], 0, 1
    for place, letter in enumerate(kind):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 1 and letter == "," or depth == 0:
            parts.append(kind[begun:place])
            begun = place + 1
    return parts


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` is closed."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    raise ValueError(f"unbalanced parentheses: {text[:80]}")
