"""A language model beside its baselines: the uniform bound and a 5-gram model of the same training text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np

from hanmo.data.corpus import Corpus
from hanmo.data.sentences import WordCorpus
from hanmo.data.tokens import TokenCorpus
from hanmo.errors import DataError
from hanmo.evaluation.comparison import Comparison, compare
from hanmo.evaluation.likelihood import Likelihood, Uniform, WindowModel, evaluate_likelihood
from hanmo.evaluation.table import render_table, signature
from hanmo.models.device import available_memory
from hanmo.models.ngram import NGramModel
from hanmo.text.tokenizer import Tokenizer

ORDER = 5
MAX_TOKENS = 400_000  # a larger split is sampled by documents: the interval is narrow enough, and minutes are saved
SAMPLE_SEED = 0
BYTE_ENTRIES = 260  # a vocabulary so small has no merges: the 5-gram model then sees five bytes, and its name says so
NGRAM_BYTES_PER_TOKEN = 80  # at the peak of training (benchmarks/ngram.py)


@dataclass
class Evaluation:
    """Rows of the table (uniform, n-gram, model), the comparison of the last two, and what exactly was measured."""

    rows: list[Likelihood]
    comparison: Comparison
    signature: str

    def describe(self) -> str:
        """The table for people."""
        return render_table(self.rows, [self.comparison], signature=self.signature)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "rows": [row.as_dict() for row in self.rows],
            "comparison": self.comparison.as_dict(),
            "signature": self.signature,
        }


@dataclass
class HeldOut:
    """Documents to score: ids end to end, token offsets ``[n + 1]``, UTF-8 bytes of each ``[n]``."""

    ids: np.ndarray
    spans: np.ndarray
    document_bytes: np.ndarray
    sampled: bool


def held_out(corpus: Corpus, tokens: TokenCorpus, split: str, max_tokens: int = MAX_TOKENS) -> HeldOut:
    """The documents of a split, or a random sample of whole documents of about ``max_tokens`` tokens.

    Raises:
        DataError: the split is empty.
    """
    spans = tokens.document_spans(split)
    if len(spans) < 2:
        raise DataError(
            f"the {split} split is empty",
            where=str(corpus.folder),
            fix=f"prepare the data with --{split}-share 0.05",
            zh=f"{split} 部分为空；请用 --{split}-share 0.05 重新准备数据",
        )
    stored = tokens.tokens(split)
    sizes = np.diff(corpus.offsets(split))
    if spans[-1] <= max_tokens:
        return HeldOut(stored[0 : int(spans[-1])], spans, sizes, sampled=False)
    order = np.random.default_rng(SAMPLE_SEED).permutation(len(sizes))
    lengths = np.diff(spans)
    enough = int(np.searchsorted(np.cumsum(lengths[order]), max_tokens)) + 1
    chosen = np.sort(order[:enough])
    ids = np.concatenate([stored[int(spans[i]) : int(spans[i + 1])] for i in chosen])
    return HeldOut(ids, np.concatenate([[0], np.cumsum(lengths[chosen])]), sizes[chosen], sampled=True)


def train_ngram(tokens: TokenCorpus | WordCorpus, order: int = ORDER) -> tuple[NGramModel, int]:
    """A modified Kneser-Ney model of the training split, and k where memory allows only every k-th document."""
    stored = tokens.tokens("train")
    spans = tokens.document_spans("train")
    every = max(1, -(-len(stored) * NGRAM_BYTES_PER_TOKEN // max(1, available_memory() // 4)))
    documents = (stored[int(start) : int(stop)] for start, stop in islice(pairwise(spans), 0, None, every))
    eos = tokens.eos_id
    return NGramModel.train(documents, order, tokens.vocab_size, bos_id=eos, eos_id=eos), every


def evaluate_with_baselines(
    model: WindowModel, name: str, tokenizer: Tokenizer, corpus: Corpus, tokens: TokenCorpus, split: str
) -> Evaluation:
    """Score a model, a 5-gram model of the same training tokens, and the uniform bound on one split.

    The baseline reads the tokens that the model reads. With larger tokens it sees more text and is often stronger.

    Args:
        model: scores windows of ids.
        name: what it is called in the table.
        tokenizer: the one that made ``tokens``.
        split: ``"test"`` or ``"validation"``.
    """
    documents = held_out(corpus, tokens, split)
    token_bytes = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    ngram, every = train_ngram(tokens)
    title = f"{ORDER}-gram Kneser-Ney" + (" of bytes" if tokens.vocab_size <= BYTE_ENTRIES else "")
    title += f" (1/{every} of the text)" if every > 1 else ""
    candidates: list[tuple[str, WindowModel | NGramModel | Uniform]] = [
        ("uniform", Uniform(tokens.vocab_size)),
        (title, ngram),
        (name, model),
    ]
    rows = [
        evaluate_likelihood(
            candidate,
            documents.ids,
            documents.spans,
            documents.document_bytes,
            name=label,
            token_bytes=token_bytes,
            progress=True,
        )
        for label, candidate in candidates
    ]
    line = signature(
        data=corpus.fingerprint[:12],
        split=split + (f"-sample{SAMPLE_SEED}" if documents.sampled else ""),
        tokenizer=tokens.manifest["tokenizer"][:12],
        window=f"{model.context_length}/stride{model.context_length // 2}",
    )
    return Evaluation(rows, compare(rows[2], rows[1]), line)
