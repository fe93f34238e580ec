# SPDX-License-Identifier: Apache-2.0
"""cuDNN's attention without a GPU: its call as XLA computes it, and the program for a GPU."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_qlora as jq
from jax_qlora.config import from_table
from jax_qlora.errors import InputError
from jax_qlora.models import cudnn_attention as cudnn
from jax_qlora.models import decoder_functions
from jax_qlora.models.blockwise_attention import blockwise_attention
from jax_qlora.models.per_layer import ALL
from jax_qlora.models.presets import LLAMA_3_1_8B, TINY
from jax_qlora.train import train

from ..helpers import GOLDEN, assert_trees_close, normal
from ..tiny import quantized, tiny_model

ROWS, SEQ, HEAD_DIM, SCALE = 2, 48, 8, 0.4


@pytest.fixture
def through_xla(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """jax's own definition of the call, in place of cuDNN's kernel; the calls that were made."""
    real, calls = jax.nn.dot_product_attention, []

    def call(*arrays: Any, implementation: str, **settings: Any) -> jax.Array:
        assert implementation == "cudnn"
        calls.append(settings)
        return real(*arrays, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    with jax.numpy_dtype_promotion("standard"):  # as jax's own needs
        yield calls


@pytest.fixture
def for_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Lowers a function for a GPU, as if there was cuDNN 9.10."""
    where = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(where, lambda: 91000)

    def lower(f: Callable, *args: Any) -> str:
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()

    return lower


def qkv(heads: int = 4, kv_heads: int = 2, seq: int = SEQ, dtype: Any = jnp.float32) -> Any:
    q, dout = (normal((ROWS, seq, heads, HEAD_DIM), i, dtype) for i in (0, 3))
    k, v = (normal((ROWS, kv_heads, seq, HEAD_DIM), i, dtype) for i in (1, 2))
    return q, k, v, dout


def padded(right: int) -> jax.Array:
    """All tokens but the last of the first row."""
    return jnp.arange(SEQ)[None] < jnp.asarray([[SEQ - right], [SEQ]])


def both_ways(inputs: Any, valid: Any, window: int | None, windows: Any) -> Any:
    """Values and gradients by either attention, of tokens that are not padding."""
    q, k, v, dout = inputs

    def run(attend: Callable) -> Any:
        out, pull = jax.vjp(lambda *qkv: attend(SCALE, *qkv, valid), q, k, v)
        there = valid[:, :, None, None]
        return jnp.where(there, out, 0), *pull(jnp.where(there, dout, 0))

    traced = None if windows == (None,) else jnp.int32(ALL if window is None else window)
    got = run(functools.partial(cudnn.cudnn_attention, window=traced, windows=windows))
    return got, run(functools.partial(blockwise_attention, window=window, block=(16, 16)))


@pytest.mark.parametrize(("heads", "right"), [((4, 2), 0), ((2, 2), 9), ((3, 1), 9)])
def test_the_call_computes_what_blocks_do(through_xla: list, heads: tuple[int, int], right: int):
    got, want = both_ways(qkv(*heads), padded(right), None, (None,))
    assert_trees_close(got, want, rtol=1e-5, atol=1e-5)
    assert through_xla == [{"scale": SCALE, "is_causal": True}]


@pytest.mark.parametrize(
    ("window", "windows"),
    [(1, (1,)), (5, (5, None)), (None, (5, None)), (500, (500, None))],
)
def test_windows(through_xla: list, window: int | None, windows: tuple):
    """One of the model's, which a layer chooses by number where they differ."""
    got, want = both_ways(qkv(), padded(9), window, windows)
    assert_trees_close(got, want, rtol=1e-5, atol=1e-5)
    differ = {w if w is not None and w < SEQ else None for w in windows}
    assert len(through_xla) == len(differ)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(through_xla: list, dtype: Any):
    got, want = both_ways(qkv(dtype=dtype), padded(9), 7, (7,))
    assert all(x.dtype == dtype for x in got)
    assert_trees_close(got, want, rtol=3e-2, atol=3e-2)


def test_padding_that_is_not_on_the_right_gives_nan(through_xla: list):
    q, k, v, _ = qkv()
    place = jnp.arange(SEQ)
    valid = jnp.stack([place >= 3, place < SEQ - 3])
    for wrong in (valid, valid.at[0].set(place != 5)):
        out = cudnn.cudnn_attention(SCALE, q, k, v, wrong)
        assert bool(jnp.all(jnp.isnan(out[0]))) and bool(jnp.all(jnp.isfinite(out[1])))
    nothing = jnp.zeros_like(valid)  # a row of padding alone is on the right
    assert bool(jnp.all(jnp.isfinite(cudnn.cudnn_attention(SCALE, q, k, v, nothing))))


