# SPDX-License-Identifier: Apache-2.0
"""`jax-qlora generate [PROMPT ...] --run runs/NAME`."""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from .arguments import parse
from .compiled import keep_compiled
from .loading import Source, complete, load


@dataclass(frozen=True, kw_only=True)
class Arguments(Source):
    """Answer prompts, with or without an adapter.

    Without a prompt, read one a line from standard input; on a terminal that is a conversation of
    single questions, ended with Ctrl-D.
    """

    prompts: Positional[tuple[str, ...]] = ()
    """What the user says."""
    system: str | None = None
    """System prompt; by default that of the run's examples, if any."""
    max_new_tokens: int = 128
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher is more random."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0 is no limit."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that have this much probability together."""
    seed: int = 0
    """Of the random choices."""
    json: bool = False
    """Print one JSON object per prompt."""


def run(args: Sequence[str]) -> int:
    """Answer each prompt."""
    arguments = parse(Arguments, args, prog="jax-qlora generate")
    keep_compiled()
    name, adapter_path, settings = complete(arguments)
    settings.setdefault("quantization", "nf4")
    model, adapter = load(name, adapter_path, settings)

    import jax

    from ..data.encode import encode_prompt
    from ..generate import Sampling, answer, make_generator
    from ..lora import attach

    sampling = Sampling(
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p
    )
    generate = make_generator(model, max_new_tokens=arguments.max_new_tokens, sampling=sampling)
    params = model.params if adapter is None else attach(model.params, adapter)
    system = _system_prompt(arguments)
    key = jax.random.key(arguments.seed)

    for number, batch in enumerate(_batches(arguments.prompts)):
        messages = [[*system, {"role": "user", "content": prompt}] for prompt in batch]
        tokens = [encode_prompt(model.tokenizer, chat) for chat in messages]
        began = time.monotonic()
        batch_key = jax.random.fold_in(key, number)
        texts = answer(generate, model, params, tokens, key=batch_key)
        seconds = round(time.monotonic() - began, 3)
        for prompt, text in zip(batch, texts, strict=True):
            record: dict[str, Any] = {"prompt": prompt, "answer": text, "seconds": seconds}
            print(json.dumps(record, ensure_ascii=False) if arguments.json else text, flush=True)
    return 0


def _batches(prompts: tuple[str, ...]) -> Iterable[list[str]]:
    """All prompts at once when they are known, else one at a time as they are typed."""
    if prompts:
        yield list(prompts)
    elif sys.stdin.isatty():
        while True:
            try:
                prompt = input("> ").strip()
            except EOFError:
                print()
                return
            if prompt:
                yield [prompt]
    elif lines := [line.strip() for line in sys.stdin if line.strip()]:
        yield lines


def _system_prompt(arguments: Arguments) -> list[dict[str, str]]:
    text = arguments.system
    record = Path(arguments.run or "", "run.json")
    if text is None and arguments.run is not None and record.exists():
        text = json.loads(record.read_text("utf-8")).get("system_prompt")
    return [] if text is None else [{"role": "system", "content": text}]
