"""Fast encoders that give exactly the ids of the ``tokenizers`` library.

A byte-level BPE is run by ``tiktoken``, which is several times faster. The two libraries follow different rules:
``tokenizers`` ranks *pairs* of tokens, ``tiktoken`` ranks the *concatenation* of a pair. They agree for the following
reason, whose condition :func:`order_tokens` checks for every token of a vocabulary. Call a token *sound* when BPE with
pair ranks, run on the bytes of that token alone, ends in the token itself. While a piece of text is merged, the bytes
of any stretch whose two borders have not been crossed yet pass through the same states as if the stretch stood alone.
So if two neighbours (c, d) spell a sound token t, then (c, d) is the last pair of t's own run: it is a listed merge,
and the only one for t that can ever occur. Both libraries therefore see the same candidates; with the same order of
ranks, and the leftmost first among equals in both, they take the same step every time. A token that is not sound can
never be made by ``tokenizers``, so it is left out of the table (``ignore_merges`` is an exception, see below).

The cutting of text into pieces needs one regular expression; :func:`piece_pattern` finds it for the usual
pre-tokenizers. Whatever cannot be expressed, or does not give equal ids on a probe text, is refused with a reason, and
the caller stays with ``tokenizers``.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from numpy.typing import NDArray

IdArray = NDArray[np.uint32]

# What ByteLevel(use_regex=true) cuts with, the pattern of GPT-2. Whitespace before a word gives its last space to it.
GPT2_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SINGLE_DIGITS = r"\p{N}"
# Both, one after the other, as one pattern: every digit is a piece, and whitespace before one ends there.
GPT2_SINGLE_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
COMBINED: dict[tuple[str, ...], str] = {(SINGLE_DIGITS, GPT2_PIECES): GPT2_SINGLE_DIGITS}

# tiktoken can look for a control token while it encodes; this one parts documents that are encoded in one call.
SEPARATOR = "\x00\x1dhanmo document end\x1d\x00"
JOIN_CHARACTERS = 200_000  # characters per call: enough to make the cost of a call vanish
# A pattern with look-ahead is run by a backtracking matcher, whose stack overflows on about a million spaces in a row.
LONGEST_SPACE = 100_000

# Text on which a fast encoder must agree before it is trusted: scripts, code, odd spaces, and letters that only recent
# versions of Unicode know (two regex engines with different tables would cut them differently).
PROBE = (
    "It's 3.14, isn't it? We'LL see: I'd say they've DON'T 'tis ’s\r\n\r\n  Two  spaces\tand\t\ttabs   \n\n\n end.  "
    "翰墨飘香，2024年5月1日。中英mixed文字，“引号”……\u3000\u3000全角空格　１２３ 𠀀𠮷㐀々〇かなカナ한국어 العربية "
    "हिन्दी ไทย "
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # 注释\n\tif a[0] != b_1 and not c:\n\t\tpass\n"
    "👩‍👩‍👧‍👦 🇨🇳 é e\u0301 ﬁ ſ K ½ ² Ⅷ ٣ 𝟘 \u00a0\u2003\u200b\ufeff\x00\x1c\x85\u2028 "
    "aaaaaaaaaaaaaaaa --------- ======= ((((( "
    "\U00031350\U0002ebf0\U0001e4d0\U00010570\u0870\U00011f04\U00010940\U0001d2c0\U000105c0\ua7cb\U00033479 x1y22z333 "
    "http://a.b/c?d=e&f=%20 SELECT * FROM t; \\n \\u4e2d <|im_start|>system<|im_end|> [INST] </s> <s>"
)


class Unsuitable(Exception):
    """Why a tokenizer cannot have a fast encoder."""


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's ``bytes_to_unicode``)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(256)
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


CHARACTER_OF_BYTE = byte_characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}


def steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The members of a ``Sequence`` normalizer, pre-tokenizer or decoder; one step is a sequence of itself."""
    if not part:
        return []
    if part.get("type") != "Sequence":
        return [part]
    inner = part.get("pretokenizers") or part.get("normalizers") or part.get("decoders") or []
    return [step for member in inner for step in steps(member)]


