"""GGUF: weights and tokenizers against known truth, and a corpus of hostile files."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hanmo import catalog
from hanmo.errors import ModelError
from hanmo.inference.loading import load_tokenizer
from hanmo.models.cache import KVCache
from hanmo.models.checkpoints import gguf as gguf_module
from hanmo.models.checkpoints.gguf import load_gguf
from hanmo.models.checkpoints.gguf_header import read_gguf_header
from hanmo.models.checkpoints.gguf_tokenizer import read_tokenizer
from hanmo.models.positions import rotary_frequencies
from hanmo.models.transformer import build
from hanmo.text.report import REFERENCE_TOKENS, SAMPLES

from . import gguf_cases
from .gguf_cases import HOSTILE, TEXTS, as_type, bpe, random_model, write_model
from .stories import FIRST_WORDS, build_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid GGUF file."""
    return write_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf", random_model())


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"model_type": "qwen3", "qk_norm": True, "head_dim": 32},
        {"attention_bias": True, "output_bias": True, "mlp_bias": True},
    ],
    ids=["tied", "untied", "qwen3", "biases"],
)
def test_weights_and_config_come_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = random_model(**changes)
    loaded = load_gguf(write_model(tmp_path / "m.gguf", model))
    assert loaded.config == model.config
    state = model.state_dict()
    assert loaded.state.keys() == state.keys()
    for name, tensor in loaded.state.items():
        assert torch.equal(tensor, state[name]), name
    ids = torch.tensor([[1, 5, 9, 300]])
    assert torch.equal(build(loaded.config, loaded.state)(ids), model(ids))
    assert loaded.generation == {
        "bos_token_id": 1,
        "eos_token_id": [2],
        "pad_token_id": 0,
        "add_bos_token": False,
    }


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
def test_each_precision_is_near_the_original(tmp_path: Path, name: str) -> None:
    tolerances = {"F16": 1e-3, "BF16": 8e-3, "Q8_0": 6e-3, "Q5_0": 0.07, "Q5_1": 0.05, "Q4_0": 0.15, "Q4_1": 0.1}
    tolerance = tolerances[name]  # of the largest weight
    model = random_model()
    loaded = load_gguf(write_model(tmp_path / "m.gguf", model, encode=as_type(GGMLQuantizationType[name])))
    for key, original in model.state_dict().items():
        error = (loaded.state[key] - original).abs().max() / original.abs().max()
        assert loaded.state[key].dtype == torch.float32
        assert error <= tolerance, (key, error)


