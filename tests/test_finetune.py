"""``hanmo finetune``: every task from its files to a model folder that answers, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import hanmo
from hanmo.cli.main import main
from hanmo.errors import ModelError

from .finetune_cases import (
    CHATS,
    LABELLED,
    PAIRS,
    PREFERENCES,
    QUESTIONS,
    ROLES,
    SIMILAR,
    TAGGED,
    failed,
    finetune,
    lines,
    make_bases,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize(
    ("task", "base", "records", "extra", "ask"),
    [
        ("classification", "encoder", LABELLED, [], lambda m: m.classify(["good 3"])),
        ("classification", "decoder", LABELLED, ["--balanced"], lambda m: m.classify(["good 3"])),
        ("tagging", "encoder", TAGGED, [], lambda m: m.tag("Anna lives")),
        ("tagging", "encoder", TAGGED, ["--crf"], lambda m: m.tag("Anna lives")),
        ("semantic-roles", "encoder", ROLES, ["--crf"], lambda m: m.tag(["Anna", "[", "lives", "]"])),
        ("question-answering", "encoder", QUESTIONS, [], lambda m: m.answer("Where ?", "Anna lives in Paris")),
        ("seq2seq", "both", PAIRS, ["--smoothing", "0.1"], lambda m: m.generate("good film", max_new_tokens=4)),
        ("instructions", "decoder", CHATS, [], lambda m: m.generate("what", max_new_tokens=4)),
        (
            "instructions",
            "decoder",
            CHATS,
            ["--unpacked", "--last-turn"],
            lambda m: m.generate("what", max_new_tokens=4),
        ),
        ("preferences", "decoder", PREFERENCES, [], lambda m: m.generate("a film", max_new_tokens=4)),
        (
            "preferences",
            "decoder",
            PREFERENCES,
            ["--preference-loss", "orpo"],
            lambda m: m.generate("a", max_new_tokens=4),
        ),
        ("embeddings", "encoder", SIMILAR, ["--group", "4"], lambda m: m.embed(["good film"])),
    ],
)
def test_every_task_ends_with_a_model_that_answers(
    task: str,
    base: str,
    records: list[dict[str, Any]],
    extra: list[str],
    ask: Any,
    bases: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = lines(tmp_path / "data.jsonl", records)
    out = tmp_path / "run"
    arguments = [data, "--task", task, "--base", bases[base], "--max-steps", "3", "--out", str(out), *extra]
    done = finetune(capsys, *arguments)
    assert done["steps"] == 3 and "loss" in done["measures"]
    assert (out / "report.html").is_file() and not (out / "adapter").exists()
    assert ask(hanmo.load(out)) is not None


def test_the_stop_token_of_a_conversation_ends_generation(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lines(tmp_path / "data.jsonl", CHATS)
    code = main(["finetune", data, "--base", bases["decoder"], "--max-steps", "2", "--out", str(tmp_path / "run")])
    told = capsys.readouterr().err
    assert code == 0 and "the stop token is learned" in told and "what is learned stands in" in told
    tokenizer = hanmo.load(tmp_path / "run").tokenizer
    stops = json.loads((tmp_path / "run/model/generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.special_tokens["<|im_end|>"] in (stops if isinstance(stops, list) else [stops])


def test_adapters_are_peft_s_and_equal_the_merged_model(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    import transformers

    data = lines(tmp_path / "data.jsonl", CHATS)
    arguments = ["--base", bases["decoder"], "--lora", "--rank", "4", "--max-steps", "4", "--learning-rate", "0.01"]
    done = finetune(capsys, data, *arguments, "--out", str(tmp_path / "run"))
    size = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints").rglob("model.safetensors"))
    assert size < (Path(bases["decoder"]) / "model.safetensors").stat().st_size  # the base is not stored again
    base = transformers.AutoModelForCausalLM.from_pretrained(bases["decoder"])
    adapted = peft.PeftModel.from_pretrained(base, done["adapter"]).eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(done["model"]).eval()
    ids = torch.arange(5, 15).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
    expected = hanmo.load(done["model"]).generate("the cat", max_new_tokens=8)[0].ids
    for engine in ("auto", "torch"):  # an adapter alone is loaded onto the base that it names
        assert hanmo.load(done["adapter"], engine=engine).generate("the cat", max_new_tokens=8)[0].ids == expected
    shutil.move(bases["decoder"], tmp_path / "elsewhere")
    try:
        with pytest.raises(ModelError, match=r"this is an adapter for '.*decoder', and there is no such model here"):
            hanmo.load(done["adapter"])
    finally:
        shutil.move(tmp_path / "elsewhere", bases["decoder"])


def test_only_the_last_layers_change(bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    data = lines(tmp_path / "data.jsonl", LABELLED)
    arguments = ["--task", "classification", "--base", bases["encoder"], "--last-layers", "1", "--max-steps", "2"]
    done = finetune(capsys, data, *arguments, "--out", str(tmp_path / "run"))
    before = load_file(Path(bases["encoder"]) / "model.safetensors")
    after = load_file(Path(done["model"]) / "model.safetensors")
    same = {name for name in before if name in after and torch.equal(before[name], after[name])}
    assert any("layer.0." in name for name in same) and not any("layer.1.attention.self.query" in name for name in same)


@pytest.mark.parametrize("extra", [[], ["--lora", "--rank", "2"]], ids=["all", "lora"])
def test_an_interrupted_run_goes_on_bit_for_bit(
    extra: list[str],
    bases: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hanmo.training.fit import Trainer

    data = lines(tmp_path / "data.jsonl", CHATS)
    common = [data, "--base", bases["decoder"], "--max-steps", "6", "--checkpoint-every", "2", *extra]
    whole = finetune(capsys, *common, "--out", str(tmp_path / "whole"))
    original = Trainer.step

    def interrupted(self: Any, done: float) -> float:
        if self.state.step == 5:
            raise KeyboardInterrupt
        return original(self, done)

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert main(["finetune", *common, "--out", str(tmp_path / "parts")]) == 130
    monkeypatch.setattr(Trainer, "step", original)
    parts = finetune(capsys, *common, "--out", str(tmp_path / "parts"), "--resume")
    weights = [(Path(done["model"]) / "model.safetensors").read_bytes() for done in (whole, parts)]
    assert weights[0] == weights[1]
    other = lines(tmp_path / "other.jsonl", CHATS[:8])
    code, told = failed(capsys, other, *common[1:], "--out", str(tmp_path / "parts"), "--resume")
    assert code == 2 or "other texts or settings" in told


def test_a_teacher_is_followed(bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = lines(tmp_path / "data.jsonl", PAIRS)
    arguments = ["--task", "seq2seq", "--base", bases["both"], "--teacher", bases["both"], "--max-steps", "2"]
    done = finetune(capsys, data, *arguments, "--out", str(tmp_path / "run"))
    assert "divergence" in done["measures"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "classification"], "--base is missing"),
        (["--rank", "4", "--base", "x"], "--rank belongs to --lora"),
        (["--crf", "--base", "x"], "--crf means nothing for --task instructions"),
        (["--lora", "--last-layers", "1", "--base", "x"], "two answers to one question"),
        (["--fields", "text", "--base", "x"], "expected NAME=KEY"),
        (["--track", "tensorbord", "--base", "x"], "no tracker 'tensorbord'"),
        (["--shard", "--base", "x"], "--shard is for hanmo pretrain"),
        (["--base", "no-such-model"], "no-such-model"),
        (["--task", "instructions", "--base", "ENCODER"], "needs a decoder"),
        (["--task", "seq2seq", "--base", "DECODER"], "no encoder"),
    ],
)
def test_what_cannot_work_is_refused(
    arguments: list[str],
    message: str,
    bases: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = PAIRS if "seq2seq" in arguments else CHATS
    data = lines(tmp_path / "data.jsonl", records)
    given = [{"ENCODER": bases["encoder"], "DECODER": bases["decoder"]}.get(item, item) for item in arguments]
    code, told = failed(capsys, data, *given, "--out", str(tmp_path / "run"))
    assert code in (2, 3, 4) and message in told
    assert not (tmp_path / "run/model").exists()


def test_long_records_are_refused_by_name_or_cut_and_counted(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [*LABELLED, {"text": "good film " * 100, "label": "good"}]
    data = lines(tmp_path / "data.jsonl", records)
    arguments = [data, "--task", "classification", "--base", bases["encoder"], "--max-steps", "1"]
    arguments += ["--validation", lines(tmp_path / "valid.jsonl", LABELLED[:4]), "--out", str(tmp_path / "run")]
    code, told = failed(capsys, *arguments)
    assert code != 0 and "data.jsonl:25" in told and "--truncate" in told
    assert main(["finetune", *arguments, "--truncate"]) == 0
    assert "1 records are longer" in capsys.readouterr().err


def test_labels_that_training_never_shows_are_named(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lines(tmp_path / "data.jsonl", LABELLED)
    held = lines(tmp_path / "valid.jsonl", [*LABELLED[:2], {"text": "so so", "label": "fair"}])
    arguments = [data, "--task", "classification", "--base", bases["encoder"], "--validation", held]
    code, told = failed(capsys, *arguments, "--out", str(tmp_path / "run"))
    assert code != 0 and "fair" in told and "valid.jsonl:3" in told
