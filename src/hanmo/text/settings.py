"""Settings of tokenizer training, for verbs to inherit; free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass

from hanmo.settings import option


@dataclass
class TokenizerSettings:
    """Which tokenizer to train on the corpus."""

    tokenizer: str = option(
        "bpe",
        "bpe (byte-level pairs, for every language), char (one id per character, for small corpora), "
        "words (files of one sentence per line, words between spaces, taken as they are; hanmo pretrain), "
        "or the folder of a tokenizer to use",
        zh="bpe（字节级，适合一切语言）、char（逐字符，适合小语料）、"
        "words（每行一句、词以空格分开的文件，按原样使用；用于 hanmo pretrain），或已有分词器的文件夹",
        metavar="{bpe,char,words,FOLDER}",
    )
    vocab_size: int | None = option(
        None, "entries of the vocabulary; default: what the budget can train well", zh="词表大小；默认按预算选择"
    )
