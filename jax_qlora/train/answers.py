# SPDX-License-Identifier: Apache-2.0
"""The same held-out prompts answered by the model before and after training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from ..config import Config
from ..data.examples import Example
from ..errors import InputError
from ..evaluate import split_answer
from ..generate import answer, make_generator
from ..models import Model
from ..report import Display, write_json
from ..typing import PyTree
from .examples import Data
from .memory import on_shortage
from .stop import Stop


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A held-out prompt and its right answer."""

    tokens: np.ndarray
    shown: str
    reference: str


def held_out_prompts(data: Data, model: Model, count: int) -> list[Prompt]:
    """Return the first `count` held-out prompts; plain text, which asks nothing, has none."""
    prompts = []
    for example, encoded in zip(data.held_out_examples, data.held_out, strict=True):
        if (shown := _question(example)) is not None:
            tokens, right = split_answer(encoded)
            reference = model.tokenizer.decode(right.tolist(), skip_special_tokens=True)
            prompts.append(Prompt(tokens=tokens, shown=shown, reference=reference.strip()))
    return prompts[:count]


def system_prompt(data: Data) -> str | None:
    """Return the system message of the first held-out chat, if it has one."""
    messages = data.held_out_examples[0].get("messages", [])
    return messages[0].get("content") if messages and messages[0]["role"] == "system" else None


def _question(example: Example) -> str | None:
    if "messages" in example:
        asked = [message for message in example["messages"] if message["role"] == "user"]
        return asked[-1].get("content") if asked else None
    return example.get("prompt")


class Answers:
    """Answers to the same prompts by the model before and after training."""

    def __init__(self, prompts: Sequence[Prompt], model: Model, config: Config, run: Path):
        """Prepare to answer; nothing is generated yet.

        Args:
            prompts: What to answer.
            model: Generates and decodes.
            config: `eval`: how many at once, and how long.
            run: Answers before training are kept in this directory for a resumed run.
        """
        self.prompts = list(prompts)
        self.before: list[str] = []
        self.after: list[str] = []
        self._model = model
        self._saved = run / "answers-before.json"
        self._batch_size = config.eval.answer_batch
        self._generate = make_generator(model, max_new_tokens=config.eval.max_new_tokens)

    def answer_before(self, params: PyTree, show: Display, stop: Stop) -> None:
        """Answer with the untrained model.

        Args:
            params: Its parameters, with the fresh adapter: answering after training then runs the
                same compiled function.
            show: Shows progress.
            stop: Asked between batches; the answers are then not complete, and not kept.
        """
        self.before = self._answer(params, show, stop, "Answers before")
        if not stop():
            write_json(self._saved, {"prompts": self._shown(), "answers": self.before})

    def recall_before(self) -> bool:
        """Take the answers of the run that is being resumed; False if there are none."""
        if self._saved.exists():
            found = json.loads(self._saved.read_text("utf-8"))
            if found["prompts"] == self._shown():
                self.before = found["answers"]
        return len(self.before) == len(self.prompts)

    def answer_after(self, params: PyTree, show: Display, stop: Stop) -> None:
        """Answer with what was trained; arguments as `answer_before`'s."""
        self.after = self._answer(params, show, stop, "Answers after")

    def _shown(self) -> list[str]:
        return [prompt.shown for prompt in self.prompts]

    def _answer(self, params: PyTree, show: Display, stop: Stop, name: str) -> list[str]:
        prompts = [prompt.tokens for prompt in self.prompts]
        if not prompts:
            return []
        with on_shortage(self._too_many), show.phase(name, len(prompts)) as phase:
            return answer(
                self._generate,
                self._model,
                params,
                prompts,
                key=jax.random.key(0),  # greedy: never used
                batch_size=self._batch_size,
                on_batch=phase.update,
                stop=stop,
            )

    def _too_many(self, why: str) -> InputError:
        return InputError(
            f"Not enough memory to answer {self._batch_size} prompts at once: {why}. Lower "
            "eval.answer_batch or eval.max_new_tokens; with eval.answers = 0 none is answered."
        )
