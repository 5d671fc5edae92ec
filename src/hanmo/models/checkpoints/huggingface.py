"""Model folders in the Hugging Face layout, of every architecture we know: our own and those of other tools.

Nothing in a folder is executed: the configuration is data for a class that is already here, weights are safetensors
only, and an index cannot name a file outside the folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanmo import folder as folders
from hanmo.errors import ModelError
from hanmo.models.architectures import read_config as read_architecture
from hanmo.models.architectures import take_over
from hanmo.models.checkpoints.weights import (
    LoadedModel,
    check_size,
    check_vocabulary,
    known_ids,
    read_header,
    read_safetensors,
)
from hanmo.models.transformer import TransformerConfig
from hanmo.text.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HASHED_UP_TO = 4_000_000_000  # bytes; above, sizes only: hashing takes about 0.6 s per GB
OWN_METHOD = "hanmo"  # of folders that `hanmo quantize` writes
FOLDER_AGAIN = "copy or download the folder again"


def load_folder(folder: str | Path, *, dtype: torch.dtype | None = None) -> LoadedModel:
    """Read a model folder.

    The order is: the manifest (size and SHA-256 of every file it lists), the configuration, the headers of all weight
    files, the tokenizer, and only then the weights, memory-mapped.

    Args:
        folder: holds ``config.json``, ``model.safetensors`` (or shards with an index) and ``tokenizer.json``.
        dtype: the precision to bring the weights to; default: as stored.

    Raises:
        ModelError: something is missing, damaged, unsafe or of an unknown architecture.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        there = "has no config.json" if folder.is_dir() else "does not exist"
        raise ModelError(
            f"the model folder {there}",
            where=str(folder),
            fix="give a folder that 'hanmo build' wrote, a Hugging Face folder, or a .gguf file",
            zh="这里没有模型文件夹（缺少 config.json）。请给出 hanmo build 或 Hugging Face 的文件夹，或 .gguf 文件",
        )
    check_manifest(folder)
    raw = read_object(folder / "config.json")
    config = read_config(raw, folder / "config.json")
    files = weight_files(folder)
    check_size(config, sum(len(read_header(path)) for path in files), str(folder))
    tokenizer = Tokenizer.load(folder)
    check_vocabulary(tokenizer, config, str(folder / "tokenizer.json"))
    generation = read_generation(folder, raw, config, tokenizer)
    state: dict[str, Tensor] = {}
    for path in files:
        state.update(read_safetensors(path, dtype))
    try:
        config, state = take_over(config, state)
    except ModelError as error:
        fix = error.fix or FOLDER_AGAIN
        raise ModelError(error.what, where=str(folder), why=error.why, fix=fix, zh=error.zh) from None
    return LoadedModel(config, state, tokenizer, generation, str(folder), checked=True)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        value = folders.read_json(path)
    except (ValueError, RecursionError) as error:  # numbers of a million digits, brackets nested without end
        raise unusable(path, f"not usable as JSON: {str(error)[:100]}", "不能作为 JSON 使用") from None
    if not isinstance(value, dict):
        raise unusable(path, "expected a JSON object", "应为 JSON 对象")
    return value


def unusable(path: Path, what: str, zh: str) -> ModelError:
    """The error for a file of a folder that does not hold what it should."""
    return ModelError(what, where=str(path), fix=FOLDER_AGAIN, zh=f"{zh}。请重新复制或下载整个文件夹")


