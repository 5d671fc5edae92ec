"""``--search``: trials before a run, their pruning and their time, and what becomes of the winner."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hanmo.cli.main import main
from hanmo.cli.together import refuse_several
from hanmo.errors import Interrupted, ModelError, ResourceError, UsageError
from hanmo.models.checkpoints.save import save_folder
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.text.training import train_bpe
from hanmo.training import search as engine
from hanmo.training.fit import FitSettings
from hanmo.training.objectives import CausalLanguageModeling
from hanmo.training.objectives.base import Share
from hanmo.training.optimizer import OptimizerSettings
from hanmo.training.processes import Processes
from hanmo.training.schedule import Schedule
from hanmo.training.search import SearchRecord, search
from hanmo.training.search_record import COMPLETE, FAILED, FILE, PRUNED, UNFINISHED, Trial
from hanmo.training.search_space import Dimension, usual_dimensions
from hanmo.training.settings import LoopSettings

CPU = torch.device("cpu")
CONFIG = TransformerConfig(61, 16, 1, 2, 1, 8, 24, 32, qk_norm=True, model_type="qwen3")
RATES = Dimension("learning_rate", (1e-7, 1e-3, 4e-3, 0.01, 0.02, 0.04), 0.01)
STEPS = 16


def build(values: dict[str, Any], **changes: Any) -> tuple[Transformer, CausalLanguageModeling, FitSettings]:
    model = Transformer(CONFIG)
    model.initialize(1)
    noise = np.random.default_rng(7).integers(0, 61, 1500)
    tokens = np.where(noise < 45, (3 * np.arange(1500) + 7) % 61, noise).astype(np.uint16)
    batch = values.get("batch_size", 4)
    goal = CausalLanguageModeling(tokens[:1200], tokens[1200:], context=16, batch_size=batch, micro_batch=2, seed=0)
    rate = values.get("learning_rate", 0.01)
    optimizer = OptimizerSettings(embedding_rate=rate, vector_rate=rate, muon=False)
    return model, goal, FitSettings(optimizer, **{"max_steps": STEPS, **changes})


def tried(path: Path, *dimensions: Dimension, minutes: float = 0.03, **changes: Any) -> SearchRecord:
    return search(
        path,
        lambda _share: list(dimensions),
        lambda values: build(values, **changes),
        minutes=minutes,
        seed=0,
        device=CPU,
    )


def begun(path: Path, *dimensions: Dimension, share: float = 1.0) -> Path:
    """A search that has measured the pace, and settled how long its trials are."""
    SearchRecord(1.0, share, round(STEPS * share), 512, engine.PARTS, list(dimensions)).write(path)
    return path


# The engine ----------------------------------------------------------------------------------------------------------


def test_the_default_is_first_and_the_worse_half_is_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tried(begun(tmp_path / FILE, RATES), RATES, minutes=1)
    first, second, third = record.trials[:3]
    assert first.values == record.defaults == {"learning_rate": 0.01} and first.state == COMPLETE
    assert (second.values["learning_rate"], third.values["learning_rate"]) == (1e-3, 0.04)
    hopeless = [trial for trial in record.trials if trial.values["learning_rate"] < 1e-4]
    assert hopeless and all(trial.state == PRUNED and trial.steps < first.steps for trial in hopeless)
    assert record.winner is not None and record.winner.loss is not None and first.loss is not None
    assert record.winner.loss <= first.loss
    values = [trial.values["learning_rate"] for trial in record.trials]
    assert sorted(values) == sorted(RATES.values)  # each once, as there is time enough
    assert [path.name for path in tmp_path.iterdir()] == [FILE]  # trials leave nothing
    assert SearchRecord.read(tmp_path / FILE) == record and record.finished
    told = record.describe()
    assert f"{len(values)} trials" in told and f"{record.count(PRUNED)} pruned" in told
    assert f"{record.winner.loss:.4f}" in told
    assert capsys.readouterr().err.count("pruned") == record.count(PRUNED)


def test_a_trial_is_the_run_on_a_shorter_horizon(tmp_path: Path) -> None:
    """Its loss is that of a run with so many steps, and two searches with the same horizon agree."""
    records = []
    for number in range(2):
        path = begun(tmp_path / f"{number}.json", RATES, share=0.5)
        records.append(tried(path, RATES, minutes=1))
    for one, other in zip(records[0].trials, records[1].trials, strict=True):
        assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(other, seconds=0.0)
    assert records[0].trials[0].steps == STEPS // 2
    model, goal, settings = build({}, max_steps=STEPS // 2, schedule=Schedule(warmup_steps=1))
    run = engine.Trainer(model, goal, settings, tmp_path / "run", device=CPU)
    assert run.fit().validation_loss == pytest.approx(records[0].trials[0].loss, abs=1e-4)


@pytest.mark.parametrize("horizon", [{"max_steps": 4000}, {"max_steps": None, "budget_seconds": 60.0}])
def test_the_time_is_kept(horizon: dict[str, Any], tmp_path: Path) -> None:
    began = time.monotonic()
    record = tried(tmp_path / FILE, RATES, Dimension("batch_size", (2, 4, 8), 4), minutes=0.06, **horizon)
    took = time.monotonic() - began
    assert 0.5 * 3.6 < took < 2.5 * 3.6 and abs(record.seconds - took) < 2  # machines are busy at times
    assert record.share < 0.5 and record.trials[0].steps < 2000 and record.finished


def test_too_little_time_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too short for a search") as caught:
        tried(tmp_path / FILE, RATES, minutes=0.001, max_steps=100_000)
    assert "--search" in caught.value.fix and not (tmp_path / FILE).exists()


def test_a_trial_that_diverges_or_has_no_memory_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Dimension("learning_rate", (0.01, 0.011, 1e30), 0.01)
    original = CausalLanguageModeling.loss

    def loss(self: Any, model: Any, batch: Any) -> torch.Tensor:
        if self.batch_size == 8:
            raise torch.OutOfMemoryError("no memory is left")
        return original(self, model, batch)

    monkeypatch.setattr(CausalLanguageModeling, "loss", loss)
    batches = Dimension("batch_size", (4, 8), 4)
    record = tried(begun(tmp_path / FILE, rates, batches), rates, batches, minutes=1)
    states = {(trial.values["learning_rate"], trial.values["batch_size"]): trial for trial in record.trials}
    assert states[1e30, 4].state == FAILED and "the loss is nan" in states[1e30, 4].reason
    assert states[0.01, 8].state == FAILED and "memory ran out" in states[0.01, 8].reason
    assert record.winner is not None and record.winner.values["batch_size"] == 4
    assert f"{record.count(FAILED)} failed" in record.describe()
    json.loads((tmp_path / FILE).read_text(), parse_constant=pytest.fail)  # NaN would be no JSON
    monkeypatch.setattr(CausalLanguageModeling, "loss", lambda *_: torch.full((), float("nan"), requires_grad=True))
    with pytest.raises(ModelError):  # the pace is measured with the default: a run that cannot be is not searched
        tried(tmp_path / "other.json", rates)


def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tried(begun(tmp_path / "whole", RATES), RATES, minutes=1)
    begun(tmp_path / "parts", RATES)
    original = engine.TrialTrainer.step

    def step(self: Any, done: float) -> float:
        if self.number == 3:
            signal.raise_signal(signal.SIGINT)
        return original(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(engine.TrialTrainer, "step", step)
        with pytest.raises(Interrupted, match="stopped after 3 trials"):
            tried(tmp_path / "parts", RATES, minutes=1)
    kept = SearchRecord.read(tmp_path / "parts")
    assert kept is not None and len(kept.trials) == 3 and not kept.finished and kept.seconds > 0
    parts = tried(tmp_path / "parts", RATES, minutes=1)
    assert parts.trials[:3] == kept.trials and parts.finished and parts.seconds > kept.seconds
    ends = [[(trial.values, trial.state, trial.loss) for trial in record.trials] for record in (whole, parts)]
    assert ends[0] == ends[1] and len(ends[0]) == len(RATES.values)  # in the same order, with the same fate


def test_a_trial_that_the_time_ends_is_no_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "OVERTIME", -1.0)  # the time is over before it begins
    record = tried(begun(tmp_path / FILE, RATES), RATES)
    assert record.trials[0].state == UNFINISHED and record.winner is None and record.chosen == record.defaults
    assert "the defaults are kept" in record.describe()


def trial(number: int, loss: float | None, state: str = COMPLETE) -> Trial:
    return Trial(number, {"learning_rate": RATES.values[number]}, state, loss)


@pytest.mark.parametrize(
    ("losses", "winner", "told"),
    [
        ([2.0, 1.9, 1.95], 1, "loss 1.9000 with learning_rate = 0.001; the defaults: 2.0000"),
        ([2.0, 2.1], 0, "the defaults won with a loss of 2.0000"),
        ([2.0, 1.995], 0, "the defaults won"),  # another seed would change as much
        ([None, 1.9], 1, "the defaults: none (failed)"),
    ],
)
def test_the_default_stays_unless_another_is_clearly_better(losses: list[float | None], winner: int, told: str) -> None:
    dimension = dataclasses.replace(RATES, default=RATES.values[0])
    trials = [trial(number, loss, COMPLETE if loss else FAILED) for number, loss in enumerate(losses)]
    trials.append(trial(4, 0.1, PRUNED))  # the loss of a trial that was not completed counts for nothing
    record = SearchRecord(1.0, 0.1, 20, 512, engine.PARTS, [dimension], trials=trials)
    assert record.winner is trials[winner] and told in record.describe()


def test_a_damaged_record_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"minutes": 1, "trials": [{"wrong": 1}], "dimensions": []}')
    with pytest.raises(ModelError, match="the record of the search is damaged"):
        SearchRecord.read(tmp_path / FILE)


# What is varied ------------------------------------------------------------------------------------------------------


def settled(**values: Any) -> LoopSettings:
    return LoopSettings(**{"learning_rate": 0.02, "batch_size": 8, "weight_decay": 0.05, "epochs": 2.0, **values})


EVERYTHING = dict.fromkeys(("learning_rate", "batch_size", "weight_decay", "epochs", "rank"), "computed")


@pytest.mark.parametrize(
    ("computed", "share", "names"),
    [
        (EVERYTHING, 0.1, ["learning_rate", "batch_size", "weight_decay"]),
        (EVERYTHING, 1.0, ["learning_rate", "batch_size", "weight_decay", "epochs"]),  # passes: only of whole trials
        ({"weight_decay": "computed"}, 1.0, ["weight_decay"]),
        ({}, 1.0, []),
    ],
)
def test_only_what_the_user_left_open_is_varied(computed: dict[str, str], share: float, names: list[str]) -> None:
    found = usual_dimensions(settled(), computed, share, most_examples=100)
    assert [dimension.name for dimension in found] == names
    assert all(dimension.default in dimension.values for dimension in found)


def test_the_ranges_are_near_the_scaling_rule() -> None:
    short = {item.name: item for item in usual_dimensions(settled(), EVERYTHING, 0.05, most_examples=10)}
    whole = {item.name: item for item in usual_dimensions(settled(), EVERYTHING, 1.0, most_examples=10)}
    assert min(short["learning_rate"].values) == 0.005 and max(short["learning_rate"].values) == 0.04
    assert max(whole["learning_rate"].values) == 0.08  # no short horizon that flatters high rates
    assert short["batch_size"].values == (4, 8)  # sixteen examples there are not
    assert whole["epochs"].values == (1.0, 2.0, 4.0) and whole["epochs"].lengthens
    steps = usual_dimensions(settled(max_steps=100), EVERYTHING, 1.0, most_examples=10)
    assert "batch_size" not in [item.name for item in steps]  # more examples in as many steps would be a longer run


# Through the command line --------------------------------------------------------------------------------------------

SHAPE = ["--size", "nano", "--context", "16", "--vocab-size", "270", "--max-steps", "6", "--batch-size", "8"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    generator = random.Random(3)
    words = ["river", "stone", "lamp", "quiet", "walks", "under", "the", "bridge", "and", "sings", "春天", "来了"]
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("\n\n".join(" ".join(generator.choices(words, k=40)) + "." for _ in range(60)), encoding="utf-8")
    return str(path)


def succeed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    code = main([*arguments, "--json"])
    out = capsys.readouterr()
    assert code == 0, out.err
    return json.loads(out.out), out.err


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def no_search(*_arguments: Any, **_options: Any) -> Any:
    raise AssertionError("searched again")


def test_pretraining_gets_the_winner_and_shows_all_trials(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "WHOLE_TRIALS", (1,))  # trials are whole runs, however busy the machine is
    monkeypatch.setattr(engine, "time_for_another", lambda record, _seconds: len(record.trials) < 4)
    run = tmp_path / "run"
    command = ["pretrain", text, *SHAPE, "--weight-decay", "0.1", "--checkpoint-every", "4", "--out", str(run)]
    done, told = succeed(capsys, *command, "--search", "1")
    record = SearchRecord.read(run / FILE)
    assert record is not None and record.finished and record.winner is not None
    assert [item.name for item in record.dimensions] == ["learning_rate"]  # neither what was given nor the batch
    stored = read(run / "settings.json")
    rate = record.winner.values["learning_rate"]
    assert stored["settings"]["learning_rate"] == rate and stored["settings"]["weight_decay"] == 0.1
    assert stored["computed"]["learning_rate"].startswith("search:") and "weight_decay" not in stored["computed"]
    assert record.describe() in told and record.share == 1.0
    assert done["validation_loss"] <= record.winner.loss + 1e-5  # trials were whole: the run does as well
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Search over settings" in page and page.count("<circle") >= len(record.trials)
    assert "the longer a training, the lower its best learning rate" in page
    assert page.count("<tr class=best>") == 2  # the best evaluation, and the winner

    plain = ["pretrain", text, *SHAPE, "--weight-decay", "0.1", "--learning-rate", str(rate)]
    succeed(capsys, *plain, "--out", str(tmp_path / "plain"))
    found, given = load_file(run / "model/model.safetensors"), load_file(tmp_path / "plain/model/model.safetensors")
    assert all(torch.equal(found[name], given[name]) for name in given)  # trials left no trace in the run

    for newest in sorted((run / "checkpoints").iterdir())[1:]:  # as if it had been killed after the first checkpoint
        shutil.rmtree(newest)
    monkeypatch.setattr(engine, "run_trial", no_search)
    again, _ = succeed(capsys, *command, "--search", "1", "--resume")
    assert again["validation_loss"] == done["validation_loss"]
    assert "Search over settings" in (run / "report.html").read_text(encoding="utf-8")
    shorter, _ = succeed(capsys, *command, "--resume")  # the search is over: its flag is no longer needed
    assert shorter["validation_loss"] == done["validation_loss"]


def test_an_interrupted_search_is_resumed_by_the_same_command(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "WHOLE_TRIALS", (1,))
    monkeypatch.setattr(engine, "time_for_another", lambda record, _seconds: len(record.trials) < 4)
    run = tmp_path / "run"
    command = ["pretrain", text, *SHAPE, "--search", "1", "--out", str(run)]
    original: Callable[..., None] = engine.run_trial

    def stopped(result: Trial, *arguments: Any) -> None:
        if result.number == 2:
            raise Interrupted("Ctrl-C")
        original(result, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "run_trial", stopped)
        assert main(command) == 130
    assert "the search was stopped after 2 trials" in capsys.readouterr().err
    kept = SearchRecord.read(run / FILE)
    assert kept is not None and len(kept.trials) == 2 and not (run / "checkpoints").exists()
    succeed(capsys, *command, "--resume")
    record = SearchRecord.read(run / FILE)
    assert record is not None and record.finished and record.trials[:2] == kept.trials and len(record.trials) == 4
    capsys.readouterr()
    assert main([*command[:-2], "--out", str(run), "--overwrite", "--search", "0.0001", "--max-steps", "999"]) == 2
    assert "too short for a search" in capsys.readouterr().err  # a new run has a search of its own


def test_a_training_that_has_begun_is_not_searched(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["pretrain", text, *SHAPE, "--out", str(tmp_path / "run")]
    succeed(capsys, *command)
    monkeypatch.setattr(engine, "run_trial", no_search)
    _, told = succeed(capsys, *command, "--search", "1", "--resume")
    assert "this training has begun without a search" in told


def test_adapters_are_searched_with_their_rank_and_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_bpe(["the river walks under the bridge 0 1 2 3 4 5 6 7 8 9"] * 9, 290)
    model = Transformer(TransformerConfig(tokenizer.vocab_size, 32, 1, 2, 1, 16, 48, 64, model_type="llama"))
    model.initialize(1)
    save_folder(tmp_path / "base", model, tokenizer, provenance={"kind": "model", "prompt_prefix": []})
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    pairs = [{"prompt": f"the river {n}", "response": "walks under the bridge"} for n in range(24)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = ["finetune", str(data), "--base", str(tmp_path / "base"), "--lora", "--batch-size", "8"]
    command += ["--checkpoint-every", "4", "--unpacked", "--out", str(run), "--search", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "WHOLE_TRIALS", (1,))

        def first_values(dimensions: list[Dimension]) -> list[dict[str, Any]]:  # the second has the lowest rank
            defaults = {item.name: item.default for item in dimensions}
            return [defaults, {**defaults, "rank": 8}]

        patch.setattr(engine, "first_values", first_values)
        patch.setattr(engine, "time_for_another", lambda record, _seconds: len(record.trials) < 2)
        patch.setattr(SearchRecord, "winner", property(lambda self: self.trials[-1]))
        done, _ = succeed(capsys, *command)
        stored = read(run / "settings.json")
        page = (run / "report.html").read_text(encoding="utf-8")
    record = SearchRecord.read(run / FILE)
    assert record is not None and record.share == 1.0
    assert [item.name for item in record.dimensions] == ["learning_rate", "weight_decay", "rank", "epochs"]
    assert stored["settings"]["rank"] == 8 and stored["settings"]["batch_size"] == 8
    assert {name for name, why in stored["computed"].items() if why.startswith("search:")} == set(record.defaults)
    assert read(run / "adapter/adapter_config.json")["r"] == 8 and "Search over settings" in page

    given = [*command[: command.index("--out")], "--rank", "8", "--out", str(tmp_path / "plain")]
    plain, _ = succeed(capsys, *given)
    assert plain["validation_loss"] == done["validation_loss"]
    one, other = (load_file(Path(item["model"]) / "model.safetensors") for item in (done, plain))
    assert all(torch.equal(one[name], other[name]) for name in one)

    for newest in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(newest)
    monkeypatch.setattr(SearchRecord, "winner", property(lambda self: self.trials[-1]))
    monkeypatch.setattr(engine, "run_trial", no_search)
    again, _ = succeed(capsys, *command, "--resume")  # with the winner's rank, from the checkpoint
    assert again["validation_loss"] == done["validation_loss"]


# What cannot be ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search", "0"], "--search must be above 0"),
        (["--search", "soon"], "--search expects a number"),
        (["--search", "1", "--architecture", "ngram"], "--search means nothing for --architecture ngram"),
        (["--search", "1", *SHAPE, "--learning-rate", "0.01", "--weight-decay", "0"], "--search has nothing to vary"),
    ],
)
def test_what_cannot_work_is_refused(
    arguments: list[str], message: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", text, "--out", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_told_before_any_work(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["pretrain", text, "--out", str(tmp_path / "run"), "--search", "1"]) == ResourceError.exit_code
    assert "pip install 'hanmo[search]'" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_several_processes_are_refused() -> None:
    class Two(Processes):
        share = Share(0, 2)

    with pytest.raises(UsageError, match="--search is for one process") as caught:
        refuse_several(settled(search=1.0), Two())
    assert "--resume" in caught.value.fix
    refuse_several(settled(search=1.0), Processes())
    refuse_several(settled(), Two())
