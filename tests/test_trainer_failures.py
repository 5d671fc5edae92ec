"""What the trainer does when memory runs out, losses are no numbers, nothing gets better, or it is interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hanmo.errors import ModelError, ResourceError
from hanmo.models.adapters import LoraConfig, add_adapter
from hanmo.models.kernels.products import set_precision
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.training.checkpoint import load_newest
from hanmo.training.fit import FitSettings, Trainer
from hanmo.training.objectives import CausalLanguageModeling
from hanmo.training.optimizer import OptimizerSettings

CPU = torch.device("cpu")
CONFIG = TransformerConfig(61, 32, 2, 4, 2, 8, 48, 32, qk_norm=True, model_type="qwen3", dropout=0.1)


def tokens(length: int = 3000) -> np.ndarray:
    noise = np.random.default_rng(7).integers(0, 61, length)
    return np.where(noise < 40, (3 * np.arange(length) + 7) % 61, noise).astype(np.uint16)


def objective(micro_batch: int = 2, separator: int | None = 0) -> CausalLanguageModeling:
    return CausalLanguageModeling(
        tokens()[:2500],
        tokens()[2500:],
        context=16,
        batch_size=8,
        micro_batch=micro_batch,
        seed=3,
        separator=separator,
    )


def trainer(
    run: Path,
    *,
    lora: bool = False,
    micro_batch: int = 2,
    optimizer: OptimizerSettings | None = None,
    goal: Any = None,
    resume: bool = False,
    trackers: tuple[Any, ...] = (),
    **settings: Any,
) -> Trainer[Transformer]:
    model = Transformer(CONFIG)
    model.initialize(5)
    if lora:
        add_adapter(model, "default", LoraConfig(rank=4), seed=1)
    made = FitSettings(optimizer or OptimizerSettings(), recipe="r", **settings)
    return Trainer(model, goal or objective(micro_batch), made, run, device=CPU, resume=resume, trackers=trackers)


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if line.endswith("}")]


def weights(run: Trainer[Transformer]) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in run.weights.values()])


VARIANTS: dict[str, dict[str, Any]] = {
    "average": {"average": 0.9},
    "adapters": {"lora": True, "optimizer": OptimizerSettings(muon=False, embedding_rate=0.01)},
    "best": {"keep_best": 3, "patience": 50, "evaluations": 12},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_interruption_in_the_middle_of_everything_changes_nothing(variant: str, tmp_path: Path) -> None:
    """Dropout, accumulation, packed documents: mid-epoch, at a step between two checkpoints."""
    options = {**VARIANTS[variant], "max_steps": 24, "checkpoint_every": 5}
    whole = trainer(tmp_path / "whole", **options)
    whole.fit()
    first = trainer(tmp_path / "parts", **options)
    original = first.step

    def step(done: float) -> float:
        if first.state.step == 13:
            raise KeyboardInterrupt
        return original(done)

    first.step = step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = trainer(tmp_path / "parts", resume=True, **options)
    second.fit()
    assert torch.equal(weights(whole), weights(second))
    assert whole.state.kept == second.state.kept


def test_fifty_kills_at_random_points_change_nothing(tmp_path: Path) -> None:
    """Each kill comes a random moment after the run has written something: in a step, an evaluation or a checkpoint."""
    torch.set_num_threads(1)
    whole = trainer(tmp_path / "whole", max_steps=240, checkpoint_every=2, **VARIANTS["average"])
    whole.fit()
    run = tmp_path / "killed"
    # one warm parent forks the runs, so that a start costs milliseconds instead of an import of torch
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time, signal, torch, numpy as np\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from test_trainer_failures import VARIANTS, trainer\n"
        "torch.set_num_threads(1)\n"
        "trainer(Path(sys.argv[1]).parent / 'warm')\n"  # what torch imports late is imported before the forks
        "run, kills, generator = Path(sys.argv[1]), 0, np.random.default_rng(11)\n"
        "log = run / 'log.jsonl'\n"
        "size = lambda: log.stat().st_size if log.exists() else 0\n"
        "while True:\n"
        "    before = size()\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        sys.stderr = open(os.devnull, 'w')\n"
        "        try:\n"
        "            trainer(run, max_steps=240, checkpoint_every=2, resume=True, **VARIANTS['average']).fit()\n"
        "        except BaseException:\n"
        "            os._exit(1)\n"
        "        os._exit(0)\n"
        "    while size() == before and os.waitpid(child, os.WNOHANG)[0] == 0: time.sleep(0.001)\n"
        "    if kills < 50:\n"
        "        time.sleep(generator.random() * 0.06)\n"
        "        try:\n"
        "            os.kill(child, signal.SIGKILL); kills += 1\n"
        "        except ProcessLookupError: pass\n"
        "    try: status = os.waitpid(child, 0)[1]\n"
        "    except ChildProcessError: status = 0\n"
        "    if status == 0 or kills >= 50: break\n"
        "print(kills)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(run), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    kills = int(done.stdout.strip().splitlines()[-1])
    final = trainer(run, max_steps=240, checkpoint_every=2, resume=True, **VARIANTS["average"])
    final.fit()
    assert kills == 50
    assert torch.equal(weights(whole), weights(final))
    losses = {entry["step"]: entry["loss"] for entry in logged(run) if "loss" in entry}
    assert losses == {entry["step"]: entry["loss"] for entry in logged(tmp_path / "whole") if "loss" in entry}


def test_checkpoints_hold_what_is_trained_and_no_pickle(tmp_path: Path) -> None:
    run = trainer(tmp_path, lora=True, max_steps=4, checkpoint_every=2, optimizer=OptimizerSettings(muon=False))
    run.fit()
    found = load_newest(tmp_path / "checkpoints")
    assert found is not None and all(".adapters." in name for name in found.model)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl"}
    assert not any(path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"PK") for path in files)


class Hungry(CausalLanguageModeling):
    """Needs more memory than there is for more than two windows at a time."""

    def loss(self, model: Transformer, batch: Any) -> torch.Tensor:
        if len(batch.ids) > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 TB")
        return super().loss(model, batch)


def hungry(micro_batch: int) -> Hungry:
    return Hungry(
        tokens()[:2500], tokens()[2500:], context=16, batch_size=8, micro_batch=micro_batch, seed=3, separator=0
    )


def test_memory_that_runs_out_halves_the_micro_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path / "a", goal=hungry(8), max_steps=3, checkpoint_every=1, evaluations=1)
    run.objective.validation_batches = lambda *_: iter(())  # type: ignore[method-assign, assignment]
    run.validate = lambda _=None: {"loss": 1.0}  # type: ignore[method-assign, assignment]
    run.fit()
    told = capsys.readouterr().err
    assert "micro-batch 8 -> 4" in told and "micro-batch 4 -> 2" in told
    other = trainer(tmp_path / "b", goal=hungry(2), max_steps=3, evaluations=1)
    other.validate = lambda _=None: {"loss": 1.0}  # type: ignore[method-assign, assignment]
    other.fit()
    assert torch.equal(weights(run), weights(other))
    found = load_newest(tmp_path / "a" / "checkpoints")
    assert found is not None and found.state.micro_batch == 2


def test_memory_for_not_even_one_example_is_an_error(tmp_path: Path) -> None:
    goal = hungry(1)
    goal.loss = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))  # type: ignore[method-assign]
    with pytest.raises(ResourceError, match="micro-batch of 1"):
        trainer(tmp_path, goal=goal, max_steps=2).fit()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_its_batch_and_changes_nothing(value: float, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=10, checkpoint_every=2)
    original = run.objective.loss

    def loss(model: Transformer, batch: Any) -> torch.Tensor:
        scale = value if run.state.step == 5 else 1.0
        return original(model, batch) * scale

    run.objective.loss = loss  # type: ignore[method-assign, assignment]
    with pytest.raises(ModelError, match="at step 5") as failure:
        run.fit()
    assert "windows of 16 tokens at" in str(failure.value) and "micro-batch 0" in str(failure.value)
    found = load_newest(tmp_path / "checkpoints")
    assert found is not None and found.state.step == 4
    assert torch.isfinite(weights(run)).all()


def test_nothing_better_for_a_while_ends_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=100, evaluations=50, patience=2)
    values = iter([3.0, 2.0, *[2.5] * 100])
    run.validate = lambda _=None: {"loss": next(values)}  # type: ignore[method-assign, assignment]
    result = run.fit()
    assert result.steps == 8 and run.state.best_step == 4


def test_the_best_weights_are_kept_as_folders(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=40, evaluations=10, keep_best=2, checkpoint_every=4)
    values = iter([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0, 8.0, 9.0, 9.5, 1.0])
    run.validate = lambda _=None: {"loss": next(values)}  # type: ignore[method-assign, assignment]
    result = run.fit()
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["step-00000008", "step-00000016"]
    assert result.best_step == 8


def test_a_damaged_best_folder_is_told_and_the_last_weights_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tmp_path, max_steps=8, evaluations=4)
    values = iter([1.0, 2.0, 3.0, 4.0, 4.0])
    run.validate = lambda _=None: {"loss": next(values)}  # type: ignore[method-assign, assignment]
    original = run.finish

    def finish(*arguments: Any) -> Any:
        path = next((tmp_path / "best").rglob("model.safetensors"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return original(*arguments)

    run.finish = finish  # type: ignore[method-assign]
    result = run.fit()
    assert "cannot be read" in capsys.readouterr().err and result.best_step == 8


def test_the_average_is_that_of_the_formula(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=5, average=0.5, evaluations=1)
    name = next(iter(run.weights))
    expected, original = run.weights[name].detach().clone(), run.step

    def step(done: float) -> float:
        nonlocal expected
        loss = original(done)
        decay = min(0.5, (1 + run.state.step) / (10 + run.state.step))
        expected = expected * decay + run.weights[name].detach() * (1 - decay)
        return loss

    run.step = step  # type: ignore[method-assign]
    run.fit()
    torch.testing.assert_close(run.weights[name].detach(), expected, rtol=1e-5, atol=1e-6)


def test_int8_products_train_and_evaluation_is_exact(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=30)
    assert set_precision(run.model, "int8") > 0
    before = run.validate()["loss"]
    set_precision(run.model, "fp32")
    assert run.validate()["loss"] == before
    set_precision(run.model, "int8")
    assert run.fit().validation_loss < before - 0.3


def test_trackers_hear_every_measure_under_the_names_of_the_log(tmp_path: Path) -> None:
    heard: list[Mapping[str, Any]] = []

    class Listener:
        def log(self, entry: Mapping[str, Any]) -> None:
            heard.append(dict(entry))

        def close(self) -> None: ...

    trainer(tmp_path, max_steps=4, trackers=(Listener(),)).fit()
    assert heard == logged(tmp_path)
    assert {"step", "tokens", "loss", "learning_rate", "gradient_norm", "elapsed"} <= set(heard[0])


STOPPED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_trainer_failures import trainer
torch.set_num_threads(1)
run = trainer(Path(sys.argv[1]), max_steps=100000)
if sys.argv[3] == "twice":
    import time
    original = run.save
    run.save = lambda: time.sleep(60)
run.fit()
"""


