"""ARPA files: against KenLM's Python module, against the definition of backing off, round trips, and damaged files."""

from __future__ import annotations

import errno
import gzip
import math
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hanmo.errors import ModelError, ResourceError
from hanmo.models import arpa
from hanmo.models.arpa import arpa_word, plain_word, read_arpa, write_arpa
from hanmo.models.ngram import NGramModel
from hanmo.text.training import train_char

LN10 = math.log(10)
Sentence = list[str]

SMALL = """\
\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-99\t<s>\t-0.3
-0.6\t</s>
-1.5\t<unk>
-0.5\t床\t-0.2
-0.4\tb\t-0.1

\\2-grams:
-0.1\t<s> 床
-0.2\t床 <unk>
-0.3\t<unk> b

\\end\\
"""


@pytest.fixture
def kenlm() -> Any:
    return pytest.importorskip("kenlm")


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def encode(sentences: list[Sentence], words: list[str]) -> list[list[int]]:
    """Ids of each sentence, its end included; words that are not known are <unk>."""
    ids = {word: index for index, word in enumerate(words)}
    return [[ids.get(word, ids["<unk>"]) for word in sentence] + [ids["</s>"]] for sentence in sentences]


def log10_scores(model: NGramModel, words: list[str], sentences: list[Sentence]) -> np.ndarray:
    return model.logprobs(np.concatenate(encode(sentences, words))) / LN10


def kenlm_scores(kenlm: Any, path: Path, sentences: list[Sentence]) -> np.ndarray:
    model = kenlm.Model(str(path))
    return np.array([score[0] for sentence in sentences for score in model.full_scores(" ".join(sentence))])


def vocabulary(sentences: list[Sentence], size: int) -> list[str]:
    """</s>, <unk>, the commonest words, and one that no text has."""
    return ["</s>", "<unk>", *(w for w, _ in Counter(w for s in sentences for w in s).most_common(size - 3)), "qwxz"]


# -- the same numbers as KenLM -----------------------------------------------------------------------------------------


def english_sentences(folder: Path, number: int) -> list[Sentence]:
    """Sentences as in the Penn Treebank files: lower case, numbers as N."""
    text = (folder / "gutenberg-nltk" / "bryant-stories.txt").read_text(encoding="utf-8").lower()
    sentences = [re.findall(r"\w+|[^\w\s]", sentence) for sentence in re.split(r"(?<=[.!?])\s+", text)]
    return [["N" if word.isdigit() else word for word in sentence] for sentence in sentences if sentence][:number]


def chinese_sentences(folder: Path, number: int) -> list[Sentence]:
    """Lines of a novel, a character as a word; some of the characters are spaces of full width."""
    lines = (folder / "zh-novels" / "红楼梦.txt").read_text(encoding="utf-8").splitlines()
    return [[arpa_word(character) for character in line] for line in lines if line.strip()][:number]


@pytest.mark.parametrize("language", [english_sentences, chinese_sentences])
@pytest.mark.parametrize("order", [1, 2, 5, 6])
def test_real_text_scores_as_in_kenlm(language: Any, order: int, kenlm: Any, shared_data: Path, tmp_path: Path) -> None:
    sentences = language(shared_data, 600)
    train, test = sentences[::2], [*sentences[1::2], ["qwxz", "从未见过", "the", "的"], []]
    words = vocabulary(train, 1200)
    model = NGramModel.train(encode(train, words), order, len(words), bos_id=0, eos_id=0)
    write_arpa(model, tmp_path / "lm.arpa", [plain_word(word) for word in words])
    ours, theirs = log10_scores(model, words, test), kenlm_scores(kenlm, tmp_path / "lm.arpa", test)
    unknown = np.concatenate(encode(test, words)) == 1
    assert ours.size > 3000 and unknown.sum() > 100
    assert np.abs(ours - theirs).max() < 1e-5
    again, same_words = read_arpa(tmp_path / "lm.arpa")
    assert same_words == [*(plain_word(word) for word in words), "<s>"]
    assert np.abs(log10_scores(again, [arpa_word(word) for word in same_words], test) - ours).max() < 1e-6


