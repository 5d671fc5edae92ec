"""The n-gram model: against numbers worked out by hand, against a plain dictionary implementation, and on bad input."""

from __future__ import annotations

import errno
import json
import math
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from hanmo.errors import DataError, ModelError, ResourceError
from hanmo.models import ngram
from hanmo.models.ngram import FALLBACK_DISCOUNTS, FORMAT, NGramModel

SEPARATOR = 0


def train(documents: list[list[int]], order: int, vocab_size: int, **options: Any) -> NGramModel:
    return NGramModel.train(documents, order, vocab_size, bos_id=SEPARATOR, eos_id=SEPARATOR, **options)


class PlainKneserNey:
    """Interpolated modified Kneser-Ney from the formulas of Chen and Goodman (1998), with tuples and dictionaries.

    Written apart from the real one: ``<s>`` and ``</s>`` are two words here, nothing is indexed or sorted.
    """

    def __init__(self, documents: list[list[int]], order: int, num_words: int) -> None:
        self.order, self.num_words = order, num_words
        counts: list[Counter[tuple[Any, ...]]] = [Counter() for _ in range(order + 1)]
        for document in documents:
            sentence = ["<s>", *document, "</s>"]
            for n in range(1, order + 1):
                for begin in range(len(sentence) - n + 1):
                    gram = tuple(sentence[begin : begin + n])
                    if gram != ("<s>",):
                        counts[n][gram] += 1
        self.adjusted: list[dict[tuple[Any, ...], int]] = [{} for _ in range(order + 1)]
        self.adjusted[order] = dict(counts[order])
        for n in range(1, order):
            for gram, count in counts[n].items():
                neighbours = {longer[0] for longer in counts[n + 1] if longer[1:] == gram}
                self.adjusted[n][gram] = count if gram[0] == "<s>" else len(neighbours)
        self.discounts = [self.estimate(list(level.values())) for level in self.adjusted[1:]]

    @staticmethod
    def estimate(counts: list[int]) -> list[float]:
        n = [sum(1 for count in counts if count == k) for k in range(5)]
        if 0 in n[1:4]:
            return list(FALLBACK_DISCOUNTS)
        y = n[1] / (n[1] + 2 * n[2])
        found = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
        return found if all(0 < d <= k for k, d in enumerate(found, start=1)) else list(FALLBACK_DISCOUNTS)

    def probability(self, word: Any, context: tuple[Any, ...]) -> float:
        context = context[max(0, len(context) - self.order + 1) :]
        n = len(context) + 1
        lower = self.probability(word, context[1:]) if context else 1 / self.num_words
        seen = {gram: count for gram, count in self.adjusted[n].items() if gram[:-1] == context}
        total = sum(seen.values())
        if not total:
            return lower
        discount = self.discounts[n - 1]
        left_over = sum(discount[min(count, 3) - 1] for count in seen.values()) / total
        count = seen.get((*context, word), 0)
        own = (count - discount[min(count, 3) - 1]) / total if count else 0.0
        return own + left_over * lower


