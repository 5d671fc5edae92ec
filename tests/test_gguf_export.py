"""GGUF files that we write: quantisers, metadata and tokenizers, read back here, by transformers and by llama.cpp."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import quants as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from hanmo import catalog
from hanmo import folder as folders
from hanmo.cli import export
from hanmo.cli.main import main
from hanmo.errors import ModelError, ResourceError, UsageError
from hanmo.models.checkpoints import gguf_writer
from hanmo.models.checkpoints.gguf import load_gguf, load_gguf_tokenizer
from hanmo.models.checkpoints.gguf_header import read_gguf_header
from hanmo.models.checkpoints.gguf_names import FAMILIES, LLAMA3_PARAMETERS
from hanmo.models.checkpoints.gguf_quantize import quantize
from hanmo.models.checkpoints.gguf_tokenizer import ORIGINAL, read_tokenizer
from hanmo.models.checkpoints.gguf_tokenizer_writer import tokenizer_metadata
from hanmo.models.checkpoints.gguf_writer import save_gguf
from hanmo.models.heads import HeadConfig
from hanmo.models.transformer import Transformer, TransformerConfig, build
from hanmo.text.chat import CHATML_TEMPLATE
from hanmo.text.report import SAMPLES
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.training import train_bpe, train_char, train_words

from .gguf_cases import TEXTS, bpe
from .stories import build_gguf

CONFIG = TransformerConfig(400, 256, 3, 4, 2, 64, 512, 128, rope_theta=50_000.0)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # of no known model: found again by our own entry
}
NETWORKS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama untied": {"tie_embeddings": False, "num_kv_heads": 4},
    "llama 3 scaling": {"rope_scaling": LLAMA3},
    "linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama biases": {"attention_bias": True, "output_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "attention_bias": True, "norm_eps": 1e-6},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "head_dim": 128},
    "gpt2": {
        "model_type": "gpt2",
        "num_kv_heads": 4,
        "rope_theta": 10_000.0,
        "norm": "layer",
        "norm_bias": True,
        "positions": "learned",
        "gated": False,
        "activation": "gelu_tanh",
        **dict.fromkeys(("attention_bias", "output_bias", "mlp_bias"), True),
    },
}
IDS = [1, 5, 9, 300, 17, 250, 33, 99, 100, 101, 5, 5, 7, 8, 9, 10] * 3
TYPES = ("F16", "Q8_0", "Q4_0", "Q4_K")
PAIRS = [*((name, type) for name in NETWORKS for type in ("F16", "Q4_K")), ("llama", "Q8_0"), ("gpt2", "Q4_0")]


def random_model(**changes: Any) -> Transformer:
    """A small network whose weights are as large as trained ones, and exact in half precision."""
    model = Transformer(dataclasses.replace(CONFIG, **changes)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        scale, centre = (0.04, 0.0) if parameter.dim() > 1 else (0.1, 1.0 if "norm" in name and "weight" in name else 0)
        parameter.data = (centre + scale * torch.randn(parameter.shape, generator=generator)).half().float()
    return model


@functools.cache
def small_tokenizer(pre: str = "smollm") -> Tokenizer:
    """A byte-level BPE whose rule llama.cpp knows by name."""
    return Tokenizer.from_json(
        bpe(pre).to_str(),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML_TEMPLATE,
    )


def write(path: Path, model: Transformer, tokenizer: Tokenizer | None = None, **options: Any) -> Path:
    """Write a model and return the path."""
    save_gguf(path, model.config, model.state_dict(), tokenizer or small_tokenizer(), **options)
    return path


def logits(model: Transformer, ids: list[int] = IDS) -> torch.Tensor:
    """Logits of one sequence, ``[T, V]``."""
    with torch.no_grad():
        result: torch.Tensor = model(torch.tensor([ids]))[0]
    return result


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far ``a`` is from ``b``, relative to the size of ``b``."""
    return float((a - b).norm() / b.norm())


