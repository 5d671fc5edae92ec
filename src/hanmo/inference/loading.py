"""From what a user types to a model: a folder, a GGUF file, a run, or a name of the catalog."""

from __future__ import annotations

from pathlib import Path

import torch

from hanmo import catalog
from hanmo.errors import ModelError, nearest
from hanmo.folder import read_manifest
from hanmo.inference.engine import LanguageModel
from hanmo.models.checkpoints.gguf import load_gguf, load_gguf_tokenizer
from hanmo.models.checkpoints.huggingface import load_folder
from hanmo.models.checkpoints.weights import LoadedModel
from hanmo.models.device import choose_device, set_threads
from hanmo.models.transformer import build
from hanmo.text.tokenizer import Tokenizer

RUNS = Path("runs")  # where `hanmo build` and `hanmo pretrain` put their runs
MODEL = "model"  # the model folder inside a run


def load(name_or_folder: str | Path, *, device: str = "auto", offline: bool = False) -> LanguageModel:
    """Load a model.

    Tried in this order: a path (a model folder, a run folder, a ``.gguf`` file), a run under ``runs/``, a name of the
    catalog (downloaded once).

    Args:
        name_or_folder: what to load.
        device: "auto" (CUDA, else Apple's MPS, else the CPU), or "cpu", "cuda", "cuda:1", "mps".
        offline: never use the network; a catalog model must have been downloaded before.

    Raises:
        ModelError: nothing of that name, or a model that is damaged or of an unknown kind.
        ResourceError: the device is not there.
        NetworkError: the download failed, or would be needed although ``offline``.

    >>> load("runs/my-texts").generate("从前")[0].text     # doctest: +SKIP
    """
    place = choose_device(device)
    set_threads()
    path = find(str(name_or_folder), offline=offline)
    loaded = load_gguf(path) if path.is_file() else load_folder(path)
    return assemble(loaded, place, name=str(name_or_folder), prefix=stored_prefix(path, loaded))


def load_tokenizer(name_or_folder: str | Path, *, offline: bool = False) -> Tokenizer:
    """Load a tokenizer alone: a folder with ``tokenizer.json`` (or the file), or that of anything ``load`` takes.

    Raises:
        ModelError: nothing of that name, or a tokenizer that is damaged or of an unknown kind.
        NetworkError: a download failed, or would be needed although ``offline``.
    """
    given = Path(name_or_folder).expanduser()
    if (given / "tokenizer.json").is_file() or given.suffix == ".json":
        return Tokenizer.load(given)
    path = find(str(name_or_folder), offline=offline)
    return Tokenizer.load(path) if path.is_dir() else load_gguf_tokenizer(path)


def find(name: str, *, offline: bool = False) -> Path:
    """The model folder or GGUF file that a name stands for.

    Raises:
        ModelError: there is none; the message names the nearest one known.
    """
    given = Path(name).expanduser()
    for path in (given, RUNS / name):
        if path.exists():
            return inside(path)
    if catalog.entry(name) is not None:
        return inside(catalog.fetch(name, offline=offline))
    runs = [path.name for path in RUNS.iterdir() if (path / MODEL).is_dir()] if RUNS.is_dir() else []
    hint = nearest(name, [*(entry.name for entry in catalog.ENTRIES), *runs])
    raise ModelError(
        f"there is no model '{name}': not a path, not a run in {RUNS}/, not a name of the catalog",
        fix=hint,
        zh=f"找不到模型 '{name}'（不是路径，不是 {RUNS}/ 中的运行，也不在目录中）。{hint}",
    )


def inside(path: Path) -> Path:
    """The model at a path: the path itself, the ``model`` folder of a run, or the only GGUF file of a folder.

    Raises:
        ModelError: the path holds none.
    """
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise ModelError(
            "this file is not a model",
            where=str(path),
            fix="give a model folder (with config.json) or a .gguf file",
            zh="这个文件不是模型，请给出含 config.json 的模型文件夹或 .gguf 文件",
        )
    for folder in (path, path / MODEL):
        if (folder / "config.json").is_file():
            return folder
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ModelError(
            f"the folder holds {len(files)} GGUF files",
            where=str(path),
            fix=f"name one of them, for example  {files[0]}",
            zh=f"文件夹中有 {len(files)} 个 GGUF 文件，请指定其中一个，例如 {files[0]}",
        )
    raise ModelError(
        "the folder holds no model",
        where=str(path),
        why=f"it has neither config.json, nor a folder '{MODEL}' with one, nor a .gguf file",
        fix="a run that was stopped early has no model yet: start it again, it goes on from its last checkpoint",
        zh=f"文件夹中没有模型（没有 config.json、'{MODEL}' 子文件夹或 .gguf 文件）。若训练中途停止，请重新运行以继续",
    )


def stored_prefix(path: Path, loaded: LoadedModel) -> list[int]:
    """The tokens put before a text prompt: ``prompt_prefix`` of our own folders, else BOS where the model expects it.

    Raises:
        ModelError: ``hanmo.json`` says something impossible.
    """
    if path.is_dir():
        prefix = read_manifest(path).get("prompt_prefix")
        if prefix is not None:
            size = loaded.config.vocab_size
            if not isinstance(prefix, list) or not all(type(id) is int and 0 <= id < size for id in prefix):
                raise ModelError(
                    f"prompt_prefix must be a list of token ids from 0 to {size - 1}, not {prefix!r}",
                    where=str(path / "hanmo.json"),
                    fix="remove the entry, or build the model again",
                )
            return prefix
    bos = loaded.generation.get("bos_token_id")
    return [bos] if loaded.generation.get("add_bos_token") and bos is not None else []


def assemble(loaded: LoadedModel, device: torch.device, *, name: str, prefix: list[int]) -> LanguageModel:
    """Build the network on its device: float32 on a CPU, the stored precision on an accelerator."""
    state = loaded.state
    if device.type == "cpu":
        state = {key: tensor.float() for key, tensor in state.items()}
    model = build(loaded.config, state).to(device)
    eos_ids = loaded.generation.get("eos_token_id") or []
    return LanguageModel(model, loaded.tokenizer, name=name, eos_ids=eos_ids, prompt_prefix=prefix)
