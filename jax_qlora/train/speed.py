# SPDX-License-Identifier: Apache-2.0
"""How much of its device a run uses: operations that the model takes, by the second."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ..costs.roofline import model_flops, peak_flops
from ..evaluate import Batch
from ..models import DecoderConfig
from ..report import Record


def batch_flops(decoder: DecoderConfig, batch: Batch, *, full: bool) -> float:
    """Operations that a step with this batch takes; padding and recomputation do not count.

    Args:
        decoder: The model's shape.
        batch: Bool "attention_mask" and "loss_mask", `[..., seq]`.
        full: Whether every weight trains.
    """
    lengths = np.asarray(batch["attention_mask"]).sum(axis=-1, dtype=np.int64)
    return model_flops(
        decoder,
        full=full,
        tokens=int(lengths.sum()),
        answers=int(np.asarray(batch["loss_mask"])[..., 1:].sum()),
        pairs=int((lengths * (lengths + 1) // 2).sum()),
    )


def speed_figures(records: Sequence[Record]) -> dict[str, Any]:
    """Return the operations a second of a run and, if the device is known, their share of its peak.

    Args:
        records: The metrics, whose steps have "flops" and "seconds".
    """
    steps = [r for r in records if "flops" in r]
    seconds = sum(r["seconds"] for r in steps)
    achieved = sum(r["flops"] for r in steps) / seconds if seconds else None
    peak = peak_flops(jax.devices()[0].device_kind)
    share = achieved / peak if achieved is not None and peak is not None else None
    return {
        "model_flops_per_second": achieved,
        "peak_flops_per_second": peak,
        "model_flops_utilization": None if share is None else round(share, 4),
    }


def describe_speed(figures: dict[str, Any]) -> str:
    """Return `speed_figures` in words: "41.2 TFLOP/s, 25% of the peak", "48.3 GFLOP/s"."""
    achieved, share = figures["model_flops_per_second"], figures["model_flops_utilization"]
    if achieved is None:
        return "?"
    scale, unit = (1e12, "TFLOP/s") if achieved >= 1e12 else (1e9, "GFLOP/s")
    text = f"{achieved / scale:,.1f} {unit}"
    return text if share is None else f"{text}, {share:.0%} of the peak"