def test_perplexity_in_the_manner_of_the_penn_treebank(kenlm: Any, shared_data: Path, tmp_path: Path) -> None:
    # <unk> and N are words of the text, the end of each sentence counts, its start does not.
    sentences = english_sentences(shared_data, 1500)
    common = {word for word, _ in Counter(word for sentence in sentences for word in sentence).most_common(800)}
    sentences = [[word if word in common else "<unk>" for word in sentence] for sentence in sentences]
    train, test = sentences[:1200], sentences[1200:]
    words = ["</s>", *sorted({word for sentence in sentences for word in sentence})]
    assert "<unk>" in words
    model = NGramModel.train(encode(train, words), 5, len(words), bos_id=0, eos_id=0)
    write_arpa(model, tmp_path / "lm.arpa", words)
    theirs = kenlm.Model(str(tmp_path / "lm.arpa"))
    total = sum(theirs.score(" ".join(sentence)) for sentence in test)
    number = sum(len(sentence) + 1 for sentence in test)
    stream = np.concatenate(encode(test, words))
    assert model.perplexity(stream) == pytest.approx(10 ** (-total / number), rel=1e-5)
    assert 20 < model.perplexity(stream) < 200
    one = encode(test[:1], words)[0]
    assert model.perplexity(one) == pytest.approx(theirs.perplexity(" ".join(test[0])), rel=1e-5)
    # Without the unknown words: they stay in the contexts, but are not predicted.
    known = [p for s in test for word, (p, _, _) in zip([*s, "</s>"], theirs.full_scores(" ".join(s)), strict=True)
             if word != "<unk>"]  # fmt: skip
    assert model.perplexity(stream, unknown_id=words.index("<unk>")) == pytest.approx(10 ** -np.mean(known), rel=1e-5)


@pytest.mark.parametrize("one_separator", [True, False])
def test_a_closed_vocabulary_gets_an_impossible_unknown_word(kenlm: Any, tmp_path: Path, one_separator: bool) -> None:
    words = ["", "床", "前", "明", "月", "bos"]
    bos_id = 0 if one_separator else 5
    model = NGramModel.train([[1, 2, 3], [4, 2], []], 3, 6, bos_id=bos_id, eos_id=0)
    write_arpa(model, tmp_path / "lm.arpa", words)
    text = [["床", "前", "光", "前"], [], ["月"]]
    found = kenlm_scores(kenlm, tmp_path / "lm.arpa", text)
    assert -101 < found[2] <= -100  # with the weights of backing off
    again, read_words = read_arpa(tmp_path / "lm.arpa")
    assert np.abs(log10_scores(again, read_words, text) - found).max() < 1e-5
    known = np.array([1, 2, 0, 0, 4, 0])
    assert again.logprobs(known) == pytest.approx(model.logprobs(known), abs=1e-6)
    for context in ([], [1], [1, 2], [4, 2, 3], [2, 2]):
        following = np.exp(again.next_logprobs(context))
        assert following.sum() == pytest.approx(1, abs=1e-6) and following[again.bos_id] == 0


# -- files of other programs -------------------------------------------------------------------------------------------

Grams = dict[tuple[str, ...], tuple[float, float]]


def backed_off(grams: Grams, context: tuple[str, ...], word: str) -> float:
    """log10 P(word | context) from the definition of an ARPA file."""
    if (*context, word) in grams:
        return grams[*context, word][0]
    if not context:
        return -100.0  # <unk>, which the file lacks
    return grams.get(context, (0.0, 0.0))[1] + backed_off(grams, context[1:], word)


WORDS = ["<s>", "</s>", "a", "b", "床"]
log_numbers = st.integers(-300, 0).map(lambda number: number / 100)


@st.composite
def arpa_files(draw: st.DrawFn, *, prefixes: bool) -> tuple[Grams, str]:
    """n-grams as another program could have pruned them, and their file in one of the ways to write it."""
    words = WORDS + (["<unk>"] if draw(st.booleans()) else [])
    order = draw(st.integers(1, 4))
    grams: Grams = {(word,): (draw(log_numbers), draw(log_numbers) if order > 1 else 0.0) for word in words}
    for n in range(2, order + 1):
        chosen = st.tuples(*[st.sampled_from(words)] * n)
        for gram in draw(st.lists(chosen, max_size=8, unique=True)):
            if not prefixes or all(gram[:k] in grams for k in range(1, n)):
                backoff = draw(log_numbers) if n < order and draw(st.booleans()) else 0.0
                grams[gram] = (draw(log_numbers), backoff)
    space = draw(st.sampled_from("\t" if prefixes else "\t "))  # KenLM insists on tabs
    end = draw(st.sampled_from(["\n", "\r\n"]))
    lines = ["\\data\\"]
    lines += [f"ngram {n}={sum(len(gram) == n for gram in grams)}" for n in range(1, order + 1)]
    for n in range(1, order + 1):
        lines += ["", f"\\{n}-grams:"]
        for gram, (log, backoff) in grams.items():
            if len(gram) == n:
                shown = f"{space}{backoff}" if n < order and (backoff or draw(st.booleans())) else ""
                lines.append(f"{log}{space}{' '.join(gram)}{shown}")
    return grams, end.join([*lines, "", "\\end\\", ""])


