# SPDX-License-Identifier: Apache-2.0
"""How people name targets: PEFT's rules, and errors that help."""

import pytest

from jax_qlora import InputError, Target
from jax_qlora.lora.targets import matches_name, matches_pattern, matches_regex, select_targets
from jax_qlora.quant.layout import make_layout


def target(path, shape=(8, 4), kind="linear", head=False):
    layout = make_layout(shape, -2)
    return Target(path=path, shape=shape, dtype="float32", layout=layout, kind=kind, head=head)


FOUND = (
    target("embed_tokens/embedding", kind="embedding"),
    target("layers/self_attn/q_proj/kernel", (2, 8, 4)),
    target("layers/self_attn/kv_proj/kernel", (2, 8, 4)),
    target("layers/mlp/up_proj/kernel", (2, 8, 4)),
    target("stem/conv/kernel", kind="conv"),
    target("lm_head/kernel", head=True),
)


def chosen(match):
    return [path.split("/")[-2] for path in select_targets(FOUND, match)]


def test_all_linear_leaves_out_head_embedding_and_convolution():
    assert chosen("all-linear") == ["q_proj", "kv_proj", "up_proj"]


@pytest.mark.parametrize(
    ("match", "want"),
    [
        (["q_proj", "up_proj"], ["q_proj", "up_proj"]),
        (("up_proj", "q_proj"), ["q_proj", "up_proj"]),  # in the order of the tree
        (["v_proj", "kv_proj"], None),  # no part of a name is a name
        (["self_attn.q_proj"], ["q_proj"]),
        (["layers/self_attn/q_proj"], ["q_proj"]),
        (["layers/self_attn/q_proj/kernel"], ["q_proj"]),
        (["lm_head"], ["lm_head"]),
        (["embed_tokens", "conv"], ["embed_tokens", "conv"]),
        (r".*\.self_attn\..*", ["q_proj", "kv_proj"]),
        (r".*(q|up)_proj", ["q_proj", "up_proj"]),
        (r"layers/mlp/.*", ["up_proj"]),
        (r"layers\.mlp\.up_proj\.kernel", ["up_proj"]),
        (r".*_proj|lm_head", ["q_proj", "kv_proj", "up_proj", "lm_head"]),
        (r"q_proj", None),  # an expression matches whole names, as in PEFT
    ],
)
def test_names_and_expressions(match, want):
    if want is None:
        with pytest.raises(InputError):
            chosen(match)
    else:
        assert chosen(match) == want


@pytest.mark.parametrize(
    ("match", "message"),
    [
        (["q_prj"], r"'q_prj' matches no kernel.*Nearest names: layers\.self_attn\.q_proj"),
        (["q_proj", "gate"], "target 'gate' matches no kernel"),
        (["lm_heads"], "Nearest names: lm_head"),
        ("q_proj", r"must match a whole name; for the end of one pass \['q_proj'\]"),
        ("all_linear", "'all_linear' matches no kernel"),
        ("(q_proj", r"'\(q_proj' is no regular expression"),
        ([], "the list is empty"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(match, message):
    with pytest.raises(InputError, match=message):
        select_targets(FOUND, match)


def test_a_model_without_kernels():
    with pytest.raises(InputError, match="multiplies by no kernel of its tree"):
        select_targets(FOUND[:1], "all-linear")
    with pytest.raises(InputError, match="Nearest names: none"):
        select_targets((), ["q"])


def test_rules_are_pefts():
    path = "layers/self_attn/q_proj/kernel"
    assert matches_name(path, "q_proj") and not matches_name(path, "proj")
    assert matches_regex(path, r".*q_proj") and not matches_regex(path, r"q_proj")
    assert matches_pattern(path, "q_proj") and matches_pattern(path, r"self_attn\.q_proj")
    assert not matches_pattern(path, "proj") and not matches_pattern(path, "q_pro")
    assert matches_pattern(path, r"(q|k)_proj")


def test_targets_are_a_mapping_that_prints_a_table_of_everything():
    targets = select_targets(FOUND, ["q_proj"])
    assert len(targets) == 1 and list(targets) == ["layers/self_attn/q_proj/kernel"]
    one = targets["layers/self_attn/q_proj/kernel"]
    assert (one.shape, one.lead, one.layout.in_axes) == ((2, 8, 4), (2,), (-2,))
    with pytest.raises(KeyError):
        targets["lm_head/kernel"]
    lines = repr(targets).splitlines()
    assert lines[0].split() == ["path", "shape", "dtype", "use", "target"]
    assert lines[2].split()[1:] == ["2x8x4", "float32", "linear", "yes"]
    assert any(line.split()[-2:] == ["linear", "(head)"] for line in lines)
    assert len(lines) == 2 + len(FOUND)
    assert list(targets.select("all-linear")) == list(select_targets(FOUND, "all-linear"))
