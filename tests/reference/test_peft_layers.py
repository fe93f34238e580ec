# SPDX-License-Identifier: Apache-2.0
"""Convolutions and experts: an adapter here is the same adapter in PEFT, both ways."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_qlora as jq
from tests.helpers import GOLDEN
from tests.lift.cases import random_adapter

from .test_peft import load_in_peft

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

# --- convolutions --------------------------------------------------------------------------------

NAMES = {"conv1": "conv1", "conv2": "body.conv2", "signal": "signal", "out": "out"}


def torch_net(torch: Any) -> Any:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.body = torch.nn.ModuleDict({"conv2": torch.nn.Conv2d(8, 6, (1, 3))})
            self.signal = torch.nn.Conv1d(6, 6, 3, padding=1, bias=False)
            self.out = torch.nn.Linear(6, 5)

        def forward(self, x: Any) -> Any:
            x = torch.relu(self.conv1(x))
            x = torch.relu(self.body["conv2"](x)).mean(2)
            return self.out(torch.relu(self.signal(x)).mean(2))

    torch.manual_seed(0)
    return Net().eval()


def our_net(net: Any) -> tuple[Any, Any]:
    """The same in flax's layouts: channels last, kernels `[*window, in, out]`."""
    state = {name: x.numpy() for name, x in net.state_dict().items()}
    params = {}
    for path, name in NAMES.items():
        w = state[f"{name}.weight"]
        params[path] = {"kernel": jnp.asarray(w.transpose(*range(2, w.ndim), 1, 0))}
        if f"{name}.bias" in state:
            params[path]["bias"] = jnp.asarray(state[f"{name}.bias"])

    def conv(x: Any, p: Any, strides: Any, padding: Any) -> Any:
        spec = ("NHWC", "HWIO", "NHWC") if x.ndim == 4 else ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(x, p["kernel"], strides, padding, dimension_numbers=spec)
        return y + jnp.expand_dims(p["bias"], range(y.ndim - 1)) if "bias" in p else y

    def apply(params: Any, x: Any) -> Any:
        x = jax.nn.relu(conv(x, params["conv1"], (2, 2), ((1, 1), (1, 1))))
        x = jax.nn.relu(conv(x, params["conv2"], (1, 1), "VALID")).mean(1)
        x = jax.nn.relu(conv(x, params["signal"], (1,), ((1, 1),))).mean(1)
        return x @ params["out"]["kernel"] + params["out"]["bias"][None]

    return apply, params


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_are_those_of_peft(torch: Any, peft: Any, tmp_path: Path, dora: bool):
    net = torch_net(torch)
    apply, params = our_net(net)
    x = np.random.default_rng(0).standard_normal((2, 9, 11, 3)).astype("f")
    ids = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        plain = net(ids).numpy()
    np.testing.assert_allclose(apply(params, x), plain, atol=1e-5)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["conv1", "conv2", "signal", "out"],
        rank_pattern={"conv2": 2},
        use_dora=dora,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(net, config).eval()
    model.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        want = model(ids).numpy()
    assert np.abs(want - plain).max() > 0.02
    targets = jq.find_targets(apply, params, x, match=".*")
    names = {f"{path}/kernel": name for path, name in NAMES.items()}
    adapter = jq.load_adapter(tmp_path / "theirs", targets, names=names)
    got = jax.jit(jq.lift(apply))(jq.attach(params, adapter), x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(apply(jq.merge(params, adapter), x), want, atol=1e-5)

    # changed here, and back
    adapter = jax.tree.map(lambda x: 1.5 * x, adapter)
    jq.save_adapter(tmp_path / "ours", adapter, targets, names=names)
    back = load_in_peft(peft, torch_net(torch), tmp_path / "ours")
    with torch.no_grad():
        found = back(ids).numpy()
    np.testing.assert_allclose(
        jax.jit(jq.lift(apply))(jq.attach(params, adapter), x), found, atol=2e-5
    )
    assert np.abs(found - want).max() > 0.01


# --- experts -------------------------------------------------------------------------------------


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def family(request: Any) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> Any:
    return jq.load_model(GOLDEN / "models" / family, quantization=None)


TOKENS = np.random.default_rng(2).integers(3, 90, (2, 20), dtype=np.int32)
MATCHES = {
    "every linear": "all-linear",
    "experts alone": ["gate_proj", "up_proj", "down_proj"],
    "down alone, and the router": ["down_proj", "gate"],
    "up alone": ["up_proj", "q_proj"],
}


def theirs_on(torch: Any, model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS.astype(np.int64))).logits.float().numpy()


