"""The tokenizer inside a GGUF file, as a Hugging Face ``tokenizer.json``.

The Llama family has two kinds: byte-level BPE with merges (``gpt2``) and SentencePiece BPE with scores (``llama``). A
GGUF file names the rule that splits text before merging instead of containing it; the rules below are those that
llama.cpp applies under these names. An unknown name is refused: with a wrong rule the ids would be subtly different
from those the model was trained on, and nobody would notice.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from hanmo.language import pick
from hanmo.models.checkpoints.weights import refuse
from hanmo.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ORIGINAL = "tokenizer.huggingface.json"  # the whole tokenizer.json, under the key of the GGUF specification
MAX_TOKEN = 512  # characters; the longest tokens of known vocabularies have about 256
CONTROL_LIKE = re.compile(r"<\|[^<>|]+\|>")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (  # digits of a number are taken {digits} at a time
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{digits}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = CL100K.replace("{digits}", "{1,3}")
QWEN2 = CL100K.replace("{digits}", "")
SPLITS: dict[str, tuple[str, ...]] = {  # name in tokenizer.ggml.pre: patterns applied one after another
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais", "phi-2"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (QWEN2,)),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3")  # a piece that is a token is taken without merging
COMPOSED = ("qwen2", "deepseek-r1-qwen", "megrez")  # trained on NFC text


def read_tokenizer(path: Path, metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a file: the original ``tokenizer.json`` where it is inside, else what the metadata describes.

    Raises:
        ModelError: it is missing, contradicts itself, or is of a kind that cannot be rebuilt exactly.
    """
    original = metadata.get(ORIGINAL)
    if not isinstance(original, str) or not original:
        return build_tokenizer(path, metadata)
    tokens, _ = vocabulary(path, metadata)
    tokenizer = make(path, metadata, tokens, original)
    if tokenizer.vocab_size > len(tokens):
        refuse(path, f"'{ORIGINAL}' has {tokenizer.vocab_size} tokens, the file {len(tokens)}")
    return tokenizer


def build_tokenizer(path: Path, metadata: dict[str, Any]) -> Tokenizer:
    """Build the tokenizer that llama.cpp makes of the metadata.

    Raises:
        ModelError: as :func:`read_tokenizer`.
    """
    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": byte_level, "llama": sentencepiece}
    if kind not in builders:
        refuse(path, f"the tokenizer kind '{kind}' is not known", fix="known: " + ", ".join(builders))
    tokens, types = vocabulary(path, metadata)
    content = builders[kind](path, metadata, tokens, types)
    content["added_tokens"] = added_tokens(tokens, types, special_ids(path, metadata, len(tokens)))
    return make(path, metadata, tokens, json.dumps(content, ensure_ascii=False))


def vocabulary(path: Path, metadata: dict[str, Any]) -> tuple[list[str], list[int]]:
    """The tokens and their types, without the unused ones at the end that only fill up the embedding."""
    tokens = strings(path, metadata, "tokens")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        refuse(path, f"there are {len(tokens)} tokens but not as many token types")
    if max(map(len, tokens)) > MAX_TOKEN:
        refuse(path, f"a token has {max(map(len, tokens))} characters, at most {MAX_TOKEN} are read")
    if len(set(tokens)) != len(tokens):
        refuse(path, "a token occurs twice in the vocabulary")
    used = len(tokens)
    while used > 1 and types[used - 1] == UNUSED:
        used -= 1
    return tokens[:used], types[:used]


def make(path: Path, metadata: dict[str, Any], tokens: list[str], text: str) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json`` with the roles and the chat template of the file."""
    special = special_ids(path, metadata, len(tokens))
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer.from_json(
        text,
        **{f"{name}_token": tokens[special[name]] for name in ("bos", "eos", "pad") if name in special},
        chat_template=template if isinstance(template, str) and template else None,
        source=str(path),
    )


def strings(path: Path, metadata: dict[str, Any], key: str) -> list[str]:
    """A metadata array of strings."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        refuse(path, f"the metadata 'tokenizer.ggml.{key}' is missing or not a list of strings")
    return value