texts = st.lists(st.lists(st.sampled_from(["a", "b", "床", "zzz"]), max_size=8), min_size=1, max_size=6)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(arpa_files(prefixes=False), texts)
def test_any_file_scores_as_its_definition_says(
    tmp_path: Path, file: tuple[Grams, str], sentences: list[Sentence]
) -> None:
    grams, text = file
    model, words = read_arpa(write_text(tmp_path / "any.arpa", text))
    assert model.bos_id == 0 and model.eos_id == 1 and words == list(dict.fromkeys([*WORDS, "<unk>"]))
    expected = []
    for sentence in sentences:
        known = ["<s>", *(word if word in words else "<unk>" for word in sentence), "</s>"]
        expected += [
            backed_off(grams, tuple(known[max(0, t - model.order + 1) : t]), known[t]) for t in range(1, len(known))
        ]
    stream = np.concatenate(encode(sentences, words))
    found = model.logprobs(stream)
    assert found / LN10 == pytest.approx(expected, abs=1e-9)
    steps = [model.next_logprobs(stream[:t])[word] for t, word in enumerate(stream)]
    assert steps == pytest.approx(found, abs=1e-9)
    model.save(tmp_path / "any.safetensors")
    assert (NGramModel.load(tmp_path / "any.safetensors").logprobs(stream) == found).all()
    write_arpa(model, tmp_path / "again.arpa", words)
    again, same_words = read_arpa(tmp_path / "again.arpa")
    assert same_words == words and again.logprobs(stream) == pytest.approx(found, abs=1e-6)


@quick
@given(arpa_files(prefixes=True), texts)
def test_files_that_kenlm_reads_score_as_there(
    tmp_path: Path, kenlm: Any, file: tuple[Grams, str], sentences: list[Sentence]
) -> None:
    path = write_text(tmp_path / "any.arpa", file[1])
    try:
        theirs = kenlm_scores(kenlm, path, sentences)
    except OSError as error:  # order 1, or more missing suffixes than its hash table has room for
        assert "at least a bigram" in str(error) or "ProbingSize" in str(error)
        return
    model, words = read_arpa(path)
    assert np.abs(log10_scores(model, words, sentences) - theirs).max() < 1e-4


def test_missing_prefixes_are_added_with_the_probability_of_backing_off(tmp_path: Path) -> None:
    text = """\\data\\
ngram 1=4
ngram 2=1
ngram 3=1

\\1-grams:
-99 <s> -0.5
-1 </s>
-0.5 a -0.25
-0.25 b -0.125

\\2-grams:
-0.0625 a b -2

\\3-grams:
-0.03125 <s> b a

\\end\\
"""
    model, words = read_arpa(write_text(tmp_path / "pruned.arpa", text))
    assert words == ["<s>", "</s>", "a", "b", "<unk>"]
    assert [table.keys.tolist() for table in model.tables] == [[0, 1, 2, 3, 4], [0 * 5 + 3, 2 * 5 + 3], [0 * 5 + 2]]
    assert model.tables[1].logprobs / LN10 == pytest.approx([-0.5 - 0.25, -0.0625])  # backoff of <s>, P(b)
    assert model.tables[1].backoffs / LN10 == pytest.approx([0, -2])
    # b: backoff of <s>; a: the 3-gram; b: the 2-gram; </s>: a b -2, b -0.125, and its own -1.
    assert log10_scores(model, words, [["b", "a", "b"]]) == pytest.approx([-0.75, -0.03125, -0.0625, -3.125])
    # "b a" is not listed, "<s> b a" is.
    assert model.next_logprobs([3])[2] / LN10 == pytest.approx(-0.03125)
    assert model.describe()["discounts"] == [] and "ARPA" in model.describe()["smoothing"]


