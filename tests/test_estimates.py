"""What a run will take: memory against what torch really holds, operations, what to change where it will not fit."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hanmo.cli.finetune import FinetuneSettings
from hanmo.cli.pretrain import PretrainSettings
from hanmo.errors import ResourceError
from hanmo.models.adapters import LoraConfig, add_adapter, train_only
from hanmo.models.cost import activation_bytes, num_parameters, training_flops_per_token
from hanmo.models.kernels import native
from hanmo.models.recurrent import RecurrentConfig, RecurrentModel
from hanmo.models.recurrent import activation_bytes as activation_bytes_of_recurrent
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.training.acceleration import checkpoint_blocks
from hanmo.training.energy import Power
from hanmo.training.estimates import (
    PROCESS_BYTES,
    Work,
    changes,
    estimate,
    lora_parameters,
    memory_of,
    step_flops_per_token,
)
from hanmo.training.optimizer import Optimizer, OptimizerSettings
from hanmo.training.plan import Machine, model_config
from hanmo.training.preflight import Preflight

ROWS, LENGTH, SOURCE = 2, 64, 96

# Activations: the formula and what autograd keeps -----------------------------------------------------------------


def network(**more: Any) -> TransformerConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 96,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 24,
        "intermediate_size": 160,
        "max_position_embeddings": 256,
    }
    return TransformerConfig(**{**sizes, **more})


PLAIN = {"norm": "layer", "norm_bias": True, "positions": "learned", "gated": False, "activation": "gelu_tanh"}
POST = {**PLAIN, "norm_placement": "post", "embedding_norm": True, "causal": False}
T5 = {"positions": "relative", "activation": "gelu_tanh"}


def pair(**more: Any) -> TransformerConfig:
    """An encoder-decoder."""
    return network(**more, encoder=network(**{**more, "causal": False, "num_layers": 2, "shared_embedding": True}))


NETWORKS = {
    "llama": network(num_kv_heads=2),
    "qwen3": network(num_kv_heads=2, qk_norm=True),
    "gpt2": network(**PLAIN),
    "gpt2 with dropout": network(**PLAIN, dropout=0.1),
    "neox": network(**{**PLAIN, "positions": "rotary"}, rotary_dim=8),
    "bert": network(**POST, token_types=2),
    "bert with dropout": network(**POST, dropout=0.1),
    "modernbert": network(norm="layer", causal=False, activation="gelu", first_norm=False, embedding_norm=True),
    "gemma2": network(norm="rms+1", norm_placement="sandwich", attention_softcap=50.0, num_kv_heads=2),
    "gemma3": network(norm="rms+1", norm_placement="sandwich", qk_norm=True, num_kv_heads=2),
    "sliding": network(sliding_window=100, sliding_layers=(True, False, True), rope_local_theta=500.0),
    "bart": pair(**{**PLAIN, "norm_placement": "post"}),
    "bart with dropout": pair(**{**PLAIN, "norm_placement": "post"}, dropout=0.1),
    "t5": pair(**T5),
    "t5 with dropout": pair(**T5, dropout=0.1),
}


def held(run: Callable[[], object], weights: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, weights left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in weights}
    kept: dict[int, int] = {}
    alive = []  # what is freed again during the forward pass must not lend its address to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())


def held_by(model: Transformer) -> int:
    """What the blocks and norms of a network keep for two rows."""

    def forward() -> Tensor:
        memory = None
        if model.encoder is not None:
            memory = model.encode(torch.zeros(ROWS, SOURCE, dtype=torch.long))
        return model.hidden(torch.zeros(ROWS, LENGTH, dtype=torch.long), memory=memory)

    return held(forward, list(model.parameters()))


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: (None, "switched off by the test"))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_activations_are_those_that_autograd_keeps(name: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused and native.library() is None:
        pytest.skip("no native kernels here")
    if not fused:
        without_kernels(monkeypatch)
    config = NETWORKS[name]
    source = SOURCE if config.encoder else 0
    expected = activation_bytes(config, ROWS, LENGTH, source, fused=fused)
    assert held_by(Transformer(config).train()) == pytest.approx(expected, rel=0.03)


@pytest.mark.skipif(native.library() is None, reason="no native kernels here")
def test_activations_of_what_is_trained_in_part_or_computed_again() -> None:
    config = NETWORKS["qwen3"]
    model = Transformer(config).train()
    checkpoint_blocks(model)
    again = activation_bytes(config, ROWS, LENGTH, recomputed=True)
    one = activation_bytes(config, ROWS, LENGTH) - activation_bytes(replace(config, num_layers=2), ROWS, LENGTH)
    assert held_by(model) == pytest.approx(again - one, rel=0.1)  # one block's come when it is computed again
    model = Transformer(config).train()
    train_only(model, last_layers=2)
    assert held_by(model) == pytest.approx(activation_bytes(config, ROWS, LENGTH, layers=2), rel=0.03)
    model = Transformer(config).train()
    add_adapter(model, "a", LoraConfig(rank=2))
    assert held_by(model) == pytest.approx(activation_bytes(config, ROWS, LENGTH), rel=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_recurrent_activations_are_those_that_autograd_keeps(cell: str, dropout: float) -> None:
    config = RecurrentConfig(cell, 300, 64, 64, 2, dropout=dropout, output_dropout=dropout)
    model = RecurrentModel(config).train()
    ids = torch.zeros(8, 40, dtype=torch.long)
    expected = activation_bytes_of_recurrent(config, 8, 40)
    assert held(lambda: model.hidden(ids), list(model.parameters())) == pytest.approx(expected, rel=0.06)
    # the loss keeps gradients of the hidden states and of the output layer, and no logits
    loss = 4 * (8 * 40 * 64 + 300 * 64 + 300)
    assert held(lambda: model.loss(ids, ids), list(model.parameters())) == pytest.approx(expected + loss, rel=0.06)


# The whole of a run ---------------------------------------------------------------------------------------------------

MEASURE = """
import json, tempfile, torch, numpy as np
from pathlib import Path
from hanmo.models.device import set_threads
from hanmo.models.transformer import Transformer
from hanmo.training.estimates import Work, memory_of
from hanmo.training.fit import FitSettings, Trainer
from hanmo.training.objectives import CausalLanguageModeling
from hanmo.training.optimizer import OptimizerSettings
from hanmo.training.plan import model_config
set_threads()
config = model_config("mini", 2048, 256)
model = Transformer(config)
model.initialize(0)
tokens = np.arange(40_000).astype(np.uint16) % 2048
goal = CausalLanguageModeling(tokens[:30_000], tokens[30_000:], context=256, batch_size=32, micro_batch=32, seed=0)
with tempfile.TemporaryDirectory() as folder:
    settings = FitSettings(OptimizerSettings(), max_steps=2, evaluations=1)
    Trainer(model, goal, settings, Path(folder), device=torch.device("cpu")).fit()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
