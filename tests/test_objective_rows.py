"""How records become examples: the same rows as in inference, whole words under masks, answers, and bad input."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, trainers

from hanmo.data.prepare import prepare
from hanmo.data.settings import DataSettings
from hanmo.data.tasks import types
from hanmo.errors import DataError, HanmoError, ModelError
from hanmo.inference.encoder import TextEncoder
from hanmo.inference.masking import mask_each
from hanmo.inference.pooling import Pooling
from hanmo.models.heads import HeadConfig
from hanmo.models.transformer import Transformer
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.training import train_bpe, train_char
from hanmo.text.wrapping import wrapping_of
from hanmo.training.objectives.base import IGNORED, Pick
from hanmo.training.objectives.contrastive import Contrastive
from hanmo.training.objectives.extraction import NO_ANSWER, SpanExtraction, locate
from hanmo.training.objectives.masked import MaskedLanguageModeling, Masking, Row, Sentences, Windows
from hanmo.training.objectives.rows import RowMaker
from hanmo.training.objectives.seq2seq import SequenceToSequence, SourceRowMaker
from hanmo.training.objectives.supervised import Classification, Tagging
from hanmo.training.objectives.words import WordMarks, mark_words, with_mask, word_beginnings, words_at

from .objective_cases import (
    CHINESE,
    CRF_TAGS,
    ENGLISH,
    LAST,
    MEAN,
    PLAIN_TAGS,
    SINGLE,
    SPANS,
    Labelled,
    Pair,
    QuestionAnswer,
    Similar,
    Tagged,
    Text,
    bert_tokenizer,
    byte_tokenizer,
    decoder,
    drawn,
    encoder,
    labelled,
    masked_corpus,
    masked_network,
    recurrent,
    seq2seq_network,
    tagged,
    token_corpus,
)

LONG = "The bright moon shines before my bed; 床前明月光，疑是地上霜。" * 6


# The same as in inference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "head", "tokenizer"),
    [(encoder, SINGLE, bert_tokenizer), (decoder, LAST, byte_tokenizer), (recurrent, MEAN, bert_tokenizer)],
)
@torch.no_grad()
def test_texts_score_as_in_inference(make: Callable[..., Any], head: HeadConfig, tokenizer: Any) -> None:
    model = make(head).eval()
    reader = TextEncoder(model, tokenizer(), name="m", max_length=40)
    records = [
        *labelled(9, 3),
        Labelled("", ("good",)),
        Labelled(LONG, ("bad",)),
        Labelled(LONG, ("bad",), "明月" * 40),
    ]
    rows = RowMaker.of(model, tokenizer(), max_length=40, truncate=True)
    data = Classification.prepare(records, rows, head)
    assert data.truncated == 2
    goal = Classification(data, data, head, batch_size=12, micro_batch=12, seed=0)
    batch = goal.collate([Pick(row, ()) for row in data])
    found = goal.scores(model, batch).softmax(-1).numpy()
    expected = reader.predict_proba([r.text if r.pair is None else (r.text, r.pair) for r in records])
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert reader.truncated == 2


@pytest.mark.parametrize(
    ("make", "head", "tokenizer"),
    [
        (encoder, PLAIN_TAGS, bert_tokenizer),
        (encoder, CRF_TAGS, bert_tokenizer),
        (decoder, PLAIN_TAGS, byte_tokenizer),
        (recurrent, CRF_TAGS, bert_tokenizer),
    ],
)
@torch.no_grad()
def test_words_are_read_as_in_inference(make: Callable[..., Any], head: HeadConfig, tokenizer: Any) -> None:
    """The scores that are trained are those that ``tag`` decodes: one for each word, at its first token."""
    model = make(head).eval()
    reader = TextEncoder(model, tokenizer(), name="m")
    records = [*tagged(6, 4), Tagged(("", "明月", "unaffordable", "apartments,"), ("O", "B-X", "I-X", "O"))]
    data = Tagging.prepare(records, RowMaker.of(model, tokenizer()), head)
    goal = Tagging(data, data, batch_size=7, micro_batch=7, seed=0)
    batch = goal.collate([Pick(row, ()) for row in data])
    scores_BWL = goal.scores(model, batch)
    right = 0
    for record, scores_WL in zip(records, scores_BWL, strict=True):
        words, expected = reader._word_scores(record.tokens)
        assert words == list(record.tokens)
        torch.testing.assert_close(scores_WL[: len(words)], expected, rtol=1e-5, atol=1e-5)
        right += sum(label == tag for (_, label), tag in zip(reader.tag(record.tokens), record.tags, strict=True))
    measures = goal.measure(model, batch)
    assert measures["accuracy"] == (right, sum(len(record.tags) for record in records))


@torch.no_grad()
def test_vectors_are_those_of_inference() -> None:
    pooling = Pooling(("first", "mean"), max_length=12, lowercase=True)
    tokenizer = byte_tokenizer()
    model = drawn(Transformer(replace(decoder().config, lm=False))).eval()
    rows = RowMaker.of(model, tokenizer, truncate=True)
    data = Contrastive.prepare([Similar("The Bright", "MOON 明月"), Similar(LONG, "霜")], rows, pooling)
    goal = Contrastive(data, data, pooling=pooling, group=2, seed=0)
    (batch,) = goal.micro_batches(0)
    reader = TextEncoder(model, tokenizer, pooling=pooling)
    expected = reader.embed([LONG if len(row.anchor) > 11 else "The Bright" for row in goal.groups(0)[0]])
    np.testing.assert_allclose(goal.vectors(model, batch.ids, batch.segments).numpy(), expected, atol=2e-6)
    assert data.truncated == 1


@torch.no_grad()
def test_hidden_words_are_seen_as_in_inference() -> None:
    """The loss of one hidden token is what ``pseudo_logprobs`` gives it."""
    model, tokenizer = masked_network().eval(), bert_tokenizer()
    text = "Paris is the capital of France"
    (row,) = Sentences.prepare([Text(text)], RowMaker.of(model, tokenizer))
    place = 3
    ids, targets = row.ids.copy(), np.full(len(row.ids), IGNORED)
    ids[place], targets[place] = tokenizer.mask_id, row.ids[place]
    loss = model.loss(torch.from_numpy(ids).long()[None], torch.from_numpy(targets).long()[None])
    expected = mask_each(TextEncoder(model, tokenizer), text)[place - 1]
    assert math.isclose(-float(loss), float(expected), rel_tol=1e-5)


# Answers -------------------------------------------------------------------------------------------------------------

STORY = (
    "The bright moon shines before my bed. 北京是中国的首都。 Paris is the capital of France, and London of England."
)


def asking(
    answer: str, start: int | None = None, context: str = STORY, question: str = "what?"
) -> types.QuestionAnswer:
    place = context.index(answer) if start is None else start
    return QuestionAnswer("1", context, question, ((answer, place),), "q.json:7")


@pytest.mark.parametrize("make_tokenizer", [bert_tokenizer, byte_tokenizer])
@pytest.mark.parametrize("answer", ["The", "bright moon", "中国", "首都", "France, and London", "England."])
def test_the_tokens_of_an_answer_are_its_text(make_tokenizer: Any, answer: str) -> None:
    tokenizer = make_tokenizer()
    data = SpanExtraction.prepare([asking(answer)], RowMaker(tokenizer, wrapping_of(tokenizer), 400), SPANS)
    (row,) = data
    ((first, last),) = row.spans
    text = tokenizer.decode(row.ids[first : last + 1].tolist()).replace(" ", "")
    exact = answer.replace(" ", "")
    assert text.lower() == exact.lower() if not data.inexact else exact.lower() in text.lower()


def test_long_contexts_are_read_in_the_windows_of_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = encoder(SPANS).eval(), bert_tokenizer()
    reader = TextEncoder(model, tokenizer, max_length=30)
    context = " ".join([*ENGLISH, *CHINESE])
    record = asking("学习模型", context=context)
    seen: list[list[int]] = []
    original = reader.reader.run
    monkeypatch.setattr(
        reader.reader, "run", lambda rows, read: seen.extend(r.ids for r in rows) or original(rows, read)
    )
    reader.answer(record.question, context)
    data = SpanExtraction.prepare([record], RowMaker.of(model, tokenizer, max_length=30), SPANS)
    assert [row.ids.tolist() for row in data] == seen and len(seen) > 4
    holding = [row for row in data if row.spans != (NO_ANSWER,)]
    assert 1 <= len(holding) < len(data)
    for row in holding:
        ((first, last),) = row.spans
        assert tokenizer.decode(row.ids[first : last + 1].tolist()).replace(" ", "") == "学习模型"
    for row in data:  # the first token means that there is no answer, as the reader has it
        assert row.ids[0] == tokenizer.cls_id


def test_answers_that_are_not_there_are_dropped_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    rows = RowMaker(bert_tokenizer(), wrapping_of(bert_tokenizer()), 200)
    records = [
        asking("bright", 0),  # stands elsewhere
        asking("bright", 10_000),
        asking(" ", 3),
        asking("x", 0, context=""),
        asking("ondo"),  # a part of a token or several
        QuestionAnswer("2", STORY, "why?", (), "q.json:9"),
    ]
    data = SpanExtraction.prepare(records, rows, SPANS)
    assert (data.dropped, len(data), data.inexact) == (4, 2, 1)
    assert data[1].spans == (NO_ANSWER,)
    assert data.reasons[0] == "q.json:7: the answer is not where the record says"
    assert "4 records were dropped: q.json:7" in capsys.readouterr().err


def test_any_of_several_answers_is_right() -> None:
    rows = RowMaker(bert_tokenizer(), wrapping_of(bert_tokenizer()), 200)
    record = QuestionAnswer("1", "moon moon moon", "?", (("moon", 5), ("moon", 10), ("moon", 5)))
    data = SpanExtraction.prepare([record], rows, SPANS)
    goal = SpanExtraction(data, data, batch_size=1, micro_batch=1, seed=0)
    batch = goal.collate([Pick(data[0], ())])
    assert batch.answers is not None and batch.answers.shape == (1, 2, 2)
    assert batch.targets.tolist() == [list(data[0].spans[0])] and len(data[0].spans) == 2


def test_locate() -> None:
    offsets = [(0, 1), (1, 3), (3, 3), (3, 8)]
    assert locate("b", 1, "abc defg", offsets) == (1, 1, False)
    assert locate(" defg ", 3, "abc defg ", offsets) == (3, 3, True)
    assert locate("abc", -3, "abc", offsets) is None
    assert locate("g", 8, "abc deffg", offsets) is None  # behind the last token


# Whole words ---------------------------------------------------------------------------------------------------------


def groups_of(tokenizer: Any, text: str) -> list[str]:
    """The characters that are hidden together."""
    _, begins = word_beginnings(tokenizer, text)
    _, offsets = tokenizer.encode_with_offsets(text)
    groups: list[str] = []
    end = 0  # of what is shown; the bytes of a character share its place
    for (start, stop), new in zip(offsets, begins, strict=True):
        groups[len(groups) if new else -1 :] = [("" if new else groups[-1]) + text[max(start, end) : stop]]
        end = max(end, stop)
    return [group.strip() for group in groups if group.strip()]  # a space of its own is no word


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unaffordable apartments, she", ["unaffordable", "apartments", ",", "she"]),
        ("He doesn't mind.", ["He", "doesn't", "mind", "."]),
        ("机器学习模型需要很多数据。", ["机器", "学习", "模型", "需要", "很多", "数据", "。"]),
        ("我们 learn 自然语言", ["我们", "learn", "自然语言"]),
        ("🙂🙂 moon", ["🙂", "🙂", "moon"]),
        ("", []),
    ],
)
def test_tokens_of_a_word_belong_together(text: str, expected: list[str]) -> None:
    assert groups_of(train_bpe([*ENGLISH, "机器"], 270, min_frequency=1), text) == expected
    if "🙂" not in text:  # which it does not know, and takes both for one
        assert groups_of(bert_tokenizer(), text) == expected


def test_a_token_with_parts_of_two_words_joins_them() -> None:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["的数据"] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer = Tokenizer.from_json(made.to_str())
    assert len(tokenizer.encode("的数据")) == 1
    assert words_at("很多的数据").tolist() == [0, 0, 1, 2, 2, -1]
    assert groups_of(tokenizer, "很多的数据") == ["很多", "的数据"]


def rows_of(tokenizer: Any, count: int = 300) -> tuple[Row, Masking]:
    """One long row."""
    ids, begins = token_corpus(tokenizer, 0, count)
    keep = ids != 0
    row = Row(ids[keep].astype(np.int32), np.ones(keep.sum(), np.int32), begins[keep])
    return row, Masking.of(tokenizer)


@pytest.mark.parametrize("make_tokenizer", [bert_tokenizer, byte_tokenizer])
def test_shares_of_masks(make_tokenizer: Any) -> None:
    row, masking = rows_of(make_tokenizer())
    ids, targets = masking(row, (1, 2, 3))
    chosen = targets != IGNORED
    assert abs(chosen.mean() - 0.15) < 0.001
    assert (targets[chosen] == row.ids[chosen]).all() and (ids[~chosen] == row.ids[~chosen]).all()
    hidden, same = (ids == masking.mask_id)[chosen].mean(), (ids == row.ids)[chosen].mean()
    assert abs(hidden - 0.8) < 0.02 and abs(same - 0.1) < 0.015
    assert not masking.is_control[row.ids[chosen]].any()
    random = ids[chosen & (ids != masking.mask_id) & (ids != row.ids)]
    assert not masking.is_control[random].any() and len(np.unique(random)) > 0.5 * masking.vocab_size
    # words as a whole
    words = np.cumsum(row.begins)
    for word in np.unique(words[chosen])[:500]:
        inside = words == word
        assert (chosen | masking.is_control[row.ids])[inside].all()
    by_token = replace(masking, whole_words=False)(row, (1, 2, 3))[1] != IGNORED
    split = [0 < by_token[words == word].mean() < 1 for word in np.unique(words[by_token])[:200]]
    assert any(split) and abs(by_token.mean() - 0.15) < 0.001


def test_short_rows_reach_the_share_on_average() -> None:
    tokenizer = bert_tokenizer()
    (row,) = Sentences.prepare([Text(CHINESE[0] + ENGLISH[0])], RowMaker.of(encoder(), tokenizer, truncate=True))
    counts = [int((Masking.of(tokenizer)(row, (seed,))[1] >= 0).sum()) for seed in range(400)]
    assert abs(np.mean(counts) / (len(row.ids) - 2) - 0.15) < 0.01
    (tiny,) = Sentences.prepare([Text("月")], RowMaker.of(encoder(), tokenizer))
    assert (Masking.of(tokenizer)(tiny, (0,))[1] >= 0).tolist() == [False, True, False]  # one word at least


def test_masks_are_new_in_every_epoch_and_fixed_in_validation() -> None:
    goal = masked_corpus(4)
    epochs = len(goal.train) // goal.batch_size + 1
    seen = {}
    for step in range(2 * epochs):
        for (epoch, index), (ids, _, _) in zip(goal.places(step), [(r, 0, 0) for r in range(8)], strict=True):
            seen.setdefault(epoch, []).append((index, ids))
    assert sorted(index for index, _ in seen[0]) == list(range(len(goal.train)))
    first, again = (list(goal.validation_batches()) for _ in range(2))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))
    row = goal.train.row(0, 3)
    a, b = (goal.masking(row, (3, step, 0))[1] for step in (0, 5))
    assert not np.array_equal(a, b)
    starts = [goal.train.start(epoch, 0) for epoch in range(9)]
    assert len(set(starts)) > 3


def test_documents_of_a_window_are_wrapped_and_apart() -> None:
    tokenizer = bert_tokenizer()
    ids, begins = token_corpus(tokenizer, 0)
    options = {"context": 24, "wrapping": wrapping_of(tokenizer), "separator": 0, "seed": 1}
    rows = Windows(ids, begins, **options)
    for index in range(len(rows)):
        row = rows.row(2, index)
        start = rows.start(2, index)
        inner = ids[start : start + 22]
        assert row.ids[row.ids > 4].tolist() == inner[inner > 4].tolist() and not (row.ids == 0).any()
        for number in np.unique(row.segments):
            part = row.ids[row.segments == number]
            assert part[0] == tokenizer.cls_id and part[-1] == tokenizer.sep_id and 2 < len(part) <= 24
    whole = Windows(ids, begins, shifted=False, **options)
    kept = np.concatenate([whole.row(0, index).ids for index in range(len(whole))])
    assert kept[kept > 4].tolist() == ids[ids > 4].tolist()  # validation covers everything
    with pytest.raises(DataError, match="marks of words"):
        Windows(ids, begins[1:], **options)
    with pytest.raises(DataError, match="no training text"):
        empty = np.zeros(0, np.uint16)
        goal = MaskedLanguageModeling.over_corpus
        goal((empty, empty), (ids, begins), tokenizer, context=24, separator=0, batch_size=1, micro_batch=1, seed=0)


def test_words_of_a_prepared_corpus_are_marked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanmo.data.tokens.BATCH_BYTES", 900)  # so that a document is read in pieces
    book = "\n".join(f"第{number}回 {text}" for number, text in enumerate((CHINESE + ENGLISH) * 30))
    (tmp_path / "a.txt").write_text(book)
    corpus = prepare([tmp_path / "a.txt"], tmp_path / "out", DataSettings(dedup=False))
    tokenizer = with_mask(train_bpe([book], 400))
    tokens = corpus.tokenize(tokenizer)
    marks = mark_words(corpus, tokens, tokenizer, "train")
    expected: list[bool] = []
    for document in corpus.documents("train"):
        expected += [*word_beginnings(tokenizer, document)[1].tolist(), True]
    assert len(marks) == len(expected) == tokens.num_tokens("train")
    assert marks[:].tolist() == expected and 0.2 < np.mean(expected) < 0.99
    for start, stop in ((0, 0), (3, 5), (8, 16), (13, 999_999), (7, 3)):
        assert marks[start:stop].tolist() == expected[start:stop]
    path = tokens.folder / "train.words.npy"
    assert path.stat().st_size < len(expected) / 8 + 200
    stamp = path.stat().st_mtime_ns
    again = mark_words(corpus, type(tokens).open(tokens.folder), tokenizer, "train")
    assert path.stat().st_mtime_ns == stamp and again[:].tolist() == expected
    with pytest.raises(ModelError, match="not those of this corpus"):
        mark_words(corpus, tokens, train_char([book]), "validation")
    goal = MaskedLanguageModeling.over_corpus(
        *((tokens.tokens(split), mark_words(corpus, tokens, tokenizer, split)) for split in ("train", "validation")),
        tokenizer, context=32, separator=tokens.eos_id, batch_size=4, micro_batch=4, seed=0,
    )  # fmt: skip
    (batch,) = goal.micro_batches(0)
    assert batch.ids[0, 0] == tokenizer.cls_id and (batch.ids == tokenizer.mask_id).any()


def test_a_tokenizer_without_a_mask_says_how_to_get_one() -> None:
    for tokenizer in (train_bpe(ENGLISH, 300), train_char(CHINESE)):
        with pytest.raises(ModelError, match="no mask token") as caught:
            Masking.of(tokenizer)
        assert "with_mask" in caught.value.fix and "with_mask" in caught.value.zh
        better = with_mask(tokenizer)
        masking = Masking.of(better)
        assert masking.mask_id == better.vocab_size - 1 == tokenizer.vocab_size + 2
        for text in (*CHINESE, *ENGLISH, "[MASK] [CLS]"):
            assert better.encode(text) == tokenizer.encode(text)
        assert (better.bos_id, better.eos_id, better.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        assert wrapping_of(better).wrap([9]).ids == [better.cls_id, 9, better.sep_id]
        assert with_mask(better).fingerprint == better.fingerprint


def test_masking_is_fast_enough() -> None:
    """A row of 512 tokens must cost far less than its training, even with a large vocabulary."""
    row, masking = rows_of(bert_tokenizer(), 3)
    row = Row(row.ids[:512], row.segments[:512], row.begins[:512])
    masking = replace(masking, vocab_size=150_000)
    masking(row, (0,))
    times = []
    for seed in range(30):
        start = time.perf_counter()
        masking(row, (seed,))
        times.append(time.perf_counter() - start)
    assert min(times) < 2e-3


# Bad input -----------------------------------------------------------------------------------------------------------


def maker(context: int = 16, **options: Any) -> RowMaker:
    return RowMaker(bert_tokenizer(), wrapping_of(bert_tokenizer()), context, **options)


def source_maker(**options: Any) -> SourceRowMaker:
    limits = {"max_source": 12, "max_target": 8}
    return SourceRowMaker.of(seq2seq_network(), byte_tokenizer(), {"decoder_start_token_id": 1}, **limits, **options)


REFUSED: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: Classification.prepare([Labelled(LONG, ("bad",), None, "x:4")], maker(), SINGLE), "x:4", "holds 16"),
    (lambda: Classification.prepare([Labelled("a", ("wrong",), None, "x:5")], maker(), SINGLE), "x:5", "'wrong'"),
    (lambda: Classification.prepare([Labelled("a", (), None, "x:6")], maker(), SINGLE), "x:6", "0 labels, not one"),
    (lambda: Classification.prepare([Labelled("a", ("bad", "good"), None, "x:7")], maker(), SINGLE), "x:7", "2 labels"),
    (lambda: Classification.prepare([Labelled("a\ud800", ("bad",), None, "x:8")], maker(), SINGLE), "x:8", "surrogate"),
    (lambda: Tagging.prepare([Tagged(("a", "b"), ("O",), "t:1")], maker(), PLAIN_TAGS), "t:1", "2 words and 1 labels"),
    (lambda: Tagging.prepare([Tagged(("a",), ("B-Y",), "t:2")], maker(), PLAIN_TAGS), "t:2", "'B-Y' is not"),
    (lambda: Tagging.prepare([Tagged(("moon",) * 20, ("O",) * 20, "t:3")], maker(), PLAIN_TAGS), "t:3", "sentence has"),
    (lambda: Tagging.prepare([Tagged(("\ud800",), ("O",), "t:4")], maker(), PLAIN_TAGS), "t:4", "surrogate"),
    (lambda: SpanExtraction.prepare([asking("The", question=LONG)], maker(40), SPANS), "q.json:7", "question"),
    (lambda: SpanExtraction.prepare([asking("a", context="a\ud800")], maker(40), SPANS), "q.json:7", "surrogate"),
    (lambda: SequenceToSequence.prepare([Pair(LONG, "a", "p:1")], source_maker()), "p:1", "the source has"),
    (lambda: SequenceToSequence.prepare([Pair("a", LONG, "p:2")], source_maker()), "p:2", "the target has"),
    (lambda: SequenceToSequence.prepare([Pair("a", "\ud800", "p:3")], source_maker()), "p:3", "surrogate"),
    (lambda: Contrastive.prepare([Similar("a", LONG, None, "s:1")], maker()), "s:1", "holds 16"),
    (lambda: Contrastive.prepare([Similar("a", "b", None, "s:2", 0.3)], maker()), "s:2", "a score of similarity"),
    (lambda: Sentences.prepare([Text(LONG, "w:1")], maker()), "w:1", "holds 16"),
    (lambda: Sentences.prepare([Text("a\ud800", "w:2")], maker()), "w:2", "surrogate"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "where", "message"), REFUSED)
def test_bad_records_are_refused_with_file_and_line(make: Any, where: str, message: str) -> None:
    with pytest.raises(HanmoError, match=message) as caught:
        make()
    assert caught.value.where == where
    assert caught.value.zh and caught.value.fix


def test_what_is_cut_is_counted_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    cut = maker(truncate=True)
    records = [Tagged(("moon",) * 20, ("O", "B-X") * 10), Tagged(("a" * 90, "b"), ("O", "O")), Tagged(("a",), ("O",))]
    data = Tagging.prepare([*records, Tagged((), (), "t:9")], cut, PLAIN_TAGS)
    assert (data.truncated, data.dropped) == (2, 1)
    assert [len(row.ids) for row in data[:2]] == [16, 16] and all(len(row.ids) <= 16 for row in data)
    assert len(data[0].tags) == len(data[0].places) > 1
    error = capsys.readouterr().err
    assert "2 records are longer than the context" in error and "t:9: no words" in error
    pairs = SequenceToSequence.prepare(
        [Pair(LONG, LONG), Pair("a", "b"), Pair(" ", "b", "p:3")], source_maker(truncate=True)
    )
    assert (pairs.truncated, pairs.dropped, len(pairs)) == (1, 1, 2)
    assert len(pairs[0].source) == 12 and len(pairs[0].inputs) <= 8
    assert 0 not in pairs[0].targets and pairs[1].targets[-1] == 0  # one that was cut has not come to its end
    texts = Sentences.prepare([Text(LONG), Text("\n")], cut)
    assert (texts.truncated, texts.dropped, len(texts[0].ids)) == (1, 1, 16)
    triples = Contrastive.prepare([Similar(LONG, LONG, LONG), Similar("a", "", None, "s:2")], cut)
    assert (triples.truncated, triples.dropped) == (1, 1)  # a record counts once
    scored = [Similar("a", "b", None, "s:3", score) for score in (4.5, 1.0)]
    assert [len(Contrastive.prepare(scored, cut, min_score=least)) for least in (0, 4, 5)] == [2, 1, 0]
    asked = SpanExtraction.prepare([asking("The", question=LONG)], maker(40, truncate=True), SPANS)
    assert asked.truncated == 1 and max(len(row.ids) for row in asked) == 40


def test_what_is_cut_is_told_in_chinese(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANMO_LANG", "zh")
    Sentences.prepare([Text(LONG), Text("")], maker(truncate=True))
    assert "只读取其中一部分" in (error := capsys.readouterr().err) and "舍弃了 1 条记录" in error


def test_rows_without_room_are_refused() -> None:
    with pytest.raises(ModelError, match="no room for a text"):
        RowMaker.of(encoder(), bert_tokenizer(), max_length=4)
    with pytest.raises(ModelError, match="no room for a text"):
        SourceRowMaker.of(seq2seq_network(), byte_tokenizer(), {"decoder_start_token_id": 1}, max_target=2)


def test_marks_are_bits() -> None:
    flags = np.random.default_rng(0).random(37) < 0.5
    marks = WordMarks(np.packbits(flags), 37)
    assert all((marks[a:b] == flags[a:b]).all() for a in range(40) for b in range(40))
