"""Normalisation: the same text always becomes the same characters.

Always: line ends become ``\\n``, control characters go (``\\n`` and ``\\t`` stay), the result is in Unicode NFC.
On wish: full-width letters, digits and punctuation become half-width, and traditional Chinese becomes simplified.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable

from hanmo.errors import missing_package
from hanmo.language import pick

# Cc without \n and \t, the byte-order mark inside a text, and two noncharacters; lone surrogates are handled apart
UNWANTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff\ud800-\udfff]")
SURROGATE = re.compile("[\ud800-\udfff]")
FULL_WIDTH = re.compile("[\u3000\uff01-\uff5e]")
HALF_WIDTH = {0x3000: 0x20, **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}}


def normalize(text: str, *, half_width: bool = False, simplify: bool = False) -> str:
    """Return the normalised text; normalising twice changes nothing more.

    Args:
        text: any string; a lone surrogate (it cannot be written as UTF-8) becomes U+FFFD.
        half_width: map U+FF01..U+FF5E and the ideographic space to ASCII.
        simplify: traditional to simplified Chinese (needs the package ``opencc``).

    Raises:
        ResourceError: ``simplify`` without ``opencc``.

    >>> normalize("cafe\\u0301\\r\\n\\x00ok"), normalize("ＡＢＣ１２３，　好", half_width=True)
    ('café\\nok', 'ABC123, 好')
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if UNWANTED.search(text):
        text = UNWANTED.sub("", SURROGATE.sub("\ufffd", text.replace("\x85", "\n")))
    if half_width and FULL_WIDTH.search(text):
        text = text.translate(HALF_WIDTH)
    if simplify:
        text = simplifier()(text)
    # last, because each step above can bring a letter and its accent together
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


@functools.cache
def simplifier() -> Callable[[str], str]:
    """The function from traditional to simplified Chinese.

    Raises:
        ResourceError: the package ``opencc`` is not installed.
    """
    try:
        import opencc
    except ImportError:
        raise missing_package(
            "opencc", "chinese", pick("--simplify (traditional to simplified Chinese)", "--simplify（繁体转简体）")
        ) from None
    convert: Callable[[str], str] = opencc.OpenCC("t2s").convert
    return convert
