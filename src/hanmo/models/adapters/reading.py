"""The tensors of an adapter file, matched with the layers of a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanmo.errors import ModelError, UsageError
from hanmo.folder import MANIFEST
from hanmo.models.adapters.attach import ends_with
from hanmo.models.adapters.lora import LoraConfig
from hanmo.models.adapters.names import PREFIX, SUFFIXES, Matrices, Names, Place, split
from hanmo.models.adapters.peft_config import PeftConfig
from hanmo.models.architectures.mapping import LAYER, Stored

ENTRY = "adapter"  # of hanmo.json
Blocks = Mapping[str, tuple[int, int, float]]


@dataclass(frozen=True)
class OwnEntry:
    """What our manifest adds to PEFT's files; nothing where another tool wrote them.

    Attributes:
        config: as the adapter was made.
        parts: of layers that are one in ``transformers``: which columns of B belong to which of ours.
        base: name of the model it was made for.
        fingerprint: of its weights.
        without: modules that are left out of the fingerprint, because the adapter brings its own.
    """

    config: LoraConfig | None = None
    parts: Mapping[str, Blocks] = field(default_factory=dict)
    base: str = ""
    fingerprint: str = ""
    without: tuple[str, ...] = ()


def read_entry(folder: Path, manifest: Mapping[str, Any]) -> OwnEntry:
    """The entry of ``hanmo.json``.

    Raises:
        ModelError: it has another shape.
    """
    if ENTRY not in manifest:
        return OwnEntry()
    try:
        entry = manifest[ENTRY]
        config = LoraConfig(**entry["config"])
        parts = {
            str(theirs): {
                str(part): (int(first), int(last), float(alpha)) for part, (first, last, alpha) in own.items()
            }
            for theirs, own in entry["parts"].items()
        }
        base = entry["base"]
        without = tuple(map(str, base["without"]))
        return OwnEntry(config, parts, str(base["name"]), str(base["fingerprint"]), without)
    except (AttributeError, KeyError, TypeError, ValueError, UsageError):
        raise damaged(folder / MANIFEST) from None


def damaged(path: Path) -> ModelError:
    """The error for a manifest that nobody of us wrote."""
    return ModelError(
        "the manifest of the adapter is damaged",
        where=str(path),
        fix=f"copy the folder again, or delete {MANIFEST} if you trust the other files",
        zh=f"适配器的清单已损坏。请重新复制，或在信任其余文件时删除 {MANIFEST}",
    )


class Reader:
    """What a file must hold, and how it is divided among the layers of a network.

    Args:
        names: of the network in ``transformers``.
        peft: the configuration beside the file.
        own: our manifest.
        given: the tensors of the file; only their names are looked at here.

    Attributes:
        expected: the shape of every tensor that the file must hold.

    Raises:
        ModelError: a kind of tensor that no network of ours can take.
    """

    def __init__(self, names: Names, peft: PeftConfig, own: OwnEntry, given: Iterable[str]) -> None:
        self.names, self.peft, self.own = names, peft, own
        given = set(given)
        self.prefixed = any(key.startswith(PREFIX + names.prefix) for key in given)
        refuse_embeddings(given)
        self.places = [place for place in names.places.values() if self.holds(place, given)]
        self.entries = self.saved_entries(given)
        self.expected: dict[str, tuple[int, ...]] = {}
        for place in self.places:
            name, rank = self.inside(place.theirs), peft.rank_of(self.inside(place.theirs))
            self.expected[PREFIX + name + SUFFIXES["lora_A"]] = (rank, place.columns)
            self.expected[PREFIX + name + SUFFIXES["lora_B"]] = (sum(place.rows), rank)
            if peft.dora:
                self.expected[PREFIX + name + SUFFIXES["magnitude"]] = (sum(place.rows),)
        for entry in self.entries:
            self.expected |= {PREFIX + self.inside(name): entry.shape for name in names.all_names(entry)}
        self.expected |= dict.fromkeys(self.output_bias(given), (names.config.vocab_size,))

    def inside(self, name: str) -> str:
        """A name as this file has it: with or without the prefix of a model with an output."""
        return name if self.prefixed else name.removeprefix(self.names.prefix)

    def holds(self, place: Place, given: set[str]) -> bool:
        """Whether the file has, or by its configuration should have, an adapter for a layer."""
        peft, name = self.peft, self.inside(place.theirs)
        if any(PREFIX + name + suffix in given for suffix in SUFFIXES.values()):
            return True
        number = LAYER.search(name)
        skipped = peft.layers is not None and (number is None or int(number[0]) not in peft.layers)
        if peft.targets is None or skipped or any(ends_with(name, ending) for ending in peft.excluded):
            return False
        within = any(f".{saved}." in f".{name}." for saved in peft.saved)
        return not within and any(ends_with(place.theirs, target) for target in peft.targets)

    def saved_entries(self, given: set[str]) -> list[Stored]:
        """The tensors of the modules that the file brings whole: all of a module, if any of it is there."""
        owners = {
            part.rpartition(".")[0]
            for entry in self.names.stored
            if self.given_names(entry, given)
            for part in entry.parts
        }
        owners -= {""}  # the output's bias
        return [entry for entry in self.names.stored if any(part.rpartition(".")[0] in owners for part in entry.parts)]

    def output_bias(self, given: Iterable[str]) -> list[str]:
        """The names of the output's bias in the file."""
        return [key for key in (PREFIX + self.inside(name) for name in self.names.output_bias()) if key in given]

    def check_output_bias(self, given: Mapping[str, Tensor], own: Tensor | None) -> None:
        """Refuse a file that changes the bias of the output, which is no module here that could be exchanged.

        Raises:
            ModelError: it has other values than the network's own.
        """
        if any(own is None or not torch.equal(given[key].to(own.dtype), own) for key in self.output_bias(given)):
            raise ModelError(
                "the adapter brings its own bias of the output, which cannot be exchanged alone",
                fix="merge it with PEFT (merge_and_unload) and save the whole model",
                zh="适配器带有输出层的偏置，无法单独替换。请在 PEFT 中合并后保存整个模型",
            )

    def given_names(self, entry: Stored, given: set[str]) -> list[str]:
        """The names under which a whole tensor is in the file."""
        keys = [PREFIX + self.inside(name) for name in self.names.all_names(entry)]
        return [key for key in keys if key in given]

    def layers(self, given: Mapping[str, Tensor]) -> dict[str, tuple[float, dict[str, Tensor]]]:
        """Alpha and tensors of each of our layers.

        Raises:
            ModelError: the manifest divides a layer in a way it cannot be divided.
        """
        config = self.peft.lora(("q_proj",), ())
        found: dict[str, tuple[float, dict[str, Tensor]]] = {}
        for place in self.places:
            key = PREFIX + self.inside(place.theirs)
            a, b = given[key + SUFFIXES["lora_A"]], given[key + SUFFIXES["lora_B"]]
            blocks = self.own.parts.get(place.theirs, {})
            for part, (first, last, alpha) in blocks.items():
                if part not in place.parts or not 0 <= first < last <= a.size(0) or not alpha > 0:
                    raise damaged(Path(MANIFEST))
            alpha = self.peft.alpha_of(self.inside(place.theirs))
            stored = Matrices(a, b, given.get(key + SUFFIXES["magnitude"]), alpha, blocks)
            found |= split(place, stored, config)
        return found

    def saved(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that the file brings whole, by our name.

        Raises:
            ModelError: a tied embedding has two values.
        """
        found: dict[str, Tensor] = {}
        for entry in self.entries:
            tensors = [given[key] for key in self.given_names(entry, set(given))]
            if any(not torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
                raise ModelError(
                    f"'{entry.names[0]}' and the output tied to it have different values",
                    fix="train the adapter with ensure_weight_tying",
                    zh=f"'{entry.names[0]}' 与其绑定的输出层取值不同。请用 ensure_weight_tying 重新训练",
                )
            tensor = tensors[0].t() if entry.transposed else tensors[0]
            pieces = torch.split(tensor.reshape(sum(entry.rows), *tensor.shape[1:]), list(entry.rows))
            found |= dict(zip(entry.parts, pieces, strict=True))
        return found


def refuse_embeddings(given: Iterable[str]) -> None:
    """Refuse low-rank matrices of embeddings, which are no linear layers here."""
    for key in given:
        if ".lora_embedding_" in key or ".base_layer." in key:
            raise ModelError(
                f"the tensor '{key}' is a low-rank change of an embedding, which is not known",
                fix="merge it with PEFT (merge_and_unload) and save the whole model",
                zh=f"张量 '{key}' 是词嵌入的低秩改动，不受支持。请在 PEFT 中合并后保存整个模型",
            )