def test_tiny_corpus_by_hand() -> None:
    # Words: 0 = separator, 1 = a, 2 = b, 3 = c (never seen). Documents: <s> a b </s> and <s> a a </s>.
    # Bigrams: <s>a twice; ab, b</s>, aa, a</s> once.       All orders lack a count of 3, so D = 0.5, 1, 1.5.
    # Different words to the left:  a 2 (<s>, a)   b 1 (a)   </s> 2 (b, a)   c 0;   sum 5.
    # Left to the uniform: (0.5 * 1 + 1 * 2) / 5 = 0.5, that is 0.125 for each of 4 words.
    bigram = train([[1, 2], [1, 1]], 2, 4)
    unigrams = [1 / 5 + 0.125, 1 / 5 + 0.125, 0.5 / 5 + 0.125, 0.125]
    assert np.exp(bigram.tables[0].logprobs) == pytest.approx(unigrams)  # .325 .325 .225 .125
    # After <s>: only a, twice: (2 - 1) / 2 is its own, 1 / 2 goes to the unigrams.
    assert np.exp(bigram.next_logprobs([])) == pytest.approx([0.1625, 0.5 + 0.1625, 0.1125, 0.0625])
    # After a: b, a, </s> once each: (1 - 0.5) / 3 each, and 0.5 goes to the unigrams.
    sixth = 0.5 / 3
    assert np.exp(bigram.next_logprobs([1])) == pytest.approx([sixth + 0.1625, sixth + 0.1625, sixth + 0.1125, 0.0625])
    # After c, never seen: the unigrams.
    assert np.exp(bigram.next_logprobs([3])) == pytest.approx(unigrams)
    # The document "b </s>": P(b|<s>) P(</s>|b), with P(</s>|b) = (1 - 0.5) / 1 + 0.5 * 0.325.
    assert np.exp(bigram.logprobs(np.array([2, 0]))) == pytest.approx([0.1125, 0.6625])
    # Trigrams: for the bigram <s>a the plain count 2 stands in, any other bigram has one left neighbour, so P(b|a) is
    # as above; <s>ab and <s>aa once each: P(b|<s>a) = (1 - 0.5) / 2 + 0.5 * (0.5 / 3 + 0.1125).
    trigram = train([[1, 2], [1, 1]], 3, 4)
    assert math.exp(trigram.next_logprobs([1])[2]) == pytest.approx(0.25 + 0.5 * (sixth + 0.1125))
    assert math.exp(trigram.next_logprobs([])[1]) == pytest.approx(0.6625)


def test_discounts_by_hand() -> None:
    # n1..n4 = 4, 2, 1, 1: Y = 4/8; D1 = 1 - 2 (1/2) (2/4), D2 = 2 - 3 (1/2) (1/2), D3+ = 3 - 4 (1/2) (1/1).
    assert ngram._discounts(np.array([1, 1, 1, 1, 2, 2, 3, 4, 9, 0])) == (0.5, 1.25, 1.0)
    assert ngram._discounts(np.array([1, 2, 4, 5])) == FALLBACK_DISCOUNTS  # no count of 3
    assert ngram._discounts(np.array([1, 2, 3, 3, 3, 3])) == FALLBACK_DISCOUNTS  # D2 would be negative


def test_estimated_discounts_by_hand() -> None:
    # 0 = separator, 1 = a, 2 = b, 3 = c, 4 = d (never seen). Documents: "a", "a b", "a", "b c b".
    # Bigrams: <s>a 3; a</s> 2, b</s> 2; <s>b, ab, bc, cb 1. n1..n4 = 4, 2, 1, 0: Y = 4/8, D = 1/2, 5/4, 3.
    # Left neighbours: b 3 (<s>, a, c); </s> 2 (a, b); a, c 1. n1..n4 = 2, 1, 1, 0: Y = 2/4, D = 1/2, 1/2, 3. Sum 7.
    model = train([[1], [1, 2], [1], [2, 3, 2]], 2, 5)
    assert model.discounts == [(0.5, 0.5, 3.0), (0.5, 1.25, 3.0)]
    # Left to the uniform: (1/2 + 1/2 + 1/2 + 3) / 7 = 9/14, so 9/70 for each of 5 words. The rest of each word:
    # a, c (1 - 1/2) / 7 = 5/70;  b (3 - 3) / 7 = 0;  </s> (2 - 1/2) / 7 = 15/70.
    unigrams = [24 / 70, 14 / 70, 9 / 70, 14 / 70, 9 / 70]
    assert np.exp(model.tables[0].logprobs) == pytest.approx(unigrams, rel=1e-12)
    # After <s>, 4 times: a (3 - 3) / 4 = 0, b (1 - 1/2) / 4 = 1/8; (3 + 1/2) / 4 = 7/8 goes to the unigrams:
    # </s> 7/8 24/70 = 24/80, a 7/8 14/70 = 14/80, b 1/8 + 7/8 9/70 = 19/80, c 14/80, d 9/80.
    assert np.exp(model.next_logprobs([])) == pytest.approx([24 / 80, 14 / 80, 19 / 80, 14 / 80, 9 / 80], rel=1e-12)
    # After a, 3 times: </s> (2 - 5/4) / 3 = 1/4, b (1 - 1/2) / 3 = 1/6; (5/4 + 1/2) / 3 = 7/12 goes to the unigrams:
    # </s> 1/4 + 7/12 24/70 = 9/20, a 7/12 14/70 = 7/60, b 1/6 + 7/12 9/70 = 29/120, c 7/60, d 3/40.
    assert np.exp(model.next_logprobs([1])) == pytest.approx([9 / 20, 7 / 60, 29 / 120, 7 / 60, 3 / 40], rel=1e-12)
    # After b, 3 times, likewise </s> 9/20. The sentence "a b" has P = 14/80 29/120 9/20, and three predictions.
    probability = 14 / 80 * 29 / 120 * 9 / 20
    assert model.perplexity([1, 2, 0]) == pytest.approx(probability ** (-1 / 3), rel=1e-12)
    # Without the unknown word, here b: P(a) and P(</s>), two predictions.
    assert model.perplexity([1, 2, 0], unknown_id=2) == pytest.approx((14 / 80 * 9 / 20) ** (-1 / 2), rel=1e-12)
    with pytest.raises(DataError, match="no words") as caught:
        model.perplexity([2], unknown_id=2)
    assert caught.value.zh


