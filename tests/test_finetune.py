"""``hanmo finetune``: every task from its files to a model folder that answers, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hanmo
from hanmo.cli.main import main
from hanmo.models.architectures import read_config
from hanmo.models.checkpoints.save import save_folder
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.text.training import train_bpe
from hanmo.training.objectives.words import with_mask

WORDS = ["good film", "bad film", "很好 的 电影", "糟糕 的 电影", "Anna lives in Paris", "what is 2 plus 2 ?", "four"]


def save(folder: Path, config: TransformerConfig, tokenizer: Any) -> str:
    model = Transformer(config)
    model.initialize(1)
    with torch.no_grad():  # output projections begin at zero: without them nothing depends on the input
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    save_folder(folder, model, tokenizer, provenance={"kind": "model", "prompt_prefix": []})
    return str(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A decoder, an encoder and an encoder-decoder, all tiny."""
    root = tmp_path_factory.mktemp("bases")
    tokenizer = train_bpe(WORDS * 20, 300)
    size = tokenizer.vocab_size
    decoder = TransformerConfig(size, 32, 2, 4, 2, 8, 48, 128, qk_norm=True, model_type="qwen3")
    encoder = with_mask(tokenizer)
    raw = {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": encoder.vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    both = {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": size,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    return {
        "decoder": save(root / "decoder", decoder, tokenizer),
        "encoder": save(root / "encoder", read_config(raw), encoder),
        "both": save(root / "both", read_config(both), tokenizer),
    }


def lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return str(path)


def finetune(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    code = main(["finetune", *arguments, "--json"])
    out = capsys.readouterr()
    assert code == 0, out.err
    return json.loads(out.out)  # type: ignore[no-any-return]


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    return main(["finetune", *arguments]), capsys.readouterr().err


LABELLED = [{"text": f"{word} {number}", "label": word} for number in range(12) for word in ("good", "bad")]
TAGGED = [
    {"tokens": ["Anna", "lives", "in", "Paris", str(number)], "tags": ["B-PER", "O", "O", "B-LOC", "O"]}
    for number in range(12)
]
QUESTIONS = [
    {
        "context": f"Anna lives in Paris {number}",
        "question": "Where ?",
        "answers": [{"text": "Paris", "answer_start": 14}],
    }
    for number in range(12)
]
PAIRS = [{"source": f"good film {number}", "target": f"很好 的 电影 {number}"} for number in range(12)]
CHATS = [
    {"messages": [{"role": "user", "content": f"what is 2 plus {n} ?"}, {"role": "assistant", "content": "four"}]}
    for n in range(12)
]
PREFERENCES = [{"prompt": f"a film {number} ?", "chosen": "good film", "rejected": "bad film"} for number in range(12)]
SIMILAR = [{"anchor": f"good film {number}", "positive": f"很好 的 电影 {number}"} for number in range(30)]


@pytest.mark.parametrize(
    ("task", "base", "records", "extra", "ask"),
    [
        ("classification", "encoder", LABELLED, [], lambda m: m.classify(["good 3"])),
        ("classification", "decoder", LABELLED, ["--balanced"], lambda m: m.classify(["good 3"])),
        ("tagging", "encoder", TAGGED, [], lambda m: m.tag("Anna lives")),
        ("tagging", "encoder", TAGGED, ["--crf"], lambda m: m.tag("Anna lives")),
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
