"""Packing: every example once, no row too full, little waste, the same for the same seed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanmo.text.chat import CHATML_TEMPLATE
from hanmo.text.chat_targets import ChatTargets
from hanmo.text.training import train_bpe
from hanmo.training.packing import best_fit, pack


@given(st.lists(st.integers(1, 40)), st.integers(40, 60), st.integers(0, 3))
def test_every_example_lies_in_one_row_that_holds_it(lengths: list[int], capacity: int, seed: int) -> None:
    packing = pack(lengths, capacity, seed)
    assert sorted(index for row in packing.rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= capacity for row in packing.rows)
    assert packing.rows == pack(lengths, capacity, seed).rows
    assert 0 <= packing.waste < 1 and packing.tokens == sum(lengths)
    if len(packing.rows) > 1:  # no two rows could be one
        sizes = sorted(sum(lengths[index] for index in row) for row in packing.rows)
        assert sizes[0] + sizes[1] > capacity


def brute_force(lengths: list[int], capacity: int) -> list[int]:
    """Rooms left by best-fit decreasing, as its definition says."""
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@given(st.lists(st.integers(1, 30), max_size=60))
def test_rows_are_those_of_the_definition(lengths: list[int]) -> None:
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    rows = best_fit(order, lengths, 30)
    assert sorted(30 - sum(lengths[i] for i in row) for row in rows) == brute_force(lengths, 30)
    assert len(pack(lengths, 30).rows) <= len(rows)


def test_a_few_long_examples_a_row_are_combined_better_than_by_best_fit() -> None:
    lengths = np.random.default_rng(0).normal(450, 120, 3000).astype(int).clip(200, 1100).tolist()
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    plain = len(best_fit(order, lengths, 2048))
    assert 1 - sum(lengths) / plain / 2048 > 0.02
    assert pack(lengths, 2048).waste < 0.005


@pytest.mark.parametrize(("context", "center", "spread"), [(512, 5.0, 0.6), (1024, 5.5, 0.9), (2048, 6.0, 1.0)])
def test_waste_on_log_normal_lengths(context: int, center: float, spread: float) -> None:
    lengths = np.random.default_rng(1).lognormal(center, spread, 5000).astype(int).clip(1, context)
    assert pack(lengths.tolist(), context).waste < 0.02


def test_the_seed_decides_who_meets() -> None:
    lengths = [5] * 30 + [3] * 30
    assert pack(lengths, 16, 1).rows != pack(lengths, 16, 2).rows
    assert len(pack(lengths, 16, 1).rows) == len(pack(lengths, 16, 2).rows)


def test_many_examples_take_seconds() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 0.9, 100_000).astype(int).clip(1, 2048).tolist()
    begin = time.perf_counter()
    pack(lengths, 2048)
    assert time.perf_counter() - begin < 3


def test_lengths_that_no_row_holds_and_none_at_all() -> None:
    assert pack([], 8).rows == [] and pack([], 8).waste == 0
    for lengths in ([9], [0, 3]):
        with pytest.raises(ValueError, match="do not fit rows of 8"):
            pack(lengths, 8)


def test_the_report_is_in_both_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    packing = pack([3, 5, 2, 5], 8)
    assert packing.describe() == "packing: 4 examples (15 tokens) in 2 rows of 8 tokens; 6.2% of the places stay empty"
    monkeypatch.setenv("HANMO_LANG", "zh")
    assert "装入 2 行" in packing.describe() and "空置 6.2%" in packing.describe()


@pytest.mark.parametrize("name", ["rasbt-instruct", "kdconv"])
def test_waste_on_real_instructions_and_dialogues(name: str, shared_data: Path) -> None:
    chats = []
    if name == "rasbt-instruct":
        for record in json.loads((shared_data / name / "instruction-data.json").read_text())[:600]:
            asked = f"{record['instruction']}\n{record['input']}".strip()
            chats.append([{"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}])
    else:
        for record in json.loads((shared_data / name / "film.dev.json").read_text()):
            roles = ("user", "assistant")
            said = [message["message"] for message in record["messages"]]
            chats.append([{"role": roles[i % 2], "content": text} for i, text in enumerate(said)])
    texts = [message["content"] for chat in chats for message in chat]
    targets = ChatTargets(train_bpe(texts, 2000, chat_template=CHATML_TEMPLATE))
    rows = [row for chat in chats for row in targets.rows(chat)]
    assert len(rows) == len(chats)
    assert pack([len(row.ids) - 1 for row in rows], 4096).waste < 0.02
