# SPDX-License-Identifier: Apache-2.0
"""Weighted combinations of adapters against PEFT's `add_weighted_adapter`."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jax_qlora as jq
from jax_qlora.interop.combine import combine_adapter_files
from jax_qlora.lora.combine_factors import Settings, drop_mask

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

MODULES = [f"self_attn/{m}_proj" for m in "qkvo"] + [
    f"mlp/{m}_proj" for m in ("gate", "up", "down")
]
WEIGHTS = {"one": 0.7, "two": -0.4, "three": 1.3}


@pytest.fixture
def both(torch: Any, peft: Any, theirs: Any, ours: Any, tmp_path: Path) -> Any:
    """A model of PEFT with three random adapters, and the same adapters here, read from files."""

    def make(**changes: dict[str, Any]) -> tuple[Any, list[Any]]:
        torch.manual_seed(11)
        settings: dict[str, dict[str, Any]] = {
            "one": dict(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1),
            "two": dict(r=4, lora_alpha=3, target_modules="all-linear", use_rslora=True),
            "three": dict(r=4, lora_alpha=4, target_modules="all-linear"),
        }
        model = None
        for name, options in settings.items():
            options = {"init_lora_weights": False, **options, **changes.get(name, {})}
            config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
            if model is None:
                model = peft.get_peft_model(theirs(), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        assert model is not None
        model.save_pretrained(tmp_path)
        return model, [jq.load_adapter(tmp_path / name, ours) for name in settings]

    return make


def theirs_combined(model: Any, ours: Any, path: Path, method: str, **options: Any) -> Any:
    model.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "mixed", combination_type=method, **options
    )
    model.save_pretrained(path, selected_adapters=["mixed"])
    return jq.load_adapter(path / "mixed", ours)


def assert_equal_updates(got: Any, want: Any, *, factors: bool) -> None:
    assert got.keys() == want.keys()
    for path, pair in want.items():
        assert got[path].rank == pair.rank
        np.testing.assert_allclose(got[path].delta(), pair.delta(), atol=2e-5, err_msg=path)
        assert np.abs(pair.delta()).max() > 1e-2
        if factors:
            np.testing.assert_allclose(got[path].a, pair.a, atol=1e-6, err_msg=path)
            np.testing.assert_allclose(got[path].b, pair.b, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("method", "sign"),
    [
        *((m, "total") for m in ("linear", "cat", "svd", "magnitude_prune", "magnitude_prune_svd")),
        *((m, s) for m in ("ties", "ties_svd") for s in ("total", "frequency")),
    ],
)
def test_the_same_adapter_as_peft(both: Any, ours: Any, tmp_path: Path, method: str, sign: str):
    model, adapters = both()
    density = 0.4 if method.startswith(("ties", "magnitude")) else None
    want = theirs_combined(
        model, ours, tmp_path / "w", method, density=density, majority_sign_method=sign
    )
    got = jq.combine_adapters(
        adapters, list(WEIGHTS.values()), method=method, density=density, majority_sign=sign
    )
    assert_equal_updates(got, want, factors=not method.endswith("svd"))
    assert {pair.dropout for pair in got.values()} == {0.1}


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_the_same_adapter_as_peft_given_what_is_dropped(
    torch: Any, both: Any, ours: Any, tmp_path: Path, monkeypatch: Any, method: str
):
    model, adapters = both()
    key, density = jax.random.key(5), 0.6
    kinds = (0,) if method.endswith("svd") else (0, 1)
    numbers = iter(
        (f"layers/{module}/kernel/{layer}", 2 * i + kind)
        for layer in range(ours.config.n_layers)
        for module in MODULES
        for kind in kinds
        for i in range(len(WEIGHTS))
    )

    def bernoulli(probabilities: Any) -> Any:
        assert float(probabilities.flatten()[0]) == pytest.approx(density)
        name, number = next(numbers)
        mask = drop_mask(key, name, number, tuple(probabilities.shape), density)
        return torch.tensor(mask, dtype=probabilities.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    want = theirs_combined(model, ours, tmp_path / "w", method, density=density)
    assert next(numbers, None) is None
    got = jq.combine_adapters(
        adapters, list(WEIGHTS.values()), method=method, density=density, key=key
    )
    assert_equal_updates(got, want, factors=not method.endswith("svd"))


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd"])
def test_ranks_targets_and_scales_may_differ_as_in_peft(
    both: Any, ours: Any, tmp_path: Path, method: str
):
    model, adapters = both(
        one=dict(target_modules=["q_proj", "up_proj"], r=2),
        two=dict(target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 9}),
        three=dict(target_modules=["q_proj", "up_proj", "v_proj"], r=6),
    )
    density = 0.5 if method == "ties_svd" else None
    want = theirs_combined(model, ours, tmp_path / "w", method, density=density, svd_rank=5)
    rank = 5 if method.endswith("svd") else None
    got = jq.combine_adapters(
        adapters, list(WEIGHTS.values()), method=method, density=density, rank=rank
    )
    for path, pair in want.items():
        np.testing.assert_allclose(got[path].delta(), pair.delta(), atol=2e-5, err_msg=path)
    assert got.keys() == want.keys() and len(got) == 3


def test_one_adapter_alone_is_weighted_as_in_peft(both: Any, ours: Any, tmp_path: Path):
    model, adapters = both()
    model.add_weighted_adapter(["one"], [-2.5], "mixed", combination_type="ties", density=0.3)
    model.save_pretrained(tmp_path / "w", selected_adapters=["mixed"])
    want = jq.load_adapter(tmp_path / "w" / "mixed", ours)
    got = jq.combine_adapters(adapters[:1], [-2.5], method="ties", density=0.3)
    assert_equal_updates(got, want, factors=True)


def test_peft_multiplies_by_the_root_of_the_rank_after_a_rank_stabilized_one(
    both: Any, ours: Any, tmp_path: Path
):
    # the new adapter takes over use_rslora, and alpha = rank: 0.21 scales a finished sum once more
    model, adapters = both()
    model.add_weighted_adapter(["two"], [1.0], "mixed", combination_type="linear")
    model.save_pretrained(tmp_path / "w", selected_adapters=["mixed"])
    theirs = jq.load_adapter(tmp_path / "w" / "mixed", ours)
    got = jq.combine_adapters(adapters[1:2], [1.0], method="linear")
    for path, pair in adapters[1].items():
        np.testing.assert_allclose(got[path].delta(), pair.delta(), atol=1e-5)
        np.testing.assert_allclose(theirs[path].delta(), 2.0 * pair.delta(), atol=1e-5)


def test_files_combined_here_load_in_peft(
    torch: Any, peft: Any, theirs: Any, both: Any, ours: Any, tokens: Any, tmp_path: Path
):
    model, _ = both(three=dict(r=6, target_modules=["q_proj", "up_proj"]))
    model.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "mixed", combination_type="svd", svd_rank=5
    )
    model.set_adapter("mixed")
    model.eval()  # its dropout
    combine_adapter_files(
        tmp_path / "ours",
        [tmp_path / name for name in WEIGHTS],
        list(WEIGHTS.values()),
        Settings(method="svd", rank=5),
    )
    loaded = peft.PeftModel.from_pretrained(theirs(), tmp_path / "ours")
    ids = torch.from_numpy(np.asarray(tokens, np.int64))
    with torch.no_grad():
        want, got, base = (m(ids).logits.numpy() for m in (model, loaded, theirs()))
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert np.abs(want - base).max() > 0.1
