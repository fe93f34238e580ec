# SPDX-License-Identifier: Apache-2.0
"""Write the golden models of families that are no part of the shared fixtures, by transformers.

    python tests/reference/make_families.py

Tiny random models go to tests/golden/models, their logits and greedy continuations to
tests/golden/family_outputs.npz, with the keys that model_outputs.npz has. Made with transformers
5.23 and torch 2.13 on a CPU, in float32, with eager attention.
"""

from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
COMMON: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,  # far from uniform logits
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **COMMON,
            "moe_intermediate_size": 24,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "gpt2": (
        "GPT2LMHead",
        dict(
            vocab_size=96,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_inner=64,
            n_positions=64,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
}
SEQ, PADDING, NEW = 20, 7, 12


def outputs(model: Any, torch: Any) -> dict[str, np.ndarray]:
    """Logits of two rows, the second padded on the right, then on the left; and what follows."""
    rng = np.random.default_rng(3)
    ids = torch.from_numpy(rng.integers(3, model.config.vocab_size, (2, SEQ)))
    mask = torch.ones_like(ids)
    ids[1, -PADDING:], mask[1, -PADDING:] = 0, 0
    left_ids, left_mask = ids.clone(), mask.clone()
    left_ids[1], left_mask[1] = ids[1].roll(PADDING), mask[1].roll(PADDING)
    positions = (left_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        left = model(left_ids, attention_mask=left_mask, position_ids=positions).logits
        greedy = model.generate(
            left_ids, attention_mask=left_mask, max_new_tokens=NEW, do_sample=False, eos_token_id=-1
        )
    found = {
        "input_ids": ids,
        "attention_mask": mask,
        "logits": logits,
        "left/input_ids": left_ids,
        "left/attention_mask": left_mask,
        "left/logits": left,
        "greedy": greedy[:, SEQ:],
    }
    return {key: x.numpy() for key, x in found.items()}


def main() -> None:
    """Write everything."""
    import torch
    import transformers

    torch.set_num_threads(1)
    arrays: dict[str, Any] = {}
    for name, (prefix, settings) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{prefix.removesuffix('LMHead')}Config")(**settings)
        config._attn_implementation = "eager"
        kind = f"{prefix}Model" if prefix.endswith("LMHead") else f"{prefix}ForCausalLM"
        model = getattr(transformers, kind)(config).eval()
        if name == "gpt2":  # whose biases start at zero, and norms at one
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(GOLDEN / "models" / name)
        arrays |= {f"{name}/{key}": x for key, x in outputs(model, torch).items()}
    np.savez_compressed(GOLDEN / "family_outputs.npz", **arrays)


if __name__ == "__main__":
    main()
