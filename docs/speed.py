# SPDX-License-Identifier: Apache-2.0
"""Writes docs/speed.md and its picture from what the step benchmark measured.

    python benchmarks/train_step.py --torch-python REF --qwix-python REF --output docs/speed.json
    python docs/speed.py [docs/speed.json]

No figure there is typed by hand.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS, COLORS = "jax_qlora NF4", ("#2f6fb5", "#9fc1e3", "#d9631e", "#7b8794")
PANELS = (
    ("step_s", "seconds a step"),
    ("train_peak_mib", "MiB at most while training"),
    ("start_s", "seconds until the first loss"),
)

Row = dict[str, Any]


def cells(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each dtype and remat setting, in order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["dtype"], row["remat"]), []).append(row)
    return found


def page(record: dict[str, Any]) -> str:
    """The page."""
    about, rows = record["about"], record["rows"]
    names = (
        "layers",
        "hidden",
        "intermediate",
        "heads",
        "kv_heads",
        "vocab",
        "batch",
        "seq",
        "rank",
    )
    shape = ", ".join(f"{name} {about[name]}" for name in names)
    versions = {row["side"]: row["versions"] for row in rows}
    lines = [
        "# Speed and memory of a step",
        "",
        "Written by [`speed.py`](speed.py) from what "
        "[`benchmarks/train_step.py`](../benchmarks/train_step.py) measured on "
        f"{about['cpus']} CPUs of {about['machine']}. A random decoder of Llama's architecture: "
        f"{shape}. NF4, LoRA on all linears of the layers, AdamW. In each cell all sides run at "
        "once, each in a process "
        f"of its own, and step in turn, {about['rounds']} times after a warm-up; a ratio is the "
        "median over rounds of the ratio within one.",
        "",
        "![Time and memory of a step](images/speed.png)",
        "",
        "| | | a step, s | NF4 against it | first loss, s | peak MiB | while training |",
        "|---|---|---|---|---|---|---|",
    ]
    for (dtype, remat), group in cells(rows).items():
        for row in group:
            lines.append(
                f"| {dtype}, {_words(remat)} | {row['side']} | {row['step_s']:.3f} | "
                f"{row['nf4_ratio']:.2f} | {row['start_s']:.1f} | "
                f"{row['peak_mib']:.0f} | {row['train_peak_mib']:.0f} |"
            )
    lines += [
        "",
        "- **NF4 against it**: the time of our 4-bit step as a part of this side's.",
        "- **first loss**: making and quantizing the model, compiling, and one step.",
        "- **peak**: resident memory of the whole process at its worst moment, with interpreter, "
        "libraries and compiler; **while training** leaves out what building took.",
        "- Ours and PEFT + bitsandbytes quantize the constants too (double quantization), Qwix "
        "does not. Qwix's side is unrolled Flax NNX, as its users write it; ours is scanned.",
        "",
        "| side | versions |",
        "|---|---|",
        *(f"| {name} | {text} |" for name, text in versions.items()),
    ]
    return "\n".join(lines) + "\n"


def picture(record: dict[str, Any]) -> bytes:
    """Bars of each panel, a group for each cell."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = cells(record["rows"])
    sides = list(dict.fromkeys(row["side"] for row in record["rows"]))
    figure = Figure(figsize=(10, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (key, title) in enumerate(PANELS):
        axes = figure.add_subplot(1, len(PANELS), place + 1)
        for number, (side, color) in enumerate(zip(sides, COLORS, strict=False)):
            heights = [
                next((row[key] for row in group if row["side"] == side), 0)
                for group in groups.values()
            ]
            at = [group + (number - (len(sides) - 1) / 2) / (len(sides) + 1)
                  for group in range(len(groups))]  # fmt: skip
            axes.bar(at, heights, 1 / (len(sides) + 1), color=color, label=side)
        axes.set_title(title, loc="left", fontsize=10, color="#1f2933")
        axes.set_xticks(range(len(groups)), [f"{d}\n{_words(r)}" for d, r in groups])
        axes.tick_params(length=0, labelsize=7, colors="#1f2933")
        for spine in ("top", "right", "left"):
            axes.spines[spine].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(sides), frameon=False, fontsize=8)  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _words(remat: str) -> str:
    return {"none": "kept", "full": "recomputed"}[remat]


def main(source: Path) -> None:
    """Writes the page and the picture."""
    record = json.loads(source.read_text("utf-8"))
    (HERE / "images").mkdir(exist_ok=True)
    (HERE / "images" / "speed.png").write_bytes(picture(record))
    (HERE / "speed.md").write_text(page(record), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "speed.json")