def piece_pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The one regular expression that cuts text as a byte-level pre-tokenizer does.

    Raises:
        Unsuitable: the pre-tokenizer is not one of the known forms.
    """
    chain = steps(pre_tokenizer)
    if not chain or chain[-1]["type"] != "ByteLevel":
        raise Unsuitable("it is not a byte-level tokenizer")
    if chain[-1].get("add_prefix_space"):
        raise Unsuitable("its pre-tokenizer adds a space in front")
    patterns: list[str] = []
    for step in chain[:-1]:
        if step["type"] == "Digits" and step.get("individual_digits"):
            patterns.append(SINGLE_DIGITS)
        elif step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(str(step["pattern"].get("Regex", "")))
        else:
            raise Unsuitable(f"its pre-tokenizer has the step {step['type']}")
    if chain[-1].get("use_regex", True):
        patterns.append(GPT2_PIECES)
    pattern = patterns[0] if len(patterns) == 1 else COMBINED.get(tuple(patterns))
    if not pattern:
        raise Unsuitable("its pre-tokenizer is not one regular expression")
    return pattern


def merge_pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model, written either as ``"a b"`` or as ``["a", "b"]``."""
    pairs: list[tuple[str, str]] = []
    for merge in model.get("merges", []):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pairs.append((left, right))
    return pairs


