"""What one model is, told by its headers and configurations alone: never by its weights, and never with an error.

A damaged model is described with what is wrong with it. Nothing of torch is imported unless the file is GGUF, so that a
list of many models comes at once.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hanmo import folder as folders
from hanmo.errors import HanmoError, ModelError

MAX_JSON = 64 << 20  # bytes of a configuration; those of large tokenizers have about 10 MB
MAX_HEADER = 8 << 20  # bytes of a safetensors header; a thousand layers take about 1 MB
MAX_CARD = 64 << 10  # bytes of a model card that are looked at
MAX_ARPA_LINES = 1000
OWN_KINDS = {  # our own model types: what they are, and what they are for
    "rnn": ("recurrent", ("generate",)),
    "lstm": ("recurrent", ("generate",)),
    "gru": ("recurrent", ("generate",)),
    "ngram": ("n-gram", ("generate",)),
    "vectors": ("vectors", ("similarity",)),
    "linear": ("linear", ("classify",)),
    "crf": ("crf", ("tag",)),
}
HEAD_TASKS = {"sequence-classification": "classify", "token-classification": "tag", "span-extraction": "answer"}
CLASS_TASKS = (  # the ends of the class names in a configuration's ``architectures``
    ("ForCausalLM", "generate"),
    ("LMHeadModel", "generate"),
    ("ForMaskedLM", "fill"),
    ("ForSequenceClassification", "classify"),
    ("ForTokenClassification", "tag"),
    ("ForQuestionAnswering", "answer"),
    ("MarianMTModel", "translate"),
    ("ForConditionalGeneration", "rewrite"),
    ("Model", "embed"),
)
DETAILS = {  # keys of configurations, under one name for all architectures
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "size"),
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings", "n_positions", "n_ctx", "context_length"),
    "precision": ("torch_dtype", "dtype"),
    "order": ("order",),
    "method": ("method",),
    "labels": ("labels",),
}


@dataclass
class Listed:
    """A model as it is listed.

    Attributes:
        name: what ``hanmo.load`` takes: a name of the catalogue, a run, or a path.
        place: "catalog", "run", "folder" or "file".
        path: where it lies; None for a model of the catalogue that has not been fetched.
        kind: "transformer", "recurrent", "n-gram", "vectors", "linear", "crf"; empty where it cannot be told.
        architecture: the ``model_type`` of its configuration.
        format: "safetensors", "gguf", "arpa"; empty where there are no weights.
        parameters: numbers that were learnt; for an ARPA file its n-grams. None where that cannot be told.
        size: bytes on the disk, or to download.
        licence, languages, tasks: empty where nothing says so.
        problem: what is wrong with it; such a model may not load.
        details: what else its configuration and manifest say.
    """

    name: str
    place: str
    path: str | None = None
    kind: str = ""
    architecture: str = ""
    format: str = ""
    parameters: int | None = None
    size: int | None = None
    licence: str = ""
    languages: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    problem: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def inspect(path: Path, *, name: str | None = None, place: str | None = None) -> Listed:
    """Everything that headers and configurations tell about a model folder or file; never an error."""
    listed = Listed(name or str(path), place or ("file" if path.is_file() else "folder"), str(path))
    try:
        if path.is_dir():
            read_folder(path, listed)
        elif path.suffix.lower() == ".gguf":
            read_gguf(path, listed)
        elif path.name.lower().endswith((".arpa", ".arpa.gz")):
            read_arpa(path, listed)
        else:
            raise ModelError("this file is not a model")
    except HanmoError as error:
        listed.problem = error.what
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        listed.problem = f"it cannot be read ({type(error).__name__}: {str(error)[:100]})"
    return listed


def read_folder(folder: Path, listed: Listed) -> None:
    """Fill in what a model folder tells: its configuration, its card, its manifest, the headers of its weights."""
    listed.size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    config = read_small_json(folder / "config.json")
    kind = config.get("model_type")
    listed.architecture = kind if isinstance(kind, str) else ""
    listed.kind, listed.tasks = kind_and_tasks(folder, config)
    for key, names in DETAILS.items():
        value = next((config[name] for name in names if isinstance(config.get(name), int | float | str | list)), None)
        if value is not None:
            listed.details[key] = value
    read_card(folder, listed)
    manifest = read_small_json(folder / folders.MANIFEST) if (folder / folders.MANIFEST).exists() else {}
    read_provenance(manifest, listed)
    listed.problem = manifest_problem(folder)
    counts = [count_parameters(path) for path in weight_files(folder)]
    listed.format = "safetensors"
    if not config.get("quantization_config"):  # packed weights: the numbers of a header are not parameters
        listed.parameters = sum(counts)


def kind_and_tasks(folder: Path, config: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """What a model is and what it is for, from its configuration.

    >>> config = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "num_attention_heads": 2}
    >>> kind_and_tasks(Path("none"), config)
    ('transformer', ('fill', 'embed'))
    """
    kind = config.get("model_type")
    head = config.get("head")
    if kind in OWN_KINDS:
        name, tasks = OWN_KINDS[kind]
        task = HEAD_TASKS.get(str(head.get("task"))) if isinstance(head, dict) else None
        return name, (task,) if task else tasks
    if (folder / "modules.json").is_file():  # a sentence encoder
        return "transformer", ("embed",)
    classes = config.get("architectures")
    written = str(classes[0]) if isinstance(classes, list) and classes else ""
    task = next((task for ending, task in CLASS_TASKS if written.endswith(ending)), None)
    known = "transformer" if any(name in config for name in DETAILS["num_heads"]) else ""
    if task == "generate" and has_chat_template(folder):
        return known, ("generate", "chat")
    return known, ("fill", "embed") if task == "fill" else (task,) if task else ()


def has_chat_template(folder: Path) -> bool:
    """Whether a model folder says how conversations are written."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_small_json(path).get("chat_template"))


