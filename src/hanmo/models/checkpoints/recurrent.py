"""Model folders of recurrent networks: ``config.json``, ``model.safetensors``, the tokenizer and ``hanmo.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hanmo.errors import ModelError, nearest
from hanmo.folder import atomic_folder, read_json, verify, write_json
from hanmo.models.checkpoints.weights import COPY_AGAIN, MAX_DIMENSION, read_safetensors, write_safetensors
from hanmo.models.heads import HeadConfig, TransformConfig
from hanmo.models.recurrent import CELLS, RecurrentConfig, RecurrentEncoder, RecurrentModel
from hanmo.models.tensors import check_tensors
from hanmo.text.tokenizer import Tokenizer


def save_recurrent(
    target: Path, model: RecurrentModel | RecurrentEncoder, tokenizer: Tokenizer, provenance: dict[str, Any]
) -> None:
    """Write a network and its tokenizer to ``target``, completely or not at all.

    Args:
        target: the model folder; what stands there is replaced once the new one is whole.
        model: a tied output embedding is stored once.
        provenance: settings, data fingerprint, metrics...: the entries of ``hanmo.json``.

    Raises:
        ResourceError: the disk is full or cannot be written; an older folder at ``target`` is intact.
    """
    config = model.config.to_dict()
    if isinstance(model, RecurrentEncoder):
        config["head"] = dataclasses.asdict(model.head.config)
    with atomic_folder(Path(target), provenance) as folder:
        write_safetensors(folder / "model.safetensors", model.state_dict())
        tokenizer.save(folder)
        write_json(folder / "config.json", config)


def load_recurrent(folder: Path) -> tuple[RecurrentModel | RecurrentEncoder, Tokenizer]:
    """Read what :func:`save_recurrent` wrote: the network in evaluation mode, float32, and its tokenizer.

    Raises:
        ModelError: a file is missing, truncated or altered; the configuration contradicts itself; a tensor is missing,
            unexpected, of the wrong shape, or holds NaN; the tokenizer has ids that the network lacks.
    """
    folder = Path(folder)
    verify(folder, hashes=False)
    config, head = read_config(folder / "config.json")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model knows only {config.vocab_size}",
            where=str(folder),
            why="the tokenizer belongs to another model",
            fix="put the tokenizer.json of this model beside its weights",
            zh=f"分词器有 {tokenizer.vocab_size} 个编号，模型只有 {config.vocab_size} 个：它们不属于同一个模型",
        )
    path = folder / "model.safetensors"
    state = {name: tensor.float() for name, tensor in read_safetensors(path).items()}
    refuse_impossible(config, len(state), str(folder))
    with torch.device("meta"):  # takes no memory, however large the configuration says it is
        model = RecurrentModel(config) if head is None else RecurrentEncoder(config, head)
    try:
        check_tensors({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, state)
    except ModelError as error:
        error.where = str(path)
        raise
    model.load_state_dict(state, assign=True)
    return model.eval(), tokenizer


def read_config(path: Path) -> tuple[RecurrentConfig, HeadConfig | None]:
    """The shape of the network, and the head of an encoder.

    Raises:
        ModelError: not a recurrent network, or values that cannot be.
    """
    values = read_json(path)
    if not isinstance(values, dict) or values.get("model_type") not in CELLS:
        kind = str(values.get("model_type")) if isinstance(values, dict) else "nothing"
        raise ModelError(
            f"this is no recurrent network but '{kind}'",
            where=str(path),
            fix=nearest(kind, CELLS),
            zh=f"这不是循环网络，而是 '{kind}'",
        )
    head = values.pop("head", None)
    config = RecurrentConfig.from_dict(values)
    return config, None if head is None else read_head(head, str(path))


def read_head(values: Any, where: str) -> HeadConfig:
    """The head of an encoder from its entry in ``config.json``.

    Raises:
        ModelError: the entry is not what :func:`save_recurrent` writes.
    """
    try:
        transform = values.get("transform")
        labels = values["labels"]
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise TypeError("labels must be a list of names")
        changed = {
            "labels": tuple(labels),
            "transform": TransformConfig(**transform) if isinstance(transform, Mapping) else None,
        }
        return HeadConfig(**{**values, **changed})
    except (TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"the head is not described as it should be: {error}",
            where=where,
            fix=COPY_AGAIN,
            zh=f"任务头的配置有误（{error}）。请重新复制该文件夹",
        ) from None


def refuse_impossible(config: RecurrentConfig, num_tensors: int, where: str) -> None:
    """Refuse a configuration that the weights cannot fill, before a network of that size is built.

    Raises:
        ModelError: more layers than tensors, or a dimension beyond all sense.
    """
    largest = max(config.vocab_size, config.embedding_size, config.hidden_size)
    if config.num_layers * 4 > num_tensors or largest > MAX_DIMENSION:
        raise ModelError(
            f"the configuration has {config.num_layers} layers and sizes up to {largest}, the weights are "
            f"{num_tensors} tensors",
            where=where,
            why="weights and configuration belong to different models, or the weights are incomplete",
            fix=COPY_AGAIN,
            zh=f"配置写有 {config.num_layers} 层、最大尺寸 {largest}，权重只有 {num_tensors} 个张量，二者不符",
        )
