"""What a ``tokenizer.json`` says, as plain data, and what is made of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import tokenizers

from hanmo.errors import ModelError
from hanmo.text.fast import merge_pairs


def untypeable(token_id: int) -> str:
    """A name for a control token that stands in no text."""
    return f"\U0010fffd{token_id}\U0010fffd"


def without_tables(definition: dict[str, Any]) -> dict[str, Any]:
    """A definition without vocabulary and merges, which are all but a thousandth of it."""
    model = definition.get("model")
    if not isinstance(model, dict):
        return definition
    return {**definition, "model": {key: value for key, value in model.items() if key not in ("vocab", "merges")}}


def without_control_tokens(definition: dict[str, Any], control: dict[str, int]) -> dict[str, Any]:
    """A definition whose control tokens no text can reach; all other tokens keep their ids.

    They leave the added tokens. In the vocabulary of the model, where a piece of text could match them as well, they
    are renamed to something that cannot be typed; merges that would make them go.
    """
    model = dict(definition["model"])
    unknown = model.get("unk_token")
    hidden = {token for token in control if token != unknown}

    def rename(token: str) -> str:
        return untypeable(control[token]) if token in hidden else token

    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {rename(token): index for token, index in vocabulary.items()}
    else:  # Unigram: pairs of token and score
        model["vocab"] = [[rename(token), score] for token, score in vocabulary]
    if "merges" in model:
        model["merges"] = [list(pair) for pair in merge_pairs(model) if not {*pair, "".join(pair)} & hidden]
    kept = [token for token in definition.get("added_tokens") or [] if token["content"] not in control]
    other = {key: definition.get(key) for key in ("version", "normalizer", "pre_tokenizer", "decoder")}
    return {**other, "added_tokens": kept, "model": model, "truncation": None, "padding": None, "post_processor": None}


def build(text: str, source: str) -> tokenizers.Tokenizer:
    """A ``tokenizers`` object without truncation and padding.

    Raises:
        ModelError: the text is JSON, but not a tokenizer.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # the library raises plain Exception with the place, and panics on a damaged table
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        place = re.search(r"at line (\d+)", str(error))
        raise malformed(f"{source}:{place[1]}" if place else source, str(error)[:300]) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def malformed(where: str, detail: str) -> ModelError:
    """The error for a file that is JSON but not a tokenizer."""
    return ModelError(
        f"this is not a tokenizer: {detail}",
        where=where,
        fix="copy the file again from where it came",
        zh=f"这不是可用的分词器文件（{detail}）。请重新复制该文件",
    )


def parse_object(text: str | bytes, source: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ModelError: it is not JSON (with the line) or not an object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(
            f"not valid JSON: {error.msg}",
            where=f"{source}:{error.lineno}",
            why="the file is truncated or damaged",
            fix="copy the file again from where it came",
            zh=f"不是有效的 JSON（{error.msg}），文件可能被截断。请重新复制该文件",
        ) from None
    except RecursionError:
        raise malformed(source, "it is nested too deeply") from None
    if not isinstance(value, dict):
        raise malformed(source, "it is not a JSON object")
    return value


def read_text(path: Path) -> str:
    """Read a UTF-8 file of a tokenizer folder.

    Raises:
        ModelError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ModelError("not valid UTF-8", where=str(path), zh="不是有效的 UTF-8") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no such file."""
    return parse_object(read_text(path), str(path)) if path.is_file() else {}


def token_text(value: Any) -> str | None:
    """A token as configuration files write it: a string, or an object with ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def chat_template_of(value: Any) -> str | None:
    """The chat template in ``tokenizer_config.json``: a string, or a list of named ones with a ``default``."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) and value else None