told = memory_of(Work(config, 32, 256, muon=True, accumulated=False)).total
print(json.dumps([told, int(status["VmHWM"].split()[0]) * 1024]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the peak")
@pytest.mark.skipif(native.library() is None, reason="no native kernels here")
def test_a_real_run_takes_about_as_much_as_is_told() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    told, peak = json.loads(done.stdout.splitlines()[-1])
    assert told == pytest.approx(peak, rel=0.2), (told, peak)


MINI = model_config("mini", 2048, 256)


def test_the_memory_of_weights_is_that_of_the_network() -> None:
    model = Transformer(MINI)
    total = sum(p.numel() for p in model.parameters())
    full = memory_of(Work(MINI, 8, 256))
    assert full.trained_weights == 4 * total and full.moments == 8 * total and not full.frozen_weights
    assert full.gradients == 4 * (total + 2 * 2048 * MINI.hidden_size)  # the output embedding's comes in parts
    once = memory_of(Work(MINI, 8, 256, accumulated=False))
    assert full.gradients - once.gradients == 4 * total  # the others come while activations go
    muon = Optimizer(model, OptimizerSettings())
    held_moments = sum(t.numel() for t in muon.momentum.values()) + 2 * sum(t.numel() for t in muon.others.values())
    assert memory_of(Work(MINI, 8, 256, muon=True)).moments == 4 * held_moments
    count = add_adapter(model, "a", LoraConfig(rank=16))
    assert lora_parameters(MINI) == count
    lora = memory_of(Work(MINI, 8, 256, trained=count, adapters=count))
    assert (lora.trained_weights, lora.frozen_weights, lora.moments) == (4 * count, 4 * total, 8 * count)
    assert lora.activations == full.activations
    assert lora.total == sum(vars(lora).values())
    plain = replace(MINI, gated=False, qk_norm=False, model_type="gpt2")
    assert lora_parameters(plain, 4) == add_adapter(Transformer(plain), "a", LoraConfig(rank=4))


def test_what_shrinks_the_activations() -> None:
    work = Work(MINI, 8, 256)
    whole = memory_of(work)
    assert memory_of(replace(work, micro_batch=4)).activations == pytest.approx(whole.activations / 2, rel=1e-2)
    assert memory_of(replace(work, length=128)).activations == pytest.approx(whole.activations / 2, rel=1e-2)
    last = memory_of(replace(work, backward_layers=2))
    assert whole.activations / 4 < last.activations < whole.activations / 2
    assert memory_of(replace(work, checkpointed=True)).activations < whole.activations / 3
    assert memory_of(replace(work, average=True)).total - whole.total == whole.trained_weights
    assert whole.logits < 4 * 8 * 256 * MINI.vocab_size * 3  # never all at once
    wide = replace(MINI, vocab_size=150_000)
    chunk = 4 * 256 * 150_000
    assert memory_of(Work(wide, 64, 1024)).logits - chunk == 8 * (memory_of(Work(wide, 8, 1024)).logits - chunk)


def test_operations_of_a_step() -> None:
    full = step_flops_per_token(Work(MINI, 8, 256))
    assert math.isclose(full, training_flops_per_token(MINI, 256))
    lora = step_flops_per_token(Work(MINI, 8, 256, trained=1000, adapters=1000))
    assert 0.66 < lora / full < 0.68  # no gradients of weights
    half = step_flops_per_token(Work(MINI, 8, 256, backward_layers=MINI.num_layers // 2))
    assert math.isclose(half / full, 2 / 3)
    assert math.isclose(step_flops_per_token(Work(MINI, 8, 256, checkpointed=True)) / full, 4 / 3)


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANMO_LANG", "zh")


def changed(work: Work, flag: str) -> Work:
    """The work with what a flag (or several) says."""
    words = iter(flag.split())
    for word in words:
        if word == "--micro-batch":
            work = replace(work, micro_batch=int(next(words)), accumulated=True)
        elif word == "--context":
            work = replace(work, length=int(next(words)))
        elif word == "--activation-checkpointing":
            work = replace(work, checkpointed=True)
        elif word == "--size":
            work = replace(work, config=model_config(next(words), work.config.vocab_size, 512), accumulated=True)
        else:
            assert word == "--lora"
            count = lora_parameters(work.config)
            work = replace(work, trained=count, adapters=count)
    return work


@pytest.mark.parametrize("share", [0.95, 0.7, 0.4, 0.15])
@pytest.mark.parametrize("tuning", [True, False])
def test_what_to_change_exists_and_does_what_is_said(share: float, tuning: bool) -> None:
    """Every option that is named is one of the command's, and the memory that is told is that of the formula."""
    work = Work(model_config("medium", 8192, 512), 16, 512, accumulated=False)
    smaller = None if tuning else {f"--size {name}": model_config(name, 8192, 512) for name in ("mini", "nano")}
    options = {"--" + item.name.replace("_", "-") for item in fields(FinetuneSettings if tuning else PretrainSettings)}
    available = PROCESS_BYTES + round(share * (memory_of(work).total - PROCESS_BYTES))
    found = changes(work, available, smaller)
    assert changes(work, memory_of(work).total, smaller) == [] and any(change.fits for change in found)
    for change in found:
        assert {word for word in change.flag.split() if word.startswith("--")} <= options, change.flag
        if not change.flag.startswith("--base"):
            memory = memory_of(changed(work, change.flag)).total
            assert (change.memory, change.fits) == (memory, memory <= available), change.flag
    names = [change.flag.split()[0] for change in found]
    assert names[:2] == ["--micro-batch", "--activation-checkpointing"]
    assert ("--lora" in names) == tuning == (names[-1] == "--base")


def test_a_pair_of_answers_is_two_rows() -> None:
    work = Work(MINI, 8, 512, rows_each=2)
    assert memory_of(work).activations == memory_of(Work(MINI, 16, 512)).activations
    found = changes(work, memory_of(replace(work, micro_batch=4)).total)
    assert found[0].flag == "--micro-batch 4" and found[0].fits


def test_where_nothing_helps_alone_all_is_tried_together_and_smaller_models_are_named() -> None:
    work = Work(model_config("medium", 8192, 512), 16, 512)
    everything = "--micro-batch 1 --activation-checkpointing --lora"
    found = changes(work, memory_of(changed(work, everything)).total)
    (combined,) = [change for change in found if change.fits and "--base" not in change.flag]
    assert combined.flag == everything
    assert "--base (a base of at most" in found[-1].flag
    smaller = {f"--size {name}": model_config(name, 8192, 512) for name in ("mini", "micro", "nano")}
    found = changes(work, memory_of(changed(work, "--size micro")).total, smaller)
    assert found[-1].flag == "--size micro" and found[-1].fits
    assert all(not change.fits for change in changes(work, 0, smaller))


def full_estimate(available: int) -> Any:
    work = Work(MINI, 32, 512)
    speed = Machine(2e11, 0.0).speed(step_flops_per_token(work), MINI.hidden_size)
    return estimate(
        work, tokens=2e6, tokens_per_second=speed, available=available, power=Power(60.0, "assumed", measured=False)
    )


def test_estimates_in_english_and_as_data() -> None:
    done = full_estimate(10**11)
    text = done.describe()
    assert done.fits and "what to change" not in text
    for part in ("5.0 M trained, 0 frozen", "of 100.0 GB that are free", "activations", "tok/s", "at 60 W (assumed)"):
        assert part in text, text
    data = json.loads(json.dumps(Preflight(done).as_dict()))
    assert data["preview"] is None and data["fits"] is True and data["changes"] == []
    assert data["parameters"] == {"trained": num_parameters(MINI), "frozen": 0}
    assert data["memory"]["total"] == memory_of(Work(MINI, 32, 512)).total
    assert math.isclose(data["watt_hours"], 60 * data["seconds"] / 3600)
    assert math.isclose(data["seconds"] * data["tokens_per_second"], 2e6)
    done.require_memory()


def test_a_run_that_will_not_fit_is_refused_with_what_to_change(chinese: None) -> None:  # noqa: ARG001
    done = full_estimate(10**9)
    text = done.describe()
    assert "内存放不下" in text and "--micro-batch" in text and "结果不变" in text and "能耗" in text
    with pytest.raises(ResourceError) as caught:
        done.require_memory()
    assert "--micro-batch" in caught.value.fix and "--micro-batch" in caught.value.zh
    needed = memory_of(Work(MINI, 32, 512)).total
    full_estimate(int(needed * 0.95)).require_memory()  # the estimate may be as wrong as that
