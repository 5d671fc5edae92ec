"""Word vectors: training, look-ups, files that travel, scores, and the verb."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from hanmo.cli.main import main
from hanmo.errors import DataError, HanmoError, ModelError, ResourceError, UsageError
from hanmo.evaluation.vectors import correlation, evaluate_analogies, evaluate_similarity, is_analogies, ranks
from hanmo.models import glove
from hanmo.models.embeddings import METHODS, WordVectors, open_vectors, words_of
from hanmo.models.subwords import Subwords, choose_buckets, choose_lengths, fnv_hash, ngrams

KeyedVectors = pytest.importorskip("gensim.models").KeyedVectors

# words of one group stand in the same contexts, and only there
GROUPS = {
    "en": [
        (["cat", "dog", "horse", "rabbit"], ["fur", "paw", "tail", "ears", "whiskers"]),
        (["car", "truck", "bus", "tram"], ["wheel", "engine", "road", "driver", "fuel"]),
        (["king", "queen", "prince", "duke"], ["crown", "palace", "throne", "realm", "court"]),
    ],
    "zh": [
        (["猫", "狗", "马", "兔子"], ["皮毛", "爪子", "尾巴", "耳朵", "胡须"]),
        (["汽车", "卡车", "公交车", "电车"], ["车轮", "引擎", "公路", "司机", "汽油"]),
        (["国王", "女王", "王子", "公爵"], ["王冠", "宫殿", "宝座", "国土", "朝廷"]),
    ],
}


def synthetic(language: str, sentences: int = 900) -> list[list[str]]:
    """Sentences such as 'fur cat tail paw'."""
    generator = random.Random(7)
    made = []
    for _ in range(sentences):
        names, contexts = generator.choice(GROUPS[language])
        made.append([*generator.sample(contexts, 2), generator.choice(names), *generator.sample(contexts, 2)])
    return made


def small(rows: int = 40, size: int = 7, seed: int = 0) -> WordVectors:
    """Random vectors of Chinese and English words."""
    words = [f"word{row}" if row % 2 else f"词{row}号" for row in range(rows)]
    matrix = np.random.default_rng(seed).normal(size=(rows, size)).astype(np.float32)
    return WordVectors(words, matrix, counts=np.arange(rows, 0, -1, dtype=np.int64))


def brute_counts(documents: list[list[int]], num_words: int, window: int) -> np.ndarray:
    """Co-occurrences by the definition."""
    counts = np.zeros((num_words, num_words))
    for document in documents:
        for i, left in enumerate(document):
            for j in range(i + 1, min(i + window + 1, len(document))):
                counts[left, document[j]] += 1 / (j - i)
                counts[document[j], left] += 1 / (j - i)
    return counts


# --- GloVe ---


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 5), max_size=30), max_size=6),
    window=st.integers(1, 6),
    chunk=st.integers(1, 20),
)
def test_cooccurrences_follow_the_definition_whatever_the_chunks(documents, window, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glove, "CHUNK_WORDS", chunk)
        counts = glove.cooccurrences([np.array(d, dtype=np.int32) for d in documents], 6, window)
    np.testing.assert_allclose(counts.toarray(), brute_counts(documents, 6, window), rtol=1e-5)


def glove_case(num_words: int = 12, size: int = 4):
    """A small count matrix, its only tile, and factors."""
    generator = np.random.default_rng(3)
    documents = [generator.integers(num_words, size=50).astype(np.int32) for _ in range(5)]
    counts = glove.cooccurrences(documents, num_words, 3)
    options = glove.GloveSettings(size=size, x_max=2.0)
    tile = glove.make_tile(counts, slice(0, num_words), slice(0, num_words), options)
    factors = glove.Factors.random(num_words, size, generator)
    return counts, options, tile, factors


def test_loss_and_gradients_are_those_of_autograd():
    counts, options, tile, factors = glove_case()
    loss, row_gradients, column_gradients = glove.gradients(factors, tile)
    w, b = (torch.tensor(part, requires_grad=True) for part in (factors.rows[:, :4], factors.rows[:, 4]))
    c, d = (torch.tensor(part, requires_grad=True) for part in (factors.columns[:, :4], factors.columns[:, 5]))
    total = torch.zeros(())
    for i, j in zip(*counts.nonzero(), strict=True):
        x = float(counts[i, j])
        weight = min(1.0, (x / options.x_max) ** options.alpha)
        total = total + weight * (w[i] @ c[j] + b[i] + d[j] - np.log(x)) ** 2
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    np.testing.assert_allclose(row_gradients[:, :4], w.grad, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(row_gradients[:, 4], b.grad, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(column_gradients[:, :4], c.grad, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(column_gradients[:, 5], d.grad, rtol=1e-4, atol=1e-4)
    assert not row_gradients[:, 5].any() and not column_gradients[:, 4].any()  # the constant ones stay ones


def test_a_step_is_an_adagrad_step_with_collisions_summed():
    _, _, tile, factors = glove_case()
    before = factors.rows.copy()
    squares = glove.Factors(np.ones_like(factors.rows), np.ones_like(factors.columns))
    _, row_gradients, _ = glove.gradients(factors, tile)
    glove.adagrad_step(factors, squares, tile, 0.05)
    expected = before - 0.05 * row_gradients / np.sqrt(1 + row_gradients**2)
    np.testing.assert_allclose(factors.rows, expected, rtol=1e-5, atol=1e-6)


def test_tiles_hold_every_entry_once():
    counts, options, _, _ = glove_case()
    order, tiles = glove.cut_tiles(counts, 5, options, np.random.default_rng(0))
    rebuilt = np.zeros(counts.shape)
    for tile in (tile for band in tiles for tile in band):
        rows, columns = order[tile.row_slice][tile.rows], order[tile.column_slice][tile.columns]
        assert not rebuilt[rows, columns].any()
        rebuilt[rows, columns] = np.exp(tile.targets)
    np.testing.assert_allclose(rebuilt, counts.toarray(), rtol=1e-5)


def test_glove_fits_the_counts_and_threads_change_nothing():
    sentences = synthetic("en", 300)
    words = sorted({word for sentence in sentences for word in sentence})
    ids = [np.array([words.index(word) for word in sentence], np.int32) for sentence in sentences]
    counts = glove.cooccurrences(ids, len(words), 5)
    options = glove.GloveSettings(size=10, epochs=12)
    one, losses = glove.train_glove(counts, options)
    two, _ = glove.train_glove(counts, options, threads=3)
    assert np.array_equal(one, two)
    assert losses[-1] < losses[0] / 20 and all(later < sooner for sooner, later in pairwise(losses))


def test_glove_needs_a_pair_of_words():
    with pytest.raises(DataError, match="near each other"):
        WordVectors.train([["a"], ["b"]] * 5, "glove")


# --- training, all methods ---


@pytest.mark.parametrize("language", GROUPS)
@pytest.mark.parametrize("method", METHODS)
def test_neighbours_are_the_words_of_the_same_group(method, language):
    vectors = WordVectors.train(synthetic(language), method, size=16, epochs=30, threads=1, window=3)
    assert vectors.method == method and len(vectors) == 27 and vectors.counts.sum() == 900 * 5
    for names, contexts in GROUPS[language]:
        for name in names:
            # to stand near is to be alike here: the words of the group, names or contexts, come first
            found = {word for word, _ in vectors.nearest(name, 3)}
            assert found <= {*names, *contexts}, (name, found)


def test_training_repeats_itself():
    for method in ("skipgram", "glove"):
        one, two = (WordVectors.train(synthetic("en", 100), method, size=5, epochs=2, threads=1) for _ in range(2))
        other = WordVectors.train(synthetic("en", 100), method, size=5, epochs=2, threads=1, seed=1)
        assert np.array_equal(one.matrix, two.matrix) and not np.allclose(one.matrix, other.matrix)


def test_rare_words_are_left_out_and_long_sentences_are_read_to_their_end():
    sentence = ["early", "word"] * 6000 + ["late", "word"] * 10 + ["rare"]
    vectors = WordVectors.train([sentence], "cbow", size=4, epochs=1, threads=1, min_count=5)
    assert vectors.words == ["word", "early", "late"] and vectors.counts.tolist() == [6010, 6000, 10]
    untrained = WordVectors.train([sentence[:12000] + ["late"] * 10], "cbow", size=4, epochs=1, threads=1, min_count=5)
    assert not np.allclose(vectors.vector("late"), untrained.vector("late"), atol=1e-4)


@pytest.mark.parametrize(
    ("sentences", "options", "error", "says"),
    [
        ([["a", "b"]], {"method": "glov"}, UsageError, "did you mean 'glove'"),
        ([["a", "b"]], {"size": 0}, UsageError, "size is 0"),
        ([["a", "b"]], {"epochs": 0}, UsageError, "epochs is 0"),
        (iter([["a", "b"]]), {}, UsageError, "only once"),
        (["a text"], {}, UsageError, "list of words"),
        ([["a", "b"]], {}, DataError, "only 0 of 2 words occur 5 times"),
        ([], {}, DataError, "lower --min-count"),
    ],
)
def test_training_refuses_what_cannot_work(sentences, options, error, says, monkeypatch):
    with pytest.raises(error) as caught:
        WordVectors.train(sentences, **options)
    assert says in str(caught.value)
    monkeypatch.setenv("HANMO_LANG", "zh")
    assert any("\u4e00" <= letter <= "\u9fff" for letter in str(caught.value))


def test_without_the_packages_the_fix_is_told(monkeypatch):
    for package, method in (("gensim.models", "cbow"), ("scipy", "glove")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ResourceError, match=r"hanmo\[classical\]"):
            WordVectors.train([["a", "b"]] * 9, method, threads=1)


# --- look-ups ---


def test_nearest_is_the_plain_definition():
    vectors = small()
    units = vectors.matrix / np.linalg.norm(vectors.matrix, axis=1, keepdims=True)
    order = np.argsort(-(units @ units[3]))
    found = vectors.nearest("word3", 5)
    assert [word for word, _ in found] == [vectors.words[row] for row in order[1:6]]
    assert found[0][1] == pytest.approx(vectors.similarity("word3", found[0][0]), abs=1e-6)
    assert vectors.nearest(vectors.vector("词4号"), 1)[0] == ("词4号", pytest.approx(1.0))
    assert len(vectors.nearest("word3", 1000)) == 39 and vectors.nearest("word3", 0) == []


def test_analogy_is_the_plain_definition_both_ways():
    vectors = small()
    units = vectors.matrix / np.linalg.norm(vectors.matrix, axis=1, keepdims=True)
    a, b, c = 1, 2, 5
    target = units[b] - units[a] + units[c]
    added = units @ target / np.linalg.norm(target)
    multiplied = (1 + units @ units[b]) / 2 * (1 + units @ units[c]) / 2 / ((1 + units @ units[a]) / 2 + 1e-3)
    for scores, multiply in ((added, False), (multiplied, True)):
        order = [row for row in np.argsort(-scores) if row not in (a, b, c)][:4]
        found = vectors.analogy("word1", "词2号", "word5", 4, multiply=multiply)
        assert [word for word, _ in found] == [vectors.words[row] for row in order]
        np.testing.assert_allclose([score for _, score in found], scores[order], rtol=1e-4)


def test_small_letters_stand_in_for_capitals():
    vectors = WordVectors(["paris", "US", "us"], np.eye(3, dtype=np.float32))
    assert vectors.row("Paris") == 0 and vectors.row("US") == 1 and vectors.row("us") == 2 and vectors.row("x") is None


def test_equal_scores_keep_the_order_and_zeros_do_no_harm():
    matrix = np.array([[1, 0], [1, 0], [1, 0], [0, 0]], dtype=np.float32)
    vectors = WordVectors(["a", "b", "c", "zero"], matrix)
    assert [word for word, _ in vectors.nearest("b", 2)] == ["a", "c"]
    assert vectors.similarity("zero", "a") == 0.0


def test_unknown_words_are_told_with_similar_spellings(monkeypatch):
    vectors = WordVectors(["language", "vector", "语言模型"], np.eye(3, dtype=np.float32))
    with pytest.raises(UsageError, match="did you mean 'language'"):
        vectors.vector("langauge")
    monkeypatch.setenv("HANMO_LANG", "zh")
    with pytest.raises(UsageError, match="'语言模型'"):
        vectors.nearest("语言模形")
    with pytest.raises(UsageError, match="请换一个词"):
        vectors.similarity("vector", "qqq")


def test_a_vector_of_another_size_is_refused():
    with pytest.raises(UsageError, match="7 numbers"):
        small().nearest(np.zeros(8))


def test_words_and_matrix_must_fit():
    for words in (["a", "a"], ["a"]):
        with pytest.raises(DataError, match="differ"):
            WordVectors(words, np.eye(2, dtype=np.float32))


def test_texts_weigh_frequent_words_little():
    matrix = np.eye(3, dtype=np.float32)
    counted = WordVectors(["the", "猫", "cat"], matrix, counts=np.array([998, 1, 1]))
    plain = WordVectors(["the", "猫", "cat"], matrix)
    np.testing.assert_allclose(plain.text_vector("The cat, the cat, unheard-of"), [0.5, 0, 0.5])
    weights = 1e-3 / (1e-3 + np.array([0.998, 0.001]))
    expected = np.array([weights[0], 0, weights[1]]) / weights.sum()
    np.testing.assert_allclose(counted.text_vector(["the", "cat"]), expected, rtol=1e-6)
    assert counted.text_vector("the 猫")[1] > 0.99
    assert counted.text_vectors(["", "猫", ["cat"]]).shape == (3, 3)
    assert not counted.text_vector("").any() and counted.text_vectors([]).shape == (0, 3)


def test_words_of_drops_punctuation():
    assert words_of("The CAT's 3.14, 我们在学习。") == ["the", "cat's", "3.14", "我们", "在", "学习"]
    assert words_of("The CAT", lowercase=False) == ["The", "CAT"]


# --- FastText's unseen words ---


@pytest.fixture(scope="module")
def fasttext():
    """gensim's model of a mixed corpus, and our view of its tables."""
    from gensim.models import FastText

    model = FastText(
        synthetic("en", 60) + synthetic("zh", 60), vector_size=6, min_count=1, min_n=1, max_n=4, bucket=500, workers=1
    )
    subwords = Subwords(model.wv.vectors_ngrams, 1, 4)
    return model.wv, WordVectors(model.wv.index_to_key, model.wv.vectors, "fasttext", None, subwords)