def order_tokens(model: dict[str, Any]) -> list[str]:
    """The tokens that merging can make, in the order of their merges; the proof is in the text of this module.

    Raises:
        Unsuitable: pair ranks and token ranks could lead to different results.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, (left, right) in enumerate(merge_pairs(model)):
        token = left + right
        first.setdefault(token, rank)
        last[token] = rank
    ordered = sorted(first, key=first.__getitem__)
    latest = -1
    for token in ordered:
        if first[token] < latest:
            raise Unsuitable("the merges of different tokens are interleaved")
        latest = last[token]
    alone = tokenizers.Tokenizer.from_str(
        json.dumps({"version": "1.0", "added_tokens": [], "model": {**model, "ignore_merges": False, "dropout": None}})
    )
    lengths = [len(encoding.ids) for encoding in alone.encode_batch_fast(ordered)]
    if not model.get("ignore_merges"):
        return [token for token, length in zip(ordered, lengths, strict=True) if length == 1]
    # Here a whole piece that is in the vocabulary is taken as it is, in both libraries. A token that is not sound stays
    # in the table for that; its own run must not stop at two tokens, or tiktoken would join them inside a longer piece.
    if 2 in lengths:
        raise Unsuitable("some tokens lack the merge that makes them")
    if any(len(token) > 1 and token not in first for token in model["vocab"] if set(token) <= BYTE_OF_CHARACTER.keys()):
        raise Unsuitable("some tokens have no merge")
    return ordered


class BpeEncoder:
    """A byte-level BPE through ``tiktoken``; make it with :func:`fast_encoder`."""

    def __init__(self, definition: dict[str, Any]) -> None:
        model = definition["model"]
        normalizers = [step["type"] for step in steps(definition.get("normalizer"))]
        if normalizers not in ([], ["NFC"]):
            raise Unsuitable("it normalises the text")
        self.composed = normalizers == ["NFC"]  # text that is not composed yet is left to `tokenizers`
        if model.get("type") != "BPE":
            raise Unsuitable(f"its model is {model.get('type')}, not BPE")
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(name):
                raise Unsuitable(f"its model has a {name}")
        self.pattern = piece_pattern(definition.get("pre_tokenizer"))
        self.looks_ahead = "(?!" in self.pattern
        vocabulary = model["vocab"]
        tokens = [CHARACTER_OF_BYTE[byte] for byte in range(256)] + order_tokens(model)
        ranks = {bytes(BYTE_OF_CHARACTER[c] for c in token): rank for rank, token in enumerate(tokens)}
        if len(ranks) != len(tokens):
            raise Unsuitable("a merge makes a single byte")
        # Bytes that the vocabulary lacks are dropped by `tokenizers`; they are seen in the result and handled there.
        self.missing = any(token not in vocabulary for token in tokens[:256])
        self.absent = 1 + max(vocabulary.values())
        self.ids = np.array([vocabulary.get(token, self.absent) for token in tokens], dtype=np.uint32)
        self.separator_rank = len(tokens)
        self.core = tiktoken._tiktoken.CoreBPE(ranks, {SEPARATOR: self.separator_rank}, self.pattern)

    def ranks(self, text: str, allowed: set[str]) -> IdArray | None:
        """Ranks of the tokens; None where the text needs normalising or has more spaces than the matcher takes."""
        if self.composed and not unicodedata.is_normalized("NFC", text):
            return None
        if self.looks_ahead and len(text) > LONGEST_SPACE and has_long_space(text):
            return None
        return np.frombuffer(self.core.encode_to_tiktoken_buffer(text, allowed), dtype=np.uint32)

    def encode(self, text: str) -> IdArray | None:
        """Ids of one text, or None where only ``tokenizers`` can encode it."""
        ranks = self.ranks(text, set())
        if ranks is None:
            return None
        ids: IdArray = self.ids[ranks]
        return None if self.missing and bool((ids == self.absent).any()) else ids

    def encode_group(self, texts: Sequence[str]) -> list[IdArray | None]:
        """Ids of several texts. They are joined and encoded in one call, which frees other threads for its length."""
        if len(texts) > 1:
            ranks = self.ranks(SEPARATOR.join(texts), {SEPARATOR})
            if ranks is not None:
                ends = np.flatnonzero(ranks == self.separator_rank)
                if len(ends) == len(texts) - 1:
                    ids = np.append(self.ids, np.uint32(0))[ranks]
                    if not (self.missing and bool((ids == self.absent).any())):
                        edges = [-1, *ends.tolist(), len(ids)]
                        return [ids[start + 1 : stop] for start, stop in itertools.pairwise(edges)]
        return [self.encode(text) for text in texts]


class CharacterEncoder:
    """A vocabulary of single characters as a table from code point to id; make it with :func:`fast_encoder`."""

    def __init__(self, definition: dict[str, Any]) -> None:
        model = definition["model"]
        if definition.get("normalizer") or model.get("type") != "WordLevel":
            raise Unsuitable("it is not a plain character tokenizer")
        chain = steps(definition.get("pre_tokenizer"))
        if len(chain) != 1 or chain[0].get("pattern") != {"Regex": CHARACTER_PIECES} or chain[0].get("invert"):
            raise Unsuitable("it does not cut text into single characters")
        unknown = model["vocab"].get(model.get("unk_token"))
        if unknown is None:
            raise Unsuitable("it has no token for unknown characters")
        self.ids = np.full(0x110000, unknown, dtype=np.uint32)
        for token, index in model["vocab"].items():
            if len(token) == 1:
                self.ids[ord(token)] = index

    def encode(self, text: str) -> IdArray | None:
        """Ids of one text."""
        ids: IdArray = self.ids[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]
        return ids

    def encode_group(self, texts: Sequence[str]) -> list[IdArray | None]:
        """Ids of several texts."""
        return [self.encode(text) for text in texts]


CHARACTER_PIECES = r"[\s\S]"


def has_long_space(text: str) -> bool:
    """Whether ``text`` may hold :data:`LONGEST_SPACE` whitespace characters in a row (looks only here and there)."""
    half = LONGEST_SPACE // 2
    return any(text[at].isspace() and text[at : at + half].isspace() for at in range(0, len(text), half))


def fast_encoder(definition: dict[str, Any], reference: Callable[[str], list[int]]) -> BpeEncoder | CharacterEncoder:
    """Make the fast encoder of a tokenizer.

    Args:
        definition: the content of ``tokenizer.json``, without control tokens.
        reference: encodes a text with ``tokenizers``; the probe text must give the same ids.

    Raises:
        Unsuitable: there is none; the message says why.
    """
    kind = BpeEncoder if definition["model"].get("type") == "BPE" else CharacterEncoder
    try:
        encoder = kind(definition)
        ids = encoder.encode(PROBE)
        # The lines one by one too: a byte that the vocabulary lacks would hide the rest of the text.
        parts = [(line, encoder.encode(line)) for line in PROBE.split(" ")]
    except Unsuitable:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise Unsuitable(f"its parts are unusual ({type(error).__name__}: {error})") from None
    for text, found in [(PROBE, ids), *parts]:
        if found is not None and found.tolist() != reference(text):
            raise Unsuitable("the ids differ on a probe text")
    return encoder
