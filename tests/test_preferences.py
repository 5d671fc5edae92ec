"""Preference tuning: the losses against their formulas, the reference, the laws, and that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hanmo.data.tasks.types import Preference
from hanmo.errors import DataError, UsageError
from hanmo.models.adapters import LoraConfig, add_adapter
from hanmo.models.transformer import Transformer
from hanmo.text.chat import render_chat
from hanmo.text.chat_targets import ChatTargets
from hanmo.training.fit import FitSettings, Trainer
from hanmo.training.objectives import preferences
from hanmo.training.objectives.base import Share
from hanmo.training.objectives.preferences import (
    PreferenceBatch,
    PreferenceLoss,
    PreferenceTuning,
    Scores,
    answer_logprobs,
    prepare_pairs,
    with_reference,
)
from hanmo.training.optimizer import OptimizerSettings
from hanmo.training.schedule import Schedule

from .test_instructions import network, small_tokenizer

CPU = torch.device("cpu")
KINDS = {
    "dpo": PreferenceLoss(),
    "dpo-smoothed": PreferenceLoss(beta=0.3, smoothing=0.1),
    "orpo": PreferenceLoss("orpo", beta=0.2),
    "simpo": PreferenceLoss("simpo", margin=0.5),
}


def pairs(count: int, seed: int) -> list[Preference]:
    """The moon is preferred to the sun, whatever is asked."""
    generator = np.random.default_rng(seed)
    words = ("hello", "是", "4", "frost", "霜")

    def say(*extra: str) -> str:
        return " ".join([*extra, *(str(word) for word in generator.choice(words, generator.integers(1, 4)))])

    records = []
    for number in range(count):
        prompt = [{"role": "user", "content": say()}]
        if number % 3 == 0:
            prompt = [*prompt, {"role": "assistant", "content": say()}, {"role": "user", "content": say()}]
        records.append(Preference(tuple(prompt), say("moon"), say("sun"), file="p.jsonl", line=number + 1))
    return records


def rows_of(count: int, seed: int) -> Any:
    return prepare_pairs(pairs(count, seed), ChatTargets(small_tokenizer()), context=120)


def objective(micro_batch: int, kind: PreferenceLoss = KINDS["dpo"], *, batch_size: int = 6) -> PreferenceTuning:
    base = network().double().eval()
    splits = [with_reference(base, rows_of(n, s), micro_batch=4) for n, s in ((24, 1), (7, 2))]
    return PreferenceTuning(*splits, kind, batch_size=batch_size, micro_batch=micro_batch, seed=3)


def moved(seed: int = 9) -> Transformer:
    """The network after some training, in float64."""
    model, generator = network().double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


# The rows ------------------------------------------------------------------------------------------------------------


def test_only_the_answers_count_and_both_follow_the_prompt() -> None:
    tokenizer = small_tokenizer()
    prompt = (
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "frost"},
    )
    (row,) = prepare_pairs([Preference(prompt, "moon", "明月 sun")], ChatTargets(tokenizer), context=90)
    asked = render_chat(tokenizer, list(prompt))
    for side, answer in ((row.chosen, "moon"), (row.rejected, "明月 sun")):
        ids = [*tokenizer.encode(answer), tokenizer.special_tokens["<|im_end|>"]]
        assert side.inputs.tolist() == [*asked, *ids[:-1]]
        assert side.targets[side.targets >= 0].tolist() == ids and side.targets[len(asked) - 1] == ids[0]


def test_pairs_that_teach_nothing_are_dropped_and_long_ones_refused(capsys: pytest.CaptureFixture[str]) -> None:
    question = ({"role": "user", "content": "sun"},)
    targets = ChatTargets(small_tokenizer())
    records = [
        Preference(question, "moon", "sun", file="p", line=1),
        Preference(question, "moon", "moon", file="p", line=2),
        Preference(question, " \n", "moon", file="p", line=3),
        Preference(question, "moon " * 9 + "a", "moon " * 9 + "b", file="p", line=4),
    ]
    with pytest.raises(DataError, match="context holds 40") as caught:
        prepare_pairs(records, targets, context=40)
    assert caught.value.where == "p:4"
    prepared = prepare_pairs(records, targets, context=40, truncate=True)
    assert [row.where for row in prepared] == ["p:1"] and (prepared.dropped, prepared.truncated) == (3, 1)
    assert prepared.reasons == ["p:2: both answers are the same", "p:3: an answer is blank",
                                "p:4: both answers are the same"]  # fmt: skip
    assert "dropped" in capsys.readouterr().err
    long_prompt = Preference(({"role": "user", "content": "sun " * 30},), "moon", "sun", file="p", line=5)
    assert prepare_pairs([long_prompt], targets, context=40, truncate=True).dropped == 1
    with pytest.raises(DataError) as caught:
        prepare_pairs([Preference(({"role": "bot", "content": "x"},), "a", "b", file="p", line=6)], targets, context=40)
    assert caught.value.where == "p:6: messages[0]"


def test_a_model_without_a_template_completes_prompts_of_one_message() -> None:
    tokenizer = small_tokenizer()
    one = Preference(({"role": "user", "content": "sun"},), "moon", "frost", file="p", line=1)
    (row,) = prepare_pairs([one], tokenizer, context=40)
    assert row.chosen.inputs.tolist() == tokenizer.encode("sunmoon")
    two = replace(one, prompt=one.prompt * 2)
    with pytest.raises(DataError, match="needs a chat template") as caught:
        prepare_pairs([two], tokenizer, context=40)
    assert caught.value.where == "p:1"


# The losses ----------------------------------------------------------------------------------------------------------


def logprobs_one_by_one(model: Transformer, row: Any) -> Tensor:
    """Log probability of each token of one answer in float64, from the definition."""
    ids = torch.from_numpy(row.inputs).long()[None]
    hidden = model.hidden(ids)[0]
    scores = F.log_softmax(hidden @ model.output_weight.T, dim=-1)
    targets = torch.from_numpy(row.targets).long()
    return scores[torch.arange(len(targets)), targets.clamp(min=0)][targets >= 0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


FORMULAS: dict[str, Callable[..., float]] = {
    "dpo": lambda c, r, rc, rr: -math.log(sigmoid(0.1 * (sum(c) - sum(rc) - sum(r) + sum(rr)))),
    "dpo-smoothed": lambda c, r, rc, rr: (
        -0.9 * math.log(sigmoid(0.3 * (sum(c) - sum(rc) - sum(r) + sum(rr))))
        - 0.1 * math.log(sigmoid(-0.3 * (sum(c) - sum(rc) - sum(r) + sum(rr))))
    ),
    "orpo": lambda c, r, *_: (
        -np.mean(c)
        - 0.2
        * math.log(
            sigmoid(
                math.log(math.exp(np.mean(c)) / (1 - math.exp(np.mean(c))))
                - math.log(math.exp(np.mean(r)) / (1 - math.exp(np.mean(r))))
            )
        )
    ),
    "simpo": lambda c, r, *_: -math.log(sigmoid(2.0 * (np.mean(c) - np.mean(r)) - 0.5)),
}


@pytest.mark.parametrize("name", KINDS)
def test_losses_are_those_of_the_papers(name: str) -> None:
    before, model = network().double(), moved()
    goal = objective(99, KINDS[name])
    total, ahead = 0.0, 0
    with torch.no_grad():
        for index in goal.order.step(0):
            row = goal.train[index]
            sides = [
                logprobs_one_by_one(m, side).tolist() for m in (model, before) for side in (row.chosen, row.rejected)
            ]
            total += FORMULAS[name](*sides)
            assert math.isclose(row.reference[0], sum(sides[2]), rel_tol=1e-9)
            assert math.isclose(row.reference[1], sum(sides[3]), rel_tol=1e-9)
            score = np.mean if name in ("orpo", "simpo") else sum
            base = 0.0 if name in ("orpo", "simpo") else sum(sides[2]) - sum(sides[3])
            ahead += score(sides[0]) - score(sides[1]) > base
        (batch,) = goal.micro_batches(0)
        assert math.isclose(float(goal.loss(model, batch)), total, rel_tol=1e-9)
        measures = goal.measure(model, batch)
    assert math.isclose(measures["loss"][0], total, rel_tol=1e-9)
    assert measures["accuracy"] == (ahead, batch.weight) and 0 < ahead < 6


def test_at_the_start_nothing_is_preferred() -> None:
    """The network is its own reference: the loss is ln 2, and no pair is ahead."""
    goal, model = objective(4), network().double()
    for batch in goal.micro_batches(0):
        assert math.isclose(float(goal.loss(model, batch).detach()), batch.weight * math.log(2), rel_tol=1e-9)
        assert abs(goal.measure(model, batch)["margin"][0]) < 1e-9


def test_probabilities_of_one_stay_finite() -> None:
    sure = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    unsure = torch.full((2,), -3.0, dtype=torch.float64)
    ones = torch.ones(2)
    loss, margin = PreferenceLoss("orpo")(Scores(sure, ones, ones), Scores(unsure, ones, ones))
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite().all() and margin.isfinite().all() and sure.grad is not None and sure.grad.isfinite().all()


def test_log_probabilities_and_their_gradients() -> None:
    goal = objective(99)
    (batch,) = goal.micro_batches(2)
    model = moved()
    found = answer_logprobs(model, batch)
    weights = torch.arange(1.0, len(found) + 1, dtype=found.dtype)
    (found * weights).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    rows = [goal.train[index] for index in goal.pieces(2)[0]]
    expected = torch.stack([logprobs_one_by_one(model, side).sum() for side in
                            (*(row.chosen for row in rows), *(row.rejected for row in rows))])  # fmt: skip
    (expected * weights).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for mine, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dpq"}, "is not a loss"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"beta": math.nan}, "beta must be above 0"),
        ({"smoothing": 0.5}, "from 0 to below 0.5"),
    ],
)
def test_constants_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        PreferenceLoss(**options)
    assert caught.value.zh


# The reference -------------------------------------------------------------------------------------------------------


def test_the_reference_is_kept_in_a_file_and_belongs_to_weights_and_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, rows, model = tmp_path / "reference.safetensors", rows_of(5, 1), network()
    calls: list[int] = []
    original = preferences.compute_reference
    monkeypatch.setattr(preferences, "compute_reference", lambda *args: (calls.append(1), original(*args))[1])
    first = with_reference(model, rows, micro_batch=2, cache=cache)
    assert first == with_reference(model, rows, micro_batch=2, cache=cache) and len(calls) == 1
    assert model.training == network().training
    with_reference(moved().float(), rows, micro_batch=2, cache=cache)  # other weights
    with_reference(model, rows_of(6, 1), micro_batch=2, cache=cache)  # other pairs
    assert len(calls) == 3
    cache.write_bytes(b"damaged")
    assert with_reference(model, rows, micro_batch=3, cache=cache)[0].reference == pytest.approx(first[0].reference)
    assert len(calls) == 4


def test_the_reference_has_no_dropout_and_leaves_the_mode_as_it_was() -> None:
    rows, model = rows_of(4, 1), network(dropout=0.5).train()
    found = with_reference(model, rows, micro_batch=2)
    assert model.training
    plain = with_reference(network(), rows, micro_batch=2)
    assert [row.reference for row in found] == [row.reference for row in plain]


def test_without_a_reference_dpo_is_refused_and_orpo_is_not() -> None:
    rows = rows_of(4, 1)
    with pytest.raises(DataError, match="compares with the network before") as caught:
        PreferenceTuning(rows, rows, batch_size=2, micro_batch=2, seed=0)
    assert caught.value.where == "p.jsonl:1"
    goal = PreferenceTuning(rows, rows, KINDS["orpo"], batch_size=4, micro_batch=4, seed=0)
    (batch,) = goal.micro_batches(0)
    assert math.isfinite(float(goal.loss(network(), batch).detach()))


# Laws ----------------------------------------------------------------------------------------------------------------


def gradient(name: str, micro_batch: int) -> Tensor:
    model, goal = moved().train(), objective(micro_batch, KINDS[name])
    for batch in goal.micro_batches(4):
        (goal.loss(model, batch) / goal.step_weight(4)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", KINDS)
def test_any_micro_batch_gives_the_same_gradient(name: str) -> None:
    """One pair at a time, and rows of one length: so it is also the law that padding changes nothing."""
    whole = gradient(name, 64)
    assert whole.norm() > 0.001
    for micro_batch in (1, 4):
        parts = gradient(name, micro_batch)
        assert float((whole - parts).norm() / whole.norm()) < 1e-6


def test_padding_changes_nothing() -> None:
    goal, model = objective(99), moved().eval()
    (batch,) = goal.micro_batches(1)
    assert batch.segments is not None and (batch.segments == 0).any()
    found = answer_logprobs(model, batch)
    for row in range(len(batch.ids)):
        width = int(batch.segments[row].sum())
        alone = PreferenceBatch(batch.ids[row : row + 1, :width], batch.targets[row : row + 1, :width], 1)
        torch.testing.assert_close(answer_logprobs(model, alone)[0], found[row], rtol=1e-9, atol=1e-9)


def test_batches_are_a_function_of_seed_and_step_and_processes_divide_them() -> None:
    a, b = objective(2), objective(2)
    for step in (0, 5, 2):
        first, second = list(a.micro_batches(step)), list(b.micro_batches(step))
        parts = [list(a.micro_batches(step, Share(rank, 2))) for rank in range(2)]
        for number, (left, right) in enumerate(zip(first, second, strict=True)):
            assert torch.equal(left.ids, right.ids) and torch.equal(left.targets, right.targets)
            assert torch.equal(left.ids, parts[number % 2][number // 2].ids)
        assert sum(batch.weight for batch in first) == a.step_weight(step) == 6 and a.unit == "pair"
        assert a.tokens_in(step) > 100
    assert a.origin(0).startswith("p.jsonl:")


def fit_settings(steps: int, rate: float = 0.003) -> FitSettings:
    optimizer = OptimizerSettings(rate, rate, rate, muon=False, weight_decay=0.0)
    return FitSettings(optimizer, max_steps=steps, schedule=Schedule(), seed=1, evaluations=2, checkpoint_every=3)


def test_stop_and_resume_equal_one_run_bit_for_bit(tmp_path: Path) -> None:
    def begin(folder: str, *, resume: bool = False) -> Trainer[Any]:
        model = network(dropout=0.1)
        splits = [
            with_reference(model, rows_of(n, s), micro_batch=4, cache=tmp_path / folder / f"{s}.safetensors")
            for n, s in ((12, 1), (5, 2))
        ]
        goal = PreferenceTuning(*splits, batch_size=4, micro_batch=2, seed=3)
        return Trainer(model, goal, fit_settings(7), tmp_path / folder, device=CPU, resume=resume)

    whole, parts = begin("whole"), begin("parts")
    result = whole.fit()
    original = parts.step

    def killed(done: float) -> float:
        if parts.state.step == 5:
            raise KeyboardInterrupt
        return original(done)

    parts.step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        parts.fit()
    again = begin("parts", resume=True)
    assert again.fit().validation_loss == result.validation_loss
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_a_network_learns_the_preference(name: str, tmp_path: Path) -> None:
    model = network()
    splits = [with_reference(model, rows_of(n, s), micro_batch=8) for n, s in ((32, 1), (12, 2))]
    goal = PreferenceTuning(*splits, KINDS[name], batch_size=8, micro_batch=8, seed=3)
    trainer = Trainer(model, goal, fit_settings(24), tmp_path, device=CPU)
    before = trainer.validate()
    after = trainer.fit().measures
    assert after["accuracy"] == 1 > before["accuracy"]
    assert after["loss"] < before["loss"] and after["margin"] > before["margin"] + 0.5


def test_adapters_alone_learn_it_too(tmp_path: Path) -> None:
    """The reference is the network with its start weights: an adapter that changes nothing yet, switched on."""
    model, plain = network(), network()
    add_adapter(model, "p", LoraConfig(rank=4))
    splits = [with_reference(model, rows_of(n, s), micro_batch=8) for n, s in ((32, 1), (12, 2))]
    without = with_reference(plain, rows_of(12, 2), micro_batch=8)
    for row, other in zip(splits[1], without, strict=True):
        assert row.reference == pytest.approx(other.reference)
    goal = PreferenceTuning(*splits, batch_size=8, micro_batch=8, seed=3)
    result = Trainer(model, goal, fit_settings(24, 0.02), tmp_path, device=CPU).fit()
    assert result.measures["accuracy"] == 1
    base = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and (known := name.replace(".base.", ".")) in base:
            assert torch.equal(parameter, base[known])
