# SPDX-License-Identifier: Apache-2.0
"""What a GPU would execute: no dense weight but one at a time, state in place, copies alongside."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from jax_qlora.interop.hf_config import config_to_hf
from jax_qlora.models.presets import TINY
from jax_qlora.planner.audit import Audit, Copy, audit, sizes
from jax_qlora.planner.plan import DEFAULTS, with_settings
from jax_qlora.planner.program import Program, Shape, is_buffer
from jax_qlora.train.shapes import abstract_run

ROOT = Path(__file__).parents[2]

# few tokens, so that nothing but a weight is as large as a weight; no two sizes are alike by chance
DECODER = dataclasses.replace(
    TINY, vocab_size=2048, d_model=512, d_ff=1408, n_layers=3, n_heads=8, n_kv_heads=2, head_dim=64
)
SEQ = 48
LINEARS = 7


class Compiled(NamedTuple):
    text: str
    answer: dict[str, Any]
    settings: dict[str, Any]

    def audit(self, text: str) -> Audit:
        """The audit of this program, or of one that was spoiled."""
        config = with_settings(DEFAULTS, {"rank": 8, **self.settings, "streamed": False})
        run = abstract_run(DECODER, config, seq=SEQ)
        return audit(Program(text), sizes(DECODER, config, run, seq=SEQ), run)


def compile_step(directory: Path, **settings: Any) -> Compiled:
    """Runs the command on a small model; it needs a process of its own."""
    (directory / "config.json").write_text(json.dumps(config_to_hf(DECODER, dtype="bfloat16")))
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_program.py"), "--json",
               "--model", str(directory / "config.json"), "--seq", str(SEQ), "--gpu", "rtx4090",
               "--hlo", str(directory / "hlo.txt"), "--set", "rank=8",
               *(f"{k}={json.dumps(v)}" for k, v in settings.items())]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    return Compiled((directory / "hlo.txt").read_text(), json.loads(done.stdout), settings)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compile_step(tmp_path_factory.mktemp("plain"))


def test_every_large_buffer_is_explained(plain: Compiled):
    assert plain.answer["problems"] == []
    found = plain.audit(plain.text)
    assert found.threshold == 512 * 1408 * 2 // 4
    written = [f for f in found.findings if f.opcode != "parameter"]
    assert all(f.why and f.shape.nbytes >= found.threshold for f in found.findings)
    # beside the decoded kernels, 16 bits each, nothing has the size of a weight
    dense = Counter(f.shape.dtype for f in written if f.shape.elements >= 512 * 512)
    assert set(dense) <= {"bf16", "u8"} and dense["bf16"] >= 2 * 5
    # of the logits, once in float32, and their gradient as the head's product takes it
    logits = Counter(f.shape.dtype for f in written if f.shape.dims[-1:] == (DECODER.vocab_size,))
    assert logits["f32"] == 1
    # the stacked codes are read where they are; only slices of a layer are copied
    assert not any(f.shape.dtype == "u8" and f.shape.elements > 512 * 1408 // 2 for f in written)


def test_dequantization_is_one_fused_kernel_a_product(plain: Compiled):
    found = plain.audit(plain.text)
    assert all((d.kernels, d.products, d.others) == (1, 1, ()) for d in found.decodes)
    times = Counter(d.where for d in found.decodes)
    assert times["forward"] == LINEARS
    # layers are recomputed: twice in the backward, but for linears whose result nothing reads
    assert LINEARS < times["backward"] < 2 * LINEARS


def test_state_is_updated_in_place(plain: Compiled):
    have, want = plain.audit(plain.text).in_place
    assert have == want >= 3 * 2 * LINEARS  # two matrices a linear, each with two moments


def test_a_kernel_is_decoded_once_more_in_the_backward_if_layers_are_not_recomputed(tmp_path: Path):
    compiled = compile_step(tmp_path, remat="none")
    assert compiled.answer["problems"] == []
    found = compiled.audit(compiled.text)
    assert Counter(d.where for d in found.decodes) == {"forward": LINEARS, "backward": LINEARS}


def test_streamed_codes_are_copied_beside_products(tmp_path: Path):
    compiled = compile_step(tmp_path, streamed=True)
    found = compiled.audit(compiled.text)
    assert Counter(c.where for c in found.copies) == {"forward": LINEARS, "backward": LINEARS}
    if jax.__version_info__ >= (0, 11):
        assert compiled.answer["problems"] == []
    else:  # the older scheduler puts less beside copies; at 7B most of the bytes, not so here
        assert len(compiled.answer["problems"]) <= 1 and any(c.beside for c in found.copies)
    held = [f for f in found.findings if f.opcode == "parameter" and f.shape.dtype == "u8"]
    assert held and all(f.shape.host for f in held)


# --- an audit that cannot fail is none ---------------------------------------------------------


def spoil(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


def test_a_dense_float32_weight_is_found(plain: Compiled):
    found = plain.audit(spoil(plain.text, "= bf16[1408,8,64]", "= f32[1408,8,64]"))
    assert any("f32[1408,8,64] in the forward" in one for one in found.problems())


def test_a_dense_copy_of_a_weight_is_found(plain: Compiled):
    fused = next(
        line for line in plain.text.splitlines() if " = bf16[1408,8,64]{2,1,0} fusion" in line
    )
    name = fused.split(" = ")[0].split("%")[-1]
    copy = f"  %copied = bf16[1408,512]{{0,1}} copy(%{name})"
    found = plain.audit(spoil(plain.text, fused, f"{fused}\n{copy}"))
    problems = "\n".join(found.problems())
    assert "bf16[1408,512] in the" in problems and "(copy, )" in problems
    assert "read by 1 products, copy: expected one kernel and one product" in problems


def test_unpacked_codes_are_found(plain: Compiled):
    found = plain.audit(spoil(plain.text, "= bf16[1408,8,64]", "= u8[1408,512]"))
    assert any("u8[1408,512]" in one for one in found.problems())


def test_copies_that_nothing_runs_beside_are_found(plain: Compiled):
    copies = [Copy("forward", Shape("u8", (512, 256), False), beside) for beside in (0, 3)]
    quiet = plain.audit(plain.text)._replace(copies=copies)
    assert "50% of the bytes copied from the host" in quiet.problems()[0]
    assert not quiet._replace(copies=copies[1:]).problems()


def test_state_that_is_not_donated_is_found(plain: Compiled):
    found = plain.audit(spoil(plain.text, "{0}: (0, {}, may-alias), ", ""))
    assert any(one.startswith("1 of ") and "not donated" in one for one in found.problems())


# --- reading a program -------------------------------------------------------------------------

SMALL = """\
HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias) }, layout={}

