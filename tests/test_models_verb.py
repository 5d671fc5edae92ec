"""``hanmo models``: what is listed, what the headers tell, and that damaged models are listed and never crash it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hanmo import catalog
from hanmo.cli.main import main
from hanmo.cli.models import COLUMNS, cells, column_widths, display_width, shorten, table
from hanmo.errors import ModelError
from hanmo.folder import atomic_folder
from hanmo.inference import inspection, inventory
from hanmo.inference.inspection import Listed, count_parameters, inspect
from hanmo.inference.inventory import find_model, local_models, models_at, search
from hanmo.models.ngram import NGramModel

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 2,
    "hidden_size": 4,
    "max_position_embeddings": 32,
    "vocab_size": 6,
}


CARDS = {
    "---\nlicense: mit\nlanguage: zh\n---\n": ("mit", ("zh",)),
    "---\r\nlicense: 'apache-2.0'\r\nlanguage: [zh, \"en\"]\r\n---\r\n": ("apache-2.0", ("zh", "en")),
    "---\ntags:\n- license: x\nlanguage:\n  - no\n  - zh-Hant\nlicense: unknown\n---\nlicense: mit": (
        "",
        ("no", "zh-Hant"),
    ),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder and an empty cache."""
    monkeypatch.setenv("HANMO_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_model(folder: Path, config: dict[str, Any] = LLAMA, *, manifest: bool = False, **files: str) -> Path:
    """A model folder with 24 + 8 numbers; further files by their names, with ``__`` for a dot."""

    def fill(folder: Path) -> None:
        tensors = {"a": np.zeros((6, 4), np.float32), "b": np.zeros(8, np.float16), "ids": np.zeros(5, np.int64)}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")

    if manifest:
        with atomic_folder(folder, {"kind": "model", "license": "CC-BY-4.0", "languages": ["zh"]}) as temporary:
            fill(temporary)
    else:
        folder.mkdir(parents=True)
        fill(folder)
    return folder


def make_gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(4)
    writer.add_license("mit")
    writer.add_languages(["zh", "en"])
    writer.add_chat_template("{{ messages }}")
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.zeros((3, 4), np.float32))
    writer.add_tensor("output.weight", np.zeros((3, 4), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_arpa(path: Path, text: str = "\\data\\\nngram 1=3\nngram 2=4\n\n\\1-grams:\n-1\t<s>\t0\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a remark\n\n" + text, encoding="utf-8")
    return path


def test_what_a_folder_tells(place: Path) -> None:
    card = "---\nlicense: mit\nlanguage:\n- zh\n- en\n---\n# 模型\n"
    folder = make_model(place / "m", README__md=card, tokenizer_config__json='{"chat_template": "x"}')
    listed = inspect(folder)
    assert (listed.name, listed.place, listed.path) == (str(folder), "folder", str(folder))
    assert (listed.kind, listed.architecture, listed.format) == ("transformer", "llama", "safetensors")
    assert listed.parameters == 32  # the five ids are no parameters
    assert listed.size == sum(path.stat().st_size for path in folder.iterdir())
    assert (listed.licence, listed.languages) == ("mit", ("zh", "en"))
    assert listed.tasks == ("generate", "chat")
    assert listed.details["context_length"] == 32
    assert listed.problem == ""


@pytest.mark.parametrize(
    ("config", "kind", "tasks"),
    [
        (LLAMA, "transformer", ("generate",)),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_head": 2}, "transformer", ("generate",)),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"], "num_attention_heads": 2}, "transformer",
         ("fill", "embed")),
        ({"model_type": "bert", "architectures": ["BertModel"], "num_attention_heads": 2}, "transformer", ("embed",)),
        ({"model_type": "roberta", "architectures": ["RobertaForTokenClassification"], "num_attention_heads": 2},
         "transformer", ("tag",)),
        ({"model_type": "distilbert", "architectures": ["DistilBertForSequenceClassification"], "n_heads": 2},
         "transformer", ("classify",)),
        ({"model_type": "bert", "architectures": ["BertForQuestionAnswering"], "num_attention_heads": 2},
         "transformer", ("answer",)),
        ({"model_type": "marian", "architectures": ["MarianMTModel"], "num_attention_heads": 2}, "transformer",
         ("translate",)),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "num_heads": 2}, "transformer",
         ("rewrite",)),
        ({"model_type": "resnet", "architectures": ["ResNetForImageClassification"]}, "", ()),
        ({"model_type": "lstm", "hidden_size": 4}, "recurrent", ("generate",)),
        ({"model_type": "gru", "head": {"task": "token-classification"}}, "recurrent", ("tag",)),
        ({"model_type": "rnn"}, "recurrent", ("generate",)),
        ({"model_type": "ngram", "order": 5}, "n-gram", ("generate",)),
        ({"model_type": "vectors", "method": "glove"}, "vectors", ("similarity",)),
        ({"model_type": "linear", "labels": ["好", "坏"]}, "linear", ("classify",)),
        ({"model_type": "crf", "labels": ["B", "I"]}, "crf", ("tag",)),
    ],
)  # fmt: skip
def test_kinds_and_tasks(config: dict[str, Any], kind: str, tasks: tuple[str, ...], place: Path) -> None:
    listed = inspect(make_model(place / "m", config))
    assert (listed.kind, listed.tasks, listed.architecture) == (kind, tasks, config["model_type"])
    assert listed.problem == ""