def llama(path: Path, **options: Any) -> Any:
    """The model in llama.cpp; the test is skipped where that is not installed."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    return llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False, **options)


# Quantisers ----------------------------------------------------------------------------------------------------------


def unpacked(values: np.ndarray, kind: str) -> np.ndarray:
    """Values after they were packed and unpacked (by the ``gguf`` package)."""
    packed = quantize(torch.from_numpy(values), kind)
    result: np.ndarray = reference.dequantize(packed, GGMLQuantizationType[kind])
    return result


def rmse(values: np.ndarray, kind: str) -> float:
    """Root mean square error of a type."""
    return float(np.sqrt(np.mean(np.square(unpacked(values, kind) - values, dtype=np.float64))))


def samples() -> dict[str, np.ndarray]:
    """Matrices of different distributions."""
    rng = np.random.default_rng(0)
    shape = (64, 1024)
    return {
        "normal": rng.normal(0, 0.05, shape).astype(np.float32),
        "heavy tails": (0.05 * rng.standard_t(3, shape)).astype(np.float32),
        "uniform": rng.uniform(-1, 1, shape).astype(np.float32),
        "shifted": rng.normal(0.1, 0.05, shape).astype(np.float32),
    }


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q5_0", "Q4_0"])
def test_simple_types_are_those_of_the_reference_byte_for_byte(kind: str) -> None:
    for values in samples().values():
        packed = quantize(torch.from_numpy(values), kind)
        expected = reference.quantize(values, GGMLQuantizationType[kind]).view(np.uint8)
        assert packed.dtype == np.uint8
        assert np.array_equal(packed, expected)


@pytest.mark.parametrize("name", samples())
def test_errors_fall_in_the_order_of_the_types(name: str) -> None:
    errors = {kind: rmse(samples()[name], kind) for kind in ("Q4_0", "Q4_K", "Q6_K", "Q8_0")}
    assert errors["Q4_K"] < 0.86 * errors["Q4_0"]
    assert errors["Q6_K"] < 0.45 * errors["Q4_K"]
    assert errors["Q8_0"] < 0.4 * errors["Q6_K"]
    if name == "shifted":
        assert errors["Q4_K"] < 0.55 * errors["Q4_0"]  # it stores a minimum


def ggml_quantize(values: np.ndarray, kind: str) -> np.ndarray:
    """The bytes that llama.cpp's own quantiser makes."""
    package = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    library = next((Path(package.__file__).parent / "lib").glob("libggml-base.*"))
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    number = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[number]
    rows, columns = values.shape
    out = np.zeros((rows, columns // block * size), np.uint8)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (values, out)]
    counts = [ctypes.c_int64(number) for number in (0, rows, columns)]
    function(ctypes.c_int(number), *pointers, *counts, None)
    return out


@pytest.mark.parametrize("name", samples())
def test_against_the_quantisers_of_llama_cpp(name: str) -> None:
    values = samples()[name]
    for kind in ("Q8_0", "Q5_0", "Q4_0"):
        assert np.array_equal(quantize(torch.from_numpy(values), kind), ggml_quantize(values, kind))
    for kind in ("Q4_K", "Q6_K"):
        theirs = reference.dequantize(ggml_quantize(values, kind), GGMLQuantizationType[kind])
        assert rmse(values, kind) < 1.02 * np.sqrt(np.mean(np.square(theirs - values)))


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_extreme_blocks(kind: str) -> None:
    rng = np.random.default_rng(1)
    spike = np.zeros(256)
    spike[7] = 5.0
    mixed = rng.normal(0, 1e-5, 256)
    mixed[:32] = 1000 * rng.normal(size=32)
    blocks = {
        "zeros": (np.zeros(256), 0.0),
        "constant": (np.full(256, 0.3), 0.001),
        "negative constant": (np.full(256, -0.3), 0.001),
        "one value": (spike, 0.002),
        "one negative value": (-spike, 0.002),
        "positive": (rng.uniform(1, 2, 256), 0.07),
        "negative": (rng.uniform(-2, -1, 256), 0.07),
        "huge": (rng.uniform(-60_000, 60_000, 256), 0.08),
        "of two sizes": (mixed, 0.08),
        "too small for half precision": (rng.uniform(-1e-38, 1e-38, 256), 1.0),
    }
    for name, (values, tolerance) in blocks.items():
        row = values.astype(np.float32)[None]
        result = unpacked(row, kind)
        assert np.isfinite(result).all(), name
        assert np.abs(result - row).max() <= tolerance * np.abs(row).max(), name


@settings(max_examples=100, deadline=None, database=None)
@given(st.integers(0, 2**32 - 1), st.floats(-3, 4), st.floats(0, 3), st.sampled_from(["Q4_K", "Q6_K"]))
def test_no_value_moves_further_than_its_step(seed: int, magnitude: float, spread: float, kind: str) -> None:
    rng = np.random.default_rng(seed)
    groups = 10.0 ** (magnitude - spread * rng.random((2, 16, 1)))  # groups of very different sizes
    values = (groups * np.clip(rng.normal(size=(2, 16, 16)), -4, 4)).astype(np.float32).reshape(2, 256)
    largest = np.abs(values).max(1, keepdims=True)
    # Half a step of the coarsest group is 1/15 (Q4_K) or 1/63 of the largest value; the rest is for rounded scales.
    assert (np.abs(unpacked(values, kind) - values) <= {"Q4_K": 0.15, "Q6_K": 0.05}[kind] * largest).all()


# Networks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "type"), PAIRS)
def test_networks_come_back(name: str, type: str, tmp_path: Path) -> None:
    model = random_model(**NETWORKS[name])
    path = write(tmp_path / "m.gguf", model, type=type)
    loaded = load_gguf(path)
    assert loaded.config == model.config
    assert loaded.state.keys() == model.state_dict().keys()
    family = FAMILIES[read_gguf_header(path).metadata["general.architecture"]]
    for key, original in model.state_dict().items():
        kind = gguf_writer.kind_of(gguf_writer.gguf_name(key, family), tuple(original.shape), model.config, type)
        expected = original if kind == "F32" else torch.from_numpy(unpacked(original.numpy(), kind))
        assert (
            torch.equal(loaded.state[key], expected)
            if kind[1] in "F380"
            else distance(loaded.state[key], expected) < 1e-2
        ), key
    if type == "F16":
        assert torch.equal(logits(build(loaded.config, loaded.state)), logits(model))


@pytest.mark.parametrize(("name", "type"), PAIRS)
def test_llama_cpp_computes_the_same(name: str, type: str, tmp_path: Path) -> None:
    # llama.cpp rounds activations: to half precision before F16 matrices, to 8 bits before quantised ones.
    tolerance = 2e-3 if type == "F16" else 0.04
    model = random_model(**NETWORKS[name])
    path = write(tmp_path / "m.gguf", model, type=type)
    other = llama(path, logits_all=True)
    other.eval(IDS)
    loaded = load_gguf(path)
    assert distance(torch.tensor(other.scores[: len(IDS)]), logits(build(loaded.config, loaded.state))) < tolerance


@pytest.mark.parametrize("name", ["llama", "llama untied", "qwen2", "qwen3", "gpt2"])
def test_transformers_reads_the_same(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")  # from_pretrained would need accelerate
    usual = {"max_position_embeddings": 1024, "intermediate_size": 1024} if name == "gpt2" else {}  # it reads no other
    model = random_model(**{**NETWORKS[name], **usual})
    path = write(tmp_path / "m.gguf", model, type="F16")
    described = reader.load_gguf_checkpoint(str(path))["config"]
    config = transformers.AutoConfig.for_model(**described)
    other = transformers.AutoModelForCausalLM.from_config(config).eval()
    tensors = reader.load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=other)["tensors"]
    missing, unexpected = other.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.config.tie_embeddings else set())
    other.tie_weights()
    with torch.no_grad():
        theirs = other(torch.tensor([IDS])).logits[0]
    assert distance(theirs, logits(model)) < 1e-4


def test_the_mixture_of_types(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.gguf", random_model(num_layers=8, tie_embeddings=False, intermediate_size=288), type="Q4_K"
    )
    numbers = {number: name for name, (number, _, _) in gguf_writer.BLOCKS.items()}
    kinds = {name: numbers[info.type] for name, info in read_gguf_header(path).tensors.items()}
    assert kinds["output.weight"] == "Q6_K"
    assert kinds["token_embd.weight"] == kinds["blk.1.attn_v.weight"] == kinds["blk.0.attn_q.weight"] == "Q4_K"
    assert [layer for layer in range(8) if kinds[f"blk.{layer}.attn_v.weight"] == "Q6_K"] == [0, 3, 6, 7]
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"  # rows of 288 are no super-blocks
    assert kinds["blk.1.ffn_down.weight"] == "Q5_0"
    assert kinds["blk.1.attn_norm.weight"] == "F32"
    narrow = random_model(hidden_size=72, num_heads=1, num_kv_heads=1)
    path = write(tmp_path / "narrow.gguf", narrow, type="Q8_0")
    kinds = {name: numbers[info.type] for name, info in read_gguf_header(path).tensors.items()}
    assert kinds["blk.0.ffn_up.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"


def test_the_pieces_in_which_it_is_written_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    whole = write(tmp_path / "m.gguf", model, type="Q8_0", name="m").read_bytes()
    monkeypatch.setattr(gguf_writer, "CHUNK_VALUES", 5000)
    assert write(tmp_path / "m.gguf", model, type="Q8_0", name="m").read_bytes() == whole


def test_bits_per_weight(tmp_path: Path) -> None:
    model = random_model()
    for type, low, high in (("F16", 16, 16.1), ("Q8_0", 8.5, 8.6), ("Q4_0", 4.5, 4.8), ("Q4_K", 4.5, 5.1)):
        written = save_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), small_tokenizer(), type=type)
        assert low <= written.bits_per_weight <= high
        assert written.num_bytes == (tmp_path / "m.gguf").stat().st_size
        assert sum(written.weights_by_type.values()) == sum(p.numel() for p in model.parameters())


