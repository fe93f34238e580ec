# SPDX-License-Identifier: Apache-2.0
"""`jax-qlora preview CONFIG.toml [--section.key value ...]`."""

import json
from collections.abc import Sequence

from .settings import ensure_downloaded, read_settings

_SHOWN = 3
_ABOUT = """Show the first examples of a run as the model will see them, what it learns in color,
and how long they are. Takes what `jax-qlora train` takes; --json prints the figures alone."""


def run(args: Sequence[str]) -> int:
    """Print examples and lengths; nothing is trained or written."""
    as_json = "--json" in args
    args = [arg for arg in args if arg != "--json"]
    config = read_settings(args, prog="jax-qlora preview", description=_ABOUT)
    ensure_downloaded(config.model, config.data.source)

    import numpy as np
    from rich.console import Console

    from ..data.batches import batch_indices
    from ..data.preview import preview
    from ..train.examples import load_data, read_description

    decoder, tokenizer, _ = read_description(config.model, config.data.new_tokens)
    data = load_data(config, tokenizer, context=decoder.max_length)
    encoded, held_out = data.train, data.held_out
    lengths = np.array([len(example) for example in encoded])
    learned = np.array([int(example.loss_mask.sum()) for example in encoded])
    rows = config.train.batch_size * config.train.accumulate
    figures = {
        "examples": len(encoded),
        "held_out": len(held_out),
        "tokens": _spread(lengths),
        "learned_tokens": _spread(learned),
        "epochs": round(rows * config.train.steps / len(encoded), 2),
    }
    if as_json:
        print(json.dumps(figures))
        return 0
    console = Console(highlight=False)
    shown = min(_SHOWN, len(encoded))
    for i in batch_indices(config.seed, 0, batch_size=shown, count=len(encoded)):
        console.rule()
        console.print(preview(tokenizer, encoded[i]))
    console.rule()
    console.print(f"{len(encoded):,} examples to learn, {len(held_out):,} held out")
    for name in ("tokens", "learned_tokens"):
        spread = ", ".join(f"{key} {value}" for key, value in figures[name].items())
        console.print(f"{name.replace('_', ' ')} of an example: {spread}")
    console.print(f"{config.train.steps} steps of {rows} examples are {figures['epochs']} epochs")
    return 0


def _spread(values) -> dict[str, int]:
    import numpy as np

    marks = {"least": 0, "median": 50, "95%": 95, "most": 100}
    return {name: int(np.percentile(values, mark)) for name, mark in marks.items()}
