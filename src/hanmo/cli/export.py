"""``hanmo export``: write a model for other programs, as a GGUF file or a Hugging Face folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.outcome import Outcome
from hanmo.errors import ModelError, UsageError
from hanmo.folder import MANIFEST, read_json, read_manifest
from hanmo.language import pick
from hanmo.settings import CommonSettings, argument, notice, option

if TYPE_CHECKING:
    from hanmo.models.checkpoints.weights import LoadedModel

HELP = "write a model as a GGUF file (llama.cpp) or a Hugging Face folder"
HELP_ZH = "导出模型：GGUF 文件（llama.cpp）或 Hugging Face 文件夹"
TYPES = ("F16", "Q8_0", "Q4_K", "Q4_0")
DEFAULT_TYPE = "Q8_0"
OTHER_KINDS = ("rnn", "lstm", "gru", "ngram", "vectors", "linear", "crf")  # our own kinds that are no transformers
ARPA_NAME = re.compile(r"\.arpa(\.gz)?$", re.IGNORECASE)


@dataclass
class ExportSettings(CommonSettings):
    """Settings of ``hanmo export``."""

    model: str = argument(
        "a run, a model folder, a GGUF file or a name from the catalog",
        zh="运行目录、模型文件夹、GGUF 文件或目录中的名称",
    )
    target: str = argument(
        "where to: a name that ends in .gguf gives a GGUF file, one in .arpa (or .arpa.gz) the ARPA file of an n-gram "
        "model, any other a folder for transformers",
        zh="写到哪里：以 .gguf 结尾写 GGUF 文件，以 .arpa 或 .arpa.gz 结尾写 n 元模型的 ARPA 文件，否则写 transformers "
        "可读的文件夹",
    )
    type: str | None = option(
        None,
        "how a GGUF file stores weights: F16 (half precision), Q8_0 (8 bits, hardly any loss), Q4_K (about 5 bits, "
        "small loss), Q4_0 (about 4.5 bits, for old programs); default: Q8_0",
        zh="GGUF 的存储方式：F16（半精度）、Q8_0（8 位，几乎无损）、Q4_K（约 5 位，略有损失）、Q4_0（约 4.5 位，"
        "供旧程序使用）；默认 Q8_0",
        choices=TYPES,
    )
    max_shard_gb: float = option(
        5.0, "a folder's weights beyond so many GB are stored in several files", zh="文件夹中单个权重文件的上限（GB）"
    )


def read_source(settings: ExportSettings) -> tuple[Path, LoadedModel]:
    """The model to export and where it lies.

    Raises:
        ModelError: nothing of that name, a damaged model, or one of a kind that has no other format.
    """
    from hanmo.inference.loading import find
    from hanmo.models.checkpoints.gguf import load_gguf
    from hanmo.models.checkpoints.huggingface import load_folder

    path = find(settings.model, offline=settings.offline)
    if path.is_file():
        return path, load_gguf(path)
    raw = read_json(path / "config.json")
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind in OTHER_KINDS:
        raise no_such_format(kind, settings.model)
    return path, load_folder(path)


def no_such_format(kind: str, model: str) -> ModelError:
    """The error for a model of ours that no format of transformers describes; it says what there is instead."""
    fix, zh = {
        "ngram": (f"hanmo export {model} NAME.arpa", f"请写：hanmo export {model} 名称.arpa"),
        "vectors": (f"hanmo vectors convert {model} NAME.bin", f"请写：hanmo vectors convert {model} 名称.bin"),
    }.get(kind, ("copy its folder; Hanmo reads it anywhere", "它只有自己的格式，直接复制其文件夹即可"))
    return ModelError(
        f"a model of the kind '{kind}' cannot be written in this format",
        where=model,
        why="GGUF and folders for transformers hold transformers, ARPA files n-gram models",
        fix=fix,
        zh=f"'{kind}' 类模型不能导出为这种格式（GGUF 与 transformers 文件夹存 Transformer，ARPA 存 n 元模型）。{zh}",
    )


def refuse_target(source: Path, target: Path) -> None:
    """Never write over the model that is read or what it lies in, nor over a folder that is no model of ours.

    Raises:
        UsageError: ``target`` is such a place.
    """
    if target.exists() and target.resolve() in (source.resolve(), *source.resolve().parents):
        raise UsageError(
            "the model that is read would be written over",
            where=str(target),
            fix="choose another target",
            zh="目标就是要导出的模型本身。请另选一个位置",
        )
    ours = (target / MANIFEST).is_file() and (target / "config.json").is_file()
    if target.is_dir() and any(target.iterdir()) and not ours:
        raise UsageError(
            "this folder holds something else than a model that Hanmo wrote; it would be lost",
            where=str(target),
            fix="choose an empty or new folder",
            zh="这个文件夹里有其他内容，写入会覆盖它们。请另选一个空文件夹",
        )


def run(settings: ExportSettings) -> Outcome:
    """Read the model and write it in the format that the target's name asks for."""
    target = Path(settings.target).expanduser()
    as_gguf = target.suffix.lower() == ".gguf"
    if settings.type is not None and not as_gguf:
        raise UsageError(
            "--type is for GGUF files, and the target does not end in .gguf",
            where="hanmo export",
            fix=f"hanmo export {settings.model} {target}.gguf --type {settings.type}",
            zh=f"--type 只用于 GGUF 文件。请写：hanmo export {settings.model} {target}.gguf --type {settings.type}",
        )
    if settings.max_shard_gb <= 0:
        raise UsageError("--max-shard-gb must be above 0", where="hanmo export", zh="--max-shard-gb 必须大于 0")
    if ARPA_NAME.search(target.name):
        return export_arpa(settings, target)
    source, loaded = read_source(settings)
    refuse_target(source, target)
    manifest = read_manifest(source) if source.is_dir() else {}
    return (
        export_gguf(settings, source, target, loaded, manifest)
        if as_gguf
        else export_folder(settings, target, loaded, manifest)
    )