def test_a_sliding_window_shortens_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m.gguf", random_model(model_type="mistral", sliding_window=32))
    assert "a context of 32 tokens" in capsys.readouterr().err
    config = load_gguf(path).config
    assert config == dataclasses.replace(CONFIG, max_position_embeddings=32)


# Tokenizers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_known_rules_are_found_and_llama_cpp_agrees(
    pre: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = small_tokenizer(pre)
    model = random_model(vocab_size=tokenizer.vocab_size + 5)
    path = write(tmp_path / "m.gguf", model, tokenizer)
    assert "llama.cpp" not in capsys.readouterr().err
    metadata = read_gguf_header(path).metadata
    assert metadata["tokenizer.ggml.pre"] == pre
    assert len(metadata["tokenizer.ggml.tokens"]) == tokenizer.vocab_size + 5
    loaded = load_gguf(path)
    assert loaded.tokenizer.vocab_size == tokenizer.vocab_size
    assert loaded.generation == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0, "add_bos_token": False}
    other = llama(path, vocab_only=True)
    for text in [*SAMPLES.values(), *TEXTS]:
        ids = tokenizer.encode(text)
        assert loaded.tokenizer.encode(text) == ids
        assert other.tokenize(text.encode(), add_bos=False, special=False) == ids
        assert other.detokenize(ids).decode() == text
    rendered = "<|im_start|>user\n你好<|im_end|>\n"
    assert other.tokenize(rendered.encode(), add_bos=False, special=True) == tokenizer.encode(rendered, special=True)
    assert other.metadata["tokenizer.chat_template"] == CHATML_TEMPLATE == loaded.tokenizer.chat_template
    assert (other.token_bos(), other.token_eos()) == (1, 2)


