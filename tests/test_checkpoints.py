"""Model folders: what is saved is what ``transformers`` loads, and nothing damaged or hostile is loaded at all."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import struct
import subprocess
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from hanmo import folder as folders
from hanmo.errors import ModelError, ResourceError
from hanmo.models.checkpoints import weights
from hanmo.models.checkpoints.huggingface import load_folder
from hanmo.models.checkpoints.save import save_folder
from hanmo.models.checkpoints.weights import read_header, read_safetensors, write_safetensors
from hanmo.models.transformer import Transformer, TransformerConfig, build
from hanmo.text.tokenizer import Tokenizer

TEXT = "从前有座山，山里有座庙。Once upon a time, there were 3 monks.\n" * 3
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE with control tokens and a chat template."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return Tokenizer.from_json(
        made.to_str(),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        chat_template="{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
    )


def random_model(**changes: Any) -> Transformer:
    """A small model with random weights everywhere."""
    base = TransformerConfig(
        304, 48, 2, 4, 2, 12, intermediate_size=80, max_position_embeddings=256, rope_theta=50_000.0
    )
    model = Transformer(dataclasses.replace(base, **changes))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A good model folder."""
    target = tmp_path / "model"
    save_folder(target, random_model(), tokenizer, provenance={"settings": {"seed": 1}})
    return target


@pytest.fixture
def foreign(saved: Path) -> Path:
    """A folder as another tool writes it: no manifest."""
    (saved / folders.MANIFEST).unlink()
    return saved


