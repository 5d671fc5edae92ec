"""A tokenizer as the metadata of a GGUF file.

llama.cpp encodes text with rules of its own, which a file only names. Three kinds of tokenizers can be expressed:

- byte-level BPE (``gpt2``): merges, and the name of the rule that cuts text before merging. A rule that llama.cpp does
  not know is replaced by the nearest one it does know, and the user is told how many tokens of sample texts change;
- SentencePiece BPE with byte fallback (``llama``): each token gets a score, from the rank of its merges;
- single characters, written as byte-level BPE whose merges join the bytes of one character and nothing else.

Where the named rule is not exactly the tokenizer's own, the whole ``tokenizer.json`` goes into the file as well, under
the key that the GGUF specification has for it. Hanmo reads it from there, so its own ids never change.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from hanmo.errors import ModelError
from hanmo.language import pick
from hanmo.models.checkpoints.gguf_tokenizer import (
    BYTE,
    COMPOSED,
    CONTROL,
    GPT2,
    NORMAL,
    ORIGINAL,
    SPLITS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS_FIRST,
    build_tokenizer,
)
from hanmo.settings import notice
from hanmo.text.fast import CHARACTER_OF_BYTE, SINGLE_DIGITS, merge_pairs, steps
from hanmo.text.report import SAMPLES
from hanmo.text.tokenizer import BYTE_TOKEN, Tokenizer

NEAREST = ("qwen2", "smollm", "gpt-2", "dbrx", "default")  # one name of each rule, tried when none is exact


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int, generation: dict[str, Any]) -> dict[str, Any]:
    """The ``tokenizer.*`` entries of a GGUF file; a notice says so where llama.cpp will encode some text differently.

    Args:
        tokenizer: byte-level or SentencePiece BPE, or single characters.
        vocab_size: rows of the embedding; ids without a token get one that nothing can produce.
        generation: ``bos_token_id``, ``eos_token_id`` (a list), ``pad_token_id`` and ``add_bos_token``.

    Raises:
        ModelError: a tokenizer of another kind.
    """
    definition = json.loads(tokenizer.to_json())
    model = definition["model"]
    added = {token["id"]: token for token in definition.get("added_tokens") or []}
    names = {**vocabulary_of(model), **{index: token["content"] for index, token in added.items()}}
    fallback = bool(model.get("byte_fallback")) and "<0x00>" in model["vocab"]
    kind = kind_of(definition, names, fallback)
    if kind == "characters":
        names = {index: name if index in added else byte_spelling(name) for index, name in names.items()}

    def type_of(index: int) -> int:
        if index not in names:
            return UNUSED
        if index in added:
            unknown = fallback and names[index] == model.get("unk_token")
            return UNKNOWN if unknown else CONTROL if added[index]["special"] else USER_DEFINED
        return BYTE if fallback and BYTE_TOKEN.fullmatch(names[index]) else NORMAL

    exact = None
    entries: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if kind == "sentencepiece" else "gpt2",
        "tokenizer.ggml.tokens": [names.get(index, f"[PAD{index}]") for index in range(vocab_size)],
        "tokenizer.ggml.token_type": [type_of(index) for index in range(vocab_size)],
        **special_entries(tokenizer, generation, model, names),
    }
    if kind == "sentencepiece":
        entries["tokenizer.ggml.pre"] = "default"
        entries["tokenizer.ggml.scores"] = scores_of(model, vocab_size)
        entries["tokenizer.ggml.add_space_prefix"] = tokenizer.adds_prefix_space
    elif kind == "characters":
        entries["tokenizer.ggml.pre"] = "gpt-2"
        entries["tokenizer.ggml.merges"] = character_merges(model["vocab"])
    else:
        entries["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merge_pairs(model)]
        exact = exact_rule(definition)
        entries["tokenizer.ggml.pre"] = exact or nearest_rule(tokenizer, entries)
    if tokenizer.chat_template:
        entries["tokenizer.chat_template"] = tokenizer.chat_template
    if kind == "characters":
        entries[ORIGINAL] = tokenizer.to_json()
        unknown = model.get("unk_token")
        notice(
            pick(
                f"llama.cpp leaves characters outside the vocabulary out, where Hanmo reads {unknown}",
                f"llama.cpp 会忽略词表之外的字符，而 Hanmo 将其读作 {unknown}",
            )
        )
    elif exact is None and any(shares := differences(tokenizer, entries)):
        entries[ORIGINAL] = tokenizer.to_json()
        report_differences(entries, shares)
    return entries


def kind_of(definition: dict[str, Any], names: dict[int, str], fallback: bool) -> str:
    """``bytes``, ``sentencepiece`` or ``characters``.

    Raises:
        ModelError: llama.cpp has nothing like it.
    """
    model = definition["model"]
    if model["type"] == "BPE" and fallback:
        return "sentencepiece"
    if model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in steps(definition.get("pre_tokenizer"))):
        return "bytes"
    split = definition.get("pre_tokenizer") or {}
    plain = split.get("behavior") == "Isolated" and not definition.get("normalizer")
    control = {model.get("unk_token"), *(token["content"] for token in definition.get("added_tokens") or [])}
    if model["type"] == "WordLevel" and plain and all(len(name) == 1 for name in {*names.values()} - control):
        return "characters"
    raise ModelError(
        f"a tokenizer of the kind {model['type']} cannot be written to a GGUF file",
        why="llama.cpp has no encoder that gives its ids",
        fix="byte-level BPE, SentencePiece BPE and single characters can be written; "
        "or export a folder for transformers",
        zh=f"{model['type']} 类分词器无法写入 GGUF（llama.cpp 没有对应的编码方式）。请改为导出文件夹",
    )


def vocabulary_of(model: dict[str, Any]) -> dict[int, str]:
    """The tokens of a model by their ids."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return {index: token for token, index in vocabulary.items()}
    return {index: token for index, (token, _) in enumerate(vocabulary)}  # Unigram: pairs of token and score


