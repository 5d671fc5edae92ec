"""``hanmo data``: read, check, clean and split texts, and report what they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hanmo.cli.outcome import Outcome
from hanmo.cli.road import prepare_corpus
from hanmo.data.settings import DataSettings
from hanmo.language import pick
from hanmo.settings import CommonSettings, argument, option

HELP = "read, check, clean and split texts; report what they are"
HELP_ZH = "读取、检查、清洗、划分文本，并给出报告"


@dataclass
class DataVerbSettings(CommonSettings, DataSettings):
    """Settings of ``hanmo data``."""

    paths: list[str] = argument(
        "files, folders or globs; default: the sources of Python's standard library",
        zh="文件、文件夹或通配符；默认为 Python 标准库源代码",
        many=True,
    )
    out: str = option("data", "folder for the prepared corpus", zh="存放处理结果的文件夹")
    tokenizer: str | None = option(
        None,
        "also write token shards with the tokenizer of this folder or model",
        zh="同时用该文件夹或模型的分词器写出词元",
        metavar="MODEL",
    )


def run(settings: DataVerbSettings) -> Outcome:
    """Prepare the corpus and report it."""
    corpus = prepare_corpus(settings.paths, settings, Path(settings.out))
    data = {"folder": str(corpus.folder), "fingerprint": corpus.fingerprint, "report": corpus.report}
    text = pick(f"prepared corpus: {corpus.folder}", f"处理好的语料：{corpus.folder}")
    if settings.tokenizer:
        from hanmo.inference.loading import load_tokenizer

        tokens = corpus.tokenize(load_tokenizer(settings.tokenizer, offline=settings.offline))
        data["tokens"] = {"folder": str(tokens.folder), **tokens.manifest["report"]}
        text += "\n" + pick(f"tokens: {tokens.folder}", f"词元：{tokens.folder}")
    return Outcome(data, text)