# Saved and read back -------------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "llama tied grouped": {},
    "llama untied": {"tie_embeddings": False, "num_kv_heads": 4},
    "llama one key head, biases": {"num_kv_heads": 1, "attention_bias": True, "output_bias": True, "mlp_bias": True},
    "llama 3 rotary scaling": {"rope_scaling": LLAMA3},
    "linear rotary scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen3 tied, wide heads": {"model_type": "qwen3", "qk_norm": True, "head_dim": 20},
    "qwen3 untied": {"model_type": "qwen3", "qk_norm": True, "tie_embeddings": False},
}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What transformers logs while it loads."""
    logger = logging.getLogger("transformers")
    propagate, logger.propagate = logger.propagate, True
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield lambda: [record.getMessage() for record in caplog.records if record.name.startswith("transformers")]
    logger.propagate = propagate


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_gives_the_same_logits(
    name: str, tmp_path: Path, tokenizer: Tokenizer, said: Callable[[], list[str]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = random_model(**SHAPES[name])
    save_folder(tmp_path / "m", model, tokenizer, provenance={})
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.rope_parameters["rope_theta"] == 50_000.0
    ids = torch.randint(0, 304, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, reference = model(ids), theirs(ids).logits
    assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert their_tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    messages = [{"role": "user", "content": "你好"}]
    assert their_tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\n你好<|im_end|>\n"
    assert theirs.generation_config.eos_token_id == tokenizer.eos_id
    assert theirs.generation_config.pad_token_id == tokenizer.pad_id
    assert said() == []


@pytest.mark.parametrize("name", SHAPES)
def test_a_folder_comes_back_as_it_was_saved(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = random_model(**SHAPES[name])
    save_folder(tmp_path / "m", model, tokenizer, provenance={"settings": {"seed": 3}, "prompt_prefix": "从前"})
    loaded = load_folder(tmp_path / "m")
    assert loaded.config == model.config
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    rebuilt = build(loaded.config, loaded.state).state_dict()
    assert rebuilt.keys() == model.state_dict().keys()
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in model.state_dict().items())
    assert loaded.generation == {
        "bos_token_id": 0,
        "eos_token_id": [0],
        "pad_token_id": 1,
        "do_sample": False,
        "add_bos_token": False,
    }
    assert len({path.stat().st_mode for path in (tmp_path / "m").iterdir()}) == 1  # readable by the same people
    manifest = folders.read_manifest(tmp_path / "m")
    assert manifest["settings"] == {"seed": 3}
    assert manifest["prompt_prefix"] == "从前"
    assert set(manifest["files"]) == {path.name for path in (tmp_path / "m").iterdir()} - {"hanmo.json"}


def test_tied_weights_are_stored_once_and_the_precision_is_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_folder(tmp_path / "m", random_model().to(torch.bfloat16), tokenizer, provenance={})
    header = read_header(tmp_path / "m" / "model.safetensors")
    assert "lm_head.weight" not in header
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_folder(tmp_path / "m").state["model.norm.weight"].dtype == torch.bfloat16


def test_older_readers_find_the_rotary_keys_they_know(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["rope_theta"] == 50_000.0
    assert config["rope_scaling"] is None
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 50_000.0}


def test_model_card(saved: Path, tokenizer: Tokenizer) -> None:
    card = (saved / "README.md").read_text(encoding="utf-8")
    front = card.split("---\n")[1]
    import yaml

    assert yaml.safe_load(front)["license"] == "unknown"
    assert "hanmo" in yaml.safe_load(front)["tags"]
    assert "简介" in card
    provenance = {"license": "mit", "languages": ["zh", "en"]}
    save_folder(saved, random_model(), tokenizer, provenance=provenance)
    front = yaml.safe_load((saved / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert front["license"] == "mit"
    assert front["language"] == ["zh", "en"]
    save_folder(saved, random_model(), tokenizer, provenance={}, card="# Mine\n")
    assert (saved / "README.md").read_text(encoding="utf-8") == "# Mine\n"


def test_generation_entries(tmp_path: Path, tokenizer: Tokenizer) -> None:
    given = {"eos_token_id": [0, 3], "temperature": 0.7, "do_sample": True, "add_bos_token": True}
    save_folder(tmp_path / "m", random_model(), tokenizer, provenance={}, generation=given)
    written = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [0, 3]
    assert written["do_sample"] is True
    assert "add_bos_token" not in written
    assert load_folder(tmp_path / "m").generation["eos_token_id"] == [0, 3]
    with pytest.raises(ModelError, match="token id 304 is not in the vocabulary"):
        save_folder(tmp_path / "m", random_model(), tokenizer, provenance={}, generation={"eos_token_id": 304})


# A full disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 600 KB, where this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("this machine does not let the test mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_the_old_folder_intact(small_disk: Path, tokenizer: Tokenizer) -> None:
    target = small_disk / "model"
    save_folder(target, random_model(), tokenizer, provenance={})
    before = contents(target)
    with pytest.raises(ResourceError, match="No space left") as caught:
        save_folder(target, random_model(hidden_size=96, num_layers=4), tokenizer, provenance={})
    assert str(target) in str(caught.value)
    assert contents(target) == before
    assert [path.name for path in small_disk.iterdir()] == ["model"]
    load_folder(target)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_write_is_a_resource_error(
    code: int, saved: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_state: Any, path: str, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise weights.SafetensorError(f"I/O error: {os.strerror(code)} (os error {code})")

    before = contents(saved)
    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(ResourceError):
        save_folder(saved, random_model(), tokenizer, provenance={})
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


# Folders that are refused --------------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_missing_folder_and_missing_files(tmp_path: Path, foreign: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_folder(tmp_path / "nothing")
    (foreign / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load_folder(foreign)
    (foreign / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_folder(foreign)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_truncated_or_altered_file_is_found_by_the_manifest(name: str, saved: Path) -> None:
    path = saved / name
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(ModelError, match="manifest says") as caught:
        load_folder(saved)
    assert str(path) in str(caught.value)
    path.write_bytes(good[:-10] + bytes([good[-10] ^ 1]) + good[-9:])
    with pytest.raises(ModelError, match="SHA-256"):
        load_folder(saved)
    path.unlink()
    with pytest.raises(ModelError, match=r"missing|no config"):
        load_folder(saved)


@pytest.mark.parametrize(
    "files",
    ["text", {"model.safetensors": 3}, {"model.safetensors": {"size": 1}}, {"../x": {"size": 1, "sha256": ""}}],
    ids=["text", "number", "no hash", "outside"],
)
def test_a_malformed_manifest_is_refused(files: Any, saved: Path) -> None:
    edit(saved / "hanmo.json", lambda value: value.update(files=files))
    with pytest.raises(ModelError, match=r"hanmo|outside|lacks|JSON object"):
        load_folder(saved)


def test_pickles_are_refused_with_the_reason(foreign: Path) -> None:
    (foreign / "model.safetensors").rename(foreign / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle") as caught:
        load_folder(foreign)
    assert "runs whatever code" in caught.value.why
    assert "safetensors" in caught.value.fix


def test_unknown_architecture_lists_the_known_ones(foreign: Path) -> None:
    edit(foreign / "config.json", lambda value: value.update(model_type="gpt_bigcode"))
    with pytest.raises(ModelError, match="gpt_bigcode") as caught:
        load_folder(foreign)
    assert "llama, mistral, qwen2, qwen3, gpt2" in caught.value.fix
    assert caught.value.where == str(foreign / "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "64"},
        {"num_attention_heads": 0, "head_dim": None},
        {"num_hidden_layers": 10**9},
        {"rope_theta": "big"},
        {"rope_scaling": "yes"},
        {"vocab_size": -1},
        {"hidden_size": 2**62},
        {"num_attention_heads": 2**40},
        {"quantization_config": {"quant_method": "gptq"}},
        {"hidden_size": None},
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(change: dict[str, Any], foreign: Path) -> None:
    edit(foreign / "config.json", lambda value: value.update(change))
    with pytest.raises(ModelError) as caught:
        loaded = load_folder(foreign)
        build(loaded.config, loaded.state)
    assert caught.value.what


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_json_that_is_damaged_or_of_another_shape(name: str, foreign: Path) -> None:
    for content in ("{", "[1]", "\xff", "[" * 100_000):
        (foreign / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(ModelError) as caught:
            load_folder(foreign)
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "hanmo.json", "generation_config.json"])
def test_a_number_of_too_many_digits(name: str, foreign: Path) -> None:
    (foreign / name).write_text('{"a": ' + "9" * 5000 + "}")
    with pytest.raises(ModelError, match=r"JSON|digits") as caught:
        load_folder(foreign)
    assert name in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(foreign: Path, tokenizer: Tokenizer) -> None:
    model = random_model(vocab_size=tokenizer.vocab_size - 5)
    write_safetensors(foreign / "model.safetensors", model.state_dict())
    (foreign / "config.json").write_text(json.dumps(model.config.to_hf()))
    with pytest.raises(ModelError, match="the tokenizer has ids up to"):
        load_folder(foreign)


def test_special_ids_outside_the_vocabulary_are_refused(foreign: Path) -> None:
    edit(foreign / "generation_config.json", lambda value: value.update(eos_token_id=[0, 999]))
    with pytest.raises(ModelError, match="999"):
        load_folder(foreign)


@pytest.mark.parametrize(
    ("config", "processor", "expected"),
    [
        ({"add_bos_token": True}, None, True),
        ({"add_bos_token": False}, "bos", False),
        ({}, "bos", True),
        ({}, "empty", False),
        ({}, None, False),
    ],
)
def test_whether_a_model_expects_bos(
    config: dict[str, Any], processor: str | None, expected: bool, foreign: Path
) -> None:
    token = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    body = {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [token, body] if processor == "bos" else [body],
        "pair": [body, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    edit(foreign / "tokenizer_config.json", lambda value: value.update(config))
    edit(foreign / "tokenizer.json", lambda value: value.update(post_processor=template if processor else None))
    assert load_folder(foreign).generation["add_bos_token"] is expected


# Shards --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(foreign: Path) -> Path:
    """A folder whose weights are split over two files."""
    state = load_file(foreign / "model.safetensors")
    (foreign / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {}
    for index, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{index:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, foreign / file)
        weight_map |= dict.fromkeys(part, file)
    (foreign / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return foreign


def test_shards_are_read_together(sharded: Path) -> None:
    loaded = load_folder(sharded)
    assert loaded.state.keys() == random_model().state_dict().keys()
    build(loaded.config, loaded.state)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "evil.bin", ".safetensors", ""]
)
def test_an_index_cannot_name_files_elsewhere(name: str, sharded: Path) -> None:
    edit(
        sharded / "model.safetensors.index.json", lambda value: value["weight_map"].update({"model.norm.weight": name})
    )
    with pytest.raises(ModelError, match="not a safetensors file inside"):
        load_folder(sharded)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors"])
def test_a_link_cannot_lead_out_of_the_folder(name: str, sharded: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (sharded / "model-00001-of-00002.safetensors").rename(outside)
    (sharded / name).symlink_to(outside)
    with pytest.raises(ModelError, match="not a safetensors file inside"):
        load_folder(sharded)


def test_links_of_the_hub_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in sharded.iterdir():
        file.rename(blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"hash-{file.name}")
    assert load_folder(snapshot).state


def test_index_and_shards_must_agree(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    good = index.read_text()
    edit(index, lambda value: value["weight_map"].pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' against the index"):
        load_folder(sharded)
    index.write_text(good)
    edit(index, lambda value: value["weight_map"].update({"more": "model-00001-of-00002.safetensors"}))
    with pytest.raises(ModelError, match="lacks the tensor 'more'"):
        load_folder(sharded)
    edit(index, lambda value: value.update(weight_map=[]))
    with pytest.raises(ModelError, match="weight_map"):
        load_folder(sharded)
    index.write_text(good)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="missing"):
        load_folder(sharded)


# Hostile safetensors -------------------------------------------------------------------------------------------------


def pack(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file from its parts."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    """A header with one tensor."""
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


DATA = bytes(16)
PAIR = {**one(), "b": {"dtype": "F16", "shape": [4], "data_offsets": [16, 24]}}
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\x02\0\0\0\0\0\0",
    "length only": struct.pack("<Q", 2),
    "length of 2**64": pack(one(), DATA, 2**64 - 1),
    "length of 2**63": pack(one(), DATA, 2**63),
    "length past the end by one": pack(b"{}", b"", 3),
    "length above 100 MB": pack(one(), DATA, 100_000_001),
    "not JSON": pack(b"{a}", b""),
    "not UTF-8": pack(b'{"\xff": 1}', b""),
    "a list": pack([], b""),
    "nested beyond measure": pack(b"[" * 100_000, b""),
    "header cut": pack(one(), DATA)[:40],
    "data cut": pack(one(), DATA[:-1]),
    "data missing": pack(one(), b""),
    "byte too many": pack(one(), DATA + b"\0"),
    "overlap": pack({**PAIR, "b": {**PAIR["b"], "data_offsets": [8, 16]}}, DATA),
    "same place twice": pack({**one(), "b": one()["a"]}, DATA),
    "gap": pack({**PAIR, "b": {**PAIR["b"], "data_offsets": [20, 28]}}, bytes(28)),
    "gap at the start": pack(one(offsets=[4, 20]), bytes(20)),
    "offsets reversed": pack(one(offsets=[16, 0]), DATA),
    "negative offset": pack(one(offsets=[-16, 0]), DATA),
    "offset that is no whole number": pack(one(offsets=[0, 16.0]), DATA),
    "offset that is true": pack(one(shape=[], offsets=[0, True]), DATA),
    "three offsets": pack(one(offsets=[0, 8, 16]), DATA),
    "no offsets": pack({"a": {"dtype": "F32", "shape": [4]}}, DATA),
    "entry that is a number": pack({"a": 7}, DATA),
    "negative shape": pack(one(shape=[-2, -2]), DATA),
    "shape larger than the offsets": pack(one(shape=[2, 3]), DATA),
    "shape whose product overflows": pack(one(shape=[2**32, 2**32, 2**32]), DATA),
    "shape that is text": pack(one(shape="22"), DATA),
    "unknown type": pack(one(dtype="F31"), DATA),
    "type that is no text": pack(one(dtype=["F32"]), DATA),
    "integers as weights": pack(one(dtype="I16"), DATA),
    "a web page": b"<!DOCTYPE html>" + b" " * 100,
    "a git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_weight_files_are_refused_before_memory_is_taken(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    with pytest.raises(ModelError) as caught:
        read_safetensors(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000
    assert str(path) in str(caught.value)


def test_a_good_weight_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack({"__metadata__": {"format": "pt"}, **PAIR}, struct.pack("<4f4e", *range(8))))
    state = read_safetensors(path)
    assert state["a"].tolist() == [[0, 1], [2, 3]]
    assert state["b"].tolist() == [4, 5, 6, 7]


def test_every_truncation_of_a_foreign_weight_file_is_found(foreign: Path) -> None:
    path = foreign / "model.safetensors"
    good = path.read_bytes()
    for length in [*range(0, 64, 5), *range(64, len(good), 9_973), len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(ModelError, match=r"header|bytes"):
            load_folder(foreign)
