"""Bytes to text: telling encodings apart, and decoding a stream without losing count of its lines.

UTF-8, GB18030 (with GBK and GB2312 inside it) and UTF-16 are told apart by what is valid and by how common the
resulting Chinese characters are. Nearly any bytes decode as GB18030 or UTF-16, but only the right reading gives a text
in which every third character or so is one of the few hundred that Chinese is mostly made of.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO

from hanmo.data.sections import safe_cut

PROBE = 1 << 18  # bytes looked at to tell the encoding
BLOCK = 1 << 20  # bytes decoded at a time
LONGEST_PIECE = 1 << 20  # characters; a longer line is cut
NAMES = {
    "utf-8": "UTF-8",
    "utf-8-sig": "UTF-8 with BOM",
    "gb18030": "GB18030",
    "utf-16-le": "UTF-16 LE",
    "utf-16-be": "UTF-16 BE",
    "utf-32": "UTF-32",
}
BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16 LE, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
BINARY_SIGNATURES = ((b"%PDF-", "PDF"), (b"PK\x03\x04", "zip, docx or epub"), (b"\xd0\xcf\x11\xe0", "Word or Excel"))
CONTROL = bytes(code for code in range(32) if code not in b"\t\n\r\f\x1b\b")
ASCII_RUN = re.compile("[\x00-\x7f]+")

# the most frequent characters of modern and classical Chinese, simplified and traditional
COMMON_HAN = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事"
    "成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公"
    "此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回"
    "特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活更别打女变四神总何电"
    "数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指许统区保至队形社便空决治展马科司五基眼书非则听白却"
    "這個們來為國說時會對過發後裡種經麼學現當沒動還進樣開實軍無與長機關點業將兩間問並應戰頭體見產話內給門聲員論處幾條氣"
    "曰云吾汝乃矣兮花風春秋江月夜雲客君歸兒马风云归飞雨落酒千万里何处今古此去故日生死言王公子夫故遂即遣卻教"
)


def readable_name(encoding: str) -> str:
    """``utf-8-sig`` -> ``UTF-8 with BOM``."""
    return NAMES.get(encoding, encoding)


def binary_kind(head: bytes) -> str:
    """The name of a well-known binary format that begins like this, else ``""``."""
    return next((kind for signature, kind in BINARY_SIGNATURES if head.startswith(signature)), "")


def detect(head: bytes, complete: bool) -> str:
    """Tell the encoding of a text from its beginning.

    Args:
        head: the first bytes of the file.
        complete: whether that is all of it; otherwise a character may be cut at the end.

    Returns:
        The name of a Python codec; ``"utf-8"`` also for a text that no reading fits (decoding it will then show
        where it goes wrong); ``""`` for binary data.
    """
    for mark, encoding in BOMS:
        if head.startswith(mark):
            return encoding
    if binary_kind(head):
        return ""
    control = len(head) - len(head.translate(None, CONTROL))
    is_binary = control > 0.01 * len(head)
    if b"\x00" not in head and decodes(head, "utf-8", complete) is not None:
        return "" if is_binary else "utf-8"
    if b"\x00" not in head and not is_binary and is_chinese(head.decode("gb18030", "replace")):
        return "gb18030"
    readings = {name: decodes(head[: len(head) // 2 * 2], name, complete) for name in ("utf-16-le", "utf-16-be")}
    best = max(readings, key=lambda name: familiar_share(readings[name]))
    if familiar_share(readings[best]) > 0.2 and plausible_share(readings[best]) > 0.95:
        return best
    return "" if is_binary else "utf-8"


def decodes(data: bytes, encoding: str, complete: bool) -> str | None:
    """The decoded text, or None where the bytes are not valid; the last character may be incomplete."""
    try:
        return codecs.getincrementaldecoder(encoding)("strict").decode(data, final=complete)
    except UnicodeDecodeError:
        return None


def is_han(character: str) -> bool:
    """Whether it is a character of the unified Han block."""
    return "\u4e00" <= character <= "\u9fff"


def is_chinese(text: str) -> bool:
    """Whether a decoded text reads like Chinese: its Han characters are common ones, and little else is strange."""
    foreign = ASCII_RUN.sub("", text)[:20_000]
    if (
        foreign.count("\ufffd") > 0.02 * len(foreign) + 1
    ):  # a few damaged bytes, or the cut at the end, are no objection
        return False
    han = [character for character in foreign if is_han(character)]
    common = sum(character in COMMON_HAN for character in han)
    return common > 0.15 * len(han) and plausible_share(foreign) > 0.9


def familiar_share(text: str | None) -> float:
    """Share of ASCII and common Chinese characters; 0 for None."""
    sample = (text or "")[:20_000]
    return sum(c in COMMON_HAN or " " <= c <= "~" or c in "\t\n\r" for c in sample) / max(1, len(sample))


def plausible_share(text: str | None) -> float:
    """Share of characters that Chinese and English texts are made of: ASCII, Han, their punctuation."""
    sample = (text or "")[:20_000]
    plausible = sum(
        is_han(c)
        or " " <= c <= "~"
        or c in "\t\n\r"
        or "\u3000" <= c <= "\u30ff"
        or "\u2010" <= c <= "\u27bf"
        or "\uff00" <= c <= "\uffef"
        for c in sample
    )
    return plausible / max(1, len(sample))


def mark_bad_bytes(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: each undecodable byte becomes the lone surrogate U+DC00 + byte, which no text contains."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    bad = error.object[error.start : error.end]
    return "".join(chr(0xDC00 + byte) for byte in bad), error.end


codecs.register_error("hanmo-mark", mark_bad_bytes)


class TextStream:
    """A binary stream read as text, in pieces of about a megabyte that end at line ends.

    Args:
        raw: the bytes, from their beginning.
        encoding: a codec name, or ``"auto"``.

    Attributes:
        encoding: the codec in use; ``""`` for binary data, which must not be read.
        bad: whether undecodable bytes were met; from then on pieces may hold marks (see :func:`mark_bad_bytes`).
    """

    def __init__(self, raw: BinaryIO, encoding: str = "auto") -> None:
        self.raw = raw
        self.head = raw.read(PROBE)
        self.complete = len(self.head) < PROBE
        self.guessing = encoding == "auto"
        name = detect(self.head, self.complete) if self.guessing else codecs.lookup(encoding).name
        self.encoding = "utf-8-sig" if name == "utf-8" and not self.guessing else name
        self.bad = False

    def preview(self) -> str:
        """The beginning of the text, as far as it was looked at to tell the encoding."""
        text = codecs.getincrementaldecoder(self.encoding)("replace").decode(self.head)
        return text.removeprefix("\ufeff")

    def blocks(self) -> Iterator[bytes]:
        """The bytes of the stream."""
        block = self.head
        self.head = b""
        while block:
            yield block
            block = self.raw.read(BLOCK)

    def decoded(self) -> Iterator[str]:
        """The decoded blocks; undecodable bytes are marked."""
        decoder = codecs.getincrementaldecoder(self.encoding)("strict")
        seen_only_ascii = True
        for block in self.blocks():
            state = decoder.getstate()
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError:
                decoder.setstate(state)
                # a probe of plain ASCII said nothing: the encoding is told where it first matters
                if self.guessing and seen_only_ascii and detect(state[0] + block, complete=False) == "gb18030":
                    self.encoding = "gb18030"
                    decoder = codecs.getincrementaldecoder(self.encoding)("strict")
                    block = state[0] + block
                text = self.decode_marking(decoder, block)
            seen_only_ascii = seen_only_ascii and text.isascii()
            yield text
        yield self.decode_marking(decoder, b"", final=True)

    def decode_marking(self, decoder: codecs.IncrementalDecoder, block: bytes, final: bool = False) -> str:
        """Decode a block whose undecodable bytes are marked."""
        decoder.errors = "hanmo-mark"
        text = decoder.decode(block, final)
        decoder.errors = "strict"
        self.bad = self.bad or re.search("[\udc00-\udcff]", text) is not None
        return text

    def pieces(self) -> Iterator[str]:
        """The text in pieces; each but the last ends with a line, unless a line is longer than a megabyte."""
        carry = ""
        first = True
        for text in self.decoded():
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            carry += text
            end = carry.rfind("\n") + 1
            if not end and len(carry) > LONGEST_PIECE:
                end = safe_cut(carry, len(carry) - 1)
            if end:
                yield carry[:end]
                carry = carry[end:]
        if carry:
            yield carry

    def lines(self) -> Iterator[tuple[int, str]]:
        """Number (from 1) and text of each line, without its end; lines end at ``\\n`` or ``\\r\\n`` only."""
        number = 1
        begun: list[str] = []
        for piece in self.pieces():
            *whole, rest = piece.split("\n")
            for line in whole:
                if begun:
                    line = "".join(begun) + line
                    begun = []
                yield number, line.removesuffix("\r")
                number += 1
            if rest:
                begun.append(rest)
        if begun:
            yield number, "".join(begun).removesuffix("\r")
