# SPDX-License-Identifier: Apache-2.0
"""What `quant.embeddings` costs: a trained model with its embedding and head in 4 bits too.

    python benchmarks/embedding_cost.py [--write "name of the machine"]

SmolLM2-135M-Instruct, whose head is its embedding, on held-out verses of the quickstart: loss of
the answers, and how far the distribution of each answer token is from that of the float32 model,
before training and after a short LoRA run of each on the same examples. With --write the figures go
to docs/numerics.md, between the markers, and to docs/embedding_cost.json. Needs what `jax-qlora
download smollm2-135m-instruct modern-english` fetches.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import Report

import jax_qlora as jq
from jax_qlora.config import Config, load_config, replaced
from jax_qlora.evaluate import held_out_batches
from jax_qlora.interop.inspect import inspect
from jax_qlora.interop.load import training_compute_dtype
from jax_qlora.models import DecoderConfig, decoder_functions
from jax_qlora.train.examples import Data, load_data, read_description
from jax_qlora.train.start import find_decoder_targets, load_start
from jax_qlora.train.step import init_state, make_optimizer, make_step
from jax_qlora.tree import nbytes

ROOT = Path(__file__).parents[1]
PAGE, RECORD = ROOT / "docs" / "numerics.md", ROOT / "docs" / "embedding_cost.json"
BEGIN, END = "<!-- written by benchmarks/embedding_cost.py -->\n", "<!-- end -->\n"
HELD = {
    "all in float32": {"method": "lora"},
    "layers in NF4": {"method": "qlora"},
    "layers, embedding and head in NF4": {"method": "qlora", "quant.embeddings": True},
}
STEPS, EXAMPLES = 16, 48


def measure(decoder: DecoderConfig, data: Data, models: Sequence[Any]) -> list[tuple[float, float]]:
    """Loss of each model, and its divergence from the first, in nats an answer token.

    Args:
        decoder: Their shape.
        data: Its held-out examples are measured on.
        models: Parameter trees; the first is what the others are compared with.
    """
    functions = decoder_functions(decoder, transform=jq.lift)

    @jax.jit
    def answers(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Log-probabilities at the answer tokens, these tokens, and which of them count."""
        mask = batch["attention_mask"]
        hidden = functions.hidden(params, batch["tokens"], attention_mask=mask)
        wanted = batch["loss_mask"][:, 1:]
        places = jnp.argsort(~wanted, axis=1, stable=True)[:, : data.width]
        rows = jnp.take_along_axis(hidden, places[..., None], axis=1)
        tokens = jnp.take_along_axis(batch["tokens"][:, 1:], places, axis=1)
        counts = jnp.take_along_axis(wanted, places, axis=1)
        return jax.nn.log_softmax(functions.head(params, rows)), tokens, counts

    @jax.jit
    def compare(want: Any, got: Any, tokens: Any, counts: Any) -> jax.Array:
        loss = -jnp.take_along_axis(got, tokens[..., None], axis=-1)[..., 0]
        divergence = jnp.sum(jnp.exp(want) * (want - got), axis=-1)
        return jnp.sum(jnp.where(counts, jnp.stack([loss, divergence]), 0.0), axis=(1, 2))

    totals, count = np.zeros((len(models), 2)), 0
    for batch in held_out_batches(data.held_out, batch_size=8, length_multiple=16):
        want, tokens, counts = answers(models[0], batch)
        count += int(counts.sum())
        for total, params in zip(totals, models, strict=True):
            got = want if params is models[0] else answers(params, batch)[0]
            total += np.asarray(compare(want, got, tokens, counts), np.float64)
    return [(float(loss), float(divergence)) for loss, divergence in totals / count]


def tune(config: Config, data: Data, model: Any, adapter: Any) -> Any:
    """The adapter after `config.train.steps` steps."""
    optimizer, _ = make_optimizer(config.optim, config.train.steps)
    step = jax.jit(make_step(model, optimizer, config, width=data.width), donate_argnums=0)
    state = init_state(jax.tree.map(jnp.copy, adapter), optimizer)
    for number in range(config.train.steps):
        batch = data.batch(number, length=data.longest)  # one shape: compiled once
        state, _ = step(state, model.params, batch)
    return state.trainable


def main(config: Config, machine: str | None) -> int:
    """Measures, prints, and writes if told for which machine."""
    began = time.monotonic()
    decoder, tokenizer, _ = read_description(config.model)
    data = load_data(config, tokenizer, context=decoder.max_length)
    targets = find_decoder_targets(decoder, config)
    bases, starts, ends = [], [], []
    for name, settings in HELD.items():
        own = replaced(config, settings)
        model, adapter = load_start(
            own, targets, compute_dtype=training_compute_dtype(), dtype=jnp.float32
        )
        bases.append(model.params)
        starts.append(jq.attach(model.params, adapter))
        ends.append(jq.attach(model.params, tune(own, data, model, adapter)))
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    before, after = (measure(decoder, data, models) for models in (starts, ends))
    stored = inspect(config.model)["formats"]
    record = {
        "model": config.model,
        "stored": {kind: counts["parameters"] for kind, counts in stored.items()},
        "steps": config.train.steps,
        "batch": config.train.batch_size,
        "rank": config.lora.rank,
        "examples": len(data.held_out),
        "compute_dtype": jnp.dtype(training_compute_dtype()).name,
        "rows": [
            {
                "held": name,
                "mib": nbytes(base) / 2**20,
                "loss": first[0],
                "divergence": first[1],
                "loss_tuned": last[0],
                "divergence_tuned": last[1],
            }
            for name, base, first, last in zip(HELD, bases, before, after, strict=True)
        ],
    }
    report = Report("embedding_cost", jax=jax.__version__, steps=config.train.steps)
    for row in record["rows"]:
        report.add(**row)
    plain, layers, everything = (row["loss_tuned"] for row in record["rows"])
    report.floor("loss after tuning, layers in NF4 over float32", layers / plain, 1.1)
    report.floor("the same with embedding and head", everything / layers, 1.1)
    if machine:
        record["machine"] = machine
        record["minutes"] = (time.monotonic() - began) / 60
        RECORD.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        before_it, rest = PAGE.read_text("utf-8").split(BEGIN)
        PAGE.write_text(before_it + BEGIN + render(record) + END + rest.split(END, 1)[1], "utf-8")
    return report.finish()


def render(record: dict[str, Any]) -> str:
    """The block of the page, from what `RECORD` holds."""
    stored = ", ".join(f"{n / 1e6:.1f} million in {kind}" for kind, n in record["stored"].items())
    lines = [
        "| held | MiB | loss | divergence | loss, tuned | divergence, tuned |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['held']} | {row['mib']:.0f} | {row['loss']:.3f} | {row['divergence']:.3f} | "
            f"{row['loss_tuned']:.3f} | {row['divergence_tuned']:.3f} |"
            for row in record["rows"]
        ),
        "",
        f"{record['examples']} held-out verses; {record['steps']} steps of {record['batch']} "
        f"examples at rank {record['rank']}, computed in {record['compute_dtype']} and measured in "
        f"float32; {record['minutes']:.0f} minutes on {record['machine']}. One run, one seed. The "
        f"file itself is rounded ({stored}), and what is called float32 here are its values.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--write", metavar="MACHINE")
    args = parser.parse_args()
    changes = {
        "train.steps": args.steps,
        "optim.warmup_steps": min(3, args.steps - 1),
        "eval.examples": args.examples,
    }
    sys.exit(main(replaced(load_config(ROOT / "configs/quickstart.toml"), changes), args.write))
