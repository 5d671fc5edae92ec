"""Adapters under the names of Hugging Face's ``transformers``, as PEFT stores them.

PEFT calls a tensor by the module of ``transformers`` it belongs to. Where that module is several of ours (GPT-2's
``c_attn``, Phi-3's ``qkv_proj`` and ``gate_up_proj``, ModernBERT's ``Wqkv``), the matrices of its parts become one
pair::

    [q]   [B_q        ] [A_q]                      [q]   [B_1]
    [k] = [    B_k    ] [A_k] x        and back    [k] = [B_2] A x    each part gets its rows of B, and A
    [v]   [        B_v] [A_v]                      [v]   [B_3]

so the rank is the sum of theirs, unless they share one A: then it stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hanmo.errors import ModelError
from hanmo.models.adapters.attach import copies_of, ends_with, layers_of, linear_layers
from hanmo.models.adapters.lora import Adapter, LoraConfig, LoraLinear
from hanmo.models.architectures import architecture_of
from hanmo.models.architectures.mapping import Stored, layout
from hanmo.models.transformer import Transformer

PREFIX = "base_model.model."
SUFFIXES = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
OUTPUT_BIAS = ("lm_bias",)  # belongs to no module here, but often to one with the output's weight there
NOT_OURS = ("pooler.dense", "lm_head")  # modules that transformers may have where our network has none


@dataclass(frozen=True)
class Place:
    """A linear layer of ``transformers``: its name, those of ours whose rows it holds, how many, and its columns."""

    theirs: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int


@dataclass(frozen=True)
class Matrices:
    """The adapter of one linear layer as it is stored; ``blocks``: of each part the columns of B that are its own."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    alpha: float
    blocks: Mapping[str, tuple[int, int, float]]  # first and last + 1 column, alpha

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.size(0)


class Names:
    """The tensors of a network under their names in ``transformers``.

    Attributes:
        stored: every tensor of a file of this network.
        places: its linear layers, by their name there.
        prefix: what the names begin with in a model with an output, and not in a bare one.
    """

    def __init__(self, model: Transformer) -> None:
        config = model.config
        architecture = architecture_of(config.model_type)
        self.config = config
        self.prefix = architecture.prefix_of(config)
        self.bare = not (config.lm or config.head)
        self.stored = layout(architecture, config)
        linear = linear_layers(model)
        self.places: dict[str, Place] = {}
        for entry in self.stored:
            parts = tuple(part.removesuffix(".weight") for part in entry.parts)
            if all(part in linear for part in parts) and entry.names[0].endswith(".weight"):
                theirs = entry.names[0].removesuffix(".weight")
                self.places[theirs] = Place(theirs, parts, entry.rows, linear[parts[0]].in_features)
        self.modules = {name.rpartition(".")[0] for entry in self.stored for name in self.all_names(entry)}

    def all_names(self, entry: Stored) -> tuple[str, ...]:
        """Every name that a tensor has in a model of ``transformers``; embeddings tied to the output have several."""
        if entry.parts == ("model.embed_tokens.weight",) and self.config.tie_embeddings and self.config.lm:
            return entry.names if len(entry.names) > 1 else (*entry.names, "lm_head.weight")
        return entry.names if entry.parts == OUTPUT_BIAS else entry.names[:1]

    def output_bias(self) -> tuple[str, ...]:
        """The names of the bias of the output, where it has one."""
        return next((self.all_names(entry) for entry in self.stored if entry.parts == OUTPUT_BIAS), ())

    def outside(self, name: str) -> str:
        """A name as this network's class in ``transformers`` has it."""
        return name.removeprefix(self.prefix) if self.bare else name

    def shortest_endings(self, chosen: Iterable[str]) -> list[str]:
        """Endings of names that fit the chosen modules and no other; whole names where there are none."""
        chosen = set(chosen)
        others = {*self.modules, *NOT_OURS} - chosen
        found = set()
        for name in chosen:
            parts = name.split(".")
            ending = name
            for count in range(1, len(parts)):
                candidate = ".".join(parts[-count:])
                if candidate.split(".")[0].isdigit():
                    break
                if not any(ends_with(other, candidate) for other in others):
                    ending = candidate
                    break
            found.add(self.outside(ending))
        return sorted(found)

    def widest_modules(self, tensors: Iterable[str]) -> list[str]:
        """The largest modules all of whose tensors are among these."""
        chosen = set(tensors)
        every = {name for entry in self.stored for name in self.all_names(entry)}
        found = set()
        for name in chosen:
            module = name.rpartition(".")[0]
            while "." in module:
                parent = module.rpartition(".")[0]
                if not all(other in chosen for other in every if other.startswith(f"{parent}.")):
                    break
                module = parent
            found.add(self.outside(module))
        return sorted(found)


