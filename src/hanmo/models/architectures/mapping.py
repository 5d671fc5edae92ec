"""How an architecture of Hugging Face's ``transformers`` is described: its configuration and the names of its tensors.

An :class:`Architecture` is data and two small functions. From it and a :class:`TransformerConfig` follows the complete
list of tensors that a file of this architecture holds (:func:`layout`), with which weights are read and written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hanmo.errors import ModelError
from hanmo.models.architectures.values import ROPE_KEYS, check_rope, check_values
from hanmo.models.heads import HeadConfig, TransformConfig
from hanmo.models.tensors import check_tensors
from hanmo.models.transformer import Transformer, TransformerConfig

Raw = Mapping[str, Any]  # the content of a config.json
Names = Mapping[str, str | tuple[str, ...]]

ACTIVATION_NAMES = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "swish": "silu",
}
COMMON_KEYS = {  # of most families
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
}
NULL_MEANS_NONE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")  # and not the usual value
LAYER_TYPES = ("full_attention", "sliding_attention")
LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # the number of a layer inside a name


@dataclass(frozen=True)
class Architecture:
    """One family of networks as ``transformers`` stores it.

    Attributes:
        model_types: the values of ``model_type`` that belong to it.
        classes: for each of our tasks the class of ``transformers``, ``{}`` standing for the family's name of it.
        families: by model type, how class names begin.
        irregular: by model type and task, class names that do not follow this rule.
        prefix: what the names of the base model begin with inside a model with an output, the same for all or by model
            type; files may lack it.
        keys: our fields to their keys in ``config.json``.
        usual: our fields that may be absent there, with the value they then have.
        constants: our fields that every member of the family has.
        dropouts: their keys for our one dropout; the first is read.
        read: the fields that no key gives directly.
        write: the same backwards.
        names: module (or parameter) in our file to that in theirs, ``{}`` for the number of a layer; what is not listed
            has the same name. Of several names the first is written and any of them read.
        fused: their module to those of ours whose rows it holds one after another.
        transposed: endings of their modules whose matrices are stored [in, out].
        ignored: endings of tensors that carry no weight of ours.
        optional: endings of tensors that a file may lack; they are zero then.
        transform: the layer between hidden states and the output of masked language models.
        reconcile: corrects what a configuration says wrongly, by the tensors of its file.
        head_transform: the activation of the same layer in the heads, by task; absent: none.
        pooling: which hidden state stands for a text.
    """

    model_types: tuple[str, ...]
    classes: Mapping[str, str]
    families: Mapping[str, str]
    prefix: str | Mapping[str, str]
    keys: Mapping[str, str]
    usual: Mapping[str, Any]
    read: Callable[[Raw], dict[str, Any]]
    write: Callable[[TransformerConfig], dict[str, Any]]
    constants: Mapping[str, Any] = field(default_factory=dict)
    dropouts: tuple[str, ...] = ("dropout",)
    names: Callable[[TransformerConfig], Names] = lambda config: {}  # noqa: ARG005 - one name for all
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    transform: Callable[[TransformerConfig], TransformConfig] | None = None
    head_transform: Callable[[TransformerConfig, str], TransformConfig | None] = lambda config, task: None  # noqa: ARG005
    pooling: str = "first"
    head_bias: Mapping[str, bool] = field(default_factory=dict)  # by task; absent: True
    irregular: Mapping[tuple[str, str], str] = field(default_factory=dict)
    reconcile: Callable[[TransformerConfig, Mapping[str, Tensor]], TransformerConfig] = lambda config, given: config  # noqa: ARG005

    def prefix_of(self, config: TransformerConfig) -> str:
        """The prefix of a model type."""
        return self.prefix if isinstance(self.prefix, str) else self.prefix[config.model_type]

    def class_name(self, model_type: str, task: str) -> str:
        """The class of ``transformers`` for a task."""
        regular = self.classes[task].format(self.families[model_type])
        return self.irregular.get((model_type, task), regular)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its names (the first is written), its shape, and the parameters whose rows it holds."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    transposed: bool


def layout(architecture: Architecture, config: TransformerConfig) -> list[Stored]:
    """Every tensor that a file of this network holds."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}
    names, owners = architecture.names(config), owners_of(architecture)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in shapes:
        groups.setdefault(their_names(name, names, owners), []).append(name)
    stored = []
    for theirs, parts in groups.items():
        rows = tuple(shapes[part][0] for part in parts)
        shape = (sum(rows), *shapes[parts[0]][1:])
        transposed = len(shape) == 2 and theirs[0].rpartition(".")[0].endswith(architecture.transposed or ("\0",))
        if theirs[0].endswith("final_logits_bias"):
            shape = (1, *shape)  # a row, as BART and Marian store it
        stored.append(Stored(theirs, shape[::-1] if transposed else shape, tuple(parts), rows, transposed))
    return stored


