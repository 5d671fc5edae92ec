"""Word-level corpora: the format, the tokenizer, word perplexity by hand, and the whole road on the command line."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanmo.cli.main import main
from hanmo.data import sentences as sentences_module
from hanmo.data.sentences import read_sentences, tokenize_sentences
from hanmo.errors import DataError, ModelError, UsageError
from hanmo.evaluation.words import describe_words, stream_logprobs, word_perplexity
from hanmo.inference.stream import IncrementalDecoder
from hanmo.models.checkpoints.ngram import load_ngram
from hanmo.models.checkpoints.recurrent import load_recurrent
from hanmo.models.ngram import NGramModel
from hanmo.models.recurrent import RecurrentConfig, RecurrentModel
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.training import split_words, train_words

EN = " the <unk> of N companies rose \n the board met \n\n no one <unk> it \n"
ZH = "我们 都 喝 <unk>\n茶　很 好\n他 喝 N 杯 茶\n"


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# The format ----------------------------------------------------------------------------------------------------------


def test_lines_are_sentences_and_spaces_part_words(tmp_path: Path) -> None:
    found = list(read_sentences([written(tmp_path / "a", EN), written(tmp_path / "b", ZH)]))
    assert [sentence.words for sentence in found[:4]] == [
        ["the", "<unk>", "of", "N", "companies", "rose"],
        ["the", "board", "met"],
        [],
        ["no", "one", "<unk>", "it"],
    ]
    assert found[5].words == ["茶", "很", "好"]
    assert found[3].origin == f"{tmp_path / 'a'}:4"


def test_marks_line_ends_and_odd_spaces(tmp_path: Path) -> None:
    text = "\ufeffa\tb\r\nc\u00a0d \ufeff\rlast".encode()
    assert [s.words for s in read_sentences([written(tmp_path / "a", text)])] == [
        ["a", "b"],
        ["c\u00a0d", "\ufeff", "last"],
    ]
    assert list(read_sentences([written(tmp_path / "b", "")])) == []


@pytest.mark.parametrize(
    ("data", "line", "message"),
    [
        (b"fine\nbad \xff here\n", 2, "invalid UTF-8: the byte 0xFF at position 4"),
        ("一\n二 <eos>\n".encode(), 2, "holds the word <eos>"),
        (b"a b\n" + b"x" * 100, 2, "more than"),
    ],
)
def test_bad_lines_are_named(
    tmp_path: Path, data: bytes, line: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentences_module, "LONGEST_LINE", 64)
    path = written(tmp_path / "bad.txt", data)
    with pytest.raises(DataError, match=message) as caught:
        list(read_sentences([path]))
    assert caught.value.where == f"{path}:{line}" and caught.value.zh


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read") as caught:
        list(read_sentences([tmp_path / "nowhere.txt"]))
    assert "nowhere.txt" in caught.value.where


# The tokenizer -------------------------------------------------------------------------------------------------------


def test_words_get_ids_by_frequency() -> None:
    tokenizer = train_words(split_words(line) for line in EN.splitlines())
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (0, 0, 12)
    assert tokenizer.encode("the <unk> board 茶\n") == [2, 1, tokenizer.words["board"], 1]
    assert tokenizer.encode("<eos>") == [1]  # typed by somebody, it is a word that nobody knows
    assert tokenizer.encode("the <eos>", special=True) == [2, 0]
    assert tokenizer.decode([2, 1, 0, 2]) == "the <unk> the"


def test_a_stream_of_words_reads_like_the_whole(tmp_path: Path) -> None:
    tokenizer = train_words(split_words(line) for line in (EN + ZH).splitlines())
    ids = tokenizer.encode("他 喝 the <unk> N")
    decoder = IncrementalDecoder()
    pieces = [decoder.feed(tokenizer.token_bytes(id)) for id in ids]
    assert "".join(pieces) == " " + tokenizer.decode(ids) == " 他 喝 the <unk> N"
    assert tokenizer.token_bytes(0) == b""
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.is_word_level and again.eos_id == 0 and again.fingerprint == tokenizer.fingerprint
    assert again.decode(ids) == tokenizer.decode(ids)


def test_transformers_reads_it_to_the_same_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = train_words(split_words(line) for line in ZH.splitlines())
    tokenizer.save(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert other("他 喝　咖啡")["input_ids"] == tokenizer.encode("他 喝　咖啡")
    assert len(other) == tokenizer.vocab_size


word = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(
    lambda text: split_words(text) == [text] and text not in ("<eos>", "<unk>")
)


@given(lines=st.lists(st.lists(word, max_size=5), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_the_file_and_the_tokenizer_agree_on_any_words(lines: list[list[str]]) -> None:
    lines = [*lines, ["end", "<unk>"]]
    tokenizer = train_words(lines)
    for words in lines:
        text = " ".join(words)
        assert split_words(text) == words
        ids = [tokenizer.words[word] for word in words]
        assert tokenizer.encode(f" {text} \n") == ids
        assert tokenizer.decode(ids) == text


def test_a_limited_vocabulary_keeps_the_most_frequent_words() -> None:
    tokenizer = train_words([["a", "b", "a", "c"], ["a", "b", "d"]], vocab_size=4)
    assert set(tokenizer.words) == {"<unk>", "a", "b"}
    assert tokenizer.encode("c b zebra") == [tokenizer.words["<unk>"], tokenizer.words["b"], tokenizer.words["<unk>"]]
    assert set(train_words([["a", "b"]], vocab_size=50).words) == {"a", "b"}
    with pytest.raises(UsageError, match="no room"):
        train_words([["a"]], vocab_size=2)
    with pytest.raises(DataError, match="no text"):
        train_words([[], []])


def test_a_closed_vocabulary_names_the_word_it_lacks(tmp_path: Path) -> None:
    tokenizer = train_words([["a", "b"]])
    with pytest.raises(DataError, match="'c' is not in the vocabulary"):
        tokenizer.encode("a c")
    train, test = written(tmp_path / "train", "a b\n"), written(tmp_path / "test", "a\nb 猫\n")
    with pytest.raises(DataError, match="'猫' does not occur") as caught:
        tokenize_sentences({"train": [train], "test": [test]}, tokenizer, tmp_path / "data")
    assert caught.value.where == f"{test}:2"
    assert not (tmp_path / "data").exists()


def test_ids_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences_module, "CHUNK_TOKENS", 5)  # the seams must not show
    train, test = written(tmp_path / "train", EN), written(tmp_path / "test", "the tea met")
    tokenizer = train_words(sentence.words for sentence in read_sentences([train]))
    corpus = tokenize_sentences({"train": [train], "test": [test]}, tokenizer, tmp_path / "data")
    expected = [id for line in EN.splitlines() for id in [*tokenizer.encode(line), 0]]
    assert corpus.tokens("train").tolist() == expected
    assert corpus.report["train"] == {
        "sentences": 4, "tokens": 17, "unknown": 2, "blank": 1,
        "bytes": len("the <unk> of N companies rose\nthe board met\n\nno one <unk> it\n"),
    }  # fmt: skip
    assert corpus.report["test"]["unknown"] == 1
    assert "1 blank lines count as <eos>" in capsys.readouterr().err
    assert corpus.document_spans("train").tolist() == [0, 7, 11, 12, 17]
    assert len(corpus.tokens("validation")) == 0
    with pytest.raises(DataError, match="has no words"):
        tokenize_sentences({"train": [written(tmp_path / "blank", "\n\n")]}, tokenizer, tmp_path / "other")


# Word perplexity -----------------------------------------------------------------------------------------------------


def counts(ids: np.ndarray) -> dict[str, int]:
    return {"sentences": int((ids == 0).sum()), "unknown": int((ids == 1).sum()), "bytes": 4 * ids.size}


def test_unigram_perplexity_by_hand() -> None:
    """Order 1 over seen words: P(w) is linear in the counts, so that the sum can be done on paper."""
    train = np.array([2, 3, 0, 2, 1, 0])
    model = NGramModel.train([train], 1, 4, bos_id=0, eos_id=0)
    probability = np.exp(model.next_logprobs([]))
    test = np.array([2, 1, 0, 3, 0])
    row = word_perplexity(model, test, name="m", split="test", eos_id=0, counts=counts(test))
    by_hand = math.exp(-sum(math.log(probability[id]) for id in test) / 5)
    assert row.perplexity == pytest.approx(by_hand, rel=1e-12)
    assert (row.sentences, row.unknown, row.likelihood.tokens, row.interval) == (2, 1, 5, None)
    assert abs(probability.sum() - 1) < 1e-12


def test_sentences_stand_alone_for_an_ngram_model_as_in_kenlm() -> None:
    """The convention of KenLM's query: each line begins at <s> and ends with </s>, which counts as a word."""
    generator = np.random.default_rng(1)
    lines = [[*generator.integers(1, 9, int(generator.integers(1, 7))).tolist(), 0] for _ in range(40)]
    model = NGramModel.train([np.array(line) for line in lines], 3, 9, bos_id=0, eos_id=0)
    test = lines[::-1]  # another order of the sentences must not matter
    total = 0.0
    for line in test:
        for place, id in enumerate(line):
            total += model.next_logprobs(line[:place])[id]
    ids = np.concatenate(test)
    row = word_perplexity(model, ids, name="m", split="s", eos_id=0, counts=counts(ids))
    assert row.perplexity == pytest.approx(math.exp(-total / ids.size), rel=1e-10)


