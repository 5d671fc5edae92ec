"""How well a tokenizer fits Chinese, English and source code, next to known yardsticks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from hanmo.language import pick
from hanmo.text.tokenizer import Tokenizer

# Written for this report, so that two tokenizers can be compared wherever they were trained.
SAMPLES = {
    "zh": (
        "清晨的集市刚刚开张，卖豆腐的老人把木桶放稳，掀开白布，热气便升了起来。孩子们背着书包从桥上跑过，"
        "有人停下来买一个烧饼，有人只是看看河里的船。昨夜下过雨，石板路还湿着，倒映出两旁的屋檐。\n"
        "人工智能的研究者常说，数据的质量比数量更重要。一个小模型若是读过干净的文字，往往胜过读了许多噪声的大模型。"
        "2024年的一项调查显示，约有37.5%的用户每天使用此类工具；其中多数人希望它能解释自己的判断。\n"
        "老师问：“这首诗好在哪里？”学生想了想，答道：“好在没有一个字是多余的。”\n"
    ),
    "en": (
        "The ferry left the harbour a few minutes late, and nobody seemed to mind. Two fishermen mended a net on the "
        "rear deck while a girl counted gulls aloud, losing her place every time the engine coughed. By noon the fog "
        "had lifted, and the islands lay ahead like a row of sleeping animals.\n"
        "Researchers often say that the quality of data matters more than its quantity. A small model that has read "
        "clean text will usually do better than a large one that has read a great deal of noise. In a 2024 survey, "
        "about 37.5% of the users said they'd rely on such tools daily; most of them wanted an explanation, too.\n"
        '"What makes this poem good?" the teacher asked. "It doesn\'t have a single word it could do without."\n'
    ),
    "code": (
        "from collections import Counter\n\n\n"
        "def most_common_words(path: str, limit: int = 10) -> list[tuple[str, int]]:\n"
        '    """Return the words that occur most often in a file."""\n'
        "    counts: Counter[str] = Counter()\n"
        '    with open(path, encoding="utf-8") as stream:\n'
        "        for number, line in enumerate(stream, start=1):\n"
        "            for word in line.lower().split():\n"
        "                if word.isalpha() and len(word) > 3:\n"
        "                    counts[word] += 1\n"
        "    return counts.most_common(limit)\n\n\n"
        'if __name__ == "__main__":\n'
        "    for word, count in most_common_words(sys.argv[1]):\n"
        '        print(f"{word:<20} {count:>6}")  # aligned columns\n'
    ),
}


# Tokens that a known tokenizer makes of the samples, so that there is always something to compare with, offline too.
REFERENCE = "SmolLM2-135M"  # 49,152 entries, English and code; a test counts again where the model is at hand
REFERENCE_TOKENS = {"zh": 401, "en": 167, "code": 180}


def tokenizer_report(
    tokenizer: Tokenizer,
    texts_by_language: Mapping[str, Iterable[str]] | None = None,
    reference: Tokenizer | None = None,
) -> dict[str, Any]:
    """Measure a tokenizer on built-in samples and on given texts.

    Args:
        tokenizer: the one in question.
        texts_by_language: texts under any names (``{"zh": [...], "en": [...]}``); held-out ones tell the most.
        reference: a known tokenizer, measured on the same texts; without it, the built-in samples are compared with
            what SmolLM2's makes of them. Raw UTF-8 (one byte a token) is always a yardstick.

    Returns:
        Plain data: ``vocab_size``; ``fast_reason``; ``longest_tokens`` (the ten longest that are not only spaces); and
        ``texts``, one row for each text with its ``name``, ``characters``, ``bytes``, ``tokens``,
        ``characters_per_token``, ``bytes_per_token``, ``reference_characters_per_token`` (None without a reference),
        ``raw_characters_per_token``, ``fallback_share`` (share of tokens that are single bytes of a longer character,
        or unknown), and ``vocabulary_used`` (share of the vocabulary that occurs).
    """
    rows = [measure(f"sample {name}", [text], tokenizer, reference) for name, text in SAMPLES.items()]
    if reference is None:
        for row, count in zip(rows, REFERENCE_TOKENS.values(), strict=True):
            row["reference_characters_per_token"] = ratio(row["characters"], count)
    rows += [measure(name, list(texts), tokenizer, reference) for name, texts in (texts_by_language or {}).items()]
    words = (tokenizer.token_bytes(index).decode("utf-8", "replace") for index in range(tokenizer.vocab_size))
    longest = sorted((word for word in words if word.strip()), key=len, reverse=True)[:10]
    return {
        "vocab_size": tokenizer.vocab_size,
        "fast_reason": tokenizer.fast_reason,
        "longest_tokens": longest,
        "texts": [row for row in rows if row["tokens"]],
    }


def measure(name: str, texts: list[str], tokenizer: Tokenizer, reference: Tokenizer | None) -> dict[str, Any]:
    """One row of the report."""
    counts: Counter[int] = Counter()
    for ids in tokenizer.encode_documents(texts):
        counts.update(ids.tolist())
    tokens = sum(counts.values())
    characters = sum(map(len, texts))
    size = sum(len(text.encode()) for text in texts)
    others = sum(map(len, reference.encode_documents(texts))) if reference else 0
    fallback = sum(count for index, count in counts.items() if is_fallback(tokenizer, index))
    return {
        "name": name,
        "characters": characters,
        "bytes": size,
        "tokens": tokens,
        "characters_per_token": ratio(characters, tokens),
        "bytes_per_token": ratio(size, tokens),
        "reference_characters_per_token": ratio(characters, others) if reference else None,
        "raw_characters_per_token": ratio(characters, size),
        "fallback_share": ratio(fallback, tokens),
        "vocabulary_used": ratio(len(counts), tokenizer.vocab_size),
    }


def ratio(part: float, whole: float) -> float:
    """``part / whole``, 0 where there is nothing."""
    return part / whole if whole else 0.0


def is_fallback(tokenizer: Tokenizer, index: int) -> bool:
    """Whether a token is one byte of a longer character, or stands for an unknown one."""
    token = tokenizer.token_bytes(index)
    return not token or (len(token) == 1 and token[0] >= 0x80)


def describe(report: dict[str, Any]) -> str:
    """The report as a short table."""
    head = pick(
        f"vocabulary: {report['vocab_size']:,} tokens\ncharacters per token (more is better):",
        f"词表：{report['vocab_size']:,} 个词元\n每个词元的字符数（越大越好）：",
    )
    width = max([len(row["name"]) for row in report["texts"]], default=4) + 2
    columns = f"{'this':>6}{'reference':>11}{'raw UTF-8':>11}{'fallback':>10}{'used':>8}"
    lines = [head, f"  {'text':<{width}}{columns}"]
    for row in report["texts"]:
        other = row["reference_characters_per_token"]
        lines.append(
            f"  {row['name']:<{width}}{row['characters_per_token']:>6.2f}{'-' if other is None else f'{other:.2f}':>11}"
            f"{row['raw_characters_per_token']:>11.2f}{row['fallback_share']:>10.1%}{row['vocabulary_used']:>8.1%}"
        )
    shown = "  ".join(repr(token) for token in report["longest_tokens"][:6])
    lines.append(pick("longest tokens: ", "最长的词元：") + shown)
    if report["fast_reason"]:
        lines.append(pick("encoded by the slower library: ", "使用较慢的编码库：") + report["fast_reason"])
    return "\n".join(lines)