def scalar_q4_k(block: bytes) -> list[float]:
    """One Q4_K block by the book: 8 groups of 32 four-bit values, 6-bit scales and minima in 12 bytes."""
    d, dmin = struct.unpack("<2e", block[:4])
    s, q, out = block[4:16], block[16:], []
    for group in range(8):
        if group < 4:
            scale, minimum = s[group] & 63, s[group + 4] & 63
        else:
            scale = s[group + 4] & 15 | s[group - 4] >> 6 << 4
            minimum = s[group + 4] >> 4 | s[group] >> 6 << 4
        part = q[group // 2 * 32 : group // 2 * 32 + 32]
        out += [d * scale * (byte >> 4 if group % 2 else byte & 15) - dmin * minimum for byte in part]
    return out


def scalar_q5_k(block: bytes) -> list[float]:
    """One Q5_K block: as Q4_K, with a fifth bit of every value in 32 bytes of their own, one bit per group."""
    four = scalar_q4_k(block[:16] + block[48:])
    high, ones = block[16:48], block[:2] + bytes(2) + block[4:16] + b"\x11" * 128
    scales = scalar_q4_k(ones)  # without a minimum and with every code one: the scale of each value
    return [value + 16 * scales[i] * (high[i % 32] >> i // 32 & 1) for i, value in enumerate(four)]


def scalar_q6_k(block: bytes) -> list[float]:
    """One Q6_K block by the book: low nibbles, two high bits, 16 signed scales, one factor."""
    low, high, scales = block[:128], block[128:192], struct.unpack("<16b", block[192:208])
    (d,) = struct.unpack("<e", block[208:])
    out = [0.0] * 256
    for index in range(256):
        half, rest = divmod(index, 128)
        quarter, place = divmod(rest, 32)
        nibble = low[half * 64 + quarter % 2 * 32 + place] >> (4 if quarter >= 2 else 0) & 15
        bits = high[half * 32 + place] >> 2 * quarter & 3
        out[index] = d * scales[index // 16] * ((nibble | bits << 4) - 32)
    return out


@pytest.mark.parametrize(
    ("name", "size", "scalar"), [("Q4_K", 144, scalar_q4_k), ("Q5_K", 176, scalar_q5_k), ("Q6_K", 210, scalar_q6_k)]
)
def test_k_quants_against_a_scalar_reading(
    tmp_path: Path, name: str, size: int, scalar: Callable[[bytes], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (12, size), dtype=np.uint8)
    for start in (208,) if name == "Q6_K" else (0, 2):  # tame half-precision factors
        blocks[:, start : start + 2] = rng.uniform(0.001, 0.01, (12, 1)).astype(np.float16).view(np.uint8)
    writer = GGUFWriter(tmp_path / "k.gguf", "llama")
    kind = GGMLQuantizationType[name]
    writer.add_tensor("token_embd.weight", blocks.reshape(6, 2 * size), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(gguf_module, "CHUNK_VALUES", 1024)  # two rows at a time
    info = read_gguf_header(tmp_path / "k.gguf").tensors["token_embd.weight"]
    values = gguf_module.unpack(tmp_path / "k.gguf", info)
    assert values.shape == (6, 512)
    expected = torch.tensor([scalar(block.tobytes()) for block in blocks]).reshape(6, 512)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_again(tmp_path: Path, factor: float) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = random_model(rope_scaling=scaling, rope_theta=500_000.0)
    plain = random_model(rope_theta=500_000.0)  # the network's own formula is the truth here
    factors = (rotary_frequencies(plain.config) / rotary_frequencies(model.config)).numpy()
    assert factors.max() > 2
    path = write_model(tmp_path / "m.gguf", model, change=lambda w: w.add_tensor("rope_freqs.weight", factors))
    assert load_gguf(path).config.rope_scaling == scaling
    odd = np.linspace(1, 3, len(factors), dtype=np.float32)
    path = write_model(tmp_path / "odd.gguf", model, change=lambda w: w.add_tensor("rope_freqs.weight", odd))
    with pytest.raises(ModelError, match="rotary factors"):
        load_gguf(path)


def test_linear_scaling(tmp_path: Path) -> None:
    def scale(writer: GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(4.0)

    path = write_model(tmp_path / "m.gguf", random_model(), change=scale)
    assert load_gguf(path).config.rope_scaling == {"rope_type": "linear", "factor": 4.0}


# Tokenizers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_ids_equal_the_original_tokenizer(tmp_path: Path, pre: str) -> None:
    path = write_model(tmp_path / "m.gguf", random_model(), pre=pre)
    ours, original = load_gguf(path).tokenizer, bpe(pre)

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.one_of(st.sampled_from(TEXTS), st.text(), st.text(alphabet="a1 9'sS\n\r\t.从山２½ ")))
    def check(text: str) -> None:
        assert ours.encode(text, special=True) == original.encode(text, add_special_tokens=False).ids

    check()
    assert ours.bos_id == 1
    assert ours.eos_id == 2
    assert ours.pad_id == 0
    assert ours.chat_template is not None
    assert ours.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


def test_control_tokens_in_a_text_stay_text(tiny: Path) -> None:
    tokenizer = load_gguf(tiny).tokenizer
    ids = tokenizer.encode("<|im_start|>system")
    assert 1 not in ids
    assert tokenizer.decode(ids) == "<|im_start|>system"


def test_unknown_pre_tokenizer_is_refused_and_a_missing_one_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model()
    path = write_model(tmp_path / "none.gguf", model, pre=None)
    assert load_gguf(path).tokenizer.encode("1234567+x")
    assert "default" in capsys.readouterr().err
    monkeypatch.setattr(gguf_cases, "bpe", lambda _: bpe("gpt-2"))
    path = write_model(tmp_path / "odd.gguf", model, pre="newer-than-this")
    with pytest.raises(ModelError, match="pre-tokenizer 'newer-than-this'") as caught:
        load_gguf(path)
    assert "smollm" in caught.value.fix


def sentencepiece_reference(text: str, vocabulary: dict[str, tuple[int, float]]) -> list[int]:
    """SentencePiece BPE, straight from its definition: join the pair with the best score until none is left."""
    pieces = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        best, where = float("-inf"), -1
        for index in range(len(pieces) - 1):
            known = vocabulary.get(pieces[index] + pieces[index + 1])
            if known and known[1] > best:
                best, where = known[1], index
        if where < 0:
            break
        pieces[where : where + 2] = [pieces[where] + pieces[where + 1]]
    ids: list[int] = []
    for piece in pieces:
        ids += [vocabulary[piece][0]] if piece in vocabulary else [3 + byte for byte in piece.encode()]
    return ids


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as a GGUF file."""
    if not (shared_data / "stories260k").is_dir():
        pytest.skip("stories260k is not in the shared data")
    return build_gguf(shared_data, tmp_path_factory.mktemp("stories") / "stories.gguf")


def test_sentencepiece_ids_equal_the_definition(stories: Path) -> None:
    loaded = load_gguf(stories)
    metadata = read_gguf_header(stories).metadata
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocabulary = {token: (i, score) for i, (token, score) in enumerate(zip(tokens, scores, strict=True)) if i > 258}
    assert loaded.generation["add_bos_token"] is True

    @settings(max_examples=300, deadline=None, database=None)
    @given(
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs"])),
            st.text(alphabet="Lilyonce upatmhdrs,.'\n"),
            st.lists(st.sampled_from([token.replace("▁", " ") for token in tokens[259:]])).map("".join),
        )
    )
    def check(text: str) -> None:
        ids = loaded.tokenizer.encode(text)
        assert ids == sentencepiece_reference(text, vocabulary)
        assert loaded.tokenizer.decode(ids) == text.replace("▁", " ")

    check()
    for text in [*TEXTS, "<s>", "</s> <0x0A> <unk>"]:
        ids = loaded.tokenizer.encode(text)
        assert not {0, 1, 2} & set(ids)
        assert loaded.tokenizer.decode(ids) == text


def test_stories260k_tells_its_known_story(stories: Path) -> None:
    loaded = load_gguf(stories)
    model = build(loaded.config, loaded.state)
    ids, cache = [1], KVCache(loaded.config, 1, 80)
    with torch.no_grad():
        for _ in range(70):
            ids.append(int(model(torch.tensor([ids[-1:]]), cache=cache)[0, -1].argmax()))
    assert loaded.tokenizer.decode(ids[1:]).strip().startswith(FIRST_WORDS)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_wrong_architecture_and_vocabulary(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'mamba'") as caught:
        load_gguf(tmp_path / "a.gguf")
    assert "llama, qwen2, qwen3, gpt2" in caught.value.fix
    small = write_model(tmp_path / "v.gguf", random_model(vocab_size=bpe("smollm").get_vocab_size() - 1))
    with pytest.raises(ModelError, match="ids up to"):
        load_gguf(small)
    with pytest.raises(ModelError, match="no such file"):
        load_gguf(tmp_path / "missing.gguf")


def test_the_spelling_of_a_byte_token_is_not_that_byte() -> None:
    pieces = ["▁", "<", "0", "x", "A", ">", "<0", "x0", "<0x0", "A>"]  # which could be joined to <0x0A>
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, *[6] * 256, *[1] * len(pieces)],
        "tokenizer.ggml.scores": [0.0] * 257 + [-float(rank) for rank in range(len(pieces))],
    }
    tokenizer = read_tokenizer(Path("x.gguf"), metadata)
    assert [tokens[number] for number in tokenizer.encode("<0x0A>")] == ["▁", "<0x0", "A>"]
    assert tokenizer.decode(tokenizer.encode("<0x0A>\n")) == "<0x0A>\n"


def test_tokenizers_that_contradict_themselves() -> None:
    def refuse(match: str, **changes: Any) -> None:
        metadata = {f"tokenizer.ggml.{key}": value for key, value in {**good, **changes}.items()}
        with pytest.raises(ModelError, match=match):
            read_tokenizer(Path("x.gguf"), metadata)

    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    types = [2, *[6] * 256, 1, 1, 1]
    scores = [0.0] * 257 + [-1.0, -2.0, -3.0]
    good: dict[str, Any] = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    assert read_tokenizer(Path("x.gguf"), {f"tokenizer.ggml.{k}": v for k, v in good.items()}).encode("a") == [259]
    refuse("not as many scores", scores=scores[:-1])
    refuse("not as many token types", token_type=types[:-1])
    refuse("share a score", tokens=[*tokens, "aa"], token_type=[*types, 1], scores=[*scores, -3.0])
    refuse("lacks a token for some byte", tokens=["?" if token == "<0x0A>" else token for token in tokens])
    refuse("occurs twice", tokens=[*tokens[:-1], "a"])
    refuse("600000 characters", tokens=[*tokens[:-1], "a" * 600_000])
    refuse("missing or not a list of strings", tokens=[1, 2, 3])
    refuse("missing or not a list of strings", tokens=[])
    refuse("is 260, the vocabulary has 260", bos_token_id=260)


def test_more_layers_than_weights(tmp_path: Path) -> None:
    model = random_model()
    object.__setattr__(model.config, "num_layers", 1_000_000_000)
    path = write_model(tmp_path / "m.gguf", model)
    with pytest.raises(ModelError, match="1000000000 layers"):
        load_gguf(path)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_quickly_and_cheaply(name: str, tiny: Path, tmp_path: Path) -> None:
    original = tiny.read_bytes()
    path = tmp_path / "bad.gguf"
    path.write_bytes(HOSTILE[name](original))
    assert path.read_bytes() != original
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load_gguf(path)
    seconds, (_, peak) = time.monotonic() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 2
    assert peak < 4_000_000
    assert str(path) in str(caught.value)


def test_every_truncation_is_refused(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 200, 7), *range(200, len(data) - 32, 9_973)]:
        path.write_bytes(data[:length])
        with pytest.raises(ModelError):
            load_gguf(path)


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damaged_header_loads_or_is_refused(tiny: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(tiny.read_bytes())
    header = content.index(b"blk.1.ffn_down.weight")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header + 50))] = data.draw(st.integers(0, 255))
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(bytes(content))
    try:
        loaded = load_gguf(path)
        build(loaded.config, loaded.state)
    except ModelError:
        pass


def test_smollm2_from_the_cache_knows_paris() -> None:
    """The real thing, where ``hanmo chat`` has already fetched it."""
    files = sorted(catalog.cache_folder("smollm2-135m-instruct").glob("*.gguf"))
    if not files:
        pytest.skip("smollm2-135m-instruct is not in the cache of this machine")
    loaded = load_gguf(files[0])
    model, tokenizer = build(loaded.config, loaded.state), loaded.tokenizer
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt, special=True)
    assert ids == [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < 16 and (not answer or answer[-1] not in loaded.generation["eos_token_id"]):
            answer.append(int(model(torch.tensor([ids + answer]), last_only=True)[0, -1].argmax()))
    assert "Paris" in tokenizer.decode(answer)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_recorded_reference_counts_are_those_of_the_real_tokenizer() -> None:
    if not catalog.is_cached("smollm2-135m-instruct"):
        pytest.skip("smollm2-135m-instruct is not in the cache of this machine")
    tokenizer = load_tokenizer("smollm2-135m-instruct", offline=True)
    assert {name: len(tokenizer.encode(text)) for name, text in SAMPLES.items()} == REFERENCE_TOKENS
