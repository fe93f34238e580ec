# SPDX-License-Identifier: Apache-2.0
"""The loss curve."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from .metrics import Record

_INK, _SOFT, _BLUE, _ORANGE = "#1f2933", "#7b8794", "#2f6fb5", "#d9631e"


def draw_losses(records: Sequence[Record], *, title: str) -> bytes:
    """Return a PNG of the training loss (each step, and smoothed) and the held-out loss.

    Args:
        records: From `read_metrics`: training records have "loss", measurements "held_out_loss".
        title: A line above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    held_out = [(r["step"], r["held_out_loss"]) for r in records if _has(r, "held_out_loss")]

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = np.array(train).T
        axes.plot(steps, losses, color=_BLUE, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth(losses), color=_BLUE, linewidth=2, label="training (smoothed)")
    if held_out:
        steps, losses = np.array(held_out).T
        axes.plot(steps, losses, "o-", color=_ORANGE, linewidth=1.5, markersize=6, zorder=3,
                  markeredgecolor="white", label="held out")  # fmt: skip
        for step, loss, side in [(*held_out[0], "left"), (*held_out[-1], "right")][: len(held_out)]:
            axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 9),
                          ha=side, color=_ORANGE, fontweight="bold", fontsize=11)  # fmt: skip
    axes.set_title(title, loc="left", color=_INK, fontsize=12, fontweight="bold")
    axes.set_xlabel("optimizer step", color=_SOFT)
    axes.set_ylabel("loss (nats per answer token)", color=_SOFT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02, y=0.12)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cbd2d9")
    if train or held_out:
        axes.legend(frameon=False, labelcolor=_INK, loc="upper right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def smooth(values: Any, *, weight: float = 0.8) -> np.ndarray:
    """Return the running mean with exponentially fading weights, without a bias at the start.

    >>> smooth(np.array([1.0, 1.0, 1.0]))
    array([1., 1., 1.])

    Args:
        values: One number per step.
        weight: Of the past against the present.
    """
    total = norm = 0.0
    means = []
    for value in values:
        total, norm = weight * total + value, weight * norm + 1.0
        means.append(total / norm)
    return np.array(means)


def _has(record: Record, name: str) -> bool:
    return record.get(name) is not None
