# SPDX-License-Identifier: Apache-2.0
import pytest

from jax_qlora.data.verses import VersePair, clean_archaic, clean_modern, clean_pairs


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (" And God saw that [it was] good.", "And God saw that it was good."),
        ("the holy [place:]( for all", "the holy place: (for all"),
        (" Cæsar’s things", "Caesar's things"),
    ],
)
def test_clean_archaic(raw, clean):
    assert clean_archaic(raw) == clean


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (" God`s Spirit [moved].", "God's Spirit moved."),
        ("He has done it.      Psalm 23  A Psalm by David.", "He has done it."),
        ("prayers are ended.     BOOK III      Psalm 73       A Psalm.", "prayers are ended."),
        ("Revive me.  SIN AND SHIN", "Revive me."),
        ("THE KING OF THE JEWS", "THE KING OF THE JEWS"),
        (
            " People go,    That they may do it,    Yahweh.",
            "People go, that they may do it, Yahweh.",
        ),
        ("over whom he was -- yet", "over whom he was \u2014 yet"),
        ('"All of it is spoken.', "All of it is spoken."),
        ('All of it is spoken."', "All of it is spoken."),
        ('"All of it is spoken."', "All of it is spoken."),
        ('He said, "Go', 'He said, "Go"'),
        ('Go," he said.', '"Go," he said.'),
        ('He said, "Go," and "come."', 'He said, "Go," and "come."'),
        ('He said, "Tell her, `Come.`"', "He said, \"Tell her, 'Come.'\""),
        ('He said, "A man said, "Go."', None),
        ('He said, "Tell her, `Come."', None),
    ],
)
def test_clean_modern(raw, clean):
    assert clean_modern(raw, frozenset({"that"})) == clean


def kept(archaic: str, modern: str) -> list[VersePair]:
    return list(clean_pairs({1001001: archaic}, {1001001: modern}))


def test_a_good_pair_is_kept():
    assert kept(" Thou shalt [go] unto him.", " You shall go to him.") == [
        VersePair(verse=1001001, archaic="Thou shalt go unto him.", modern="You shall go to him.")
    ]


@pytest.mark.parametrize(
    ("archaic", "modern", "why"),
    [
        ("You shall go there.", "You shall walk there.", "nothing archaic"),
        ("Thou shalt go unto him.", "You shall go unto him.", "still archaic"),
        ("Thou shalt go unto him:", "You shall go to him.", "the old verse goes on"),
        ("Thou shalt go unto him.", "You shall go to him,", "the new verse goes on"),
        ("Thou shalt go unto him.", "and you shall go to him.", "starts mid-sentence"),
        ("Thou shalt go unto him.", "A very different verse indeed.", "another verse"),
        ("Go ye now into all of the land.", "Go now into all of the land.", "nearly the same"),
        ("He saith, Go thou now.", "He says, Be gone now.", "speech without quotation marks"),
        ("Hear ye my words, and do them.", "Hear you what I tell, and do it.", "half revised"),
        ("Thou shalt go. " * 9, "You shall leave. " * 9, "long"),
    ],
)
def test_a_poor_pair_is_dropped(archaic, modern, why):
    assert kept(archaic, modern) == [], why


def test_a_verse_of_one_translation_only_is_dropped():
    assert list(clean_pairs({1: "Thou shalt go unto him."}, {2: "You shall go to him."})) == []
