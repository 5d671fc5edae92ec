"""Quantised folders: the same logits as in memory, mapped as they lie, and every damage named before it is used."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hanmo
from hanmo.cli.main import main
from hanmo.errors import HanmoError, ModelError, ResourceError
from hanmo.folder import MANIFEST, sha256_file, write_json
from hanmo.inference.native import folder as form
from hanmo.inference.native import library
from hanmo.inference.native.decoder import LoadedParts, NativeDecoder, PagedCache, Weights, prepare
from hanmo.inference.native.folder import WEIGHTS, open_quantized, save_quantized
from hanmo.inference.native.layout import Packed
from hanmo.inference.native.model import Parts
from hanmo.inference.native.opening import open_native
from hanmo.models.checkpoints.save import save_folder
from hanmo.models.transformer import TransformerConfig
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.training import train_char

from .native_cases import decoder

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason=f"no native engine: {library.load()[1]}")

IDS = torch.randint(0, 101, (60,), generator=torch.Generator().manual_seed(0)).tolist()
SAVED = {  # layouts that folders of Hugging Face can describe
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "mistral": {"model_type": "mistral"},
    "gemma2": {"model_type": "gemma2", "embedding_scale": 48**0.5, "attention_scale": 0.25},
    "gemma3": {"model_type": "gemma3_text", "attention_scale": 0.25},
    "gpt2": {"model_type": "gpt2"},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char(["床前明月光，疑是地上霜。举头望明月，低头思故乡。" * 3])


def logits(config: TransformerConfig, parts: Parts) -> Tensor:
    """Of a text, by the native engine."""
    cache = PagedCache(NativeDecoder(config, parts, threads=1, rows=64), 2)
    return cache.forward(IDS, [0] * len(IDS), range(len(IDS)), [[0, 1]], range(len(IDS)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A quantised folder that nobody changes."""
    model = decoder("llama")
    parts = prepare(model.config, Weights.of_state(model.state_dict()), "int4")
    target = tmp_path_factory.mktemp("whole") / "small"
    save_quantized(target, LoadedParts(model.config, parts, tokenizer, {}, ""), provenance={})
    return target


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """One that the test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


# There and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("layout", SAVED)
def test_hanmo_quantize_gives_the_logits_of_the_model_in_memory(
    tmp_path: Path, tokenizer: Tokenizer, layout: str, precision: str
) -> None:
    model = decoder(layout, **SAVED[layout])
    save_folder(tmp_path / "full", model, tokenizer, provenance={})
    quantize = ["quantize", str(tmp_path / "full"), str(tmp_path / "small"), "--precision", precision]
    assert main([*quantize, "--no-calibration"]) == 0
    in_memory = open_native(tmp_path / "full", precision)
    assert isinstance(in_memory, LoadedParts)
    expected = logits(in_memory.config, in_memory.parts)
    for mapped in (True, False):
        loaded = open_quantized(tmp_path / "small", mapped=mapped)
        assert loaded.config == in_memory.config
        assert torch.equal(logits(loaded.config, loaded.parts), expected)
    names = json.loads((tmp_path / "small" / MANIFEST).read_text())
    assert (names["form"], names["precision"]) == ("quantized", precision)
    assert hanmo.load(tmp_path / "small", device="cpu").generate([IDS[:5]], max_new_tokens=3)[0].ids


def test_without_the_engine_torch_computes(whole: Path) -> None:
    """On a GPU, and where there is no compiler."""
    native = hanmo.load(whole, device="cpu")
    plain = hanmo.load(whole, device="cpu", engine="torch")
    expected, got = native.logits(IDS), plain.logits(IDS)
    assert "torch" in plain.describe()
    assert (got - expected).norm() < 0.05 * expected.norm()
    with pytest.raises(HanmoError, match="needs the native engine"):
        hanmo.load(whole, device="cpu", engine="torch", kv_cache="int8")


def test_what_needs_the_original_says_so(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["export", whole, tmp_path / "m.gguf"], ["finetune", tmp_path / "t.jsonl", "--base", whole]):
        (tmp_path / "t.jsonl").write_text(
            '{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n' * 9
        )
        code, said = tried(capsys, *command)
        assert (code, "the folder is quantised" in said) == (4, True), said


@pytest.mark.skipif(sys.platform != "linux", reason="the maps of a process are read from /proc")
def test_a_mapped_folder_is_used_where_it_lies(whole: Path) -> None:
    spans = []
    loaded = open_quantized(whole, mapped=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f"/{WEIGHTS}"):
            first, last = line.split()[0].split("-")
            spans.append((int(first, 16), int(last, 16)))
    for part in loaded.parts.values():
        for tensor in (part.values, part.scales) if isinstance(part, Packed) else (part,):
            if tensor.numel():
                assert tensor.data_ptr() % 64 == 0
                assert any(first <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= last
                           for first, last in spans)  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_mapped_folder_takes_no_memory_of_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """64 MB of weights; the process that opens them has only small change of its own, before and after it computes."""
    model = decoder("llama", hidden_size=1024, num_heads=16, head_dim=64, intermediate_size=4096, num_layers=5)
    parts = prepare(model.config, Weights.of_state(model.state_dict()), "int8")
    save_quantized(tmp_path / "m", LoadedParts(model.config, parts, tokenizer, {}, ""), provenance={})
    size = (tmp_path / "m" / WEIGHTS).stat().st_size
    assert size > 64e6
    code = """
