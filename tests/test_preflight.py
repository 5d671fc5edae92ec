"""The pre-flight: what is learned is shown, a run that cannot teach the stop token is refused, estimates are right."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hanmo.data.tasks.types import Dialogue
from hanmo.errors import DataError, HanmoError, ModelError
from hanmo.text.chat import CHATML_TEMPLATE
from hanmo.text.chat_targets import ChatTargets
from hanmo.text.report import SAMPLES
from hanmo.text.training import train_bpe
from hanmo.training import energy
from hanmo.training.energy import EnergyMeter, Power, power_of
from hanmo.training.estimates import (
    Work,
    estimate,
)
from hanmo.training.objectives import CausalLanguageModeling
from hanmo.training.objectives.base import IGNORED, Batch, Objective
from hanmo.training.objectives.instructions import InstructionTuning, prepare_rows
from hanmo.training.objectives.preferences import PreferenceLoss, PreferenceTuning
from hanmo.training.plan import model_config
from hanmo.training.preflight import (
    LearnedText,
    Preflight,
    check_separator,
    check_stop_token,
    first_texts,
    preview,
    printable,
    runs_of,
    successors,
    texts_of,
    wants_colour,
)

from .test_instructions import CHATS, dialogues, small_tokenizer
from .test_preferences import rows_of

CPU = torch.device("cpu")
TOKENIZER = train_bpe([text * 5 for text in SAMPLES.values()], 600, chat_template=CHATML_TEMPLATE)
STOP = TOKENIZER.special_tokens["<|im_end|>"]


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANMO_LANG", "zh")


def instructions(records: list[Dialogue], context: int = 200, **options: Any) -> InstructionTuning:
    rows = prepare_rows(records, ChatTargets(TOKENIZER), context=context, **options)
    return InstructionTuning(rows, rows, context=context, batch_size=4, micro_batch=2, seed=0)


def chats() -> list[Dialogue]:
    return [Dialogue(tuple(chat), file="chats.jsonl", line=n) for n, chat in enumerate(CHATS.values(), 1)]


# The preview ---------------------------------------------------------------------------------------------------------


def test_the_preview_brackets_what_is_learned() -> None:
    seen = preview(instructions(chats()[:1]), TOKENIZER, {STOP})
    text = seen.describe()
    assert "\x1b" not in text
    assert text == (
        f"a text as the model will see it ({seen.learned} of {seen.tokens} tokens are learned; what is learned stands "
        "in ⟦ ⟧):\n"
        "  | <|im_start|>user\n"
        "  | What is 2 < 3?<|im_end|>\n"
        "  | <|im_start|>assistant\n"
        "  | ⟦True. Numbers grow.⟧⟦<|im_end|>⟧\n"
        "  | <|im_start|>user\n"
        "  | And 3 < 2?\n"
        "  | <|im_end|>\n"
        "  | <|im_start|>assistant\n"
        "  | ⟦False,\n"
        "  | \n"
        "  | of course⟧⟦<|im_end|>⟧\n"
        "the stop token is learned: <|im_end|> (2x) in the first 1 texts"
    )
    data = json.loads(json.dumps(seen.as_dict()))
    assert data["where"] == "chats.jsonl:1" and data["stop_tokens"] == {"<|im_end|>": 2}
    assert [run["text"] for run in data["runs"] if run["learned"] and not run["stop"]] == [
        "True. Numbers grow.",
        "False,\n\nof course",
    ]
    assert sum(run["tokens"] for run in data["runs"] if run["learned"]) == data["learned"] == seen.learned


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch, chinese: None) -> None:  # noqa: ARG001
    seen = preview(instructions(chats()[1:]), TOKENIZER, {STOP})
    coloured = seen.describe(colour=True)
    assert "\x1b[32m举头望明月，低头思故乡。🌕\x1b[0m\x1b[1;7;32m<|im_end|>\x1b[0m" in coloured
    assert "\x1b[2m<|im_start|>system\x1b[0m" in coloured and "⟦" not in coloured
    assert all(line.count("\x1b[0m") == line.count("\x1b[") / 2 for line in coloured.split("\n"))
    plain = seen.describe()
    assert "⟦举头望明月，低头思故乡。🌕⟧⟦<|im_end|>⟧" in plain and "停止符号参与训练" in plain and "\x1b" not in plain

    class Stream:
        def __init__(self, terminal: bool) -> None:
            self.terminal = terminal

        def isatty(self) -> bool:
            return self.terminal

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    terminal, file = (Stream(value) for value in (True, False))
    assert wants_colour(terminal) and not wants_colour(file)  # type: ignore[arg-type]
    monkeypatch.setenv("NO_COLOR", "")
    assert wants_colour(terminal)  # type: ignore[arg-type]
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(terminal)  # type: ignore[arg-type]
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colour(terminal)  # type: ignore[arg-type]


def test_a_text_cannot_steer_the_terminal_nor_flood_it() -> None:
    assert printable("a\x1b[31m\u202eb\r\n\t月") == "a\\u001b[31m\\u202eb\\u000d\n\t月"
    long = printable("x" * 5000)
    assert len(long) < 700 and "[... 4,400 characters ...]" in long
    wild = [{"role": "user", "content": "\x1b]0;owned\x07"}, {"role": "assistant", "content": "ok " * 900}]
    text = preview(instructions([Dialogue(tuple(wild))], context=3000), TOKENIZER, {STOP}).describe()
    assert "\x1b" not in text and len(text) < 1200
    many = [{"role": ("user", "assistant")[turn % 2], "content": "a"} for turn in range(60)]
    text = preview(instructions([Dialogue(tuple(many))], context=3000), TOKENIZER, {STOP}).describe()
    assert "more parts" in text


def test_texts_come_out_of_batches_as_they_went_in() -> None:
    """Packed with others, padded or alone, each text and what is learned of it are those of its record."""
    targets = ChatTargets(TOKENIZER)
    expected = sorted(
        (tuple(row.ids), tuple(row.trained)) for record in dialogues(9) for row in targets.rows(record.messages)
    )
    for packed in (True, False):
        rows = prepare_rows(dialogues(9), targets, context=300)
        goal = InstructionTuning(rows, rows, context=300, batch_size=99, micro_batch=3, seed=0, packed=packed)
        found = sorted((text.ids, text.learned) for text in first_texts(goal))
        assert found == expected
    padded = successors([5, 6, 7, 0, 0], [IGNORED, 7, 8, IGNORED, IGNORED])
    assert (padded.ids, padded.learned) == ((5, 6, 7, 8), (False, False, True, True))
    going_on = successors([5, 6, 7, 0], [IGNORED, 7, IGNORED, IGNORED])
    assert (going_on.ids, going_on.learned) == ((5, 6, 7, 0), (False, False, True, False))
    nothing = successors([5, 6], [IGNORED, IGNORED])
    assert (nothing.ids, nothing.learned) == ((5, 6), (False, False))


def test_the_most_telling_text_is_one_with_its_end() -> None:
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 100}]
    goal = instructions([Dialogue(tuple(long)), *chats()], context=70, truncate=True)
    seen = preview(goal, TOKENIZER, {STOP})
    assert any(run.stop for run in seen.runs) and not seen.runs[-1].stop  # a text with one end, cut before the next
    assert seen.stops == {"<|im_end|>": 1}
    seen = preview(instructions([Dialogue(tuple(long)), *chats()], context=150, truncate=True), TOKENIZER, {STOP})
    assert seen.runs[-1].stop


def test_both_sides_of_a_preference_are_looked_at() -> None:
    rows, tokenizer = rows_of(4, 1), small_tokenizer()
    goal = PreferenceTuning(rows, rows, PreferenceLoss("orpo"), batch_size=4, micro_batch=2, seed=0)
    stop = tokenizer.special_tokens["<|im_end|>"]
    seen = preview(goal, tokenizer, {stop})
    assert seen.texts == 8 and seen.stops == {"<|im_end|>": 8}
    assert seen.describe().count("⟦") == 3  # in the header, around the answer, around the stop token


def corpus(separated: bool) -> CausalLanguageModeling:
    ids = [id for text in SAMPLES.values() for id in [*TOKENIZER.encode(text), *([0] if separated else [])]] * 3
    tokens = np.array(ids, dtype=np.uint16)
    return CausalLanguageModeling(
        tokens, tokens, context=64, batch_size=4, micro_batch=4, seed=0, separator=0 if separated else None
    )


def test_a_corpus_must_have_ends_of_documents() -> None:
    goal = corpus(separated=True)
    assert goal.train is not None
    count = check_separator(goal.train, 0, TOKENIZER)
    assert count == 3 * len(SAMPLES)
    assert check_separator(corpus(separated=False).train, None, TOKENIZER) == 0
    with pytest.raises(DataError, match=r"no text comes to its stop token <\|endoftext\|>"):
        check_separator(corpus(separated=False).train, 0, TOKENIZER)
    seen = preview(goal, TOKENIZER, {0}, must_stop=False)
    assert seen.learned >= seen.tokens - 1 and seen.texts > 4
    assert "<|endoftext|>" in seen.stops


def test_a_separator_is_found_beyond_the_first_part_of_a_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanmo.training.preflight.SCAN", 7)
    tokens = np.ones(50, dtype=np.uint16)
    tokens[[0, 48]] = 0
    assert check_separator(tokens, 0, TOKENIZER) == 2


# Refusals ------------------------------------------------------------------------------------------------------------


class Fixed(Objective[Any, Batch]):
    """Always the same batch."""

    micro_batch = 1

    def __init__(self, ids: list[int], targets: list[int]) -> None:
        self.batch = Batch(torch.tensor([ids]), torch.tensor([targets]), 1)

    def micro_batches(self, *args: Any) -> Any:  # noqa: ARG002
        return iter([self.batch])

    validation_batches = micro_batches

    def step_weight(self, step: int) -> float:  # noqa: ARG002
        return 1

    def loss(self, model: Any, batch: Batch) -> Any: ...

    def origin(self, step: int) -> str:  # noqa: ARG002
        return "data.jsonl:7"


@pytest.mark.parametrize(
    ("ids", "targets", "stop_ids", "kind", "message", "zh"),
    [
        ([9, 8, 7, STOP], [IGNORED, 7, IGNORED, IGNORED], {STOP}, ModelError, "is not learned", "没有参与训练"),
        ([9, 8, 7], [IGNORED, 7, 6], {STOP}, DataError, "no text comes to its stop token", "没有一条文本以停止符号"),
        ([9, 8, STOP], [IGNORED, IGNORED, IGNORED], {STOP}, DataError, "no token to learn", "没有任何可学习的词元"),
        ([9, 8, 7], [IGNORED, 7, STOP], set(), ModelError, "nothing says which token", "没有说明用哪个符号"),
    ],
)
def test_runs_that_cannot_teach_the_end_are_refused(
    ids: list[int], targets: list[int], stop_ids: set[int], kind: type[HanmoError], message: str, zh: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        preview(Fixed(ids, targets), TOKENIZER, stop_ids)
    assert caught.value.where == "data.jsonl:7" and caught.value.fix and zh in caught.value.zh


def test_padding_that_is_the_stop_token_is_named_as_the_reason() -> None:
    """TRL's issue 3083 and its kin: padding is never learned, and with it the end of every answer."""
    text = LearnedText((9, 8, STOP), (False, True, False))
    same = train_bpe(list(SAMPLES.values()), 400)
    same.pad_id = same.eos_id = STOP
    with pytest.raises(ModelError) as caught:
        check_stop_token([text], same, {STOP})
    assert "padding token too" in caught.value.why and "another pad_token" in caught.value.fix
    assert "pad_token" in caught.value.zh
    with pytest.raises(ModelError) as caught:
        check_stop_token([text], TOKENIZER, {STOP})
    assert "padding" not in caught.value.why


