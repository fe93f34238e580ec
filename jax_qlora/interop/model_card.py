# SPDX-License-Identifier: Apache-2.0
"""The README.md of a written model: what it was made of and how, and nothing that is not known."""

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a written model was made of.

    Attributes:
        base_model: Directory, file or Hub id of the base model.
        adapter: Directory of the adapter that was folded in, or None.
        quantization: Format in which the base was held, e.g. "nf4", or None if it was dense.
    """

    base_model: str | None = None
    adapter: str | None = None
    quantization: str | None = None


def model_card(origin: Origin, *, weights: str, parameters: int) -> str:
    """Return the text of a model card.

    Args:
        origin: What the model was made of.
        weights: How the weights are stored, e.g. "bfloat16".
        parameters: Number of parameters.
    """
    base = origin.base_model
    hub = base is not None and _HUB_ID.fullmatch(base) and not Path(base).exists()
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"base_model: {origin.base_model}"] if hub else []
    head += ["tags:", "- jax-qlora", "---", ""]
    return "\n".join([*head, *_body(origin, weights, parameters)]) + "\n"


def _body(origin: Origin, weights: str, parameters: int) -> list[str]:
    base = f"`{origin.base_model}`" if origin.base_model else "a base model that was not named"
    held = (
        f"The base was held in {origin.quantization} (4 bits) on the way, so these weights are "
        "those that went through 4 bits, not the original ones."
        if origin.quantization
        else "The base was not quantized on the way."
    )
    if origin.adapter:
        made = f"The adapter `{origin.adapter}`, folded into {base} in float32. {held}"
    else:
        made = f"A copy of {base}; no adapter was folded in. {held}"
    return [
        "# A merged model" if origin.adapter else "# A converted model",
        "",
        made,
        "",
        f"{parameters:,} parameters, stored as {weights}. Written by jax_qlora "
        f"{metadata.version('jax-qlora')}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")',
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/directory")',
        "```",
        "",
        "Not known here, and for whoever shares this model to add: the training data, the intended "
        "use, an evaluation, and the license, which follows from that of the base model.",
    ]
