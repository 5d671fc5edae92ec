"""Adapter folders in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``, and our manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanmo.errors import ModelError, UsageError
from hanmo.folder import MANIFEST, atomic_folder, read_manifest, verify, write_json
from hanmo.language import pick
from hanmo.models.adapters.attach import (
    adapter_config,
    adapter_parameters,
    attach,
    check_name,
    copies_of,
    is_name,
    saved_modules,
    train_adapter,
)
from hanmo.models.adapters.choice import weights_fingerprint
from hanmo.models.adapters.lora import LoraConfig
from hanmo.models.adapters.names import PREFIX, SUFFIXES, Matrices, Names, export_layers, export_saved
from hanmo.models.adapters.peft_config import read_peft_config
from hanmo.models.adapters.reading import ENTRY, OwnEntry, Reader, read_entry
from hanmo.models.architectures import task_of
from hanmo.models.checkpoints.weights import read_safetensors, write_safetensors
from hanmo.models.tensors import check_tensors
from hanmo.models.transformer import Transformer
from hanmo.settings import notice

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TASK_TYPES = {  # PEFT has none for masked language models
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "span-extraction": "QUESTION_ANS",
    "embedding": "FEATURE_EXTRACTION",
}


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that was read into a network.

    Attributes:
        name: under which it is known there.
        config: as it was made, or as PEFT's configuration tells it.
        base: the name of the model it was made for; "" if it is not recorded.
        provenance: the entries of its ``hanmo.json``; empty where another tool wrote it.
    """

    name: str
    config: LoraConfig
    base: str
    provenance: dict[str, Any]