def owners_of(architecture: Architecture) -> dict[str, str]:
    """Our modules to the fused module of theirs that holds them."""
    return {ours: theirs for theirs, parts in architecture.fused.items() for ours in parts}


def their_names(name: str, names: Names, owners: Mapping[str, str]) -> tuple[str, ...]:
    """``model.layers.3.mlp.up_proj.weight`` -> ``("transformer.h.3.mlp.c_fc.weight",)``."""
    number = LAYER.search(name)
    pattern = LAYER.sub("{}", name, count=1)
    if pattern in names:  # a parameter of its own
        found, ending = names[pattern], ""
    else:
        module, _, last = pattern.rpartition(".")
        found, ending = owners.get(module) or names.get(module) or module, "." + last
    choices = (found,) if isinstance(found, str) else found
    return tuple((choice + ending).format(number[0] if number else "") for choice in choices)


def take_over(
    architecture: Architecture, config: TransformerConfig, given: dict[str, Tensor]
) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """The network of a file and its parameters, uncopied where they are stored one by one.

    Args:
        given: is emptied on the way, so that nothing is held twice.

    Raises:
        ModelError: a tensor is missing, unexpected, of the wrong shape or holds NaN; it is named as in the file.
    """
    config = architecture.reconcile(config, given)
    stored = layout(architecture, config)
    prefix = architecture.prefix_of(config)
    bare = not any(name.startswith(prefix) for name in given)
    rename_old(given)
    expected, wanted = {}, {}
    for entry in stored:
        names = [name.removeprefix(prefix) if bare else name for name in entry.names]
        present = [name for name in names if name in given]
        for name in present[1:]:  # the same weight under another name
            del given[name]
        if not present and names[0].endswith(architecture.optional or ("\0",)):
            given[names[0]] = torch.zeros(entry.shape, dtype=next((t.dtype for t in given.values()), torch.float32))
        expected[present[0] if present else names[0]] = entry.shape
        wanted[present[0] if present else names[0]] = entry
    for name in [name for name in given if name not in expected and ignorable(name, architecture, config)]:
        del given[name]
    check_tensors(expected, given)
    state: dict[str, Tensor] = {}
    for name, entry in wanted.items():
        tensor = given.pop(name)
        tensor = tensor.t().contiguous() if entry.transposed else tensor
        tensor = tensor.reshape(-1) if entry.names[0].endswith("final_logits_bias") else tensor
        pieces = torch.split(tensor, list(entry.rows)) if len(entry.parts) > 1 else (tensor,)
        state.update(zip(entry.parts, pieces, strict=True))
    return config, state


def rename_old(given: dict[str, Tensor]) -> None:
    """Undo the names that TensorFlow gave to the weights of norms: the first BERT files still have them."""
    for name in [name for name in given if name.endswith((".gamma", ".beta"))]:
        module, _, last = name.rpartition(".")
        given[f"{module}.{'weight' if last == 'gamma' else 'bias'}"] = given.pop(name)


def ignorable(name: str, architecture: Architecture, config: TransformerConfig) -> bool:
    """Whether a tensor of a file is no weight of this network, but belongs to its kind of file."""
    usual = ("rotary_emb.inv_freq", "position_ids")
    return name.endswith(usual + architecture.ignored) or (config.tie_embeddings and name == "lm_head.weight")


