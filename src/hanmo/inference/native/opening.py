"""From a path to a decoder in the native engine's form: GGUF files, quantised folders, and ordinary ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hanmo.errors import UsageError
from hanmo.folder import read_manifest
from hanmo.inference.loading import assemble, build_on
from hanmo.inference.native import library
from hanmo.inference.native.calibration import calibrate
from hanmo.inference.native.calibration_text import CalibrationText, own_text, text_of_files
from hanmo.inference.native.decoder import LoadedParts, NativeDecoder, Weights, prepare, reason_against
from hanmo.inference.native.folder import is_quantized, open_quantized
from hanmo.inference.native.gguf import open_gguf
from hanmo.inference.native.memory import Arena
from hanmo.inference.native.network import NativeNetwork
from hanmo.models.checkpoints.huggingface import load_folder
from hanmo.models.checkpoints.weights import LoadedModel
from hanmo.models.transformer import Transformer


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
        return open_quantized(path)
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


def from_floats_calibrated(
    loaded: LoadedModel,
    files: Sequence[str | Path] = (),
    *,
    prefix: Sequence[int] = (),
    seed: int = 0,
    progress: bool = False,
) -> tuple[LoadedParts, dict[str, Any]] | str:
    """A model read for torch at 4 bits, rounded by what it does with some text (``calibration.py``). Its tensors are
    let go.

    Args:
        files: texts to calibrate with; none: what the model writes.
        prefix: the tokens that its prompts begin with.
        seed: of all that is drawn.
        progress: whether to show how far the work is.

    Returns:
        the decoder's parts, and what they were calibrated with, as plain data; or the reason why the engine cannot
        compute it.

    Raises:
        DataError: a file is missing, cannot be read, or holds too little text.
        ModelError: the network computes NaN or infinite values.
    """
    reason = reason_against(loaded.config)
    if reason:
        return reason
    config, model = loaded.config, build_on(loaded, torch.device("cpu"))
    text = calibration_text(model, loaded, files, list(prefix), seed=seed, progress=progress)
    matrices = calibrate(model, text.tokens_BT, seed=seed, progress=progress)
    state = model.state_dict()
    weights = Weights(lambda name: matrices.pop(name) if name in matrices else state.pop(name), state.get)
    parts = prepare(config, weights, "int4", Arena().place)
    return LoadedParts(config, parts, loaded.tokenizer, loaded.generation, loaded.source), {**text.record, "seed": seed}


def calibration_text(
    model: Transformer,
    loaded: LoadedModel,
    files: Sequence[str | Path],
    prefix: list[int],
    *,
    seed: int,
    progress: bool,
) -> CalibrationText:
    """The text to calibrate a network with; what it writes itself is written at 8 bits where the engine is there."""
    if files:
        return text_of_files(files, assemble(model, loaded, name=loaded.source, prefix=prefix))
    network: Transformer | NativeNetwork = model
    if library.load()[0] is not None:
        parts = prepare(loaded.config, Weights.of_state(model.state_dict()), "int8", Arena().place)
        network = NativeNetwork(NativeDecoder(loaded.config, parts))
    return own_text(assemble(network, loaded, name=loaded.source, prefix=prefix), seed=seed, progress=progress)