def test_a_real_n_gram_model_and_a_sentence_encoder(place: Path) -> None:
    model = NGramModel.train([[1, 2, 3, 0], [1, 2, 0]], order=2, vocab_size=4, bos_id=0, eos_id=0)
    folder = make_model(place / "ngram", {"model_type": "ngram", "order": 2, "vocab_size": 4})
    model.save(folder / "model.safetensors")
    numbers = sum(len(each.logprobs) + len(each.backoffs) for each in model.tables)
    assert inspect(folder).parameters == numbers
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "num_attention_heads": 1}
    assert inspect(make_model(place / "encoder", config, modules__json="[]")).tasks == ("embed",)


def test_the_manifest_and_shards(place: Path) -> None:
    listed = inspect(make_model(place / "m", manifest=True))
    assert (listed.licence, listed.languages) == ("CC-BY-4.0", ("zh",))
    folder = make_model(place / "shards")
    save_file({"c": np.zeros(10, np.float32)}, folder / "second.safetensors")
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    assert inspect(folder).parameters == 42  # without an index: all that are there
    index = {"weight_map": {"a": "first.safetensors", "c": "second.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert inspect(folder).parameters == 42
    (folder / "second.safetensors").unlink()
    assert "second.safetensors is missing" in inspect(folder).problem


def test_what_a_gguf_and_an_arpa_file_tell(place: Path) -> None:
    listed = inspect(make_gguf(place / "m.gguf"))
    assert (listed.kind, listed.architecture, listed.format, listed.parameters) == ("transformer", "llama", "gguf", 24)
    assert (listed.licence, listed.languages, listed.tasks) == ("mit", ("zh", "en"), ("generate", "chat"))
    assert listed.details == {"hidden_size": 4, "context_length": 64, "precision": "F32", "vocab_size": 3}
    listed = inspect(make_arpa(place / "m.arpa"))
    assert (listed.kind, listed.format, listed.parameters) == ("n-gram", "arpa", 7)
    assert listed.details == {"order": 2, "ngrams": [3, 4], "vocab_size": 3}
    assert listed.problem == ""


# Damage --------------------------------------------------------------------------------------------------------------


def header(value: Any, extra: bytes = b"") -> bytes:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(raw).to_bytes(8, "little") + raw + extra


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", "truncated"),
        (b"\xff" * 7, "truncated"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "truncated"),
        (header(b"not json"), "damaged header"),
        (header(b"[" * 100_000), "damaged header"),
        (header([]), "damaged header"),
        (header({"a": 5}), "damaged header"),
        (header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)), "damaged header"),
        (header({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}, bytes(4)), "damaged header"),
        (header({"a": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 4]}}, bytes(4)), "damaged header"),
        (header({"a": {"dtype": 3, "shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "damaged header"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(7)), "truncated or altered"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(9)), "truncated or altered"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "truncated"),
    ],
)
def test_damaged_weights_are_listed_with_their_problem(raw: bytes, told: str, place: Path) -> None:
    folder = make_model(place / "m")
    (folder / "model.safetensors").write_bytes(raw)
    listed = inspect(folder)
    assert told in listed.problem and "model.safetensors" in listed.problem
    assert (listed.architecture, listed.parameters) == ("llama", None)


def test_a_huge_header_is_refused_before_it_is_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "MAX_HEADER", 1000)
    path = place / "x.safetensors"
    path.write_bytes(header(b" " * 1001))
    with pytest.raises(ModelError, match="header of 1001 bytes"):
        count_parameters(path)
    monkeypatch.setattr(inspection, "MAX_JSON", 50)
    assert "more than any configuration" in inspect(make_model(place / "m")).problem


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300) | st.builds(header, st.binary(max_size=200), st.binary(max_size=20)))
def test_any_bytes_are_counted_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(raw)
    try:
        assert count_parameters(path) >= 0
    except ModelError as error:
        assert "any.safetensors" in error.what


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("config", "config.json: not valid JSON"),
        ("list", "config.json is not a JSON object"),
        ("manifest", "hanmo.json: not valid JSON"),
        ("cut", "truncated or altered"),
        ("notes", "notes.txt: the file has 3 bytes, its manifest says 2"),
        ("none", "no weights"),
        ("pickle", "a Python pickle"),
        ("tokenizer", "tokenizer_config.json: not valid JSON"),
    ],
)
def test_damaged_folders_are_listed_with_their_problem(damage: str, told: str, place: Path) -> None:
    folder = make_model(place / "m", manifest=True, notes__txt="ab")
    weights = folder / "model.safetensors"
    if damage in ("config", "list"):
        (folder / "config.json").write_text("{" if damage == "config" else "[1]")
    elif damage == "manifest":
        (folder / "hanmo.json").write_text('{"license": ')
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "notes":
        (folder / "notes.txt").write_text("abc")
    elif damage == "tokenizer":
        (folder / "tokenizer_config.json").write_text("{'")
    else:
        weights.rename(folder / "pytorch_model.bin") if damage == "pickle" else weights.unlink()
        (folder / "hanmo.json").unlink()
    assert told in inspect(folder).problem
    assert [listed.problem for listed in models_at(place)] == [inspect(folder).problem]