def kernels(text: str) -> tuple[list[dict], list[dict]]:
    """What cuDNN is told by the forward and the backward kernels of a lowered program."""
    calls = re.findall(r'custom_call @("?__cudnn\$fmha\w+"?)\(.*?backend_config = "(.*?)",? ', text)
    told = [
        (name.strip('"'), json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"])
        for name, config in calls
    ]
    assert {name for name, _ in told} <= {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert len(told) == text.count("@__cudnn$")
    back = [config for name, config in told if name.endswith("Backward")]
    return [config for name, config in told if not name.endswith("Backward")], back


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("window", [None, 7])
def test_a_program_for_a_gpu_holds_the_kernels(for_cuda: Callable, window: Any, dtype: Any):
    q, k, v, dout = qkv(dtype=dtype)
    attend = functools.partial(cudnn.cudnn_attention, SCALE, windows=(window,))

    def gradients(q: Any, k: Any, v: Any, dout: Any, valid: Any) -> Any:
        out, pull = jax.vjp(functools.partial(attend, valid=valid), q, k, v)
        return out, pull(dout)

    forward, backward = kernels(for_cuda(gradients, q, k, v, dout, padded(9)))
    assert len(forward) == len(backward) == 1
    for config in forward + backward:
        assert config["mask_type"] == "CAUSAL" and config["dropout_rate"] == 0
        assert config["fmha_scale"] == SCALE
        assert config["sliding_window_length"] == (window or 0)
    alone, none = kernels(for_cuda(attend, q, k, v, padded(9)))
    assert len(alone) == 1 and not none


@functools.cache
def tiny() -> tuple[Any, Any, Any]:
    model = tiny_model(n_layers=2, sliding_window=9, local_layers=(True, False))
    return model, *quantized(model)


def loss_of(adapter: Any, attention: str, remat: str, **changes: Any) -> jax.Array:
    model, base, _ = tiny()
    config = dataclasses.replace(model.config, **changes)
    functions = decoder_functions(
        config, compute_dtype=jnp.bfloat16, attention=attention, remat=remat, transform=jq.lift
    )
    tokens = jax.random.randint(jax.random.key(2), (ROWS, SEQ), 3, model.config.vocab_size)
    hidden = functions.hidden(jq.attach(base, adapter), tokens, attention_mask=padded(9))
    hidden = jnp.where(padded(9)[..., None], hidden, 0).astype(jnp.float32)
    return jnp.mean(hidden**2 * jnp.cos(jnp.arange(hidden.shape[-1]))[None, None])


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_a_decoder_learns_the_same_with_it(through_xla: list, remat: str):
    """Over 4-bit weights, by autodiff and in the loop with its own backward."""
    got, want = (
        jax.jit(jax.value_and_grad(functools.partial(loss_of, attention=attention, remat=remat)))(
            tiny()[2]
        )
        for attention in ("cudnn", "blocks")
    )
    assert float(got[0]) == pytest.approx(float(want[0]), rel=2e-2)
    for g, w in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert float(jnp.linalg.norm(g - w)) < 0.1 * float(jnp.linalg.norm(w)) and jnp.any(w)
    assert through_xla


@pytest.mark.parametrize(("remat", "forwards"), [("none", 1), ("dots", 2), ("full", 2)])
def test_the_kernel_runs_again_only_where_asked(for_cuda: Callable, remat: str, forwards: int):
    alike = {"sliding_window": None, "local_layers": ()}
    loss = functools.partial(loss_of, attention="cudnn", remat=remat, **alike)
    forward, backward = kernels(for_cuda(jax.grad(loss), tiny()[2]))
    assert (len(forward), len(backward)) == (forwards, 1)


def test_what_it_cannot_do_is_said_at_once():
    def functions(**changes: Any) -> Any:
        config = dataclasses.replace(TINY, **changes)
        return decoder_functions(config, compute_dtype=jnp.bfloat16, attention="cudnn")

    with pytest.raises(InputError, match="found attention_softcap = 50.*Leave train.attention out"):
        functions(attention_softcap=50.0)
    with pytest.raises(InputError, match="found head_dim = 12"):
        functions(head_dim=12)
    with pytest.raises(InputError, match="found head_dim = 264"):
        functions(head_dim=264)
    with pytest.raises(InputError, match="found float32. Set train.compute_dtype"):
        decoder_functions(TINY, attention="cudnn")
    with pytest.raises(InputError, match="attention is 'flash': expected one of blocks, cudnn"):
        decoder_functions(TINY, attention="flash")
    tokens = jnp.ones((2, 8), jnp.int32)
    params = jq.models.abstract_params(TINY)
    with pytest.raises(InputError, match="expected one document a row, found segment_ids"):
        jax.eval_shape(
            functools.partial(functions().apply, segment_ids=tokens, tokens=tokens), params
        )
    looped = decoder_functions(
        TINY, compute_dtype=jnp.bfloat16, attention="cudnn", remat="full", layer_chunk=256,
        transform=jq.lift,
    )  # fmt: skip
    with pytest.raises(InputError, match="2 x 600 tokens.*found 256. Set train.layer_chunk = 1200"):
        jax.eval_shape(
            functools.partial(looped.hidden, segment_ids=None, positions=jnp.zeros((2, 600), int)),
            params,
            jnp.ones((2, 600), jnp.int32),
        )


def settings(output: Path, **changes: Any) -> Any:
    return from_table(
        {
            "model": str(GOLDEN / "models" / "llama"),
            "output": str(output),
            "data": {
                "source": str(GOLDEN / "shout.jsonl"),
                "max_length": 64,
                "length_multiple": 512,
            },
            "optim": {"warmup_steps": 0},
            "eval": {"examples": 1},
            "train": {"steps": 1, "attention": "cudnn", "compute_dtype": "bfloat16", **changes},
        }
    )


def test_a_run_stops_before_the_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jax_qlora.interop.load.load_params", None)
    with pytest.raises(InputError, match='"cudnn" on cpu .*: expected an NVIDIA GPU with cuDNN'):
        train(settings(tmp_path))
    monkeypatch.setattr("jax_qlora.train.recipe.check_device", lambda *_: None)
    config = settings(tmp_path, remat="full", layer_chunk=256, batch_size=8)
    with pytest.raises(InputError, match="expected train.layer_chunk to hold 8 x 512 tokens"):
        train(config)
    with pytest.raises(InputError, match="expected an NVIDIA GPU"):
        jq.load_model(GOLDEN / "models" / "llama", attention="cudnn", compute_dtype=jnp.bfloat16)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only in name."""
    cudnn._disagreement.cache_clear()
    device = SimpleNamespace(platform="gpu", device_kind="H100")
    monkeypatch.setattr(jax, "devices", lambda: [device])


LOCAL = dataclasses.replace(TINY, sliding_window=100, local_layers=(True,) * TINY.n_layers)


def test_a_device_is_asked_to_compute(on_a_gpu: None, through_xla: list):
    cudnn.check_device(LOCAL, jnp.bfloat16)
    assert through_xla[0]["local_window_size"] == (99, 0)
    cudnn.check_device(LOCAL, jnp.bfloat16)
    assert len(through_xla) == 1  # once


def test_a_device_without_cudnn(on_a_gpu: None):
    with pytest.raises(InputError, match=r"on gpu \(H100\): .* found: cuDNN is not detected"):
        cudnn.check_device(TINY, jnp.bfloat16)


def test_a_device_with_other_numbers(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch):
    def wrong(q: jax.Array, *_: Any, **__: Any) -> jax.Array:
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", wrong)
    with pytest.raises(InputError, match="found a relative error of"):
        cudnn.check_device(TINY, jnp.bfloat16)


@pytest.mark.parametrize("windowed", [False, True])
def test_a_device_that_gives_no_number(
    on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, windowed: bool
):
    """For one of the model's two windows, whichever is looked at first."""
    right = jax.nn.dot_product_attention

    def wrong(q: jax.Array, *args: Any, **settings: Any) -> jax.Array:
        out = right(q, *args, **(settings | {"implementation": "xla"}))
        return jnp.full_like(out, jnp.nan) if ("local_window_size" in settings) == windowed else out

    monkeypatch.setattr(jax.nn, "dot_product_attention", wrong)
    mixed = dataclasses.replace(LOCAL, local_layers=(True, *(False,) * (TINY.n_layers - 1)))
    with pytest.raises(InputError, match="found a relative error of nan"):
        with jax.numpy_dtype_promotion("standard"):
            cudnn.check_device(mixed, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", [dataclasses.replace(LOCAL, head_dim=64), LLAMA_3_1_8B])
def test_on_a_gpu(decoder: Any):
    """JAX_PLATFORMS=cuda pytest -m gpu tests/models/test_cudnn_attention.py."""
    cudnn.check_device(decoder, jnp.bfloat16)


def test_a_plan_says_that_it_is_the_formulas():
    report = jq.fit("tiny", seq=32, attention="cudnn")
    assert report.source == "formula" and "cuDNN plans its attention on the card" in report.note
    assert report.fits
