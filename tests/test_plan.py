"""The dial: what a budget, a machine and a corpus give."""

from __future__ import annotations

import pytest
import torch

from hanmo.models.cost import num_parameters
from hanmo.models.device import available_memory
from hanmo.models.transformer import Transformer
from hanmo.settings import Resolution
from hanmo.training import plan as dial
from hanmo.training.estimates import memory_of
from hanmo.training.settings import SIZES, TrainingSettings

MACHINE = dial.Machine(200e9, dial.CPU_OVERHEAD)
CPU = torch.device("cpu")


def planned(
    settings: TrainingSettings, *, train_tokens: int = 10_000_000, held_out: int = 100_000, vocab_size: int = 1024
) -> dial.Plan:
    resolution = Resolution()
    dial.choose_size(settings, resolution, MACHINE)
    plan = dial.make_plan(
        settings,
        resolution,
        vocab_size=vocab_size,
        train_tokens=train_tokens,
        held_out_tokens=held_out,
        machine=MACHINE,
        device=CPU,
    )
    assert all(choice.reason for choice in resolution.choices)
    return plan


def test_every_size_is_a_network_and_they_grow() -> None:
    configs = [dial.model_config(size, 1024, 256) for size in SIZES]
    counts = [num_parameters(config) for config in configs]
    assert counts == sorted(counts) and len(set(counts)) == len(SIZES)
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(configs[-1]).parameters()) == counts[-1]


def test_a_larger_budget_never_chooses_a_smaller_model() -> None:
    sizes = []
    for budget in ("30s", "3min", "30min", "5h", "48h", "1000h"):
        settings = TrainingSettings(budget=budget)
        dial.choose_size(settings, Resolution(), MACHINE)
        assert settings.size is not None
        sizes.append(SIZES.index(settings.size))
    assert sizes == sorted(sizes) and sizes[0] == 0 and sizes[-1] > 3


def test_what_the_user_says_is_kept() -> None:
    settings = TrainingSettings(size="mini", context=64, batch_size=5, learning_rate=0.007, budget="1min")
    plan = planned(settings)
    assert (plan.config.hidden_size, plan.config.max_position_embeddings, plan.batch_size) == (256, 64, 5)
    assert plan.optimizer.matrix_rate == 0.007 and plan.seconds == 60


def test_steps_replace_the_budget() -> None:
    plan = planned(TrainingSettings(max_steps=7, size="nano"))
    assert plan.steps == 7 and plan.seconds is None
    assert plan.tokens == 7 * plan.batch_size * plan.config.max_position_embeddings


def test_a_short_corpus_shortens_context_and_horizon() -> None:
    plan = planned(TrainingSettings(size="nano", budget="1h"), train_tokens=20_000, held_out=100)
    assert plan.config.max_position_embeddings == 99
    assert plan.capped and plan.tokens == plan.max_tokens == 200_000 and plan.expected_seconds < 3600
    assert "end early: 10 passes over 20.0 k tokens" in plan.warning(20_000)


def test_a_tiny_corpus_gets_small_batches_and_enough_steps() -> None:
    plan = planned(TrainingSettings(size="nano", budget="1h"), train_tokens=1_000, held_out=40)
    assert plan.tokens / (plan.batch_size * plan.config.max_position_embeddings) > 100


def test_micro_batches_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dial.model_config("small", 4096, 256)
    settings = TrainingSettings(batch_size=64, context=256)

    def needed(micro: int) -> int:
        return memory_of(dial.work_of(settings, config, micro, CPU)).total

    monkeypatch.setattr(dial, "available_memory", lambda _: 2 * needed(4))
    micro, reason = dial.choose_micro_batch(settings, config, CPU)
    assert micro == 4 and "memory" in reason
    monkeypatch.setattr(dial, "available_memory", lambda _: 10**12)
    assert dial.choose_micro_batch(settings, config, CPU)[0] == 16  # 4,096 tokens: more are not faster
    monkeypatch.setattr(dial, "available_memory", lambda _: 0)
    assert dial.choose_micro_batch(settings, config, CPU)[0] == 1


def test_thirty_million_parameters_train_at_a_context_of_1024_in_less_than_three_gigabytes() -> None:
    settings = TrainingSettings(size="medium", context=1024, budget="1h")
    plan = planned(settings, train_tokens=10**9, held_out=10**6, vocab_size=8192)
    assert plan.parameters > 27e6 and plan.memory < 3e9
    assert plan.micro_batch * 1024 <= dial.MICRO_TOKENS["cpu"] < plan.batch_size * 1024


def test_chinese_gets_more_entries_and_so_do_larger_models() -> None:
    few, _ = dial.choose_vocabulary("nano", chinese_share=0.0)
    chinese, why = dial.choose_vocabulary("nano", chinese_share=0.9)
    assert 260 < few < chinese and "90%" in why
    assert few < dial.choose_vocabulary("medium", chinese_share=0.0)[0]


def test_the_machine_is_measured() -> None:
    rate = dial.measure_matrix_rate(torch.device("cpu"), windows=2, seconds=0.02)
    assert 1e8 < rate < 1e15
    assert 1e6 < available_memory(CPU) < 1e14