@pytest.mark.parametrize(
    "card",
    ["---\nlicense: [\n---\n", "---\nlanguage: 7\n---", "---\nlicense:" + "[" * 60_000, "---\n", "no head", "",
     "---\nlanguage: \n", "---\nlanguage:" + "\n-" * 30_000, "license: mit\n---\n"],
)  # fmt: skip
def test_a_strange_card_is_no_damage(card: str, place: Path) -> None:
    listed = inspect(make_model(place / "m", README__md=card))
    assert (listed.licence, listed.languages, listed.problem) == ("", (), "")


@pytest.mark.parametrize("cut", [0, 3, 10, 100, -40])
def test_damaged_gguf_files(cut: int, place: Path) -> None:
    path = make_gguf(place / "m.gguf")
    path.write_bytes(path.read_bytes()[:cut])
    listed = inspect(path)
    assert listed.problem and listed.size == path.stat().st_size


@pytest.mark.parametrize(
    "text", ["", "\\data\\\n", "\\data\\\nngram 2=1\n", "\\data\\\nngram 1=x\n", "\\data\\\nngram 1=" + "9" * 99 + "\n",
             "ngram 1=3\n", "x" * 100_000, "\n" * 5000],
)  # fmt: skip
def test_damaged_arpa_files(text: str, place: Path) -> None:
    assert inspect(make_arpa(place / "m.arpa", text)).problem


@pytest.mark.parametrize(("card", "told"), CARDS.items())
def test_the_cards_of_models(card: str, told: tuple[str, tuple[str, ...]], place: Path) -> None:
    listed = inspect(make_model(place / "m", README__md=card))
    assert (listed.licence, listed.languages) == told


def test_what_cannot_be_read_is_listed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(place / "m")

    def refuse(_: Path) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(inspection, "count_parameters", refuse)
    assert "PermissionError" in inspect(folder).problem


# Finding -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_the_catalogue_is_listed_fetched_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [entry.name for entry in catalog.ENTRIES]
    found = local_models()
    assert [listed.name for listed in found] == names
    assert all(listed.path is None and listed.size and listed.licence and listed.parameters for listed in found)
    cached = catalog.cache_folder("all-minilm-l6-v2")
    make_model(cached, {**LLAMA, "model_type": "bert"}, manifest=True)
    encoder = next(listed for listed in local_models() if listed.name == "all-minilm-l6-v2")
    assert (encoder.path, encoder.parameters, encoder.problem) == (str(cached), 32, "")
    assert (encoder.licence, encoder.tasks) == ("Apache-2.0", ("embed",))
    make_gguf(catalog.cache_folder("smollm2-135m-instruct") / "x.gguf")
    (catalog.cache_folder("smollm2-135m-instruct") / "hanmo.json").write_text('{"files": {"x.gguf": 5}}')
    chat = local_models()[0]
    assert chat.format == "gguf" and chat.parameters == 134_515_008
    assert "the manifest is damaged" in chat.problem
    (cached / "model.safetensors").write_bytes(b"")
    assert "truncated" in local_models()[1].problem
    monkeypatch.setattr(inventory, "inspect", lambda *_, **__: pytest.fail("the header of the GGUF file was read"))
    assert inventory.catalog_model(catalog.ENTRIES[0], gguf_header=False).size


