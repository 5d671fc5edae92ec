"""Likelihood: windows by hand, every token once, totals, intervals, paired comparison, and the table."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hanmo.errors import DataError, ModelError, UsageError
from hanmo.evaluation import intervals
from hanmo.evaluation.comparison import compare
from hanmo.evaluation.intervals import bootstrap_sums, percentile_interval
from hanmo.evaluation.likelihood import Likelihood, Uniform, evaluate_likelihood, summarise
from hanmo.evaluation.table import display_width, render_table, signature
from hanmo.evaluation.windows import plan_windows, token_logprobs
from hanmo.models.ngram import NGramModel

Array = NDArray[Any]


class CountingModel:
    """A toy that tells what it saw: minus the number of tokens before (in the window), minus target / 1000."""

    context_length = 4
    start_id = 0

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    def score(self, ids: Array) -> Array:
        self.shapes.append((ids.shape[0], ids.shape[1]))
        assert ids.shape[1] - 1 <= self.context_length
        return -np.arange(1, ids.shape[1])[None] - ids[:, 1:] / 1000


def spans_of(lengths: list[int]) -> Array:
    return np.concatenate([[0], np.cumsum(lengths)])


def test_windows_by_hand() -> None:
    # Context 4, stride 2, a document of 9 tokens: 1-4 from the separator; then two new tokens in each window of four
    # tokens before; the last window is moved back to be full. Tokens before each: 1 2 3 4 | 3 4 | 3 4 | 4.
    model = CountingModel()
    tokens = np.array([11, 12, 13, 21, 22, 23, 24, 25, 26, 27, 28, 29])
    seen = token_logprobs(model.score, tokens, spans_of([3, 9]), start_id=0, context_length=4, stride=2)
    context = [1, 2, 3, 1, 2, 3, 4, 3, 4, 3, 4, 4]
    assert seen == pytest.approx(-np.array(context) - tokens / 1000)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 12), st.data())
def test_every_token_once_with_the_promised_context(lengths: list[int], context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    plan = plan_windows(np.array(lengths), context, stride)
    predicted: list[tuple[int, int]] = []
    for document, begin, first, end in zip(plan.document, plan.begin, plan.first, plan.end, strict=True):
        assert 0 <= begin < first <= end <= lengths[document] and end - begin <= context
        for token in range(first, end + 1):
            predicted.append((int(document), token))
            assert token - begin >= min(token, context - stride + 1)
    wanted = [(document, token) for document, length in enumerate(lengths) for token in range(1, length + 1)]
    assert sorted(predicted) == wanted


def last_three(ids: Array) -> Array:
    """A proper model of the last three tokens of 1..9 and 0: the probabilities of all next tokens sum to one."""
    padded = np.pad(ids[:, :-1], ((0, 0), (3, 0)), constant_values=5)
    hashed = padded[:, 3:] * 7 + padded[:, 2:-1] * 3 + padded[:, 1:-2]
    logits = np.sin(hashed[:, :, None] * 1.7 + np.arange(10) * 2.3)
    logits -= np.log(np.exp(logits).sum(axis=2, keepdims=True))
    picked: Array = np.take_along_axis(logits, ids[:, 1:, None], axis=2)[:, :, 0]
    return picked


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), max_size=30), min_size=1, max_size=9), st.integers(6, 12), st.integers(1, 99)
)
def test_windows_equal_the_whole_document_for_a_short_memory(
    documents: list[list[int]], context: int, batch_tokens: int
) -> None:
    ended = [[*document, 0] for document in documents]
    tokens = np.array([token for document in ended for token in document], dtype=np.uint16)
    spans = spans_of([len(document) for document in ended])
    found = token_logprobs(
        last_three, tokens, spans, start_id=0, context_length=context, stride=3, batch_tokens=batch_tokens
    )
    # Three tokens or more stand before each new token of a window: nothing that the model looks at is cut off.
    whole = [last_three(np.array([[0, *document]]))[0] for document in ended]
    assert np.allclose(found, np.concatenate(whole), rtol=0, atol=1e-12)


def test_short_documents_share_batches() -> None:
    model = CountingModel()
    lengths = [1, 2, 3] * 100
    token_logprobs(
        model.score, np.ones(600, dtype=int), spans_of(lengths), start_id=0, context_length=4, batch_tokens=400
    )
    assert model.shapes == [(100, 4), (133, 3), (67, 2)]


@pytest.mark.parametrize(
    ("score", "options", "error", "message"),
    [
        (lambda ids: np.zeros(ids.shape), {}, ModelError, r"with shape \(1, 4\), not \(1, 3\)"),
        (lambda ids: np.full((len(ids), ids.shape[1] - 1), np.nan), {}, ModelError, "NaN or positive"),
        (lambda ids: np.ones((len(ids), ids.shape[1] - 1)), {}, ModelError, "NaN or positive"),
        (last_three, {"stride": 9}, UsageError, "context 8 and stride 9"),
        (last_three, {"context_length": 0}, UsageError, "context 0"),
    ],
)
def test_models_and_windows_that_cannot_be(score: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        token_logprobs(score, np.array([1, 2, 3]), **{"start_id": 0, "context_length": 8, **options})


def test_totals_by_hand() -> None:
    # Two documents of 2 and 1 tokens and a separator each; 6 and 3 bytes; 2 nats per token.
    result = evaluate_likelihood(
        lambda ids: np.full(len(ids), -2.0), np.array([1, 2, 0, 3, 0]), [0, 3, 5], [6, 3], name="two"
    )
    assert (result.nats, result.tokens, result.bytes, result.documents) == (10.0, 5, 9, 2)
    assert result.loss == 2 and result.perplexity == pytest.approx(math.e**2)
    assert result.bits_per_byte == pytest.approx(10 / math.log(2) / 9)
    assert result.unit == "blocks" and result.units == 1 and result.bits_per_byte_interval is None


def test_every_kind_of_model_is_accepted() -> None:
    documents = [np.array([1, 2, 3, 0]), np.array([0]), np.array([3, 1, 0])]
    tokens, spans, sizes = np.concatenate(documents), spans_of([4, 1, 3]), [3, 0, 2]
    ngram = NGramModel.train(documents, 2, 5, bos_id=0, eos_id=0)

    class Windowed:
        context_length = 3
        start_id = None

        def score(self, ids: Array) -> Array:
            return np.stack([ngram.logprobs(row[1:]) if row[0] == 0 else self.shifted(row) for row in ids])

        def shifted(self, row: Array) -> Array:
            return ngram.logprobs(row)[1:]

    by_stream = evaluate_likelihood(ngram, tokens, spans, sizes, name="stream")
    by_document = evaluate_likelihood(ngram.logprobs, tokens, spans, sizes, name="document")
    by_window = evaluate_likelihood(Windowed(), tokens, spans, sizes, name="window", start_id=0, stride=2)
    assert by_stream.nats == pytest.approx(by_document.nats) == pytest.approx(by_window.nats)
    with pytest.raises(ModelError, match="no document separator"):
        evaluate_likelihood(Windowed(), tokens, spans, sizes, name="window")
    # Documents cut off before their separator: the n-gram model must not read on from one into the next.
    cut = evaluate_likelihood(ngram, np.array([1, 2, 3, 1]), [0, 2, 4], [2, 2], name="cut")
    assert cut.nats == pytest.approx(-ngram.logprobs([1, 2]).sum() - ngram.logprobs([3, 1]).sum())
    # A part of a longer stream.
    part = evaluate_likelihood(ngram, tokens, spans[1:], sizes[1:], name="part")
    assert part.nats == pytest.approx(-ngram.logprobs(tokens[4:]).sum())
    assert evaluate_likelihood(Uniform(5), tokens, spans, sizes, name="uniform").perplexity == pytest.approx(5)


def measured(name: str, nats: Array, sizes: Array, **options: Any) -> Likelihood:
    """One token per document."""
    return summarise(name, -nats, np.arange(nats.size + 1), sizes, **options)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    truth, hits = 2.0 / math.log(2) / 5.5, 0
    for trial in range(200):
        sizes = generator.integers(1, 11, 60)  # 5.5 on average
        result = measured("m", generator.exponential(2.0 * sizes / 5.5), sizes, seed=trial, resamples=400)
        assert result.bits_per_byte_interval is not None
        hits += result.bits_per_byte_interval.low <= truth <= result.bits_per_byte_interval.high
    assert 0.88 <= hits / 200 <= 0.98


def test_bootstrap_is_seeded_bounded_and_centred(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(5, 1, (200, 2))
    sums = bootstrap_sums(values, resamples=500, seed=1)
    assert (sums == bootstrap_sums(values, resamples=500, seed=1)).all()
    assert (sums != bootstrap_sums(values, resamples=500, seed=2)).any()
    assert sums.mean(axis=0) == pytest.approx(values.sum(axis=0), rel=0.01)
    assert sums.std(axis=0) == pytest.approx(values.std(axis=0) * math.sqrt(200), rel=0.15)
    monkeypatch.setattr(intervals, "DRAWS_AT_ONCE", 1000)
    assert (bootstrap_sums(values, resamples=500, seed=1) == sums).all()
    interval = percentile_interval(np.arange(1001.0))
    assert (interval.low, interval.high) == pytest.approx((25, 975))


def test_few_documents_are_resampled_in_blocks() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 4, 50_400)
    spans, sizes = np.array([0, 400, 50_400]), [int(tokens[:400].sum()), int(tokens[400:].sum())]
    nats = tokens * 0.5  # half a nat for each byte of a token: bits per byte do not vary at all
    exact = evaluate_likelihood(lambda ids: -ids * 0.5, tokens, spans, sizes, name="exact", token_bytes=np.arange(4))
    assert exact.unit == "blocks" and exact.units == 50 and exact.unit_bytes.sum() == pytest.approx(sum(sizes))
    interval = exact.bits_per_byte_interval
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((0.5 / math.log(2),) * 2)
    even = summarise("even", -nats, spans, sizes)
    assert even.bits_per_byte == exact.bits_per_byte and even.unit_bytes.sum() == pytest.approx(sum(sizes))
    assert even.bits_per_byte_interval is not None and even.bits_per_byte_interval.low < interval.low


def test_paired_comparison() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(50, 500, 100)
    base = sizes * generator.uniform(0.5, 2.0, 100)  # documents differ much more than the models do
    better, worse = measured("neural", base, sizes), measured("5-gram", base * 1.02, sizes)
    assert better.bits_per_byte_interval is not None and worse.bits_per_byte_interval is not None
    assert better.bits_per_byte_interval.high > worse.bits_per_byte_interval.low  # the intervals overlap ...
    result = compare(better, worse)
    assert result.significant and result.difference == pytest.approx(better.bits_per_byte - worse.bits_per_byte)
    assert result.sentence().startswith("neural is better than 5-gram by 0.0") and "significant" in result.sentence()
    assert compare(worse, better).sentence() == result.sentence()
    noisy = measured("noisy", base * generator.uniform(0.9, 1.1, 100), sizes)
    assert not compare(better, noisy).significant
    assert compare(better, noisy).sentence().startswith("no significant difference between neural and noisy")
    two = compare(measured("a", base[:2], sizes[:2]), measured("b", base[:2] + 9, sizes[:2]))
    assert two.interval is None and not two.significant and "too little text" in two.sentence()


def test_comparison_needs_the_same_documents() -> None:
    sizes = np.arange(10, 50)
    first = measured("a", sizes * 0.5, sizes)
    with pytest.raises(DataError, match="'a' and 'b' were not measured on the same documents"):
        compare(first, measured("b", sizes * 0.5, sizes[::-1]))
    with pytest.raises(DataError, match="not measured on the same"):
        compare(first, measured("b", sizes[1:] * 0.5, sizes[1:]))


@pytest.mark.parametrize(
    ("logprobs", "spans", "sizes", "error", "message"),
    [
        ([], [0], [], DataError, "no text to evaluate on"),
        ([-1.0], [0, 1], [0], DataError, "no text to evaluate on"),
        ([-1.0, -1.0], [0, 1], [3], DataError, "do not fit 1 documents of 1 tokens"),
        ([-1.0], [0, 1], [3, 4], DataError, "2 byte counts do not fit"),
        ([math.nan, -1.0], [0, 2], [3], ModelError, "NaN as the probability of 1 tokens"),
    ],
)
def test_bad_input(logprobs: Any, spans: Any, sizes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        summarise("m", np.array(logprobs), spans, sizes)


def test_an_empty_split_is_told_for_every_kind_of_model() -> None:
    ngram = NGramModel.train([[1, 2]], 2, 4, bos_id=0, eos_id=0)
    for model in (ngram, Uniform(4), CountingModel(), ngram.logprobs):
        for spans in ([0], [0, 0]):
            with pytest.raises(DataError, match="no text to evaluate on"):
                evaluate_likelihood(model, np.zeros(0, dtype=int), spans, [0] * (len(spans) - 1), name="m")


def test_impossible_tokens_give_infinity_not_a_crash() -> None:
    result = summarise("m", np.array([-math.inf, -1.0] * 40), np.arange(81), np.ones(80))
    assert result.perplexity == math.inf and result.bits_per_byte_interval is None


def test_table_in_both_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = np.arange(100, 140)
    rows = [measured("uniform", sizes * 2.0, sizes), measured("5-gram MKN", sizes * 1.0, sizes)]
    line = signature(data="3fa9c1", split="test", tokenizer="77aa", window="256/128")
    assert line.startswith("data:3fa9c1|split:test|tokenizer:77aa|window:256/128|hanmo:")
    text = render_table(rows, [compare(rows[1], rows[0])], signature=line).splitlines()
    assert text[0].split() == ["model", "bits", "per", "byte", "95%", "CI", "perplexity", "nats", "per", "token"]
    assert text[2].split()[:2] == ["uniform", "2.885"] and text[3].startswith("5-gram MKN")
    assert len({display_width(row) for row in text[:4]}) == 1
    assert (
        "40 documents, 4,780 bytes, 40 tokens" in text[4] and "bootstrap over 40 documents, 1,000 resamples" in text[4]
    )
    assert text[5].startswith("5-gram MKN is better than uniform by 1.443 bits per byte") and text[6] == line
    monkeypatch.setenv("HANMO_LANG", "zh")
    chinese = render_table(rows, [compare(rows[1], rows[0])], signature=line).splitlines()
    assert chinese[0].split()[:2] == ["模型", "比特/字节"] and "差异显著" in chinese[5] and "40 篇文档" in chinese[4]
    assert len({display_width(row) for row in chinese[:4]}) == 1
    assert chinese[2].split()[1:] == text[2].split()[1:]


def test_numbers_for_json() -> None:
    sizes = np.arange(100, 140)
    plain = measured("m", sizes * 2.0, sizes).as_dict()
    assert plain["bits_per_byte_interval"] == pytest.approx([2 / math.log(2)] * 2) and plain["units"] == 40


def test_on_real_text_the_order_of_models_is_right(shared_data: Path) -> None:
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    speeches = text.split("\n\n")[:2000]
    alphabet = {char: 1 + index for index, char in enumerate(sorted(set("".join(speeches))))}
    documents = [np.array([*(alphabet[char] for char in speech), 0]) for speech in speeches]
    vocab_size = len(alphabet) + 1
    tokens = np.concatenate(documents[1800:])
    spans = spans_of([len(document) for document in documents[1800:]])
    sizes = [len(speech.encode()) for speech in speeches[1800:]]
    rows = [evaluate_likelihood(Uniform(vocab_size), tokens, spans, sizes, name="uniform")]
    for order in (2, 5):
        model = NGramModel.train(documents[:1800], order, vocab_size, bos_id=0, eos_id=0)
        rows.append(evaluate_likelihood(model, tokens, spans, sizes, name=f"{order}-gram"))
    assert rows[0].loss == pytest.approx(math.log(vocab_size))
    for worse, better in pairwise(rows):
        assert better.bits_per_byte_interval is not None and better.unit == "documents"
        assert better.bits_per_byte_interval.low < better.bits_per_byte < better.bits_per_byte_interval.high
        assert compare(better, worse).significant and better.bits_per_byte < worse.bits_per_byte