def test_our_own_rows_learn_the_stop_token_even_where_it_is_the_padding() -> None:
    tokenizer = small_tokenizer()
    stop = tokenizer.special_tokens["<|im_end|>"]
    tokenizer.pad_id = tokenizer.eos_id = stop
    rows = prepare_rows(dialogues(6), ChatTargets(tokenizer), context=200)
    goal = InstructionTuning(rows, rows, context=200, batch_size=9, micro_batch=9, seed=0, packed=False)
    stops = check_stop_token(first_texts(goal), tokenizer, {stop})
    turns = sum(len(record.messages) // 2 for record in dialogues(6))
    assert stops == {stop: turns}


def test_texts_that_are_all_cut_off_are_refused() -> None:
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 100}]
    goal = instructions([Dialogue(tuple(long), file="d", line=n) for n in range(4)], context=40, truncate=True)
    with pytest.raises(DataError, match="no text comes to its stop token") as caught:
        preview(goal, TOKENIZER, {STOP})
    assert "--context" in caught.value.fix


def test_sequence_to_sequence_ends_are_looked_at() -> None:
    """Decoder inputs are the answer shifted by one; padding after an answer is neither shown nor learned."""
    batch = Batch(torch.tensor([[1, 7, 8], [1, 9, 0]]), torch.tensor([[7, 8, STOP], [9, STOP, IGNORED]]), 5)
    first, second = texts_of(batch)
    assert (first.ids, first.learned) == ((1, 7, 8, STOP), (False, True, True, True))
    assert (second.ids, second.learned) == ((1, 9, STOP), (False, True, True))
    assert check_stop_token([first, second], TOKENIZER, {STOP}) == {STOP: 2}
    assert [run.stop for run in runs_of(second, TOKENIZER, {STOP})] == [False, False, True]