def test_a_known_context_behind_an_unknown_suffix(tmp_path: Path) -> None:
    text = """\\data\\
ngram 1=4
ngram 2=1
ngram 3=1
ngram 4=1

\\1-grams:
-99\t<s>\t-0.5
-1\t</s>
-0.5\ta\t-0.25
-0.25\tb\t-0.125

\\2-grams:
-0.5\t<s> a\t-1

\\3-grams:
-0.75\t<s> a b\t-2

\\4-grams:
-0.375\t<s> a b a

\\end\\
"""
    model, _ = read_arpa(write_text(tmp_path / "pruned.arpa", text))
    following = model.next_logprobs([2, 3]) / LN10  # "a b" is not listed, "<s> a b" is
    assert following[[1, 2, 3]] == pytest.approx([-2 - 0.125 - 1, -0.375, -2 - 0.125 - 0.25])


def test_remarks_before_the_data_zeros_and_other_spaces(tmp_path: Path) -> None:
    odd = SMALL.replace("\\data\\", "made by hand 手写\n\nngram 1=2\n\\data\\").replace("-0.5\t床", "-inf\t\u3000")
    odd = odd.replace("床", "\u3000").replace("<s> \u3000", "<s> \u3000\t0").replace("\n-0.2", "\n\n  -0.2")
    model, words = read_arpa(write_text(tmp_path / "odd.arpa", odd + "\nbehind the end"))
    assert words == ["<s>", "</s>", "<unk>", "\u3000", "b"]
    assert log10_scores(model, words, [["\u3000", "x", "b", "\u3000"]]).tolist() == pytest.approx(
        [-0.1, -0.2, -0.3, -math.inf, -0.8]
    )
    write_arpa(model, tmp_path / "again.arpa", words)
    again, same_words = read_arpa(tmp_path / "again.arpa")
    assert same_words == words and again.logprobs([3, 3])[1] / LN10 == pytest.approx(-99 - 0.2)


def test_positive_backoff_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    model, _ = read_arpa(write_text(tmp_path / "lm.arpa", SMALL.replace("床\t-0.2", "床\t0.2")))
    model.save(tmp_path / "lm.safetensors")
    assert NGramModel.load(tmp_path / "lm.safetensors").logprobs([3, 4])[1] == pytest.approx((0.2 - 0.4) * LN10)


# -- words and files ---------------------------------------------------------------------------------------------------


@given(st.text())
def test_any_word_is_written_without_blanks_and_comes_back(word: str) -> None:
    written = arpa_word(word)
    assert plain_word(written) == word
    assert written and not re.search(r"\s", written) and written.split() == [written]
    written.encode()


def test_words_that_need_no_escape_stay() -> None:
    for word in ("床", "don't", "<0x0A>", "▁the", "Ġthe", "\\n", "50%", "<|endoftext|>", "U+0020", "\u200b"):
        assert arpa_word(word) == word
    assert arpa_word("<|U+0020|>") == "<|U+003C|>|U+0020|>"
    assert arpa_word("\ud800") == "<|U+D800|>"
    assert plain_word("<|U+110000|>") == "<|U+110000|>"  # no such character


def test_reserved_words_of_other_ids_are_escaped(kenlm: Any, tmp_path: Path) -> None:
    words = ["<s>", "</s>", "<|endoftext|>", "<unk>", "<UNK>", "", " ", "a b", "\n", "<|U+0020|>", "\ufeff"]
    model = NGramModel.train([list(range(2)) + list(range(3, 11))], 3, 11, bos_id=2, eos_id=2)
    write_arpa(model, tmp_path / "lm.arpa", words)
    again, read_words = read_arpa(tmp_path / "lm.arpa")
    assert read_words == [*words[:2], "</s>", *words[3:], "<s>"] and (again.bos_id, again.eos_id) == (11, 2)
    ids = np.array([0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 2])
    assert again.logprobs(ids) == pytest.approx(model.logprobs(ids), abs=1e-6)
    shown = [("<|U+003C|>" + word[1:]) if word in ("<s>", "</s>", "<UNK>") else arpa_word(word) for word in words]
    theirs = kenlm_scores(kenlm, tmp_path / "lm.arpa", [[shown[index] for index in ids[:-1]]])
    assert np.abs(theirs - model.logprobs(ids) / LN10).max() < 1e-4


