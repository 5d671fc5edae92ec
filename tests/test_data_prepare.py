"""Preparing a corpus: splits, duplicates, cache, token shards, memory."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanmo.data import corpus as corpus_module
from hanmo.data import tokens as tokens_module
from hanmo.data.corpus import Corpus
from hanmo.data.prepare import prepare
from hanmo.data.report import describe
from hanmo.data.settings import DataSettings
from hanmo.data.splits import SPLITS, Shares, first_copies, hash_sides
from hanmo.data.stdlib import stdlib_paths
from hanmo.data.tokens import TokenArray
from hanmo.errors import DataError, HanmoError, ModelError, ResourceError, UsageError
from hanmo.folder import read_manifest

WORDS = """
    the quick brown fox jumps over a lazy dog while rain falls on old stone roads and nobody minds at all
""".split()  # noqa: SIM905


class ByteTokenizer:
    """Ids are bytes; 256 ends a document. Stands in for the real tokenizer."""

    eos_id: int | None = 256
    vocab_size = 257
    fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]


def sentence(source: random.Random) -> str:
    return " ".join(source.choices(WORDS, k=12))


def book(paragraphs: int, seed: int = 0) -> str:
    source = random.Random(seed)
    return "\n\n".join("\n".join(sentence(source) for _ in range(4)) for _ in range(paragraphs)) + "\n"


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8", newline="")
    return path


def write_records(path: Path, texts: Sequence[str]) -> Path:
    return write(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def all_documents(corpus: Corpus) -> dict[str, list[str]]:
    return {split: list(corpus.documents(split)) for split in SPLITS}


# -- splits ------------------------------------------------------------------------------------------------------------


def test_nothing_is_lost_and_no_document_stands_on_two_sides(tmp_path: Path) -> None:
    texts = [sentence(random.Random(i % 900)) for i in range(1000)]  # 100 copies
    corpus = prepare([write_records(tmp_path / "a.jsonl", texts)], tmp_path / "out")
    split = all_documents(corpus)
    assert sorted(chain(*split.values())) == sorted(set(texts))
    assert all(split.values())
    assert not set(split["train"]) & (set(split["validation"]) | set(split["test"]))
    assert corpus.report["duplicates"]["documents"] == 1000 - len(set(texts))
    first = corpus.report["duplicates"]["first"][0]
    assert (first["where"], first["copy_of"]) == (f"{tmp_path}/a.jsonl:901", f"{tmp_path}/a.jsonl:1")
    for name in SPLITS:
        assert corpus.num_documents(name) == len(split[name])
        assert corpus.num_bytes(name) == sum(len(text.encode()) for text in split[name])
        assert corpus.report["splits"][name]["documents"] == len(split[name])
        assert corpus.document(name, len(split[name]) - 1) == split[name][-1]


def test_copies_stay_on_one_side_without_deduplication(tmp_path: Path) -> None:
    texts = [sentence(random.Random(i % 150)) for i in range(1000)]
    path = write_records(tmp_path / "a.jsonl", texts)
    split = all_documents(
        prepare([path], tmp_path / "out", DataSettings(dedup=False, validation_share=0.2, test_share=0.2))
    )
    assert sorted(chain(*split.values())) == sorted(texts)
    sides = [set(split[name]) for name in SPLITS]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert 0.1 < len(split["validation"]) / 1000 < 0.3


def test_the_side_of_a_document_does_not_depend_on_the_others(tmp_path: Path) -> None:
    options = DataSettings(validation_share=0.1, test_share=0.1)
    texts = [sentence(random.Random(i)) for i in range(600)]
    small = all_documents(prepare([write_records(tmp_path / "a.jsonl", texts[:300])], tmp_path / "1", options))
    large = all_documents(prepare([write_records(tmp_path / "b.jsonl", texts[::-1])], tmp_path / "2", options))
    assert all(set(small[name]) <= set(large[name]) for name in SPLITS)
    options.seed = 1
    other = all_documents(prepare([tmp_path / "b.jsonl"], tmp_path / "3", options))
    assert set(other["test"]) != set(large["test"])


@pytest.mark.parametrize("documents", [3, 4, 10])
def test_no_split_is_empty(tmp_path: Path, documents: int) -> None:
    for seed in range(5):
        texts = [book(4, seed * 100 + i) for i in range(documents)]
        corpus = prepare([write_records(tmp_path / "a.jsonl", texts)], tmp_path / "out", DataSettings(seed=seed))
        assert all(corpus.num_documents(name) for name in SPLITS)


def test_one_short_file_is_cut_so_that_every_split_has_text(tmp_path: Path) -> None:
    text = book(8)
    corpus = prepare([write(tmp_path / "a.txt", text)], tmp_path / "out")
    split = all_documents(corpus)
    assert all(split.values())
    assert sum(len(part) for parts in split.values() for part in parts) == len(text)
    one_line = write(tmp_path / "b.txt", "汉字" * 400)
    corpus = prepare([one_line], tmp_path / "out2", DataSettings(dedup=False, test_share=0))
    assert corpus.num_documents("validation") and not corpus.num_documents("test")


def test_hash_sides_with_copies_only() -> None:
    digests = np.array([[7, 7]] * 5 + [[8, 8]] * 5 + [[9, 9]] * 5, dtype=np.uint64)
    sides = hash_sides(digests, Shares(0.01, 0.01), seed=0)
    assert {len(set(sides[i : i + 5])) for i in (0, 5, 10)} == {1} and set(sides) == {0, 1, 2}
    with pytest.raises(DataError, match="at least 3"):
        hash_sides(digests[:10], Shares(0.01, 0.01), seed=0)


def test_first_copies() -> None:
    digests = np.array([[5, 1], [3, 2], [5, 1], [5, 2], [3, 2], [5, 1]], dtype=np.uint64)
    assert first_copies(digests).tolist() == [0, 1, 0, 3, 1, 0]


def test_default_shares_grow_for_small_corpora(tmp_path: Path) -> None:
    corpus = prepare([write(tmp_path / "a.txt", book(400))], tmp_path / "out")
    assert corpus.report["split"]["validation_share"] == 0.05
    assert "corpus is small" in corpus.report["split"]["reason"]
    corpus = prepare([tmp_path / "a.txt"], tmp_path / "out", DataSettings(validation_share=0.1, test_share=0.1))
    assert corpus.report["split"]["reason"] == ""


@pytest.mark.parametrize("shares", [(0.1, 0.0), (0.05, 0.05), (0.013, 0.029)])
def test_tail_is_exact_in_characters(tmp_path: Path, shares: tuple[float, float]) -> None:
    text = book(900) + "末尾"
    options = DataSettings(split="tail", validation_share=shares[0], test_share=shares[1])
    corpus = prepare([write(tmp_path / "a.txt", text)], tmp_path / "out", options)
    split = all_documents(corpus)
    first, second = int(round(1 - sum(shares), 9) * len(text)), int(round(1 - shares[1], 9) * len(text))
    assert split["train"] == [text[:first]]
    assert split["validation"] == [text[first:second]]
    assert split["test"] == ([text[second:]] if shares[1] else [])
    assert corpus.origin("validation", 0) == f"{tmp_path}/a.txt:{text[:first].count(chr(10)) + 1}"


def test_tail_of_tinyshakespeare_is_the_usual_benchmark(tmp_path: Path, shared_data: Path) -> None:
    path = shared_data / "tinyshakespeare" / "input.txt"
    options = DataSettings(split="tail", validation_share=0.1, test_share=0)
    split = all_documents(prepare([path], tmp_path / "out", options))
    text = path.read_text(encoding="utf-8")
    assert split["train"] == [text[: int(0.9 * len(text))]]
    assert split["validation"] == [text[int(0.9 * len(text)) :]]


def test_tail_over_several_files(tmp_path: Path) -> None:
    parts = [book(30, 1), book(30, 2), book(30, 2), book(40, 3)]
    for number, part in enumerate(parts):
        write(tmp_path / "in" / f"{number}.txt", part)
    options = DataSettings(split="tail", validation_share=0.2, test_share=0.1)
    corpus = prepare([tmp_path / "in"], tmp_path / "out", options)
    whole = parts[0] + parts[1] + parts[3]  # the copy is gone
    split = {name: "".join(texts) for name, texts in all_documents(corpus).items()}
    assert split["train"] == whole[: int(0.7 * len(whole))]
    assert split["train"] + split["validation"] + split["test"] == whole
    assert corpus.report["duplicates"]["documents"] == 1


def test_tail_never_cuts_a_record(tmp_path: Path) -> None:
    texts = [book(2, i) for i in range(7)]
    path = write_records(tmp_path / "a.jsonl", texts)
    split = all_documents(prepare([path], tmp_path / "out", DataSettings(split="tail")))
    assert [split[name] for name in SPLITS] == [texts[:5], texts[5:6], texts[6:]]
    split = all_documents(
        prepare([path], tmp_path / "out", DataSettings(split="tail", validation_share=0.5, test_share=0))
    )
    assert split["train"] + split["validation"] == texts and len(split["validation"]) == 3


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="200 bytes of text; at least 1000") as error:
        prepare([write(tmp_path / "a.txt", "x" * 200)], tmp_path / "out")
    assert "validation" in error.value.why and error.value.zh
    with pytest.raises(DataError, match="corpus: 2; at least 3"):
        prepare([write_records(tmp_path / "b.jsonl", [book(3, 1), book(3, 2)])], tmp_path / "out")
    with pytest.raises(DataError, match="exact copies were removed"):
        prepare([write_records(tmp_path / "c.jsonl", [book(3, 1)] * 9)], tmp_path / "out")
    with pytest.raises(DataError, match="no text was found") as error:
        write(tmp_path / "d" / "blank.txt", " \n" * 50)
        (tmp_path / "d" / "b.bin").write_bytes(bytes(range(256)))
        prepare([tmp_path / "d"], tmp_path / "out")
    assert "binary" in error.value.why and "blank" in error.value.why
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_impossible_shares(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", book(20))
    for shares in ((-0.1, 0.1), (1.0, 0.0), (0.6, 0.4)):
        with pytest.raises(UsageError):
            prepare([path], tmp_path / "out", DataSettings(validation_share=shares[0], test_share=shares[1]))


def test_report_lists_what_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in" / "a.txt", book(50))
    chinese = "".join(f"他在第{number}天说的话我们都知道。" * 4 + "\n" for number in range(20))
    (tmp_path / "in" / "b.txt").write_bytes(chinese.encode("gb18030") + b"\xff\xff\n")
    (tmp_path / "in" / "c.png").write_bytes(bytes(range(256)))
    write(tmp_path / "in" / ".secret", "x")
    corpus = prepare([tmp_path / "in"], tmp_path / "out", DataSettings(skip_bad=True))
    report = corpus.report
    assert report["encodings"] == {"UTF-8": 1, "GB18030": 1}
    assert report["other_encodings"] == [{"file": "b.txt", "encoding": "GB18030"}]
    assert report["skipped_files"] == {"count": 1, "hidden": 1, "first": [{"file": "c.png", "reason": "binary"}]}
    assert report["bad_records"]["count"] == 1 and report["bad_records"]["first"][0]["where"] == "b.txt:21"
    assert report["languages"]["en"] > 0.5 and report["languages"]["zh"] > 0.02
    assert (
        report["lengths"]["min"] <= report["lengths"]["median"] <= report["lengths"]["p95"] <= report["lengths"]["max"]
    )
    english = describe(report)
    monkeypatch.setenv("HANMO_LANG", "zh")
    translated = describe(report)
    for word in ("GB18030", "c.png", "b.txt:21"):
        assert word in english and word in translated
    assert "documents" in english and "文档" in translated


# -- cache -------------------------------------------------------------------------------------------------------------


def stamp(folder: Path) -> int:
    return (folder / "train.text").stat().st_ino


def test_an_unchanged_corpus_is_reused_and_a_stale_one_never(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path / "in" / "a.txt", book(60)), tmp_path / "out"
    first = prepare([tmp_path / "in"], out)
    made = stamp(out)
    assert prepare([tmp_path / "in"], out).fingerprint == first.fingerprint and stamp(out) == made
    os.utime(path, (1, 1))  # another time, the same content
    prepare([tmp_path / "in"], out)
    assert stamp(out) == made
    changes = [
        ("a.txt changed", lambda: write(path, book(60, seed=5))),
        ("the list of files changed (b.txt)", lambda: write(tmp_path / "in" / "b.txt", book(5, 9))),
        ("the list of files changed (b.txt)", lambda: (tmp_path / "in" / "b.txt").unlink()),
    ]
    seen = {first.fingerprint}
    for message, change in changes:
        change()
        corpus = prepare([tmp_path / "in"], out)
        told = capsys.readouterr().err
        assert message in told and "preparing it again" in told
        assert stamp(out) != made
        made = stamp(out)
        seen.add(corpus.fingerprint)
    assert len(seen) == 3  # the last two changes undo each other
    prepare([tmp_path / "in"], out, DataSettings(half_width=True, seed=3))
    assert "the settings changed (half_width, seed)" in capsys.readouterr().err and stamp(out) != made


def test_other_content_of_the_same_size(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", book(60))
    first = prepare([path], tmp_path / "out")
    changed = path.read_text(encoding="utf-8").replace("quick", "quack")
    write(path, changed)
    second = prepare([path], tmp_path / "out")
    assert first.fingerprint != second.fingerprint
    assert "quack" in "".join(second.documents("train"))


def test_two_folders_with_files_of_the_same_name(tmp_path: Path) -> None:
    folders = [write(tmp_path / name / "a.txt", book(30, seed)).parent for seed, name in enumerate("xy")]
    corpus = prepare(folders, tmp_path / "out")
    made = stamp(tmp_path / "out")
    assert {corpus.origin("train", i).split(":")[0] for i in range(corpus.num_documents("train"))} == {
        str(folder / "a.txt") for folder in folders
    }
    prepare(folders, tmp_path / "out")
    assert stamp(tmp_path / "out") == made
    prepare(folders[::-1], tmp_path / "out")
    assert stamp(tmp_path / "out") != made


def test_a_damaged_corpus_is_rebuilt_and_never_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path / "a.txt", book(60)), tmp_path / "out"
    whole = all_documents(prepare([path], out))
    (out / "train.text").write_bytes((out / "train.text").read_bytes()[:-10])
    with pytest.raises(DataError, match="damaged") as error:
        Corpus.open(out)
    assert "hanmo data" in error.value.fix
    assert all_documents(prepare([path], out)) == whole
    data = bytearray((out / "train.text").read_bytes())
    data[100] ^= 1  # same size
    (out / "train.text").write_bytes(data)
    assert all_documents(prepare([path], out)) == whole
    (out / "hanmo.json").write_text("{")
    assert all_documents(prepare([path], out)) == whole
    assert capsys.readouterr().err.count("preparing it again") == 3
    with pytest.raises(DataError, match="not a prepared corpus"):
        Corpus.open(tmp_path)


def test_a_folder_with_other_files_is_never_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path / "in" / "a.txt", book(60))
    with pytest.raises(DataError, match="other files"):
        prepare([tmp_path / "in"], tmp_path / "in")
    with pytest.raises(DataError, match="other files"):
        write(tmp_path / "model" / "hanmo.json", "{}")
        prepare([path], tmp_path / "model")
    with pytest.raises(DataError, match="there is a file"):
        prepare([path], path)
    assert path.read_text(encoding="utf-8") == book(60)


def test_a_full_disk_leaves_the_old_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write(tmp_path / "a.txt", book(60)), tmp_path / "out"
    first = prepare([path], out)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hanmo.data.prepare.copy_ranges", full)
    with pytest.raises(ResourceError, match="No space left"):
        prepare([path], out, DataSettings(seed=1))
    assert Corpus.open(out, hashes=True).fingerprint == first.fingerprint


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "BATCH_BYTES", 5000)
    write(tmp_path / "in" / "a.txt", book(300))
    corpus = prepare([tmp_path / "in"], tmp_path / "out")
    tokenizer: Any = ByteTokenizer()
    tokens = tokens_module.tokenize(corpus, tokenizer, shard_tokens=7000)
    assert (tokens.vocab_size, tokens.eos_id, tokens.dtype) == (257, 256, np.dtype("<u2"))
    assert len(list(tokens.folder.glob("train-*.bin"))) > 5
    for split in SPLITS:
        expected = np.concatenate([[*text.encode(), 256] for text in corpus.documents(split)])
        array = tokens.tokens(split)
        assert len(array) == tokens.num_tokens(split) == len(expected)
        assert np.array_equal(array[:], expected)
        assert np.array_equal(array[len(array) // 3 : -5], expected[len(array) // 3 : -5])
        spans = tokens.document_spans(split)
        assert spans.dtype == np.int64 and len(spans) == corpus.num_documents(split) + 1
        assert (expected[spans[1:] - 1] == 256).all() and spans[-1] == len(expected)
        assert tokens.num_bytes(split) == corpus.num_bytes(split) == len(expected) - corpus.num_documents(split)
    assert tokens.report["bytes_per_token"] == 1.0
    assert "vocabulary of 257" in describe(corpus.report, tokens.report)


def test_tokens_of_a_long_document_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "BATCH_BYTES", 1000)
    text = book(200) + "没有换行的长句子" * 2000
    corpus = prepare([write(tmp_path / "a.txt", text)], tmp_path / "out", DataSettings(split="tail", test_share=0))
    pieces = [piece for piece, _ in corpus.pieces("train", 1000)]
    assert len(pieces) > 30 and "".join(pieces) == next(corpus.documents("train"))
    tokenizer: Any = ByteTokenizer()
    tokens = corpus.tokenize(tokenizer)
    for split, document in (
        ("train", next(corpus.documents("train"))),
        ("validation", next(corpus.documents("validation"))),
    ):
        assert tokens.tokens(split)[:].tolist() == [*document.encode(), 256]
        assert tokens.document_spans(split).tolist() == [0, len(document.encode()) + 1]
    assert len(tokens.tokens("test")) == 0 and len(tokens.tokens("test")[:]) == 0


def test_token_array_slices() -> None:
    array = TokenArray([np.arange(5), np.arange(5, 9), np.arange(9, 10)], np.dtype("i8"))
    for start in range(11):
        for stop in range(11):
            assert array[start:stop].tolist() == list(range(10))[start:stop]
    assert array[-3:].tolist() == [7, 8, 9]
    with pytest.raises(ValueError, match="step"):
        array[::2]


def test_token_shards_are_reused_only_while_they_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = prepare([write(tmp_path / "a.txt", book(60))], tmp_path / "out")
    tokenizer: Any = ByteTokenizer()
    folder = corpus.tokenize(tokenizer).folder
    assert (
        folder.name == "tokens-" + tokenizer.fingerprint[:12]
        and read_manifest(folder)["tokenizer"] == tokenizer.fingerprint
    )
    made = (folder / "train-00000.bin").stat().st_ino
    corpus.tokenize(tokenizer)
    assert (folder / "train-00000.bin").stat().st_ino == made
    (folder / "train-00000.bin").write_bytes(b"xx")
    with pytest.raises(DataError, match="token shards cannot be used"):
        tokens_module.TokenCorpus.open(folder)
    assert corpus.tokenize(tokenizer).num_tokens("train") == len(corpus.tokenize(tokenizer).tokens("train"))
    assert "writing it again" in capsys.readouterr().err
    # another corpus in the same folder must not find the shards of the old one
    other = prepare([write(tmp_path / "a.txt", book(61, 4))], tmp_path / "out")
    assert not folder.exists()
    assert other.tokenize(tokenizer).manifest["corpus"] == other.fingerprint


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    corpus = prepare([write(tmp_path / "a.txt", book(60))], tmp_path / "out")
    tokenizer: Any = ByteTokenizer()
    tokenizer.vocab_size = 100
    with pytest.raises(ModelError, match="vocabulary has 100"):
        corpus.tokenize(tokenizer)
    tokenizer.eos_id = None
    with pytest.raises(ModelError, match="no end-of-text"):
        corpus.tokenize(tokenizer)
    assert not list((tmp_path / "out").glob("*tokens*"))


def test_wide_vocabularies_use_four_bytes(tmp_path: Path) -> None:
    corpus = prepare([write(tmp_path / "a.txt", book(20))], tmp_path / "out")
    tokenizer: Any = ByteTokenizer()
    tokenizer.vocab_size = 65_537
    tokenizer.eos_id = 65_536
    tokens = corpus.tokenize(tokenizer)
    assert tokens.dtype == np.dtype("<u4") and tokens.tokens("train")[-1:].tolist() == [65_536]


def test_with_a_trained_tokenizer(tmp_path: Path) -> None:
    training = pytest.importorskip("hanmo.text.training")
    corpus = prepare([write(tmp_path / "a.txt", book(300))], tmp_path / "out")
    tokenizer = training.train_bpe(corpus.documents("train"), 400)
    tokens = corpus.tokenize(tokenizer)
    spans, array = tokens.document_spans("train"), tokens.tokens("train")
    for number, text in enumerate(corpus.documents("train")):
        ids = array[spans[number] : spans[number + 1]].tolist()
        assert ids[:-1] == tokenizer.encode(text) and ids[-1] == tokenizer.eos_id
    assert tokens.report["characters_per_token"] > 1.5
    # a long document is encoded in pieces; the ids are those of the whole
    tail = prepare([tmp_path / "a.txt"], tmp_path / "tail", DataSettings(split="tail"))
    pieces = [id for piece, _ in tail.pieces("train", 3000) for id in tokenizer.encode(piece)]
    assert pieces == tokenizer.encode(next(tail.documents("train")))


# -- scale -------------------------------------------------------------------------------------------------------------

MEMORY_SCRIPT = """
import resource, sys
import numpy as np
from hanmo.data import tokens
from hanmo.data.prepare import prepare
from hanmo.data.settings import DataSettings
tokens.BATCH_BYTES = 1 << 20
class Bytes:
    eos_id, vocab_size, fingerprint = 256, 257, "ab" * 32
    def encode_documents(self, texts):
        return [np.frombuffer(t.encode(), dtype=np.uint8).astype(np.uint32) for t in texts]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = prepare([sys.argv[1]], sys.argv[2], DataSettings(split=sys.argv[3]))
