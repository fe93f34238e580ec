# SPDX-License-Identifier: Apache-2.0
"""The PEFT + bitsandbytes side of train_step.py; needs torch, transformers, peft, bitsandbytes."""

import argparse
import gc
import os
import sys
import warnings
from typing import Any

warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bitsandbytes as bnb  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from worker import Runs, serve, side_arguments  # noqa: E402

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def to_nf4(linear: torch.nn.Linear, dtype: torch.dtype) -> torch.nn.Module:
    """A frozen bitsandbytes linear, NF4 with double quantization."""
    new = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    new.weight = bnb.nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=new,
    )
    return new.to("cpu")  # quantizes


def build(args: argparse.Namespace) -> tuple[Runs, dict[str, Any]]:
    """The step, and what there is to say about the model."""
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, args.dtype)
    config = transformers.LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
        vocab_size=args.vocab,
        max_position_embeddings=max(2048, args.seq),
        use_cache=False,
    )
    model: Any = transformers.LlamaForCausalLM(config).to(dtype)
    model.requires_grad_(False)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name in LINEARS:
                if hasattr(block, name):
                    setattr(block, name, to_nf4(getattr(block, name), dtype))
    gc.collect()
    if args.remat == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = peft.LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=0.0,
        target_modules=LINEARS,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, lora).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0)
    tokens = torch.randint(0, args.vocab, (args.batch, args.seq))

    def run() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert kinds, "no module is quantized"
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, bnb)}
    return {"step": run}, {"trainable": sum(p.numel() for p in trainable), **versions}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    sys.exit(serve(build, side_arguments(parser)))
