"""``hanmo pretrain --architecture ngram``: n-grams are counted, not trained in steps; the rest is the same road."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.fitting import provenance_of
from hanmo.cli.road import RoadSettings, Texts, clear_run, make_tokenizer, prepare_corpus, versions
from hanmo.folder import write_json
from hanmo.language import pick
from hanmo.progress import human_bytes, human_time
from hanmo.settings import Resolution, notice

if TYPE_CHECKING:
    from hanmo.models.ngram import NGramModel

SIZE = "small"  # whose vocabulary suits: an n-gram model has no size of its own


@dataclass
class CountedRun:
    """What counting leaves: the folder of the run, its texts, the model, and how it ended."""

    run: Path
    texts: Texts
    model: NGramModel
    seconds: float

    @property
    def model_folder(self) -> Path:
        """Where the model lies."""
        return self.run / "model"


def count_run(
    run: Path, paths: list[str], settings: RoadSettings, words: dict[str, list[str]] | None = None
) -> CountedRun:
    """Data, tokenizer and counts; ends with the model folder at ``<run>/model``. Arguments as in ``train_run``."""
    from hanmo.cli.words import read_words
    from hanmo.evaluation.baselines import ORDER, train_ngram
    from hanmo.models.checkpoints.ngram import save_ngram

    resolution = Resolution()
    if words is None:
        corpus = prepare_corpus(paths, settings, run / "data")
        tokenizer = make_tokenizer(corpus, settings, resolution, SIZE)
        texts = Texts(corpus, corpus.tokenize(tokenizer), tokenizer)
    else:
        texts = read_words(run, words, settings.vocab_size)
    resolution.compute(settings, "order", ORDER, pick("the usual", "惯例"))
    assert settings.order is not None
    if resolution.choices:
        notice(pick("settings that were computed:", "自动选择的设置：") + "\n" + resolution.describe())
    record: dict[str, Any] = {**resolution.record(settings), **versions()}
    clear_run(run)
    write_json(run / "settings.json", record)
    start = time.monotonic()
    model, every = train_ngram(texts.tokens, settings.order)
    seconds = time.monotonic() - start
    share = pick(f", of every {every}th document for want of memory", f"（内存所限，每 {every} 篇取一篇）")
    notice(
        pick(
            f"{sum(model.describe()['ngrams']):,} n-grams, {human_bytes(model.nbytes)}, in {human_time(seconds)}",
            f"{sum(model.describe()['ngrams']):,} 个 n 元组，{human_bytes(model.nbytes)}，用时 {human_time(seconds)}",
        )
        + (share if every > 1 else "")
    )
    provenance = provenance_of(texts, record, {"tokens": model.trained_on.get("tokens", 0)})
    save_ngram(run / "model", model, texts.tokenizer, provenance)
    return CountedRun(run, texts, model, seconds)


def describe_heldout(counted: CountedRun) -> tuple[dict[str, Any], str]:
    """How well the model predicts the validation split of an ordinary corpus: plain data, and a line."""
    from hanmo.data.tokens import TokenCorpus
    from hanmo.evaluation.baselines import held_out
    from hanmo.evaluation.likelihood import evaluate_likelihood

    corpus, tokens = counted.texts.corpus, counted.texts.tokens
    assert corpus is not None and isinstance(tokens, TokenCorpus)
    documents = held_out(corpus, tokens, "validation")
    score = evaluate_likelihood(
        counted.model, documents.ids, documents.spans, documents.document_bytes, name=counted.run.name
    )
    line = pick(
        f"validation: {score.bits_per_byte:.3f} bits per byte, {score.loss:.4f} nats per token",
        f"验证：{score.bits_per_byte:.3f} 比特/字节，{score.loss:.4f} 纳特/词元",
    )
    return score.as_dict(), line
