# SPDX-License-Identifier: Apache-2.0
import pytest

from jax_qlora.data import archaic_share, chrf, copy_baseline, is_archaic
from jax_qlora.errors import InputError

HYPOTHESES = [
    'He said to them, "I have food to eat that you don\'t know of."',
    "Jesus wept.",
    "",
    "Blessed be the man!",
    "ab",
]
REFERENCES = [
    'But he said to them, "I have food to eat that you don\'t know about."',
    "Jesus cried.",
    "Not empty.",
    "Blessed is that man.",
    "abcdefgh",
]
# sacrebleu 2.6.0, corpus_chrf with its defaults, for each pair alone
SACREBLEU = [81.76334888805835, 30.01296142408653, 0.0, 39.71760426830653, 23.404255319148938]


def test_chrf_equals_sacrebleu():
    assert chrf(HYPOTHESES, REFERENCES) == pytest.approx(60.689490853953934, abs=1e-10)
    for hypothesis, reference, score in zip(HYPOTHESES, REFERENCES, SACREBLEU, strict=True):
        assert chrf([hypothesis], [reference]) == pytest.approx(score, abs=1e-10)
    assert chrf(["a long enough hypothesis"], ["ab"]) == pytest.approx(8.620689655172413, abs=1e-10)


def test_chrf_of_the_right_answers_is_100_and_of_nothing_is_0():
    assert chrf(REFERENCES, REFERENCES) == pytest.approx(100)
    assert chrf(["", ""], ["abc", "d"]) == 0


def test_chrf_needs_as_many_answers_as_references():
    with pytest.raises(InputError, match="found 1 answers and 2 references"):
        chrf(["a"], ["a", "b"])
    with pytest.raises(InputError, match="found 0 answers"):
        chrf([], [])


@pytest.mark.parametrize(
    "text",
    [
        "Thou shalt not steal.",
        "He that cometh",
        "as it was told unto him",
        "Verily, I say",
        "GO YE",
    ],
)
def test_archaic(text):
    assert is_archaic(text)


@pytest.mark.parametrize(
    "text",
    [
        "You shall not steal.",
        "his teeth",
        "the twentieth day",
        "Seth",
        "in Nazareth",
        "Ish-bosheth",
    ],
)
def test_not_archaic(text):
    assert not is_archaic(text)


def test_archaic_share():
    assert archaic_share(["he saith", "he says", "he goeth", "he goes"]) == 0.5
    with pytest.raises(InputError, match="at least one answer"):
        archaic_share([])


def test_copy_baseline_repeats_the_question():
    def chat(asked, said):
        return {
            "messages": [
                {"role": "system", "content": "Rewrite."},
                {"role": "user", "content": asked},
                {"role": "assistant", "content": said},
            ]
        }

    examples = [chat(h, r) for h, r in zip(HYPOTHESES, REFERENCES, strict=True)]
    assert copy_baseline(examples) == chrf(HYPOTHESES, REFERENCES)