def read_card(folder: Path, listed: Listed) -> None:
    """Take licence and languages from the head of ``README.md``, where model cards have them."""
    path = folder / "README.md"
    if not path.is_file():
        return
    with path.open("rb") as stream:
        text = stream.read(MAX_CARD).decode("utf-8", "replace").replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return
    head = text[4:].partition("\n---")[0]
    licence = card_values(head, "license")
    listed.licence = licence[0] if licence and licence[0] != "unknown" else ""
    listed.languages = tuple(code for code in card_values(head, "language") if re.fullmatch(r"[A-Za-z-]{2,20}", code))


def card_values(head: str, key: str) -> list[str]:
    """The value of a key, or the items of its list, at the top level of a model card's head.

    Two keys do not need a YAML parser, whose time grows with the square of what a hostile card may hold.

    >>> card_values("license: mit\\nlanguage:\\n- zh\\n- 'no'", "language")
    ['zh', 'no']
    >>> card_values("language: [zh, en]", "language")
    ['zh', 'en']
    """
    match = re.search(rf"^{key}:(.*)$((?:\n[ \t]*-[^\n]*)*)", head, re.MULTILINE)
    if match is None:
        return []
    items = match[1].strip().strip("[]").split(",") + [line.strip()[1:] for line in match[2].split("\n")]
    return [text[:80] for item in items[:200] if (text := item.strip().strip("'\""))]


def read_provenance(manifest: dict[str, Any], listed: Listed) -> None:
    """Take what ``hanmo.json`` says of licence, languages, source and measurements."""
    if isinstance(manifest.get("license"), str):
        listed.licence = manifest["license"][:80]
    listed.languages = as_names(manifest.get("languages")) or listed.languages
    for key in ("source", "metrics", "hanmo"):
        if manifest.get(key):
            listed.details[key] = manifest[key]


def as_names(value: Any) -> tuple[str, ...]:
    """One or several language codes as a tuple.

    >>> as_names("en"), as_names(["zh", "en", 5]), as_names(None)
    (('en',), ('zh', 'en'), ())
    """
    items = value if isinstance(value, list) else [value]
    return tuple(item[:20] for item in items[:200] if isinstance(item, str))


def manifest_problem(folder: Path) -> str:
    """What the manifest says is wrong with the sizes of a folder's files; empty where nothing is, or without one."""
    try:
        folders.verify(folder, hashes=False)
    except ModelError as error:
        return f"{Path(error.where).name}: {error.what}"
    return ""