# Everything -----------------------------------------------------------------------------------------------------------


def test_the_whole_preflight_in_one_text() -> None:
    work = Work(model_config("mini", 2048, 256), 32, 512)
    expected = estimate(work, tokens=2e6, tokens_per_second=1e4, available=10**11, power=Power(60.0, "assumed"))
    whole = Preflight(expected, preview(instructions(chats()), TOKENIZER, {STOP}))
    text = whole.describe()
    assert text.index("a text as the model will see it") < text.index("expected, before the start:")
    assert whole.as_dict()["preview"]["stop_tokens"] == {"<|im_end|>": 4}


# Energy --------------------------------------------------------------------------------------------------------------


def zone(root: Path, folder_name: str, **values: object) -> Path:
    folder = root / folder_name
    folder.mkdir(parents=True)
    for key, value in values.items():
        (folder / key).write_text(f"{value}\n")
    return folder


def test_the_meter_adds_up_the_packages_and_knows_that_counters_begin_anew(tmp_path: Path) -> None:
    one = zone(tmp_path, "intel-rapl:0", name="package-0", energy_uj=1_000, max_energy_range_uj=10_000_000)
    two = zone(tmp_path, "intel-rapl:1", name="package-1", energy_uj=9_500_000, max_energy_range_uj=10_000_000)
    zone(tmp_path, "intel-rapl:0:0", name="core", energy_uj=1, max_energy_range_uj=10)
    zone(tmp_path, "intel-rapl:2", name="psys", energy_uj=5, max_energy_range_uj=10)
    with EnergyMeter(tmp_path) as meter:
        (one / "energy_uj").write_text("2001000\n")
        (two / "energy_uj").write_text("500000\n")
        time.sleep(0.01)
    assert meter.joules == 3.0 and meter.seconds >= 0.01
    assert meter.watts is not None and math.isclose(meter.watts, 3.0 / meter.seconds)


