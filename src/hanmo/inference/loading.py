"""From what a user types to a model: a folder, a GGUF file, a run, or a name of the catalog."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hanmo import catalog
from hanmo.errors import ModelError, UsageError, nearest
from hanmo.folder import read_json, read_manifest
from hanmo.inference.language_model import LanguageModel
from hanmo.inference.native.decoder import LoadedParts, NativeDecoder, reason_against
from hanmo.inference.native.library import load as native_library
from hanmo.inference.networks import Network
from hanmo.models.architectures import ARCHITECTURES
from hanmo.models.checkpoints.gguf import load_gguf, load_gguf_tokenizer
from hanmo.models.checkpoints.huggingface import check_manifest, expects_bos, load_folder, read_config, read_object
from hanmo.models.checkpoints.weights import COPY_AGAIN, LoadedModel, known_ids
from hanmo.models.device import choose_device, set_threads
from hanmo.models.transformer import Transformer, TransformerConfig, build
from hanmo.text.tokenizer import Tokenizer

RUNS = Path("runs")  # where `hanmo build` and `hanmo pretrain` put their runs
MODEL = "model"  # the model folder inside a run
REMOTE = "openai:"
ARPA = re.compile(r"\.arpa(\.gz)?$", re.IGNORECASE)
VECTORS = re.compile(r"\.(bin|vec|txt)(\.gz)?$", re.IGNORECASE)  # word2vec's and GloVe's files


@dataclass(frozen=True)
class Place:
    """Where and in which form a model is to compute; see :func:`load`."""

    device: torch.device
    precision: str | None = None
    engine: str = "auto"
    kv_cache: str | None = None

    def reason_against_native(self) -> str | None:
        """Why the native engine is not to compute here, whatever the model; None where it may."""
        if self.engine == "torch":
            return "--engine torch"
        if self.device.type != "cpu":
            return f"it computes on CPUs, not on {self.device}"
        library, reason = native_library()
        return reason if library is None else None

    def refusal(self, reason: str) -> UsageError | None:
        """The error where the user asked for the native engine, and it cannot be had."""
        if self.engine == "native":
            wanted = "--engine native"
        elif self.precision not in (None, "fp32"):
            wanted = f"--precision {self.precision}"
        elif self.kv_cache is not None:
            wanted = f"--kv-cache {self.kv_cache}"
        else:
            return None
        return UsageError(
            f"{wanted} needs the native engine, which cannot be used here: {reason}",
            fix="leave the option out: torch computes the model in float32; hanmo doctor says what is missing",
            zh=f"{wanted} 需要本地推理引擎，但此处无法使用（{reason}）。请去掉该选项，改由 torch 以 float32 计算",
        )


def load(
    name: str | Path,
    *,
    device: str = "auto",
    offline: bool = False,
    precision: str | None = None,
    engine: str = "auto",
    kv_cache: str | None = None,
    draft: str | Path | None = None,
) -> Any:
    """Load a model of any kind.

    Tried in this order: ``openai:MODEL@ADDRESS`` (a remote model), a path (a model folder, a run folder, a ``.gguf`` or
    ``.arpa`` file, word vectors as ``.bin``, ``.vec`` or ``.txt``), a run under ``runs/``, a name of the catalog
    (downloaded once). The folder of an adapter gives the model it was made for, with it.

    Args:
        name: what to load.
        device: "auto" (CUDA, else Apple's MPS, else the CPU), or "cpu", "cuda", "cuda:1", "mps".
        offline: never use the network; a catalog model must have been downloaded before.
        precision: of the weights on a CPU: "fp32", "fp16", "int8", and "int4" for models that write; None: as they are
            stored, and float32 where they are stored as floats. Floats become "int4" in seconds, each group of weights
            for itself; ``hanmo quantize`` takes minutes and loses far less.
        engine: "native" (C++ for CPUs), "torch", or "auto": native where it can compute the model on this machine.
        kv_cache: how the native engine keeps keys and values of texts: "fp32", "fp16", or "int8" (half the memory of
            "fp16", a little less exact); None: "fp32" where the weights are, else "fp16".
        draft: a smaller model with the same tokenizer, which guesses ahead; changes the speed and nothing else.

    Returns:
        what the model is: a :class:`~hanmo.inference.language_model.LanguageModel` (decoder, encoder-decoder,
        recurrent, n-gram), a :class:`~hanmo.inference.remote.RemoteModel`, a
        :class:`~hanmo.inference.encoder.TextEncoder` (encoders and networks with a task's head), a
        :class:`~hanmo.models.embeddings.WordVectors`, a :class:`~hanmo.models.linear.LinearClassifier` or a
        :class:`~hanmo.models.crf_tagger.CRFTagger`.

    Raises:
        ModelError: nothing of that name, or a model that is damaged or of an unknown kind.
        ResourceError: the device is not there, or a package that this kind of model needs.
        NetworkError: the download failed, or would be needed although ``offline``.

    >>> load("runs/my-texts").generate("从前")[0].text     # doctest: +SKIP
    """
    if str(name).lower().startswith(REMOTE):
        from hanmo.inference.remote import connect

        return connect(str(name), offline=offline)
    place = Place(choose_device(device), precision, engine, kv_cache)
    set_threads()
    folder = adapter_folder(str(name))
    if folder is not None:
        model: Any = load_adapted(folder, place, str(name), offline=offline)
    else:
        model = load_path(find(str(name), offline=offline), place, str(name))
    if kv_cache is not None and not hasattr(getattr(model, "network", None), "decoder"):
        raise UsageError(
            f"--kv-cache {kv_cache} is for decoders in the native engine, which this model is not",
            where=str(name),
            fix="leave the option out",
            zh=f"--kv-cache {kv_cache} 只用于本地推理引擎中的解码器，这个模型不是。请去掉该选项",
        )
    if draft is not None:
        if not hasattr(model, "engine"):
            raise UsageError(
                f"--draft {draft} is for models that write, which this one is not",
                where=str(name),
                fix="leave the option out",
                zh=f"--draft {draft} 只用于生成文本的模型，这个模型不是。请去掉该选项",
            )
        smaller = load(draft, device=device, offline=offline, engine=engine)
        model.engine.new_guesser = model.guesser_of(smaller)
    return model


def adapter_folder(name: str) -> Path | None:
    """The folder of an adapter that a name stands for, where it holds no model as well."""
    for path in (Path(name).expanduser(), RUNS / name):
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            return path
    return None


def base_of(name: str, *, offline: bool = False) -> str | None:
    """The name of the model that an adapter or a fine-tuned model was made from; None where nothing tells."""
    if name.lower().startswith(REMOTE):
        return None
    adapter = adapter_folder(name)
    if adapter is not None:
        return str(read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or "") or None
    folder = find(name, offline=offline)
    base = read_manifest(folder).get("base") if folder.is_dir() else None
    return str(base.get("name") or "") or None if isinstance(base, dict) else None


def load_adapted(folder: Path, place: Place, name: str, *, offline: bool) -> LanguageModel:
    """An adapter on the model it was made for.

    Raises:
        ModelError: that model is not here, or the adapter does not fit it.
        UsageError: it is a model that does not write.
    """
    base = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "")
    try:
        path = find(base, offline=offline)
    except ModelError:
        raise ModelError(
            f"this is an adapter for '{base}', and there is no such model here",
            where=str(folder),
            fix=f"put the model where the adapter names it, or give {folder.parent / MODEL}, which has it folded in",
            zh=f"这是 '{base}' 的适配器，但找不到该模型。请把模型放在所记录的位置，"
            f"或使用已合并它的 {folder.parent / MODEL}",
        ) from None
    model = load_path(path, place, name)
    if not isinstance(model, LanguageModel):
        raise UsageError(
            "adapters are read onto models that write; this one is for another kind",
            where=str(folder),
            fix=f"give {folder.parent / MODEL}, which has it folded in",
            zh=f"只有生成模型可以直接加载适配器。请使用已合并它的 {folder.parent / MODEL}",
        )
    model.adapter = model.add_adapter(folder)
    return model


def load_path(path: Path, place: Place, name: str) -> Any:
    """The model at a path."""
    if path.is_file():
        return load_file(path, place, name)
    kind = read_object(path / "config.json").get("model_type")
    loader = OWN_KINDS.get(str(kind))
    if loader is not None:
        return loader(path, place, name)
    if kind not in ARCHITECTURES:
        from hanmo.inference.foreign import load_foreign

        check_manifest(path)
        if refusal := place.refusal(f"{kind} is not one of Hanmo's own architectures"):
            raise refusal
        return with_tokenizer(load_foreign(path, place.device, name=name), path, name)
    model = load_native(path, place, name)
    if model is not None:
        return model
    dtype = torch.float32 if place.device.type == "cpu" else None
    return load_transformer(load_folder(path, dtype=dtype), path, place, name)


def load_language_model(name: str | Path, **options: Any) -> Any:
    """Load a model that writes: a LanguageModel or a RemoteModel; arguments and errors as :func:`load`.

    Raises:
        UsageError: the model is of another kind.
    """
    model = load(name, **options)
    if not hasattr(model, "generate"):
        kind = type(model).__name__
        raise UsageError(
            f"this model is a {kind} and writes no text",
            where=str(name),
            fix="give a language model (hanmo models lists what each one is for); word vectors: hanmo vectors score",
            zh=f"这个模型是 {kind}，不能生成文本。请换用语言模型（见 hanmo models）；词向量请用 hanmo vectors score",
        )
    return model


def load_file(path: Path, place: Place, name: str) -> Any:
    """A model that is one file, by its ending."""
    if path.suffix.lower() == ".gguf":
        return load_native(path, place, name) or load_transformer(load_gguf(path), path, place, name)
    if ARPA.search(path.name):
        from hanmo.models.arpa import read_arpa
        from hanmo.text.training import words_tokenizer

        model, words = read_arpa(path)
        return LanguageModel(model, words_tokenizer(words), name=name, prompt_prefix=[model.bos_id])
    from hanmo.models.embeddings import open_vectors

    return open_vectors(path)


def load_transformer(loaded: LoadedModel, path: Path, place: Place, name: str) -> Any:
    """A transformer: a language model if it writes, else a reader of texts."""
    config = loaded.config
    if writes(config):
        if config.encoder is None:
            return assemble(build_on(loaded, place.device), loaded, name=name, prefix=stored_prefix(path, loaded))
        from hanmo.text.wrapping import source_wrapping

        prefix, suffix, start_id = source_wrapping(loaded.tokenizer, loaded.generation)
        forced = loaded.generation.get("forced_bos_token_id")  # BART's summaries begin with a second one
        start_ids = [start_id] if forced is None else [start_id, forced]
        network = build_on(loaded, place.device)
        model = assemble(network, loaded, name=name, prefix=prefix, suffix=suffix, start_ids=start_ids)
        told = read_manifest(path).get("target_prefixes") if path.is_dir() else None
        if isinstance(told, dict):
            model.target_prefixes = {str(language): str(text) for language, text in told.items()}
        return model
    from hanmo.inference.encoder import TextEncoder

    network, precision = build_on(loaded, place.device), place.precision or "fp32"
    return TextEncoder.from_loaded(loaded, network, path, name=name, engine=place.engine, precision=precision)


def writes(config: TransformerConfig) -> bool:
    """Whether a network continues texts, or else reads them."""
    return config.lm and config.causal and config.head is None


def load_recurrent(path: Path, place: Place, name: str) -> Any:
    """A recurrent network: a language model, or an encoder with a head."""
    from hanmo.models.checkpoints import recurrent
    from hanmo.models.recurrent import RecurrentModel

    model, tokenizer = recurrent.load_recurrent(path)
    if isinstance(model, RecurrentModel):
        return LanguageModel(model.to(place.device), tokenizer, name=name, prompt_prefix=separator(tokenizer))
    from hanmo.inference.encoder import TextEncoder

    return TextEncoder(model.to(place.device), tokenizer, name=name)


def load_ngram(path: Path, place: Place, name: str) -> Any:  # noqa: ARG001 - n-grams live on the CPU
    """An n-gram model."""
    from hanmo.models.checkpoints import ngram

    model, tokenizer = ngram.load_ngram(path)
    return LanguageModel(model, tokenizer, name=name, prompt_prefix=separator(tokenizer))


def load_vectors(path: Path, place: Place, name: str) -> Any:  # noqa: ARG001 - one form for all kinds
    """Word vectors."""
    from hanmo.models.embeddings import WordVectors

    return WordVectors.load(path)


def load_linear(path: Path, place: Place, name: str) -> Any:  # noqa: ARG001 - one form for all kinds
    """A linear classifier."""
    from hanmo.models.linear import LinearClassifier

    return LinearClassifier.load(path)


def load_crf(path: Path, place: Place, name: str) -> Any:  # noqa: ARG001 - one form for all kinds
    """A CRF with feature templates."""
    from hanmo.models.crf_tagger import CRFTagger

    return CRFTagger.load(path)


OWN_KINDS: dict[str, Callable[[Path, Place, str], Any]] = {
    **dict.fromkeys(("rnn", "lstm", "gru"), load_recurrent),
    "ngram": load_ngram,
    "vectors": load_vectors,
    "linear": load_linear,
    "crf": load_crf,
}


def separator(tokenizer: Tokenizer) -> list[int]:
    """The token that a text begins after, as our own corpora have it."""
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    return [] if start is None else [start]


def with_tokenizer(network: Network, path: Path, name: str) -> LanguageModel:
    """A language model of a network that came without one of ours around it."""
    tokenizer = Tokenizer.load(path)
    raw, file = read_object(path / "config.json"), path / "generation_config.json"
    generation = {**raw, **(read_object(file) if file.exists() else {})}
    ends = known_ids(generation.get("eos_token_id"), network.vocab_size, str(path))
    prefix = separator(tokenizer) if expects_bos(path, tokenizer, tokenizer.bos_id) else []
    return LanguageModel(network, tokenizer, name=name, eos_ids=ends, prompt_prefix=prefix)


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
        if path.suffix.lower() == ".gguf" or ARPA.search(path.name) or VECTORS.search(path.name):
            return path
        raise ModelError(
            "this file is not a model",
            where=str(path),
            fix="give a model folder (with config.json), a .gguf or .arpa file, or word vectors (.bin, .vec, .txt)",
            zh="这个文件不是模型，请给出含 config.json 的模型文件夹、.gguf 或 .arpa 文件，或词向量（.bin、.vec、.txt）",
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
    if (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise ModelError(
            f"this is an adapter for '{base}', not a model",
            where=str(path),
            fix=f"give {path.parent / MODEL}, which has it folded in; hanmo generate takes the adapter, too",
            zh=f"这是 '{base}' 的适配器，不是完整模型。请使用已合并它的 {path.parent / MODEL}"
            "（若只是生成文本，可把适配器直接交给 hanmo generate）",
        )
    raise ModelError(
        "the folder holds no model",
        where=str(path),
        why=f"it has neither config.json, nor a folder '{MODEL}' with one, nor a .gguf file",
        fix="a run that was stopped early has no model yet: start it again, it goes on from its last checkpoint",
        zh=f"文件夹中没有模型（没有 config.json、'{MODEL}' 子文件夹或 .gguf 文件）。若训练中途停止，请重新运行以继续",
    )


def stored_prefix(path: Path, loaded: LoadedModel | LoadedParts) -> list[int]:
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
                    zh=f"prompt_prefix 须为 0 到 {size - 1} 的编号列表，而不是 {prefix!r}。请删除该项，或重新生成模型",
                )
            return prefix
    bos = loaded.generation.get("bos_token_id")
    return [bos] if loaded.generation.get("add_bos_token") and bos is not None else []


def load_native(path: Path, place: Place, name: str) -> LanguageModel | None:
    """A decoder in the native engine; None where torch has to compute it.

    A quantised folder, which nothing else reads, comes from here in any case: where torch has to compute it, with its
    weights as floats.

    Raises:
        UsageError: the user asked for the native engine.
        ModelError: the file or folder is damaged.
    """
    from hanmo.inference.native.folder import is_quantized

    quantized, reason = path.is_dir() and is_quantized(path), place.reason_against_native()
    if path.is_dir() and not quantized:
        config = read_config(read_object(path / "config.json"), path / "config.json")
        if not writes(config):
            return None  # the reader of texts has its own way to the native engine
        reason = reason or reason_against(config)
    if reason is None:
        from hanmo.inference.native.network import NativeNetwork
        from hanmo.inference.native.opening import open_native

        try:
            loaded = open_native(path, place.precision)
            if not isinstance(loaded, str):
                network = NativeNetwork(NativeDecoder(loaded.config, loaded.parts, cache=place.kv_cache))
                return assemble(network, loaded, name=name, prefix=stored_prefix(path, loaded))
        except ModelError as error:  # the engine knows sizes and numbers, not the file they came from
            if str(path) in error.where:
                raise
            fix = error.fix or COPY_AGAIN
            raise ModelError(error.what, where=str(path), why=error.why, fix=fix, zh=error.zh) from None
        reason = loaded
    if refusal := place.refusal(reason):
        raise refusal
    if quantized:
        from hanmo.inference.native.folder import open_quantized
        from hanmo.inference.native.unpacking import unpacked

        model = load_transformer(unpacked(open_quantized(path, mapped=True)), path, place, name)
        assert isinstance(model, LanguageModel)
        return model
    return None


def assemble(
    network: Network | Transformer,
    loaded: LoadedModel | LoadedParts,
    *,
    name: str,
    prefix: list[int],
    suffix: Sequence[int] = (),
    start_ids: Sequence[int] = (),
) -> LanguageModel:
    """A network that writes; ``suffix`` and ``start_ids`` as in :class:`LanguageModel`."""
    return LanguageModel(
        network,
        loaded.tokenizer,
        name=name,
        eos_ids=loaded.generation.get("eos_token_id") or [],
        prompt_prefix=prefix,
        prompt_suffix=suffix,
        start_ids=start_ids,
        forbidden_ids=loaded.generation.get("bad_words_ids") or [],
    )


def build_on(loaded: LoadedModel, device: torch.device) -> Transformer:
    """The network on its device: float32 on a CPU, the stored precision on an accelerator.

    The tensors read from disk are let go one by one, so that no weight is held in two precisions for long.
    """
    if device.type == "cpu":
        for key in list(loaded.state):
            loaded.state[key] = loaded.state[key].float()
    model = build(loaded.config, loaded.state, checked=loaded.checked).to(device)
    loaded.state.clear()
    return model
