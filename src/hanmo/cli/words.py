"""Word-level corpora: files of one sentence per line, taken as they are, and word perplexity at the end."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.road import Texts, other_recipe
from hanmo.data.settings import DataSettings
from hanmo.errors import UsageError
from hanmo.folder import read_json, read_manifest, write_json
from hanmo.language import pick
from hanmo.settings import flag, notice

if TYPE_CHECKING:
    from hanmo.data.sentences import WordCorpus
    from hanmo.evaluation.words import WordPerplexity

HELD_OUT = ("validation", "test")


def refuse_data_settings(settings: DataSettings) -> None:
    """The files of a word-level corpus are neither cleaned nor divided: say so where that was asked for.

    Raises:
        UsageError: a setting of data preparation was given.
    """
    usual, given = DataSettings().data_record(), settings.data_record()
    changed = [name for name in given if name != "seed" and given[name] != usual[name]]
    if changed:
        raise UsageError(
            f"{flag(changed[0])} means nothing for a word-level corpus",
            why="its files are taken as they are: neither cleaned, nor divided, nor freed from copies",
            fix="leave it out, or choose --tokenizer bpe",
            zh=f"{flag(changed[0])} 对词级语料不起作用：文件按原样使用，不清洗、不划分、不去重。请去掉这个设置",
        )


def read_words(run: Path, files: dict[str, list[str]], vocab_size: int | None, *, unchanged: bool = False) -> Texts:
    """The token ids of a word-level corpus, at ``<run>/data``; the vocabulary is that of the training files.

    Args:
        files: the files of each split.
        vocab_size: keep the most frequent words only.
        unchanged: the corpus that stands there must be of these files; it is never replaced.

    Raises:
        ModelError: ``unchanged``, and the files or the vocabulary differ.
    """
    from hanmo.data.sentences import WordCorpus, read_sentences, tokenize_sentences
    from hanmo.text.training import train_words

    sentences = (sentence.words for sentence in read_sentences(files["train"]))
    tokenizer = train_words(sentences, vocab_size=vocab_size)
    data = run / "data"
    if unchanged and data.is_dir():
        with tempfile.TemporaryDirectory(prefix=".data-", dir=run) as scratch:
            again = tokenize_sentences(files, tokenizer, Path(scratch) / "data")
            tokens = WordCorpus(data, read_manifest(data))
            if again.manifest != tokens.manifest:
                raise other_recipe(run)
    else:
        tokens = tokenize_sentences(files, tokenizer, data)
    vocabulary = pick(f"vocabulary {tokenizer.vocab_size:,}", f"词表 {tokenizer.vocab_size:,}")
    for split, counts in tokens.report.items():
        notice(
            pick(
                f"{split}: {counts['sentences']:,} sentences, {counts['tokens']:,} tokens with their ends, "
                f"{counts['unknown'] / counts['tokens']:.1%} of them <unk>; {vocabulary}",
                f"{split}：{counts['sentences']:,} 句，{counts['tokens']:,} 个词元（含句末），"
                f"其中 <unk> 占 {counts['unknown'] / counts['tokens']:.1%}；{vocabulary}",
            )
        )
    return Texts(None, tokens, tokenizer)


def load_scorer(folder: Path, device: str) -> Any:
    """The model of a folder as something that ``word_perplexity`` takes."""
    from hanmo.inference.loading import load
    from hanmo.models.checkpoints.ngram import MODEL_TYPE, load_ngram
    from hanmo.models.checkpoints.recurrent import load_recurrent
    from hanmo.models.device import choose_device, set_threads
    from hanmo.models.recurrent import CELLS

    kind = read_json(folder / "config.json").get("model_type")
    set_threads()
    if kind == MODEL_TYPE:
        return load_ngram(folder)[0]
    if kind in CELLS:
        return load_recurrent(folder)[0].to(choose_device(device))
    return load(folder, device=device)


def is_word_model(folder: Path) -> bool:
    """Whether a folder holds a model of words."""
    from hanmo.text.tokenizer import Tokenizer

    return (folder / "tokenizer.json").is_file() and Tokenizer.load(folder).is_word_level


def evaluate_run(run: Path, splits: tuple[str, ...], device: str = "auto") -> list[WordPerplexity]:
    """Score the model of a run on the splits that its corpus has, and keep the results with the run."""
    from hanmo.data.sentences import WordCorpus

    corpus = WordCorpus(run / "data", read_manifest(run / "data"))
    rows = score_words(run / "model", corpus, [split for split in splits if split in corpus.report], device)
    write_json(run / "evaluation.json", {"words": [row.as_dict() for row in rows]})
    return rows


def evaluate_words(folder: Path, paths: list[str], out: Path, *, part: str, device: str) -> list[WordPerplexity]:
    """Score a model of words on files of sentences or, without any, on a split of the run that it is from.

    Raises:
        UsageError: no files, and the run has no such split.
    """
    from hanmo.data.sentences import KIND, WordCorpus, tokenize_sentences
    from hanmo.text.tokenizer import Tokenizer

    if paths:
        label = Path(paths[0]).name if len(paths) == 1 else part
        return score_words(folder, tokenize_sentences({label: paths}, Tokenizer.load(folder), out), [label], device)
    data = folder.parent / "data"
    manifest = read_manifest(data) if data.is_dir() else {}
    if manifest.get("kind") != KIND or part not in manifest["report"]:
        raise UsageError(
            f"this run has no {part} file; give the texts to evaluate on",
            where=str(folder),
            fix=f"hanmo evaluate {folder} test.txt",
            zh=f"该运行没有 {part} 文件；请给出评测文本：hanmo evaluate {folder} test.txt",
        )
    return score_words(folder, WordCorpus(data, manifest), [part], device)


def score_words(folder: Path, corpus: WordCorpus, splits: list[str], device: str) -> list[WordPerplexity]:
    """The word perplexity of the model in a folder on splits of a corpus."""
    from hanmo.evaluation.words import word_perplexity

    model = load_scorer(folder, device)
    return [
        word_perplexity(
            model,
            corpus.tokens(split),
            name=folder.parent.name,
            split=split,
            eos_id=corpus.eos_id,
            counts=corpus.report[split],
        )
        for split in splits
    ]