%fused (param: u8[4,8]) -> f32[4,8] {
  %param = u8[4,8]{1,0} parameter(0)
  ROOT %convert = f32[4,8]{1,0} convert(%param)
}

%body (carry: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %carry = (s32[], /*index=1*/f32[4,8]{1,0}) parameter(0)
  %got = f32[4,8]{1,0} get-tuple-element(%carry), index=1
  %start = ((u8[2,4,8]{2,1,0:S(5)}, s32[]), u8[4,8]{1,0}, u32[]) fusion-start(%got), calls=%fused
  %done = u8[4,8]{1,0} fusion-done(%start)
  ROOT %made = f32[4,8]{1,0} fusion(%done), calls=%fused, metadata={op_name="jit(f)/mul"}
}

ENTRY %main (a: f32[4,8], b: f32[4,8]) -> f32[4,8] {
  %b = f32[4,8]{1,0} parameter(1)
  %a = f32[4,8]{1,0:S(5)} parameter(0)
  %t = (f32[4,8]{1,0}, f32[4,8]{1,0}) tuple(%a, %b)
  %copy-start.1 = (f32[4,8]{1,0}, f32[4,8]{1,0:S(5)}, u32[]) copy-start(%a)
  ROOT %loop = f32[4,8]{1,0} while(%t), condition=%fused, body=%body
}
"""


def test_a_program_is_read():
    program = Program(SMALL)
    assert program.entry == "main" and program.aliased == {1}
    assert [one.name for one in program.arguments()] == ["a", "b"]
    assert [one.results[0].host for one in program.arguments()] == [True, False]
    executed = dict(program.executed())
    assert set(executed) == {"main", "body", "fused"}  # the fusion only as this loop's condition
    buffers = {one.name: one.results for one in executed["body"] if is_buffer(one)}
    assert buffers == {
        "start": (Shape("u8", (4, 8), False),),
        "made": (Shape("f32", (4, 8), False),),
    }
    made = executed["body"][-1]
    assert (made.origin, made.operands, made.calls) == ("jit(f)/mul", ("done",), ("fused",))
    assert [one.opcode for one in program.inside(made)] == ["parameter", "convert"]
    (copy,) = (one for one in executed["main"] if one.opcode == "copy-start")
    assert copy.results == (Shape("f32", (4, 8), False),) and copy.results[0].nbytes == 128