def special_entries(
    tokenizer: Tokenizer, generation: dict[str, Any], model: dict[str, Any], names: dict[int, str]
) -> dict[str, Any]:
    """The ids with a role. The first end token is the tokenizer's own; up to two more are ends of turn and message."""
    ends = list(generation.get("eos_token_id") or [])
    if tokenizer.eos_id in ends or not ends:
        ends = [*([] if tokenizer.eos_id is None else [tokenizer.eos_id]), *ends]
    roles = dict(zip(("eos", "eot", "eom"), dict.fromkeys(ends), strict=False))
    roles["bos"] = generation.get("bos_token_id", tokenizer.bos_id)
    roles["padding"] = generation.get("pad_token_id", tokenizer.pad_id)
    roles["unknown"] = next((index for index, name in names.items() if name == model.get("unk_token")), None)
    entries: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": id for name, id in roles.items() if id is not None}
    add_bos = bool(generation.get("add_bos_token")) and roles["bos"] is not None
    return {**entries, "tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.add_eos_token": False}


# The rule that cuts text ---------------------------------------------------------------------------------------------


def exact_rule(definition: dict[str, Any]) -> str | None:
    """llama.cpp's name for what a ``tokenizer.json`` does before merging; None where it has none."""
    patterns: list[str] = []
    for step in steps(definition.get("pre_tokenizer")):
        if step["type"] == "Digits" and step.get("individual_digits"):
            patterns.append(SINGLE_DIGITS)
        elif step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(str(step["pattern"].get("Regex")))
        elif step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [GPT2] if step.get("use_regex", True) else []
        else:
            return None
    whole_words = bool(definition["model"].get("ignore_merges"))
    normalizers = [step["type"] for step in steps(definition.get("normalizer"))]
    for name, known in SPLITS.items():
        composed = ["NFC"] if name in COMPOSED else []
        if (known, name in WHOLE_WORDS_FIRST, composed) == (tuple(patterns), whole_words, normalizers):
            return name
    return None


def nearest_rule(tokenizer: Tokenizer, entries: dict[str, Any]) -> str:
    """The known rule that changes the fewest tokens of the samples."""

    def changed(name: str) -> float:
        return sum(differences(tokenizer, {**entries, "tokenizer.ggml.pre": name}))

    return min(NEAREST, key=changed)


def differences(tokenizer: Tokenizer, entries: dict[str, Any]) -> list[float]:
    """For each sample text, the share of its tokens that llama.cpp will not make."""
    rebuilt = build_tokenizer(Path("GGUF"), entries)
    shares = []
    for text in SAMPLES.values():
        own, other = spans(tokenizer, text), spans(rebuilt, text)
        shares.append(len(own - other) / len(own))
    return shares


def spans(tokenizer: Tokenizer, text: str) -> set[tuple[int, int, int]]:
    """The tokens of a text with the bytes they begin and end at."""
    ids = tokenizer.encode(text)
    stops = list(itertools.accumulate(len(tokenizer.token_bytes(index)) for index in ids))
    return set(zip([0, *stops], stops, ids, strict=False))


def report_differences(entries: dict[str, Any], shares: list[float]) -> None:
    """Tell the user what llama.cpp will do differently."""
    parts = ", ".join(f"{name} {share:.1%}" for name, share in zip(SAMPLES, shares, strict=True))
    rule = entries["tokenizer.ggml.pre"]
    notice(
        pick(
            f"llama.cpp cannot cut text exactly as this tokenizer does; with its nearest rule ('{rule}') it makes "
            f"other tokens than the model was trained on for part of a text (of samples: {parts}). Hanmo reads the "
            "file without such differences",
            f"llama.cpp 无法完全照此分词器切分文本；采用最接近的规则（'{rule}'）后，部分词元与训练时不同"
            f"（样本：{parts}）。Hanmo 读取该文件时没有差异",
        )
    )


# SentencePiece and characters ----------------------------------------------------------------------------------------


def scores_of(model: dict[str, Any], vocab_size: int) -> list[float]:
    """A score for each id: minus the rank of the first merge that makes the token, so that best is joined first."""
    scores = [0.0] * vocab_size
    for rank, (left, right) in enumerate(merge_pairs(model), 1):
        index = model["vocab"].get(left + right)
        if index is not None and scores[index] == 0.0:
            scores[index] = -float(rank)
    return scores


def byte_spelling(text: str) -> str:
    """The UTF-8 bytes of a text in the letters of a byte-level vocabulary."""
    return "".join(CHARACTER_OF_BYTE[byte] for byte in text.encode())


def character_merges(vocabulary: dict[str, int]) -> list[str]:
    """Merges that join the bytes of each single character, first to last.

    The left part always begins with the first byte of a character and the right part is one of its later bytes, so no
    merge ever reaches into the next character.
    """
    merges: dict[str, None] = {}
    for character in vocabulary:
        if len(character) == 1:
            spelling = byte_spelling(character)
            merges.update({f"{spelling[:at]} {spelling[at]}": None for at in range(1, len(spelling))})
    return list(merges)
