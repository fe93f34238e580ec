# SPDX-License-Identifier: Apache-2.0
"""Names of what trains beside updates: PEFT's rules, and what is said of names of nothing."""

import dataclasses
from typing import Any

import pytest

import jax_qlora as jq
from jax_qlora.config import LoraConfig
from jax_qlora.interop.peft_select import select_beside, select_modules
from jax_qlora.models.presets import GPT_2, TINY

EMBEDDING, HEAD = "embed_tokens/embedding", "lm_head/kernel"
Q = "layers/self_attn/q_proj"
TIED = dataclasses.replace(TINY, tied=True)
BIASED = dataclasses.replace(TINY, family="qwen2", qkv_bias=True)


@pytest.mark.parametrize(
    ("names", "paths"),
    [
        (["lm_head"], {HEAD}),
        (["lm_head", "embed_tokens"], {EMBEDDING, HEAD}),
        (["model.norm"], {"norm/scale"}),
        (["q_proj"], {f"{Q}/kernel"}),
        (
            ["norm"],
            {
                "norm/scale",
                "layers/input_layernorm/scale",
                "layers/post_attention_layernorm/scale",
            },
        ),
        (["mlp"], {f"layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")}),
    ],
)
def test_modules_by_the_end_of_their_name(names: list[str], paths: set[str]):
    assert set(select_modules(LoraConfig(modules_to_save=tuple(names)), TINY)) == paths


def test_a_module_trains_with_its_bias():
    found = select_modules(LoraConfig(modules_to_save=("q_proj",)), BIASED)
    assert set(found) == {f"{Q}/kernel", f"{Q}/bias"}


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("all", 3), ("lora_only", 1)])
def test_biases(bias: Any, count: int):
    beside = select_beside(LoraConfig(bias=bias), BIASED, [f"{Q}/kernel"])
    assert len(beside.whole) == count and not beside.tokens
    assert count != 1 or beside.whole == (f"{Q}/bias",)


def test_rows_train_in_the_embedding_and_new_ones_in_the_head_too():
    lora = LoraConfig(trainable_token_indices=(3, 1))
    assert select_beside(lora, TINY, []).tokens == {EMBEDDING: (3, 1)}
    both = select_beside(lora, TINY, [], new_tokens=[94, 95]).tokens
    assert both == {EMBEDDING: (3, 1, 94, 95), HEAD: (94, 95)}
    assert select_beside(lora, TIED, [], new_tokens=[95]).tokens == {EMBEDDING: (3, 1, 95)}
    whole = dataclasses.replace(lora, modules_to_save=("embed_tokens",))
    assert select_beside(whole, TINY, [], new_tokens=[95]).tokens == {HEAD: (95,)}


@pytest.mark.parametrize(
    ("settings", "decoder", "message"),
    [
        ({"modules_to_save": ("lm_haed",)}, TINY, "found 'lm_haed', .* Did you mean 'lm_head'"),
        ({"modules_to_save": ("lm_haed",)}, TINY, "There are down_proj, embed_tokens, gate_proj"),
        ({"modules_to_save": ("lm_head",)}, TIED, "head is the embedding .* name embed_tokens"),
        ({"modules_to_save": ("lm_head",)}, GPT_2, r"name wte, which .* are attn, c_attn, c_fc"),
        ({"trainable_token_indices": (60_000,)}, GPT_2, "50257 rows of 'wte', found 60000"),
        ({"modules_to_save": ("",)}, TINY, "found '', which is none"),
        ({"modules_to_save": ("layers.1.mlp",)}, TINY, "of all layers, .* found 1 of 3"),
        ({"bias": "all"}, TINY, 'lora.bias: expected a model with biases, found "all" and none'),
        ({"bias": "lora_only"}, BIASED, "none in its targets"),
        ({"trainable_token_indices": (7, 96)}, TINY, "of the 96 rows of 'embed_tokens', found 96"),
        ({"trainable_token_indices": (95,)}, TINY, "found 95, a token that data.new_tokens adds"),
    ],
)
def test_what_cannot_be_chosen(settings: dict[str, Any], decoder: Any, message: str):
    with pytest.raises(jq.InputError, match=message):
        select_beside(
            LoraConfig(**settings), decoder, ["layers/mlp/up_proj/kernel"], new_tokens=[95]
        )


def test_a_weight_has_an_update_or_rows_that_train():
    with pytest.raises(jq.InputError, match="'lm_head' has an update, and rows for tokens"):
        select_beside(LoraConfig(), TINY, [HEAD], new_tokens=[95])