@pytest.fixture(scope="module")
def chinese_and_english(shared_data: Path) -> list[str]:
    """Some real text."""
    novel = (shared_data / "zh-novels" / "西游记.txt").read_text(encoding="utf-8")[:60_000]
    plays = "".join(
        path.read_text(encoding="utf-8") for path in sorted((shared_data / "tinyshakespeare").rglob("*.txt"))
    )
    return [novel, plays[:60_000]]


def test_our_own_bpe_is_exact_here_and_near_in_llama_cpp(
    chinese_and_english: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_bpe(chinese_and_english, 2000, chat_template=CHATML_TEMPLATE)
    path = write(tmp_path / "m.gguf", random_model(vocab_size=2000), tokenizer)
    notice = capsys.readouterr().err
    assert "llama.cpp cannot cut text exactly" in notice
    assert "'qwen2'" in notice
    loaded = load_gguf_tokenizer(path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.chat_template == tokenizer.chat_template
    other = llama(path, vocab_only=True)
    assert other.metadata["tokenizer.ggml.pre"] == "qwen2"
    for text in [*SAMPLES.values(), *TEXTS, *(text[-2000:] for text in chinese_and_english)]:
        ids, theirs = tokenizer.encode(text), other.tokenize(text.encode(), add_bos=False, special=False)
        assert loaded.encode(text) == ids
        assert other.detokenize(theirs).decode() == text
        assert abs(len(theirs) - len(ids)) <= 0.12 * len(ids)
    assert other.tokenize(SAMPLES["en"].encode(), add_bos=False) == tokenizer.encode(SAMPLES["en"])


def test_characters(chinese_and_english: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_char([*chinese_and_english, SAMPLES["zh"]])
    path = write(tmp_path / "m.gguf", random_model(vocab_size=tokenizer.vocab_size), tokenizer)
    assert "outside the vocabulary" in capsys.readouterr().err
    loaded = load_gguf_tokenizer(path)
    assert loaded.fingerprint == tokenizer.fingerprint
    other = llama(path, vocab_only=True)
    unknown = tokenizer.special_tokens["<|unk|>"]
    for text in [*SAMPLES.values(), *TEXTS, chinese_and_english[0][:3000]]:
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == ids
        known = [index for index in ids if index != unknown]
        assert other.tokenize(text.encode(), add_bos=False, special=False) == known
    assert other.detokenize(tokenizer.encode(SAMPLES["zh"])).decode() == SAMPLES["zh"]


def test_stories260k(shared_data: Path, tmp_path: Path) -> None:
    if not (shared_data / "stories260k").is_dir():
        pytest.skip("stories260k is not in the shared data")
    first = load_gguf(build_gguf(shared_data, tmp_path / "first.gguf"))
    texts = [*SAMPLES.values(), *TEXTS, "Once upon a time", "  two spaces", "", "<s> </s> <unk>"]
    for type in TYPES:
        path = tmp_path / f"{type}.gguf"
        save_gguf(path, first.config, first.state, first.tokenizer, type=type, generation=first.generation)
        loaded = load_gguf(path)
        assert loaded.config == first.config
        assert loaded.generation == first.generation
        assert [loaded.tokenizer.encode(text) for text in texts] == [first.tokenizer.encode(text) for text in texts]
        story = [1, 403, 407, 261, 378] * 8
        ours = logits(build(loaded.config, loaded.state), story)
        other = llama(path, logits_all=True)
        other.eval(story)
        assert distance(torch.tensor(other.scores[: len(story)]), ours) < (1e-3 if type == "F16" else 0.02)
        assert other.tokenize(b"Once upon a time")[0] == 1  # BOS
    for text in [*SAMPLES.values(), *TEXTS]:
        assert other.tokenize(text.encode(), add_bos=False, special=False) == first.tokenizer.encode(text)


def test_smollm2_from_the_cache(tmp_path: Path) -> None:
    files = sorted(catalog.cache_folder("smollm2-135m-instruct").glob("*.gguf"))
    if not files:
        pytest.skip("smollm2-135m-instruct is not in the cache of this machine")
    first = load_gguf(files[0])
    path = tmp_path / "smollm2.gguf"
    save_gguf(path, first.config, first.state, first.tokenizer, generation=first.generation)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = first.tokenizer.encode(prompt, special=True)
    other = llama(path)
    assert other.tokenize(prompt.encode(), add_bos=False, special=True) == ids
    assert "Paris" in other(prompt, max_tokens=12, temperature=0)["choices"][0]["text"]
    for text in [*SAMPLES.values(), *TEXTS]:
        assert other.tokenize(text.encode(), add_bos=False, special=False) == first.tokenizer.encode(text)


def test_end_tokens_and_bos(tmp_path: Path) -> None:
    given = {"bos_token_id": 0, "eos_token_id": [0, 2], "pad_token_id": None, "add_bos_token": True}
    path = write(tmp_path / "m.gguf", random_model(), generation=given)
    read = load_gguf(path).generation
    assert read == {**given, "eos_token_id": [2, 0]}  # the tokenizer's own comes first
    other = llama(path, vocab_only=True)
    assert (other.token_bos(), other.token_eos()) == (0, 2)
    assert other.tokenize(b"x")[0] == 0


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert", "causal": False}, "kind 'bert'"),
        ({"model_type": "gpt_neox"}, "kind 'gpt_neox'"),
        ({"head": HeadConfig("sequence-classification", ("a", "b")), "lm": False}, "llama with a head"),
        ({**NETWORKS["gpt2"], "norm": "rms"}, "cannot express norm = 'rms', only 'layer'"),
        ({**NETWORKS["gpt2"], "activation": "gelu"}, "activation = 'gelu', only 'gelu_tanh'"),
        ({"activation": "relu"}, "activation = 'relu'"),
        ({"embedding_scale": 16.0}, "embedding_scale = 16.0"),
        ({**NETWORKS["qwen2"], "head_dim": 32}, "head_dim = 32"),
        ({**NETWORKS["qwen3"], "rope_scaling": LLAMA3}, "rotary scaling = 'llama3'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rotary scaling = 'yarn'"),
    ],
)
def test_networks_that_llama_cpp_does_not_have(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        save_gguf(tmp_path / "m.gguf", config, {}, small_tokenizer())
    assert "folder" in caught.value.fix
    assert "文件夹" in caught.value.zh
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["model.layers.1.mlp.up_proj.weight"].fill_(70_000.0), "up_proj.weight' holds 70000"),
        (lambda state: state["model.layers.0.self_attn.q_proj.weight"][3].fill_(torch.nan), "q_proj.weight' holds nan"),
        (lambda state: state["model.norm.weight"].fill_(torch.inf), "norm.weight' holds inf"),
        (lambda state: state.pop("model.norm.weight"), "'model.norm.weight' is missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "'extra'"),
        (lambda state: state.update({"model.norm.weight": torch.zeros(3)}), r"is \(3,\), expected \(256,\)"),
    ],
)
@pytest.mark.parametrize("type", ["F16", "Q4_K"])
def test_weights_that_cannot_be_written(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, type: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"what was there before")
    model = random_model()
    state = dict(model.state_dict())
    change(state)
    with pytest.raises(ModelError, match=message) as caught:
        save_gguf(path, model.config, state, small_tokenizer(), type=type)
    assert caught.value.zh
    assert path.read_bytes() == b"what was there before"
    assert [item.name for item in tmp_path.iterdir()] == ["m.gguf"]