def test_gzip(kenlm: Any, tmp_path: Path) -> None:
    model = NGramModel.train([[1, 2, 1], [2]], 3, 3, bos_id=0, eos_id=0)
    write_arpa(model, tmp_path / "lm.arpa", ["", "床", "前"])
    write_arpa(model, tmp_path / "lm.arpa.gz", ["", "床", "前"])
    plain = (tmp_path / "lm.arpa").read_bytes()
    assert gzip.decompress((tmp_path / "lm.arpa.gz").read_bytes()) == plain
    again, words = read_arpa((tmp_path / "lm.arpa.gz").rename(tmp_path / "renamed"))  # known by its content
    assert words == ["</s>", "床", "前", "<s>", "<unk>"]
    assert again.logprobs([1, 2, 0]) == pytest.approx(model.logprobs([1, 2, 0]), abs=1e-6)
    assert np.abs(kenlm_scores(kenlm, tmp_path / "renamed", [["床"]]) * LN10 - model.logprobs([1, 0])).max() < 1e-4


def test_the_file_by_hand(tmp_path: Path) -> None:
    # The bigram model of test_ngram.test_tiny_corpus_by_hand: <s> a b </s> and <s> a a </s>, c is never seen.
    model = NGramModel.train([[1, 2], [1, 1]], 2, 4, bos_id=0, eos_id=0)
    write_arpa(model, tmp_path / "lm.arpa", ["", "a", "b", "c"])
    lines = (tmp_path / "lm.arpa").read_text().splitlines()
    expected = """\\data\\|ngram 1=6|ngram 2=5||\\1-grams:
        |P.325 </s> 0|P.325 a B.5|P.225 b B.5|P.125 c B1|-99 <s> B.5|-100 <unk> 0||\\2-grams:
        |P.6625 <s> a|P.3291666667 a </s>|P.3291666667 a a|P.2791666667 a b|P.6625 b </s>||\\end\\"""
    wanted = [line.strip() for line in expected.split("|")]
    assert len(lines) == len(wanted)
    for line, pattern in zip(lines, wanted, strict=True):
        for got, want in zip(line.replace("\t", " ").split(" "), pattern.split(" "), strict=True):
            if want[:1] in ("P", "B"):
                assert float(got) == pytest.approx(math.log10(float(want[1:])), abs=1e-7)
            else:
                assert got == want


def test_a_tokenizer_names_the_words(tmp_path: Path) -> None:
    tokenizer = train_char(["床前明月光 疑是地上霜\n"])
    ids = tokenizer.encode("明月光 疑\n")
    eos = tokenizer.eos_id
    assert eos is not None
    size = tokenizer.vocab_size + 2  # a padded vocabulary: two ids have no token
    model = NGramModel.train([ids], 3, size, bos_id=eos, eos_id=eos)
    model.to_arpa(tmp_path / "lm.arpa", tokenizer)
    again, words = NGramModel.from_arpa(tmp_path / "lm.arpa")
    assert [words[index] for index in ids] == list("明月光 疑\n")
    assert words[tokenizer.vocab_size : size] == [f"<|{size - 2}|>", f"<|{size - 1}|>"]
    assert again.next_logprobs(ids[:2])[:size] == pytest.approx(model.next_logprobs(ids[:2]), abs=1e-6)


@pytest.mark.parametrize(
    ("words", "message"), [(["x", "a"], "2 words for an n-gram model of 3 ids"), (["x", "a", "a"], "ids 1 and 2")]
)
def test_words_that_do_not_fit_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    model = NGramModel.train([[1, 2]], 2, 3, bos_id=0, eos_id=0)
    with pytest.raises(ModelError, match=message) as caught:
        write_arpa(model, tmp_path / "lm.arpa", words)
    assert caught.value.zh and not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = NGramModel.train([[1, 2]], 2, 3, bos_id=0, eos_id=0)
    path = write_text(tmp_path / "lm.arpa", "older")

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arpa, "_lines_of", full)
    with pytest.raises(ResourceError, match="No space left"):
        write_arpa(model, path, ["", "a", "b"])
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


