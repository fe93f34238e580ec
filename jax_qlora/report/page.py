# SPDX-License-Identifier: Apache-2.0
"""One self-contained page about a run: figures, loss curve, answers before and after, settings."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from .metrics import write_text

_STYLE = """
:root { color-scheme: light dark; --soft: #7b8794; --line: #8884; --hit: #2f6fb5; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
.figures div { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem 1rem; }
.figures b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.figures span, dt { color: var(--soft); font-size: .85rem; }
img { max-width: 100%; background: white; border-radius: .5rem; }
article { border-top: 1px solid var(--line); padding: .8rem 0; }
dl { display: grid; grid-template-columns: 6rem 1fr; gap: .3rem .8rem; margin: 0; }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
dd.tuned { color: var(--hit); font-weight: 600; }
pre { overflow-x: auto; font-size: .85rem; }
"""


def write_page(
    path: Path,
    *,
    title: str,
    figures: Mapping[str, str],
    picture: bytes,
    samples: Sequence[Mapping[str, str]],
    notes: Sequence[str],
    settings: str,
) -> None:
    """Write the page as one HTML file that needs nothing else.

    Args:
        path: The file.
        title: Its heading.
        figures: Name to value of what matters most, in order.
        picture: PNG of the loss curve.
        samples: Answers with the keys prompt, reference, base and tuned.
        notes: Paragraphs on how to read all this.
        settings: The resolved settings, as TOML.
    """
    cards = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>"
        for name, value in figures.items()
    )
    image = base64.b64encode(picture).decode()
    write_text(
        path,
        f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
<h1>{escape(title)}</h1>
<section class="figures">{cards}</section>
<h2>Loss</h2>
<img alt="Training and held-out loss by step" src="data:image/png;base64,{image}">
<h2>Held-out prompts, before and after</h2>
{"".join(map(_sample, samples)) or "<p>None were answered (eval.answers = 0).</p>"}
<h2>Notes</h2>
{"".join(f"<p>{escape(note)}</p>" for note in notes)}
<details><summary>Settings</summary><pre>{escape(settings)}</pre></details>
</html>
""",
    )


def _sample(sample: Mapping[str, str]) -> str:
    rows = "".join(
        f'<dt>{name}</dt><dd class="{name}">{escape(sample[name])}</dd>'
        for name in ("prompt", "base", "tuned", "reference")
        if name in sample
    )
    return f"<article><dl>{rows}</dl></article>\n"