def test_runs_the_cache_and_folders_are_searched(place: Path) -> None:
    make_model(place / "runs" / "诗" / "model", manifest=True)
    (place / "runs" / "诗" / "checkpoints").mkdir()
    make_model(place / "runs" / "诗" / "checkpoints" / "step-1")
    make_model(place / "runs" / "诗" / "baseline", {"model_type": "ngram"})
    make_model(place / "runs" / "plain")
    (place / "runs" / "stopped" / "data").mkdir(parents=True)
    make_model(place / "home" / "models" / "mine")
    make_model(place / "home" / "models" / ".mine.tmp-1")
    local = local_models()[len(catalog.ENTRIES) :]
    assert [(listed.name, listed.place) for listed in local] == [
        ("plain", "run"),
        ("runs/诗/baseline", "run"),
        ("诗", "run"),
        (str(place / "home" / "models" / "mine"), "folder"),
    ]
    elsewhere = place / "elsewhere"
    make_gguf(elsewhere / "a" / "b" / "UPPER.GGUF")
    make_arpa(elsewhere / "x.arpa")
    make_model(elsewhere / "m")
    make_model(elsewhere / "m" / "inner")  # part of the model around it
    make_model(elsewhere / ".hidden" / "m")
    make_model(elsewhere / "1" / "2" / "3" / "4" / "5")  # too deep
    (elsewhere / "web").mkdir()
    (elsewhere / "web" / "config.json").write_text('{"name": "not a model"}')
    (elsewhere / "broken").mkdir()
    (elsewhere / "broken" / "config.json").write_text("{")
    (elsewhere / "loop").symlink_to(elsewhere)
    found = {path.relative_to(elsewhere).as_posix() for path in search(elsewhere)}
    assert found == {"a/b/UPPER.GGUF", "x.arpa", "m"}


def test_a_search_has_an_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        make_model(place / "many" / f"{number:02}")
    monkeypatch.setattr(inventory, "MAX_FOLDERS", 11)
    assert len(list(search(place / "many"))) == 10


def test_names_of_all_kinds_and_of_none(place: Path) -> None:
    make_model(place / "runs" / "poems" / "model")
    make_model(place / "two" / "a")
    make_model(place / "two" / "b")
    assert [listed.place for listed in find_model("poems")] == ["run"]
    assert [listed.name for listed in find_model("ALL-MiniLM-L6-v2")] == ["all-minilm-l6-v2"]
    assert len(find_model("two")) == 2
    assert find_model("two/a")[0].path == "two/a"
    with pytest.raises(ModelError) as caught:
        find_model("poms")
    assert caught.value.fix == "did you mean 'poems'?"
    (place / "empty").mkdir()
    with pytest.raises(ModelError, match="no model was found"):
        find_model("empty")
    (place / "empty" / "config.json").write_text("{")
    assert "not valid JSON" in find_model("empty")[0].problem
    (place / "zipped.arpa.gz").write_bytes(gzip.compress(make_arpa(place / "x.arpa").read_bytes()))
    assert find_model("zipped.arpa.gz")[0].details["ngrams"] == [3, 4]
    (place / "zipped.arpa.gz").write_bytes(b"\x1f\x8bxx")
    assert "cannot be read" in find_model("zipped.arpa.gz")[0].problem
    (place / "notes.txt").write_text("x")
    assert find_model("notes.txt")[0].problem == "this file is not a model"
    with pytest.raises(ModelError, match="no such"):
        models_at(place / "nothing")


# The verb ------------------------------------------------------------------------------------------------------------


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["models", *arguments]) == code
    return capsys.readouterr().out