@settings(max_examples=60, deadline=None)
@given(word=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_unseen_words_get_the_vector_that_gensim_gives(fasttext, word):
    theirs, ours = fasttext
    if word.lower() not in ours.rows:
        np.testing.assert_allclose(ours.vector(word), theirs.get_vector(word), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("word", ["猫狗", "公交汽车站", "catlike", "女王queen", "𠮷野家", "é", "x" * 256])
def test_unseen_words_of_both_languages(fasttext, word):
    theirs, ours = fasttext
    assert word not in ours.rows
    np.testing.assert_allclose(ours.vector(word), theirs.get_vector(word), rtol=1e-5, atol=1e-8)


def test_unseen_words_after_saving(fasttext, tmp_path):
    fasttext[1].save(tmp_path / "model")
    loaded = WordVectors.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.vector("公交汽车"), fasttext[1].vector("公交汽车"))
    with pytest.raises(UsageError, match="not in the vocabulary"):
        loaded.vector("x" * 257)


def test_a_word_shorter_than_every_ngram_is_unknown():
    subwords = Subwords(np.ones((8, 2), dtype=np.float32), 4, 6)
    assert subwords.vector("a") is None and list(ngrams("a", 3, 6)) == ["<a>"] and subwords.vector("ab") is not None


def test_ngrams_and_buckets_suit_the_vocabulary():
    assert choose_lengths(["国王", "女王", "公交车"] * 10) == (1, 3) and choose_lengths(["king", "queen"] * 10) == (
        3,
        6,
    )
    words = [f"word{n}" for n in range(300)]
    distinct = len({gram for word in words for gram in ngrams(word, 3, 6)})
    assert 2 * distinct <= choose_buckets(words, (3, 6)) < 4 * distinct
    assert fnv_hash(b"") == 2166136261


# --- the model folder ---


def test_a_folder_gives_back_what_was_saved(tmp_path):
    vectors = small()
    vectors.training = {"size": 7, "语料": "测试"}
    vectors.save(tmp_path / "model")
    loaded = WordVectors.load(tmp_path / "model")
    assert loaded.words == vectors.words and loaded.config() == vectors.config() and loaded.subwords is None
    assert np.array_equal(loaded.matrix, vectors.matrix) and np.array_equal(loaded.counts, vectors.counts)
    assert isinstance(loaded.matrix, np.memmap) and not loaded.matrix.flags.writeable
    assert loaded.nearest("词4号") == vectors.nearest("词4号")
    loaded.save(tmp_path / "model")  # over itself, while it is mapped
    assert np.array_equal(WordVectors.load(tmp_path / "model").matrix, vectors.matrix)


def test_loading_needs_neither_gensim_nor_torch(fasttext, tmp_path):
    fasttext[1].save(tmp_path / "model")
    code = (
        "import sys; from hanmo.models.embeddings import WordVectors as W; v = W.load(sys.argv[1]);"
        "v.nearest('catlike'); assert not {'gensim', 'torch', 'scipy', 'jieba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=True)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        (
            "vocabulary.txt",
            lambda data: data.replace(b"word1\n", b"word3\n"),
            "vocabulary.txt:4: the word 'word3' comes",
        ),
        ("vocabulary.txt", lambda data: data.replace(b"word1\n", b"\n"), "vocabulary.txt:2: an empty line"),
        ("vocabulary.txt", lambda data: data.replace(b"word1\n", b"\xff\n"), "UTF-8"),
        ("vocabulary.txt", lambda data: data[: data.index(b"word9")], "do not fit"),
        ("model.safetensors", lambda data: data[:-4], "damaged"),
        ("model.safetensors", lambda data: b"\xff" * 8 + data[8:], "damaged"),
        ("model.safetensors", lambda data: data.replace(b'"vectors"', b'"vektors"'), "do not fit"),
        ("config.json", lambda data: data.replace(b'"size": 7', b'"size": 8'), "do not fit"),
        ("config.json", lambda data: data.replace(b"null", b"[3, 6]"), "do not fit"),
        ("config.json", lambda data: data.replace(b'"vectors"', b'"ngram"'), "does not hold word vectors"),
        ("config.json", lambda data: data[:20], "not valid JSON"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, file, change, says):
    folder = tmp_path / "model"
    small().save(folder)
    path = folder / file
    altered = change(path.read_bytes())
    assert altered != path.read_bytes()
    path.write_bytes(altered)
    (folder / "hanmo.json").unlink()  # as if the folder came from elsewhere
    with pytest.raises(ModelError) as caught:
        WordVectors.load(folder)
    assert says in str(caught.value)


def test_a_truncated_folder_of_ours_is_refused(tmp_path):
    small().save(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ModelError, match="its manifest says"):
        WordVectors.load(tmp_path / "model")


def test_numbers_that_are_not_finite_are_found(tmp_path):
    vectors = small()
    vectors.matrix[5, 2] = np.nan
    vectors.save(tmp_path / "model")
    with pytest.raises(ModelError, match="word5"):
        WordVectors.load(tmp_path / "model").nearest("word3")


def test_words_that_cannot_be_saved_leave_no_folder(tmp_path):
    for word in ("two\nlines", "", "half\ud800"):
        with pytest.raises(UsageError, match="cannot be saved"):
            WordVectors([word, "b"], np.eye(2, dtype=np.float32)).save(tmp_path / "model")
        with pytest.raises(UsageError):
            WordVectors([word, "b"], np.eye(2, dtype=np.float32)).save_word2vec(tmp_path / "model.txt")
    assert not list(tmp_path.iterdir())


# --- word2vec files ---


@pytest.mark.parametrize("name", ["v.txt", "v.bin", "v.txt.gz", "v.bin.gz"])
def test_our_files_are_read_by_gensim_and_by_us(tmp_path, name):
    vectors = small()
    vectors.save_word2vec(tmp_path / name, binary=".bin" in name)
    theirs = KeyedVectors.load_word2vec_format(str(tmp_path / name), binary=".bin" in name)
    assert theirs.index_to_key == vectors.words and np.array_equal(theirs.vectors, vectors.matrix)
    ours = WordVectors.load_word2vec(tmp_path / name)
    assert ours.words == vectors.words and np.array_equal(ours.matrix, vectors.matrix)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("binary", "header"), [(False, False), (False, True), (True, True)])