corpus.tokenize(Bytes())
size = sum(corpus.num_bytes(split) for split in ("train", "validation", "test"))
print(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("split", ["hash", "tail"])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, split: str) -> None:
    unit = (book(1500) + "这是一段中文，用来占一些地方。\n" * 2000).encode()
    path = tmp_path / "big.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for number in range(100_000_000 // len(unit)):
            stream.write(b"%d\n" % number + unit.replace(b"fox", b"fox%d" % number))
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(path), str(tmp_path / "out"), split]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    size, kilobytes = map(int, result.stdout.split())
    assert size > 80_000_000
    assert kilobytes < 120_000


def test_standard_library_is_a_corpus(tmp_path: Path) -> None:
    paths = stdlib_paths()
    assert len(paths) > 300 and len(set(paths)) == len(paths)
    assert not any("site-packages" in path or "__pycache__" in path for path in paths)
    assert paths == sorted(paths, key=Path)
    corpus = prepare(paths[:60], tmp_path / "out")
    assert corpus.report["formats"] == {"source": 60}
    assert corpus.report["languages"]["code"] > 0.8
    assert corpus_module.Corpus.open(tmp_path / "out").num_documents("train") > 40


def test_real_corpora(tmp_path: Path, shared_data: Path) -> None:
    novels = prepare([shared_data / "zh-novels"], tmp_path / "novels").report
    assert novels["languages"]["zh"] > 0.99 and novels["documents"] > 1000
    poems = prepare([shared_data / "chinese-poetry" / "songci.jsonl"], tmp_path / "poems").report
    assert poems["text_fields"][0]["field"] == "paragraphs (by its name)"
    messages = prepare([shared_data / "sms-spam" / "sms.tsv"], tmp_path / "sms")
    assert messages.report["documents"] + messages.report["duplicates"]["documents"] == 5574
    with pytest.raises(HanmoError, match="invalid UTF-8: the byte 0xE8") as error:
        prepare([shared_data / "gutenberg-nltk" / "chesterton-ball.txt"], tmp_path / "ball")
    assert error.value.where.endswith("chesterton-ball.txt:4631")