def read_small_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that is a configuration and not something huge.

    Raises:
        ModelError: it is missing, too large, damaged, or not an object.
    """
    if path.is_file() and path.stat().st_size > MAX_JSON:
        raise ModelError(f"{path.name} has {path.stat().st_size} bytes, more than any configuration")
    try:
        value = folders.read_json(path)
    except ModelError as error:
        raise ModelError(f"{path.name}: {error.what}", where=error.where) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is not a JSON object", where=str(path))
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder.

    Raises:
        ModelError: there are none, or an index names a file that is not there.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = read_small_json(index).get("weight_map")
        names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ModelError(f"the weight file {name[:80]} is missing")
        if names:
            return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    if any(path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl") for path in folder.iterdir()):
        raise ModelError("its weights are a Python pickle, which is not read")
    raise ModelError("it has no weights")


def count_parameters(path: Path) -> int:
    """The numbers of floating point in a safetensors file, from its header.

    More lenient than the loader's reader, because what cannot be loaded is listed too; it also needs no torch.

    Raises:
        ModelError: the header is damaged, or the file is shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelError(f"{path.name} is truncated, or not a safetensors file")
        if length > MAX_HEADER:
            raise ModelError(f"{path.name} has a header of {length} bytes, more than any model needs")
        raw = stream.read(length)
    try:
        header = json.loads(raw.decode("utf-8"))
        header.pop("__metadata__", None)
        tensors = [(entry["dtype"], entry["shape"], entry["data_offsets"][1]) for entry in header.values()]
        sound = all(
            isinstance(dtype, str) and all(type(number) is int and 0 <= number < 1 << 50 for number in [*shape, stop])
            for dtype, shape, stop in tensors
        )
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError):
        sound = False
    if not sound:
        raise ModelError(f"{path.name} has a damaged header")
    end = 8 + length + max((stop for _, _, stop in tensors), default=0)
    if end != size:
        raise ModelError(f"{path.name} has {size} bytes, its header says {end}: it is truncated or altered")
    return sum(math.prod(shape) for dtype, shape, _ in tensors if dtype.startswith(("F", "BF")))


def read_gguf(path: Path, listed: Listed) -> None:
    """Fill in what the header of a GGUF file tells."""
    from hanmo.models.checkpoints.gguf_header import TENSOR_TYPES, read_gguf_header  # imports torch

    listed.format, listed.size = "gguf", path.stat().st_size
    header = read_gguf_header(path)
    metadata = header.metadata
    kind = metadata.get("general.architecture")
    listed.kind, listed.architecture = "transformer", kind if isinstance(kind, str) else ""
    listed.parameters = sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    listed.tasks = ("generate", "chat") if metadata.get("tokenizer.chat_template") else ("generate",)
    licence = metadata.get("general.license")
    listed.licence = licence[:80] if isinstance(licence, str) else ""
    listed.languages = as_names(metadata.get("general.languages"))
    names = {"hidden_size": "embedding_length", "num_layers": "block_count", "num_heads": "attention.head_count"}
    for key, name in {**names, "context_length": "context_length"}.items():
        if isinstance(metadata.get(f"{kind}.{name}"), int):
            listed.details[key] = metadata[f"{kind}.{name}"]
    bytes_of: dict[str, int] = {}
    for tensor in header.tensors.values():
        stored = TENSOR_TYPES[tensor.type][0]
        bytes_of[stored] = bytes_of.get(stored, 0) + tensor.num_bytes
    listed.details["precision"] = max(bytes_of, key=lambda name: bytes_of[name], default="")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        listed.details["vocab_size"] = len(tokens)


def read_arpa(path: Path, listed: Listed) -> None:
    """Fill in what the head of an ARPA file tells: how many n-grams of each order it holds."""
    listed.format, listed.size = "arpa", path.stat().st_size
    listed.kind, listed.architecture, listed.tasks = "n-gram", "ngram", ("generate",)
    counts: list[int] = []
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        begun = False
        for _ in range(MAX_ARPA_LINES):
            line = stream.readline(1000).strip()
            if line == b"\\data\\":
                begun = True
            elif begun and line.startswith(b"ngram "):
                order, _, count = line[6:].partition(b"=")
                if order.strip() != str(len(counts) + 1).encode() or not count.strip().isdigit() or len(count) > 18:
                    raise ModelError(f"its head is damaged: {line[:60].decode('utf-8', 'replace')}")
                counts.append(int(count))
            elif begun and (line or not counts):
                break
    if not counts:
        raise ModelError("it does not begin like an ARPA file: there are no counts after \\data\\")
    listed.parameters = sum(counts)
    listed.details |= {"order": len(counts), "ngrams": counts, "vocab_size": counts[0]}
