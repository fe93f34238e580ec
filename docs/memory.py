# SPDX-License-Identifier: Apache-2.0
"""Writes docs/memory.md: what XLA's CUDA compiler plans for well-known cases.

    python docs/memory.py        about ten minutes; needs pip install 'jax-qlora[fit,train]'

No figure there is typed by hand. Nothing is run on a GPU.
"""

import dataclasses
import platform
from pathlib import Path

import jax

import jax_qlora as jq
from jax_qlora.costs.gpus import GIB
from jax_qlora.models.presets import PRESETS
from jax_qlora.planner import Report

PAGE = Path(__file__).parent / "memory.md"

# Llama 3.1 8B with a longer context than it was trained for
LONGER = dataclasses.replace(PRESETS["llama-3.1-8b"], max_length=1 << 19)

# (what, model, GPU, settings)
CASES = [
    ("7B on 24 GB", "llama-2-7b", "rtx4090", {}),
    ("7B, nothing recomputed", "llama-2-7b", "rtx4090", {"remat": "none"}),
    ("7B without double quantization", "llama-2-7b", "rtx4090", {"double_quant": False}),
    ("7B, LoRA on 16-bit weights", "llama-2-7b", "rtx4090", {"method": "lora"}),
    ("7B, full fine-tuning", "llama-2-7b", "a100-80", {"method": "full"}),
    ("13B, 8-bit optimizer", "llama-2-13b", "rtx4090", {"rank": 64, "state": "8bit"}),
    ("33B on 24 GB", "llama-33b", "rtx4090", {"remat": "offload"}),
    (
        "33B rank 64 on 24 GB",
        "llama-33b",
        "rtx4090",
        {"rank": 64, "placement": "host", "remat": "offload", "layer_chunk": 256},
    ),
    ("65B on 48 GB", "llama-65b", "a6000", {"remat": "offload"}),
    (
        "65B rank 64 on 48 GB",
        "llama-65b",
        "a6000",
        {"rank": 64, "placement": "host", "remat": "offload"},
    ),
    ("65B without double quantization", "llama-65b", "a6000", {"double_quant": False}),
    (
        "65B streamed, on a 12 GB card",
        "llama-65b",
        "rtx4090",
        {"memory": "12GB", "streamed": True, "remat": "offload"},
    ),
    (
        "65B streamed, 2048 tokens",
        "llama-65b",
        "rtx4090",
        {"memory": "12GB", "streamed": True, "remat": "offload", "seq": 2048},
    ),
    (
        "65B streamed, rank 64",
        "llama-65b",
        "rtx4090",
        {
            "memory": "12GB",
            "streamed": True,
            "rank": 64,
            "placement": "host",
            "remat": "offload",
        },
    ),
    ("Mixtral 8x7B on 48 GB", "mixtral-8x7b", "a6000", {}),
    (
        "Mixtral 8x7B, 4096 tokens",
        "mixtral-8x7b",
        "a6000",
        {"seq": 4096, "remat": "offload", "placement": "host"},
    ),
    ("30B of 128 experts, 2048 tokens", "qwen3-30b-a3b", "rtx4090", {"seq": 2048}),
    (
        "8B, 2 x 2048 tokens",
        "llama-3.1-8b",
        "rtx4090",
        {"rank": 8, "batch_size": 2, "seq": 2048, "layer_chunk": 512, "loss_chunk": 256},
    ),
    (
        "8B, 2 x 2048 tokens, layer inputs on the host",
        "llama-3.1-8b",
        "rtx4090",
        {
            "rank": 8,
            "batch_size": 2,
            "seq": 2048,
            "layer_chunk": 512,
            "loss_chunk": 256,
            "remat": "offload",
        },
    ),
    (
        "8B, 8,192 tokens on an 8 GB card",
        "llama-3.1-8b",
        "rtx4090",
        {
            "memory": "8GB",
            "rank": 32,
            "seq": 8192,
            "layer_chunk": 512,
            "loss_chunk": 256,
            "remat": "offload",
            "placement": "host",
        },
    ),
    (
        "8B, 40,960 tokens",
        "llama-3.1-8b",
        "rtx4090",
        {"rank": 32, "seq": 40_960, "remat": "offload"},
    ),
    (
        "8B, 78,848 tokens",
        "llama-3.1-8b",
        "rtx4090",
        {"rank": 32, "seq": 78_848, "remat": "offload"},
    ),
    (
        "8B, 343,040 tokens",
        LONGER,
        "rtx4090",
        {"rank": 32, "seq": 343_040, "remat": "offload"},
    ),
    (
        "8B, 260,096 tokens, nothing on the host",
        LONGER,
        "a100-80",
        {"rank": 32, "seq": 260_096},
    ),
]
SETTINGS = [
    (
        "`train.remat`",
        "what the backward computes again: `none`, nothing that costs a matmul; `dots`, attention "
        "too; `full`, each layer from its input; `offload`, the same, the inputs in host memory",
    ),
    ("`optim.state`", "moments in float32, bfloat16 or 8 bits: 8, 4 or 2.03 bytes a parameter"),
    ('`optim.placement = "host"`', "moments in host memory, visiting the device for each step"),
    (
        "`quant.streamed = true`",
        "4-bit weights in host memory, each layer fetched when it is used, forward and backward",
    ),
    (
        "`train.layer_chunk`, `train.loss_chunk`",
        "tokens that go through a layer, and through the output head, at once",
    ),
]
COMPARED = """What others publish of such cases, measured on cards: torchtune, in its README,
7.4 GiB for the 8B model at rank 8 with 2 x 2048 tokens; Unsloth, in its notes on long context,
2,972 tokens of the 8B model at rank 32 on 8 GB, 40,724 on 16 GB, 78,475 on 24 GB and 342,733 on
80 GB. Theirs ran; these are plans."""
DEFAULT = "rank 16, batch 1, 512 tokens, layers recomputed"


