# SPDX-License-Identifier: Apache-2.0
"""What the planner found, for people and for programs."""

import dataclasses
import io
from typing import Any

from ..config import Config, describe_adapter
from ..costs.advice import verdict
from ..costs.formula import Bytes
from ..costs.gpus import GIB
from ..lora.summary import table

_PARTS = ("base", "constants", "trainable", "optimizer", "temporaries")
_COLORS = ("#2f6fb5", "#8fb8de", "#d9631e", "#f0b48a", "#9aa5b1")
_WORDS = {
    "base": "frozen weights",
    "constants": "their block constants",
    "trainable": "what trains",
    "optimizer": "optimizer state",
    "temporaries": "activations, gradients, decoded kernels",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Whether a run fits.

    Attributes:
        model: The model's name.
        gpu: The card's name.
        capacity: Bytes of the card.
        margin: Bytes of it that are to stay free.
        seq: Tokens of a row.
        config: Settings of the run.
        planned: Bytes by part.
        source: Where they come from: the compiler, or the formula.
        note: Why the compiler did not answer, if it was asked and did not.
        seconds: How long it compiled.
        most: The longest sequence, largest batch and highest rank that fit (estimates).
        changes: What each option would need (estimates).
        step_seconds: The least time of a step by resource.
    """

    model: str
    gpu: str
    capacity: int
    margin: int
    seq: int
    config: Config
    planned: Bytes
    source: str
    note: str
    seconds: float
    most: dict[str, int]
    changes: list[tuple[str, Bytes]]
    step_seconds: dict[str, float]

    @property
    def device_bytes(self) -> int:
        """Bytes on the card at the worst moment of a step."""
        return self.planned.device

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory that the step uses."""
        return self.planned.host

    @property
    def fits(self) -> bool:
        """Whether it fits, with the margin to spare."""
        return self.verdict == "fits"

    @property
    def verdict(self) -> str:
        """In words: "fits", "tight" (without the margin) or "does not fit"."""
        return verdict(self.device_bytes, self.capacity, self.margin)

    @property
    def breakdown(self) -> dict[str, int]:
        """Bytes on the card by part, "host", and "headroom" on the card (may be negative)."""
        parts = {name: getattr(self.planned, name) for name in _PARTS}
        return {
            **parts,
            "host": self.host_bytes,
            "headroom": self.capacity - self.device_bytes,
        }

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "model": self.model,
            "gpu": self.gpu,
            "seq": self.seq,
            "capacity_bytes": self.capacity,
            "margin_bytes": self.margin,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "fits": self.fits,
            "verdict": self.verdict,
            "breakdown": self.breakdown,
            "source": self.source,
            "note": self.note,
            "compile_seconds": self.seconds,
            "most": self.most,
            "changes": {
                name: {"device_bytes": needed.device, "host_bytes": needed.host}
                for name, needed in self.changes
            },
            "step_seconds_at_least": self.step_seconds,
            "settings": dataclasses.asdict(self.config),
        }

    def __str__(self) -> str:
        config, train = self.config, self.config.train
        method = config.method
        if method != "full":
            method += f" {describe_adapter(config)}"
        rows = [(name, _gib(getattr(self.planned, name)), _WORDS[name]) for name in _PARTS]
        rows += [
            ("device", _gib(self.device_bytes), f"of {_gib(self.capacity)} GiB: {self.verdict}"),
            ("headroom", _gib(self.capacity - self.device_bytes),
             f"{_gib(self.margin)} GiB of it are kept free"),
            ("host", _gib(self.host_bytes), "streamed weights, paged moments, layer inputs"),
        ]  # fmt: skip
        least = max(self.step_seconds, key=lambda name: self.step_seconds[name])
        lines = [
            f"{self.model} on {self.gpu}: {method}, {train.batch_size} x {self.seq} tokens, "
            f"remat {train.remat}: {self.verdict.upper()}",
            self.bar(),
            "",
            table(("part", "GiB", ""), rows),
            "",
            "Planned by " + self.source + (f" in {self.seconds} s." if self.seconds else "."),
            "Nothing was run. "
            f"A step takes at least {self.step_seconds[least]:.2f} s ({least} at its peak).",
        ]
        if self.note:
            lines.insert(-1, f"Not compiled: {self.note}")
        lines += ["", "Largest that fits, all else as it is (estimates; 0: none)"]
        lines += [f"  {name:<16} {value:,}" for name, value in self.most.items()]
        lines += ["", "What a change would need (estimates)"]
        changes = [
            (name, _gib(needed.device), _signed(needed.device - self.device_bytes),
             _gib(needed.host), verdict(needed.device, self.capacity, self.margin))
            for name, needed in self.changes
        ]  # fmt: skip
        lines.append(table(("change", "device GiB", "", "host GiB", ""), changes))
        return "\n".join(lines)

    def bar(self, *, width: int = 60) -> str:
        """The card as one line: a letter for each share of its memory, dots for what is free."""
        letters = dict(zip(_PARTS, "BCTOA", strict=True))
        total = max(self.capacity, self.device_bytes)
        text = ""
        filled = 0.0
        for name in _PARTS:
            filled += getattr(self.planned, name) * width / total
            text += letters[name] * (round(filled) - len(text))
        end = round(self.capacity * width / total)
        text = text.ljust(end, ".")
        legend = " ".join(f"{letters[name]} {name}" for name in _PARTS)
        over = "" if len(text) <= end else f"  ({len(text) - end} columns over)"
        return f"[{text[:end]}|{text[end:]}]{over}\n {legend}"

    def picture(self) -> bytes:
        """A PNG of the same bar, with what each option would need below it."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows = [("this plan", self.planned), *self.changes]
        figure = Figure(figsize=(9, 1.2 + 0.36 * len(rows)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        limit = 1.6 * self.capacity / GIB
        for place, (_, needed) in enumerate(rows):
            left = 0.0
            for part, color in zip(_PARTS, _COLORS, strict=True):
                size = getattr(needed, part) / GIB
                axes.barh(place, size, left=left, color=color, height=0.7,
                          alpha=1.0 if place == 0 else 0.6)  # fmt: skip
                left += size
            axes.text(min(left, limit) + 0.01 * limit, place, f"{needed.device / GIB:.1f}",
                      va="center", fontsize=8, color="#1f2933")  # fmt: skip
        for size, style, words in (
            (self.capacity, "-", f"{self.gpu}: {self.capacity / GIB:.1f} GiB"),
            (self.capacity - self.margin, ":", f"less {self.margin / GIB:.0f} GiB of margin"),
        ):
            axes.axvline(size / GIB, color="#1f2933", linestyle=style, linewidth=1.2, label=words)
        for part, color in zip(_PARTS, _COLORS, strict=True):
            axes.barh(0, 0, color=color, label=_WORDS[part])
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * limit)
        axes.set_xlabel("GiB on the card (below the first bar: estimates)", color="#7b8794")
        axes.set_title(f"{self.model}, {self.config.method}, {self.config.train.batch_size} x "
                       f"{self.seq} tokens: {self.verdict}", loc="left", fontweight="bold",
                       color="#1f2933", fontsize=11)  # fmt: skip
        axes.tick_params(length=0, colors="#1f2933", labelsize=8)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False, fontsize=7, loc="lower right")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _signed(size: int) -> str:
    return f"{size / GIB:+.2f}"