def hand_over(architecture: Architecture, config: TransformerConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file from our parameters."""
    tensors = {}
    bare, prefix = not (config.lm or config.head), architecture.prefix_of(config)
    for entry in layout(architecture, config):
        parts = [state[part].detach() for part in entry.parts]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        tensor = tensor.t() if entry.transposed else tensor
        name = entry.names[0].removeprefix(prefix) if bare else entry.names[0]
        tensors[name] = tensor.reshape(entry.shape)
    return tensors


# Configurations ------------------------------------------------------------------------------------------------------


def read_fields(architecture: Architecture, raw: Raw) -> dict[str, Any]:
    """All fields of our configuration but the output and the head.

    Raises:
        KeyError: a key that must be there is absent.
    """
    fields = {"model_type": raw["model_type"], **architecture.constants}
    check_values(raw)
    raw = {key: value for key, value in raw.items() if value is not None or key in NULL_MEANS_NONE}
    for ours, key in {**architecture.keys, "tie_embeddings": "tie_word_embeddings"}.items():
        absent = raw.get(key) is None and ours in architecture.usual
        value = architecture.usual[ours] if absent else raw[key]
        fields[ours] = ACTIVATION_NAMES.get(value, value) if ours == "activation" else value
    fields["dropout"] = float(raw.get(architecture.dropouts[0], architecture.usual.get("dropout")) or 0.0)
    fields |= architecture.read({**raw, **{ours: value for ours, value in fields.items() if ours != "activation"}})
    if "head_dim" not in fields:
        fields["head_dim"] = fields["hidden_size"] // fields["num_heads"]
    return {"num_kv_heads": fields["num_heads"], **fields}


def write_fields(architecture: Architecture, config: TransformerConfig) -> dict[str, Any]:
    """The keys of ``config.json`` for these fields."""
    raw = {key: getattr(config, ours) for ours, key in architecture.keys.items()}
    if "activation" in architecture.keys:
        raw[architecture.keys["activation"]] = theirs(config.activation)
    return {
        **raw,
        **dict.fromkeys(architecture.dropouts, config.dropout),
        **architecture.write(config),
        "tie_word_embeddings": config.tie_embeddings,
    }


# What the configurations have in common ------------------------------------------------------------------------------


def theirs(activation: str) -> str:
    """An activation under their name for it."""
    return "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation


def refuse(raw: Raw, **usual: Any) -> None:
    """Refuse variants of an architecture that our block does not have.

    Raises:
        ModelError: a key has another value than the usual one.
    """
    for key, value in usual.items():
        if raw.get(key, value) not in (value, None):
            raise ModelError(
                f"the variant {key} = {raw[key]!r} of this architecture is not known",
                where="config.json",
                zh=f"不支持该结构的变体 {key} = {raw[key]!r}",
            )


def read_rope(raw: Raw, theta: float = 10_000.0) -> dict[str, Any]:
    """Base and rescaling of rotary positions, from the keys of any version of ``transformers``."""
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    check_values(rope, ROPE_KEYS)
    base = float(raw.get("rope_theta") or rope.pop("rope_theta", None) or theta)
    rope.pop("rope_theta", None)
    if "type" in rope:  # the name before transformers 4.43
        rope.setdefault("rope_type", rope.pop("type"))
    rope.pop("partial_rotary_factor", None)
    kind = rope.get("rope_type", "default")
    if kind in ("llama3", "yarn", "longrope"):
        original = raw.get("original_max_position_embeddings") or raw["max_position_embeddings"]
        rope.setdefault("original_max_position_embeddings", original)
    check_rope(rope, kind)
    return {"rope_theta": base, "rope_scaling": rope if kind != "default" else None}


def write_rope(config: TransformerConfig) -> dict[str, Any]:
    """The same for a ``config.json``, under the old and the new keys."""
    rope = config.rope_scaling or {"rope_type": "default"}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
    }


def read_layer_types(raw: Raw, sliding: Callable[[int], bool]) -> tuple[bool, ...]:
    """Which layers slide: as listed, or by the rule of the architecture."""
    types = raw.get("layer_types")
    if types is None:
        return tuple(sliding(layer) for layer in range(raw["num_hidden_layers"]))
    for kind in types:
        if kind not in LAYER_TYPES:
            refuse({"layer_types": kind}, layer_types=LAYER_TYPES[0])
    return tuple(kind == LAYER_TYPES[1] for kind in types)


def write_layer_types(config: TransformerConfig) -> list[str]:
    """The list of layer types of a ``config.json``."""
    return [LAYER_TYPES[config.slides(layer)] for layer in range(config.num_layers)]


def labels_of(raw: Raw) -> tuple[str, ...]:
    """The names of a head's outputs."""
    names = raw.get("id2label") or {str(i): f"LABEL_{i}" for i in range(int(raw.get("num_labels") or 2))}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def head_of(architecture: Architecture, config: TransformerConfig, task: str, raw: Raw) -> HeadConfig:
    """The head that ``transformers`` puts on this architecture for a task."""
    dropout = raw.get("classifier_dropout")
    pooling = "mean" if raw.get("classifier_pooling") == "mean" else architecture.pooling
    return HeadConfig(
        task=task,
        labels=("start", "end") if task == "span-extraction" else labels_of(raw),
        pooling=pooling if task == "sequence-classification" else "first",
        transform=architecture.head_transform(config, task),
        bias=architecture.head_bias.get(task, True),
        crf=bool(raw.get("hanmo_crf", False)),
        multi_label=raw.get("problem_type") == "multi_label_classification",
        dropout=float(config.dropout if dropout is None else dropout),
    )