def export_arpa(settings: ExportSettings, target: Path) -> Outcome:
    """Write the ARPA file of an n-gram model.

    Raises:
        UsageError, ModelError: the model is of another kind.
    """
    from hanmo.inference.loading import find
    from hanmo.models.checkpoints.ngram import load_ngram
    from hanmo.progress import human_bytes

    source = find(settings.model, offline=settings.offline)
    kind = read_json(source / "config.json").get("model_type") if source.is_dir() else None
    if kind != "ngram":
        if kind in OTHER_KINDS:
            raise no_such_format(kind, settings.model)
        raise UsageError(
            "ARPA files are for n-gram models, and this is none",
            where=settings.model,
            fix=f"hanmo export {settings.model} NAME.gguf, or a folder",
            zh=f"ARPA 文件只用于 n 元模型。请写：hanmo export {settings.model} 名称.gguf，或给出文件夹",
        )
    refuse_target(source, target)
    model, tokenizer = load_ngram(source)
    if not tokenizer.is_word_level:
        notice(
            pick(
                "the words of this file are the tokenizer's pieces: text must be cut into them before it is scored",
                "文件中的“词”是分词器的词元：用它给文本打分之前，须先用该分词器切分",
            )
        )
    model.to_arpa(target, tokenizer)
    size, ngrams = target.stat().st_size, sum(model.describe()["ngrams"])
    return Outcome({"path": str(target), "bytes": size, "ngrams": ngrams}, f"{target}  {human_bytes(size)}")


def export_gguf(
    settings: ExportSettings, source: Path, target: Path, loaded: LoadedModel, manifest: dict[str, Any]
) -> Outcome:
    """Write a GGUF file."""
    from hanmo.inference.loading import stored_prefix
    from hanmo.models.checkpoints.gguf_writer import save_gguf
    from hanmo.progress import human_bytes

    prefix = stored_prefix(source, loaded)
    bos = loaded.generation.get("bos_token_id")
    written = save_gguf(
        target,
        loaded.config,
        loaded.state,
        loaded.tokenizer,
        type=settings.type or DEFAULT_TYPE,
        generation={**loaded.generation, "add_bos_token": bool(prefix) and prefix == [bos]},
        name=str(manifest.get("name") or Path(settings.model).name.removesuffix(".gguf")),
        license=str(manifest.get("license") or ""),
    )
    data = {
        "target": str(target),
        "type": settings.type or DEFAULT_TYPE,
        "bytes": written.num_bytes,
        "bits_per_weight": round(written.bits_per_weight, 3),
        "weights_by_type": written.weights_by_type,
    }
    total = sum(written.weights_by_type.values())
    shares = ", ".join(f"{kind} {count / total:.0%}" for kind, count in written.weights_by_type.items())
    return Outcome(
        data, f"{target}  {human_bytes(written.num_bytes)}, {written.bits_per_weight:.2f} bits per weight ({shares})"
    )


def export_folder(settings: ExportSettings, target: Path, loaded: LoadedModel, manifest: dict[str, Any]) -> Outcome:
    """Write a folder in the layout of Hugging Face."""
    from hanmo.models.checkpoints.save import save_folder
    from hanmo.models.transformer import build
    from hanmo.progress import human_bytes

    model = build(loaded.config, loaded.state)
    provenance = {key: value for key, value in manifest.items() if key != "files"}
    save_folder(
        target,
        model,
        loaded.tokenizer,
        provenance=provenance,
        generation=loaded.generation,
        max_shard_bytes=int(settings.max_shard_gb * 1e9),
    )
    weights = sum(parameter.numel() for parameter in model.parameters())
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    bits = 8 * sum(p.numel() * p.element_size() for p in model.parameters()) / weights
    data = {"target": str(target), "type": "folder", "bytes": size, "bits_per_weight": round(bits, 3)}
    return Outcome(data, f"{target}/  {human_bytes(size)}, {bits:.0f} bits per weight")
