"""Objectives: the laws they all obey, their losses against `transformers`, and that a network learns by each."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

from hanmo.errors import DataError, ModelError, UsageError
from hanmo.inference.language_model import LanguageModel
from hanmo.models.architectures import read_config, take_over
from hanmo.models.heads import HeadConfig
from hanmo.models.transformer import Transformer, build
from hanmo.training.fit import FitSettings, Trainer
from hanmo.training.objectives.base import IGNORED, Share
from hanmo.training.objectives.causal import PackedBatch
from hanmo.training.objectives.contrastive import Contrastive, collate_groups
from hanmo.training.objectives.distillation import Distillation
from hanmo.training.objectives.rows import RowBatch, RowMaker
from hanmo.training.objectives.seq2seq import SequenceToSequence, SourceBatch, SourceRowMaker
from hanmo.training.objectives.supervised import Classification, Tagging, WordBatch, balanced_weights
from hanmo.training.optimizer import OptimizerSettings
from hanmo.training.schedule import Schedule

from .objective_cases import (
    CASES,
    CRF_TAGS,
    SINGLE,
    SPANS,
    Labelled,
    Pair,
    Similar,
    bert_tokenizer,
    byte_tokenizer,
    causal,
    decoder,
    encoder,
    masked_network,
    seq2seq_network,
    sequence_to_sequence,
    similar,
)

CPU = torch.device("cpu")


# Laws ----------------------------------------------------------------------------------------------------------------


def gradient(name: str, micro_batch: int) -> tuple[Tensor, float]:
    """The gradient of one step's mean loss in float64, and the loss."""
    model = CASES[name].model().double()
    goal = CASES[name].objective(micro_batch)
    if isinstance(goal, Distillation):
        goal.teacher.double()
    model.train()
    total, weight = 0.0, goal.step_weight(4)
    counted = 0.0
    for batch in goal.micro_batches(4):
        loss = goal.loss(model, batch)
        (loss / weight).backward()
        total += float(loss.detach())
        counted += batch.weight
    assert math.isclose(counted, weight, rel_tol=1e-6)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), total / weight


