"""The settings of data preparation, for verbs to inherit."""

from __future__ import annotations

import codecs
import dataclasses
from dataclasses import dataclass
from typing import Any

from hanmo.errors import UsageError, nearest
from hanmo.settings import option

COMMON_ENCODINGS = ("auto", "utf-8", "gb18030", "gbk", "utf-16", "utf-16-le", "utf-16-be", "big5", "latin-1", "cp1252")


@dataclass
class DataSettings:
    """How files become documents and documents become splits."""

    text_field: str | None = option(
        None,
        "the field (or column name, or column number) that holds the text in jsonl, json, csv, tsv and parquet; "
        "default: found by name or length",
        zh="jsonl、json、csv、tsv、parquet 中存放正文的字段（列名或列号）；默认按名称或长度自动寻找",
        metavar="NAME",
    )
    encoding: str = option(
        "auto",
        "encoding of the text files, such as gb18030 or latin-1; auto tells UTF-8, GB18030 and UTF-16 apart",
        zh="文本文件的编码，如 gb18030、latin-1；auto 可自动区分 UTF-8、GB18030 与 UTF-16",
    )
    half_width: bool = option(
        False,
        "turn full-width letters, digits and punctuation into half-width ones",
        zh="把全角字母、数字、标点转为半角",
    )
    simplify: bool = option(
        False, "turn traditional into simplified Chinese (needs opencc)", zh="繁体转简体（需要 opencc）"
    )
    dedup: bool = option(
        True,
        "keep exact copies of a document; by default only the first stays",
        zh="保留完全相同的文档；默认只留第一份",
    )
    skip_bad: bool = option(
        False,
        "leave out records and lines that cannot be read, count and list them; by default the first one stops the work",
        zh="跳过无法读取的记录或行，并计数、列出；默认遇到第一条即停止",
    )
    validation_share: float | None = option(
        None,
        "share of the text kept for validation during training; default: 0.01, more where the corpus is small",
        zh="训练中验证所用文本的比例；默认 0.01，语料小则更大",
        metavar="SHARE",
    )
    test_share: float | None = option(
        None,
        "share of the text kept for the final test; default: 0.01, more where the corpus is small",
        zh="最终测试所用文本的比例；默认 0.01，语料小则更大",
        metavar="SHARE",
    )
    split: str = option(
        "hash",
        "hash: each document by the hash of its text; tail: the end of the text is held out, to the exact character",
        zh="hash：按文档内容的哈希划分；tail：把文本末尾一段留出，精确到字符",
        choices=("hash", "tail"),
    )
    seed: int = option(0, "number that decides every random choice", zh="决定一切随机选择的数")

    def check(self) -> None:
        """Raise UsageError for values that cannot work, before any file is read."""
        for name in ("validation_share", "test_share"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise UsageError(f"{name} is {share}, a share lies between 0 and 1", fix="for example 0.05")
        if (self.validation_share or 0) + (self.test_share or 0) >= 1:
            raise UsageError(
                "validation and test take the whole text; nothing is left for training", fix="use 0.05 each"
            )
        if self.encoding != "auto":
            try:
                is_text = codecs.lookup(self.encoding)._is_text_encoding
            except LookupError:
                is_text = False
            if not is_text:
                raise UsageError(
                    f"unknown encoding '{self.encoding}'",
                    fix=nearest(self.encoding, COMMON_ENCODINGS),
                    zh=f"未知编码 '{self.encoding}'：{nearest(self.encoding, COMMON_ENCODINGS)}",
                )

    def data_record(self) -> dict[str, Any]:
        """The settings of data preparation alone, as plain data (a verb's settings have more fields)."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(DataSettings)}
