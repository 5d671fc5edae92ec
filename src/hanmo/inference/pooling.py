"""How the hidden states of a text become one vector: the settings that sentence-transformers keeps beside a model.

Letters in names: B texts, T tokens of the longest, M tokens of all texts, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanmo.errors import ModelError
from hanmo.folder import read_json
from hanmo.models.heads import pool

MODES = {  # the keys of 1_Pooling/config.json, in the order in which several are put side by side
    "pooling_mode_cls_token": "first",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True)
class Pooling:
    """What :meth:`hanmo.inference.encoder.TextEncoder.embed` does beside the network.

    Attributes:
        modes: values of MODES; their vectors are put side by side.
        max_length: tokens of a text that are read, control tokens included; None: as many as the network takes.
        lowercase: texts are lowercased first.
    """

    modes: tuple[str, ...] = ("mean",)
    max_length: int | None = None
    lowercase: bool = False

    def __call__(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """One vector per text, ``[B, D * len(modes)]``."""
        return torch.cat([pool_as(mode, hidden_BTD, mask_BT) for mode in self.modes], dim=1)

    def flat(self, states_MD: Tensor, lengths_B: Tensor) -> Tensor:
        """The same of texts that stand one after the other, unpadded."""
        return torch.cat([pool_flat(mode, states_MD, lengths_B) for mode in self.modes], dim=1)


def pool_as(mode: str, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """One vector per text, ``[B, D]``, by one of the MODES."""
    weights_BT1 = mask_BT.to(hidden_BTD.dtype).unsqueeze(-1)
    if mode == "max":
        return hidden_BTD.masked_fill(~mask_BT.unsqueeze(-1), -math.inf).amax(1)
    if mode == "mean_sqrt":
        return (hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1).sqrt()
    if mode == "weighted_mean":  # later tokens weigh more (SGPT, Muennighoff 2022)
        weights_BT1 = weights_BT1 * weights_BT1.cumsum(1)
        return (hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)
    return pool(hidden_BTD, mask_BT, mode)


def pool_flat(mode: str, states_MD: Tensor, lengths_B: Tensor) -> Tensor:
    """One vector per text, ``[B, D]``, by one of the MODES: of texts of at least one token, one after the other."""
    ends_B = lengths_B.cumsum(0)
    if mode in ("first", "last"):
        return states_MD[ends_B - lengths_B if mode == "first" else ends_B - 1]
    B, D = len(lengths_B), states_MD.size(1)
    owners_M = torch.repeat_interleave(torch.arange(B, device=states_MD.device), lengths_B)
    if mode == "max":
        lowest_BD = states_MD.new_full((B, D), -math.inf)
        return lowest_BD.scatter_reduce_(0, owners_M.unsqueeze(1).expand(-1, D), states_MD, "amax")
    sizes_B1 = lengths_B.to(states_MD.dtype).unsqueeze(1)
    if mode == "weighted_mean":
        places_M = torch.arange(len(states_MD), device=states_MD.device) - (ends_B - lengths_B)[owners_M] + 1
        states_MD = states_MD * places_M.to(states_MD.dtype).unsqueeze(1)
    sums_BD = states_MD.new_zeros(B, D).index_add_(0, owners_M, states_MD)
    if mode == "weighted_mean":
        return sums_BD / (sizes_B1 * (sizes_B1 + 1) / 2)
    return sums_BD / (sizes_B1.sqrt() if mode == "mean_sqrt" else sizes_B1)


def read_pooling(folder: Path) -> Pooling:
    """The pooling of a model folder: ``modules.json`` names its steps; the mean without such a file.

    Raises:
        ModelError: a file is damaged, or names a step that is not known.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return Pooling()
    modes: tuple[str, ...] = ("mean",)
    steps = read_list(path)
    for step in steps:
        kind = str(step.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            modes = read_modes(inside(folder, step.get("path"), path) / "config.json")
        elif kind not in ("Transformer", "Normalize"):
            raise ModelError(
                f"the step '{kind}' between the network and its vectors is not known",
                where=str(path),
                why="without it the vectors would not be those that the model was trained to give",
                fix="known: Transformer, Pooling, Normalize",
                zh=f"modules.json 中的步骤 '{kind}' 不受支持，得到的向量会是错的",
            )
    settings = folder / "sentence_bert_config.json"
    values = read_mapping(settings) if settings.is_file() else {}
    length = values.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        raise ModelError(
            f"max_seq_length must be a positive whole number, not {length!r}",
            where=str(settings),
            zh=f"max_seq_length 应为正整数，而不是 {length!r}",
        )
    return Pooling(modes, length, bool(values.get("do_lower_case")))


def read_modes(path: Path) -> tuple[str, ...]:
    """The modes of a pooling step's configuration.

    Raises:
        ModelError: none that is known.
    """
    values = read_mapping(path)
    chosen = {key for key, on in values.items() if key.startswith("pooling_mode_") and on}
    named = values.get("pooling_mode")  # newer folders have one key with one name or several
    for name in [named] if isinstance(named, str) else named if isinstance(named, list) else []:
        full = f"pooling_mode_{name}"
        chosen.add(next((key for key in MODES if key in (full, f"{full}_token", f"{full}_tokens")), full))
    modes = tuple(mode for key, mode in MODES.items() if key in chosen)
    unknown = sorted(chosen - MODES.keys())
    if unknown or not modes:
        raise ModelError(
            f"the pooling '{unknown[0]}' is not known" if unknown else "no pooling is chosen",
            where=str(path),
            fix="set one of these to true: " + ", ".join(MODES),
            zh="池化方式不受支持或未指定，请将其中之一设为 true：" + "、".join(MODES),
        )
    return modes


def inside(folder: Path, name: Any, where: Path) -> Path:
    """A folder inside the model folder.

    Raises:
        ModelError: it lies elsewhere.
    """
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelError(
            f"the step's folder {name!r} lies outside the model folder",
            where=str(where),
            why="a model folder must not make Hanmo read other files of this machine",
            zh=f"步骤的文件夹 {name!r} 不在模型文件夹内，拒绝读取",
        )
    return folder / name


def read_list(path: Path) -> list[dict[str, Any]]:
    """A JSON list of objects."""
    value = read_json(path)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise unexpected(path, "a list of JSON objects", "由 JSON 对象组成的列表")
    return value


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise unexpected(path, "a JSON object", "JSON 对象")
    return value


def unexpected(path: Path, what: str, zh: str) -> ModelError:
    """The error for JSON of another shape."""
    return ModelError(
        f"expected {what}", where=str(path), fix="copy the folder again", zh=f"应为{zh}。请重新复制该文件夹"
    )
