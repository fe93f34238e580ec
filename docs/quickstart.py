# SPDX-License-Identifier: Apache-2.0
"""Puts a finished run into the README: python docs/quickstart.py runs/quickstart [machine].

Copies the loss curve and the figures of the run beside this file, and writes the block of the
README between the two markers from them. No figure there is typed by hand.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RECORD = HERE / "quickstart.json"
PICTURE = HERE / "images" / "quickstart.png"
BEGIN, END = "<!-- written by docs/quickstart.py -->\n", "<!-- end -->\n"
SAMPLES = 3


def render(record: dict[str, Any]) -> str:
    """The block of the README, from what `RECORD` holds."""
    run = record["run"]
    rows = [
        ("held-out loss", "{:.3f}", run["held_out_loss_before"], run["held_out_loss_after"]),
        (
            f"chrF of {run['answers']} answers (copying the verse: {run['chrf_copy']:.1f})",
            "{:.1f}",
            run["chrf_base"],
            run["chrf_tuned"],
        ),
        ("answers with an archaic word", "{:.0%}", run["archaic_base"], run["archaic_tuned"]),
    ]
    lines = [
        "![Training and held-out loss of the quickstart](docs/images/quickstart.png)",
        "",
        "| | base | tuned |",
        "|---|---|---|",
        *(f"| {name} | {form.format(a)} | {form.format(b)} |" for name, form, a, b in rows),
        "",
        f"{run['steps']} steps in {run['train_seconds'] / 60:.1f} minutes on {record['machine']}, "
        f"{run['tokens_per_second']:.0f} tokens/s, {run['peak_host_bytes'] / 1e9:.1f} GB at most. "
        "One run, one seed. Part of the gain is learning what an answer looks like, meaning is not "
        "measured, and the model has likely seen both texts before.",
        "",
        "| held-out verse | base | tuned |",
        "|---|---|---|",
        *(
            f"| {_cell(s['prompt'])} | {_cell(s['base'])} | {_cell(s['tuned'])} |"
            for s in record["samples"]
        ),
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 220 else text[:220].rsplit(" ", 1)[0] + " …"


def block(page: str) -> tuple[str, str, str]:
    """A page as what stands before, between and after the markers."""
    before, _, rest = page.partition(BEGIN)
    middle, _, after = rest.partition(END)
    return before, middle, after


def main(run: Path, machine: str) -> None:
    """Copies, records and writes."""
    with open(run / "samples.jsonl", encoding="utf-8") as lines:
        samples = [json.loads(line) for line, _ in zip(lines, range(SAMPLES), strict=False)]
    figures = json.loads((run / "run.json").read_text("utf-8"))
    record = {"machine": machine, "run": figures, "samples": samples}
    RECORD.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
    PICTURE.parent.mkdir(exist_ok=True)
    shutil.copyfile(run / "loss.png", PICTURE)
    before, _, after = block(README.read_text("utf-8"))
    README.write_text(before + BEGIN + render(record) + END + after, "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "this machine")
