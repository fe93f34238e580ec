# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from jax_qlora.data import encode, encode_all, encode_prompt
from jax_qlora.errors import InputError
from tests.helpers import GOLDEN

CHATS = json.loads((GOLDEN / "tokenizer_outputs.json").read_text())["chats"]
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello!"}
CHATML = (  # SmolLM2's, without {% generation %}
    "{% for m in messages %}<|system|>{{ m['role'] + '\n' + m['content'] }}<|end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|system|>assistant{{ '\n' }}{% endif %}"
)


def learned(tokenizer, encoded):
    return tokenizer.decode(encoded.tokens[encoded.loss_mask])


@pytest.mark.parametrize("chat", CHATS)
def test_tokens_and_mask_equal_transformers(tokenizer, chat):
    encoded = encode(tokenizer, {"messages": chat["messages"]}, 128)
    assert encoded.tokens.dtype == np.int32 and encoded.loss_mask.dtype == bool
    assert encoded.tokens.tolist() == chat["ids"]
    assert encoded.loss_mask.astype(int).tolist() == chat["assistant_mask"]


@pytest.mark.parametrize("chat", CHATS)
def test_the_mask_needs_no_generation_tag(tokenizer, chat):
    for tag in ("{% generation %}", "{% endgeneration %}"):
        tokenizer.chat_template = tokenizer.chat_template.replace(tag, "")
    assert encode(tokenizer, chat, 128).loss_mask.astype(int).tolist() == chat["assistant_mask"]


@pytest.mark.parametrize("chat", CHATS)
def test_the_prompt_in_use_is_the_prompt_in_training(tokenizer, chat):
    prompt = encode_prompt(tokenizer, chat["messages"])
    assert prompt == encode_prompt(tokenizer, chat["messages"][:-1])
    assert tokenizer.decode(prompt) == chat["rendered_prompt"]
    encoded = encode(tokenizer, chat, 128)
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert encoded.loss_mask[len(prompt) :].all()


def test_the_end_of_turn_is_learned_even_when_it_is_the_padding_token(tokenizer):
    tokenizer.chat_template = CHATML
    tokenizer.pad_token = tokenizer.eos_token = "<|end|>"
    encoded = encode(tokenizer, {"messages": [USER, ANSWER]}, 128)
    assert learned(tokenizer, encoded) == "Hello!<|end|>"
    assert encoded.tokens[encoded.loss_mask][-1] == tokenizer.eos_token_id
    assert encoded.loss_mask[-1], "the line end after the last turn is of no use"


def test_every_answer_is_learned_and_line_ends_between_turns_are_not(tokenizer):
    tokenizer.chat_template = CHATML
    encoded = encode(tokenizer, {"messages": [USER, ANSWER, USER, ANSWER, USER]}, 128)
    assert learned(tokenizer, encoded) == "Hello!<|end|>Hello!<|end|>"
    assert tokenizer.decode(encoded.tokens).endswith("Hello!<|end|>")


def test_a_template_without_end_mark_keeps_its_line_end(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encoded = encode(tokenizer, {"messages": [USER, ANSWER]}, 128)
    assert learned(tokenizer, encoded) == " Hello!\n\n"


def test_at_most_one_beginning_of_sequence(tokenizer):
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    encoded = encode(tokenizer, {"messages": CHATS[0]["messages"]}, 128)
    assert encoded.tokens.tolist() == CHATS[0]["ids"]
    assert encoded.loss_mask.astype(int).tolist() == CHATS[0]["assistant_mask"]
    assert encode_prompt(tokenizer, [USER])[:2] != [tokenizer.bos_token_id] * 2
    text = encode(tokenizer, {"text": "<s><s>a"}, 128)
    assert text.tokens.tolist().count(tokenizer.bos_token_id) == 1


def test_prompt_and_completion_are_a_chat_where_there_is_a_template(tokenizer):
    pair = {"prompt": "Hi", "completion": "Hello!"}
    chat = encode(tokenizer, {"messages": [USER, ANSWER]}, 128)
    np.testing.assert_array_equal(encode(tokenizer, pair, 128).tokens, chat.tokens)
    tokenizer.chat_template = None
    encoded = encode(tokenizer, pair, 128)
    assert tokenizer.decode(encoded.tokens) == "HiHello!</s>"
    assert learned(tokenizer, encoded) == "Hello!</s>"


def test_text_is_learned_whole_with_its_end(tokenizer):
    encoded = encode(tokenizer, {"text": "the capital"}, 128)
    assert encoded.tokens[-1] == tokenizer.eos_token_id
    assert encoded.loss_mask.tolist() == [False] + [True] * (len(encoded) - 1)
    already = encode(tokenizer, {"text": "the capital</s>"}, 128)
    np.testing.assert_array_equal(already.tokens, encoded.tokens)
    np.testing.assert_array_equal(already.loss_mask, encoded.loss_mask)


def test_content_of_several_bytes_a_character(tokenizer):
    answer = {"role": "assistant", "content": "café 你好 😀"}
    assert learned(tokenizer, encode(tokenizer, {"messages": [USER, answer]}, 128)) == (
        "café 你好 😀<|end|>"
    )


def test_the_longest_that_fits(tokenizer):
    example = {"messages": [USER, ANSWER], "where": "'a.jsonl' line 7"}
    length = len(encode(tokenizer, example, 128))
    assert len(encode(tokenizer, example, length)) == length
    with pytest.raises(InputError, match=rf"'a.jsonl' line 7: {length} tokens, and at most"):
        encode(tokenizer, example, length - 1)


def test_no_chat_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template.*chat_template.jinja"):
        encode(tokenizer, {"messages": [USER, ANSWER]}, 128)
    with pytest.raises(InputError, match="has no chat template"):
        encode_prompt(tokenizer, [USER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, USER], "no message has the role 'assistant'.*user, user"),
        ([ANSWER], "the chat starts with an answer"),
        ([{"role": "tool", "content": "a"}, ANSWER], "template does not take .*unknown role tool"),
    ],
)
def test_chats_that_cannot_be_learned(tokenizer, messages, message):
    with pytest.raises(InputError, match=message):
        encode(tokenizer, {"messages": messages}, 128)


def test_nothing_left_to_learn(tokenizer):
    empty = {"role": "assistant", "content": ""}
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>{% endgen", "{% endgen")
    with pytest.raises(InputError, match="no token is left to learn"):
        encode(tokenizer, {"messages": [USER, empty]}, 128)


def test_a_template_that_rewrites_history_is_refused(tokenizer):
    tokenizer.chat_template = (  # as models that think drop their thoughts from earlier turns
        "{% for m in messages %}<|user|>{{ m['content'] if loop.last else 'dropped' }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(InputError, match=r"renders 'messages\[1\]' differently.*one example per"):
        encode(tokenizer, {"messages": [USER, ANSWER, USER, ANSWER]}, 128)


def test_encode_all_keeps_the_order(tokenizer):
    encoded = encode_all(tokenizer, [{"text": "a"}, {"text": "the capital"}], 128)
    assert [len(example) for example in encoded] == sorted(len(example) for example in encoded)
