# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapter_config.json: which modules an adapter changes, with what rank and scale.

Follows peft 0.21 (`tuners_utils.check_target_module_exists`, `get_pattern_key`,
`lora.LoraModel._create_and_replace`). A field that changes the result and is not understood here is
an error, never ignored.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from .hf_keys import is_number

CONFIG_NAME = "adapter_config.json"

# read by `read_config`
_HANDLED = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform",
    "layers_pattern", "bias", "init_lora_weights", "use_dora", "modules_to_save",
    "trainable_token_indices", "ensure_weight_tying",
}  # fmt: skip
# without effect on what a trained adapter computes, unless a field that is refused is set as well
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type",
    "peft_version", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "runtime_config", "fan_in_fan_out",
}  # fmt: skip
_WHY_REFUSED = {
    "lora_bias": "its updates have biases",
    "layer_replication": "it was trained on a model with repeated layers",
}
# initializations that leave the base weights as they are
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    r"""What of an adapter_config.json decides the result.

    Attributes:
        rank: Default rank.
        alpha: Default numerator of the scaling.
        dropout: Dropout of the updates' inputs in training.
        rslora: Scale by alpha / sqrt(rank) instead of alpha / rank.
        rank_pattern: Rank by pattern; the first that matches `(.*\.)?(pattern)$` wins.
        alpha_pattern: Alpha by pattern.
        target_modules: "all-linear", a regular expression, or names and dotted suffixes of names.
        target_parameters: Names and dotted ends of names of parameters that are targets; neither
            `exclude_modules` nor `layers` reach them.
        exclude_modules: Names that are no targets, a regular expression or a list as above.
        layers: Layer numbers that are targets, or None for all; needs a list of targets.
        layers_pattern: Names of the list of layers; any name if empty.
        dora: Whether each update has a magnitude for every output row.
        modules_to_save: Ends of the names of modules that are trained as a whole.
        bias: Which biases are trained: "none", "all", or "lora_only", those of targets.
        tokens: Numbers of the rows that are trained, by the end of a module's name.
        tied: Whether what changes a tied embedding also changes the output head.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] = "all-linear"
    target_parameters: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: bool = False

    @property
    def is_every_linear(self) -> bool:
        """Whether the targets are "all-linear", which leaves embeddings out."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def is_saved(self, module: str) -> bool:
        """Whether a module is trained as a whole: it, or one that it is in, is named."""
        parts = module.split(".")
        inside = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        return any(name.endswith(self.modules_to_save) for name in inside)

    def rank_of(self, module: str) -> int:
        """The rank of one module's update."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of one module's update."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def is_target_parameter(self, name: str, targets: tuple[str, ...] | None = None) -> bool:
        """Whether a parameter is adapted.

        Args:
            name: Its dotted name, e.g. "model.layers.0.mlp.experts.down_proj".
            targets: Names to ask instead of `target_parameters`.
        """
        return _matches(self.target_parameters if targets is None else targets, name)

    def is_target(self, module: str, *, head: bool = False) -> bool:
        """Whether a linear module is adapted.

        Args:
            module: Its dotted name, e.g. "model.layers.0.self_attn.q_proj".
            head: Whether it is the output head, which "all-linear" leaves out.
        """
        if _matches(self.exclude_modules, module) or self.is_saved(module):
            return False
        names = self.target_modules
        if isinstance(names, str):
            if self.is_every_linear:
                return not head
            return _matches(names, module)
        if module in names or not _matches(names, module):
            return module in names  # a full name is a target whatever its layer
        if self.layers is None:
            return True
        # the first number in the name, not the last: experts are numbered too
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern]
        found = [re.match(p, module) for p in patterns or [r".*?\.[^.]*\.(\d+)\."]]
        first = next((m for m in found if m), None)
        return first is not None and int(first[1]) in self.layers


def read_document(directory: Path) -> dict[str, Any]:
    """Reads an adapter_config.json as it is.

    Args:
        directory: The adapter's directory.

    Raises:
        InputError: the file is missing, or no JSON object.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        what = "a directory without it" if directory.is_dir() else "no such directory"
        raise InputError(
            f"no adapter at {directory}: expected {CONFIG_NAME} in it, found {what}. "
            "Pass the directory that PEFT's save_pretrained or save_adapter wrote."
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e}.") from e
    except (ValueError, RecursionError) as e:  # also what is no UTF-8
        raise InputError(f"{path} is not JSON: {e}. Save the adapter again.") from e
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds a {type(raw).__name__}: expected a JSON object.")
    return raw