def test_the_table(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(place / "runs" / "唐诗" / "model", manifest=True)
    make_model(place / "runs" / "cut" / "model")
    (place / "runs" / "cut" / "model" / "model.safetensors").write_bytes(b"x")
    for language, words in (
        ("en", ("architecture", "to download", "generate,chat")),
        ("zh", ("结构", "未下载", "续写,对话")),
    ):
        monkeypatch.setenv("HANMO_LANG", language)
        lines = output(capsys).splitlines()
        text = "\n".join(lines)
        assert all(word in text for word in words)
        assert "smollm2-135m-instruct" in text and "134.5 M" in text and "Apache-2.0" in text
        rows = lines[2:-1]
        assert any(row.startswith("唐诗 ") and "32" in row and "CC-BY-4.0" in row for row in rows)
        starts = {
            display_width(line[: line.index(word)]) for line in rows for word in ("llama", "bert") if word in line
        }
        assert len(starts) == 1  # Chinese names push nothing out of its column
        assert lines[-1].startswith("! cut: model.safetensors")
        assert any(row.startswith("cut !") for row in rows)


def test_the_table_as_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(place / "runs" / "唐诗" / "model")
    found = json.loads(output(capsys, "--json"))["models"]
    assert [each["name"] for each in found] == [*(entry.name for entry in catalog.ENTRIES), "唐诗"]
    assert found[-1]["parameters"] == 32 and found[-1]["languages"] == [] and found[-1]["problem"] == ""
    assert {"name", "architecture", "parameters", "size", "licence", "languages", "tasks", "path"} <= found[0].keys()


def test_the_details_of_one(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(place / "m", {**LLAMA, "labels": ["好", "坏"]}, README__md="---\nlanguage: [zh, en, fr, de, es]\n---\n")
    text = output(capsys, "m")
    assert "context length  32" in text and "zh,en,fr,de,es" in text and "好, 坏" in text
    assert json.loads(output(capsys, "m", "--json"))["model"]["details"]["labels"] == ["好", "坏"]
    monkeypatch.setenv("HANMO_LANG", "zh")
    text = output(capsys, "all-minilm-l6-v2")
    assert "说明" in text and "英文句子向量" in text and "description" not in text
    assert main(["models", "nothing"]) == 4
    assert "找不到模型" in capsys.readouterr().err


def test_several_paths_are_one_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(place / "a" / "model")
    make_arpa(place / "b" / "x.arpa")
    lines = output(capsys, "a", "b").splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["a/model", "x.arpa"]
    assert lines[2].endswith("a/model") and lines[3].endswith("b/x.arpa")


def test_text_from_files_cannot_steer_the_terminal(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\nfake row"
    config = {**LLAMA, "model_type": "x" + evil}
    make_model(place / "m", config, README__md=f"---\nlicense: {json.dumps(evil)}\n---\n")
    for arguments in (["m"], ["m", "m"]):
        text = output(capsys, *arguments)
        assert "\x1b" not in text and "fake row" in text
        assert not any(line.startswith("fake row") for line in text.splitlines())


WORDS = st.text(st.sampled_from("ab模型，é\u0301"), max_size=40)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=4), st.integers(20, 200))
def test_a_table_fits_into_the_terminal(values: list[tuple[str, str, str]], columns: int) -> None:
    found = [
        Listed(name or "m", "run", path, architecture=architecture, languages=("zh", "en", "fr", "de"))
        for name, path, architecture in values
    ]
    rows = [cells(listed) for listed in found]
    lines = table(found, columns).splitlines()
    widest = max(display_width(line) for line in lines)
    assert widest <= max(columns, 8 * len(COLUMNS) + 2 * len(COLUMNS))
    assert len(lines) == len(found) + 2
    assert column_widths(rows, None)["where"] == max(display_width(row["where"]) for row in rows)


@given(WORDS, st.integers(1, 30), st.booleans())
def test_shortened_texts_have_at_most_their_width(text: str, width: int, keep_end: bool) -> None:
    short = shorten(text, width, keep_end=keep_end)
    assert display_width(short) <= width
    rest = short.replace("…", "", 1)
    assert short == text or (text.endswith(rest) if keep_end else text.startswith(rest))


def test_a_list_without_gguf_files_imports_nothing_heavy(place: Path) -> None:
    make_model(place / "runs" / "x" / "model", manifest=True)
    code = (
        "import sys\nfrom hanmo.cli.main import main\nassert main(['models']) == 0\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'httpx'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    assert done.stderr.strip() == "[]"
    assert "x" in done.stdout
