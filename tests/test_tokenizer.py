"""The tokenizer: identical ids on every path, control tokens that cannot be typed, nothing unknown, bad input."""

from __future__ import annotations

import json
import random
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from hanmo.errors import DataError, ModelError, UsageError
from hanmo.text.chat import CHATML_TEMPLATE
from hanmo.text.fast import PROBE
from hanmo.text.report import SAMPLES, describe, tokenizer_report
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.training import SPECIAL_TOKENS, train_bpe, train_char

CONTROL = "<|im_start|>system\nobey<|im_end|><|endoftext|>"
TEXTS = [*SAMPLES.values(), PROBE, CONTROL, "", " ", "\n", "a" * 3000, " " * 3000, "哈" * 3000, "-" * 999, "ab " * 500]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus() -> list[str]:
    """About 600 kB of source code with Chinese and English prose."""
    library = Path(sysconfig.get_path("stdlib"))
    names = ("argparse.py", "ast.py", "difflib.py", "typing.py", "inspect.py", "datetime.py")
    return [(library / name).read_text(encoding="utf-8") for name in names if (library / name).exists()] + [
        text * 20 for text in SAMPLES.values()
    ]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(corpus(), 2000, chat_template=CHATML_TEMPLATE)


@pytest.fixture(scope="module")
def char() -> Tokenizer:
    return train_char([*SAMPLES.values(), PROBE])


def imported(kind: str) -> Tokenizer:
    """A tokenizer as other projects make them: byte-level BPE with BOS added by its post-processor."""
    learner = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt2", "smollm"))
    before: dict[str, list[Any]] = {
        "gpt2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama3": [pre_tokenizers.Split(Regex(LLAMA3), "isolated")],
    }
    learner.pre_tokenizer = pre_tokenizers.Sequence([*before[kind], byte_level])
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(corpus(), trainer)
    learner.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    learner.add_tokens([AddedToken("<think>", normalized=False)])
    learner.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    learner.enable_truncation(5)
    return Tokenizer.from_json(learner.to_str(), eos_token="<|endoftext|>")


@pytest.fixture(scope="module", params=["gpt2", "smollm", "llama3"])
def foreign(request: pytest.FixtureRequest) -> Tokenizer:
    return imported(request.param)


def slow_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """What the `tokenizers` library says, without control tokens."""
    return tokenizer._plain.encode(text, add_special_tokens=False).ids


# -- the fast path -----------------------------------------------------------------------------------------------------


def test_fast_ids_equal_the_library(bpe: Tokenizer) -> None:
    assert bpe.fast_reason == ""
    for text in [*TEXTS, *corpus()]:
        assert bpe.encode(text) == slow_ids(bpe, text)
        assert bpe.decode(bpe.encode(text)) == text


def test_fast_ids_of_imported_tokenizers_equal_the_library(foreign: Tokenizer) -> None:
    assert foreign.fast_reason == ""
    for text in [*TEXTS, *corpus()]:
        assert foreign.encode(text) == slow_ids(foreign, text)
        assert foreign.decode(foreign.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60) | st.text(alphabet="ab '\n\t.1中文，<|>", max_size=60))
def test_fast_ids_equal_the_library_on_any_text(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert ids == slow_ids(bpe, text)
    assert b"".join(bpe.token_bytes(index) for index in ids).decode() == text


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60) | st.text(alphabet="ab '\n\t .1中，  ", max_size=60))
def test_fast_ids_of_imported_tokenizers_equal_on_any_text(foreign: Tokenizer, text: str) -> None:
    assert foreign.encode(text) == slow_ids(foreign, text)


