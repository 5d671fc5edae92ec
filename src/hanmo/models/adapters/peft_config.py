"""``adapter_config.json`` of PEFT, read with distrust: what it asks for and is not known here is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hanmo.errors import ModelError, UsageError
from hanmo.folder import read_json
from hanmo.models.adapters.lora import LoraConfig

READ = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "base_model_name_or_path"),
    *("layers_to_transform", "layers_pattern", "init_lora_weights"),
)
WITHOUT_EFFECT = (  # on an adapter that is trained
    *("task_type", "inference_mode", "auto_mapping", "revision", "peft_version", "fan_in_fan_out", "runtime_config"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    "ensure_weight_tying",
)
NOTHING: tuple[Any, ...] = (None, False, "", "none", {}, [])
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # the others change the weights of the base model
MAX_PATTERN, MAX_REPETITIONS = 200, 3  # in one pattern; matching takes time to the power of the second


@dataclass(frozen=True)
class PeftConfig:
    """What PEFT's configuration says about an adapter.

    Attributes:
        path: of the file, for messages.
        base: the model it was made for.
        targets: endings of the names of its layers; None where they are given by a rule.
        excluded: endings of layers left out.
        layers: numbers of the blocks it has layers in; None: all.
        ranks, alphas: exceptions from rank and alpha, by regular expression.
        saved: endings of the modules that were trained fully.
    """

    path: Path
    base: str
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: tuple[int, ...] | None
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    saved: tuple[str, ...]

    def lora(self, targets: tuple[str, ...], modules_to_save: tuple[str, ...]) -> LoraConfig:
        """The same as a configuration of ours.

        Raises:
            ModelError: a value that no adapter can have.
        """
        try:
            return LoraConfig(self.rank, self.alpha, self.dropout, targets, self.rslora, self.dora, modules_to_save)
        except UsageError as error:
            raise ModelError(error.what, where=str(self.path), zh=error.zh) from None

    def rank_of(self, name: str) -> int:
        """The rank of a layer of ``transformers``."""
        return int(pattern_value(self.ranks, name, self.rank))

    def alpha_of(self, name: str) -> float:
        """The alpha of a layer of ``transformers``."""
        return pattern_value(self.alphas, name, self.alpha)


def pattern_value(patterns: Mapping[str, float], name: str, usual: float) -> float:
    """The first entry whose key fits a name or the end of it, as PEFT reads ``rank_pattern`` and ``alpha_pattern``."""
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)), usual)


def refuse(path: Path, what: str, zh: str, fix: str = "copy the adapter again") -> NoReturn:
    """Raise the error for a configuration that cannot be used."""
    raise ModelError(what, where=str(path), fix=fix, zh=zh)


def read_peft_config(path: Path) -> PeftConfig:
    """Read ``adapter_config.json``.

    Raises:
        ModelError: it is missing, damaged, of another method than LoRA, or uses a variant that is not known.
    """
    raw = read_json(path)
    if not isinstance(raw, dict):
        refuse(path, "expected a JSON object", "应为一个 JSON 对象")
    check_variant(path, raw)
    rank, alpha, dropout = raw.get("r", 8), raw.get("lora_alpha", 8), raw.get("lora_dropout", 0.0)
    flags = [raw.get("use_rslora", False), raw.get("use_dora", False)]
    if not all(type(flag) is bool for flag in flags):
        refuse(path, "use_rslora and use_dora are true or false", "use_rslora 与 use_dora 应为 true 或 false")
    targets, layers = raw.get("target_modules"), raw.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        refuse(path, "layers_to_transform is a list of numbers", "layers_to_transform 应为数字列表")
    by_rule = targets is None or isinstance(targets, str) or isinstance(raw.get("exclude_modules"), str)
    config = PeftConfig(
        path=path,
        base=str(raw.get("base_model_name_or_path") or ""),
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=flags[0],
        dora=flags[1],
        targets=None if by_rule else strings(path, raw, "target_modules"),
        excluded=() if by_rule else strings(path, raw, "exclude_modules"),
        layers=None if layers is None else tuple(layers),
        ranks=patterns(path, raw, "rank_pattern"),
        alphas=patterns(path, raw, "alpha_pattern"),
        saved=strings(path, raw, "modules_to_save"),
    )
    config.lora(("q_proj",), ())  # checks the numbers
    return config


def check_variant(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse other methods, and options that would change what the adapter computes."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        refuse(
            path,
            f"the adapter is of the kind {kind!r}" if kind else "the file does not say what kind of adapter it is",
            f"适配器类型 {kind!r} 不受支持，只支持 LORA。请在 PEFT 中合并（merge_and_unload）后保存整个模型",
            "only LORA is known; merge it with PEFT (merge_and_unload) and save the whole model",
        )
    for key, value in raw.items():
        known = key in READ or key in WITHOUT_EFFECT or value in NOTHING
        if key == "bias":
            known = value == "none"
        if key == "init_lora_weights":
            known = value in PLAIN_STARTS
        if not known:
            refuse(
                path,
                f"the option {key} = {str(value)[:60]!r} of this adapter is not known",
                f"不支持该适配器的选项 {key} = {str(value)[:60]!r}。请在 PEFT 中合并（merge_and_unload）后保存整个模型",
                "merge it with PEFT (merge_and_unload) and save the whole model",
            )


def strings(path: Path, raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of names; nothing where there is none."""
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        refuse(path, f"{key} is a list of names, not {str(value)[:60]!r}", f"{key} 应为名称列表")
    return tuple(value)


def patterns(path: Path, raw: Mapping[str, Any], key: str) -> dict[str, float]:
    """The exceptions for some layers. Expressions that could keep the matcher busy for ever are refused."""
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        refuse(path, f"{key} is not a JSON object", f"{key} 应为 JSON 对象")
    for pattern, number in value.items():
        whole = type(number) is int or (key == "alpha_pattern" and type(number) is float)
        if not whole or not 0 < number < math.inf:
            refuse(path, f"{key}: {number!r} for '{pattern}' is no positive number", f"{key} 中的 {number!r} 不是正数")
        try:
            repeated = sum(pattern.count(sign) for sign in "*+{")
            usable = len(pattern) <= MAX_PATTERN and repeated <= MAX_REPETITIONS and not re.search(r"\)[*+{]", pattern)
            re.compile(pattern)
        except re.error:
            usable = False
        if not usable:
            refuse(
                path, f"{key}: '{pattern[:60]}' is no usable pattern of names", f"{key} 中的 '{pattern[:60]}' 无法使用"
            )
    return dict(value)