def read_config(directory: Path, raw: Mapping[str, Any] | None = None) -> PeftConfig:
    """Reads the adapter_config.json of a LoRA adapter.

    Args:
        directory: The adapter's directory.
        raw: What `read_document` gave; absent: it is read.

    Raises:
        InputError: the file is missing or malformed, or has a field that changes the result in a
            way that is not handled (the message names it).
    """
    path, raw = directory / CONFIG_NAME, read_document(directory) if raw is None else raw
    _refuse_unhandled(raw, path)

    def get(key: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = raw.get(key)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(k.__name__ for k in kinds)
            raise InputError(f"{path}: {key} is {value!r}, expected {expected}.")
        return value

    def number(key: str, default: float) -> float:
        value = get(key, (int, float), default)
        if not is_number(value):
            raise InputError(f"{path}: {key} is {value!r}, expected a number that a float can be.")
        return float(value)

    def names(key: str) -> str | tuple[str, ...]:
        value = get(key, (str, list), ())
        return value if isinstance(value, str) else tuple(map(str, value))

    fields = dict(
        rank=get("r", (int,), 8),
        alpha=number("lora_alpha", 8),
        dropout=number("lora_dropout", 0.0),
        rslora=get("use_rslora", (bool,), False),
        rank_pattern=get("rank_pattern", (dict,), {}),
        alpha_pattern=get("alpha_pattern", (dict,), {}),
        target_modules=names("target_modules"),
        target_parameters=tuple(map(str, get("target_parameters", (list,), []))),
        exclude_modules=names("exclude_modules"),
        layers=_layers(get("layers_to_transform", (int, list), None)),
        layers_pattern=_as_tuple(names("layers_pattern")),
        dora=get("use_dora", (bool,), False),
        modules_to_save=_as_tuple(names("modules_to_save")),
        bias=get("bias", (str,), "none"),
        tokens=_tokens(get("trainable_token_indices", (list, dict), {}), path),
        tied=get("ensure_weight_tying", (bool,), False),
    )
    _check_values(fields, path)
    return PeftConfig(**fields)


def _layers(value: int | list[int] | None) -> tuple[int, ...] | None:
    if isinstance(value, int):
        return (value,)
    return tuple(value) if value else None


def _as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else tuple(value)


def _tokens(value: list[int] | dict[str, list[int]], path: Path) -> dict[str, tuple[int, ...]]:
    """A list is of rows of the embedding."""
    by_module = {"embed_tokens": value} if isinstance(value, list) else value
    for indices in by_module.values():
        if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
            raise InputError(
                f"{path}: trainable_token_indices is {value!r:.80}, expected token numbers, or a "
                "list of them for each of some modules."
            )
    return {module: tuple(indices) for module, indices in by_module.items() if indices}


def _refuse_unhandled(raw: Mapping[str, Any], path: Path) -> None:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{path}: peft_type is {kind!r}, expected 'LORA'. Beside it load_adapter reads prompts "
            "and prefixes (PROMPT_TUNING, PREFIX_TUNING, P_TUNING); other kinds are not supported."
        )
    init = raw.get("init_lora_weights", True)
    if init is not None and init not in _PLAIN_INITS:
        raise InputError(
            f"{path}: init_lora_weights is {init!r}, which replaces the base weights; expected one "
            f"of {', '.join(map(repr, _PLAIN_INITS))}. Convert it to a plain LoRA: save_pretrained("
            "..., path_initial_model_for_weight_conversion=...) in PEFT."
        )
    neutral = (None, False, "none", [], {}, "")
    for key, value in raw.items():
        if key not in _HANDLED | _HARMLESS and value not in neutral:
            why = _WHY_REFUSED.get(key, "this field is not known to leave the result unchanged")
            raise InputError(
                f"{path}: {key} is {value!r}: {why}, which is not supported. Merge the adapter "
                "with PEFT (merge_and_unload), or train one without it."
            )


