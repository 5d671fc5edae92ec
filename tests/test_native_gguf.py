"""GGUF files in the native engine: their weights without loss where that is promised, and every damage survived."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import hanmo
from hanmo.errors import HanmoError
from hanmo.folder import MANIFEST, sha256_file, write_json
from hanmo.inference.native import blocks, library
from hanmo.inference.native import gguf as native_gguf
from hanmo.inference.native.blocks import FLOATS, from_rows
from hanmo.inference.native.decoder import LoadedParts, NativeDecoder, PagedCache
from hanmo.inference.native.folder import WEIGHTS, save_quantized
from hanmo.inference.native.gguf import open_gguf
from hanmo.inference.native.layout import Quantized
from hanmo.inference.native.unpacking import unpacked
from hanmo.models.checkpoints.gguf import load_gguf
from hanmo.models.checkpoints.gguf_header import TensorInfo, read_gguf_header
from hanmo.models.transformer import Transformer, TransformerConfig, build

from .gguf_cases import CONFIG, EMBEDDING, HOSTILE, Encoded, as_type, described, field, put, random_model, write_model

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason=f"no native engine: {library.load()[1]}")

Kind = GGMLQuantizationType
SCALES = {  # where the half-precision numbers of a block lie; all of its other bytes may be anything
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "IQ4_NL": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_XS": (0,),
}
EXACT = ("F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "IQ4_NL")
CONVERTED = tuple(kind for kind in SCALES if kind not in EXACT)
LARGE = dataclasses.replace(CONFIG, hidden_size=256, head_dim=64, intermediate_size=512)
NETWORKS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama untied": {"tie_embeddings": False, "num_kv_heads": 4},
    "llama biases": {"attention_bias": True, "output_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "attention_bias": True},
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


def any_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random bytes as rows of a type, with scales that give weights as large as those of trained networks."""
    block, size = GGML_QUANT_SIZES[Kind[kind]]
    chance = np.random.default_rng(seed)
    raw = chance.integers(0, 256, (rows, columns // block, size), np.uint8)
    for place in SCALES[kind]:
        raw[..., place : place + 2] = np.float16([1]).view(np.uint8)
    scale = 0.03 / np.abs(dequantize(raw.reshape(rows, -1), Kind[kind])).mean()
    for place in SCALES[kind]:
        signs = chance.choice([-1, 1], (*raw.shape[:2], 1))
        scales = signs * chance.uniform(0.5, 1.5, signs.shape) * scale
        raw[..., place : place + 2] = scales.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


def floats(matrix: Tensor | Quantized) -> Tensor:
    """The weights of a matrix, float32."""
    return matrix.float() if isinstance(matrix, Tensor) else matrix.dequantize()


# Blocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCALES)
def test_blocks_against_the_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = any_blocks(kind, 40, 512)
    monkeypatch.setattr(blocks, "CHUNK", 7 * raw.shape[1])  # seven rows at a time: five pieces and five rows

    def read(rows: range) -> Tensor:
        return torch.from_numpy(raw[rows.start : rows.stop].copy())

    matrix = from_rows(kind, range(40), raw.shape[1], read)
    expected = torch.from_numpy(dequantize(raw, Kind[kind]))
    error = (floats(matrix) - expected).abs()
    assert isinstance(matrix, Quantized)
    if kind in EXACT:
        assert not error.any()
    elif kind == "Q3_K":  # "only the product 128 becomes 127"
        steps = torch.from_numpy(raw.reshape(40, 2, 110)[..., 108:].copy()).view(torch.float16).float().abs()
        one = steps.repeat_interleave(256, 1).view(40, 512)
        assert bool(((error == 0) | (error == one) & (expected.abs() == 128 * one)).all())
    elif kind in ("Q4_K", "IQ4_XS"):  # scales (and minima) rounded to half precision: 11 bits
        assert matrix.minima_NG is None or kind == "Q4_K"
        least = 0 if matrix.minima_NG is None else matrix.minima_NG.float().abs()
        integers = (matrix.integers_NGI.float() - (0 if matrix.minima_NG is not None else 128)).abs().amax(-1)
        bound = (matrix.scales_NG.float().abs() * integers + least) * 2**-11 + 16 * 2**-25
        assert bool((error.view(40, 16, 32) <= bound.unsqueeze(-1) * 1.001).all())
    else:  # half a step of 8 bits
        groups = expected.view(40, 16, 32)
        step = groups.abs().amax(-1, keepdim=True) / 127
        assert bool((error.view(40, 16, 32) <= step * (0.5 + 127 * 2**-11)).all())
    part = from_rows(kind, range(11, 30), raw.shape[1], read)
    assert torch.equal(floats(part), floats(matrix)[11:30])


def test_floats_are_as_they_are() -> None:
    values = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    values[0, :4] = torch.tensor([0.0, 65504.0, -6e-5, 2**-24])
    for kind, dtype in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        stored = values.to(dtype)
        if kind == "BF16":
            stored[0, 1:4] = torch.tensor([60000.0, -(2.0**-14), 1.0])
        raw = stored.view(torch.uint8)
        matrix = from_rows(kind, range(5), raw.size(1), lambda rows, raw=raw: raw[rows.start : rows.stop])
        assert isinstance(matrix, Tensor)
        assert matrix.dtype == (torch.float32 if kind == "F32" else torch.float16)
        assert torch.equal(matrix.float(), stored.float())
    beyond = torch.tensor([[1e6, 1.0]], dtype=torch.bfloat16)
    assert FLOATS["BF16"](beyond.view(torch.uint8)).tolist() == beyond.tolist()


# Files ----------------------------------------------------------------------------------------------------------------


def encoded(*kinds: str) -> Callable[[str, NDArray[np.float32]], Encoded]:
    """Matrices of several types by turns: floats as they are, quantised ones of any blocks."""
    count = iter(range(10_000))

    def encode(_: str, values: NDArray[np.float32]) -> Encoded:
        number = next(count)
        kind = kinds[number % len(kinds)]
        if kind in SCALES:
            return any_blocks(kind, *values.shape, number), Kind[kind]
        return as_type(Kind[kind])("", values)

    return encode


def network(**changes: Any) -> Transformer:
    """A network whose rows are whole blocks of every type."""
    model = Transformer(dataclasses.replace(LARGE, **changes)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        scale, centre = (0.04, 0.0) if parameter.dim() > 1 else (0.1, 1.0 if "norm" in name and "weight" in name else 0)
        parameter.data = centre + scale * torch.randn(parameter.shape, generator=generator)
    return model


def opened(path: Path, precision: str | None = None) -> LoadedParts:
    """A file in the engine's form."""
    loaded = open_gguf(path, precision)
    assert isinstance(loaded, LoadedParts)
    return loaded


def logits(loaded: LoadedParts) -> Tensor:
    """Of a text, by the native engine."""
    cache = PagedCache(NativeDecoder(loaded.config, loaded.parts, threads=1, rows=64), 2)
    return cache.forward(IDS, [0] * len(IDS), range(len(IDS)), [[0, 1]], range(len(IDS)))


def by_torch(config: TransformerConfig, state: dict[str, Tensor]) -> Tensor:
    """The same by the network of torch."""
    with torch.inference_mode():
        result: Tensor = build(config, state)(torch.tensor([IDS]))[0]
    return result


def distance(a: Tensor, b: Tensor) -> float:
    """How far ``a`` is from ``b``, relative to the size of ``b``."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        *(("llama", (kind,)) for kind in ("F32", "BF16", *SCALES)),
        *((name, ("F16",)) for name in NETWORKS),
        *((name, ("Q4_1",)) for name in NETWORKS if name != "llama"),
        *((name, ("Q4_K", "Q6_K", "Q4_K")) for name in NETWORKS),
        ("llama", ("Q4_0", "Q8_0", "F16", "Q4_1", "Q5_0")),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else value,
)
def test_files_compute_what_torch_computes(name: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", network(**NETWORKS[name]), encode=encoded(*kinds))
    reference, loaded = load_gguf(path), opened(path)
    assert loaded.config == reference.config
    state = unpacked(loaded).state
    assert state.keys() == reference.state.keys()
    for key, expected in reference.state.items():
        if (kinds[0] in EXACT and len(kinds) == 1) or expected.dim() == 1:
            assert torch.equal(state[key], expected), key
        else:
            assert distance(state[key], expected) < 0.02, key
    got, expected = logits(loaded), by_torch(loaded.config, state)
    rounds = any(kind in SCALES for kind in kinds)  # before such matrices activations are rounded to 8 bits
    assert distance(got, expected) < (0.025 if rounds else 1e-3)
    assert distance(got, by_torch(reference.config, reference.state)) < (0.035 if rounds else 1e-3)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_a_file_in_another_precision(precision: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", network(), encode=encoded("Q8_0"))
    loaded, reference = opened(path, precision), load_gguf(path)
    state = unpacked(loaded).state
    exact = precision != "int4"
    for key, expected in reference.state.items():
        edge = expected.dim() == 1 or "embed" in key
        assert distance(state[key], expected) <= (5e-4 if exact or edge else 0.1), key
        assert torch.equal(state[key], expected) or precision in ("fp16", "int4"), key
    assert distance(logits(loaded), by_torch(loaded.config, state)) < {"fp32": 1e-5, "fp16": 1e-3}.get(precision, 0.03)


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid file whose matrices have several types."""
    target = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_model(target, random_model(), encode=encoded("Q8_0", "Q4_0", "Q4_1", "F16"))


def outcome(path: Path) -> str:
    """What comes of opening a damaged model: a refusal that says all that it should, or a model that computes, be it
    nonsense. (Anything else, a crash first of all, fails the test.)"""
    try:
        model = hanmo.load(path, device="cpu")
        model.generate([[1, 5, 9]], max_new_tokens=2)
    except HanmoError as error:
        assert error.zh, error.what
        assert error.fix, error.what
        assert str(path) in error.where, error.what
        return error.what
    return ""


def test_every_refusal_says_in_both_languages_what_where_and_what_to_do(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    for name, damage in HOSTILE.items():
        (tmp_path / "bad.gguf").write_bytes(damage(data))
        assert outcome(tmp_path / "bad.gguf"), name


def test_files_cut_off_anywhere_are_refused(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    start = data.index(b"blk.1.ffn_down.weight")
    path = tmp_path / "cut.gguf"
    for length in [*range(start - 300, start + 300, 37), *range(start + 300, len(data) - 32, 7_919), len(data) - 33]:
        path.write_bytes(data[:length])
        assert outcome(path), length


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = native_gguf.open_file

    def shrinking(path: Path) -> Any:
        file = original(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return file

    monkeypatch.setattr(native_gguf, "open_file", shrinking)
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny.read_bytes())
    assert "it was changed while it was read" in outcome(path)


SIZES = {
    "llama.block_count": "<I",
    "llama.embedding_length": "<I",
    "llama.feed_forward_length": "<I",
    "llama.attention.head_count": "<I",
    "llama.attention.head_count_kv": "<I",
    "llama.attention.key_length": "<I",
}


@pytest.mark.parametrize("key", SIZES)
def test_sizes_that_are_not_those_of_the_tensors_are_refused(key: str, tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    at = field(data, key) + 4
    (own,) = struct.unpack_from("<I", data, at)
    path = tmp_path / "m.gguf"
    for value in (0, 1, own - 1, own + 1, own + 32, 2 * own, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1):
        path.write_bytes(put(data, at, "<I", value))
        assert outcome(path), value


def test_a_long_context_takes_no_memory_before_it_is_used(tiny: Path, tmp_path: Path) -> None:
    """No tensor depends on its length, so that no size contradicts it."""
    data, path = tiny.read_bytes(), tmp_path / "m.gguf"
    at = field(data, "llama.context_length") + 4
    path.write_bytes(put(data, at, "<I", 2**24))
    assert not outcome(path)
    path.write_bytes(put(data, at, "<I", 2**32 - 1))
    assert "impossible" in outcome(path)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_file_takes_little_more_than_its_weights(tiny: Path, tmp_path: Path) -> None:
    """What their conversion took is given back, although freed memory is kept in general."""
    model = random_model(hidden_size=1024, head_dim=128, num_heads=8, intermediate_size=4096)
    path = write_model(tmp_path / "m.gguf", model, encode=as_type(Kind.Q8_0))
    code = """
import sys
from hanmo.inference.native.opening import open_native
from hanmo.models.device import set_threads
def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
set_threads()
first = open_native(sys.argv[1])  # what is imported and made once
before = own()
loaded = open_native(sys.argv[2])
print(own() - before, loaded.weight_bytes)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny), str(path)], capture_output=True, text=True, check=True
    )
    taken, weights = map(int, done.stdout.split())
    assert weights > 30e6
    assert taken < weights + 4e6


@pytest.mark.parametrize("name", ["blk.0.ffn_up.weight", "blk.1.attn_v.weight", "output_norm.weight", EMBEDDING])
def test_tensors_of_another_shape_are_refused(name: str, tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    place = described(data, name)
    dims = struct.unpack_from("<I", data, place)[0]
    path = tmp_path / "m.gguf"
    for number in range(dims):
        at = place + 4 + 8 * number
        (own,) = struct.unpack_from("<Q", data, at)
        for value in (0, own - 32, own // 2, own + 32, 2 * own, 2**31, 2**32, 2**63, 2**64 - 32):
            path.write_bytes(put(data, at, "<Q", value))
            assert outcome(path), (number, value)
    if dims == 2:  # the same number of bytes, the other way round
        rows, columns = struct.unpack_from("<2Q", data, place + 4)
        path.write_bytes(put(data, place + 4, "<2Q", columns // 2, rows * 2))
        assert outcome(path)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *SCALES])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_and_scales_that_are_no_numbers_are_refused(kind: str, value: float, tmp_path: Path) -> None:
    name = "blk.1.ffn_down.weight"
    path = tmp_path / "m.gguf"
    write_model(path, network(num_layers=2), encode=encoded(kind))
    data, info = path.read_bytes(), load_header(path, name)
    _, size = GGML_QUANT_SIZES[Kind[kind]]
    last = info.offset + info.num_bytes - size  # the last block of the tensor
    wide, half = np.float32(value).tobytes(), np.float16(value).tobytes()
    number = {"F32": wide, "BF16": wide[2:]}.get(kind, half)
    for place in SCALES.get(kind, (0,)):
        path.write_bytes(data[: last + place] + number + data[last + place + len(number) :])
        assert f"the tensor '{name}' holds NaN or infinite values" in outcome(path)


def test_scales_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    """The scale of a group is a product in Q4_K."""
    path = write_model(tmp_path / "m.gguf", network(), encode=encoded("Q4_K"))
    data, info = bytearray(path.read_bytes()), load_header(path, "blk.1.ffn_down.weight")
    data[info.offset : info.offset + 2] = np.float16(60000).tobytes()
    data[info.offset + 4] = 63
    path.write_bytes(data)
    assert "beyond half precision" in outcome(path)


def test_norms_that_are_no_numbers_are_refused(tiny: Path, tmp_path: Path) -> None:
    data, info = bytearray(tiny.read_bytes()), load_header(tiny, "blk.0.attn_norm.weight")
    data[info.offset : info.offset + 4] = np.float32("nan").tobytes()
    (tmp_path / "m.gguf").write_bytes(data)
    assert "'blk.0.attn_norm.weight' holds NaN" in outcome(tmp_path / "m.gguf")


def load_header(path: Path, name: str) -> TensorInfo:
    """The description of a tensor."""
    return read_gguf_header(path).tensors[name]


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)


def changed(data: bytes, places: list[int], changes: list[tuple[float, int]]) -> bytes:
    """Some bytes replaced: which of the places, and by what."""
    copy = bytearray(data)
    for share, byte in changes:
        copy[places[int(share * len(places))]] = byte
    return bytes(copy)


def telling_places(data: bytes) -> list[int]:
    """Bytes of a file that decide something: all but the texts and merges of the vocabulary, and most weights."""
    tokens, merges = field(data, "tokenizer.ggml.tokens") + 30, field(data, "tokenizer.ggml.merges")
    after, weights = field(data, "tokenizer.ggml.bos_token_id") - 40, data.index(b"blk.1.ffn_down.weight") + 60
    vocabulary = range(merges - 60, merges + 40)
    return [*range(tokens), *vocabulary, *range(after, weights), *range(weights, len(data), 1_009)]


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=QUIET)
@given(changes=CHANGES)
def test_any_damaged_file_computes_or_is_refused(tiny: Path, tmp_path: Path, changes: list[tuple[float, int]]) -> None:
    data = tiny.read_bytes()
    (tmp_path / "m.gguf").write_bytes(changed(data, telling_places(data), changes))
    outcome(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised folder of the same model."""
    target = tmp_path_factory.mktemp("folder") / "m"
    save_quantized(target, opened(tiny), provenance={})
    return target


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=QUIET)
@given(changes=CHANGES, name=st.sampled_from([WEIGHTS, "config.json"]))
def test_any_damaged_folder_computes_or_is_refused(
    folder: Path, tmp_path: Path, changes: list[tuple[float, int]], name: str
) -> None:
    """Its manifest is true, as if somebody had made it so."""
    copy = tmp_path / "m"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    data = (copy / name).read_bytes()
    size = 8 + int.from_bytes(data[:8], "little") if name == WEIGHTS else len(data)
    (copy / name).write_bytes(changed(data, [*range(size)], changes))
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][name] = {"size": len(data), "sha256": sha256_file(copy / name)}
    write_json(copy / MANIFEST, manifest)
    outcome(copy)