def row(what: str, changes: dict, report: Report) -> str:
    """One line of the table."""
    settings = ", ".join(f"{key} {value}" for key, value in changes.items()) or DEFAULT
    least = max(report.step_seconds.items(), key=lambda item: item[1])
    cells = (
        what,
        settings,
        report.gpu.removeprefix("NVIDIA "),
        f"{report.device_bytes / GIB:.2f}",
        f"{report.host_bytes / GIB:.2f}",
        f"{report.capacity / GIB:.2f}",
        report.verdict,
        f"{least[1]:.2f} ({least[0]})",
    )
    return "| " + " | ".join(cells) + " |"


def page(rows: list[str]) -> str:
    """The page that holds these rows."""
    settings = ["| setting | effect |", "|---|---|"]
    settings += [f"| {name} | {effect} |" for name, effect in SETTINGS]
    return f"""# What fits

Written by [`memory.py`](memory.py) with jax {jax.__version__}, Python {platform.python_version()}.
Each row is the trainer's own step, compiled by XLA's CUDA compiler for a card that was not there:
**the compiler's plan; nothing was run.** "Fits" leaves 1 GiB of the card free. Where not said
otherwise: {DEFAULT}, NF4 and double quantization, LoRA on all linears of the layers, float32
adapters and moments.

`jax-qlora fit --model NAME --gpu NAME` answers the same for any model and settings.

| case | settings | card | device GiB | host GiB | of GiB | | least seconds a step |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

{COMPARED}

What the settings do:

{chr(10).join(settings)}

The last column is the larger of arithmetic, memory traffic and bus at their peaks: a bound from
below, which no real step reaches.
"""


def main() -> None:
    """Compiles every case and writes the page."""
    rows = []
    for what, model, gpu, changes in CASES:
        report = jq.fit(model, gpu=gpu, **changes)
        if report.note:
            raise SystemExit(report.note)
        rows.append(row(what, changes, report))
        print(rows[-1], flush=True)
    PAGE.write_text(page(rows), "utf-8")


if __name__ == "__main__":
    main()