def test_large_norms_are_kept(tmp_path: Path) -> None:
    model = random_model()
    model.get_parameter("model.norm.weight").data.fill_(1e6)
    loaded = load_gguf(write(tmp_path / "m.gguf", model))
    assert torch.equal(loaded.state["model.norm.weight"], torch.full((256,), 1e6))


def test_tokenizers_that_llama_cpp_does_not_have(tmp_path: Path) -> None:
    words = train_words([["我们", "都", "在", "这里"], ["we", "are", "here"]])
    unigram: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]},
    }
    for tokenizer, kind in ((words, "WordLevel"), (Tokenizer.from_json(json.dumps(unigram)), "Unigram")):
        with pytest.raises(ModelError, match=kind):
            write(tmp_path / "m.gguf", random_model(), tokenizer)
    with pytest.raises(ModelError, match="ids up to"):
        write(tmp_path / "m.gguf", random_model(vocab_size=100))


def test_places_and_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    with pytest.raises(UsageError, match="'Q4_k'") as caught:
        write(tmp_path / "m.gguf", model, type="Q4_k")
    assert "Q4_K" in caught.value.fix
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(UsageError, match="folder"):
        write(tmp_path / "folder.gguf", model)
    monkeypatch.setattr(folders, "free_bytes", lambda _: 1000)
    with pytest.raises(ResourceError, match=r"the disk has 1\.0 KB free"):
        write(tmp_path / "m.gguf", model)
    assert [item.name for item in tmp_path.iterdir()] == ["folder.gguf"]


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_stream: Any, _pieces: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "m.gguf").write_bytes(b"before")
    monkeypatch.setattr(gguf_writer, "write_padded", full)
    with pytest.raises(ResourceError, match="No space left"):
        write(tmp_path / "m.gguf", random_model())
    assert [item.read_bytes() for item in tmp_path.iterdir()] == [b"before"]