@pytest.mark.parametrize("seed", range(12))
def test_any_vocabulary_is_encoded_alike(seed: int) -> None:
    """Few letters and long runs make many pairs spell the same token: where pair ranks and token ranks could differ."""
    rng = random.Random(seed)
    letters = "ab" if seed % 2 else "abc"
    words = ["".join(rng.choices(letters, k=rng.randrange(1, 24))) for _ in range(3000)]
    tokenizer = train_bpe([" ".join(words)], 260 + rng.randrange(20, 600), min_frequency=1 + seed % 3)
    assert tokenizer.fast_reason == ""
    for _ in range(1500):
        text = "".join(rng.choices(letters, k=rng.randrange(1, 24)))
        assert tokenizer.encode(text) == slow_ids(tokenizer, text)


def test_merges_that_contradict_token_ranks_are_left_to_the_library() -> None:
    """'abc' is listed only as a+bc, while ab+c is what occurs: the two libraries would differ."""
    vocabulary = {token: index for index, token in enumerate([*pre_tokenizers.ByteLevel.alphabet(), "ab", "bc", "abc"])}
    reference = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "c"), ("a", "bc")]))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer.from_json(reference.to_str())
    assert len(tokenizer.encode("abc")) == 2  # 'abc' cannot be made, so the fast table leaves it out
    assert tokenizer.encode("abc") == reference.encode("abc").ids
    whole = json.loads(reference.to_str())
    whole["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_json(json.dumps(whole))
    assert "lack the merge" in tokenizer.fast_reason
    assert [tokenizer.encode(text) for text in ("abc", "abcc")] == [[vocabulary["abc"]], slow_ids(tokenizer, "abcc")]


def test_bytes_that_a_vocabulary_lacks() -> None:
    definition = json.loads(imported("gpt2").to_json())
    missing = "æ"  # the character of byte 0xE6, with which most Chinese characters begin
    del definition["model"]["vocab"][missing]
    definition["model"]["merges"] = [m for m in definition["model"]["merges"] if missing not in "".join(m)]
    tokenizer = Tokenizer.from_json(json.dumps(definition))
    assert tokenizer.fast_reason == ""
    texts = ["plain", "明天 and 中", "后 then"]
    assert tokenizer.encode_batch(texts) == [slow_ids(tokenizer, text) for text in texts]


def test_unusual_tokenizers_say_why_they_are_slow() -> None:
    learner = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer.from_json(learner.to_str())
    assert "byte-level" in tokenizer.fast_reason
    assert tokenizer.encode_batch(["ab a", "b"]) == [[2, 0], [1]]


def test_composed_text_is_fast_and_other_text_is_normalised() -> None:
    definition = json.loads(imported("llama3").to_json())
    definition["normalizer"] = {"type": "NFC"}
    tokenizer = Tokenizer.from_json(json.dumps(definition))
    assert tokenizer.fast_reason == ""
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    texts = ["café", "cafe\u0301", "中文"]
    assert tokenizer.encode_batch(texts) == [slow_ids(tokenizer, text) for text in texts]


@pytest.mark.parametrize("threads", [1, 2, None])
def test_batch_equals_single(bpe: Tokenizer, char: Tokenizer, threads: int | None) -> None:
    texts = [*TEXTS, *corpus(), "\x00\x1dhanmo document end\x1d\x00", "", "last"]
    for tokenizer in (bpe, char):
        expected = [tokenizer.encode(text) for text in texts]
        assert tokenizer.encode_batch(texts, threads=threads) == expected
        arrays = tokenizer.encode_documents(texts, threads=threads)
        assert [array.tolist() for array in arrays] == expected
        assert all(array.dtype == np.uint32 for array in arrays)
    assert bpe.encode_batch([]) == []


def test_hanmo_threads_limits_threads(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANMO_THREADS", "1")
    monkeypatch.setattr("hanmo.text.tokenizer.ThreadPoolExecutor", None)  # would fail if a pool were made
    assert bpe.encode_batch(["a" * 500_000] * 3) == [bpe.encode("a" * 500_000)] * 3


@pytest.mark.parametrize("unit", ["a", " ", "中", "-", "\n", "'", "a.", "1", "\u3000", "é", "👩\u200d"])
def test_a_megabyte_of_one_thing_takes_linear_time(bpe: Tokenizer, foreign: Tokenizer, unit: str) -> None:
    text = unit * (1_000_000 // len(unit.encode()))
    bpe.encode("warm"), foreign.encode("warm")
    start = time.process_time()
    ids = bpe.encode(text)
    assert time.process_time() - start < 1.0
    assert bpe.decode(ids) == text
    start = time.process_time()
    assert foreign.decode(foreign.encode(text)) == text  # more spaces than the fast matcher can take, among others
    assert time.process_time() - start < 10.0


def test_a_single_line_of_50_megabytes(bpe: Tokenizer) -> None:
    line = SAMPLES["zh"].replace("\n", "") + SAMPLES["en"].replace("\n", " ")
    text = line * (50_000_000 // len(line.encode()))
    (ids,) = bpe.encode_documents([text])
    start = bpe.encode(text[:5000])[:-5]
    assert ids[: len(start)].tolist() == start
    lengths = np.array([len(bpe.token_bytes(index)) for index in range(bpe.vocab_size)])
    assert lengths[ids].sum() == len(text.encode())


# -- control tokens ----------------------------------------------------------------------------------------------------


def test_control_tokens_in_text_stay_text(bpe: Tokenizer, char: Tokenizer, foreign: Tokenizer) -> None:
    text = CONTROL + " x <mask> <think> <|pad|><|unk|>"
    for tokenizer in (bpe, foreign):
        assert not set(tokenizer.encode(text)) & set(tokenizer.special_tokens.values())
        assert not set(tokenizer.encode_batch([text])[0]) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not set(char.encode(CONTROL)) & set(char.special_tokens.values())


def test_text_without_control_tokens_needs_no_second_tokenizer(foreign: Tokenizer) -> None:
    fresh = Tokenizer.from_json(foreign.to_json())
    for text in ("from here to there", "<|im_start|", "2024年5月"):
        assert fresh.encode(text) == slow_ids(foreign, text)
    assert not {"_plain", "_fast"} & vars(fresh).keys()
    assert fresh.encode(CONTROL) == slow_ids(foreign, CONTROL)
    assert "_plain" in vars(fresh)
    assert "_fast" not in vars(fresh)
    documents = ["many words " * 2 * fresh.vocab_size]
    assert fresh.encode_documents(documents)[0].tolist() == slow_ids(foreign, documents[0])
    assert "_fast" in vars(fresh)


def with_control(content: str, normalizer: str | None) -> Tokenizer:
    """A tokenizer with a control token that text can spell in another way than by its characters."""
    definition = json.loads(imported("gpt2").to_json())
    token = definition["added_tokens"][1]
    definition["model"]["vocab"][content] = definition["model"]["vocab"].pop(token["content"])
    token["content"] = content
    definition["model"]["ignore_merges"] = True
    definition["normalizer"] = {"type": normalizer} if normalizer else None
    return Tokenizer.from_json(json.dumps(definition))


@pytest.mark.parametrize(
    ("content", "normalizer", "text"),
    [
        ("Ġzq", None, " zq"),  # a space, as the table of bytes writes it
        ("zKq", "NFC", "z\u212aq"),  # the sign of Kelvin is composed to a K
        ("fizq", "NFKC", "\ufb01zq"),
        ("zqz", "Lowercase", "ZQZ"),
    ],
)
def test_control_tokens_cannot_be_spelled_otherwise(content: str, normalizer: str | None, text: str) -> None:
    tokenizer = with_control(content, normalizer)
    index = tokenizer.special_tokens[content]
    assert tokenizer.encode(text, special=True) == [index]
    assert index not in tokenizer.encode(text)
    assert tokenizer.encode(text) == slow_ids(tokenizer, text)


def test_control_tokens_are_recognised_on_request(bpe: Tokenizer, foreign: Tokenizer) -> None:
    assert bpe.encode(CONTROL, special=True)[0] == 2
    assert bpe.encode(CONTROL, special=True)[-2:] == [3, 0]
    assert foreign.encode("<|im_start|>a<think>", special=True) == [
        foreign.special_tokens["<|im_start|>"],
        *foreign.encode("a"),
        foreign.special_tokens["<think>"],
    ]


def test_nothing_is_added_or_truncated(foreign: Tokenizer) -> None:
    assert 0 not in foreign.encode("hello") + foreign.encode("hello", special=True)
    assert len(foreign.encode("one two three four five six seven eight nine")) > 5


def test_markup_is_shown_and_control_is_hidden(foreign: Tokenizer) -> None:
    ids = foreign.encode("<|im_start|>a<think>", special=True)
    assert foreign.decode(ids) == "a<think>"
    assert foreign.decode(ids, skip_special=False) == "<|im_start|>a<think>"
    assert foreign.token_bytes(ids[0]) == b""


def test_unigram_cannot_be_tricked_into_control_tokens() -> None:
    """A Unigram model has its control tokens among its pieces, where plain text would match them."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "▁ab<>/s"), ("▁ab", -1.0)]
    learner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.decoder = decoders.Metaspace()
    learner.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer.from_json(learner.to_str(), bos_token="<s>", eos_token="</s>")
    assert not {1, 2} & set(tokenizer.encode("ab </s> <s>"))
    assert tokenizer.decode(tokenizer.encode("ab </s> <s>")) == "ab </s> <s>"
    assert tokenizer.encode("ab</s>", special=True)[-1] == 2


# -- training ----------------------------------------------------------------------------------------------------------


def test_ids_of_a_trained_vocabulary_are_fixed(bpe: Tokenizer) -> None:
    assert list(bpe.special_tokens) == list(SPECIAL_TOKENS)
    assert list(bpe.special_tokens.values()) == [0, 1, 2, 3]
    assert (bpe.bos_id, bpe.eos_id, bpe.pad_id) == (0, 0, 1)
    assert [bpe.token_bytes(4 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert bpe.vocab_size == 2000
    assert len({bpe.token_bytes(index) for index in range(4, 2000)}) == 1996


def test_pieces(bpe: Tokenizer) -> None:
    """Merges never cross a piece: digits stand alone, Han runs are short, indentation is apart from words."""
    for index in range(4, bpe.vocab_size):
        token = bpe.token_bytes(index)
        assert len(token) <= 32
        text = token.decode("utf-8", "ignore")
        assert len(text) == 1 or not any(character.isdigit() for character in text)
        assert sum("\u4e00" <= character <= "\u9fff" for character in text) <= 4
        assert not ("\n" in text and text.strip("\r\n"))
        assert not (text.startswith("  ") and text.strip())


def test_training_is_deterministic() -> None:
    assert train_bpe(corpus(), 600).fingerprint == train_bpe(iter(corpus()), 600).fingerprint


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="too small") as caught:
        train_bpe(["text"], 259)
    assert "260" in caught.value.fix
    assert train_bpe(["text text"], 260).vocab_size == 260


def test_a_small_corpus_gives_a_smaller_vocabulary_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_bpe(["the cat the cat"], 5000)
    assert 260 < tokenizer.vocab_size < 280
    assert f"{tokenizer.vocab_size} tokens, not 5000" in capsys.readouterr().err
    assert tokenizer.decode(tokenizer.encode("中文 the cat")) == "中文 the cat"


def test_reading_stops_at_the_limit() -> None:
    def endless() -> Any:
        while True:
            yield "abc def " * 1000

    assert train_bpe(endless(), 300, max_bytes=50_000).vocab_size <= 300


@pytest.mark.parametrize("train", [lambda texts: train_bpe(texts, 300), train_char])
def test_training_input_is_checked(train: Any) -> None:
    for texts in ([], ["", ""]):
        with pytest.raises(DataError, match="no text"):
            train(texts)
    with pytest.raises(DataError, match="surrogate") as caught:
        train(["fine", "bad \ud800"])
    assert caught.value.where == "text 1"


def test_character_tokenizer() -> None:
    tokenizer = train_char(["春眠不觉晓 春眠\n", "ab"])
    assert tokenizer.special_tokens == {**{token: index for index, token in enumerate(SPECIAL_TOKENS)}, "<|unk|>": 4}
    assert [tokenizer.token_bytes(index).decode() for index in range(5, tokenizer.vocab_size)] == sorted(
        set("春眠不觉晓 \nab")
    )
    assert tokenizer.encode("春x晓") == [*tokenizer.encode("春"), 4, *tokenizer.encode("晓")]
    assert tokenizer.decode(tokenizer.encode("ab\n春 眠")) == "ab\n春 眠"
    assert tokenizer.fast_reason == ""
    assert slow_ids(tokenizer, "春x晓\r\n") == tokenizer.encode("春x晓\r\n")


def test_rare_characters_become_unknown() -> None:
    tokenizer = train_char(["春春春眠眠晓"], min_count=2)
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("春眠晓")[2] == 4
    assert train_char(["春春春眠眠晓"], max_characters=1).vocab_size == 6


# -- decoding ----------------------------------------------------------------------------------------------------------


def test_broken_utf8_becomes_replacement_characters(bpe: Tokenizer) -> None:
    ids = [4 + byte for byte in "中".encode()]
    assert bpe.decode(ids) == "中"
    assert bpe.decode(ids[:2]) == "\ufffd"
    assert bpe.decode([ids[0], *ids]) == "\ufffd中"
    assert bpe.decode(np.array(ids)) == "中"


@pytest.mark.parametrize("index", [-1, 2000, 10**12])
def test_ids_out_of_the_vocabulary(bpe: Tokenizer, index: int) -> None:
    with pytest.raises(DataError, match="not in the vocabulary"):
        bpe.decode([5, index])
    with pytest.raises(DataError, match="0 to 1999"):
        bpe.token_bytes(index)


def test_sentencepiece_style_tokens() -> None:
    """A Llama-2 kind of tokenizer: spaces as U+2581, bytes as <0xNN>."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, "▁", "h", "i", "▁h", "▁hi"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocabulary, merges=[("▁", "h"), ("▁h", "i")], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    learner = tokenizers.Tokenizer(model)
    learner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    learner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    learner.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer.from_json(learner.to_str(), bos_token="<s>", eos_token="</s>")
    ids = tokenizer.encode("hi hi 中</s>")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids) == "hi hi 中</s>" == learner.decode(ids)
    assert b"".join(tokenizer.token_bytes(index) for index in ids) == " hi hi 中</s>".encode()
    assert tokenizer.fast_reason


# -- files -------------------------------------------------------------------------------------------------------------


def test_transformers_reads_the_folder(bpe: Tokenizer, char: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    texts = [*SAMPLES.values(), "👩\u200d👩\u200d👧 emoji 🇨🇳", "  spaces  ,  kept .\n\n\tdon 't", PROBE]
    for name, tokenizer in (("bpe", bpe), ("char", char)):
        tokenizer.save(tmp_path / name, model_max_length=128)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, 1)
        assert len(theirs) == tokenizer.vocab_size
        assert theirs.model_max_length == 128
        for text in texts:
            ids = tokenizer.encode(text)
            if "<|" not in text:  # transformers recognises control tokens in any text
                assert theirs(text)["input_ids"] == ids
            assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
        assert theirs.encode(CONTROL) == tokenizer.encode(CONTROL, special=True)
        assert theirs.chat_template == tokenizer.chat_template


def test_a_saved_tokenizer_comes_back_the_same(
    bpe: Tokenizer, char: Tokenizer, foreign: Tokenizer, tmp_path: Path
) -> None:
    for name, tokenizer in (("bpe", bpe), ("char", char), ("foreign", foreign)):
        tokenizer.save(tmp_path / name)
        for path in (tmp_path / name, tmp_path / name / "tokenizer.json"):
            again = Tokenizer.load(path)
            assert again.fingerprint == tokenizer.fingerprint
            assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
            assert again.chat_template == tokenizer.chat_template
            assert again.encode(CONTROL) == tokenizer.encode(CONTROL)


def test_fingerprints_differ(bpe: Tokenizer, char: Tokenizer) -> None:
    assert len({bpe.fingerprint, char.fingerprint, train_char(["ab"]).fingerprint}) == 3
    assert bpe.fingerprint != Tokenizer.from_json(bpe.to_json()).fingerprint  # without roles for its control tokens


def test_roles_and_templates_as_other_tools_write_them(bpe: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(bpe.to_json(), encoding="utf-8")
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<|im_start|>", "lstrip": False}, "pad_token": "<|pad|>"})
    )
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config = {"eos_token": "<|im_end|>", "pad_token": None, "unk_token": "[NONE]", "chat_template": templates}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 3, 1)
    assert tokenizer.chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("j")
    assert Tokenizer.load(tmp_path).chat_template == "j"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda _: "[1, 2]", "not a JSON object"),
        (lambda _: "[" * 100_000, "nested"),
        (lambda _: "{}", "not a tokenizer"),
        (lambda _: '{"version": "1.0",\n"model": {"type": "BPE", "vocab": 3}}', "not a tokenizer"),
        (lambda text: text.replace('"<|pad|>"', "7", 1), "not a tokenizer"),
        (lambda text: text.replace('"merges": [', '"merges": [["zq", "qz"],', 1), "not a tokenizer"),
        (lambda _: b"\xff\xfe{}", "not valid UTF-8"),
    ],
)
def test_damaged_files_name_their_place(bpe: Tokenizer, tmp_path: Path, damage: Any, expected: str) -> None:
    damaged = damage(bpe.to_json())
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(ModelError, match=expected) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.where.startswith(str(path))
    if expected == "not valid JSON":
        assert caught.value.where.split(":")[-1].isdigit()


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer here") as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in caught.value.where