@pytest.mark.parametrize("content", [None, "secret"])
def test_counters_that_cannot_be_read_give_nothing(tmp_path: Path, content: str | None) -> None:
    folder = zone(tmp_path, "intel-rapl:0", name="package-0", **({} if content is None else {"energy_uj": content}))
    assert folder.is_dir()
    with EnergyMeter(tmp_path) as meter:
        pass
    assert meter.joules is None and meter.watts is None
    with EnergyMeter(tmp_path / "nowhere") as meter:
        pass
    assert meter.watts is None


def test_the_power_says_where_it_is_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assumed = power_of(CPU, threads=3, root=tmp_path)
    assert assumed == Power(30.0, "assumed: 10 W for each of 3 threads")
    zone(tmp_path, "intel-rapl:0", name="package-0", constraint_0_power_limit_uw=28_000_000)
    assert power_of(CPU, root=tmp_path) == Power(28.0, "the processor's own limit")
    measured = power_of(CPU, 41.5, root=tmp_path)
    assert measured.measured and measured.watt_hours(7200) == 83.0
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\n[ "$3" = "--id=1" ] && echo 700.00\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    assert power_of(torch.device("cuda:1")) == Power(700.0, "the GPU's own limit")
    assert power_of(torch.device("cuda:0")) == Power(energy.WATTS_OF_GPU, "assumed for a GPU")
    monkeypatch.setenv("PATH", "")
    assert power_of(torch.device("cuda:1")).watts == energy.WATTS_OF_GPU
    assert power_of(torch.device("mps")).watts == energy.WATTS_OF_LAPTOP
