"""From a path to a decoder in the native engine's form: GGUF files, quantised folders, and ordinary ones."""

from __future__ import annotations

from pathlib import Path

from hanmo.errors import UsageError
from hanmo.folder import read_manifest
from hanmo.inference.native import library
from hanmo.inference.native.decoder import LoadedParts, Weights, prepare, reason_against
from hanmo.inference.native.folder import WEIGHTS, is_quantized, open_quantized
from hanmo.inference.native.gguf import open_gguf
from hanmo.inference.native.memory import Arena
from hanmo.models.checkpoints.huggingface import load_folder
from hanmo.models.checkpoints.weights import LoadedModel

READ_UP_TO = 1 << 30  # bytes of weights that are read into huge pages (about 0.3 s); more are mapped


def open_native(path: str | Path, precision: str | None = None) -> LoadedParts | str:
    """Open a model for the native engine.

    Args:
        path: a GGUF file, a quantised folder, or a folder in the Hugging Face layout.
        precision: what weights are brought to, as :func:`~hanmo.inference.native.decoder.packed` says; None: the bits
            they have in a GGUF file or quantised folder, else float32.

    Returns:
        the decoder's parts; or the reason why torch must compute it.

    Raises:
        ModelError: the model is damaged or of an unknown kind.
        UsageError: a quantised folder is asked for in another precision than its own.
    """
    path = Path(path)
    engine, reason = library.load()
    if engine is None:
        return reason
    if path.is_file():
        return open_gguf(path, precision)
    if is_quantized(path):
        own = read_manifest(path).get("precision")
        if precision not in (None, own):
            raise UsageError(
                f"this folder is quantised already, as {own}, and cannot be brought to {precision}",
                where=str(path),
                fix="leave the precision out, or load the model it was made from",
                zh=f"这个文件夹已经量化为 {own}，不能再转换成 {precision}。请去掉精度设置，或加载原模型",
            )
        return open_quantized(path, mapped=(path / WEIGHTS).stat().st_size > READ_UP_TO)
    return from_floats(load_folder(path), precision or "fp32")


def from_floats(loaded: LoadedModel, precision: str | None) -> LoadedParts | str:
    """A model read for torch in the engine's form. Its tensors are let go one by one as they are converted."""
    reason = reason_against(loaded.config)
    if reason:
        return reason
    state = loaded.state
    weights = Weights(state.pop, lambda name: state.pop(name, None))
    parts = prepare(loaded.config, weights, precision, Arena().place)
    return LoadedParts(loaded.config, parts, loaded.tokenizer, loaded.generation, loaded.source)
