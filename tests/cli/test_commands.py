# SPDX-License-Identifier: Apache-2.0
"""The commands as a user runs them, on a tiny model."""

import io
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora.cli.loading import Source, complete
from jax_qlora.cli.main import main
from jax_qlora.cli.writing import updates_note
from jax_qlora.interop.hf_write import SavedModel
from jax_qlora.quant.layout import KernelLayout

from ..helpers import GOLDEN, ROOT, assert_trees_close

LLAMA = str(GOLDEN / "models" / "llama")
SHOUT = str(GOLDEN / "shout.jsonl")
COMMON = [str(ROOT / "configs" / "smoke.toml"), "--model", LLAMA, "--data.source", SHOUT]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of `jax-qlora train`."""
    output = tmp_path_factory.mktemp("cli") / "run"
    with jax.numpy_dtype_promotion("standard"):
        assert main(["train", *COMMON, "--output", str(output), "--eval.answers", "2"]) == 0
    return output


def answers(capsys, *args):
    assert main(["generate", *args, "--max_new_tokens", "6", "--json"]) == 0
    return [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]


def test_generate_with_and_without_the_adapter(finished, capsys):
    tuned = answers(capsys, "--run", str(finished), "tau", "omega")
    sampled = json.loads((finished / "samples.jsonl").read_text().splitlines()[0])
    assert sampled["prompt"] == "tau" and sampled["tuned"].startswith(tuned[0])
    by_parts = answers(
        capsys,
        "--model",
        LLAMA,
        "--adapter",
        str(finished / "adapter"),
        "--system",
        "Shout.",
        "tau",
    )
    assert by_parts == tuned[:1]
    base = answers(capsys, "--model", LLAMA, "--system", "Shout.", "tau")
    assert base != by_parts


def test_generate_compares_adapters_in_one_batch(finished, tmp_path, capsys):
    own = str(finished / "adapter")
    opposite = tmp_path / "opposite"
    combine = ["adapters", "combine", str(opposite), own, "--method", "cat", "--weights", "-2"]
    assert main(combine) == 0
    capsys.readouterr()
    common = ["--model", LLAMA, "--system", "Shout."]
    args = ["generate", *common, "--max_new_tokens", "6", "tau", "omega", "--json"]
    assert main([*args, "--adapter", own, "--compare", f"opposite={opposite}"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ["base", "adapter", "opposite"]
    assert [(r["prompt"], r["adapter"]) for r in records] == [
        (prompt, name) for prompt in ("tau", "omega") for name in names
    ]
    alone = [[], ["--adapter", own], ["--adapter", str(opposite)]]
    for name, option in zip(names, alone, strict=True):
        want = answers(capsys, *common, *option, "tau", "omega")
        assert [r["answer"] for r in records if r["adapter"] == name] == want
    assert len({r["answer"] for r in records if r["prompt"] == "tau"}) > 1


def test_generate_reads_prompts_from_standard_input(finished, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("tau\n\nomega\n"))
    piped = answers(capsys, "--run", str(finished))
    assert piped == answers(capsys, "--run", str(finished), "tau", "omega")


def test_generate_samples_with_a_seed(finished, capsys):
    hot = ["--run", str(finished), "--temperature", "3", "tau"]
    assert answers(capsys, *hot, "--seed", "1") == answers(capsys, *hot, "--seed", "1")
    assert answers(capsys, *hot, "--seed", "1") != answers(capsys, *hot, "--seed", "2")


def test_merge_writes_a_model_with_the_same_logits(finished, tmp_path, capsys):
    output = tmp_path / "merged"
    assert main(["merge", str(output), "--run", str(finished), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["output"], figures["dtype"]) == (str(output), "float32")
    assert figures["tensors"] == 21 and figures["updates"] == 14
    assert figures["logit_difference"] < 1e-3 < 1 < figures["largest_logit"]
    merged = jq.load_model(output, quantization=None)
    model = jq.load_model(LLAMA, quantization="nf4")
    params = jq.attach(model.params, jq.load_adapter(finished / "adapter", model))
    tokens = jnp.asarray(np.arange(3, 40)[None])
    np.testing.assert_allclose(
        merged.apply(merged.params, tokens), model.apply(params, tokens), atol=2e-4
    )
    assert "`" + LLAMA + "`" in (output / "README.md").read_text()
    assert main(["merge", str(output), "--run", str(finished)]) == 2
    assert "is in use" in capsys.readouterr().err
    assert main(["merge", str(output), "--run", str(finished), "--overwrite"]) == 0
    text = capsys.readouterr().out
    assert "21 tensors" in text and "14 updates folded in" in text
    assert "Largest difference of a logit" in text


def test_export_in_every_format(finished, tmp_path, capsys):
    model = jq.load_model(LLAMA, quantization="nf4")
    params = jq.attach(model.params, jq.load_adapter(finished / "adapter", model))
    tokens = jnp.asarray(np.arange(3, 40)[None])
    want = model.apply(params, tokens)

    def export(name, *args):
        assert main(["export", str(tmp_path / name), "--run", str(finished), "--json", *args]) == 0
        return json.loads(capsys.readouterr().out)

    figures = export("m.gguf", "--format", "gguf", "--gguf_type", "f32")
    assert figures["updates"] == 14 and figures["logit_difference"] < 1e-3
    written = jq.load_model(tmp_path / "m.gguf", quantization=None)
    np.testing.assert_allclose(written.apply(written.params, tokens), want, atol=2e-4)
    assert export("q.gguf", "--format", "gguf", "--gguf_type", "q4_0")["logit_difference"] > 1e-3
    figures = export("bnb", "--format", "bnb")
    assert 1e-3 < figures["logit_difference"] < figures["largest_logit"]
    kernel = jq.load_model(tmp_path / "bnb").params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.format == "nf4"
    assert export("hf", "--format", "hf", "--dtype", "bfloat16")["dtype"] == "bfloat16"

    figures = export("a.gguf", "--format", "gguf-lora")
    assert figures["updates"] == 14 and figures["tensors"] == 28
    assert export("peft", "--format", "peft")["modules"] == 14
    again = jq.load_adapter(tmp_path / "peft", model)
    np.testing.assert_allclose(model.apply(jq.attach(model.params, again), tokens), want, atol=1e-5)

    for args, message in {
        ("peft", "--format", "peft", "--run", str(finished)): "is in use",
        ("x", "--format", "gguf", "--run", str(finished)): "expected the name of a .gguf file",
        ("x", "--format", "peft", "--model", LLAMA): "expected --run or --adapter",
        ("x", "--format", "hf", "--model", LLAMA, "--adapter", "a"): "--quantization: expected",
    }.items():
        assert main(["export", str(tmp_path / args[0]), *args[1:]]) == 2
        assert message in capsys.readouterr().err


def test_an_adapter_in_gguf_is_taken_like_a_directory(finished, tmp_path, capsys):
    own, file = str(finished / "adapter"), str(tmp_path / "a.gguf")
    assert main(["export", file, "--run", str(finished), "--format", "gguf-lora"]) == 0
    source = ["--model", LLAMA, "--adapter", file]
    assert main(["export", str(tmp_path / "peft"), *source, "--format", "peft"]) == 0
    merge = ["merge", str(tmp_path / "merged"), *source, "--quantization", "nf4", "--json"]
    capsys.readouterr()
    assert main(merge) == 0
    assert json.loads(capsys.readouterr().out)["updates"] == 14
    model = jq.load_model(LLAMA, quantization="nf4")
    want = {p: x.delta() for p, x in jq.load_adapter(own, model).items()}
    for path in (file, str(tmp_path / "peft")):
        got = {p: x.delta() for p, x in jq.load_adapter(path, model).items()}
        assert_trees_close(got, want, rtol=1e-5, atol=1e-6)
    shout = ["--system", "Shout.", "tau"]
    assert answers(capsys, *source, *shout) == answers(
        capsys, "--model", LLAMA, "--adapter", own, *shout
    )


def test_export_refuses_before_it_loads(finished, tmp_path, capsys, monkeypatch):
    def load(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr("jax_qlora.cli.export.load", load)
    used = tmp_path / "used.gguf"
    used.write_bytes(b"mine")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").touch()
    bare = tmp_path / "bare"
    shutil.copytree(LLAMA, bare)
    (bare / "tokenizer.json").unlink()
    run = f"--run {finished}"
    for args, message in {
        f"used.gguf --format gguf {run}": "used.gguf' is in use",
        f"x.gguf --format gguf --model {GOLDEN / 'models' / 'mixtral'}": "say sliding_window = 6",
        f"x.gguf --format gguf --model {bare}": "has no tokenizer.json: expected",
        f"used --format bnb {run}": "used' is in use",
        f"x --format bnb {run} --quantization int4": "int4 in blocks of",
    }.items():
        assert main(["export", *f"{tmp_path}/{args}".split()]) == 2
        assert message in capsys.readouterr().err


def test_the_note_on_an_adapter_counts_what_is_no_update(tmp_path):
    saved = SavedModel(path=tmp_path, tensors=1, nbytes=4, files={}, updates=0)
    layout = KernelLayout(shape=(4, 4), in_axes=(-2,))
    zero = jq.LoraPair(
        a=jnp.zeros((1, 4)), b=jnp.zeros((4, 1)), layout=layout, scale=1.0, dropout=0.0
    )
    assert "changes nothing" in updates_note(saved, {"q_proj/kernel": zero})[0]
    adapter = {"q_proj/kernel": zero, "norm/scale": jnp.ones(4)}
    assert updates_note(saved, adapter) == ["0 updates folded in, and 1 weight trained beside."]


def test_export_of_a_model_alone(tmp_path, capsys):
    for name, *args in [("bnb", "--format", "bnb"), ("hf", "--format", "hf"),
                        ("m.gguf", "--format", "gguf")]:  # fmt: skip
        assert main(["export", str(tmp_path / name), "--model", LLAMA, *args]) == 0
        assert f"Wrote '{tmp_path / name}'" in capsys.readouterr().out
    want = jq.load_model(LLAMA, quantization=None).params["layers"]["mlp"]["up_proj"]["kernel"]
    got = jq.load_model(tmp_path / "hf", quantization=None).params["layers"]["mlp"]["up_proj"]
    np.testing.assert_array_equal(got["kernel"], want)


def test_quantize_writes_a_model_that_is_read_as_it_is(tmp_path, capsys):
    output = tmp_path / "four"
    assert main(["quantize", LLAMA, str(output), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["output"], figures["format"]) == (str(output), "nf4")
    kernel = jq.load_model(output).params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.format == "nf4" and kernel.double_quant
    assert main(["quantize", LLAMA, str(output)]) == 2
    assert "is in use" in capsys.readouterr().err
    other = ["--format", "fp4", "--no_double_quant", "--block_size", "32", "--overwrite"]
    assert main(["quantize", LLAMA, str(output), *other]) == 0
    assert f"Wrote '{output}': 63 tensors" in capsys.readouterr().out
    kernel = jq.load_model(output).params["layers"]["mlp"]["up_proj"]["kernel"]
    assert (kernel.format, kernel.block_size, kernel.double_quant) == ("fp4", 32, False)
    assert main(["quantize", LLAMA, str(output), "--block_size", "48", "--overwrite"]) == 2
    assert "blocks of 48: bitsandbytes has" in capsys.readouterr().err


def test_preview_shows_what_is_learned(capsys):
    assert main(["preview", *COMMON]) == 0
    text = capsys.readouterr().out
    assert "18 examples to learn, 6 held out" in text and "⟦" in text and "2.67 epochs" in text
    assert main(["preview", *COMMON, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["examples"] == 18 and figures["tokens"]["most"] <= 64


@pytest.fixture
def pissa(tmp_path):
    """A run whose base is its own: 4 bits of what PiSSA leaves of the weights."""
    run = tmp_path / "pissa"
    (run / "adapter").mkdir(parents=True)
    (run / "config.toml").write_text(f'model = "{LLAMA}"\n[lora]\ninit = "pissa"\n')
    return str(run)


def test_a_run_with_a_base_of_its_own_keeps_it(pissa):
    for given in (None, "nf4"):
        settings = complete(Source(run=pissa, quantization=given))[2]
        assert settings["start"].lora.init == "pissa"
    name, adapter, settings = complete(Source(run=pissa, quantization="none"))
    assert (name, adapter) == (LLAMA, f"{pissa}/adapter")
    assert "start" not in settings and settings["quantization"] is None
    with pytest.raises(jq.InputError, match="fp4: '.*' started from pissa, whose base is in nf4"):
        complete(Source(run=pissa, quantization="fp4"))


def test_a_base_of_its_own_goes_with_its_own_adapter(pissa, tmp_path):
    """On another copy of the model too; with another adapter only where the base is dense."""
    given = f"{pissa}/../pissa/adapter"
    assert "start" in complete(Source(run=pissa, adapter=given))[2]
    settings = complete(Source(run=pissa, model="elsewhere"))[2]
    assert settings["start"].model == "elsewhere"
    with pytest.raises(jq.InputError, match="--adapter .*expected the adapter that was trained on"):
        complete(Source(run=pissa, adapter=str(tmp_path)))
    dense = complete(Source(run=pissa, adapter=str(tmp_path), quantization="none"))
    assert dense[1] == str(tmp_path) and "start" not in dense[2]


def test_a_run_with_a_base_of_its_own_is_not_compared(pissa, tmp_path, capsys):
    assert main(["generate", "--run", pissa, "--compare", f"x={tmp_path}", "hi"]) == 2
    assert "its 4-bit base is its own: expected a base that all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("train absent.toml", "No settings file at 'absent.toml'"),
        ("train --model absent", "No model at 'absent'"),
        ("train --model {llama} --data.source absent.jsonl", "No data file at 'absent.jsonl'"),
        ("train --model {llama} --data.source {broken}", "broken.jsonl' line 2: not valid JSON"),
        (
            "train --model {llama} --data.source {shout} --eval.examples 6 --data.max_length 8",
            "at most 8 fit",
        ),
        ("train --model {llama} --data.source {shout}", "Hold out fewer (eval.examples)"),
        ("preview --model {llama} --data.source absent.jsonl", "No data file"),
        ("generate hello", "Which model? Give --run"),
        ("generate --run {tmp} hello", "is no run: expected a config.toml"),
        ("generate --run {cut} hello", "has no adapter yet: expected"),
        ("generate --model {llama} --temperature -1 hello", "temperature: expected at least 0"),
        ("generate --model {llama} --adapter {tmp} hello", "adapter_config.json"),
        ("generate --model {llama} --compare {tmp} hello", "expected NAME=DIRECTORY"),
        ("generate --model {llama} --compare a=x --compare a=y hi", "expected different names"),
        ("generate --model {truncated} hello", "model.safetensors"),
        ("merge {tmp}/out --model {llama} --adapter {tmp}", "--quantization: expected nf4"),
    ],
)
def test_bad_input_stops_with_one_message(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    for file in (GOLDEN / "models" / "llama").iterdir():
        data = file.read_bytes()
        (truncated / file.name).write_bytes(data[:5000] if file.suffix == ".safetensors" else data)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.toml").write_text(f'model = "{LLAMA}"\n')
    names = {
        "llama": LLAMA, "broken": broken, "shout": SHOUT, "tmp": tmp_path,
        "truncated": truncated, "cut": cut,
    }  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    assert main(shlex.split(args.format(**names))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) <= 2
    assert sorted(tmp_path.rglob("*")) == before


def start(output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "jax_qlora", "train", *COMMON, "--output", str(output)]
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *more], stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def test_ctrl_c_in_a_real_process_saves_and_says_how_to_resume(tmp_path):
    long = ["--train.steps", "100000", "--eval.answers", "0", "--eval.every", "100000"]
    process = start(tmp_path / "run", *long)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Training 1/"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Stopped after step" in out and "Traceback" not in err
    resume = next(line for line in err.splitlines() if line.startswith("Resume with: "))
    assert shlex.split(resume)[2:4] == ["jax-qlora", "train"] and "--train.steps" in resume
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert saved[-1].name.startswith("step-")


def test_ctrl_c_before_the_first_step_is_quiet(tmp_path):
    process = start(tmp_path / "run")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