def test_files_of_gensim_are_read(tmp_path, binary, header):
    vectors = small()
    theirs = KeyedVectors(vectors.size)
    theirs.add_vectors(vectors.words, vectors.matrix)
    theirs.save_word2vec_format(str(tmp_path / "v"), binary=binary, write_header=header)
    ours = WordVectors.load_word2vec(tmp_path / "v")
    assert ours.words == vectors.words and np.array_equal(ours.matrix, vectors.matrix)


words_strategy = st.text(st.characters(exclude_categories=["Cs", "Zs", "Zl", "Zp", "Cc"]), min_size=1, max_size=8)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(words_strategy, min_size=1, max_size=6, unique=True),
    size=st.integers(1, 5),
    binary=st.booleans(),
    data=st.data(),
)
def test_any_words_and_numbers_survive(tmp_path_factory, words, size, binary, data):
    rows = data.draw(st.lists(st.lists(finite, min_size=size, max_size=size), min_size=len(words), max_size=len(words)))
    path = tmp_path_factory.mktemp("w2v") / "v"
    vectors = WordVectors(words, np.array(rows, dtype=np.float32))
    vectors.save_word2vec(path, binary=binary)
    loaded = WordVectors.load_word2vec(path)
    assert loaded.words == words and loaded.matrix.tobytes() == vectors.matrix.tobytes()