def test_kenlm_gives_the_same_word_perplexity(tmp_path: Path) -> None:
    kenlm = pytest.importorskip("kenlm")
    arpa = pytest.importorskip("hanmo.models.arpa")
    if not hasattr(arpa, "write_arpa"):
        pytest.skip("no ARPA writer")
    generator = random.Random(3)
    lines = [
        [generator.choice(["we", "你", "tea", "<unk>", "好"]) for _ in range(generator.randrange(1, 7))]
        for _ in range(90)
    ]
    tokenizer = train_words(lines)
    ids = [np.array([*(tokenizer.words[word] for word in line), 0]) for line in lines]
    model = NGramModel.train(ids, 3, tokenizer.vocab_size, bos_id=0, eos_id=0)
    names = [next((w for w, i in tokenizer.words.items() if i == id), "<eos>") for id in range(tokenizer.vocab_size)]
    arpa.write_arpa(model, tmp_path / "model.arpa", names)
    other = kenlm.Model(str(tmp_path / "model.arpa"))
    theirs = sum(other.score(" ".join(line)) for line in lines[:30]) * math.log(10)
    test = np.concatenate(ids[:30])
    row = word_perplexity(model, test, name="m", split="s", eos_id=0, counts=counts(test))
    assert row.perplexity == pytest.approx(math.exp(-theirs / test.size), rel=1e-4)