def ours_on(model: Any, adapter: Any) -> np.ndarray:
    return np.asarray(model.apply(jq.attach(model.params, adapter), jnp.asarray(TOKENS)))


@pytest.mark.parametrize("match", MATCHES)
def test_an_adapter_on_experts_is_the_same_model_in_peft(
    torch: Any, peft: Any, theirs: Any, model: Any, family: str, tmp_path: Path, match: str
):
    targets = jq.find_targets(model.apply, model.params, jnp.asarray(TOKENS))
    adapter = random_adapter(
        targets.select(MATCHES[match]),
        rank_pattern={"down_proj": 2} if "down" in match else {},
        rslora=match == "experts alone",
    )
    if match == "every linear":  # a layer without updates of experts
        adapter = {
            p: jax.tree.map(lambda x: x.at[0].set(0.0), x) if "experts" in p else x
            for p, x in adapter.items()
        }
    jq.save_adapter(tmp_path / "a", adapter, model)
    base = theirs(GOLDEN / "models" / family)
    plain = theirs_on(torch, base)
    want = theirs_on(torch, load_in_peft(peft, base, tmp_path / "a"))
    np.testing.assert_allclose(ours_on(model, adapter), want, atol=5e-4)
    assert np.abs(want - plain).max() > 0.1


@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules="all-linear"),
        dict(target_modules=["o_proj"], target_parameters=["experts.gate_up_proj"]),
        dict(target_modules=[], target_parameters=["gate_up_proj", "down_proj", "q_proj.weight"]),
    ],
)
def test_an_adapter_of_peft_on_experts_is_the_same_model_here(
    torch: Any, peft: Any, theirs: Any, model: Any, family: str, tmp_path: Path, settings: Any
):
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    adapted = peft.get_peft_model(theirs(GOLDEN / "models" / family), config).eval()
    adapted.save_pretrained(tmp_path / "theirs")
    want = theirs_on(torch, adapted)
    plain = theirs_on(torch, theirs(GOLDEN / "models" / family))
    assert np.abs(want - plain).max() > 0.1
    adapter = jq.load_adapter(tmp_path / "theirs", model)
    np.testing.assert_allclose(ours_on(model, adapter), want, atol=5e-4)
    # saved here, it loads in PEFT again
    jq.save_adapter(tmp_path / "ours", adapter, model)
    again = load_in_peft(peft, theirs(GOLDEN / "models" / family), tmp_path / "ours")
    np.testing.assert_allclose(theirs_on(torch, again), want, atol=5e-4)


def test_the_names_of_transformers_4_are_what_peft_takes_them_for(
    torch: Any, peft: Any, theirs: Any, model: Any, family: str, tmp_path: Path
):
    """PEFT converts them, in names and tensors; read here they are the same adapter."""
    targets = jq.find_targets(model.apply, model.params, jnp.asarray(TOKENS))
    adapter = random_adapter(targets.select(["gate_proj", "up_proj", "down_proj"]))
    # as DoRA they are written by module; without the magnitudes they are plain updates
    jq.save_adapter(tmp_path / "a", jq.add_magnitudes(model.params, adapter), model)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: x for k, x in load_file(file).items() if "magnitude" not in k}, file)
    text = (tmp_path / "a" / "adapter_config.json").read_text()
    text = text.replace('"use_dora": true', '"use_dora": false')
    (tmp_path / "a" / "adapter_config.json").write_text(text)
    back = jq.load_adapter(tmp_path / "a", model)
    want = theirs_on(torch, load_in_peft(peft, theirs(GOLDEN / "models" / family), tmp_path / "a"))
    np.testing.assert_allclose(ours_on(model, back), want, atol=5e-4)
    np.testing.assert_allclose(ours_on(model, adapter), want, atol=5e-4)
    assert np.abs(want - theirs_on(torch, theirs(GOLDEN / "models" / family))).max() > 0.1