def test_damaged_files_of_the_new_kinds(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", random_model(**NETWORKS["gpt2"]))
    data = path.read_bytes()
    key = b"gpt2.attention.head_count_kv"
    at = data.index(key) + len(key) + 4
    path.write_bytes(data[:at] + struct.pack("<I", 2) + data[at + 4 :])
    with pytest.raises(ModelError, match=r"attn_qkv.* has 768 rows, expected 512"):
        load_gguf(path)
    path.write_bytes(data.replace(b"position_embd.weight", b"position_embx.weight"))
    with pytest.raises(ModelError, match="position_embx"):
        load_gguf(path)
    path = write(tmp_path / "m.gguf", random_model(rope_scaling=LLAMA3))
    data = path.read_bytes()
    at = data.index(LLAMA3_PARAMETERS.encode()) + len(LLAMA3_PARAMETERS) + 16
    for factors in ((8.0, 1.0, 4.0, 65.0), (torch.nan, 1.0, 4.0, 64.0), (8.0, 4.0, 4.0, 64.0), (0.0, 0.0, 0.0, 0.0)):
        path.write_bytes(data[:at] + struct.pack("<4f", *factors) + data[at + 16 :])
        with pytest.raises(ModelError, match="rotary factors"):
            load_gguf(path)


def test_an_original_tokenizer_that_does_not_fit() -> None:
    metadata = tokenizer_metadata(small_tokenizer("gpt-2"), 400, {})
    good = read_tokenizer(Path("x.gguf"), {**metadata, ORIGINAL: small_tokenizer().to_json()})
    assert good.encode(TEXTS[0]) == small_tokenizer().encode(TEXTS[0]) != small_tokenizer("gpt-2").encode(TEXTS[0])
    small = {**metadata, "tokenizer.ggml.tokens": ["a", "b", "c"], "tokenizer.ggml.token_type": [1, 3, 3]}
    for text, message in (("{", "not valid JSON"), ("[]", "not a JSON object"), ('{"model": 1}', "not a tokenizer")):
        with pytest.raises(ModelError, match=message):
            read_tokenizer(Path("x.gguf"), {**metadata, ORIGINAL: text})
    with pytest.raises(ModelError, match="has 379 tokens, the file 3"):
        read_tokenizer(Path("x.gguf"), {**small, ORIGINAL: small_tokenizer().to_json(), **ROLES})


ROLES = {f"tokenizer.ggml.{name}_token_id": 1 for name in ("bos", "eos", "padding")}


# The verb ------------------------------------------------------------------------------------------------------------


def test_export_to_gguf_to_a_folder_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "first.gguf", random_model(), type="F16")
    folder, last = tmp_path / "folder", tmp_path / "last.gguf"
    assert main(["export", str(source), str(folder)]) == 0
    assert "32 bits per weight" in capsys.readouterr().out
    assert main(["export", str(folder), str(last), "--type", "F16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == last.stat().st_size
    assert told["bits_per_weight"] == pytest.approx(16, abs=0.1)
    first, second = load_gguf(source), load_gguf(last)
    assert second.config == first.config
    assert second.generation == first.generation
    assert all(torch.equal(second.state[name], tensor) for name, tensor in first.state.items())
    assert read_gguf_header(last).metadata["general.name"] == "folder"
    assert main(["export", str(source), str(tmp_path / "q.gguf"), "--type", "Q4_K"]) == 0
    assert "bits per weight (" in capsys.readouterr().out


def test_the_prompt_prefix_becomes_bos(tmp_path: Path) -> None:
    source = write(tmp_path / "first.gguf", random_model())
    folder = tmp_path / "folder"
    assert main(["export", str(source), str(folder)]) == 0
    manifest = json.loads((folder / "hanmo.json").read_text())
    (folder / "hanmo.json").write_text(json.dumps({**manifest, "prompt_prefix": [1]}))
    assert main(["export", str(folder), str(tmp_path / "last.gguf")]) == 0
    assert load_gguf(tmp_path / "last.gguf").generation["add_bos_token"] is True


def test_what_export_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "first.gguf", random_model())
    before = source.read_bytes()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("亲爱的")
    for kind in ("lstm", "ngram", "vectors"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    cases = {
        ("first.gguf", "first.gguf"): (2, "written over"),
        ("first.gguf", "."): (2, "written over"),
        ("first.gguf", "other"): (2, "would be lost"),
        ("lstm", "m.gguf"): (4, "copy its folder"),
        ("lstm", "m.arpa"): (4, "copy its folder"),
        ("vectors", "m"): (4, "hanmo vectors convert"),
        ("ngram", "m.gguf"): (4, "NAME.arpa"),
        ("missing", "m.gguf"): (4, "there is no model"),
    }
    for (model, target), (code, message) in cases.items():
        assert main(["export", str(tmp_path / model), str(tmp_path / target)]) == code
        assert message in capsys.readouterr().err
    assert main(["export", str(source), str(tmp_path / "new"), "--type", "Q8_0"]) == 2
    assert "does not end in .gguf" in capsys.readouterr().err
    assert source.read_bytes() == before
    assert (tmp_path / "other" / "letter.txt").is_file()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["first.gguf", "lstm", "ngram", "other", "vectors"]


def test_types_of_the_verb_are_those_of_the_writer() -> None:
    assert set(export.TYPES) == set(gguf_writer.FILE_TYPES)
    assert export.DEFAULT_TYPE in export.TYPES