def save_adapter(
    folder: str | Path,
    model: Transformer,
    name: str,
    *,
    base: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter so that PEFT's ``from_pretrained`` and :func:`load_adapter` read it, completely or not at all.

    Args:
        folder: what stands there is replaced once the new one is whole.
        model: holds the adapter; may hold others.
        name: of the adapter; PEFT's files do not hold it.
        base: the folder or the name of the model it belongs to, recorded for readers.
        provenance: further entries of ``hanmo.json``: settings, data fingerprint, metrics.

    Raises:
        UsageError: no adapter of that name.
        ModelError: PEFT's format cannot express it, or it holds NaN.
        ResourceError: the disk is full or cannot be written; an older folder is intact.
    """
    config, names = adapter_config(model, name), Names(model)
    layers, saved = export_layers(model, name, names), export_saved(model, name, names)
    tensors = {}
    for theirs, stored in layers.items():
        for key, tensor in (("lora_A", stored.a), ("lora_B", stored.b), ("magnitude", stored.magnitude)):
            if tensor is not None:
                tensors[PREFIX + names.outside(theirs) + SUFFIXES[key]] = tensor
    tensors |= {PREFIX + names.outside(theirs): tensor for theirs, tensor in saved.items()}
    check_tensors({theirs: tuple(tensor.shape) for theirs, tensor in tensors.items()}, tensors)
    without = sorted(copies_of(model, name))
    entry = {
        "name": name,
        "config": asdict(config),
        "parts": {theirs: stored.blocks for theirs, stored in layers.items() if stored.blocks},
        "base": {"name": base, "fingerprint": weights_fingerprint(model, without=without), "without": without},
    }
    with atomic_folder(folder, {**(provenance or {}), ENTRY: entry}) as temporary:
        write_safetensors(temporary / WEIGHTS, tensors)
        write_json(temporary / CONFIG, peft_entries(config, layers, list(saved), names, base))


def peft_entries(
    config: LoraConfig, layers: Mapping[str, Matrices], saved: list[str], names: Names, base: str
) -> dict[str, Any]:
    """The content of ``adapter_config.json``; rank and alpha are the commonest, others stand in the patterns."""
    rank, alpha = Counter((stored.rank, stored.alpha) for stored in layers.values()).most_common(1)[0][0]
    # with the type of a head's task, PEFT looks for a head in the file, and finds none where it is the base model's own
    heads = {key for entry in names.stored if entry.parts[0].startswith("head.") for key in names.all_names(entry)}
    whole = heads <= set(saved)
    transposed = {entry.names[0] for entry in names.stored if entry.transposed}
    return {
        "alpha_pattern": {names.outside(at): own.alpha for at, own in layers.items() if own.alpha != alpha},
        "base_model_name_or_path": base or None,
        "bias": "none",
        "fan_in_fan_out": any(f"{theirs}.weight" in transposed for theirs in layers),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": names.widest_modules(saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {names.outside(at): own.rank for at, own in layers.items() if own.rank != rank},
        "target_modules": names.shortest_endings(layers),
        "task_type": TASK_TYPES.get(task_of(names.config)) if whole else None,
        "use_dora": config.dora,
        "use_rslora": config.rslora,
    }


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as its folder holds it, by the layers of a network.

    Attributes:
        config: as it was made, or as PEFT's configuration tells it.
        base: the name of the model it was made for; "" if it is not recorded.
        layers: alpha and the tensors ``lora_A`` [rank, in], ``lora_B`` [out, rank] and perhaps ``magnitude`` [out] of
            each layer.
        saved: the parameters that it brings whole.
        places: the modules that hold these.
        own: our manifest's entry.
        provenance: the other entries of ``hanmo.json``.
    """

    config: LoraConfig
    base: str
    layers: Mapping[str, tuple[float, Mapping[str, Tensor]]]
    saved: Mapping[str, Tensor]
    places: list[str]
    own: OwnEntry
    provenance: dict[str, Any]


def read_adapter(folder: str | Path, model: Transformer, base: str = "") -> StoredAdapter:
    """Read an adapter folder of ours or PEFT's.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: the network it belongs to; unchanged, and may have no values (torch's device "meta").
        base: what the network was loaded from, for messages.

    Raises:
        ModelError: something is missing, damaged, unsafe, of another kind than LoRA, or made for another model.
    """
    folder = Path(folder)
    check_folder(folder)
    verify(folder)
    manifest = read_manifest(folder)
    own, peft = read_entry(folder, manifest), read_peft_config(folder / CONFIG)
    recorded = own.base or peft.base
    given = read_safetensors(folder / WEIGHTS)
    expected: dict[str, tuple[int, ...]] = {}
    try:
        reader = Reader(Names(model), peft, own, given)
        expected = reader.expected
        check_tensors(expected, given)
        reader.check_output_bias(given, None if model.lm_bias is None or model.lm_bias.is_meta else model.lm_bias)
        layers, saved = reader.layers(given), reader.saved(given)
    except ModelError as error:
        fits = expected == {key: tuple(tensor.shape) for key, tensor in given.items()}
        raise misfit(folder, error, "" if fits else describe(model, recorded, base)) from None
    if not layers:
        raise misfit(folder, ModelError("the file holds no low-rank matrices", zh="文件中没有低秩矩阵"), "")
    places = places_of(model, own, saved)
    config = own.config or peft.lora(tuple(layers), tuple(places))
    provenance = {key: value for key, value in manifest.items() if key not in ("files", ENTRY)}
    return StoredAdapter(config, recorded, layers, saved, places, own, provenance)


def load_adapter(
    folder: str | Path, model: Transformer, name: str | None = None, *, base: str = "", trainable: bool = False
) -> LoadedAdapter:
    """Read an adapter folder of ours or PEFT's into a network and make it the only active one.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: the network it belongs to; unchanged if anything is wrong.
        name: for this network; by default that of the folder.
        base: what this network was loaded from; a notice says so if the adapter was made for another name.
        trainable: freeze everything but this adapter, to go on training it; else it is frozen.

    Raises:
        ModelError: something is missing, damaged, unsafe, of another kind than LoRA, or made for another model.
        UsageError: the network has an adapter of this name already.
    """
    folder = Path(folder)
    name = name or (folder.name if is_name(folder.name) else "default")
    check_name(model, name)
    stored = read_adapter(folder, model, base)
    check_weights_of_base(folder, model, stored, base)
    sizes = {layer: (tensors["lora_A"].size(0), alpha) for layer, (alpha, tensors) in stored.layers.items()}
    attach(model, name, stored.config, sizes, stored.places, seed=0)
    fill(model, name, {layer: tensors for layer, (_, tensors) in stored.layers.items()}, stored.saved)
    parameters = train_adapter(model, name) if trainable else adapter_parameters(model, name)
    for parameter in parameters.values():
        parameter.requires_grad_(trainable)
    return LoadedAdapter(name, stored.config, stored.base, stored.provenance)


def check_folder(folder: Path) -> None:
    """Say what is there instead where no adapter can be read.

    Raises:
        ModelError: a file is missing, or the weights are a pickle.
    """
    if not (folder / CONFIG).is_file():
        whole = (folder / "config.json").is_file()
        there = "is a whole model" if whole else f"has no {CONFIG}" if folder.is_dir() else "does not exist"
        raise ModelError(
            f"the adapter folder {there}",
            where=str(folder),
            fix="load it as a model, not as an adapter" if whole else "give a folder that holds an adapter",
            zh="这是一个完整的模型，请直接加载" if whole else f"这里没有适配器（缺少 {CONFIG}）",
        )
    if not (folder / WEIGHTS).is_file() and (folder / PICKLE).is_file():
        raise ModelError(
            "the adapter is stored as a Python pickle, which is not read",
            where=str(folder / PICKLE),
            why="loading a pickle runs whatever code its author put into it",
            fix="take its safetensors version, or load it with PEFT where you trust it and save it again",
            zh="适配器是 pickle 格式：加载它等于运行作者写入的代码，因此拒绝读取。请改用 safetensors 版本",
        )


def describe(model: Transformer, recorded: str, base: str) -> str:
    """Which model an adapter was made for and which this one is."""
    config = model.config
    here = f"'{base}', " if base else ""
    shape = f"{here}{config.model_type} with {config.num_layers} layers of size {config.hidden_size}"
    return f"it was made for {repr(recorded) if recorded else 'a model that is not recorded'}; this one is {shape}"


def misfit(folder: Path, error: ModelError, models: str) -> ModelError:
    """An error about the tensors of an adapter, with its place, and both models where it belongs to another one."""
    return ModelError(
        ("the adapter does not fit this network: " if models else "") + error.what,
        where=str(folder),
        why=models or error.why,
        fix=error.fix or ("load the model it was made for" if models else "copy the adapter again"),
        zh=("适配器与该网络不符：" if models else "") + (error.zh or error.what) + (f"（{models}）" if models else ""),
    )


def check_weights_of_base(folder: Path, model: Transformer, stored: StoredAdapter, base: str) -> None:
    """Compare the weights an adapter was trained on with those of the network, or their names where that is all.

    Raises:
        ModelError: they differ.
    """
    if not stored.own.fingerprint:
        return compare_names(folder, stored.base, base)
    found = weights_fingerprint(model, without=stored.own.without)
    if found != stored.own.fingerprint:
        raise ModelError(
            f"the adapter was trained on other weights: {stored.own.fingerprint[:12]}, not {found[:12]}",
            where=str(folder),
            why=describe(model, stored.base, base),
            fix=f"load the model it was made for, or delete {MANIFEST} in its folder to use it all the same",
            zh=f"适配器是在另一组权重上训练的（{describe(model, stored.base, base)}）。请加载对应的模型",
        )


def compare_names(folder: str | Path, recorded: str, base: str) -> None:
    """Say so where an adapter was made for a model of another name: all that can be told without a fingerprint."""
    if base and recorded and base != recorded:
        english = f"the adapter {folder} was made for '{recorded}' and is used with '{base}'; its shapes fit"
        notice(pick(english, f"适配器 {folder} 是为 '{recorded}' 训练的，现用于 '{base}'；形状相符"))


def places_of(model: Transformer, own: OwnEntry, saved: Mapping[str, Tensor]) -> list[str]:
    """The modules that get copies: as they were when the adapter was made, else the smallest that hold the tensors."""
    leaves = sorted({parameter.rpartition(".")[0] for parameter in saved})
    try:
        modules = saved_modules(model, own.config.modules_to_save) if own.config else []
    except UsageError:
        return leaves
    covered = all(any(f"{leaf}.".startswith(f"{module}.") for module in modules) for leaf in leaves)
    return modules if covered else leaves


@torch.no_grad()
def fill(
    model: Transformer, name: str, layers: Mapping[str, Mapping[str, Tensor]], saved: Mapping[str, Tensor]
) -> None:
    """Put the tensors of a file into an adapter."""
    parameters = adapter_parameters(model, name)
    for layer, tensors in layers.items():
        for key, tensor in tensors.items():
            parameters[f"{layer}.adapters.{name}.{key}"].copy_(tensor)
    for place in copies_of(model, name):
        for ours, tensor in saved.items():
            if ours.startswith(f"{place}."):
                parameters[f"{place}.copies.{name}.{ours.removeprefix(f'{place}.')}"].copy_(tensor)
