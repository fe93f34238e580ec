# SPDX-License-Identifier: Apache-2.0
"""Does a step fit, in words; and if it does not, the changes of settings that cost least."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import Config, replaced, toml_value
from .formula import Bytes
from .gpus import GIB

MARGIN = GIB
"""What is kept free of a device: the driver's context, workspaces, fragmentation, a desktop."""

_REMAT = {  # from the least memory saved to the most
    "dots": "attention is computed twice",
    "full": "the forward of every layer is computed twice",
    "offload": "the same, and layer inputs cross the bus twice",
}


def verdict(device: int, capacity: float, margin: int = MARGIN) -> str:
    """Whether bytes fit: "fits", "tight" (without the margin) or "does not fit".

    Args:
        device: Bytes that a step needs at its worst moment.
        capacity: Bytes that there are.
        margin: Bytes of them that are to stay free.
    """
    if device + margin <= capacity:
        return "fits"
    return "tight" if device <= capacity else "does not fit"


@dataclass(frozen=True, kw_only=True)
class Change:
    """Other settings that need less memory.

    Attributes:
        settings: Their new values by dotted key.
        cost: What is paid for it, in words.
        needed: Bytes of a step with them (estimates).
    """

    settings: Mapping[str, Any]
    cost: str
    needed: Bytes

    def __str__(self) -> str:
        return ", ".join(f"{key} = {toml_value(value)}" for key, value in self.settings.items())


Option = tuple[dict[str, Any], str]


def cheapest_changes(
    need: Callable[[Config, int], Bytes],
    config: Config,
    *,
    seq: int,
    limit: float,
    host: bool = True,
    count: int = 3,
) -> list[Change]:
    """The changes that bring a step under a limit, the cheapest first.

    Cheap is what leaves every result as it is (parts of a batch one after another, moments or
    weights in host memory), then what rounds moments, then what takes time to compute again, then
    what trains something else: a smaller adapter, shorter examples. Of each kind the mildest that
    fits is named. Where none alone suffices, they are added up in that order.

    Args:
        need: Bytes of a step for settings and tokens of a row.
        config: Settings that do not fit.
        seq: Tokens of a row.
        limit: Bytes that may be used.
        host: Whether there is host memory apart from the device's.
        count: Most changes that are named.

    Returns:
        At most `count` changes; none where nothing helps.
    """

    def change(settings: dict[str, Any], cost: str) -> Change:
        length = settings.get("data.max_length", seq)
        return Change(settings=settings, cost=cost, needed=need(replaced(config, settings), length))

    kinds = list(_kinds(config, seq, host))
    found: list[Change] = []
    for options in kinds:
        tried = (change(settings, cost) for settings, cost in options)
        found += [x for x in tried if x.needed.device <= limit][:1]
    if found:
        return found[:count]
    settings: dict[str, Any] = {}
    costs: list[str] = []
    for options in kinds:
        for values, cost in options:
            together = change(settings | values, "; ".join([*costs, cost]))
            if together.needed.device <= limit:
                return [together]
        if options:  # take the strongest, and go on
            settings, costs = settings | options[-1][0], [*costs, options[-1][1]]
    return []


def _kinds(config: Config, seq: int, host: bool) -> Iterator[list[Option]]:
    """Changes by kind, cheapest kind first; within one from the mildest to the strongest."""
    train, quant, optim = config.train, config.quant, config.optim
    rows = train.batch_size
    yield [
        (
            {"train.batch_size": n, "train.accumulate": train.accumulate * (rows // n)},
            "the same step in more parts",
        )
        for n in range(rows - 1, 0, -1)
        if rows % n == 0
    ]
    halves = {"train.loss_chunk": (train.loss_chunk, 128)}
    whole_rows = train.attention == "cudnn"  # which a layer's chunk must then hold
    if train.remat in ("full", "offload") and not whole_rows:
        halves["train.layer_chunk"] = (train.layer_chunk, 256)
    for key, (now, least) in halves.items():
        smaller = [now >> n for n in range(1, now.bit_length()) if now >> n >= least]
        yield [({key: n}, "the same step in more parts") for n in smaller]
    if host and optim.placement == "device":
        yield [({"optim.placement": "host"}, "the same bits; moments cross the bus twice a step")]
    if config.method == "qlora" and not quant.double_quant:
        yield [({"quant.double_quant": True}, "constants of blocks are rounded")]
    states = ["float32", "bfloat16", "8bit"]
    smaller = states[states.index(optim.state) + 1 :]
    yield [({"optim.state": state}, "moments are rounded") for state in smaller]
    stages = ["none", *_REMAT] if host else ["none", "dots", "full"]
    stages = stages[:2] if whole_rows else stages
    later = stages[stages.index(train.remat) + 1 :] if train.remat in stages else []
    yield [({"train.remat": name}, _REMAT[name]) for name in later]
    if host and config.method == "qlora" and not quant.streamed:
        yield [({"quant.streamed": True}, "the same bits; weights cross the bus twice a step")]
    if config.method == "qlora" and not quant.embeddings:
        yield [({"quant.embeddings": True}, "embedding and head are held in 4 bits")]
    methods = {"lora": ["qlora"], "full": ["lora", "qlora"]}.get(config.method, [])
    words = {"lora": "an adapter trains, not every weight", "qlora": "weights are held in 4 bits"}
    yield [({"method": name}, words[name]) for name in methods]
    if config.method != "full" and config.lora.adapter is None:  # whose rank is given
        ranks = [config.lora.rank >> n for n in range(1, config.lora.rank.bit_length())]
        yield [({"lora.rank": rank}, "a smaller adapter") for rank in ranks]
    lengths = range((seq - 1) // 32 * 32, 31, -32)
    yield [({"data.max_length": n}, "longer examples have to go") for n in lengths]