def test_more_rows_than_a_block(tmp_path):
    vectors = small(rows=9001, size=2)
    vectors.save_word2vec(tmp_path / "v", binary=True)
    assert np.array_equal(WordVectors.load_word2vec(tmp_path / "v").matrix, vectors.matrix)


FLOATS = np.array([1.5, -2.25], dtype="<f4").tobytes()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "neither"),
        (b"just a few words\n", "neither"),
        (b"1000000000000 300\nthe 0.1\n", ":1: the header announces 1000000000000 words"),
        (b"1 1000000000000\nthe 0.1\n", ":1: the header announces 1 words of 1000000000000"),
        (b"0 5\n", ":1: the header announces 0 words"),
        (b"3 2\na 1.25 2.5\nb 1.25 2.5\n", "cut off: 2 of the 3"),
        (b"1 2\na 1 2\nb 1 2\n", ":3: more lines than the 1"),
        (b"2 2\na 1 2\nb 1\n", ":3: 1 numbers follow the word, 2 are expected"),
        (b"2 2\na 1 2\nnew york 1 2\n", ":3: 3 numbers follow the word"),
        (b"2 2\na 1 2\nb 1 x\n", ":3: a value is not a number"),
        (b"2 2\na 1 2\nb 1 nan\n", ":3: the vector of 'b' has a number that is not finite"),
        (b"2 2\na 1 2\nb 1 1e99\n", "not finite"),
        (b"2 2\na 1 2\na 3 4\n", ":3: the word 'a' comes twice, first as entry 1"),
        ("2 2\n猫 1 2\n猫 3 4\n".encode(), "'猫' comes twice"),
        (b"2 2\na 1 2\n\xff\xfe 3 4\n", ":3: the word is not valid UTF-8"),
        (b"2 2\na 1 2\n 3 4\n", "no word before the numbers"),
        (b"a 1 2\nb 1 2 3\n", ":2: 3 numbers follow"),
        (b"a 1 2\n\nb 1 2\n", ":2: an empty line"),
        (b"2 2\na " + FLOATS, "cut off: the header announces 2 words"),
        (b"2 2\na " + FLOATS + b"b " + FLOATS[:5], "entry 2: cut off"),
        (b"2 2\na " + FLOATS + b"a " + FLOATS, "entry 2: the word 'a' comes twice"),
        (b"2 2\na " + FLOATS + b"\xff " + FLOATS, "entry 2: the word is not valid UTF-8"),
        (b"1 2\na " + FLOATS + b"b " + FLOATS, "data after the 1 announced"),
        (b"1 2\n" + b"a" * 5000 + FLOATS, "a word of more than"),
        (b"1 1\na " + np.array([np.nan], dtype="<f4").tobytes(), "not finite"),
        (gzip.compress(b"2 2\na 1 2\nb 3 4\n", mtime=0)[:-9], "gzip file is damaged"),
        (gzip.compress(b"1000000000000 300\nthe 0.1\n", mtime=0), "the header announces 1000000000000"),
    ],
)
def test_hostile_files_are_refused(tmp_path, content, says, monkeypatch):
    path = tmp_path / "v.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        WordVectors.load_word2vec(path)
    assert says in str(caught.value)
    monkeypatch.setenv("HANMO_LANG", "zh")
    assert "word2vec 文件" in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=80) | st.binary(max_size=60).map(lambda tail: b"2 3\n" + tail))
