# SPDX-License-Identifier: Apache-2.0
"""`jax-qlora generate [PROMPT ...] --run runs/NAME`."""

import itertools
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional, UseAppendAction

from ..errors import InputError
from .arguments import parse
from .compiled import keep_compiled
from .loading import Source, complete, load, refuse_prompt

BASE = "base"
"""Who answers without an adapter."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Source):
    """Answer prompts, with or without an adapter.

    Without a prompt, read one a line from standard input; on a terminal that is a conversation of
    single questions, ended with Ctrl-D.
    """

    prompts: Positional[tuple[str, ...]] = ()
    """What the user says."""
    compare: UseAppendAction[tuple[str, ...]] = ()
    """NAME=DIRECTORY (or .gguf file) of one more adapter; can be repeated. Each prompt is then
    answered with every adapter and by the base, in one batch."""
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
    """Answer each prompt.

    Raises:
        InputError: Bad arguments, model, adapter or prompt; or adapters to compare over a run whose
            base is its own.
    """
    arguments = parse(Arguments, args, prog="jax-qlora generate")
    keep_compiled()
    name, adapter_path, settings = complete(arguments)
    settings.setdefault("quantization", "nf4")
    directories = _named(arguments.compare, adapter_path)
    if directories and "start" in settings:
        raise InputError(
            f"--compare: the run '{arguments.run}' started from {settings['start'].lora.init}, so "
            "its 4-bit base is its own: expected a base that all adapters share. Compare on the "
            "dense model (--quantization none), or answer with one adapter at a time."
        )
    if directories:
        for directory in directories.values():
            refuse_prompt(directory, settings)
    model, adapter = load(name, None if directories else adapter_path, settings)

    import jax

    from ..data.encode import encode_prompt
    from ..generate import Sampling, answer, make_generator
    from ..interop.peft import load_adapter
    from ..lora import adapter_index, attach, attach_many, stack_adapters

    sampling = Sampling(
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p
    )
    generate = make_generator(model, max_new_tokens=arguments.max_new_tokens, sampling=sampling)
    params: Any = model.params if adapter is None else attach(model.params, adapter)
    adapters = {name: load_adapter(path, model) for name, path in directories.items()}
    names = [BASE, *adapters] if adapters else [None]  # who answers
    if adapters:
        stacked = stack_adapters(adapters, dropout=0.0)
        index = adapter_index(adapters, [None, *adapters])

        def of_rows(rows: Any) -> Any:
            return attach_many(model.params, stacked, index[rows % len(names)])

        params = of_rows
    system = _system_prompt(arguments)
    key = jax.random.key(arguments.seed)

    for number, batch in enumerate(_batches(arguments.prompts)):
        messages = [[*system, {"role": "user", "content": prompt}] for prompt in batch]
        tokens = [encode_prompt(model.tokenizer, chat) for chat in messages]
        began = time.monotonic()
        batch_key = jax.random.fold_in(key, number)
        each = [prompt for prompt in tokens for _ in names]
        texts = iter(answer(generate, model, params, each, key=batch_key))
        seconds = round(time.monotonic() - began, 3)
        for prompt, who in itertools.product(batch, names):
            record: dict[str, Any] = {"prompt": prompt, "answer": next(texts), "seconds": seconds}
            text = record["answer"] if who is None else f"{who}: {record['answer']}"
            record |= {} if who is None else {"adapter": who}
            print(json.dumps(record, ensure_ascii=False) if arguments.json else text, flush=True)
    return 0


def _named(compare: Sequence[str], own: str | None) -> dict[str, str]:
    """The adapters to compare, by name; none if there are no others than the model's own.

    Raises:
        InputError: One that has no name, or two of one name.
    """
    pairs = [(name, path) for name, _, path in (text.partition("=") for text in compare)]
    for text, (name, path) in zip(compare, pairs, strict=True):
        if not name or not path:
            raise InputError(f"--compare {text}: expected NAME=DIRECTORY, for example mine={text}.")
    if compare and own is not None:
        pairs.insert(0, ("adapter", own))
    directories = dict(pairs)
    if len(directories) < len(pairs) or BASE in directories:
        raise InputError(
            f"--compare: {', '.join(name for name, _ in pairs)}: expected different names for the "
            f"adapters, none of them '{BASE}', which is the model alone."
            + (" That of --run or --adapter is called 'adapter'." if own is not None else "")
        )
    return directories


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
