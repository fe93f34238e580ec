# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from jax_qlora.data import load_examples, load_splits
from jax_qlora.errors import InputError

from . import bibles

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def without_where(examples):
    return [{k: v for k, v in example.items() if k != "where"} for example in examples]


def test_the_three_forms(tmp_path):
    rows = [CHAT, {"prompt": "1+1=", "completion": "2"}, {"text": "Once upon a time"}]
    examples = load_examples(write_jsonl(tmp_path / "a.jsonl", rows))
    assert without_where(examples) == rows
    assert examples[1]["where"] == f"'{tmp_path / 'a.jsonl'}' line 2"


def test_other_columns_nulls_and_blank_lines_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a", "id": 1}\n\n{"text": "b", "messages": null}\r\n', "utf-8")
    assert without_where(load_examples(path)) == [{"text": "a"}, {"text": "b"}]


def test_prompt_and_completion_may_be_messages(tmp_path):
    row = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
    assert without_where(load_examples([row])) == [CHAT]


def test_a_line_separator_inside_a_string_is_no_line_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\u2028b"}\n{"text": "c"}\n', "utf-8")
    assert without_where(load_examples(path)) == [{"text": "a\u2028b"}, {"text": "c"}]


def test_json_and_parquet_read_the_same(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    rows = [CHAT, CHAT]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert without_where(load_examples(tmp_path / "a.json")) == rows
    assert without_where(load_examples(str(tmp_path / "a.parquet"))) == rows


def test_rows_of_a_datasets_dataset():
    datasets = pytest.importorskip("datasets")
    assert without_where(load_examples(datasets.Dataset.from_list([CHAT]))) == [CHAT]


def chat(*messages):
    return {"messages": list(messages)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"line 2: not valid JSON: .* at column"),
        ("[1, 2]", r"line 2: expected \{\"messages\""),
        ('{"question": "a"}', r"line 2: expected .* found the keys \['question'\]"),
        ('{"prompt": "a"}', r"line 2: expected .* found the keys \['prompt'\]"),
        ('{"text": " "}', r"line 2: 'text': expected text, found ' '"),
        ('{"text": 3}', r"line 2: 'text': expected text, found 3"),
        ('{"prompt": "a", "completion": ""}', r"line 2: 'completion': expected text"),
        ('{"prompt": "a", "completion": 3}', r"line 2: 'prompt': expected a list of messages"),
        ('{"messages": "hi"}', r"line 2: 'messages': expected a list of messages, found 'hi'"),
        ('{"messages": []}', r"line 2: 'messages': expected a list of messages, found \[\]"),
        ('{"messages": ["hi"]}', r"line 2: 'messages\[0\]': expected \{\"role\""),
        (
            json.dumps(chat({"role": "bot", "content": "a"})),
            r"role: expected one of .* found 'bot'",
        ),
        (json.dumps(chat({"role": "user", "content": 3})), r"content: expected a string, found 3"),
        (json.dumps(chat({"role": "assistant", "content": " "})), r"expected an answer"),
        (json.dumps(chat({"role": "user"})), r"content: expected a string, found None"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=message) as error:
        load_examples(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\n", "hold no examples"),
        ("a.json", b"", "hold no examples"),
        ("a.json", b"[]", "hold no examples"),
        ("a.json", b'{"text": "a"}', "expected a list of examples"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', r"line 2: .* name the file .jsonl"),
        ("a.json", b'[\n{"text": }]', r"line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "\xff"}', "not UTF-8"),
        ("a.parquet", b"PAR1", "not a readable parquet file"),
        ("a.csv", b"text\na", "expected a .jsonl, .json or .parquet file"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_examples(tmp_path / name)
    assert name in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="No data file at '.*none.jsonl'"):
        load_examples(tmp_path / "none.jsonl")


def test_no_rows():
    with pytest.raises(InputError, match="the rows hold no examples"):
        load_examples([])


def test_a_file_has_one_split(tmp_path):
    with pytest.raises(InputError, match="has no split 'held_out'"):
        load_examples(write_jsonl(tmp_path / "a.jsonl", [CHAT]), split="held_out")


@pytest.fixture
def cached_bibles(tmp_path, monkeypatch):
    """The name "modern-english" stands for two little Bibles."""
    monkeypatch.setattr("jax_qlora.data.examples.resolve", lambda name: tmp_path / name)
    return bibles.write_many(tmp_path / "modern-english", 300)


def test_modern_english_by_name(cached_bibles):
    train, held_out = load_splits("modern-english", held_out=10)
    assert (len(train), len(held_out)) == (44, 10)
    assert [message["role"] for message in train[0]["messages"]] == ["system", "user", "assistant"]
    assert held_out == load_examples("modern-english", split="held_out")[:10]
    with pytest.raises(
        InputError, match="no split 'test'. It has: train, held_out, held_out_books"
    ):
        load_examples("modern-english", split="test")


def test_held_out_examples_of_files(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(5)])
    other = write_jsonl(tmp_path / "b.jsonl", [CHAT] * 3)
    train, held_out = load_splits(path, held_out=2)
    assert [example["text"] for example in train + held_out] == list("01234")
    assert len(held_out) == 2
    train, held_out = load_splits(path, held_out_source=other, held_out=2)
    assert (len(train), without_where(held_out)) == (5, [CHAT] * 2)
    with pytest.raises(InputError, match="none is left to train on"):
        load_splits(path, held_out=5)