def check_manifest(folder: Path) -> None:
    """Check the files that ``hanmo.json`` lists; a folder of another tool has none."""
    path = folder / folders.MANIFEST
    files = read_object(path).get("files", {}) if path.exists() else {}
    if not isinstance(files, dict):
        raise unusable(path, "'files' is not a JSON object", "'files' 不是 JSON 对象")
    total = 0
    for name, entry in files.items():
        if (
            not isinstance(entry, dict)
            or type(entry.get("size")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            raise unusable(path, f"the entry of '{name}' lacks size or sha256", f"'{name}' 一项缺少 size 或 sha256")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise unusable(path, f"the file '{name}' lies outside the folder", f"文件 '{name}' 不在文件夹之内")
        total += entry["size"]
    folders.verify(folder, hashes=total <= HASHED_UP_TO)


def read_config(raw: dict[str, Any], path: Path) -> TransformerConfig:
    """The network's shape from ``config.json``; every error names the file.

    Raises:
        ModelError: an unknown architecture, quantised weights, or values that are not numbers.
    """
    method = raw.get("quantization_config")
    if isinstance(method, dict) and method.get("quant_method") == OWN_METHOD:
        raise ModelError(
            "the folder is quantised: it can be used, but not trained, exported or quantised again",
            where=str(path),
            why="rounded weights would be rounded or changed once more, which loses more than it should",
            fix="start from the model it was made from",
            zh="这个文件夹已经量化：可以使用，但不能再训练、导出或量化。请从原模型开始",
        )
    if method:
        raise ModelError(
            "the weights are quantised in a way that is not known",
            where=str(path),
            fix="use the full-precision folder of this model, or a GGUF file of it",
            zh="这个文件夹的权重经过量化，无法读取。请使用未量化的文件夹或 GGUF 文件",
        )
    try:
        return read_architecture(raw)
    except ModelError as error:
        fix = error.fix or FOLDER_AGAIN
        raise ModelError(error.what, where=str(path), why=error.why, fix=fix, zh=error.zh) from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise unusable(
            path, f"a value is not of the expected kind: {error}", f"有一个值的类型不对（{error}）"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that the index names.

    Raises:
        ModelError: there are none, only pickles, or the index and the shards contradict each other.
    """
    if (folder / WEIGHTS).exists():
        return [inside(folder, WEIGHTS, folder / WEIGHTS)]
    if (folder / INDEX).exists():
        return sharded_files(folder)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            "the weights are stored as a Python pickle, which is not read",
            where=str(folder / pickles[0]),
            why="loading a pickle runs whatever code its author put into it",
            fix="take the safetensors version of the model, or convert it where you trust it:  "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)",
            zh="权重是 pickle 格式：加载它等于运行作者写入的代码，因此拒绝读取。请改用 safetensors 版本，"
            "或在可信环境中用 transformers 的 save_pretrained 转换",
        )
    raise ModelError(
        "the folder has no weights",
        where=str(folder / WEIGHTS),
        fix=FOLDER_AGAIN,
        zh="文件夹里没有权重文件 model.safetensors。请重新复制或下载",
    )


def sharded_files(folder: Path) -> list[Path]:
    """The shards of an index, checked: inside the folder, and holding exactly the tensors that the index says."""
    path = folder / INDEX
    shards: dict[str, set[str]] = {}
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise unusable(path, "'weight_map' is missing or empty", "缺少 'weight_map' 或其内容为空")
    for tensor, name in weight_map.items():
        shards.setdefault(str(name), set()).add(tensor)
    files = [inside(folder, name, path) for name in sorted(shards)]
    for file in files:
        found, listed = set(read_header(file)), shards[file.name]
        if found != listed:
            name = min(found ^ listed)
            holds = "holds" if name in found else "lacks"
            raise unusable(
                path,
                f"the shard {file.name} {holds} the tensor '{name}' against the index",
                f"分片 {file.name} 与索引不符：张量 '{name}'",
            )
    return files


def inside(folder: Path, name: str, where: Path) -> Path:
    """A weight file of the folder by its plain name.

    A link may lead out of the folder in one case only: the hub's cache keeps ``snapshots/<commit>/`` as links into
    ``blobs/`` of the same model.

    Raises:
        ModelError: the name is a path, or a link leads elsewhere.
    """
    path = folder / name
    allowed = {folder.resolve()}
    if folder.resolve().parent.name == "snapshots":
        allowed.add(folder.resolve().parent.parent / "blobs")
    if not SHARD_NAME.fullmatch(name) or path.resolve().parent not in allowed:
        raise ModelError(
            f"the weight file '{name}' is not a safetensors file inside the folder",
            where=str(where),
            why="a model folder must not make Hanmo read other files of this machine",
            fix="copy the weights into the folder",
            zh=f"权重文件 '{name}' 不在模型文件夹内，拒绝读取",
        )
    return path


def read_generation(
    folder: Path, raw: dict[str, Any], config: TransformerConfig, tokenizer: Tokenizer
) -> dict[str, Any]:
    """``generation_config.json`` with the special ids filled in from ``config.json`` and the tokenizer."""
    path = folder / "generation_config.json"
    generation = read_object(path) if path.exists() else {}
    fallback = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if config.encoder:  # how its answers begin, and what they never hold
        fallback |= {"decoder_start_token_id": None, "forced_bos_token_id": None}
        generation["bad_words_ids"] = forbidden(generation.get("bad_words_ids", raw.get("bad_words_ids")))
    for key, own in fallback.items():
        value = generation.get(key, raw.get(key))
        ids = known_ids(own if value is None else value, config.vocab_size, str(path if path.exists() else folder))
        generation[key] = ids if key == "eos_token_id" else (ids[0] if ids else None)
    generation["add_bos_token"] = expects_bos(folder, tokenizer, generation["bos_token_id"])
    return generation


def forbidden(value: Any) -> list[int]:
    """The single tokens of ``bad_words_ids``; longer words are left out. Marian's models must never write padding."""
    words = value if isinstance(value, list) else []
    return [word[0] for word in words if isinstance(word, list) and len(word) == 1 and type(word[0]) is int]


def expects_bos(folder: Path, tokenizer: Tokenizer, bos_id: int | None) -> bool:
    """Whether the folder's tokenizer puts BOS before a plain text: ``add_bos_token``, else its post-processor."""
    if bos_id is None:
        return False
    path = folder / "tokenizer_config.json"
    flag = read_object(path).get("add_bos_token") if path.exists() else None
    if isinstance(flag, bool):
        return flag
    processor = tokenizer.post_processor or {}
    try:
        for stage in processor.get("processors", [processor]):
            if stage.get("type") == "TemplateProcessing":
                first = stage["single"][0]["SpecialToken"]["id"]
                return bool(stage["special_tokens"][first]["ids"] == [bos_id])
    except (AttributeError, IndexError, KeyError, TypeError):
        pass  # the template does not begin with a special token
    return False
