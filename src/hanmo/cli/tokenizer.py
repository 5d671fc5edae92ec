"""``hanmo tokenizer``: train a tokenizer on texts and report how well it fits them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hanmo.cli.outcome import Outcome
from hanmo.cli.road import make_tokenizer, prepare_corpus
from hanmo.data.settings import DataSettings
from hanmo.errors import UsageError
from hanmo.folder import atomic_folder, read_manifest, write_json
from hanmo.language import pick
from hanmo.settings import CommonSettings, Resolution, argument, notice, option
from hanmo.text.settings import TokenizerSettings

if TYPE_CHECKING:
    from hanmo.data.corpus import Corpus
    from hanmo.text.tokenizer import Tokenizer

HELP = "train a tokenizer on texts and report how well it fits them"
HELP_ZH = "在文本上训练分词器，并报告其效果"
REPORT_BYTES = 400_000  # held-out text per language that the report is made from
KIND = "tokenizer"
DEFAULT_REFERENCE = "smollm2-135m-instruct"
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
        zh="与该模型的分词器对比；默认为目录中已下载的模型",
        metavar="MODEL",
    )


def reference_tokenizer(name: str | None, offline: bool) -> tuple[str, Tokenizer] | None:
    """A known tokenizer to compare with: the one named, else the default model's if it was downloaded before."""
    from hanmo.catalog import is_cached
    from hanmo.inference.loading import load_tokenizer

    if name is None and not is_cached(DEFAULT_REFERENCE):
        return None
    name = name or DEFAULT_REFERENCE
    return Path(name).name, load_tokenizer(name, offline=offline)


def refuse_foreign(out: Path) -> None:
    """Never replace a folder that holds anything but a tokenizer of ours.

    Raises:
        UsageError: there is such a folder at ``out``.
    """
    if out.is_dir() and any(out.iterdir()) and read_manifest(out).get("kind") != KIND:
        raise UsageError(
            "this folder holds something else than a tokenizer; it would be lost",
            where=str(out),
            fix="choose an empty or new folder with --out",
            zh="这个文件夹里有其他内容，写入会覆盖它们。请用 --out 另选一个空文件夹",
        )


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
    from hanmo.text.report import REFERENCE, describe, tokenizer_report

    out = Path(settings.out)
    if settings.tokenizer not in ("bpe", "char"):
        raise UsageError(
            "a tokenizer to train is bpe or char",
            where="--tokenizer",
            fix="--tokenizer bpe",
            zh="可训练的分词器为 bpe 或 char",
        )
    refuse_foreign(out)
    corpus = prepare_corpus(settings.paths, settings, out.parent / f"{out.name}-data")
    resolution = Resolution()
    tokenizer = make_tokenizer(corpus, settings, resolution, SIZE)
    if resolution.choices:
        notice(resolution.describe())
    named = reference_tokenizer(settings.reference, settings.offline)
    report = tokenizer_report(tokenizer, held_out_by_language(corpus), named[1] if named else None)
    report["reference"] = named[0] if named else REFERENCE
    with atomic_folder(out, {"kind": KIND, "data": corpus.fingerprint}) as folder:
        tokenizer.save(folder)
        write_json(folder / "report.json", report)
    text = describe(report) + "\n"
    text += pick("reference: ", "对照：") + f"{report['reference']}\n"
    text += pick(f"tokenizer: {out}", f"分词器：{out}")
    return Outcome({"folder": str(out), "vocab_size": tokenizer.vocab_size, "report": report}, text)