def test_random_bytes_are_refused_or_read_but_never_crash(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("noise") / "v"
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        WordVectors.load_word2vec(path)


def test_a_damaged_binary_file_is_noticed_anywhere(tmp_path):
    small(rows=3, size=2).save_word2vec(tmp_path / "whole", binary=True)
    whole = (tmp_path / "whole").read_bytes()
    for cut in range(len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:cut])
        with pytest.raises(DataError):
            WordVectors.load_word2vec(tmp_path / "cut")


def test_open_vectors_takes_folders_and_files(tmp_path):
    small().save(tmp_path / "folder")
    small().save_word2vec(tmp_path / "file.bin", binary=True)
    assert open_vectors(tmp_path / "folder").words == open_vectors(str(tmp_path / "file.bin")).words
    with pytest.raises(ModelError, match=r"did you mean 'file\.bin'"):
        open_vectors(tmp_path / "fil.bin")


# --- scores ---


def planted() -> WordVectors:
    """Capitals and countries with one offset between them; one pair breaks the rule."""
    generator = np.random.default_rng(1)
    offset = 2 * generator.normal(size=20)
    pairs = [("athens", "greece"), ("oslo", "norway"), ("rome", "italy"), ("北京", "中国"), ("bern", "switzerland")]
    words, rows = [], []
    for capital, country in pairs:
        base = generator.normal(size=20)
        words += [capital, country]
        rows += [base, base + (offset if capital != "bern" else -offset)]
    return WordVectors([*words, "noise"], np.array([*rows, generator.normal(size=20)], dtype=np.float32))


