# SPDX-License-Identifier: Apache-2.0
"""Write the golden adapters on experts and routers, by PEFT's target_parameters.

    python tests/reference/make_adapters.py

Random adapters on the golden models of mixtures of experts go to tests/golden/adapters, the logits
with each to tests/golden/expert_outputs.npz, for the token ids of family_outputs.npz. Made with
peft 0.21, transformers 5.23 and torch 2.13 on a CPU, in float32, with eager attention.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
# model, and what of LoraConfig
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral_experts": (
        "mixtral",
        dict(
            r=2,
            lora_alpha=3,
            target_modules=["q_proj"],
            target_parameters=["gate_up_proj", "experts.down_proj", "gate.weight"],
            rank_pattern={"experts.down_proj": 3},
        ),
    ),
    "qwen3_moe_experts": (
        "qwen3_moe",
        dict(
            r=2,
            lora_alpha=4,
            use_rslora=True,
            target_modules=[],
            target_parameters=[
                "model.layers.0.mlp.experts.down_proj",
                "layers.1.mlp.experts.gate_up_proj",
            ],
        ),
    ),
}


def main() -> None:
    """Write everything."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)
    known = np.load(GOLDEN / "family_outputs.npz")
    arrays: dict[str, Any] = {}
    for name, (base, settings) in ADAPTERS.items():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            GOLDEN / "models" / base, attn_implementation="eager", dtype="float32"
        )
        config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
        adapted = peft.get_peft_model(model, config).eval()
        adapted.peft_config["default"].base_model_name_or_path = base
        path = GOLDEN / "adapters" / name
        shutil.rmtree(path, ignore_errors=True)
        adapted.save_pretrained(path)
        (path / "README.md").unlink()
        with torch.no_grad():
            arrays[name] = adapted(torch.from_numpy(known[f"{base}/input_ids"])).logits.numpy()
    np.savez_compressed(GOLDEN / "expert_outputs.npz", **arrays)


if __name__ == "__main__":
    main()