def _check_values(fields: dict[str, Any], path: Path) -> None:
    targets, excluded = fields["target_modules"], fields["exclude_modules"]
    if fields["bias"] not in ("none", "all", "lora_only"):
        raise InputError(f"{path}: bias is {fields['bias']!r}, expected none, all or lora_only.")
    if not (targets or fields["target_parameters"]):
        raise InputError(
            f"{path}: target_modules is missing: expected a list of names, a regular expression or "
            "'all-linear'. Save the adapter with a current PEFT."
        )
    for name, ranks in (("r", [fields["rank"]]), ("rank_pattern", fields["rank_pattern"].values())):
        for rank in ranks:
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise InputError(f"{path}: {name} gives {rank!r}, expected a whole number > 0.")
    for name, alphas in (
        ("lora_alpha", [fields["alpha"]]),
        ("alpha_pattern", fields["alpha_pattern"].values()),
    ):
        for alpha in alphas:
            if not is_number(alpha) or not math.isfinite(alpha):
                raise InputError(f"{path}: {name} gives {alpha!r}, expected a finite number.")
    if not 0.0 <= fields["dropout"] < 1.0:
        raise InputError(f"{path}: lora_dropout is {fields['dropout']}, expected one in [0, 1).")
    if fields["layers"] is not None and isinstance(targets, str):
        raise InputError(
            f"{path}: layers_to_transform with target_modules {targets!r}: expected a list of "
            "target_modules beside it, as PEFT does. Name the modules in a list."
        )
    patterns = [*fields["rank_pattern"], *fields["alpha_pattern"], *fields["layers_pattern"]]
    for pattern in patterns + [p for p in (targets, excluded) if isinstance(p, str)]:
        try:
            re.compile(pattern)
        except re.error as e:
            raise InputError(
                f"{path}: {pattern!r} is no regular expression ({e}). Mend it in the file."
            ) from e


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == n or module.endswith(f".{n}") for n in names)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def make_config(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    modules: Iterable[str],
    parameters: Iterable[str] = (),
    *,
    dropout: float,
    **settings: Any,
) -> PeftConfig:
    """The configuration under which PEFT gives each module its rank and scale.

    Args:
        ranks: Rank by adapted module or parameter.
        scales: Factor of the update, likewise.
        modules: Names of all linear modules of the model.
        parameters: Names of all its parameters that are in no linear module.
        dropout: Dropout of the updates' inputs.
        **settings: Other attributes of the configuration.

    Returns:
        Targets as short names ("q_proj") if those select just the adapted modules, else in full;
        the most frequent rank and alpha as defaults, the others as patterns.
    """
    rslora = _looks_rank_stabilized(ranks, scales)
    alphas = {m: scales[m] * (math.sqrt(ranks[m]) if rslora else ranks[m]) for m in ranks}
    alphas = {m: round(a) if math.isclose(a, round(a)) else a for m, a in alphas.items()}
    parameters = tuple(parameters)
    own = {p for p in parameters if p in ranks}
    adapted = ranks.keys() - own
    short = tuple(sorted({m.rpartition(".")[2] for m in adapted}))
    rank, rank_pattern = _defaults_and_patterns(ranks)
    alpha, alpha_pattern = _defaults_and_patterns(alphas)
    config = PeftConfig(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=rslora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        target_modules=short,
        target_parameters=tuple(sorted({".".join(p.split(".")[-3:]) for p in own})),
        **settings,
    )
    if {m for m in modules if config.is_target(m)} != adapted:
        config = replace(config, target_modules=tuple(sorted(adapted)))
    if {p for p in parameters if config.is_target_parameter(p)} != own:
        config = replace(config, target_parameters=tuple(sorted(own)))
    return config


def _looks_rank_stabilized(ranks: Mapping[str, int], scales: Mapping[str, float]) -> bool:
    """Whether alpha is a whole number everywhere only under rsLoRA; how it is written, no more."""

    def whole(power: float) -> bool:
        return all(abs(a - round(a)) < 1e-6 for a in (scales[m] * ranks[m] ** power for m in ranks))

    return whole(0.5) and not whole(1.0)


def _defaults_and_patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    counts = Counter(values.values())
    default = max(counts, key=lambda v: (counts[v], v))
    differing = {m: v for m, v in values.items() if v != default}
    # by the module's last two names, if that says the same of all modules so named
    suffixes = {re.escape(".".join(m.split(".")[-2:])): v for m, v in differing.items()}
    if all(_by_pattern(suffixes, m, default) == v for m, v in values.items()):
        return default, suffixes
    # in full, longer names first, as a pattern also matches names that end with it
    full = {re.escape(m): v for m, v in values.items()}
    return default, {m: full[m] for m in sorted(full, key=len, reverse=True)}


def config_json(
    config: PeftConfig, *, base_model: str | None, causal_lm: bool, fan_in_fan_out: bool = False
) -> str:
    """The text of an adapter_config.json that current PEFT loads.

    Args:
        config: What the adapter changes.
        base_model: Name or path of the base model, or None.
        causal_lm: Whether the base is a language model.
        fan_in_fan_out: Whether its linears are stored `[in, out]`.
    """
    targets = config.target_modules
    document = {
        "base_model_name_or_path": base_model,
        "bias": config.bias,
        "ensure_weight_tying": config.tied,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "target_parameters": list(config.target_parameters) or None,
        "task_type": "CAUSAL_LM" if causal_lm else None,
        "modules_to_save": list(config.modules_to_save) or None,
        "trainable_token_indices": {m: list(i) for m, i in config.tokens.items()} or None,
        "use_dora": config.dora,
        "use_rslora": config.rslora,
    }
    return json.dumps(document, indent=2) + "\n"
