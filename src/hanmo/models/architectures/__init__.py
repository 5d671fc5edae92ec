"""The architectures of ``transformers`` that our one block covers: their configurations and names, no network code.

``read_config`` and ``write_config`` go from ``config.json`` to :class:`TransformerConfig` and back; ``take_over`` and
``hand_over`` do the same for weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from hanmo.errors import ModelError, nearest
from hanmo.models.architectures import bart, bert, distilbert, gemma, gpt2, llama, mapping, modernbert, phi3, t5
from hanmo.models.architectures.mapping import Architecture, Raw, head_of
from hanmo.models.heads import TASKS, HeadConfig
from hanmo.models.transformer import TransformerConfig

ARCHITECTURES: dict[str, Architecture] = {
    model_type: module.ARCHITECTURE
    for module in (llama, gpt2, gemma, phi3, bert, distilbert, modernbert, t5, bart)
    for model_type in module.ARCHITECTURE.model_types
}
OUTPUT_TASKS = ("causal-lm", "masked-lm", "seq2seq-lm")
OWN_OUTPUT = (
    "ForPreTraining",
    "DoubleHeadsModel",
    "WithLMHeadModel",
    "Model",
)  # further names of it, or more beside it


def known() -> str:
    """The names of all architectures, for messages."""
    return ", ".join(ARCHITECTURES)


def architecture_of(model_type: Any) -> Architecture:
    """The architecture of a ``model_type``.

    Raises:
        ModelError: none of that name.
    """
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ModelError(
            f"the architecture '{model_type}' is not known",
            where="config.json",
            fix=f"known architectures: {known()}. {nearest(str(model_type), ARCHITECTURES)}",
            zh=f"不认识的模型结构 '{model_type}'，目前支持：{known()}",
        )
    return ARCHITECTURES[model_type]


def task_of(config: TransformerConfig) -> str:
    """What a network is for: one of the heads' tasks, of OUTPUT_TASKS, or "embedding"."""
    if config.head:
        return config.head.task
    if not config.lm:
        return "embedding"
    return "seq2seq-lm" if config.encoder else "causal-lm" if config.causal else "masked-lm"


def read_config(raw: Raw) -> TransformerConfig:
    """The network that a Hugging Face ``config.json`` describes.

    Raises:
        ModelError: an architecture or a variant that is not known, a missing key, contradictory sizes.
    """
    architecture = architecture_of(raw.get("model_type"))
    try:
        task = read_task(architecture, raw)
        config = TransformerConfig(**mapping.read_fields(architecture, raw))
        if task in TASKS:
            config = with_head(config, head_of(architecture, config, task, raw))
        elif task == "embedding":
            config = replace(config, lm=False, lm_bias=False, lm_transform=None)
        elif task == "masked-lm" and architecture.transform:
            config = replace(config, lm_transform=architecture.transform(config))
        return config
    except KeyError as missing:
        raise ModelError(
            f"the key {missing} is missing", where="config.json", zh=f"config.json 缺少 {missing}"
        ) from None


def read_task(architecture: Architecture, raw: Raw) -> str:
    """The task of the class that ``architectures`` names; the architecture's own output where it names none."""
    classes = raw.get("architectures") or [""]
    family = architecture.families[raw["model_type"]]
    known = {architecture.class_name(raw["model_type"], task): task for task in architecture.classes}
    if classes[0] in known:
        return known[classes[0]]
    if not classes[0] or str(classes[0]).removeprefix(family) in OWN_OUTPUT:
        return next(iter(architecture.classes))
    raise ModelError(
        f"the class '{classes[0]}' of this architecture is not known",
        where="config.json",
        fix="known: " + ", ".join(known),
        zh=f"不支持该结构的类 '{classes[0]}'",
    )


def with_head(config: TransformerConfig, head: HeadConfig) -> TransformerConfig:
    """The same network with a task's head instead of its output."""
    return replace(config, head=head, lm=False, lm_bias=False, lm_transform=None)


def default_head(config: TransformerConfig, task: str, labels: tuple[str, ...], **choices: Any) -> HeadConfig:
    """The head that belongs on this architecture for a task; ``choices`` are further fields of HeadConfig."""
    raw = {"id2label": dict(enumerate(labels))}
    return replace(head_of(architecture_of(config.model_type), config, task, raw), **choices)


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The ``config.json`` with which ``transformers`` builds the same network.

    Raises:
        ModelError: the network is none that this architecture can describe.
    """
    architecture, task = architecture_of(config.model_type), task_of(config)
    if task not in architecture.classes:
        raise ModelError(
            f"{config.model_type} has no form for {task}",
            fix="it has: " + ", ".join(architecture.classes),
            zh=f"{config.model_type} 没有用于 {task} 的形式",
        )
    raw = {
        "architectures": [architecture.class_name(config.model_type, task)],
        "model_type": config.model_type,
        **mapping.write_fields(architecture, config),
        "torch_dtype": "float32",
    }
    if config.head:
        raw |= write_head(config.head)
    again = read_config(raw)
    if again != config:
        names = [name for name in vars(config) if getattr(config, name) != getattr(again, name)]
        raise ModelError(
            f"the architecture {config.model_type} cannot express {names[0]} = {getattr(config, names[0])!r}",
            why="the folder would load as another network",
            fix="choose another model_type for this network",
            zh=f"结构 {config.model_type} 无法表示 {names[0]} = {getattr(config, names[0])!r}",
        )
    return raw


def write_head(head: HeadConfig) -> dict[str, Any]:
    """The keys that describe a head."""
    raw: dict[str, Any] = {"classifier_dropout": head.dropout}
    if head.task != "span-extraction":
        raw["id2label"] = {str(index): label for index, label in enumerate(head.labels)}
        raw["label2id"] = {label: index for index, label in enumerate(head.labels)}
    if head.task == "sequence-classification":
        kind = "multi" if head.multi_label else "single"
        raw |= {"problem_type": f"{kind}_label_classification"}
        raw |= {"classifier_pooling": "mean"} if head.pooling == "mean" else {}
    return raw | ({"hanmo_crf": True} if head.crf else {})


def take_over(config: TransformerConfig, given: dict[str, Tensor]) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """The network of a file and its parameters; see :func:`mapping.take_over`."""
    return mapping.take_over(architecture_of(config.model_type), config, given)


def hand_over(config: TransformerConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file from our parameters."""
    return mapping.hand_over(architecture_of(config.model_type), config, state)