@pytest.mark.parametrize("name", CASES)
def test_any_split_of_a_batch_gives_the_same_gradient(name: str) -> None:
    """One row at a time, nothing is padded: so it is also the law that padding changes nothing."""
    whole, loss = gradient(name, 64)
    assert whole.norm() > 0.01
    for micro_batch in (1, 2):
        parts, same = gradient(name, micro_batch)
        assert float((whole - parts).norm() / whole.norm()) < 1e-5
        assert math.isclose(loss, same, rel_tol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_batches_are_a_function_of_seed_and_step(name: str) -> None:
    a, b = CASES[name].objective(3), CASES[name].objective(3)
    seen = []
    for step in (0, 7, 2):
        for left, right in zip(a.micro_batches(step), b.micro_batches(step), strict=True):
            assert torch.equal(left.ids, right.ids) and torch.equal(left.targets, right.targets)
            seen.append(left.ids)
        assert a.step_weight(step) == b.step_weight(step) and a.tokens_in(step) >= a.step_weight(step) > 0
        assert a.origin(step)
    assert not all(torch.equal(x, seen[0]) for x in seen)


@pytest.mark.parametrize("name", CASES)
def test_processes_divide_a_step_and_the_validation_data(name: str) -> None:
    goal = CASES[name].objective(1)
    whole = list(goal.micro_batches(3))
    parts = [list(goal.micro_batches(3, Share(rank, 2))) for rank in range(2)]
    assert parts[1]
    for number, batch in enumerate(whole):
        assert torch.equal(batch.ids, parts[number % 2][number // 2].ids)
    whole = list(goal.validation_batches())
    parts = [list(goal.validation_batches(None, Share(rank, 2))) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert torch.equal(batch.ids, parts[number % 2][number // 2].ids)
    assert 0 < sum(batch.weight for batch in goal.validation_batches(20)) < sum(batch.weight for batch in whole)


@pytest.mark.parametrize("name", CASES)
def test_measures_do_not_depend_on_the_micro_batch(name: str, tmp_path: Path) -> None:
    found = []
    for micro_batch in (1, 7):
        model, goal = CASES[name].model(), CASES[name].objective(micro_batch)
        trainer = Trainer(model, goal, FitSettings(OptimizerSettings()), tmp_path, device=CPU)
        found.append(trainer.validate())
        assert found[-1] == trainer.validate()
    assert found[0].keys() == found[1].keys() and "loss" in found[0]
    for key, value in found[0].items():
        assert math.isclose(value, found[1][key], rel_tol=1e-4, abs_tol=1e-6), key


# Parity --------------------------------------------------------------------------------------------------------------

BERT = {
    "vocab_size": bert_tokenizer().vocab_size,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 48,
}


def theirs(name: str, config: Any, folder: Path) -> tuple[Any, Transformer]:
    """A random network of `transformers`, and the same as ours."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "embed_positions" not in parameter_name:  # Marian's are sinusoids
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    ours = read_config(json.loads((folder / "config.json").read_text()))
    return model, build(*take_over(ours, load_file(folder / "model.safetensors")))


def shown(segments: Tensor | None, ids: Tensor) -> Tensor:
    return torch.ones_like(ids) if segments is None else (segments > 0).long()


def check(expected: Tensor, loss: Tensor, weight: float) -> None:
    torch.testing.assert_close(loss / weight, expected, rtol=2e-5, atol=1e-6)


def test_masked_loss_is_that_of_bert(tmp_path: Path) -> None:
    model, ours = theirs("BertForMaskedLM", transformers.BertConfig(**BERT), tmp_path)
    goal = CASES["masked-sentences"].objective(4)
    for batch in goal.micro_batches(0):
        assert isinstance(batch, PackedBatch)
        labels = batch.targets.masked_fill(batch.targets < 0, -100)
        expected = model(batch.ids, attention_mask=shown(batch.segments, batch.ids), labels=labels).loss
        check(expected, goal.loss(ours, batch), batch.weight)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_classification_loss_is_that_of_bert(problem: str, tmp_path: Path) -> None:
    name = "classes" if problem.startswith("single") else "classes-multi"
    goal = CASES[name].objective(5)
    assert isinstance(goal, Classification)
    labels = dict(enumerate(goal.head.labels))
    config = transformers.BertConfig(**BERT, id2label=labels, problem_type=problem)
    model, ours = theirs("BertForSequenceClassification", config, tmp_path)
    assert ours.config.head is not None and ours.config.head.multi_label is problem.startswith("multi")
    types = set()
    for batch in goal.micro_batches(0):
        assert isinstance(batch, RowBatch)
        mask = shown(batch.segments, batch.ids)
        expected = model(batch.ids, attention_mask=mask, token_type_ids=batch.types, labels=batch.targets).loss
        check(expected, goal.loss(ours, batch), batch.weight)
        types.add(batch.types is not None)
    assert True in types  # some are pairs


def test_tagging_loss_is_that_of_bert_on_first_tokens(tmp_path: Path) -> None:
    config = transformers.BertConfig(**BERT, id2label=dict(enumerate(CRF_TAGS.labels)))
    model, ours = theirs("BertForTokenClassification", config, tmp_path)
    goal = CASES["tags"].objective(5)
    for batch in goal.micro_batches(0):
        assert isinstance(batch, WordBatch) and batch.places is not None
        labels = torch.full_like(batch.ids, -100)
        for row, (places, tags) in enumerate(zip(batch.places, batch.targets, strict=True)):
            labels[row, places[tags >= 0]] = tags[tags >= 0]
        assert (labels >= 0).sum() == batch.weight < shown(batch.segments, batch.ids).sum() - 2 * len(labels)
        expected = model(batch.ids, attention_mask=shown(batch.segments, batch.ids), labels=labels).loss
        check(expected, goal.loss(ours, batch), batch.weight)


def test_span_loss_is_that_of_bert(tmp_path: Path) -> None:
    model, ours = theirs("BertForQuestionAnswering", transformers.BertConfig(**BERT), tmp_path)
    goal = CASES["spans"].objective(1)  # theirs counts padding as a candidate
    for batch in itertools.islice(goal.micro_batches(0), 6):
        starts, ends = batch.targets.unbind(1)
        expected = model(batch.ids, token_type_ids=batch.types, start_positions=starts, end_positions=ends).loss
        check(expected, goal.loss(ours, batch), batch.weight)


@pytest.mark.parametrize("family", ["T5", "Marian", "Bart"])
def test_target_loss_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    size = byte_tokenizer().vocab_size
    special = {"vocab_size": size, "pad_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1}
    if family == "T5":
        config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **special)
        config.dropout_rate = 0.0
    else:
        sizes = {f"{part}_{key}": value for part in ("encoder", "decoder")
                 for key, value in {"layers": 1, "attention_heads": 4, "ffn_dim": 48}.items()}  # fmt: skip
        config = getattr(transformers, f"{family}Config")(d_model=32, max_position_embeddings=64, **sizes, **special)
    name = {"T5": "T5ForConditionalGeneration", "Marian": "MarianMTModel", "Bart": "BartForConditionalGeneration"}
    model, ours = theirs(name[family], config, tmp_path)
    rows = SourceRowMaker.of(ours, byte_tokenizer(), {"decoder_start_token_id": 1})
    records = [
        Pair("The moon", "明月"),
        Pair("London of England and Paris", "London"),
        Pair("月光", "The bright frost"),
    ]
    data = SequenceToSequence.prepare(records, rows)
    goal = SequenceToSequence(data, data, batch_size=3, micro_batch=3, seed=0)
    (batch,) = goal.micro_batches(0)
    assert isinstance(batch, SourceBatch) and batch.source is not None and batch.source_segments is not None
    assert batch.source[0, -1] in (0, 1) and all(0 in row for row in batch.targets.tolist())
    labels = batch.targets.masked_fill(batch.targets < 0, -100)
    expected = model(batch.source, attention_mask=batch.source_segments, labels=labels).loss
    check(expected, goal.loss(ours, batch), batch.weight)
    smooth = SequenceToSequence(data, data, batch_size=3, micro_batch=3, seed=0, smoothing=0.2)
    logits = model(batch.source, attention_mask=batch.source_segments, labels=labels).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=0.2)
    check(expected, smooth.loss(ours, batch), batch.weight)
    plain = smooth.measure(ours, batch)["loss"][0]
    assert math.isclose(plain, float(goal.loss(ours, batch)), rel_tol=1e-6)  # validation is not smoothed


def test_crf_loss_is_the_likelihood_among_all_paths_of_words() -> None:
    model = encoder(CRF_TAGS)
    with torch.no_grad():
        for parameter in model.head.crf.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    goal = CASES["tags-crf"].objective(4)
    batch = next(goal.micro_batches(0))  # the shortest sentences
    scores_BWL, crf = goal.scores(model, batch), model.head.crf
    expected = 0.0
    for scores_WL, tags in zip(scores_BWL, batch.targets, strict=True):
        gold = tags[tags >= 0].tolist()

        def score(path: tuple[int, ...], scores_WL: Tensor = scores_WL) -> float:
            total = float(crf.start[path[0]] + crf.end[path[-1]])
            total += sum(float(scores_WL[place, tag]) for place, tag in enumerate(path))
            return total + sum(float(crf.transitions[pair]) for pair in itertools.pairwise(path))

        paths = [score(path) for path in itertools.product(range(3), repeat=len(gold))]
        expected += float(torch.tensor(paths).logsumexp(0)) - score(tuple(gold))
    assert math.isclose(float(goal.loss(model, batch)), expected, rel_tol=1e-4)


def test_answers_score_as_in_generation() -> None:
    """What is trained is what the engine reads: source, start, every token of the answer, and its end."""
    network, tokenizer = seq2seq_network().eval(), byte_tokenizer()
    rows = SourceRowMaker.of(network, tokenizer, {"decoder_start_token_id": 1})
    engine = LanguageModel(network, tokenizer, prompt_prefix=list(rows.prefix), prompt_suffix=list(rows.suffix),
                           start_ids=list(rows.start_ids))  # fmt: skip
    data = SequenceToSequence.prepare([Pair("The bright moon", "明月光")], rows)
    goal = SequenceToSequence(data, data, batch_size=1, micro_batch=1, seed=0)
    (batch,) = goal.micro_batches(0)
    answer = [*tokenizer.encode("明月光"), tokenizer.eos_id]
    logprobs = engine.answer_logprobs("The bright moon", answer)
    assert batch.weight == len(answer)
    assert math.isclose(float(goal.loss(network, batch)), -float(logprobs.sum()), rel_tol=1e-5)


def test_a_forced_second_token_is_read_and_not_learned() -> None:
    network = seq2seq_network()
    rows = SourceRowMaker.of(network, byte_tokenizer(), {"decoder_start_token_id": 1, "forced_bos_token_id": 2})
    (row,) = SequenceToSequence.prepare([Pair("a", "b")], rows)
    target = byte_tokenizer().encode("b")
    assert row.inputs.tolist() == [1, 2, *target]
    assert row.targets.tolist() == [IGNORED, *target, 0]


# Classification ------------------------------------------------------------------------------------------------------


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.random.default_rng(0).choice(4, 100, p=[0.6, 0.2, 0.15, 0.05])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(balanced_weights(labels.tolist(), 4).numpy(), expected, rtol=1e-6)
    assert balanced_weights([0, 0, 1], 3)[2] == 1.0  # of a label that no example has


def test_the_balanced_loss_is_the_weighted_mean_of_torch() -> None:
    model, goal = encoder(SINGLE), CASES["classes-balanced"].objective(64)
    (batch,) = goal.micro_batches(1)
    expected = F.cross_entropy(goal.scores(model, batch), batch.targets, weight=goal.label_weights)
    check(expected, goal.loss(model, batch), goal.step_weight(1))
    with pytest.raises(UsageError, match="one label a text"):
        make = CASES["classes-multi"]
        Classification(make.objective(1).train, [1], make.objective(1).head, batch_size=1, micro_batch=1, seed=0,
                       balanced=True)  # type: ignore[list-item]  # fmt: skip


def test_measures_of_several_labels_are_those_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    model, goal = CASES["classes-multi"].model(), CASES["classes-multi"].objective(3)
    measures = Trainer(model, goal, FitSettings(OptimizerSettings()), tmp_path, device=CPU).validate()
    batches = list(goal.validation_batches())
    found = torch.cat([goal.scores(model, batch) > 0 for batch in batches]).numpy()
    true = torch.cat([batch.targets > 0 for batch in batches]).numpy()
    assert math.isclose(measures["accuracy"], accuracy_score(true, found), rel_tol=1e-9)
    assert math.isclose(measures["micro_f1"], f1_score(true, found, average="micro"), rel_tol=1e-9)


# Contrastive ---------------------------------------------------------------------------------------------------------


def group_of(records: list[Any]) -> Any:
    rows = RowMaker.of(encoder(), bert_tokenizer())
    data = Contrastive.prepare(records, rows)
    return data, Contrastive(data, data, group=len(data), seed=0, temperature=0.1, symmetric=True)


def test_contrastive_loss_is_cross_entropy_of_cosines() -> None:
    data, goal = group_of(
        similar(4, 1) and [Similar("明月", "月光"), Similar("Paris", "France"), Similar("frost", "moon")]
    )
    batch, model = collate_groups([data.examples]), encoder()
    anchors = goal.vectors(model, batch.ids, batch.segments)
    partners = goal.vectors(model, batch.candidates, batch.candidate_segments)
    scores = F.cosine_similarity(anchors[:, None], partners[None], dim=-1) / 0.1
    there, back = (F.cross_entropy(part, torch.arange(3), reduction="sum") for part in (scores, scores.T))
    torch.testing.assert_close(goal.loss(model, batch), (there + back) / 2, rtol=1e-5, atol=1e-5)
    one_way = Contrastive(data, data, group=3, seed=0, temperature=0.1)
    torch.testing.assert_close(one_way.loss(model, batch), there, rtol=1e-5, atol=1e-5)


def test_equal_texts_are_no_negatives_of_each_other() -> None:
    data, goal = group_of([
        Similar("明月", "月光", "frost"),  # same anchor as the next
        Similar("明月", "Paris", "price"),
        Similar("England", "月光"),  # same partner as the first
        Similar("London", "moon", "月光"),  # its negative is right for others
        Similar("月光", "bed"),  # itself the partner of others
    ])  # fmt: skip
    batch = collate_groups([data.examples])
    #            月光   Paris  月光   moon   bed    frost  price  月光
    expected = [[True, False, False, True, True, True, True, False],
                [False, True, False, True, True, True, True, False],
                [False, True, True, True, True, True, True, False],
                [True, True, True, True, True, True, True, True],
                [False, True, False, True, True, True, True, False]]  # fmt: skip
    assert batch.allowed.tolist() == expected
    assert batch.mutual.tolist() == [[True, False, False, True, False],
                                     [False, True, True, True, True],
                                     [False, False, True, True, False],
                                     [True, True, True, True, True],
                                     [True, True, True, True, True]]  # fmt: skip
    assert math.isfinite(float(goal.loss(encoder(), batch)))


def test_groups_do_not_see_each_other() -> None:
    model, goal = encoder(), CASES["contrastive-hard"].objective(3)
    groups = goal.groups(2)
    together = goal.loss(model, collate_groups(groups))
    apart = sum(goal.loss(model, collate_groups([group])) for group in groups)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-4)


# Distillation --------------------------------------------------------------------------------------------------------


def test_distillation_mixes_the_loss_with_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanmo.training.objectives.distillation.CHUNK", 7)
    student, teacher = decoder(), decoder(hidden=48, seed=8)
    inner = causal(6)
    goal = Distillation(inner, teacher, student, alpha=0.3, temperature=4.0)
    (batch,) = goal.micro_batches(1)
    batch.targets = batch.targets.clone()
    batch.targets[0, 3:9] = IGNORED
    counted = batch.targets >= 0
    mine, taught = (model(batch.ids, segments_BT=batch.segments)[counted] for model in (student, teacher))
    divergence = F.kl_div((mine / 4).log_softmax(-1), (taught / 4).log_softmax(-1), reduction="sum", log_target=True)
    expected = 0.3 * 16 * divergence + 0.7 * F.cross_entropy(mine, batch.targets[counted], reduction="sum")
    torch.testing.assert_close(goal.loss(student, batch), expected, rtol=1e-5, atol=1e-4)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    measures = goal.measure(student, batch)
    assert math.isclose(measures["loss"][0], float(inner.loss(student, batch)), rel_tol=1e-6)
    assert math.isclose(measures["divergence"][0], float(divergence), rel_tol=1e-4)
    alone = Distillation(inner, teacher, student, alpha=0.0)
    torch.testing.assert_close(alone.loss(student, batch), inner.loss(student, batch), rtol=1e-5, atol=1e-4)
    goal.micro_batch = 2  # memory ran out: it is the inner objective's
    assert inner.micro_batch == 2 and len(list(goal.micro_batches(0))) == 3


@pytest.mark.parametrize("name", ["distilled", "distilled-classes"])
def test_a_student_learns_from_its_teacher_alone(name: str, tmp_path: Path) -> None:
    """With alpha 1 the data's labels play no part: the student comes to say what the teacher says."""
    goal, model = CASES[name].objective(64), CASES[name].model()
    goal.alpha = 1.0
    before = Trainer(model, goal, settings(), tmp_path, device=CPU).validate()["divergence"]
    result = Trainer(model, goal, settings(40), tmp_path, device=CPU).fit()
    assert result.measures["divergence"] < 0.6 * before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distillation(causal(1), decoder(), masked_network()), "vocabulary has 360 entries, the student's 199"),
        (lambda: Distillation(causal(1), encoder(SINGLE), decoder()), "output over the vocabulary"),
        (
            lambda: Distillation(
                CASES["classes"].objective(1),
                encoder(replace(SINGLE, labels=("good", "bad", "mixed"))),
                encoder(SINGLE),
            ),
            "3 labels good, bad, mixed",
        ),
        (lambda: Distillation(CASES["spans"].objective(1), decoder(), decoder()), "no probabilities of tokens"),
        (
            lambda: Distillation(sequence_to_sequence(0.1)(1), seq2seq_network(), seq2seq_network()),
            "no probabilities of tokens",
        ),
        (lambda: Distillation(causal(1), decoder(), decoder(), alpha=2), "alpha must be from 0 to 1"),
    ],
)
def test_networks_that_cannot_teach_are_refused(make: Any, message: str) -> None:
    with pytest.raises((ModelError, UsageError), match=message):
        make()


# Learning ------------------------------------------------------------------------------------------------------------


def settings(steps: int = 0, *, muon: bool = False, **options: Any) -> FitSettings:
    rates = OptimizerSettings(embedding_rate=0.01, vector_rate=0.005, muon=muon, weight_decay=0.0)
    return FitSettings(rates, max_steps=steps, schedule=Schedule(warmup_steps=5), evaluations=1, **options)


TASKS = {  # measure, what the most frequent answer would reach, and what is to be reached
    "classes": ("accuracy", 0.5, 0.9),
    "classes-multi": ("micro_f1", 0.75, 0.9),
    "classes-decoder": ("accuracy", 0.5, 0.9),
    "tags": ("accuracy", 0.8, 0.95),
    "tags-recurrent": ("accuracy", 0.8, 0.95),
    "spans": ("accuracy", 0.3, 0.9),
    "contrastive": ("accuracy", 0.2, 0.6),
}


def started(name: str) -> Any:
    """A network as training begins with it."""
    torch.manual_seed(1)  # of a recurrent network's head
    model = CASES[name].model()
    model.initialize(1)
    return model


@pytest.mark.parametrize("name", TASKS)
def test_a_network_learns(name: str, tmp_path: Path) -> None:
    measure, chance, wanted = TASKS[name]
    model, goal = started(name), CASES[name].objective(64, count=400)
    start = Trainer(model, goal, settings(), tmp_path, device=CPU).validate()
    result = Trainer(model, goal, settings(60, muon="recurrent" not in name), tmp_path, device=CPU).fit()
    assert result.measures[measure] >= wanted > chance, result.measures
    assert result.measures["loss"] < start["loss"]


@pytest.mark.parametrize(("name", "wanted"), [("masked", 0.7), ("masked-sentences", 0.5), ("seq2seq", 0.4)])
def test_a_network_finds_words(name: str, wanted: float, tmp_path: Path) -> None:
    """The loss falls to a share of what the network begins with, which is the logarithm of the vocabulary."""
    model, goal = started(name), CASES[name].objective(64)
    start = Trainer(model, goal, settings(), tmp_path, device=CPU).validate()["loss"]
    assert abs(start - math.log(model.config.vocab_size)) < 0.2
    assert Trainer(model, goal, settings(100, muon=True), tmp_path, device=CPU).fit().validation_loss < wanted * start


@pytest.mark.parametrize("name", ["masked", "tags-crf", "distilled"])
def test_stopping_and_resuming_equals_one_run_bit_for_bit(name: str, tmp_path: Path) -> None:
    def start(folder: str, *, resume: bool = False) -> Trainer[Any]:
        model = CASES[name].model(dropout=0.1)
        options = settings(14, checkpoint_every=4)
        return Trainer(model, CASES[name].objective(3), options, tmp_path / folder, device=CPU, resume=resume)

    whole, parts = start("whole"), start("parts")
    result = whole.fit()
    steps, original = iter(range(99)), parts.step

    def killed(done: float) -> float:
        if next(steps) == 9:
            raise KeyboardInterrupt
        return original(done)

    parts.step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        parts.fit()
    again = start("parts", resume=True)
    assert again.fit().validation_loss == result.validation_loss
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_data_and_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(DataError, match="no training example"):
        Tagging([], [], batch_size=1, micro_batch=1, seed=0)
    with pytest.raises(DataError, match="two are the least"):
        Contrastive([], [], seed=0)
    data, _ = group_of([Similar("a", "b"), Similar("c", "d")])
    with pytest.raises(UsageError, match="no negatives"):
        Contrastive(data, data, group=1, seed=0)
    with pytest.raises(UsageError, match="temperature must be positive"):
        Contrastive(data, data, temperature=0.0, seed=0)
    with pytest.raises(UsageError, match="share from 0 to below 1"):
        sequence_to_sequence(1.0)(1)
    with pytest.raises(ModelError, match="reads from left to right"):
        goal = CASES["masked"].objective(2)
        goal.loss(decoder(), next(goal.micro_batches(0)))
    with pytest.raises(ModelError, match="no encoder beside"):
        SourceRowMaker.of(decoder(), byte_tokenizer(), {})
    with pytest.raises(ModelError, match="which token ends an answer"):
        SourceRowMaker.of(seq2seq_network(), bert_tokenizer(), {})
    for objective in (Classification, Tagging):
        with pytest.raises(ModelError, match="a head for span-extraction"):
            objective.prepare([], RowMaker.of(encoder(SPANS), bert_tokenizer()), SPANS)


def test_a_loss_that_is_no_number_names_file_and_line(tmp_path: Path) -> None:
    model, goal = CASES["classes"].model(), CASES["classes"].objective(2)
    with torch.no_grad():
        model.head.output.bias[0] = float("nan")
    with pytest.raises(ModelError) as caught:
        Trainer(model, goal, settings(3), tmp_path, device=CPU).fit()
    assert "l.jsonl:" in caught.value.where


def test_a_head_may_have_one_output() -> None:
    head = HeadConfig("sequence-classification", ("spam",))
    rows = RowMaker.of(encoder(head), bert_tokenizer())
    data = Classification.prepare([Labelled("a", ("spam",)), Labelled("b", ())], rows, head)
    goal = Classification(data, data, head, batch_size=2, micro_batch=2, seed=0)
    (batch,) = goal.micro_batches(0)
    assert sorted(batch.targets.flatten().tolist()) == [0.0, 1.0]
    expected = F.binary_cross_entropy_with_logits(goal.scores(encoder(head), batch), batch.targets)
    check(expected, goal.loss(encoder(head), batch), batch.weight)