documents_of_words = st.lists(st.lists(st.integers(1, 4), max_size=12), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(documents_of_words, documents_of_words, st.integers(1, 5), st.booleans())
def test_equals_the_plain_implementation(
    documents: list[list[int]], unseen: list[list[int]], order: int, one_separator: bool
) -> None:
    bos = SEPARATOR if one_separator else 6
    model = NGramModel.train(documents, order, 7, bos_id=bos, eos_id=SEPARATOR)
    plain = PlainKneserNey(documents, order, 7 if one_separator else 6)
    assert np.allclose(model.discounts, plain.discounts, rtol=0, atol=1e-12)
    expected = []
    for document in documents + unseen:
        sentence = ["<s>", *document, "</s>"]
        expected += [plain.probability(sentence[t], tuple(sentence[:t])) for t in range(1, len(sentence))]
    stream = np.array([word for document in documents + unseen for word in [*document, SEPARATOR]])
    assert np.allclose(np.exp(model.logprobs(stream)), expected, rtol=0, atol=1e-10)
    for document in unseen[:3]:
        following = np.exp(model.next_logprobs(document))
        assert abs(following.sum() - 1) < 1e-9
        words: list[Any] = ["</s>", 1, 2, 3, 4, 5, 6 if one_separator else None]
        wanted = [plain.probability(word, ("<s>", *document)) if word else 0.0 for word in words]
        assert np.allclose(following, wanted, rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(documents_of_words, st.integers(1, 6), st.booleans())
def test_every_seen_context_gives_a_distribution(documents: list[list[int]], order: int, one_separator: bool) -> None:
    bos = SEPARATOR if one_separator else 6
    model = NGramModel.train(documents, order, 7, bos_id=bos, eos_id=SEPARATOR)
    contexts = {tuple(document[:end]) for document in documents for end in range(len(document) + 1)}
    # A word that no document has makes what stands before it an end: "5 a b" asks for the context "a b".
    contexts |= {(5, *context[begin:]) for context in contexts for begin in range(len(context))}
    for context in contexts:
        assert abs(np.exp(model.next_logprobs(context)).sum() - 1) < 1e-9


def zipf_documents(num_words: int = 3000) -> list[list[int]]:
    """Documents of 1 to 60 words of a skewed vocabulary of 40 with some memory, so that every count occurs."""
    generator = np.random.default_rng(7)
    words = 1 + np.minimum(generator.zipf(1.5, num_words), 39)
    words[1::3] = words[::3][: words[1::3].size] // 2 + 1
    cuts = np.cumsum(generator.integers(1, 60, num_words // 30))
    return [part.tolist() for part in np.split(words, cuts[cuts < num_words])]


def test_estimated_discounts_equal_the_plain_implementation() -> None:
    documents = zipf_documents()
    model, plain = train(documents, 4, 41), PlainKneserNey(documents[:], 4, 41)
    assert sum(discounts != FALLBACK_DISCOUNTS for discounts in model.discounts) >= 3
    assert np.allclose(model.discounts, plain.discounts, rtol=0, atol=1e-12)
    generator = np.random.default_rng(1)
    for _ in range(20):
        document = documents[generator.integers(len(documents))]
        context = [
            *document[: generator.integers(len(document) + 1)],
            *generator.integers(1, 41, generator.integers(2)),
        ]
        word = int(generator.integers(1, 41))
        expected = plain.probability(word, ("<s>", *(int(w) for w in context)))
        assert math.exp(model.next_logprobs(context)[word]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_small_chunks_change_nothing(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = zipf_documents(600)
    whole = train(documents, order, 41)
    stream = np.array([word for document in documents for word in [*document, SEPARATOR]])
    expected = whole.logprobs(stream)
    for chunk_tokens in (1, 7, 100):
        pieces = train(documents, order, 41, chunk_tokens=chunk_tokens)
        for one, other in zip(whole.tables, pieces.tables, strict=True):
            assert (one.keys == other.keys).all() and (one.logprobs == other.logprobs).all()
            assert (one.backoffs == other.backoffs).all()
        monkeypatch.setattr(ngram, "CHUNK_TOKENS", chunk_tokens)
        assert (whole.logprobs(stream) == expected).all()


def test_a_large_vocabulary() -> None:
    # prefix_row * vocab_size + word exceeds 32 bits.
    generator = np.random.default_rng(5)
    top = 200_000
    documents = [(top - generator.integers(1, 9, 12)).tolist() for _ in range(8)]
    model, plain = train(documents, 4, top), PlainKneserNey(documents, 4, top)
    for document in documents:
        expected = [plain.probability(word, ("<s>", *document[:t])) for t, word in enumerate(document)]
        assert np.exp(model.logprobs(document)) == pytest.approx(expected, abs=1e-10)


def test_documents_are_read_once_and_not_kept() -> None:
    texts = [np.array([*document, SEPARATOR]) for document in zipf_documents(2000)]

    def peak(times: int) -> int:
        documents = (document for _ in range(times) for document in texts)
        tracemalloc.start()
        try:
            model = train(documents, 3, 41, chunk_tokens=3000)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            assert model.trained_on["tokens"] == times * sum(text.size for text in texts)

    assert peak(200) < 1.2 * peak(5)  # the same n-grams, 40 times the tokens


def test_stream_documents_and_steps_agree() -> None:
    documents = zipf_documents(600)
    model = train(documents, 3, 41)
    assert model.trained_on == {"tokens": 600 + len(documents), "documents": len(documents)}
    ended = [np.array([*document, SEPARATOR], dtype=np.uint16) for document in documents]
    flat = np.concatenate(ended)
    assert (NGramModel.train([flat], 3, 41, bos_id=0, eos_id=0).logprobs(flat) == model.logprobs(flat)).all()
    in_pieces = NGramModel.train(iter([flat]), 3, 41, bos_id=0, eos_id=0, chunk_tokens=50)
    assert (in_pieces.logprobs(flat) == model.logprobs(flat)).all()
    assert (np.concatenate([model.logprobs(document) for document in ended]) == model.logprobs(flat)).all()
    for t, word in enumerate(ended[0]):
        assert model.next_logprobs(ended[0][:t])[word] == pytest.approx(model.logprobs(ended[0])[t])
    assert (model.next_logprobs(flat[:-1]) == model.next_logprobs(documents[-1])).all()


def test_smallest_cases() -> None:
    assert np.exp(train([[]], 5, 3).next_logprobs([])).sum() == pytest.approx(1)  # only empty documents
    single = train([[1]], 9, 2)  # the order is longer than any document
    assert single.describe()["ngrams"] == [2, 2, 1, 0, 0, 0, 0, 0, 0]
    assert np.exp(single.next_logprobs([1] * 20)).sum() == pytest.approx(1)
    assert single.logprobs(np.zeros(0, dtype=np.int64)).shape == (0,)
    assert np.exp(train([[]], 1, 1).logprobs([0])) == pytest.approx([1])


def test_longer_contexts_help_on_real_text(shared_data: Path) -> None:
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    ids = 1 + np.unique(list(text), return_inverse=True)[1]
    cut = ids.size * 9 // 10
    losses = [-train([ids[:cut]], n, 1 + int(ids.max())).logprobs(ids[cut:]).mean() for n in (1, 2, 3, 5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 3.2 and 1.5 < losses[-1] < 1.75


def test_save_and_load(tmp_path: Path) -> None:
    documents = zipf_documents(600)
    model = train(documents, 4, 41)
    model.save(tmp_path / "lm" / "ngram.safetensors")
    again = NGramModel.load(tmp_path / "lm" / "ngram.safetensors")
    assert again.describe() == model.describe() and (again.bos_id, again.eos_id) == (0, 0)
    stream = np.concatenate([np.array([*document, SEPARATOR]) for document in documents[::-1]])
    assert (again.logprobs(stream) == model.logprobs(stream)).all()
    assert [path.name for path in (tmp_path / "lm").iterdir()] == ["ngram.safetensors"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ngram.safetensors"
    model = train(zipf_documents(600), 3, 41)
    model.save(path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="cannot be read"):
            NGramModel.load(path)
    with pytest.raises(ModelError, match="cannot be read"):
        NGramModel.load(tmp_path / "absent")
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(ModelError, match="not an n-gram model"):
        NGramModel.load(path)


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("2.keys", lambda keys: keys[::-1].copy()),
        ("2.keys", lambda keys: keys + 41 * 41),
        ("3.keys", lambda keys: keys[:-1].copy()),
        ("3.keys", lambda keys: keys.astype(np.float64)),
        ("2.logprobs", lambda values: np.full_like(values, np.nan)),
        ("1.backoffs", lambda values: values + 5),
        ("3.backoffs", lambda _: np.zeros(3)),
        ("1.logprobs", lambda values: values[None].copy()),
    ],
)
def test_tables_that_contradict_one_another_are_refused(tmp_path: Path, tensor: str, change: Any) -> None:
    path = tmp_path / "ngram.safetensors"
    model = train(zipf_documents(600), 3, 41)
    model.save(path)
    config = {**model.describe(), "bos_id": 0, "eos_id": 0}
    tensors = load_file(path)
    save_file(tensors, path, {"format": FORMAT, "config": json.dumps(config)})
    NGramModel.load(path)
    tensors[tensor] = change(tensors[tensor])
    save_file(tensors, path, {"format": FORMAT, "config": json.dumps(config)})
    with pytest.raises(ModelError, match=f"table of {tensor[0]}-grams is not sound"):
        NGramModel.load(path)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ngram.safetensors"
    train([[1, 2]], 2, 4).save(path)
    before = path.read_bytes()

    def full(_tensors: object, target: Path, _metadata: object) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ngram, "save_file", full)
    with pytest.raises(ResourceError, match="No space left"):
        train([[1]], 2, 4).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("documents", "options", "error", "message"),
    [
        ([], {}, DataError, "no documents"),
        ([[1], [2, 9]], {}, DataError, "id 9 at position 3"),
        ([[1, -1]], {}, DataError, "id -1 at position 1"),
        ([[0.5]], {}, DataError, "integer ids"),
        ([[[1, 2]]], {}, DataError, r"shape \(1, 2\)"),
        ([[3, 1]], {"bos_id": 3}, DataError, "contains the document start"),
        ([[1]], {"order": 0}, ModelError, "order 0"),
        ([[1]], {"eos_id": 4}, ModelError, "eos_id 4"),
    ],
)
def test_bad_input(documents: list[Any], options: dict[str, int], error: type[Exception], message: str) -> None:
    arguments = {"order": 2, "vocab_size": 4, "bos_id": 0, "eos_id": 0, **options}
    with pytest.raises(error, match=message):
        NGramModel.train(documents, **arguments)


def test_scoring_foreign_ids_is_refused() -> None:
    model = train([[1, 2]], 2, 4)
    with pytest.raises(DataError, match="id 4 at position 1"):
        model.logprobs([1, 4])
    with pytest.raises(DataError, match="id 7 at position 0"):
        model.next_logprobs([7])


def test_a_separate_document_start_is_never_predicted() -> None:
    model = NGramModel.train([[1, 2], [2]], 3, 4, bos_id=3, eos_id=0)
    assert model.next_logprobs([1])[3] == -math.inf
    # Written out, the start changes nothing for the words after it.
    assert model.logprobs([3, 1, 2, 0])[2:] == pytest.approx(model.logprobs([1, 2, 0])[1:])
