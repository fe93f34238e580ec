# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # QLoRA in JAX, step by step
#
# We take a real pretrained language model, SmolLM2-135M-Instruct, hold its weights in 4 bits, and
# train a small adapter until it rewrites the English of 1611 as the English of today.
#
# Everything here is a plain function of plain trees: a frozen `base`, a trainable `adapter`, and
# `attach(base, adapter)` where the two meet.

# %%
# SPDX-License-Identifier: Apache-2.0
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("jax_qlora") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "jax-qlora[train]"], check=True)

# %% [markdown]
# **SMOKE** runs the notebook in seconds on a tiny random model, whose directory it names; that is
# how the tests run it. Leave it empty.

# %%
SMOKE = os.environ.get("SMOKE", "")
STEPS = 2 if SMOKE else 80
BATCH = 8

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_qlora as jq
from jax_qlora.data import (
    batch_indices,
    encode_all,
    encode_prompt,
    load_splits,
    make_batch,
    padded_length,
)
from jax_qlora.generate import answer, make_generator
from jax_qlora.interop.download import download

# %% [markdown]
# ## A model in 4 bits
#
# The checkpoint is read tensor by tensor and quantized on the way (NF4 with double quantization),
# so the dense model never exists whole.

# %%
if not SMOKE:
    download("smollm2-135m-instruct")
model = jq.load_model(SMOKE or "smollm2-135m-instruct", quantization="nf4")
base = model.params
base["layers"]["self_attn"]["q_proj"]["kernel"]

# %% [markdown]
# ## An adapter
#
# `find_targets` traces the model once and reads from it which parameters are multiplied by
# activations. No table of module names is involved, so the same call works on any model.

# %%
targets = jq.find_targets(model.apply, base, jnp.zeros((1, 8), jnp.int32), match="all-linear")
adapter = jq.init_adapter(jax.random.key(0), targets, rank=16, alpha=32)
print(jq.summary(base, adapter))

# %% [markdown]
# B starts at zero, so a fresh adapter is the base model exactly:

# %%
tokens = jnp.arange(8)[None] + 5
assert jnp.array_equal(model.apply(jq.attach(base, adapter), tokens), model.apply(base, tokens))

# %% [markdown]
# ## A task
#
# Verses of the King James Version, and the same verses of the World English Bible, both in the
# public domain. Each pair is a chat; only the answer is learned.

# %%
if SMOKE:
    verse = [{"role": "user", "content": "thou hast"}, {"role": "assistant", "content": "you have"}]
    train = held_out = [{"messages": verse}] * BATCH
else:
    download("modern-english")
    train, held_out = load_splits("modern-english", held_out=64)
for message in held_out[0]["messages"]:
    print(f"{message['role']:>9}: {message['content']}")

# %%
limit = model.config.max_length
encoded, encoded_held_out = (encode_all(model.tokenizer, part, limit) for part in (train, held_out))
length = padded_length([*encoded, *encoded_held_out], multiple=32)
print(
    f"{len(encoded):,} pairs to learn from, {len(encoded_held_out)} held out, {length} tokens each"
)


# %% [markdown]
# ## Training
#
# An ordinary loss and an ordinary optax loop. The gradient is taken with respect to the adapter
# alone: nothing frozen can move, and the optimizer holds no state for it.


# %%
def loss(adapter, base, batch):
    params = jq.attach(base, adapter)
    logits = model.apply(params, batch["tokens"], attention_mask=batch["attention_mask"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch["tokens"][:, 1:])
    answer = batch["loss_mask"][:, 1:].astype(jnp.float32)
    return jnp.sum(losses * answer) / jnp.sum(answer)


warmup = min(10, STEPS // 2)
schedule = optax.warmup_cosine_decay_schedule(2e-4, 2e-3, warmup, STEPS)
adam = optax.adamw(schedule, b2=0.99, weight_decay=0)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)


@jax.jit
def step(adapter, state, base, batch):
    value, grads = jax.value_and_grad(loss)(adapter, base, batch)
    updates, state = optimizer.update(grads, state, adapter)
    return optax.apply_updates(adapter, updates), state, value


evaluate = jax.jit(loss)


def held_out_loss(adapter):
    parts = [encoded_held_out[i : i + BATCH] for i in range(0, len(encoded_held_out), BATCH)]
    return np.mean([evaluate(adapter, base, make_batch(part, length)) for part in parts])


# %%
before = held_out_loss(adapter)
state = optimizer.init(adapter)
history = []
for i in range(STEPS):
    rows = batch_indices(0, i, batch_size=BATCH, count=len(encoded))
    batch = make_batch([encoded[row] for row in rows], length)
    adapter, state, value = step(adapter, state, base, batch)
    history.append(float(value))
    if i % 10 == 0 or i == STEPS - 1:
        print(f"step {i:3d}  loss {history[-1]:.3f}")
print(f"held-out loss: {before:.3f} before, {held_out_loss(adapter):.3f} after")

# %%
import matplotlib.pyplot as plt

plt.figure(figsize=(6, 2.5))
plt.plot(history)
plt.xlabel("step")
plt.ylabel("training loss")
plt.show()

# %% [markdown]
# ## Before and after
#
# One generator serves the base and the tuned model: parameters are an argument.

# %%
generator = make_generator(model, max_new_tokens=4 if SMOKE else 64)
chats = [example["messages"] for example in held_out[:3]]
prompts = [encode_prompt(model.tokenizer, chat[:-1]) for chat in chats]
key = jax.random.key(0)
base_answers = answer(generator, model, base, prompts, key=key)
tuned_answers = answer(generator, model, jq.attach(base, adapter), prompts, key=key)
for chat, was, now in zip(chats, base_answers, tuned_answers, strict=True):
    print(f"  verse: {chat[-2]['content']}\n   base: {was}\n  tuned: {now}")
    print(f" modern: {chat[-1]['content']}\n")

# %% [markdown]
# ## Take it along
#
# The adapter is saved in the format of Hugging Face PEFT, so `peft` loads it onto the same model.

# %%
jq.save_adapter("adapter", adapter, model)
loaded = jq.load_adapter("adapter", model)
assert jax.tree.all(jax.tree.map(np.array_equal, adapter, loaded))
print(sorted(os.listdir("adapter")))

# %% [markdown]
# ## The same with your own model
#
# `load_model` returned a function that was already lifted. For a function of your own, in any JAX
# library, `lift` does it: the model's code stays as it is.

# %%
from flax import nnx

rngs = nnx.Rngs(0)
net = nnx.Sequential(nnx.Linear(64, 256, rngs=rngs), nnx.relu, nnx.Linear(256, 8, rngs=rngs))
graphdef, params = nnx.split(net)


def apply(params, x):
    return nnx.merge(graphdef, params)(x)


x = jnp.ones((4, 64))
targets = jq.find_targets(apply, params, x)
base = jq.quantize(params, targets)
adapter = jq.init_adapter(jax.random.key(1), targets, rank=4)
lifted = jq.lift(apply)
gradients = jax.grad(lambda adapter: lifted(jq.attach(base, adapter), x).sum())(adapter)
print(jq.summary(base, adapter))