def special_ids(path: Path, metadata: dict[str, Any], size: int) -> dict[str, int]:
    """The ids of BOS, EOS, padding and the ends of a turn and of a message, where given."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "eot": "eot", "eom": "eom"}
    ids = {}
    for name, key in names.items():
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is None or value == 0xFFFFFFFF:  # -1 stands for none
            continue
        if type(value) is not int or not 0 <= value < size:
            refuse(path, f"the metadata '{key}_token_id' is {value!r}, the vocabulary has {size} tokens")
        ids[name] = value
    return ids


def added_tokens(tokens: list[str], types: list[int], special: dict[str, int]) -> list[dict[str, Any]]:
    """Tokens that are matched whole: control tokens (special), and user-defined ones, which are text.

    Converters have marked control tokens as user-defined; those are told by their form ``<|...|>`` or their role.
    """
    roles = set(special.values())
    added = []
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        control = kind == CONTROL or number in roles or (kind == USER_DEFINED and bool(CONTROL_LIKE.fullmatch(token)))
        if control or kind in (USER_DEFINED, UNKNOWN):
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            added.append({"id": number, "content": token, **flags, "special": control or kind == UNKNOWN})
    return added


def byte_level(path: Path, metadata: dict[str, Any], tokens: list[str], _types: list[int]) -> dict[str, Any]:
    """Byte-level BPE: the merges are in the file, the pattern is known by its name."""
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        name = "default"
        message = pick(
            f"{path}: the file does not say how its tokenizer splits text; llama.cpp's default is used",
            f"{path}：文件未说明分词前的切分规则，采用 llama.cpp 的默认规则",
        )
        print(message, file=sys.stderr)
    if name not in SPLITS:
        refuse(
            path,
            f"the pre-tokenizer '{name}' is not known",
            fix="known: " + ", ".join(SPLITS) + "; or use the Hugging Face folder of this model",
        )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [line.split(" ") for line in strings(path, metadata, "merges")]
    known = vocabulary.__contains__
    wrong = [
        pair for pair in merges if len(pair) != 2 or not (known(pair[0]) and known(pair[1]) and known("".join(pair)))
    ]
    if wrong:
        refuse(path, f"the merge {' '.join(wrong[0])[:80]!r} is not a pair of tokens that make a token")
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in SPLITS[name]
    ]
    bytes_as_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "normalizer": {"type": "NFC"} if name in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, bytes_as_letters]},
        "post_processor": None,
        "decoder": bytes_as_letters,
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "ignore_merges": name in WHOLE_WORDS_FIRST,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def sentencepiece(path: Path, metadata: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """SentencePiece BPE: spaces are written as ``▁``, characters without a token as bytes.

    Raises:
        ModelError: scores are missing, a byte has no token, or :func:`merges_of` cannot be exact.
    """
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(metadata["tokenizer.ggml.tokens"]):
        refuse(path, f"there are {len(tokens)} tokens but not as many scores")
    scores = scores[: len(tokens)]
    if not {f"<0x{byte:02X}>" for byte in range(256)} <= set(tokens):
        refuse(path, "the vocabulary lacks a token for some byte, so that not every text can be encoded")
    unknown = [token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN]
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    from_mark = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [from_mark, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefix else [])]
    normalizers = [*([{"type": "Prepend", "prepend": "▁"}] if prefix else []), to_mark]
    return {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": unknown[0] if unknown else None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges_of(path, tokens, types, scores),
        },
    }


def merges_of(path: Path, tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """The merges that a scored vocabulary implies, best first.

    SentencePiece joins the neighbours whose union has the highest score, so every split of a token into two tokens is a
    merge of that token's rank. Two tokens of one score would be told apart by their place in the text, which a list of
    merges cannot express: such a vocabulary is refused. Only normal tokens take part, so that the spelling of a control
    or byte token in a text can never become that token.
    """
    normal = {token: score for token, kind, score in zip(tokens, types, scores, strict=True) if kind == NORMAL}
    ranked: list[tuple[float, str]] = []
    splits: dict[str, list[list[str]]] = {}
    for token, score in normal.items():
        cuts = [[token[:i], token[i:]] for i in range(1, len(token)) if token[:i] in normal and token[i:] in normal]
        if cuts:
            splits[token] = cuts
            ranked.append((-score, token))
    if len({score for score, _ in ranked}) != len(ranked):
        refuse(path, "tokens share a score, so the order of merges is not certain", fix="use the Hugging Face folder")
    return [pair for _, token in sorted(ranked) for pair in splits[token]]