import sys
from hanmo.inference.native.folder import open_quantized
from hanmo.inference.native.decoder import NativeDecoder, PagedCache
def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
before = own()
loaded = open_quantized(sys.argv[1], mapped=True)
cache = PagedCache(NativeDecoder(loaded.config, loaded.parts, threads=1, rows=32), 1)
cache.forward([1, 2, 3], [0] * 3, range(3), [[0]], [2])
print(own() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.25 * size


# Where it is written --------------------------------------------------------------------------------------------------


def tried(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """A command's exit code and what it complains of."""
    return main([str(argument) for argument in arguments]), capsys.readouterr().err


def test_only_models_are_written_over(
    tmp_path: Path, tokenizer: Tokenizer, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, target = tmp_path / "full", tmp_path / "small"
    save_folder(full, decoder("llama", model_type="llama"), tokenizer, provenance={})
    assert tried(capsys, "quantize", full, target)[0] == 0
    first = sha256_file(target / WEIGHTS)
    assert tried(capsys, "quantize", full, target, "--precision", "int4")[0] == 0  # an older one is replaced
    assert sha256_file(target / WEIGHTS) != first
    assert open_quantized(target).config == open_quantized(whole).config
    code, said = tried(capsys, "quantize", full, full)
    assert (code, "would be written over" in said) == (2, True)
    code, said = tried(capsys, "quantize", target, tmp_path / "again")
    assert (code, "quantised already" in said) == (2, True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("Dear")
    code, said = tried(capsys, "quantize", full, tmp_path / "letters")
    assert (code, "would be lost" in said) == (2, True)
    assert (tmp_path / "letters" / "mother.txt").read_text() == "Dear"


def test_a_full_disk_leaves_the_old_folder(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    loaded = open_quantized(copy, mapped=False)

    def full(path: Path, _parts: Parts) -> None:
        path.write_bytes(b"a little")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(form, "write_parts", full)
    with pytest.raises(ResourceError):
        save_quantized(copy, loaded, provenance={})
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


# Damage ---------------------------------------------------------------------------------------------------------------


def seal(folder: Path) -> None:
    """Make the manifest true again, as somebody would who means harm."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    write_json(folder / MANIFEST, manifest)


def refused(folder: Path, expected: str) -> None:
    """Opening it names what is wrong, in both languages, and where."""
    with pytest.raises(HanmoError) as caught:
        hanmo.load(folder, device="cpu")
    assert expected in caught.value.what
    assert caught.value.zh
    assert caught.value.fix
    assert str(folder) in caught.value.where


def test_a_flipped_bit_is_found_before_the_model_is_used(copy: Path) -> None:
    loaded = open_quantized(copy, mapped=True)
    header, _, start = form.read_whole_header(copy / WEIGHTS)
    for name in ("layers.1.down.values", "norm.weight"):
        data = bytearray((copy / WEIGHTS).read_bytes())
        first, last = header[name]["data_offsets"]
        data[start + (first + last) // 2] ^= 1
        changed = copy.with_name(f"changed {name}")
        shutil.copytree(copy, changed)
        (changed / WEIGHTS).write_bytes(data)
        refused(changed, f"the tensor '{name}' is damaged")
    assert loaded.parts


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", WEIGHTS])
def test_missing_and_changed_files_are_named(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[20] ^= 1
    (copy / name).write_bytes(data[:-1])
    if name != "config.json":  # it is read first, to know what the folder is
        refused(copy, "bytes, its manifest says")
        (copy / name).unlink()
        refused(copy, "missing")
    else:
        with pytest.raises(ModelError):
            hanmo.load(copy, device="cpu")


Change = Callable[[dict[str, Any]], Any]


def configured(**values: Any) -> Change:
    return lambda config: config.update(values)


CONFIGURATIONS: dict[str, tuple[Change, str]] = {
    **{
        f"{name} {value}": (configured(**{name: value}), "")
        for name in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for value in (2**62, 2**31, -1, 0, "48", 1.5, None, [1])
    },
    "many positions": (configured(max_position_embeddings=2**62), ""),
    "head size": (configured(head_dim=2**40), ""),
    "norm": (configured(rms_norm_eps=float("nan")), ""),
    "rotary base": (configured(rope_theta=float("inf"), rope_parameters={"rope_theta": -1.0}), ""),
    "other layers": (configured(num_hidden_layers=2), "belongs to no part"),
    "other width": (configured(intermediate_size=96), "asks for"),
    "newer": (lambda config: config["quantization_config"].update(version=2), "form that is known"),
    "version of another type": (lambda config: config["quantization_config"].update(version="1"), "form that is known"),
    "an encoder": (configured(model_type="bert"), ""),
    "unknown": (configured(model_type="new"), ""),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations_that_do_not_fit_are_refused(copy: Path, case: str) -> None:
    change, expected = CONFIGURATIONS[case]
    config = json.loads((copy / "config.json").read_text())
    change(config)
    write_json(copy / "config.json", config)
    seal(copy)
    with pytest.raises(HanmoError) as caught:
        hanmo.load(copy, device="cpu")
    assert expected in caught.value.what
    assert caught.value.zh
    assert caught.value.fix


def with_header(folder: Path, change: Callable[[dict[str, Any]], Any], data: bytes | None = None) -> None:
    """Write another header, of the same length where that is possible."""
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    (folder / WEIGHTS).write_bytes(
        len(text).to_bytes(8, "little") + text + (raw[8 + length :] if data is None else data)
    )


def entry(name: str, **values: Any) -> Change:
    return lambda header: header[name].update(values)


def matrices(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change what the metadata say of the matrices."""

    def changed(header: dict[str, Any]) -> None:
        described = json.loads(header["__metadata__"]["matrices"])
        change(described)
        header["__metadata__"]["matrices"] = json.dumps(described)

    return changed


def swapped(header: dict[str, Any]) -> None:
    """Two tensors that say they lie where the other does."""
    first, second = header["layers.0.qkv.values"], header["layers.0.down.values"]
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]


def shifted(header: dict[str, Any]) -> None:
    """All padding in front: the tensors fill the file, but do not begin at multiples of 64."""
    paddings = {name: header.pop(name) for name in list(header) if name.startswith("padding.")}
    total = sum(entry["shape"][0] for entry in paddings.values())
    position = total + 1
    for name, item in header.items():
        if name != "__metadata__":
            size = item["data_offsets"][1] - item["data_offsets"][0]
            item["data_offsets"] = [position, position + size]
            position += size
    header["padding.0"] = {"dtype": "U8", "shape": [total + 1], "data_offsets": [0, total + 1]}


NAME = "layers.0.qkv.values"
HEADERS: dict[str, tuple[Change, str]] = {
    "overlap": (entry(NAME, data_offsets=[0, 2**10]), "offsets span"),
    "the same place": (swapped, "offsets span"),
    "beyond the end": (entry(NAME, data_offsets=[2**40, 2**40 + 8]), ""),
    "negative": (entry(NAME, data_offsets=[-64, 0]), "whole number"),
    "giant": (entry(NAME, data_offsets=[0, 2**63 - 1]), ""),
    "more than 64 bits": (entry(NAME, data_offsets=[0, 2**70]), "whole number"),
    "not numbers": (entry(NAME, data_offsets=["0", "64"]), "whole number"),
    "NaN": (entry(NAME, data_offsets=[0, float("nan")]), "whole number"),
    "a giant shape": (entry(NAME, shape=[2**32, 2**32, 2**32]), "needs"),
    "another type": (entry("norm.weight", dtype="F64"), "needs"),
    "an unknown type": (entry(NAME, dtype="F7"), "not a weight type"),
    "no entry": (lambda header: header.update({NAME: 7}), "lacks"),
    "a tensor less": (lambda header: header.pop(NAME), "gap"),
    "a tensor more": (
        lambda header: header.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
        "belongs to no part",
    ),
    "unaligned": (shifted, "multiple of 64"),
    "metadata": (lambda header: header.update(__metadata__={"matrices": 7}), "not an object of texts"),
    "no matrices": (lambda header: header.pop("__metadata__"), "does not describe"),
    "matrices nested": (
        lambda header: header["__metadata__"].update(matrices="[" * 5000),
        "does not describe",
    ),
    "an unknown kind": (matrices(lambda all: all.update({"layers.0.qkv": ["int3", 80, 48]})), "no kind"),
    "a kind that is a list": (matrices(lambda all: all.update({"layers.0.qkv": [[], 80, 48]})), "no kind"),
    "negative sizes": (matrices(lambda all: all["embedding"].__setitem__(1, -101)), "asks for"),
    "giant sizes": (matrices(lambda all: all["embedding"].__setitem__(1, 2**62)), "asks for"),
    "sizes that are none": (matrices(lambda all: all["embedding"].__setitem__(1, 1e300)), "no kind"),
    "another kind": (matrices(lambda all: all["embedding"].__setitem__(0, "int4")), "expected U8"),
    "a matrix less": (matrices(lambda all: all.pop("embedding")), "missing"),
    "a matrix more": (matrices(lambda all: all.update(more=["int8", 16, 32])), "belongs to no part"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie_are_refused(copy: Path, case: str) -> None:
    change, expected = HEADERS[case]
    raw = (copy / WEIGHTS).read_bytes()
    with_header(copy, change, data=raw[8 + int.from_bytes(raw[:8], "little") :] + b"\0" * (case == "unaligned"))
    seal(copy)
    refused(copy, expected)


def pieces(raw: bytes) -> Iterator[bytes]:
    """A weight file cut off in places that mean something, and with a length of the header that is none."""
    length = int.from_bytes(raw[:8], "little")
    for size in (0, 1, 7, 8, 9, 8 + length // 2, 8 + length, 9 + length, len(raw) - 64, len(raw) - 1):
        yield raw[:size]
    yield raw + b"\0"
    for claimed in (0, 1, length - 1, length + 1, len(raw), 2**31, 2**63 - 1, 2**64 - 1):
        yield claimed.to_bytes(8, "little") + raw[8:]


def test_files_cut_off_anywhere_are_refused(copy: Path) -> None:
    raw = (copy / WEIGHTS).read_bytes()
    for number, data in enumerate(pieces(raw)):
        (copy / WEIGHTS).write_bytes(data)
        seal(copy)
        with pytest.raises(ModelError) as caught:
            open_quantized(copy)
        assert caught.value.zh, number


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(copy: Path, value: float) -> None:
    raw = bytearray((copy / WEIGHTS).read_bytes())
    header, _, start = form.read_whole_header(copy / WEIGHTS)
    for name, dtype in (("norm.weight", torch.float32), ("layers.2.down.scales", torch.float16)):
        data = bytearray(raw)
        first = start + header[name]["data_offsets"][0]
        number = torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes()
        data[first : first + len(number)] = number
        (copy / WEIGHTS).write_bytes(data)
        seal(copy)
        refused(copy, f"the tensor '{name}' holds NaN")


def test_a_manifest_without_the_weights_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    del manifest["files"][WEIGHTS]
    write_json(copy / MANIFEST, manifest)
    refused(copy, "does not list")


def test_another_precision_than_its_own_is_refused(copy: Path) -> None:
    assert hanmo.load(copy, device="cpu", precision="int4")
    with pytest.raises(HanmoError, match="quantised already, as int4"):
        hanmo.load(copy, device="cpu", precision="int8")


def test_other_programs_say_that_they_do_not_know_the_form(whole: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match=r"no file named model.safetensors"):  # after a warning that names the form
        AutoModelForCausalLM.from_pretrained(whole)
