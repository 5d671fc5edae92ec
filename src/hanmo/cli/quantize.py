"""``hanmo quantize``: write a decoder as a folder of 8- or 4-bit weights, which the native engine opens at once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.export import refuse_target
from hanmo.cli.outcome import Outcome
from hanmo.errors import ModelError, UsageError
from hanmo.folder import free_bytes, read_json, read_manifest, sha256_file
from hanmo.language import pick
from hanmo.settings import CommonSettings, Resolution, argument, notice, option

if TYPE_CHECKING:
    from hanmo.inference.native.decoder import LoadedParts

HELP = "write a model with 8- or 4-bit weights for fast use on a CPU"
HELP_ZH = "把模型量化为 8 位或 4 位权重，供 CPU 快速使用"
PRECISIONS = ("fp16", "int8", "int4")
STORED = "stored"


@dataclass
class QuantizeSettings(CommonSettings):
    """Settings of ``hanmo quantize``."""

    model: str = argument(
        "a run, a model folder, a GGUF file or a name from the catalog; it must be a decoder",
        zh="运行目录、模型文件夹、GGUF 文件或目录中的名称；须为解码器",
    )
    target: str = argument("the folder to write", zh="要写的文件夹", metavar="FOLDER")
    precision: str | None = option(
        None,
        "bits of a weight: stored (those of a GGUF file, without any loss for Q4_0, Q4_1, Q5_0 and Q8_0), fp16, int8 "
        "(hardly any loss), int4 (embedding and output keep 8 bits; half the size, some loss); default: stored for a "
        "GGUF file, else int8",
        zh="权重的位数：stored（GGUF 文件原有的位数，Q4_0、Q4_1、Q5_0、Q8_0 完全无损）、fp16、int8（几乎无损）、int4"
        "（嵌入与输出层保持 8 位；体积减半，略有损失）；默认：GGUF 文件为 stored，其余为 int8",
        choices=(STORED, *PRECISIONS),
    )
    calibration: list[str] = option(
        [],
        "for int4: a file or folder of text like the model's use, in all of its languages, that decides what rounding "
        "must preserve; may be given several times; default: text that the model itself writes",
        zh="用于 int4：与模型用途相近、涵盖其各种语言的文本文件或文件夹，据此决定舍入时须保留什么；可多次给出；"
        "默认用模型自己生成的文本",
        metavar="FILE",
    )
    no_calibration: bool = option(
        False,
        "int4 without calibration: each group of weights to its nearest levels; in seconds, but a good deal less exact",
        zh="int4 不校准：每组权重各自取最近的值；只需几秒，但误差明显更大",
    )


def run(settings: QuantizeSettings) -> Outcome:
    """Read the model, bring it to fewer bits, and write the folder."""
    from hanmo.inference.loading import find, stored_prefix
    from hanmo.inference.native.folder import WEIGHTS, kinds_of, quantized_card, save_quantized
    from hanmo.models.checkpoints.weights import LoadedModel
    from hanmo.progress import human_bytes

    target = Path(settings.target).expanduser()
    source = find(settings.model, offline=settings.offline)
    is_file = source.is_file()
    if settings.precision == STORED and not is_file:
        raise UsageError(
            "--precision stored is for GGUF files",
            where="hanmo quantize",
            fix="--precision " + " or ".join(PRECISIONS),
            zh="--precision stored 只用于 GGUF 文件，请改用 " + "、".join(PRECISIONS),
        )
    if target.suffix.lower() == ".gguf":
        raise UsageError(
            "hanmo quantize writes folders for Hanmo's own engine",
            where=str(target),
            fix=f"hanmo export {settings.model} {target} --type Q4_K",
            zh=f"hanmo quantize 写的是本工具引擎用的文件夹。要写 GGUF 请用：hanmo export {settings.model} {target}",
        )
    refuse_target(source, target)
    check_calibration(settings, source)
    resolution = Resolution()
    if is_file:
        resolution.compute(settings, "precision", STORED, pick("a GGUF file keeps its bits", "GGUF 文件保持原有位数"))
    else:
        resolution.compute(settings, "precision", "int8", pick("hardly any loss", "几乎无损"))
    if resolution.choices:
        notice(resolution.describe())
    start = time.monotonic()
    loaded, calibration = read_source(source, settings)
    precision = str(settings.precision)
    read = LoadedModel(loaded.config, {}, loaded.tokenizer, loaded.generation, loaded.source)
    manifest = read_manifest(source) if source.is_dir() else {}
    provenance = {
        **{key: value for key, value in manifest.items() if key not in ("files", "form", "form_version")},
        "prompt_prefix": stored_prefix(source, read),
        "quantized": {
            "from": origin(source, settings.model),
            "asked": precision,
            **({"calibration": calibration} if calibration else {}),
        },
    }
    size = (loaded.weight_bytes + 64 * len(loaded.parts)) * 1.02 + 1e7  # the tokenizer and what is small beside it
    if size > free_bytes(target.parent):
        raise no_room(target, size)
    save_quantized(target, loaded, provenance=provenance, card=quantized_card(target.name, loaded, provenance))
    seconds = time.monotonic() - start
    before, after = weight_bytes(source), (target / WEIGHTS).stat().st_size
    kinds = kinds_of(loaded.parts)
    bits = 8 * loaded.weight_bytes / sum(kinds.values())
    data = {
        "target": str(target),
        "precision": precision,
        "bytes_before": before,
        "bytes": after,
        "bits_per_weight": round(bits, 3),
        "weights_by_kind": kinds,
        "calibration": calibration,
        "seconds": round(seconds, 2),
    }
    sizes = f"{human_bytes(before)} -> {human_bytes(after)}"
    text = pick(
        f"{target}/  {sizes}, {bits:.2f} bits per weight, {seconds:.1f} s\nnext:  hanmo chat {target}",
        f"{target}/  {sizes}，每个权重 {bits:.2f} 位，用时 {seconds:.1f} 秒\n接下来：hanmo chat {target}",
    )
    return Outcome(data, text)


def check_calibration(settings: QuantizeSettings, source: Path) -> None:
    """Refuse settings of the calibration that contradict others, before anything is computed.

    Raises:
        UsageError: there is nothing to calibrate.
        DataError: a file does not exist.
    """
    from hanmo.data.sources import find_sources

    if not settings.calibration:
        return
    if settings.no_calibration:
        raise UsageError(
            "--calibration and --no-calibration exclude each other",
            where="hanmo quantize",
            fix="leave one of them out",
            zh="--calibration 与 --no-calibration 不能同时使用，请去掉其中一个",
        )
    if settings.precision != "int4" or not is_precise(source):
        reason, zh = "it is for --precision int4", "只用于 --precision int4"
        if settings.precision == "int4":
            reason, zh = "the weights of this file have few bits already", "该文件的权重位数已经很少"
        raise UsageError(
            f"--calibration has nothing to decide here: {reason}",
            where="hanmo quantize",
            fix="add --precision int4" if settings.precision != "int4" else "quantize the model the file was made from",
            zh=f"此处不能使用 --calibration：{zh}",
        )
    find_sources(settings.calibration)


def is_precise(source: Path) -> bool:
    """Whether the weights of a model have at least 8 bits, so that rounding them to 4 is worth some thought."""
    from hanmo.models.checkpoints.gguf_header import TENSOR_TYPES, read_gguf_header

    if source.is_dir():
        return True
    kinds = {TENSOR_TYPES[tensor.type][0] for tensor in read_gguf_header(source).tensors.values()}
    return kinds <= {"F32", "F16", "BF16", "Q8_0"}


Converted = tuple["LoadedParts", dict[str, Any] | None]


def read_source(source: Path, settings: QuantizeSettings) -> Converted:
    """The model in the engine's form, and what it was calibrated with.

    Raises:
        UsageError: it is quantised already.
        DataError: a text to calibrate with cannot be read, or there is too little.
        ModelError: the model is damaged, or no decoder that the engine computes.
    """
    from hanmo.inference.native.folder import is_quantized

    if source.is_dir() and is_quantized(source):
        raise UsageError(
            "this folder is quantised already",
            where=str(source),
            fix="quantize the model it was made from: rounding twice loses more",
            zh="这个文件夹已经量化。请从原模型量化：两次舍入损失更大",
        )
    found = converted(source, settings)
    if isinstance(found, str):
        raise ModelError(
            f"this model cannot be quantised: {found}",
            where=settings.model,
            why="quantised folders are for the native engine, which computes decoders",
            fix="hanmo export writes other formats",
            zh=f"这个模型不能量化（{found}）：量化文件夹供本地引擎使用，只支持解码器。其他格式请用 hanmo export",
        )
    return found


def converted(source: Path, settings: QuantizeSettings) -> Converted | str:
    """The same, or why it cannot be."""
    from hanmo.cli.export import OTHER_KINDS
    from hanmo.inference.loading import stored_prefix
    from hanmo.inference.native.gguf import open_gguf
    from hanmo.inference.native.opening import from_floats, from_floats_calibrated
    from hanmo.models.checkpoints.gguf import load_gguf
    from hanmo.models.checkpoints.huggingface import load_folder
    from hanmo.models.device import set_threads

    if source.is_dir():
        raw = read_json(source / "config.json")
        kind = raw.get("model_type") if isinstance(raw, dict) else None
        if kind in OTHER_KINDS:
            return f"it is of the kind '{kind}'"
    set_threads()
    precision = None if settings.precision == STORED else settings.precision
    if precision == "int4" and not settings.no_calibration and is_precise(source):
        loaded = load_gguf(source) if source.is_file() else load_folder(source)
        prefix = stored_prefix(source, loaded)
        return from_floats_calibrated(loaded, settings.calibration, prefix=prefix, progress=True)
    found = open_gguf(source, precision) if source.is_file() else from_floats(load_folder(source), precision)
    return found if isinstance(found, str) else (found, None)


def weight_files(source: Path) -> list[Path]:
    """The files that hold the weights of a model."""
    from hanmo.models.checkpoints import huggingface

    return [source] if source.is_file() else huggingface.weight_files(source)


def weight_bytes(source: Path) -> int:
    """The size of a model's weights on disk."""
    return sum(path.stat().st_size for path in weight_files(source))


def origin(source: Path, name: str) -> dict[str, Any]:
    """What a folder was made from: the name that was given, and the hashes of the weights."""
    return {"model": Path(name).name, "sha256": {path.name: sha256_file(path) for path in weight_files(source)}}


def no_room(target: Path, size: float) -> Exception:
    """The error for a disk that is too full."""
    from hanmo.errors import ResourceError
    from hanmo.progress import human_bytes

    free = human_bytes(free_bytes(target.parent))
    return ResourceError(
        f"the folder needs about {human_bytes(size)}, the disk has {free} free",
        where=str(target),
        fix="free some space, or choose another place",
        zh=f"约需 {human_bytes(size)} 磁盘空间，剩余 {free}。请腾出空间或换一个位置",
    )