def test_a_recurrent_network_reads_the_whole_text_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model = RecurrentModel(RecurrentConfig("lstm", 9, 8, 8, 2, dropout=0.5))
    model.initialize(2)
    model.train()  # the noise of training must not reach the score
    ids = np.random.default_rng(0).integers(0, 9, 70).astype(np.uint16)
    inputs = torch.tensor([[0, *ids[:-1].tolist()]])
    model.eval()
    with torch.no_grad():
        table = model(inputs)[0][0].log_softmax(-1)
    expected = [float(table[place, id]) for place, id in enumerate(ids.tolist())]
    model.train()
    np.testing.assert_allclose(stream_logprobs(model, ids, 0), expected, atol=1e-5)
    assert model.training
    monkeypatch.setattr("hanmo.evaluation.words.STREAM_TOKENS", 9)
    np.testing.assert_allclose(stream_logprobs(model, ids, 0), expected, atol=1e-5)
    row = word_perplexity(model, ids, name="m", split="test", eos_id=0, counts=counts(ids))
    assert row.perplexity == pytest.approx(math.exp(-np.mean(expected)), rel=1e-5)


def test_intervals_hold_the_value_and_are_told() -> None:
    ids = np.random.default_rng(0).integers(0, 50, 11000)
    model = NGramModel.train([ids[:3000]], 2, 50, bos_id=0, eos_id=0)
    row = word_perplexity(model, ids[3000:], name="m", split="test", eos_id=0, counts=counts(ids[3000:]))
    assert row.interval is not None and row.interval[0] < row.perplexity < row.interval[1]
    assert "95% CI" in describe_words([row]) and "8,000 tokens" in describe_words([row])
    assert json.loads(json.dumps(row.as_dict()))["interval"] == list(row.interval)


# The command line ----------------------------------------------------------------------------------------------------


