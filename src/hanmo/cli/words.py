"""Word-level corpora: files of one sentence per line, taken as they are, and word perplexity at the end."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.road import Texts, other_recipe
from hanmo.data.settings import DataSettings
from hanmo.errors import DataError, UsageError
from hanmo.folder import read_json, read_manifest, write_json
from hanmo.language import pick
from hanmo.settings import flag, notice

if TYPE_CHECKING:
    from hanmo.data.sentences import WordCorpus
    from hanmo.evaluation.words import WordPerplexity
    from hanmo.text.tokenizer import Tokenizer

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
    try:
        tokenizer = train_words(sentences, vocab_size=vocab_size)
    except DataError as error:
        error.where = error.where or ", ".join(files["train"])  # no line to blame: there are no words
        raise
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


def load_scorer(path: Path, device: str) -> tuple[Any, Tokenizer]:
    """The model of a folder or an ARPA file as something that ``word_perplexity`` takes, and its tokenizer."""
    from hanmo.inference.loading import load
    from hanmo.models.arpa import read_arpa
    from hanmo.models.checkpoints.ngram import MODEL_TYPE, load_ngram
    from hanmo.models.checkpoints.recurrent import load_recurrent
    from hanmo.models.device import choose_device, set_threads
    from hanmo.models.recurrent import CELLS
    from hanmo.text.training import words_tokenizer

    set_threads()
    if path.is_file():
        ngrams, words = read_arpa(path)
        return ngrams, words_tokenizer(words)
    kind = read_json(path / "config.json").get("model_type")
    if kind == MODEL_TYPE:
        return load_ngram(path)
    if kind in CELLS:
        recurrent, tokenizer = load_recurrent(path)
        return recurrent.to(choose_device(device)), tokenizer
    model = load(path, device=device)
    return model, model.tokenizer


def is_word_model(path: Path) -> bool:
    """Whether a path is a model of words: a folder with a tokenizer of words, or an ARPA file."""
    from hanmo.inference.loading import ARPA
    from hanmo.text.tokenizer import Tokenizer

    if path.is_file():
        return bool(ARPA.search(path.name))
    return (path / "tokenizer.json").is_file() and Tokenizer.load(path).is_word_level


def evaluate_run(run: Path, splits: tuple[str, ...], device: str = "auto") -> list[WordPerplexity]:
    """Score the model of a run on the splits that its corpus has, and keep the results with the run."""
    from hanmo.data.sentences import WordCorpus

    corpus = WordCorpus(run / "data", read_manifest(run / "data"))
    model, _ = load_scorer(run / "model", device)
    rows = score_words(model, run.name, corpus, [split for split in splits if split in corpus.report])
    write_json(run / "evaluation.json", {"words": [row.as_dict() for row in rows]})
    return rows


def evaluate_words(path: Path, texts: list[str], out: str | None, *, part: str, device: str) -> list[WordPerplexity]:
    """Score a model of words on files of sentences or, without any, on a split of the run that it is from.

    Args:
        path: a model folder or an ARPA file.
        texts: the files.
        out: where their token ids are kept; without it they are not.

    Raises:
        UsageError: no files, and the run has no such split.
    """
    from hanmo.data.sentences import KIND, WordCorpus, tokenize_sentences

    name = path.parent.name if path.name == "model" else path.name
    if texts:
        label = Path(texts[0]).name if len(texts) == 1 else part
        model, tokenizer = load_scorer(path, device)
        with tempfile.TemporaryDirectory() as scratch:
            corpus = tokenize_sentences({label: texts}, tokenizer, Path(out) if out else Path(scratch) / "data")
            return score_words(model, name, corpus, [label])
    data = path.parent / "data"
    manifest = read_manifest(data) if data.is_dir() else {}
    if path.is_file() or manifest.get("kind") != KIND or part not in manifest["report"]:
        raise UsageError(
            f"there is no {part} file beside this model; give the texts to evaluate on",
            where=str(path),
            fix=f"hanmo evaluate {path} test.txt",
            zh=f"这个模型旁没有 {part} 文件；请给出评测文本：hanmo evaluate {path} test.txt",
        )
    return score_words(load_scorer(path, device)[0], name, WordCorpus(data, manifest), [part])


def score_words(model: Any, name: str, corpus: WordCorpus, splits: list[str]) -> list[WordPerplexity]:
    """The word perplexity of a model on splits of a corpus."""
    from hanmo.evaluation.words import word_perplexity

    return [
        word_perplexity(
            model,
            corpus.tokens(split),
            name=name,
            split=split,
            eos_id=corpus.eos_id,
            counts=corpus.report[split],
        )
        for split in splits
    ]