# -- damaged and hostile files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("ngram 2=3", "ngram 2=4", 17, "4 2-grams announced, 3 found"),
        ("ngram 2=3", "ngram 2=2", 15, "more 2-grams than the 2 announced"),
        ("ngram 1=5", "ngram 1=4", 10, "more 1-grams than the 4 announced"),
        ("ngram 1=5", "ngram 1=9999999999", 2, "more than the file has room for"),
        ("ngram 2=3", "ngram 2=999999999999999999", 3, "more than the file has room for"),
        ("ngram 2=3", "ngram 2=" + "9" * 40, 3, "expected ngram 2="),
        ("ngram 2=3", "ngram 3=3", 3, "expected ngram 2="),
        ("ngram 2=3", "ngram 2=-3", 3, "expected ngram 2="),
        ("ngram 1=5\nngram 2=3\n", "", 3, "no 1-grams"),
        ("\\2-grams:", "\\3-grams:", 12, r"expected \\2-grams:"),
        ("-0.4\tb", "minus\tb", 10, "not a number"),
        ("b\t-0.1", "b\tnone", 10, "not a number"),
        ("b\t-0.1", "b\tnan", 10, "a backoff weight that is no number"),
        ("b\t-0.1", "b\tinf", 10, "a backoff weight that is no number"),
        ("-0.2\t床 <unk>", "0.2\t床 <unk>", 14, "above 0"),
        ("-0.2\t床 <unk>", "nan\t床 <unk>", 14, "above 0"),
        ("床 <unk>", "床 c", 14, "'c' is not among the 1-grams"),
        ("床 <unk>", "<s> 床", 14, "the same 2-gram twice"),
        ("床 <unk>", "床 <unk> -0.5", 14, "a backoff weight in the highest order"),
        ("床 <unk>", "床", 14, "2 fields"),
        ("床 <unk>", "床 床 床 床", 14, "5 fields"),
        ("-0.4\tb", "-0.4\t床", 10, "the 1-gram '床' twice"),
        ("-99\t<s>", "-99\tx", 12, "no <s> among"),
        ("-0.6\t</s>", "-0.6\tx", 12, "no </s> among"),
        ("\\end\\", "", 17, "truncated"),
        ("\\end\\", "\\3-grams:", 17, r"expected \\end\\"),
        ("\\data\\", "data", 17, r"no \\data\\"),
        ("\\data\\", "\n" * 1000 + "\\data\\", 1000, r"no \\data\\ in the first 1000 lines"),
        ("b\t-0.1", "b" * 2**20, 10, "a line longer than"),
    ],
)
def test_malformed_files_are_refused_with_their_line(
    tmp_path: Path, old: str, new: str, line: int, message: str
) -> None:
    assert SMALL.count(old) == 1
    path = write_text(tmp_path / "lm.arpa", SMALL.replace(old, new))
    with pytest.raises(ModelError, match=message) as caught:
        read_arpa(path)
    assert caught.value.where == f"{path}:{line}" and caught.value.zh


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = SMALL.encode()
    assert read_arpa(write_text(tmp_path / "lm.arpa", SMALL.strip()))[0].order == 2
    packed = gzip.compress(whole)
    path = tmp_path / "cut.arpa"
    for size in range(len(whole) - 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="not a sound ARPA file"):
            read_arpa(path)
    for size in range(2, len(packed), 7):
        path.write_bytes(packed[:size])
        with pytest.raises(ModelError, match="cannot be read"):
            read_arpa(path)
    with pytest.raises(ModelError, match="cannot be read"):
        read_arpa(tmp_path / "absent.arpa")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(SMALL.encode()) - 1), st.binary(min_size=1, max_size=3))
def test_altered_bytes_give_a_model_or_an_error(tmp_path: Path, at: int, put: bytes) -> None:
    whole = SMALL.encode()
    path = tmp_path / "lm.arpa"
    path.write_bytes(whole[:at] + put + whole[at + len(put) :])
    try:
        model, words = read_arpa(path)
    except ModelError as error:
        assert error.where.startswith(str(path))
    else:
        assert not np.isnan(model.logprobs(np.arange(len(words)))).any()


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lm.arpa"
    path.write_bytes(SMALL.encode("gbk"))
    with pytest.raises(ModelError, match="not UTF-8") as caught:
        read_arpa(path)
    assert caught.value.where == f"{path}:9"


def test_a_model_larger_than_the_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hanmo.models.device", SimpleNamespace(available_memory=lambda: 10**9))
    head = "\\data\\\nngram 1=20000000\n\n\\1-grams:\n"
    path = tmp_path / "lm.arpa.gz"
    path.write_bytes(gzip.compress(head.encode() + b"\n" * 10**6))  # gzip could hide that many
    with pytest.raises(ModelError, match="more than the file has room for"):
        read_arpa(path)
    path.write_bytes(gzip.compress(head.encode()) + bytes(100_000))
    with pytest.raises(ResourceError, match=r"needs about 2.0 GB of memory, and 1.0 GB are free") as caught:
        read_arpa(path)
    assert caught.value.zh
