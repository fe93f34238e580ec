# SPDX-License-Identifier: Apache-2.0
from jax_qlora.data import encode, preview


def test_the_learned_part_is_marked_and_colored(tokenizer):
    chat = [{"role": "user", "content": "Hi\nyou"}, {"role": "assistant", "content": "Hello!"}]
    encoded = encode(tokenizer, {"messages": chat}, 128)
    text = preview(tokenizer, encoded)
    assert text.plain == (
        "<s><|user|>Hi↵\nyou<|end|><|assistant|>⟦Hello!<|end|>⟧\n"
        f"{len(encoded)} tokens, 7 of them learned"
    )
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert green == ["⟦Hello!<|end|>⟧"]