def export_layers(model: Transformer, name: str, names: Names) -> dict[str, Matrices]:
    """The matrices of an adapter by the linear layer of ``transformers``.

    Raises:
        ModelError: a layer of the adapter has no counterpart there.
    """
    adapters = layers_of(model, name)
    found = {
        theirs: joined(model, place, adapters)
        for theirs, place in names.places.items()
        if any(part in adapters for part in place.parts)
    }
    covered = {part for theirs in found for part in names.places[theirs].parts}
    for layer in adapters:
        if layer not in covered:
            raise ModelError(
                f"the layer '{layer}' has no counterpart in transformers, so the adapter cannot be stored for it",
                fix="merge the adapter and save the whole model, or choose other targets",
                zh=f"层 '{layer}' 在 transformers 中没有对应模块，适配器无法保存。请合并后保存整个模型",
            )
    return found


def joined(model: Transformer, place: Place, adapters: Mapping[str, Adapter]) -> Matrices:
    """The adapters of the parts of a layer as one; parts without any get rows of zeros."""
    present = [adapters[part] for part in place.parts if part in adapters]
    first = present[0]
    if len(place.parts) == 1:
        return Matrices(first.lora_A.detach(), first.lora_B.detach(), detached(first.magnitude), first.alpha, {})
    shared = len(present) == len(place.parts) and all(
        torch.equal(adapter.lora_A, first.lora_A) and adapter.alpha == first.alpha for adapter in present
    )
    rank = first.rank if shared else sum(adapter.rank for adapter in present)
    alpha = first.alpha if shared else first.scale / first.config.scale(rank, 1.0)
    b = torch.zeros(sum(place.rows), rank, dtype=first.lora_B.dtype, device=first.lora_B.device)
    blocks, magnitudes, row, column = {}, [], 0, 0
    for part, rows in zip(place.parts, place.rows, strict=True):
        if part in adapters:
            own = adapters[part]
            b[row : row + rows, column : column + own.rank] = own.lora_B.detach() * (own.scale / first.scale)
            blocks[part] = (column, column + own.rank, own.alpha)
            column += 0 if shared else own.rank
        magnitudes.append(length_of(model, part, adapters.get(part)))
        row += rows
    a = first.lora_A.detach() if shared else torch.cat([adapter.lora_A.detach() for adapter in present])
    magnitude = None if first.magnitude is None else torch.cat(magnitudes)
    return Matrices(a, b, magnitude, alpha, {} if shared else blocks)


def detached(tensor: Tensor | None) -> Tensor | None:
    """Without its history."""
    return None if tensor is None else tensor.detach()


def length_of(model: Transformer, part: str, adapter: Adapter | None) -> Tensor:
    """DoRA's magnitude of a layer: that of its adapter, else the lengths its rows have, which change nothing."""
    if adapter is not None and adapter.magnitude is not None:
        return adapter.magnitude.detach()
    layer = linear_layers(model)[part]
    weight = layer.base.weight if isinstance(layer, LoraLinear) else layer.weight
    length: Tensor = weight.detach().float().norm(dim=1)
    return length


def export_saved(model: Transformer, name: str, names: Names) -> dict[str, Tensor]:
    """The tensors of the modules that an adapter trains fully, by every name they have in ``transformers``.

    Raises:
        ModelError: only a part of what is one tensor there.
    """
    own = {f"{at}.{key}": tensor for at, module in copies_of(model, name).items() for key, tensor in state(module)}
    found: dict[str, Tensor] = {}
    for entry in names.stored:
        present = [part for part in entry.parts if part in own]
        if not present:
            continue
        if len(present) < len(entry.parts):
            missing = next(part for part in entry.parts if part not in own)
            raise ModelError(
                f"'{present[0]}' is stored together with '{missing}' as '{entry.names[0]}', and only one was trained",
                fix="name both in modules_to_save, or use low-rank targets for them",
                zh=f"'{present[0]}' 与 '{missing}' 在文件中是同一个张量，必须同时列入 modules_to_save",
            )
        tensor = torch.cat([own[part] for part in entry.parts])
        tensor = (tensor.t() if entry.transposed else tensor).reshape(entry.shape)
        found |= {key: tensor.clone() for key in names.all_names(entry)}
    modules = {key.rpartition(".")[0] for key in found}
    for key in names.output_bias():  # PEFT wants whole modules
        if key.rpartition(".")[0] in modules:
            found[key] = model.get_parameter(*OUTPUT_BIAS).detach().clone()
    return found


def state(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The parameters of a module, without history."""
    return ((name, parameter.detach()) for name, parameter in module.named_parameters())


def split(place: Place, stored: Matrices, config: LoraConfig) -> dict[str, tuple[float, dict[str, Tensor]]]:
    """The adapter of each of our layers from that of one layer of ``transformers``: alpha and tensors, by layer."""
    found: dict[str, tuple[float, dict[str, Tensor]]] = {}
    row = 0
    for part, rows in zip(place.parts, place.rows, strict=True):
        first, last, alpha = stored.blocks.get(part, (0, stored.rank, stored.alpha))
        if part in stored.blocks or not stored.blocks:
            factor = config.scale(stored.rank, stored.alpha) / config.scale(last - first, alpha)
            b = stored.b[row : row + rows, first:last]
            tensors = {"lora_A": stored.a[first:last], "lora_B": b * factor if abs(factor - 1) > 1e-9 else b}
            if stored.magnitude is not None:
                tensors["magnitude"] = stored.magnitude[row : row + rows]
            found[part] = (alpha, tensors)
        row += rows
    return found
