# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: the adapter, figures, a loss curve, one page to read."""

import json
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..config import Config, describe_adapter, to_toml
from ..data.metrics import archaic_share, chrf
from ..lora import relative_to_start, split_virtual
from ..models import Model
from ..report import Display, Record, draw_losses, write_json, write_page, write_text
from ..typing import PyTree
from .answers import Answers
from .speed import describe_speed, speed_figures

_REWRITES = ("modern-english",)  # data where copying the prompt is an answer to be compared with


def finish(
    config: Config,
    model: Model,
    trainable: PyTree,
    start: PyTree | None,
    records: Sequence[Record],
    answers: Answers,
    about: Mapping[str, Any],
    show: Display,
) -> dict[str, Any]:
    """Write the adapter, answers, loss curve, figures and page; print what matters most.

    Args:
        config: Settings of the run.
        model: What was trained.
        trainable: The adapter, or all weights.
        start: The adapter before the first step if it was taken out of the weights, or None.
        records: The metrics.
        answers: Before and after.
        about: What else `run.json` is to hold.
        show: Where to print.

    Returns:
        The figures, as in `run.json`.
    """
    run = Path(config.output)
    exported = _export(config, model, trainable, start, run)
    rows = [
        {"prompt": p.shown, "reference": p.reference, "base": before, "tuned": after}
        for p, before, after in zip(answers.prompts, answers.before, answers.after, strict=True)
    ]
    write_text(
        run / "samples.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    )
    speed = speed_figures(records)
    figures = {**about, **_losses(records), **speed, **_scores(config, rows), **_machine()}
    name = Path(config.model).name
    adapter = f", {describe_adapter(config)}" if config.method != "full" else ""
    title = f"{name}: {config.method}{adapter} on {Path(config.data.source).name}"
    picture = draw_losses(records, title=title)
    write_text(run / "loss.png", picture)
    write_page(
        run / "report.html",
        title=title,
        figures=_cards(figures),
        picture=picture,
        samples=rows[: max(config.eval.samples, 12)],
        notes=_notes(figures),
        settings=to_toml(config),
    )
    write_json(run / "run.json", figures)  # last: its presence says that the run is complete
    _print_outcome(config, rows, figures, exported, run, show)
    return figures


def _export(
    config: Config, model: Model, trainable: PyTree, start: PyTree | None, run: Path
) -> Path:
    if config.method == "full":
        from ..interop.hf_write import save_hf

        written = save_hf(
            run / "model",
            trainable,
            model.config,
            tokenizer=model.tokenizer,
            overwrite=True,  # of a run that was cut short here
        )
        return written.path
    from ..interop.peft import save_adapter

    # PEFT has the two in directories of their own
    adapter, virtual = split_virtual(trainable)
    if virtual:
        save_adapter(run / "prompt", virtual, model, base_model=config.model)
    if not adapter:
        return run / "prompt"
    save_adapter(
        run / "adapter",
        adapter if start is None else relative_to_start(adapter, start),
        model,
        base_model=config.model,
        tokenizer=model.tokenizer if config.data.new_tokens else None,
    )
    return run / "adapter"


def _losses(records: Sequence[Record]) -> dict[str, Any]:
    held_out = [r["held_out_loss"] for r in records if r.get("held_out_loss") is not None]
    steps = [r for r in records if "loss" in r]
    seconds = [r["seconds"] for r in steps]
    return {
        "steps": len(steps),
        "held_out_loss_before": held_out[0] if held_out else None,
        "held_out_loss_after": held_out[-1] if held_out else None,
        "train_seconds": round(sum(seconds), 1),
        "seconds_per_step": round(float(np.median(seconds)), 3) if seconds else None,
        "tokens": sum(r["tokens"] for r in steps),
        "tokens_per_second": round(sum(r["tokens"] for r in steps) / max(sum(seconds), 1e-9), 1),
    }


def _scores(config: Config, rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    if not rows:
        return {}
    texts = {key: [row[key] for row in rows] for key in rows[0]}
    scores: dict[str, Any] = {"answers": len(rows)}
    for name in ("base", "tuned"):
        scores[f"chrf_{name}"] = round(chrf(texts[name], texts["reference"]), 2)
    if config.data.source in _REWRITES:
        scores["chrf_copy"] = round(chrf(texts["prompt"], texts["reference"]), 2)
        for name in ("base", "tuned", "reference"):
            scores[f"archaic_{name}"] = round(archaic_share(texts[name]), 4)
    return scores


def _machine() -> dict[str, Any]:
    device = jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "device": device.device_kind if device.platform != "cpu" else f"cpu ({platform.machine()})",
        "peak_device_bytes": peak,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def _cards(figures: dict[str, Any]) -> dict[str, str]:
    """The figures that matter most, in words."""
    cards = {
        "held-out loss (nats per answer token)": _change(
            figures["held_out_loss_before"], figures["held_out_loss_after"], ".3f"
        )
    }
    if "chrf_base" in figures:
        name = f"chrF of {figures['answers']} answers"
        if "chrf_copy" in figures:
            name += f" (copying the prompt: {figures['chrf_copy']:.1f})"
        cards[name] = _change(figures["chrf_base"], figures["chrf_tuned"], ".1f")
    if "archaic_base" in figures:
        shares = figures["archaic_base"], figures["archaic_tuned"]
        cards["answers with an archaic word"] = _change(*shares, ".0%")
    cards["training time"] = f"{figures['train_seconds'] / 60:.1f} min"
    cards["tokens per second"] = f"{figures['tokens_per_second']:,.0f}"
    cards["arithmetic of the model, by the second"] = describe_speed(figures)
    cards["peak memory of the process"] = f"{figures['peak_host_bytes'] / 1e9:.2f} GB"
    if figures["peak_device_bytes"]:
        cards["peak memory of the device"] = f"{figures['peak_device_bytes'] / 1e9:.2f} GB"
    return cards


def _change(before: float | None, after: float | None, form: str) -> str:
    return f"{_number(before, form)} \u2192 {_number(after, form)}"


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def _notes(figures: dict[str, Any]) -> list[str]:
    notes = [
        "One run with one seed: another seed gives somewhat different figures. The untrained model "
        "also loses points for form (explaining instead of answering), so part of any gain is "
        "learning what an answer looks like."
    ]
    if "chrf_copy" in figures:
        notes.append(
            "chrF counts shared character n-grams with the reference (0 to 100). The two "
            "translations are close, so copying the prompt already scores "
            f"{figures['chrf_copy']:.1f}. Meaning is not measured: some rewritten verses lose a "
            "part of theirs, and the model has likely seen both texts when it was pretrained."
        )
    return notes


def _print_outcome(
    config: Config,
    rows: Sequence[dict[str, str]],
    figures: dict[str, Any],
    exported: Path,
    run: Path,
    show: Display,
) -> None:
    for row in rows[: config.eval.samples]:
        show.print()
        for name, style in (("prompt", "dim"), ("base", "red"), ("tuned", "green")):
            show.field(name, row[name], style)
    show.print()
    for name, value in _cards(figures).items():
        show.field(value, name)
    show.print()
    for path, what in (
        (exported, "what was learned"),
        (run / "report.html", "all of this on one page"),
        (run / "samples.jsonl", "every answer, before and after"),
        (run / "metrics.jsonl", "loss and speed of every step"),
    ):
        show.field(str(path), what)
