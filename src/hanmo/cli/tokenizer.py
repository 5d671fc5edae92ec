"""``hanmo tokenizer``: train a tokenizer on texts and report how well it fits them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.outcome import Outcome
from hanmo.cli.road import make_tokenizer, prepare_corpus
from hanmo.data.settings import DataSettings
from hanmo.errors import UsageError
from hanmo.folder import atomic_folder, write_json
from hanmo.language import pick
from hanmo.settings import CommonSettings, Resolution, argument, notice, option
from hanmo.text.settings import TokenizerSettings

if TYPE_CHECKING:
    from hanmo.data.corpus import Corpus
    from hanmo.text.tokenizer import Tokenizer

HELP = "train a tokenizer on texts and report how well it fits them"
HELP_ZH = "在文本上训练分词器，并报告其效果"
REPORT_BYTES = 400_000  # held-out text per language that the report is made from
SIZE = "small"  # without a model in sight, the vocabulary suits a small one


@dataclass
class TokenizerVerbSettings(CommonSettings, DataSettings, TokenizerSettings):
    """Settings of ``hanmo tokenizer``."""

    paths: list[str] = argument(
        "files, folders or globs, or a folder that 'hanmo data' wrote",
        zh="文件、文件夹、通配符，或 hanmo data 的输出",
        many=True,
    )
    out: str = option("tokenizer", "folder for the tokenizer", zh="存放分词器的文件夹")
    reference: str | None = option(
        None,
        "compare with this model's tokenizer; default: the catalog's model if it is there",
        zh="对比用的分词器",
        metavar="FOLDER",
    )


def reference_tokenizer(name: str | None) -> tuple[str, Tokenizer] | None:
    """A known tokenizer to compare with: the one named, else the default model's if it was downloaded before."""
    from hanmo.catalog import cached
    from hanmo.text.tokenizer import Tokenizer

    if name:
        return Path(name).name, Tokenizer.load(name)
    path = cached("smollm2-135m-instruct")
    if path is None:
        return None
    from hanmo.models.checkpoints.reading import read_tokenizer

    return "SmolLM2-135M", read_tokenizer(path)


def held_out_by_language(corpus: Corpus) -> dict[str, list[str]]:
    """Some held-out documents of each language."""
    from hanmo.text.language import identify

    texts: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    split = "test" if corpus.num_documents("test") else "validation"
    for document in corpus.documents(split if corpus.num_documents(split) else "train"):
        language = identify(document)
        if sizes.get(language, 0) < REPORT_BYTES:
            texts.setdefault(language, []).append(document)
            sizes[language] = sizes.get(language, 0) + len(document.encode())
    return texts


def run(settings: TokenizerVerbSettings) -> Outcome:
    """Train, save and report."""
    from hanmo.text.report import describe, tokenizer_report

    out = Path(settings.out)
    if settings.tokenizer not in ("bpe", "char"):
        raise UsageError("a tokenizer to train is bpe or char", where="--tokenizer", fix="--tokenizer bpe")
    corpus = prepare_corpus(settings.paths, settings, out.parent / f"{out.name}-data")
    resolution = Resolution()
    tokenizer = make_tokenizer(corpus, settings, resolution, SIZE)
    if resolution.choices:
        notice(resolution.describe())
    report: dict[str, Any] = tokenizer_report(
        tokenizer, held_out_by_language(corpus), reference_tokenizer(settings.reference)
    )
    with atomic_folder(out, {"kind": "tokenizer", "data": corpus.fingerprint}) as folder:
        tokenizer.save(folder)
        write_json(folder / "report.json", report)
    text = describe(report) + "\n" + pick(f"tokenizer: {out}", f"分词器：{out}")
    return Outcome({"folder": str(out), "vocab_size": tokenizer.vocab_size, "report": report}, text)