def made_up(folder: Path, language: str, seed: int = 0) -> list[str]:
    """Three small files in the format, of sentences with a grammar of their own."""
    generator = random.Random(seed)
    parts = {
        "en": (
            ["the", "a", "no"],
            ["board", "market", "<unk>", "trader"],
            ["rose", "fell", "met"],
            ["in", "by"],
            ["N", "may"],
        ),
        "zh": (
            ["这", "那", "每"],
            ["公司", "市场", "<unk>", "股东"],
            ["上涨", "下跌", "开会"],
            ["在", "于"],
            ["N", "五月"],
        ),
    }[language]
    paths = []
    for name, lines in (("train", 220), ("valid", 30), ("test", 30)):
        text = "".join(" " + " ".join(generator.choice(part) for part in parts) + " \n" for _ in range(lines))
        paths.append(str(written(folder / f"{language}.{name}.txt", text)))
    return paths


def arguments(paths: list[str], run: Path, *more: str) -> list[str]:
    files = ["--validation", paths[1], "--test", paths[2], "--out", str(run)]
    return ["pretrain", paths[0], "--tokenizer", "words", *files, *more]


def printed(capsys: pytest.CaptureFixture[str]) -> dict:  # type: ignore[type-arg]
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_ngram_on_the_command_line(
    tmp_path: Path, language: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, run = made_up(tmp_path, language), tmp_path / "run"
    assert main(arguments(paths, run, "--architecture", "ngram", "--order", "3", "--json")) == 0
    data = printed(capsys)
    assert [row["split"] for row in data["words"]] == ["validation", "test"]
    uniform = (3 * 4 * 3 * 2 * 2) ** (1 / 6)  # what is left to guess in a sentence of six tokens
    assert uniform * 0.9 < data["words"][1]["perplexity"] < uniform * 1.3
    assert data["words"][1]["tokens"] == 180 and data["words"][1]["sentences"] == 30
    model, tokenizer = load_ngram(run / "model")
    assert model.order == 3 and tokenizer.is_word_level
    assert main(["evaluate", str(run), paths[2], "--out", str(tmp_path / "e"), "--json"]) == 0
    assert printed(capsys)["words"][0]["perplexity"] == pytest.approx(data["words"][1]["perplexity"], rel=1e-9)
    arpa = str(tmp_path / "m.arpa.gz")
    assert main(["export", str(run), arpa]) == 0
    assert "pieces" not in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", arpa, paths[2], "--json"]) == 0
    assert printed(capsys)["words"][0]["perplexity"] == pytest.approx(data["words"][1]["perplexity"], rel=1e-5)
    assert not (tmp_path / "evaluation-data").exists()  # without --out nothing is left that another text would meet
    assert main(["evaluate", arpa]) == 2
    assert f"hanmo evaluate {arpa} test.txt" in capsys.readouterr().err
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["model_type"] == "ngram"
    (run / "model" / "config.json").write_text(json.dumps({**config, "order": 7}))
    with pytest.raises(ModelError):
        load_ngram(run / "model")


@pytest.mark.parametrize(("language", "cell"), [("en", "lstm"), ("zh", "gru")])
def test_recurrent_networks_on_the_command_line(
    tmp_path: Path, language: str, cell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, run = made_up(tmp_path, language), tmp_path / "run"
    small = ["--architecture", cell, "--size", "nano", "--batch-size", "4", "--context", "12"]
    assert main(arguments(paths, run, *small, "--epochs", "8", "--json")) == 0
    data = printed(capsys)
    assert data["steps"] == 8 * (1320 // 48)
    score = {row["split"]: row for row in data["words"]}
    assert math.exp(data["validation_loss"]) == pytest.approx(score["validation"]["perplexity"], rel=1e-4)
    assert score["test"]["perplexity"] < 3.2  # of about 15 words
    assert (run / "evaluation.json").is_file()
    model, tokenizer = load_recurrent(run / "model")
    assert isinstance(model, RecurrentModel) and model.config.cell == cell and tokenizer.is_word_level
    provenance = json.loads((run / "model" / "hanmo.json").read_text())
    assert provenance["prompt_prefix"] == [0] and provenance["settings"]["architecture"] == cell
    for where in ([], [paths[2], "--out", str(tmp_path / "e")]):
        assert main(["evaluate", str(run), *where, "--json"]) == 0
        assert printed(capsys)["words"][0]["perplexity"] == pytest.approx(score["test"]["perplexity"], rel=1e-6)
    assert main(["evaluate", str(run)]) == 0
    assert "word perplexity" in capsys.readouterr().out


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_resumption_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, run = made_up(tmp_path, "zh"), tmp_path / "run"
    small = ["--architecture", "lstm", "--size", "nano", "--max-steps", "6", "--checkpoint-every", "2"]
    assert main(arguments(paths, run, *small)) == 0
    before = snapshot(run)
    other = tmp_path / "other"
    other.mkdir()
    assert main([*arguments(made_up(other, "zh", seed=1), run, *small), "--resume"]) == 4
    assert "begun with other texts or settings" in capsys.readouterr().err
    assert main([*arguments(paths, run, *small), "--dropout", "0.5", "--resume"]) == 4
    assert {name: data for name, data in snapshot(run).items() if name in before} == before
    weights = before["model/model.safetensors"]
    for newest in sorted((run / "checkpoints").iterdir())[-1:]:
        for file in newest.iterdir():
            file.unlink()
        newest.rmdir()
    assert main([*arguments(paths, run, *small), "--resume"]) == 0
    assert (run / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--half-width"], "--half-width means nothing for a word-level corpus"),
        (["--architecture", "ngram", "--epochs", "3"], "--epochs means nothing for --architecture ngram"),
        (["--architecture", "ngram", "--resume"], "--resume means nothing for --architecture ngram"),
        (["--architecture", "lstm", "--order", "3"], "--order means nothing for --architecture lstm"),
        (["--dropout", "0.2"], "--dropout means nothing for --architecture transformer"),
        (["--architecture", "lstm", "--epochs", "2", "--budget", "1min"], "two answers to one question"),
        (["--architecture", "lstm", "--epochs", "0"], "--epochs must be above 0"),
        (["--architecture", "lstm", "--dropout", "1"], "--dropout is a share"),
        (["--architecture", "ngram", "--order", "0"], "--order is 0, and must be 1 or more"),
        (["--architecture", "lstmm"], "did you mean 'lstm'"),
    ],
)
def test_settings_that_do_not_go_together(
    tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(made_up(tmp_path, "en"), tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_files_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, out = made_up(tmp_path, "en"), ["--out", str(tmp_path / "run")]
    words = ["--tokenizer", "words", *out]
    assert main(["pretrain", paths[0], "--architecture", "lstm", *words]) == 2
    assert "--validation is missing" in capsys.readouterr().err
    assert main(["pretrain", "--architecture", "ngram", *words]) == 2
    assert "needs a training file" in capsys.readouterr().err
    assert main(["pretrain", paths[0], "--test", paths[2], *out]) == 2
    assert "--test belongs to --tokenizer words" in capsys.readouterr().err
    assert main(["build", *paths, *words]) == 2
    assert "--tokenizer words belongs to hanmo pretrain" in capsys.readouterr().err
    assert main(["tokenizer", *paths, "--tokenizer", "words", "--out", str(tmp_path / "t")]) == 2
    capsys.readouterr()
    assert main(["pretrain", paths[0], "--architecture", "ngram", *words]) == 0  # without files to score it on
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "no test file" in capsys.readouterr().err
    empty = str(written(tmp_path / "empty.txt", ""))
    assert main(["pretrain", empty, "--tokenizer", "words", "--architecture", "ngram", "--out", empty + ".run"]) == 3
    assert f"error: {empty}: there is no text" in capsys.readouterr().err


def test_architectures_on_an_ordinary_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts in no special format: the usual data path, BPE, and the dial of each architecture."""
    generator = random.Random(0)
    some = ["river", "stone", "lamp", "walks", "under", "the", "old", "bridge", "春天", "来了"]
    text = "\n\n".join(" ".join(generator.choices(some, k=60)) + "." for _ in range(60))
    path = str(written(tmp_path / "a.txt", text))
    steps = ["--max-steps", "6", "--size", "nano", "--context", "16", "--vocab-size", "300"]
    assert main(["pretrain", path, "--architecture", "rnn", "--out", str(tmp_path / "rnn"), *steps, "--json"]) == 0
    assert printed(capsys)["steps"] == 6
    model, tokenizer = load_recurrent(tmp_path / "rnn" / "model")
    assert model.config.cell == "rnn" and model.config.vocab_size == tokenizer.vocab_size == 300
    out = str(tmp_path / "ngram")
    for kind in ("bpe", "char"):
        assert main(["pretrain", path, "--architecture", "ngram", "--tokenizer", kind, "--out", out, "--json",
                     "--overwrite"]) == 0  # fmt: skip
        assert 0 < printed(capsys)["validation"]["bits_per_byte"] < 2
    assert load_ngram(Path(out) / "model")[0].order == 5