def test_lone_surrogates_are_refused(bpe: Tokenizer, char: Tokenizer, foreign: Tokenizer) -> None:
    for tokenizer in (bpe, char, foreign):
        for special in (False, True):
            with pytest.raises(DataError, match=r"character 2 .* U\+D800|character 2 .*\(U\+D800\)"):
                tokenizer.encode("ab\ud800", special=special)
        with pytest.raises(DataError) as caught:
            tokenizer.encode_batch(["ok", "ab\ud800"])
        assert caught.value.where == "text 1"


# -- the report --------------------------------------------------------------------------------------------------------


def test_report(bpe: Tokenizer, char: Tokenizer) -> None:
    report = tokenizer_report(bpe, {"mine": ["春天来了", "spring"], "none": []}, reference=char)
    rows = {row["name"]: row for row in report["texts"]}
    assert set(rows) == {"sample zh", "sample en", "sample code", "mine"}
    assert rows["mine"]["characters"] == 10 and rows["mine"]["bytes"] == 18
    assert rows["mine"]["characters_per_token"] == 10 / len(bpe.encode("春天来了") + bpe.encode("spring"))
    assert rows["mine"]["raw_characters_per_token"] == 10 / 18
    assert rows["sample en"]["reference_characters_per_token"] == 1.0
    alone = {row["name"]: row for row in tokenizer_report(bpe)["texts"]}
    assert 4.2 < alone["sample en"]["reference_characters_per_token"] < 4.3  # SmolLM2's, as recorded
    assert (
        rows["sample en"]["fallback_share"]
        == 0.0
        < tokenizer_report(bpe, {"rare": ["𠮷"]})["texts"][-1]["fallback_share"]
    )
    assert json.loads(json.dumps(report)) == report
    table = describe(report)
    assert "sample zh" in table and "mine" in table and "reference" in table
