"""Tiny bases, records and commands for the tests of ``hanmo finetune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

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


def make_bases(root: Path) -> dict[str, str]:
    """A decoder, an encoder and an encoder-decoder, all tiny."""
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
ROLES = [
    {
        "tokens": ["Anna", str(i), "lives", "in", "Paris"],
        "frames": [{"predicate": 2, "args": [["ARG0", 0, 1], ["ARGM-LOC", 3, 4]]}, {"predicate": 4, "args": []}],
    }
    for i in range(24)
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
