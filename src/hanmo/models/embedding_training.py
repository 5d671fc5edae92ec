"""Training of word vectors: counting words, then gensim's Word2Vec or FastText, or our GloVe."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanmo.errors import DataError, UsageError, missing_package, nearest
from hanmo.language import pick
from hanmo.models import glove
from hanmo.models.embeddings import METHODS, WordVectors
from hanmo.models.subwords import Subwords, choose_buckets, choose_lengths
from hanmo.progress import Progress

LONGEST_SENTENCE = 10_000  # words; gensim silently drops what is beyond
WORDS_TO_SEE = 15_000_000  # by gensim's methods: less text is gone through more often
RATES = {"skipgram": 0.025, "fasttext": 0.025, "cbow": 0.05}  # learning rates of the authors' programs


class Passes:
    """Sentences of a length that gensim takes whole; tells how many words went by in all passes."""

    def __init__(self, sentences: Iterable[Sequence[str]], bar: Progress | None) -> None:
        self.sentences, self.bar, self.seen = sentences, bar, 0

    def __iter__(self) -> Iterator[list[str]]:
        for sentence in self.sentences:
            for begin in range(0, len(sentence), LONGEST_SENTENCE):
                part = list(sentence[begin : begin + LONGEST_SENTENCE])
                yield part
                self.seen += len(part)
                if self.bar:
                    self.bar.update(self.seen)


def train(
    sentences: Iterable[Sequence[str]],
    method: str,
    *,
    size: int,
    window: int | None,
    min_count: int,
    epochs: int | None,
    seed: int,
    threads: int,
    progress: bool,
) -> WordVectors:
    """Learn vectors from text; see :meth:`hanmo.models.embeddings.WordVectors.train`."""
    window = window if window is not None else 10 if method == "glove" else 5
    check(sentences, method, size=size, window=window, min_count=min_count, epochs=epochs, threads=threads)
    start = time.perf_counter()
    words, counts, total = count_words(sentences, min_count)
    counted = time.perf_counter()
    if epochs is None:
        epochs = glove.GloveSettings.epochs if method == "glove" else min(40, max(5, round(WORDS_TO_SEE / total)))
    chosen = {"size": size, "window": window, "epochs": epochs, "seed": seed}
    subwords: Subwords | None = None
    measured: dict[str, Any] = {}
    if method == "glove":
        matrix, measured = train_with_glove(sentences, words, threads=threads, progress=progress, **chosen)
    else:
        matrix, subwords = train_with_gensim(
            sentences, method, words, counts, total, threads=threads, progress=progress, **chosen
        )
    training = {
        **chosen,
        "min_count": min_count,
        "threads": threads,
        "words": total,
        "words_in_vocabulary": int(counts.sum()),
        "seconds_counting": round(counted - start, 3),
        "seconds_training": round(time.perf_counter() - counted, 3),
        **measured,
    }
    return WordVectors(words, matrix, method, counts, subwords, training)


def check(sentences: Iterable[Sequence[str]], method: str, **values: int | None) -> None:
    """Refuse what cannot work, before any text is read.

    Raises:
        UsageError: an unknown method, a value below 1, or sentences that can be read only once.
    """
    if method not in METHODS:
        fix = nearest(method, METHODS)
        raise UsageError(f"there is no method '{method}'", fix=fix, zh=f"没有方法 '{method}'，{fix}")
    for name, value in values.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}, at least 1 is needed", fix=f"{name} 1", zh=f"{name} 至少为 1")
    if iter(sentences) is sentences:
        raise UsageError(
            "the sentences can be read only once, and training reads them several times",
            fix="give a list, or an object whose __iter__ begins anew",
            zh="这些句子只能读一遍，而训练需要多遍；请给出列表，或可重复迭代的对象",
        )


def count_words(sentences: Iterable[Sequence[str]], min_count: int) -> tuple[list[str], NDArray[np.int64], int]:
    """The words that occur often enough, the most frequent first (equal ones in the order of the text), their counts,
    and the number of all words.

    Raises:
        DataError: fewer than two words are left.
    """
    counter: Counter[str] = Counter()
    for sentence in sentences:
        if isinstance(sentence, str):
            raise UsageError(
                "a sentence must be a list of words, not a text",
                fix="cut it first: words_of(text)",
                zh="句子应为词的列表，而不是文本；请先用 words_of(text) 切分",
            )
        counter.update(sentence)
    kept = [(word, count) for word, count in counter.most_common() if count >= min_count]
    if len(kept) < 2:
        raise DataError(
            f"only {len(kept)} of {len(counter)} words occur {min_count} times or more; vectors need at least two",
            fix="give more text, or lower --min-count",
            zh=f"{len(counter)} 个词中只有 {len(kept)} 个出现 {min_count} 次以上；请提供更多文本，或调小 --min-count",
        )
    return [word for word, _ in kept], np.array([count for _, count in kept], dtype=np.int64), counter.total()


def require_packages(method: str) -> None:
    """Find out that a package is missing before any text is read.

    Raises:
        ResourceError: what the method needs is not installed.
    """
    if method == "glove":
        glove.import_sparse()
    else:
        import_gensim(method)


def import_gensim(method: str) -> Any:
    """The module ``gensim.models``.

    Raises:
        ResourceError: gensim is not installed.
    """
    try:
        import gensim.models as models
    except ImportError:
        purpose = pick(f"training {method} vectors", f"训练 {method} 词向量")
        raise missing_package("gensim", "classical", purpose) from None
    return models


def train_with_glove(
    sentences: Iterable[Sequence[str]],
    words: list[str],
    *,
    size: int,
    window: int,
    epochs: int,
    seed: int,
    threads: int,
    progress: bool,
) -> tuple[glove.Floats, dict[str, Any]]:
    """GloVe vectors, and what was measured: the nonzero entries and the loss of the first and the last epoch."""
    rows = {word: row for row, word in enumerate(words)}
    documents = (np.array([rows[word] for word in sentence if word in rows], np.int32) for sentence in sentences)
    counts = glove.cooccurrences(documents, len(words), window)
    bar = Progress("glove", epochs, "epochs") if progress else None

    def tell(epoch: int, loss: float) -> None:
        if bar:
            bar.update(epoch, f"loss {loss:.4f}")

    settings = glove.GloveSettings(size=size, epochs=epochs, seed=seed)
    vectors, losses = glove.train_glove(counts, settings, threads=threads, on_epoch=tell)
    if bar:
        bar.close(f"loss {losses[-1]:.4f}")
    return vectors, {"cooccurrences": int(counts.nnz), "first_loss": losses[0], "last_loss": losses[-1]}


def train_with_gensim(
    sentences: Iterable[Sequence[str]],
    method: str,
    words: list[str],
    counts: NDArray[np.int64],
    total: int,
    *,
    size: int,
    window: int,
    epochs: int,
    seed: int,
    threads: int,
    progress: bool,
) -> tuple[glove.Floats, Subwords | None]:
    """Word2Vec or FastText vectors in the order of ``words``; of FastText also those of the n-grams."""
    gensim = import_gensim(method)
    settings: dict[str, Any] = {
        "vector_size": size,
        "window": window,
        "min_count": 1,  # the words are chosen already
        "epochs": epochs,
        "seed": seed + 1,  # gensim wants a positive one
        "workers": threads,
        "sg": int(method != "cbow"),
        "alpha": RATES[method],
    }
    if method == "fasttext":
        lengths = choose_lengths(words)
        buckets = choose_buckets(words, lengths)
        model = gensim.FastText(min_n=lengths[0], max_n=lengths[1], bucket=buckets, **settings)
    else:
        model = gensim.Word2Vec(**settings)
    bar = Progress(method, total * epochs, "words") if progress else None
    passes = Passes(sentences, bar)
    model.build_vocab_from_freq(dict(zip(words, counts.tolist(), strict=True)))
    # gensim adapts its learning rate to the share of words done; counted before rare ones are left out
    model.train(passes, total_words=total, epochs=epochs)
    if bar:
        bar.close()
    order = [model.wv.key_to_index[word] for word in words]
    matrix = np.ascontiguousarray(model.wv.vectors[order], dtype=np.float32)
    return matrix, Subwords(model.wv.vectors_ngrams, *lengths) if method == "fasttext" else None
