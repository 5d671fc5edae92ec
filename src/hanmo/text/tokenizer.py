"""Text to token ids and back, for tokenizers we train and for any Hugging Face ``tokenizer.json``.

Three promises hold for every tokenizer, whoever made it:

- a control token can only come from ``special=True``; the same characters in ordinary text stay text;
- nothing is added: no BOS, no EOS, whatever the file's post-processor says;
- :meth:`Tokenizer.encode_batch` and :meth:`Tokenizer.encode_documents` give the ids of :meth:`Tokenizer.encode`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from hanmo.errors import DataError, ModelError
from hanmo.folder import write_json
from hanmo.settings import wanted_threads
from hanmo.text.definitions import (
    build,
    chat_template_of,
    malformed,
    parse_object,
    read_object,
    read_text,
    token_text,
    untypeable,
    without_control_tokens,
    without_tables,
)
from hanmo.text.fast import (
    BYTE_OF_CHARACTER,
    JOIN_CHARACTERS,
    BpeEncoder,
    CharacterEncoder,
    IdArray,
    Unsuitable,
    fast_encoder,
    steps,
)

FAST_FROM = 20  # characters of text for each token of the vocabulary, from which on the fast encoder pays: making it
# for a vocabulary of 50,000 takes 0.6 s and 80 MB, which a chat would wait for and never win back
WORD_SPACES = "[ \\t\\n\\r\\f\\v\u3000]+"  # between the words of a word tokenizer
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Encode text as ids in ``range(vocab_size)`` and decode ids to text.

    Make one with :meth:`load`, :meth:`from_json`, :func:`hanmo.text.training.train_bpe` or
    :func:`hanmo.text.training.train_char`.

    Attributes:
        vocab_size: one more than the largest id.
        bos_id, eos_id, pad_id: ids of the control tokens for begin, end and padding, or None.
        cls_id, sep_id, mask_id: those of an encoder: what stands before a text, after it, and for a hidden token.
        special_tokens: every control token and its id. These ids never come from ordinary text.
        chat_template: the Jinja source of the chat template, or None.
        adds_prefix_space: a SentencePiece-style tokenizer that puts a space before the text, or a word tokenizer, which
            puts one before every word; ``decode`` removes the first.
        is_byte_level: the tokens are made of bytes, and a space belongs to the word after it.
        is_word_level: the tokens are words between spaces, as :func:`hanmo.text.training.train_words` makes them.

    >>> from hanmo.text.training import train_char
    >>> tokenizer = train_char(["床前明月光"])
    >>> tokenizer.decode(tokenizer.encode("明月"))
    '明月'
    """

    def __init__(
        self,
        text: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        cls_token: str | None = None,
        sep_token: str | None = None,
        mask_token: str | None = None,
        chat_template: str | None = None,
        source: str = "tokenizer.json",
    ) -> None:
        self._definition = without_tables(parse_object(text, source))
        self._full = build(text, source)
        self._json, self._source = text.encode(), source  # half the memory of a text with letters like Ġ
        try:
            added = list(self._definition.get("added_tokens") or [])
            # Added tokens made of spaces only (GPT-NeoX has them) are ordinary text; all others are markup.
            control = [token for token in added if token["special"] or token["content"].strip()]
            self.special_tokens: dict[str, int] = {token["content"]: token["id"] for token in control}
            self._hidden = {token["id"] for token in control if token["special"]}
            kind = self._definition["model"]["type"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise malformed(source, f"{type(error).__name__} {error}") from None
        vocabulary: dict[str, int] = self._full.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise malformed(source, "the vocabulary is empty")
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id, self.eos_id, self.pad_id = (
            vocabulary.get(token) if token else None for token in (bos_token, eos_token, pad_token)
        )
        # Files of BERT's first years name none of their control tokens anywhere.
        self.cls_id = self._control_id(cls_token, "[CLS]")
        self.sep_id = self._control_id(sep_token, "[SEP]")
        self.mask_id = self._control_id(mask_token, "[MASK]", "<mask>")
        self.chat_template = chat_template
        self._encoded = 0  # characters, in groups
        decoders = steps(self._definition.get("decoder"))
        self._decoders = {step["type"] for step in decoders}
        self.is_byte_level = "ByteLevel" in self._decoders
        self.adds_prefix_space = any(
            (step["type"] == "Strip" and step.get("content") == " " and step.get("start"))
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in decoders
        )
        chain = steps(self._definition.get("pre_tokenizer"))
        self.is_word_level = (
            kind == "WordLevel"
            and [step.get("pattern") for step in chain] == [{"Regex": WORD_SPACES}]
            and not self._decoders
        )
        self.adds_prefix_space |= self.is_word_level

    # -- reading and writing -------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read ``tokenizer.json`` (the file, or the folder that has it) with the settings that lie beside it.

        BOS, EOS and padding come from ``tokenizer_config.json``, else ``special_tokens_map.json``; the chat template
        from ``chat_template.jinja``, else from ``tokenizer_config.json``.

        Raises:
            ModelError: a file is missing, is not JSON (with its line) or is not a tokenizer.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ModelError(
                "there is no tokenizer here",
                where=str(file),
                fix="give a folder with a tokenizer.json, or train one with: hanmo tokenizer",
                zh="这里没有 tokenizer.json。请给出包含它的文件夹，或用 hanmo tokenizer 训练一个",
            )
        folder = file.parent
        config = read_object(folder / "tokenizer_config.json")
        names = {
            **read_object(folder / "special_tokens_map.json"),
            **{k: v for k, v in config.items() if v is not None},
        }
        template_file = folder / "chat_template.jinja"
        template = (
            read_text(template_file) if template_file.is_file() else chat_template_of(config.get("chat_template"))
        )
        return cls(
            read_text(file),
            bos_token=token_text(names.get("bos_token")),
            eos_token=token_text(names.get("eos_token")),
            pad_token=token_text(names.get("pad_token")),
            cls_token=token_text(names.get("cls_token")),
            sep_token=token_text(names.get("sep_token")),
            mask_token=token_text(names.get("mask_token")),
            chat_template=template,
            source=str(file),
        )

    @classmethod
    def from_json(
        cls,
        text: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        cls_token: str | None = None,
        sep_token: str | None = None,
        mask_token: str | None = None,
        chat_template: str | None = None,
        source: str = "tokenizer.json",
    ) -> Tokenizer:
        """Make a tokenizer from the text of a ``tokenizer.json``; a named token that it lacks counts as none.

        Raises:
            ModelError: the text is not a tokenizer; the message names ``source`` and the line.
        """
        return cls(
            text,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            cls_token=cls_token,
            sep_token=sep_token,
            mask_token=mask_token,
            chat_template=chat_template,
            source=source,
        )

    def save(self, folder: Path, *, model_max_length: int | None = None) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json`` and, if there is one, ``chat_template.jinja``.

        ``transformers.AutoTokenizer.from_pretrained(folder)`` reads them and gives the same ids.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._name(self.bos_id),
            "eos_token": self._name(self.eos_id),
            "pad_token": self._name(self.pad_id),
            "cls_token": self._name(self.cls_id),
            "sep_token": self._name(self.sep_id),
            "mask_token": self._name(self.mask_id),
            "unk_token": token_text(self._definition["model"].get("unk_token")),
            "model_max_length": model_max_length,
            "chat_template": self.chat_template,
        }
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "tokenizer.json").write_bytes(self._json)
        write_json(folder / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": False})
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @property
    def post_processor(self) -> dict[str, Any] | None:
        """What the file says about the control tokens round a text; see :mod:`hanmo.text.wrapping`."""
        return self._definition.get("post_processor")

    def to_json(self) -> str:
        """The text of ``tokenizer.json``."""
        return self._json.decode()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides ids: vocabulary, merges, rules, and which ids are BOS, EOS and padding."""
        definition = parse_object(self._json, self._source)
        parts = {key: definition.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        parts["roles"] = [self.bos_id, self.eos_id, self.pad_id]
        canonical = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _control_id(self, *names: str | None) -> int | None:
        """The id of the first of some names that is a control token."""
        return next((self.special_tokens[name] for name in names if name in self.special_tokens), None)

    def _name(self, index: int | None) -> str | None:
        return None if index is None else str(self._full.id_to_token(index))

    # -- encoding ------------------------------------------------------------------------------------------------------

    def _without(self, control: dict[str, int]) -> dict[str, Any]:
        """The whole definition without some control tokens. It is read again each time: parsed, a vocabulary takes ten
        times the memory of its text."""
        definition = parse_object(self._json, self._source)
        try:
            return without_control_tokens(definition, control)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise malformed(self._source, f"{type(error).__name__} {error}") from None

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The tokenizer without its control tokens."""
        return build(json.dumps(self._without(self.special_tokens)), self._source)

    @cached_property
    def _spelled(self) -> bool:
        """Whether a control token can only come of a text in which its characters stand.

        That is so where text is taken as it is, character by character, and no part of a token is marked: the
        characters of these control tokens then stand for themselves alone.
        """
        model, allowed = self._definition["model"], {"ByteLevel", "Split", "Digits"}
        return (
            model["type"] == "BPE"
            and not any(map(model.get, ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")))
            and {step["type"] for step in steps(self._definition.get("pre_tokenizer"))} <= allowed
            and {step["type"] for step in steps(self._definition.get("normalizer"))} <= {"NFC"}
            and all(re.fullmatch("[!-~]+", token) for token in self.special_tokens)
        )

    def _library(self, text: str) -> tokenizers.Tokenizer:
        """What encodes a text: the tokenizer without control tokens, or the one with them where they make no
        difference, so that most programs need only one of the two."""
        if "_plain" in self.__dict__ or not self._spelled or any(token in text for token in self.special_tokens):
            return self._plain
        composed = not self._definition.get("normalizer") or unicodedata.is_normalized("NFC", text)
        return self._full if composed else self._plain

    @cached_property
    def _fast(self) -> BpeEncoder | CharacterEncoder | str:
        """The fast encoder, or the reason why there is none."""
        try:
            return fast_encoder(self._without(self.special_tokens), lambda text: list(self._plain.encode(text).ids))
        except Unsuitable as reason:
            return str(reason)

    @property
    def fast_reason(self) -> str:
        """Why text is encoded by the slower ``tokenizers`` library; empty where the fast path is used."""
        return self._fast if isinstance(self._fast, str) else ""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of ``text``. BOS and EOS are never added.

        Args:
            text: any text without lone surrogates.
            special: recognise control tokens. Only for text that the program wrote itself, such as a rendered chat
                template; in anything that comes from a user or a corpus they must stay text.

        Raises:
            DataError: the text has a lone surrogate and so has no UTF-8.
        """
        if not special:
            ids: list[int] = self._encode_group([text])[0].tolist()
            return ids
        require_utf8(text)
        return list(self._full.encode(text, add_special_tokens=False).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of :meth:`encode`, and the characters ``[start, end)`` of the text that each of them stands for.

        Several tokens can stand for one character (its bytes), and a token can include the space before its word.

        Raises:
            DataError: the text has a lone surrogate.
        """
        require_utf8(text)
        encoding = self._library(text).encode(text, add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    @cached_property
    def _masking(self) -> tokenizers.Tokenizer:
        """The tokenizer without its control tokens but the mask."""
        control = {token: index for token, index in self.special_tokens.items() if index != self.mask_id}
        definition = self._without(control)
        definition["added_tokens"] = [  # all of them: tokens after a missing one would get other ids
            {**token, "content": untypeable(control[token["content"]])} if token["content"] in control else token
            for token in self._definition.get("added_tokens") or []
        ]
        return build(json.dumps(definition), self._source)

    def encode_masked(self, text: str) -> list[int]:
        """As :meth:`encode`, but the mask token is recognised; no other control token is.

        Raises:
            DataError: the text has a lone surrogate.
        """
        require_utf8(text)
        return list(self._masking.encode(text, add_special_tokens=False).ids)

    def encode_documents(self, texts: Sequence[str], *, threads: int | None = None) -> list[IdArray]:
        """Ids of every text as a ``uint32`` array: the fastest way to encode in bulk.

        Args:
            texts: documents of any length; a few megabytes in all per call keep every thread busy.
            threads: how many threads; default: the cores of the machine, or ``HANMO_THREADS``.

        Raises:
            DataError: a text has a lone surrogate; the message gives its index.
        """
        groups: list[list[str]] = [[]]
        size = 0
        for text in texts:
            if size > JOIN_CHARACTERS:
                groups.append([])
                size = 0
            groups[-1].append(text)
            size += len(text)
        threads = min(threads or default_threads(), len(groups))
        self._encoded += sum(map(len, texts))
        try:
            if threads == 1:
                return [ids for group in groups for ids in self._encode_group(group)]
            with ThreadPoolExecutor(threads) as pool:
                return [ids for found in pool.map(self._encode_group, groups) for ids in found]
        except DataError:
            for index, text in enumerate(texts):
                require_utf8(text, where=f"text {index}")
            raise

    def encode_batch(self, texts: Sequence[str], *, threads: int | None = None) -> list[list[int]]:
        """Ids of every text as lists, equal to ``[encode(text) for text in texts]``.

        Building Python lists costs about as much as encoding; :meth:`encode_documents` avoids it.
        """
        return [ids.tolist() for ids in self.encode_documents(texts, threads=threads)]

    def _encode_group(self, texts: Sequence[str]) -> list[IdArray]:
        """Encode on the fast path; with ``tokenizers`` what it cannot take, and what is too little to make it."""
        little = max(self._encoded, sum(map(len, texts))) < FAST_FROM * self.vocab_size
        if ("_fast" not in self.__dict__ and little) or isinstance(self._fast, str):
            return self._encode_together(texts)
        try:
            found = self._fast.encode_group(texts)
        except UnicodeEncodeError:
            for text in texts:
                require_utf8(text)
            raise
        return [self._encode_slowly(text) if ids is None else ids for text, ids in zip(texts, found, strict=True)]

    def _encode_together(self, texts: Sequence[str]) -> list[IdArray]:
        """Encode with ``tokenizers``, which takes a fifth of the time for many texts at once and uses all threads."""
        if len(texts) == 1:
            return [self._encode_slowly(texts[0])]
        for text in texts:
            require_utf8(text)
        library = next((found for found in map(self._library, texts) if found is not self._full), self._full)
        os.environ.setdefault("RAYON_NUM_THREADS", str(default_threads()))  # read when the library starts its threads
        try:
            found = library.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception:  # the library raises plain Exception and does not say for which text
            return [self._encode_slowly(text) for text in texts]
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]

    def _encode_slowly(self, text: str) -> IdArray:
        require_utf8(text)
        try:
            return np.array(self._library(text).encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        except Exception:  # the library raises plain Exception
            missing = [word for word in re.split(WORD_SPACES, text) if word and word not in self.words]
            if not self.is_word_level or not missing:
                raise
            raise DataError(
                f"the word '{missing[0][:40]}' is not in the vocabulary, which has no token for unknown words",
                why="the model has a closed vocabulary: the words of its training text",
                fix="leave the word out",
                zh=f"词 '{missing[0][:40]}' 不在词表中，且词表没有未知词符号；请去掉这个词",
            ) from None

    @cached_property
    def words(self) -> dict[str, int]:
        """Every token that ordinary text can give, and its id; control tokens are left out."""
        vocabulary = self._full.get_vocab(with_added_tokens=True)
        return {token: index for token, index in vocabulary.items() if token not in self.special_tokens}

    # -- decoding ------------------------------------------------------------------------------------------------------

    @cached_property
    def _bytes(self) -> BytesOfIds:
        """The bytes of every id; none for control tokens and for ids that no token has."""
        return BytesOfIds(self._bytes_of)

    def _bytes_of(self, index: int) -> bytes:
        token = self._full.id_to_token(index) or ""  # asked for one by one: all of them would take 10 MB
        if index in self._hidden:
            return b""
        if token in self.special_tokens:
            return token.encode()  # markup that is shown, such as <think>
        if "ByteLevel" in self._decoders and all(character in BYTE_OF_CHARACTER for character in token):
            return bytes(BYTE_OF_CHARACTER[character] for character in token)
        if self._decoders & {"ByteFallback", "Metaspace", "Replace"}:
            byte = BYTE_TOKEN.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
        return f" {token}".encode() if self.is_word_level else token.encode()

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for, ``b""`` for a control token; joined, they are the UTF-8 of the text (after
        a space where the tokenizer ``adds_prefix_space``).

        Raises:
            DataError: the id is out of the vocabulary.
        """
        self._check_id(id)
        return self._bytes[id]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids, also as an array.
            skip_special: leave control tokens out instead of writing them.

        Raises:
            DataError: an id is out of the vocabulary.
        """
        numbers = [int(index) for index in ids]
        for index in numbers:
            self._check_id(index)
        if not self._decoders <= {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"} or (
            not self._decoders and self._definition["model"]["type"] == "WordLevel"
        ):
            return str(self._full.decode(numbers, skip_special_tokens=skip_special))  # a decoder with rules of its own
        table = self._bytes
        if skip_special:
            joined = b"".join(table[index] for index in numbers)
        else:
            names = self._full.id_to_token
            joined = b"".join((names(i) or "").encode() if i in self._hidden else table[i] for i in numbers)
        text = joined.decode("utf-8", errors="replace")
        return text[1:] if self.adds_prefix_space and text.startswith(" ") else text

    def _check_id(self, index: int) -> None:
        if not 0 <= index < self.vocab_size:
            raise DataError(
                f"the id {index} is not in the vocabulary, whose ids are 0 to {self.vocab_size - 1}",
                why="the ids were made with another tokenizer, or are not token ids",
                zh=f"编号 {index} 不在词表中（应为 0 到 {self.vocab_size - 1}）",
            )


class BytesOfIds(dict[int, bytes]):
    """The bytes of ids, found when they are first asked for: most texts have few of the tokens of a vocabulary."""

    def __init__(self, find: Callable[[int], bytes]) -> None:
        super().__init__()
        self.find = find

    def __missing__(self, index: int) -> bytes:
        self[index] = found = self.find(index)
        return found


def require_utf8(text: str, where: str = "") -> None:
    """Refuse text with a lone surrogate (half of a UTF-16 pair).

    Raises:
        DataError: with the position of the surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text is a lone surrogate (U+{ord(text[error.start]):04X})",
            where=where,
            why="half of a UTF-16 pair is not a character and has no UTF-8 form; text cut in two often ends so",
            fix="decode the source again, or drop it with: text.encode('utf-8', 'ignore').decode()",
            zh=f"第 {error.start} 个字符是孤立的代理码元，不能编码为 UTF-8。请重新解码原文或删去该字符",
        ) from None


def default_threads() -> int:
    """Threads for bulk work: ``HANMO_THREADS``, no more than there are cores; else the number of cores."""
    cores = os.cpu_count() or 1
    return min(wanted_threads() or cores, cores)
