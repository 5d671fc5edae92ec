"""Recurrent networks: the recurrences by hand, carried state, dropout, padding, BiLSTM-CRF, folders, and training."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanmo.errors import DataError, ModelError
from hanmo.models.checkpoints.recurrent import load_recurrent, save_recurrent
from hanmo.models.checkpoints.weights import read_safetensors, write_safetensors
from hanmo.models.heads import HeadConfig, TransformConfig
from hanmo.models.recurrent import (
    CELLS,
    RecurrentConfig,
    RecurrentEncoder,
    RecurrentModel,
    embed,
    locked_dropout,
    num_parameters,
    training_flops_per_token,
)
from hanmo.settings import Resolution
from hanmo.text.training import train_char, train_words
from hanmo.training import plan as dial
from hanmo.training import plan_recurrent
from hanmo.training.fit import FitSettings, Trainer
from hanmo.training.objectives import TruncatedBackpropagation
from hanmo.training.optimizer import OptimizerSettings
from hanmo.training.settings import SIZES, TrainingSettings

CPU = torch.device("cpu")
CONFIG = RecurrentConfig("lstm", 23, 8, 8, 2)


def make(config: RecurrentConfig = CONFIG, seed: int = 1) -> RecurrentModel:
    model = RecurrentModel(config)
    model.initialize(seed)
    return model.eval()


def by_hand(model: RecurrentModel, ids: list[int]) -> Tensor:
    """Logits [T, V] from the equations of the papers, gate by gate, in float64."""
    config = model.config
    weights = {name: value.double() for name, value in model.state_dict().items()}
    H = config.hidden_size
    h = [torch.zeros(H, dtype=torch.float64) for _ in range(config.num_layers)]
    c = [torch.zeros(H, dtype=torch.float64) for _ in range(config.num_layers)]
    logits = []
    for id in ids:
        x = weights["embed_tokens.weight"][id]
        for n in range(config.num_layers):
            W, U, b, d = (weights[f"layers.{n}.{k}_l0"] for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            i, r = (W @ x + b).split(H), (U @ h[n] + d).split(H)
            if config.cell == "rnn":
                h[n] = torch.tanh(i[0] + r[0])
            elif config.cell == "lstm":  # input, forget, candidate, output
                g = [a + e for a, e in zip(i, r, strict=True)]
                c[n] = torch.sigmoid(g[1]) * c[n] + torch.sigmoid(g[0]) * torch.tanh(g[2])
                h[n] = torch.sigmoid(g[3]) * torch.tanh(c[n])
            else:  # reset, update, candidate
                reset, update = torch.sigmoid(i[0] + r[0]), torch.sigmoid(i[1] + r[1])
                h[n] = (1 - update) * torch.tanh(i[2] + reset * r[2]) + update * h[n]
            x = h[n]
        if config.has_projection:
            x = weights["projection.weight"] @ x
        out = weights["embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"]
        logits.append(out @ x + weights["output_bias"])
    return torch.stack(logits)


# The network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", sorted(CELLS))
@pytest.mark.parametrize(("tied", "embedding"), [(True, 8), (True, 5), (False, 5)])
def test_every_cell_is_the_recurrence_of_its_paper(cell: str, tied: bool, embedding: int) -> None:
    model = make(RecurrentConfig(cell, 23, embedding, 8, 2, tie_embeddings=tied))
    with torch.no_grad():  # biases start at zero and would hide a wrong one
        for parameter in model.parameters():
            parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
    ids = [1, 7, 7, 22, 0, 3]
    logits, _ = model(torch.tensor([ids]))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[0].double(), by_hand(model, ids), rtol=1e-4, atol=1e-5)
    last, _ = model(torch.tensor([ids]), last_only=True)
    torch.testing.assert_close(last, logits[:, -1:])


def test_the_forget_gate_starts_open() -> None:
    biases = {name: value for name, value in make().named_parameters() if "bias_ih" in name}
    assert len(biases) == 2
    for value in biases.values():
        assert value.view(4, 8)[1].eq(1).all() and value.view(4, 8)[[0, 2, 3]].eq(0).all()
    assert all(
        value.eq(0).all()
        for name, value in make(dataclasses.replace(CONFIG, cell="gru")).named_parameters()
        if "bias" in name
    )


@given(cuts=st.lists(st.integers(0, 30), max_size=4), cell=st.sampled_from(sorted(CELLS)))
@settings(max_examples=25, deadline=None)
def test_a_carried_state_is_one_long_pass(cuts: list[int], cell: str) -> None:
    model = make(dataclasses.replace(CONFIG, cell=cell))
    ids = torch.randint(0, 23, (3, 30), generator=torch.Generator().manual_seed(4))
    whole, end = model(ids)
    state, pieces = None, []
    edges = [0, *sorted(cuts), 30]
    for begin, stop in pairwise(edges):
        if stop > begin:
            logits, state = model(ids[:, begin:stop], state)
            pieces.append(logits)
    assert state is not None
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-6)
    for a, b in zip(state, end, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    rows = torch.tensor([2, 0])  # a state can be cut by rows, as the engine does
    some, _ = model(ids[rows, :1], tuple(part[:, rows] for part in end))
    torch.testing.assert_close(some, model(ids[:, :1], end)[0][rows], rtol=1e-5, atol=1e-6)


def test_loss_is_the_sum_of_what_counts() -> None:
    model = make()
    ids, targets = torch.randint(0, 23, (3, 17)), torch.randint(0, 23, (3, 17))
    targets[1, 5:] = -1
    logprobs = model(ids)[0].log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(model.loss(ids, targets), -(logprobs * (targets >= 0)).sum())
    torch.testing.assert_close(model.loss(ids, targets, chunk=7), model.loss(ids, targets))


@pytest.mark.parametrize("cell", sorted(CELLS))
@pytest.mark.parametrize(("tied", "embedding", "layers"), [(True, 8, 1), (True, 6, 3), (False, 6, 2)])
def test_parameters_are_as_many_as_the_formula_says(cell: str, tied: bool, embedding: int, layers: int) -> None:
    config = RecurrentConfig(cell, 23, embedding, 8, layers, tie_embeddings=tied)
    assert sum(p.numel() for p in RecurrentModel(config).parameters()) == num_parameters(config)
    if not tied:
        both = dataclasses.replace(config, bidirectional=True)
        encoder = RecurrentEncoder(both, HeadConfig("token-classification", ("a", "b", "c")))
        without_head = [p.numel() for name, p in encoder.named_parameters() if not name.startswith("head.")]
        assert sum(without_head) == num_parameters(both)


def test_zaremba_small_has_its_published_size() -> None:
    """Two layers of 200 over 10,000 words: 4.65 million weights, two million fewer with tied embeddings."""
    untied = RecurrentConfig("lstm", 10_000, 200, 200, 2, tie_embeddings=False)
    assert num_parameters(untied) == 4_653_200
    assert training_flops_per_token(untied) == 6 * (2 * 4 * 200 * 400 + 10_000 * 200)


# Dropout -------------------------------------------------------------------------------------------------------------


def test_locked_dropout_keeps_its_mask_over_time() -> None:
    x = locked_dropout(torch.ones(4, 50, 64), 0.5, training=True)
    assert x.eq(x[:, :1]).all()  # the same features at all positions
    assert not x[0].eq(x[1]).all()  # but other ones in each sequence
    assert set(x.unique().tolist()) == {0.0, 2.0}
    assert 0.35 < x[:, 0].eq(0).float().mean() < 0.65
    assert locked_dropout(x, 0.5, training=False) is x and locked_dropout(x, 0.0, training=True) is x


def test_embedding_dropout_leaves_out_whole_words() -> None:
    embedding = torch.nn.Embedding(40, 6)
    ids = torch.arange(40).repeat(3, 2)
    x = embed(embedding, ids, 0.5, training=True)
    gone = x.eq(0).all(-1)
    assert gone.eq(x.eq(0).any(-1)).all()  # a word is there with all its features, or not at all
    assert gone.view(6, 40).eq(gone.view(6, 40)[0]).all()  # and so at each of its occurrences
    assert 8 < gone[0, :40].sum() < 32
    kept = ~gone
    torch.testing.assert_close(x[kept], 2 * embedding(ids)[kept])


def test_the_network_drops_what_its_configuration_says_and_only_in_training() -> None:
    ids = torch.randint(0, 23, (2, 9))
    for name in ("dropout", "output_dropout", "embedding_dropout"):
        model = make(dataclasses.replace(CONFIG, **{name: 0.5}))
        plain = make()(ids)[0]
        torch.testing.assert_close(model(ids)[0], plain)
        model.train()
        torch.manual_seed(0)
        assert not torch.allclose(model(ids)[0], plain)
    hidden, _ = make(dataclasses.replace(CONFIG, output_dropout=0.5)).train().hidden(ids)
    assert hidden.eq(0).eq(hidden[:, :1].eq(0)).all() and hidden.eq(0).any()


# Encoders ------------------------------------------------------------------------------------------------------------

BOTH = RecurrentConfig("lstm", 23, 6, 5, 2, tie_embeddings=False, bidirectional=True)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), extra=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_padding_changes_nothing(lengths: list[int], extra: int) -> None:
    for cell in CELLS:
        encoder = RecurrentEncoder(dataclasses.replace(BOTH, cell=cell), HeadConfig("token-classification", ("a", "b")))
        encoder.initialize(3)
        encoder.eval()
        T = max(lengths) + extra
        ids = torch.randint(0, 23, (len(lengths), T))
        mask = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)
        hidden, logits = encoder.hidden(ids, mask), encoder(ids, mask)
        assert hidden[~mask].eq(0).all()
        for row, length in enumerate(lengths):
            alone = ids[row : row + 1, :length]
            torch.testing.assert_close(hidden[row, :length], encoder.hidden(alone)[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(logits[row, :length], encoder(alone)[0], rtol=1e-5, atol=1e-6)


def test_an_encoder_sees_both_sides() -> None:
    encoder = RecurrentEncoder(BOTH, HeadConfig("sequence-classification", ("a", "b"), pooling="mean"))
    encoder.initialize(3)
    encoder.eval()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    for place in (0, 4):
        other = ids.clone()
        other[0, place] = 9
        assert (encoder.hidden(ids) - encoder.hidden(other)).abs().sum(-1).gt(1e-7).all()
    assert encoder(ids).shape == (1, 2)


def test_rows_without_tokens_and_padding_on_the_left_are_refused() -> None:
    encoder = RecurrentEncoder(BOTH, HeadConfig("sequence-classification", ("a", "b")))
    for mask in ([[True, True], [False, False]], [[True, True], [False, True]]):
        with pytest.raises(ModelError, match="padding after them"):
            encoder(torch.ones(2, 2, dtype=torch.int64), torch.tensor(mask))
    with pytest.raises(ModelError, match="at least one token"):
        encoder(torch.ones(0, 2, dtype=torch.int64))


def test_a_bilstm_crf_learns_a_tagging_task() -> None:
    """The tag of a word depends on its neighbours on both sides: the word alone does not tell it."""
    generator = np.random.default_rng(0)
    rows, tags, lengths = [], [], []
    for _ in range(48):
        words = generator.integers(3, 10, int(generator.integers(3, 9)))
        row = [int(w) % 2 for w in words]
        tag = [0 if row[min(t + 1, len(row) - 1)] == 0 else 1 + (t > 0 and row[t - 1]) for t in range(len(row))]
        rows.append(words.tolist() + [0] * (8 - len(words)))
        tags.append(tag + [0] * (8 - len(tag)))
        lengths.append(len(words))
    ids, gold = torch.tensor(rows), torch.tensor(tags)
    mask = torch.arange(8) < torch.tensor(lengths).unsqueeze(1)
    torch.manual_seed(0)
    head = HeadConfig("token-classification", ("O", "B", "I"), crf=True, dropout=0.0)
    tagger = RecurrentEncoder(
        dataclasses.replace(BOTH, vocab_size=10, embedding_size=16, hidden_size=16, num_layers=1, dropout=0.1), head
    )
    tagger.initialize(0)
    optimizer = torch.optim.Adam(tagger.parameters(), lr=0.02)
    first = None
    for _ in range(60):
        optimizer.zero_grad()
        loss = tagger.head.crf(tagger(ids, mask), gold, mask) / mask.sum()
        loss.backward()
        optimizer.step()
        first = first or float(loss.detach())
    tagger.eval()
    paths = tagger.head.crf.decode(tagger(ids, mask), mask)
    right = sum(a == b for path, tag in zip(paths, tags, strict=True) for a, b in zip(path, tag, strict=False))
    assert float(loss.detach()) < first / 5
    assert right / int(mask.sum()) > 0.98


# Configurations and folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "lstn"}, "'lstn' is not known"),
        ({"hidden_size": 0}, "hidden_size must be a positive"),
        ({"num_layers": True}, "num_layers must be a positive"),
        ({"vocab_size": "many"}, "vocab_size must be a positive"),
        ({"dropout": 1.0}, "dropout must be a share"),
        ({"embedding_dropout": -0.1}, "embedding_dropout must be a share"),
        ({"bidirectional": True}, "no output embedding to tie"),
    ],
)
def test_configurations_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        dataclasses.replace(CONFIG, **change)  # type: ignore[arg-type]


def test_a_configuration_survives_its_dictionary() -> None:
    config = dataclasses.replace(CONFIG, cell="gru", dropout=0.25)
    values = json.loads(json.dumps(config.to_dict()))
    assert values["model_type"] == "gru"
    assert RecurrentConfig.from_dict(values) == config
    with pytest.raises(ModelError, match="unknown key 'drop_out'") as caught:
        RecurrentConfig.from_dict({**values, "drop_out": 0.1})
    assert "dropout" in caught.value.fix
    del values["hidden_size"]
    with pytest.raises(ModelError, match="'hidden_size' is missing"):
        RecurrentConfig.from_dict(values)


def test_a_language_model_reads_one_way_and_an_encoder_both() -> None:
    with pytest.raises(ModelError, match="one direction"):
        RecurrentModel(BOTH)
    with pytest.raises(ModelError, match="both directions"):
        RecurrentEncoder(CONFIG, HeadConfig())


def saved(folder: Path) -> tuple[RecurrentModel, Path]:
    tokenizer = train_words([[f"词{i}" for i in range(22)]])
    model = make()
    save_recurrent(folder, model, tokenizer, {"kind": "model"})
    return model, folder


def test_a_folder_gives_the_same_network_back(tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "model")
    loaded, tokenizer = load_recurrent(folder)
    assert isinstance(loaded, RecurrentModel) and not loaded.training
    ids = torch.randint(0, 23, (2, 7))
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    assert loaded.output_weight is loaded.embed_tokens.weight
    assert tokenizer.decode(tokenizer.encode("词3 词21")) == "词3 词21"
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "hanmo.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_an_encoder_folder_keeps_its_head(tmp_path: Path) -> None:
    head = HeadConfig("token-classification", ("O", "人名"), crf=True, transform=TransformConfig("tanh"))
    encoder = RecurrentEncoder(BOTH, head)
    encoder.initialize(1)
    save_recurrent(tmp_path / "tagger", encoder.eval(), train_char(["甲乙丙"]), {"kind": "model"})
    loaded, _ = load_recurrent(tmp_path / "tagger")
    assert isinstance(loaded, RecurrentEncoder) and loaded.head.config == head
    ids = torch.randint(0, 8, (2, 5))
    torch.testing.assert_close(loaded(ids), encoder(ids))


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Change tensors of a folder (None removes one), and make its manifest agree."""
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(folder / "model.safetensors").items()}
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "hanmo.json").unlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers__1__weight_hh_l0": None}, "missing, the first is 'layers.1.weight_hh_l0'"),
        ({"extra": torch.zeros(1)}, "do not belong .* 'extra'"),
        ({"output_bias": torch.zeros(24)}, r"'output_bias' has shape \(24,\), expected \(23,\)"),
        ({"output_bias": torch.full((23,), float("nan"))}, "'output_bias' holds NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    _, folder = saved(tmp_path / "model")
    rewrite(folder, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load_recurrent(folder)
    assert "model.safetensors" in caught.value.where


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "model")
    config = folder / "config.json"
    good, weights = config.read_text(), (folder / "model.safetensors").read_bytes()

    def refused(message: str) -> None:
        (folder / "hanmo.json").unlink(missing_ok=True)
        with pytest.raises(ModelError, match=message):
            load_recurrent(folder)

    (folder / "model.safetensors").write_bytes(weights[:-5])
    with pytest.raises(ModelError, match="its manifest says"):
        load_recurrent(folder)
    refused("header describes")
    (folder / "model.safetensors").write_bytes(weights)
    for change, message in (
        ({"num_layers": 10**9}, "1000000000 layers"),
        ({"vocab_size": 10**9}, "sizes up to 1000000000"),  # refused before memory is taken
        ({"vocab_size": 10}, "tokenizer has ids up to 22"),
        ({"model_type": "llama"}, "no recurrent network but 'llama'"),
        ({"head": {"labels": "O"}, "bidirectional": True, "tie_embeddings": False}, "head is not described"),
    ):
        config.write_text(json.dumps({**json.loads(good), **change}))
        refused(message)
    config.write_text("[1]")
    refused("no recurrent network")


# Training ------------------------------------------------------------------------------------------------------------


def corpus(length: int = 1500) -> np.ndarray:
    """Tokens with structure: each follows from the one before it, with some noise."""
    generator = np.random.default_rng(7)
    tokens = [1]
    for noise in generator.integers(0, 23, length):
        tokens.append((3 * tokens[-1] + 7) % 23 if noise < 18 else int(noise))
    return np.array(tokens, dtype=np.uint16)


def streams(micro_batch: int = 4, batch_size: int = 4, length: int = 1200) -> TruncatedBackpropagation:
    tokens = corpus()
    return TruncatedBackpropagation(
        tokens[:length], tokens[1200:], context=16, batch_size=batch_size, micro_batch=micro_batch, start_id=0, seed=3
    )


def test_an_epoch_reads_every_stream_in_order() -> None:
    goal = streams()
    first = [goal.stream_start(row, 0) for row in range(4)]
    length = goal.steps_per_epoch * 16
    assert np.diff(first).tolist() == [length] * 3
    for step in range(goal.steps_per_epoch):
        (batch,) = goal.micro_batches(step)
        for row in range(4):
            begin = first[row] + 16 * step
            assert batch.ids[row].tolist() == goal.train[begin : begin + 16].tolist()
            assert batch.targets[row].tolist() == goal.train[begin + 1 : begin + 17].tolist()
    assert first[3] + length + 1 <= len(goal.train)
    offsets = {goal.stream_start(0, goal.steps_per_epoch * epoch) for epoch in range(20)}
    assert len(offsets) > 3 and max(offsets) + 4 * length + 1 <= len(goal.train)


def test_the_state_is_carried_and_begins_anew_with_each_epoch() -> None:
    """With gradients aside, the losses of an epoch are those of one long pass over each stream."""
    goal, model = streams(), make().double()
    total = 0.0
    for step in range(goal.steps_per_epoch):
        for batch in goal.micro_batches(step):
            loss = goal.loss(model, batch)
            loss.backward()
            total += float(loss.detach())
    begin = [goal.stream_start(row, 0) for row in range(4)]
    length = goal.steps_per_epoch * 16
    rows = torch.from_numpy(np.stack([goal.train[at : at + length + 1] for at in begin]).astype(np.int64))
    assert (
        abs(total - float(model.loss(rows[:, :-1], rows[:, 1:]).detach())) < 1e-6 * total
    )  # logits are rounded to float32
    assert all(part.abs().sum() > 0 and not part.requires_grad for part in goal.state or ())
    next(goal.micro_batches(goal.steps_per_epoch))
    assert goal.state is None


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_any_split_of_the_streams_gives_the_same_gradients(micro_batch: int) -> None:
    gradients = []
    for size in (4, micro_batch):
        model, goal = make().double(), streams(size)
        for step in range(3):
            for batch in goal.micro_batches(step):
                (goal.loss(model, batch) / goal.step_weight(step)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0.01
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_validation_reads_the_whole_split_as_one_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goal, model = streams(), make()
    run = Trainer(model, goal, FitSettings(OptimizerSettings(), max_steps=1), tmp_path, device=CPU)

    def validate(limit: int | None = None) -> float:
        return run.validate(limit)["loss"]

    ids = torch.from_numpy(goal.validation.astype(np.int64)).unsqueeze(0)
    inputs = torch.cat((torch.zeros(1, 1, dtype=torch.int64), ids[:, :-1]), 1)
    expected = float(model.loss(inputs, ids).detach()) / ids.numel()
    assert abs(validate() - expected) < 1e-6
    monkeypatch.setattr("hanmo.training.objectives.causal.VALIDATION_TOKENS", 37)
    assert abs(validate() - expected) < 1e-6
    assert abs(validate(100) - float(model.loss(inputs[:, :100], ids[:, :100]).detach()) / 100) < 1e-6


def trainer(run: Path, *, resume: bool = False, **options: object) -> Trainer[RecurrentModel]:
    model = RecurrentModel(dataclasses.replace(CONFIG, dropout=0.3, output_dropout=0.2, embedding_dropout=0.1))
    model.initialize(5)
    settings = FitSettings(OptimizerSettings(), recipe="r", **options)  # type: ignore[arg-type]
    return Trainer(model, streams(), settings, run, device=CPU, resume=resume)


@pytest.mark.parametrize("stop", [9, 18, 23])  # in the first epoch, at its very end, in the second
def test_stopping_and_resuming_equals_one_run_bit_for_bit(tmp_path: Path, stop: int) -> None:
    whole = trainer(tmp_path / "whole", max_steps=30, checkpoint_every=1)
    assert whole.objective.steps_per_epoch == 18  # type: ignore[attr-defined]
    whole.fit()
    first = trainer(tmp_path / "parts", max_steps=30, checkpoint_every=1)
    original = first.step

    def interrupted(done: float) -> float:
        if first.state.step == stop:
            raise KeyboardInterrupt
        return original(done)

    first.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    torch.rand(3)  # whatever happened to the generator in between
    second = trainer(tmp_path / "parts", max_steps=30, checkpoint_every=1, resume=True)
    second.fit()
    for a, b in zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)

    def losses(run: Path) -> list[float]:
        entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return [entry["loss"] for entry in entries if "loss" in entry]

    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_without_its_carried_state_a_resumed_run_would_differ(tmp_path: Path) -> None:
    """The law above has something to prove: the state matters."""
    results = []
    for keep in (True, False):
        run = trainer(tmp_path / str(keep), max_steps=12)
        original = run.step

        def step(done: float, run: Trainer[RecurrentModel] = run, keep: bool = keep, original=original) -> float:  # type: ignore[no-untyped-def]
            if run.state.step == 9 and not keep:
                run.objective.load_state_tensors({})
            return original(done)  # type: ignore[no-any-return]

        run.step = step  # type: ignore[method-assign]
        run.fit()
        results.append(run.model.output_bias.clone())
    assert not torch.equal(*results)


def test_training_learns(tmp_path: Path) -> None:
    model = make(dataclasses.replace(CONFIG, embedding_size=32, hidden_size=32, dropout=0.05))
    run = Trainer(model, streams(), FitSettings(OptimizerSettings(), max_steps=100), tmp_path, device=CPU)
    before = run.validate()["loss"]
    result = run.fit()
    assert result.validation_loss < before - 0.3
    assert result.tokens == 100 * 4 * 16


def test_adamw_alone_trains_every_parameter(tmp_path: Path) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = FitSettings(OptimizerSettings(muon=False), max_steps=3)
    run = Trainer(model, streams(), options, tmp_path, device=CPU)
    assert not run.optimizer.matrices
    run.fit()
    assert not [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]


def test_a_text_that_is_too_short_says_what_to_do() -> None:
    with pytest.raises(DataError, match="one step needs 65"):
        streams(length=64)
    with pytest.raises(DataError, match="validation split is empty"):
        TruncatedBackpropagation(corpus(), corpus()[:0], context=4, batch_size=2, micro_batch=2, start_id=0, seed=0)


# The dial ------------------------------------------------------------------------------------------------------------

MACHINE = dial.Machine(200e9, dial.CPU_OVERHEAD)


def test_the_dial_gives_growing_networks_to_growing_budgets() -> None:
    counts = [num_parameters(plan_recurrent.recurrent_config("lstm", size, 1024)) for size in SIZES]
    assert counts == sorted(counts) and len(set(counts)) == len(SIZES)
    sizes = []
    for budget in ("30s", "3min", "1h", "48h", "2000h"):
        chosen = TrainingSettings(architecture="gru", budget=budget)
        plan_recurrent.choose_recurrent_size(chosen, Resolution(), MACHINE, vocab_size=None)
        sizes.append(SIZES.index(chosen.size or ""))
    assert sizes == sorted(sizes) and sizes[0] == 0 and sizes[-1] > 3


def test_words_get_the_small_network_of_the_literature() -> None:
    chosen, resolution = TrainingSettings(architecture="lstm"), Resolution()
    plan_recurrent.choose_recurrent_size(chosen, resolution, MACHINE, vocab_size=10_000)
    plan = plan_recurrent.make_recurrent_plan(
        chosen, resolution, vocab_size=10_000, train_tokens=929_589, words=True, machine=MACHINE, device=CPU
    )
    assert (plan.config.num_layers, plan.config.hidden_size, plan.batch_size, chosen.context) == (2, 200, 20, 35)
    assert plan.steps == int(plan_recurrent.WORD_EPOCHS) * (929_589 // 700) and plan.seconds is None
    assert 0 < plan.config.dropout < 0.5  # type: ignore[union-attr]
    assert all(choice.reason for choice in resolution.choices)
    assert "LSTM" in plan.describe()


def test_what_the_user_says_is_kept() -> None:
    chosen = TrainingSettings(architecture="rnn", size="mini", context=9, batch_size=3, dropout=0.05, budget="1min")
    plan_recurrent.choose_recurrent_size(chosen, Resolution(), MACHINE, vocab_size=100)
    plan = plan_recurrent.make_recurrent_plan(
        chosen, Resolution(), vocab_size=100, train_tokens=5000, words=True, machine=MACHINE, device=CPU
    )
    assert isinstance(plan.config, RecurrentConfig)
    assert (plan.config.cell, plan.config.hidden_size, plan.config.dropout, plan.batch_size) == ("rnn", 320, 0.05, 3)
    assert plan.seconds == 60 and plan.steps is None
