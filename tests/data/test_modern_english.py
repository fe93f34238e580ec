# SPDX-License-Identifier: Apache-2.0
import pytest

from jax_qlora.data import copy_baseline, is_archaic
from jax_qlora.data.examples import verse_example
from jax_qlora.data.modern_english import modern_english_splits, read_verses
from jax_qlora.errors import InputError
from jax_qlora.interop.download import resolve

from . import bibles


def test_verses_are_read_without_importing_the_module(tmp_path):
    (tmp_path / "kjv.py").write_text(
        "raise SystemExit('imported')\n"
        + bibles.module({1001001: "In the beginning.", 1001002: "Æ"})
    )
    assert read_verses(tmp_path / "kjv.py") == {1001001: " In the beginning.", 1001002: " Æ"}


def test_splits_are_disjoint_complete_and_always_the_same(tmp_path):
    splits = modern_english_splits(bibles.write_many(tmp_path, 300))
    assert [len(splits[name]) for name in ("train", "held_out", "held_out_books")] == [44, 256, 5]
    verses = [pair.verse for pairs in splits.values() for pair in pairs]
    assert len(set(verses)) == 305
    assert {pair.verse // 1_000_000 for pair in splits["held_out_books"]} == {8, 43}
    assert splits == modern_english_splits(tmp_path)
    assert splits["held_out"][0].verse != 1_001_000, "held-out verses are random ones"


def test_no_held_out_text_is_trained_on(tmp_path):
    old = {i: bibles.OLD.format("bread") for i in range(1_001_001, 1_001_400)}
    new = {i: bibles.NEW.format("bread") for i in old}
    splits = modern_english_splits(bibles.write(tmp_path, old, new))
    assert [len(pairs) for pairs in splits.values()] == [0, 1, 0]


@pytest.mark.parametrize(
    "text", ["bible = 3\n", "def f(:\n", "bible = Bible(V, open('x'), {}, {})\n", "b = Bible(V)\n"]
)
def test_another_module_is_refused(tmp_path, text):
    (tmp_path / "kjv.py").write_text(text)
    with pytest.raises(InputError, match=r"kjv.py' is not a plain text Bible module"):
        read_verses(tmp_path / "kjv.py")


def test_a_missing_text_says_how_to_get_it(tmp_path):
    with pytest.raises(InputError, match="Run: jax-qlora download modern-english"):
        modern_english_splits(tmp_path)


def test_the_real_texts():
    try:
        directory = resolve("modern-english")
    except InputError:
        pytest.skip("the texts are not in the cache: jax-qlora download modern-english")
    splits = {
        name: [verse_example(pair) for pair in pairs]
        for name, pairs in modern_english_splits(directory).items()
    }
    assert {name: len(examples) for name, examples in splits.items()} == {
        "train": 4309,
        "held_out": 256,
        "held_out_books": 258,
    }
    assert splits["held_out"][0]["messages"][1:] == [
        {
            "role": "user",
            "content": "Know ye not, that so many of us as were baptized into Jesus Christ were "
            "baptized into his death?",
        },
        {
            "role": "assistant",
            "content": "Or don't you know that all we who were baptized into Christ Jesus were "
            "baptized into his death?",
        },
    ]
    for examples in splits.values():
        for example in examples:
            _, asked, said = (message["content"] for message in example["messages"])
            assert is_archaic(asked) and not is_archaic(said)
            assert not set("[]`\n") & set(asked + said) and "  " not in asked + said
            assert said.count('"') % 2 == 0 and said.rstrip("\"')")[-1] in ".?!"
    assert copy_baseline(splits["held_out"]) == pytest.approx(59.52, abs=0.01)