def test_analogies_are_scored_by_section_both_ways(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text(
        ": capitals\nAthens Greece Oslo Norway\nAthens Greece Rome Italy\nAthens Greece Bern Switzerland\n"
        "Athens Greece Tokyo Japan\n: empty\n: 首都\n北京 中国 Oslo Norway\n: unknown\nx y z w\n",
        encoding="utf-8",
    )
    vectors = planted()
    report = evaluate_analogies(vectors, path)
    assert [(part.name, part.questions, part.known, part.right) for part in report.sections] == [
        ("capitals", 4, 3, 2),
        ("首都", 1, 1, 1),
        ("unknown", 1, 0, 0),
    ]
    assert report.total.accuracy == 3 / 4 and report.total.accuracy_of_all == 3 / 6 and report.total.coverage == 4 / 6
    assert report.sections[2].accuracy is None
    assert json.loads(json.dumps(report.to_dict()))["total"]["right"] == 3
    assert vectors.analogy("athens", "greece", "oslo", 1)[0][0] == "norway"
    assert is_analogies(path)


def test_analogies_agree_with_gensim(shared_data):
    path = shared_data / "google-analogy" / "questions-words.txt"
    words = list(dict.fromkeys(path.read_text().lower().split()))[:400]
    vectors = WordVectors(words, np.random.default_rng(0).normal(size=(len(words), 3)).astype(np.float32))
    theirs = KeyedVectors(3)
    theirs.add_vectors(words, vectors.matrix)
    report = evaluate_analogies(vectors, path)
    _, sections = theirs.evaluate_word_analogies(str(path))
    for section in sections[:-1]:
        ours = next(part for part in report.sections if part.name == section["section"])
        assert ours.known == len(section["correct"]) + len(section["incorrect"])
        assert ours.right == len(section["correct"])
    assert report.total.known > 1000 and report.total.right > 0


def test_the_chinese_sets_are_read(shared_data):
    folder = shared_data / "cwe-zh-wordsim"
    vectors = planted()
    analogies = evaluate_analogies(vectors, folder / "analogy.txt")
    assert [(part.name, part.questions) for part in analogies.sections] == [
        ("capital-common-countries", 506),
        ("city-in-state", 175),
        ("family", 272),
    ]
    assert [evaluate_similarity(vectors, folder / name).pairs for name in ("240.txt", "297.txt")] == [240, 297]
    assert not is_analogies(folder / "240.txt")


@pytest.mark.parametrize("text", ["Word 1,Word 2,Human (mean)\ncat,dog,7\n", "a\tb\tPOS\tmean\ncat\tdog\tN\t7\n"])
def test_column_names_of_four_words_are_no_analogy(text, tmp_path):
    path = tmp_path / "set.csv"
    path.write_text(text)
    assert not is_analogies(path)


def test_similarity_agrees_with_gensim(shared_data):
    path = shared_data / "gensim-testdata" / "wordsim353.tsv"
    words = list(dict.fromkeys(path.read_text().lower().split("\n", 2)[2].split()))[:300]
    words = [word for word in words if word.isalpha()]
    vectors = WordVectors(words, np.random.default_rng(0).normal(size=(len(words), 5)).astype(np.float32))
    theirs = KeyedVectors(5)
    theirs.add_vectors(words, vectors.matrix)
    report = evaluate_similarity(vectors, path)
    _, (rho, _), missing = theirs.evaluate_word_pairs(str(path))
    assert report.pairs == 353 and report.coverage == pytest.approx(1 - missing / 100)
    assert report.spearman == pytest.approx(rho, abs=1e-6)
    assert report.interval.low < report.spearman < report.interval.high and report.unseen == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_rank_correlation_is_that_of_scipy(pairs):
    first, second = np.array(pairs, dtype=float).T
    ours = correlation(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(spearmanr(first, second).statistic, abs=1e-9)
    assert ranks(first).sum() == len(first) * (len(first) + 1) / 2


def test_tables_of_similarity_in_all_shapes(tmp_path):
    vectors = WordVectors(["猫", "狗", "车", "cat"], np.array([[1, 0], [1, 0.1], [0, 1], [1, 0.3]], dtype=np.float32))
    rows = [("猫", "狗", 9.0), ("猫", "车", 1.0), ("猫", "cat", 7.0), ("猫", "无", 3.0)]
    for separator, header in (
        ("\t", "word1\tword2\tscore\n"),
        (",", "a,b,score\n"),
        (" ", "# comment\n\n"),
        ("\t", "\ufeff"),
    ):
        path = tmp_path / "pairs.txt"
        path.write_text(header + "".join(separator.join(map(str, row)) + "\r\n" for row in rows), encoding="utf-8")
        report = evaluate_similarity(vectors, path, resamples=50)
        assert (report.pairs, report.covered, report.spearman) == (4, 3, pytest.approx(1.0)), (separator, header)


def test_similarity_with_subwords_counts_unseen_words(fasttext, tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("cat dog 9\ncats dogs 8\n猫 狗 7\n", encoding="utf-8")
    report = evaluate_similarity(fasttext[1], path, resamples=20)
    assert (report.covered, report.unseen) == (3, 1)


@pytest.mark.parametrize(
    ("content", "evaluate", "says"),
    [
        (b": a\none two three\n", evaluate_analogies, ":2: an analogy has four words, this line has 3"),
        (b": a\n", evaluate_analogies, "holds no analogies"),
        (b"", evaluate_similarity, "no pairs"),
        (b"a\tb\t1\nc\td\n", evaluate_similarity, ":2: two words and a number"),
        (b"a\tb\t1\nc\td\tnan\n", evaluate_similarity, ":2: two words and a number"),
        (b"a\tb\t1\nc\t\xff\t1\n", evaluate_similarity, ":2: not valid UTF-8"),
        (b"x" * 20_000, evaluate_analogies, ":1: the line is too long"),
    ],
)
def test_bad_sets_are_refused_with_their_line(tmp_path, content, evaluate, says, monkeypatch):
    path = tmp_path / "set.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        evaluate(small(), path)
    assert says in str(caught.value)
    monkeypatch.setenv("HANMO_LANG", "zh")
    assert any("\u4e00" <= letter <= "\u9fff" for letter in caught.value.zh)
    with pytest.raises(DataError, match=r"cannot be read|无法读取"):
        evaluate(small(), tmp_path / "absent")


def test_too_few_pairs_have_no_correlation(tmp_path):
    (tmp_path / "pairs.txt").write_text("词0号\tword1\t3\nx\ty\t2\n", encoding="utf-8")
    report = evaluate_similarity(small(), tmp_path / "pairs.txt")
    assert (report.covered, report.spearman, report.interval) == (1, None, None)


# --- the verb ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[Path]:
    """A folder with texts, and vectors that the verb learnt from them."""
    folder = tmp_path_factory.mktemp("verb")
    (folder / "texts").mkdir()
    for language in GROUPS:
        lines = [" ".join(sentence) for sentence in synthetic(language, 400)]
        (folder / "texts" / f"{language}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    arguments = ["vectors", "train", str(folder / "texts"), "--method", "glove", "--out", str(folder / "model")]
    assert main([*arguments, "--size", "12", "--epochs", "20", "--window", "4"]) == 0
    yield folder


def told(capsys) -> dict:
    """The JSON document on standard output."""
    return json.loads(capsys.readouterr().out)


def test_the_verb_trains_and_looks_up(trained, capsys):
    model = str(trained / "model")
    assert sorted(path.name for path in trained.iterdir()) == ["model", "model-data", "texts"]
    vectors = WordVectors.load(model)
    assert vectors.method == "glove" and {"cat", "国王"} <= set(vectors.words)
    assert vectors.training["epochs"] == 20 and vectors.training["data"]
    capsys.readouterr()
    assert main(["vectors", "nearest", model, "cat", "国王", "-n", "3", "--json"]) == 0
    nearest = told(capsys)["nearest"]
    names, contexts = GROUPS["en"][0]
    assert {word for word, _ in nearest["cat"]} <= {*names, *contexts} and len(nearest["国王"]) == 3
    assert main(["vectors", "analogy", model, "cat", "dog", "king", "-n", "2"]) == 0
    assert "cat : dog = king : ?" in capsys.readouterr().out


def test_the_verb_converts_and_scores(trained, capsys, tmp_path):
    model = str(trained / "model")
    for name in ("v.bin", "v.vec.gz", "folder"):
        assert main(["vectors", "convert", model, str(tmp_path / name)]) == 0
    assert np.array_equal(open_vectors(tmp_path / "v.bin").matrix, open_vectors(tmp_path / "v.vec.gz").matrix)
    assert open_vectors(tmp_path / "folder").words == WordVectors.load(model).words
    (tmp_path / "a.txt").write_text(": s\ncat dog king queen\n", encoding="utf-8")
    (tmp_path / "s.txt").write_text("cat\tdog\t9\ncat\tking\t1\n猫\t狗\t9\n", encoding="utf-8")
    capsys.readouterr()
    files = [str(tmp_path / name) for name in ("a.txt", "s.txt")]
    assert main(["vectors", "score", str(tmp_path / "v.bin"), *files, "--json"]) == 0
    analogies, similarity = told(capsys)["scores"]
    assert analogies["total"]["known"] == 1 and similarity["covered"] == 3
    assert main(["vectors", "score", model, *files]) == 0
    shown = capsys.readouterr().out
    assert "1 known of 1" in shown and "Spearman" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nearst", "MODEL", "cat"], 2, "did you mean 'nearest'"),
        (["nearest", "MODEL"], 2, "takes MODEL WORDS"),
        (["analogy", "MODEL", "cat", "dog"], 2, "takes MODEL A B C"),
        (["nearest", "MODEL", "kingg"], 2, "did you mean 'king'"),
        (["nearest", "absent", "cat"], 4, "there is no model 'absent'"),
        (["convert", "MODEL", "out.xyz"], 2, "no format of word vectors"),
        (["convert", "MODEL", "TEXTS"], 2, "already there"),
        (["score", "MODEL", "absent.txt"], 3, "cannot be read"),
        (["train", "TEXTS", "--out", "TEXTS"], 2, "something else than word vectors"),
        (["train", "TEXTS", "--method", "glov"], 2, "did you mean 'glove'"),
        (["train", "TEXTS", "--size", "0"], 2, "--size is 0"),
        (["nearest", "MODEL", "cat", "-n", "0"], 2, "--number is 0"),
    ],
)
def test_mistakes_on_the_command_line(trained, capsys, arguments, code, says):
    places = {"MODEL": str(trained / "model"), "TEXTS": str(trained / "texts")}
    assert main(["vectors", *(places.get(part, part) for part in arguments)]) == code
    assert says in capsys.readouterr().err
    assert len(list((trained / "texts").iterdir())) == 2


def test_errors_are_ours_and_bilingual():
    with pytest.raises(HanmoError) as caught:
        small().vector("无此词")
    assert "词表" in caught.value.zh and caught.value.exit_code == 2
