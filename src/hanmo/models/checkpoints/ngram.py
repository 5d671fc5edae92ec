"""Model folders of n-gram models: ``config.json``, ``model.safetensors``, the tokenizer and ``hanmo.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hanmo.errors import ModelError
from hanmo.folder import atomic_folder, read_json, verify, write_json
from hanmo.models.ngram import NGramModel
from hanmo.text.tokenizer import Tokenizer

MODEL_TYPE = "ngram"


def save_ngram(target: Path, model: NGramModel, tokenizer: Tokenizer, provenance: dict[str, Any]) -> None:
    """Write a model and its tokenizer to ``target``, completely or not at all.

    Raises:
        ResourceError: the disk is full or cannot be written; an older folder at ``target`` is intact.
    """
    with atomic_folder(Path(target), provenance) as folder:
        model.save(folder / "model.safetensors")
        tokenizer.save(folder)
        config = {"model_type": MODEL_TYPE, "order": model.order, "vocab_size": model.vocab_size}
        write_json(folder / "config.json", config)


def load_ngram(folder: Path) -> tuple[NGramModel, Tokenizer]:
    """Read what :func:`save_ngram` wrote.

    Raises:
        ModelError: a file is missing, truncated or altered; or model, configuration and tokenizer do not belong
            together.
    """
    folder = Path(folder)
    verify(folder, hashes=False)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        raise ModelError("this is no n-gram model", where=str(folder / "config.json"), zh="这不是 n 元模型的文件夹")
    tokenizer = Tokenizer.load(folder)
    model = NGramModel.load(folder / "model.safetensors")
    for name, found in (("order", model.order), ("vocab_size", model.vocab_size)):
        if config.get(name) != found:
            raise ModelError(
                f"the configuration says {name} {config.get(name)!r}, the model has {found}",
                where=str(folder / "config.json"),
                fix="copy or train it again",
                zh=f"配置中的 {name} 为 {config.get(name)!r}，模型却是 {found}。请重新复制或重新训练",
            )
    if tokenizer.vocab_size > model.vocab_size:
        raise ModelError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model knows only {model.vocab_size}",
            where=str(folder),
            why="the tokenizer belongs to another model",
            fix="put the tokenizer.json of this model beside it",
            zh=f"分词器有 {tokenizer.vocab_size} 个编号，模型只有 {model.vocab_size} 个：它们不属于同一个模型",
        )
    return model, tokenizer