@pytest.mark.parametrize("times", ["once", "twice"])
def test_control_c_once_saves_and_twice_stops_at_once(times: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPED, str(tmp_path), str(Path(__file__).parent), times]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").stat().st_size:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    if times == "twice":
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=50)
    assert process.returncode != 0
    if times == "once":
        assert "a checkpoint was saved" in told and load_newest(tmp_path / "checkpoints") is not None
    else:
        assert "KeyboardInterrupt" in told


@pytest.mark.parametrize("native", [True, False])
def test_a_packed_window_costs_what_its_documents_cost_alone(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("hanmo.models.kernels.native.usable", lambda *_: False)
    torch.manual_seed(0)
    model = Transformer(CONFIG).eval()
    documents = [torch.randint(1, 61, (size,)) for size in (5, 1, 9, 12)]
    stream = torch.cat([torch.cat((torch.tensor([0]), document)) for document in documents])
    goal = CausalLanguageModeling(
        stream.numpy().astype(np.uint16), stream.numpy(), context=len(stream) - 1, batch_size=1, micro_batch=1, seed=0,
        separator=0,
    )  # fmt: skip
    (batch,) = goal.validation_batches()
    assert batch.segments is not None
    packed = model.target_logprobs(batch.ids, batch.targets, segments_BT=batch.segments)[0]
    alone = []
    for number, document in enumerate(documents):
        row = torch.cat((torch.tensor([0]), document, torch.tensor([0])))[None]
        row = row if number < len(documents) - 1 else row[:, :-1]
        alone.append(model.target_logprobs(row[:, :-1], row[:, 1:])[0])
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)
