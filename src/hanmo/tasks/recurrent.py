"""Networks trained from nothing: a bidirectional LSTM under a head for texts, or under a conditional random field for
tokens (Huang et al. 2015).

They learn with the trainer and the objectives that fine-tuning uses, on pieces of words that they find in their own
records.
"""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hanmo.data.splits import Shares
from hanmo.data.tasks.splits import label_names, labels_in, leak_keys, split_records
from hanmo.data.tasks.types import Labelled, Record, Tagged
from hanmo.tasks.base import System
from hanmo.tasks.classification import Network as ClassifierNetwork
from hanmo.tasks.classification import Verdict
from hanmo.tasks.tagging import Network as TaggerNetwork
from hanmo.tasks.tagging import Tags, with_tokens

if TYPE_CHECKING:
    from hanmo.inference.encoder import TextEncoder
    from hanmo.models.heads import HeadConfig
    from hanmo.training.objectives import Objective
    from hanmo.training.objectives.rows import RowMaker

R = TypeVar("R", bound=Record)
A = TypeVar("A")

VOCABULARY = 6000  # pieces of words
EMBEDDING, HIDDEN = 128, 128  # sizes; the hidden one of each direction
DROPOUT = 0.3
RATE = 3e-3
BATCH = 32  # records of a step
EPOCHS, LEAST_STEPS = 8, 200
LONGEST = 512  # pieces of a record that training reads
VALIDATION_SHARE = 0.1  # kept to choose the best weights by, where no validation records are given


class Recurrent(System[R, A]):
    """A bidirectional LSTM that learns from the records it is given.

    Args:
        epochs: passes over the records; small data are read until there are a few hundred steps.
        seed: of weights, order and noise.
    """

    kind, learns = "recurrent", True
    task: str

    def __init__(self, name: str, *, epochs: float = EPOCHS, seed: int = 0) -> None:
        self.name, self.epochs, self.seed = name, epochs, seed
        self.encoder: TextEncoder | None = None

    @abstractmethod
    def head(self, train: Sequence[R]) -> HeadConfig:
        """What stands on the network."""

    @abstractmethod
    def objective(self, rows: RowMaker, head: HeadConfig, *parts: Sequence[R]) -> Objective[Any, Any]:
        """What it learns of records to train and to check on."""

    @abstractmethod
    def system(self, encoder: TextEncoder) -> System[R, A]:
        """What answers once the network has learnt."""

    def usable(self, records: Sequence[R]) -> list[R]:
        """The records that something can be learnt from."""
        return list(records)

    def text(self, record: R) -> str:
        """What the pieces of words are found in."""
        return str(getattr(record, "text", ""))

    def fit(self, train: Sequence[R], validation: Sequence[R] = ()) -> None:
        """Train; the weights that predict the validation records best are kept (a tenth, where none are given)."""
        import torch

        from hanmo.inference.encoder import TextEncoder
        from hanmo.models.recurrent import RecurrentConfig, RecurrentEncoder
        from hanmo.text.training import train_bpe
        from hanmo.training.fit import Trainer
        from hanmo.training.objectives.rows import RowMaker

        chosen = self.usable(train)
        head = self.head(chosen)
        checked = [record for record in validation if checkable(record, set(head.labels))]
        if not checked:
            chosen, checked = held_out(chosen, self.seed)
        tokenizer = train_bpe(map(self.text, chosen), VOCABULARY)
        config = RecurrentConfig(
            "lstm",
            tokenizer.vocab_size,
            EMBEDDING,
            HIDDEN,
            num_layers=1,
            tie_embeddings=False,
            dropout=DROPOUT,
            output_dropout=DROPOUT,
            embedding_dropout=DROPOUT / 3,
            bidirectional=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # the head's weights
            model = RecurrentEncoder(config, head)
        model.initialize(self.seed)
        rows = RowMaker.of(model, tokenizer, max_length=LONGEST, truncate=True)
        objective = self.objective(rows, head, chosen, checked)
        steps = max(LEAST_STEPS, round(self.epochs * len(chosen) / BATCH))
        with tempfile.TemporaryDirectory() as run:
            Trainer(model, objective, loop(steps, self.seed), Path(run), device=torch.device("cpu")).fit()
        self.encoder = TextEncoder(model, tokenizer, name=self.name)

    def answer(self, records: Sequence[R]) -> list[A]:
        """What the network makes of them."""
        assert self.encoder is not None, "fit it first"
        return self.system(self.encoder).answer(records)

    def save(self, folder: Path) -> Path:
        """Write the network."""
        from hanmo.models.checkpoints.recurrent import save_recurrent

        assert self.encoder is not None, "fit it first"
        model: Any = self.encoder.model
        save_recurrent(folder, model, self.encoder.tokenizer, {"kind": "model", "task": self.task})
        return folder


class RecurrentClassifier(Recurrent[Labelled, Verdict]):
    """Labels of texts: the mean of the states stands for a text."""

    key = "lstm"
    task = "classification"

    def __init__(self, *, epochs: float = EPOCHS, seed: int = 0) -> None:
        super().__init__("BiLSTM", epochs=epochs, seed=seed)

    def head(self, train: Sequence[Labelled]) -> HeadConfig:
        """One output for each label."""
        from hanmo.models.heads import HeadConfig

        several = any(len(record.labels) != 1 for record in train)
        return HeadConfig("sequence-classification", label_names(train), pooling="mean", multi_label=several)

    def objective(self, rows: RowMaker, head: HeadConfig, *parts: Sequence[Labelled]) -> Objective[Any, Any]:
        """Cross-entropy of the labels."""
        from hanmo.training.objectives.supervised import Classification

        train, checked = (Classification.prepare(records, rows, head).examples for records in parts)
        return Classification(train, checked, head, batch_size=BATCH, micro_batch=BATCH, seed=self.seed)

    def system(self, encoder: TextEncoder) -> System[Labelled, Verdict]:
        """A network with a head."""
        return ClassifierNetwork(encoder)


class RecurrentTagger(Recurrent[Tagged, Tags]):
    """Tags of tokens: a BiLSTM-CRF."""

    key = "bilstm-crf"
    task = "tagging"

    def __init__(self, *, epochs: float = EPOCHS, seed: int = 0) -> None:
        super().__init__("BiLSTM-CRF", epochs=epochs, seed=seed)

    def usable(self, records: Sequence[Tagged]) -> list[Tagged]:
        """Those that have tokens."""
        return with_tokens(records)

    def head(self, train: Sequence[Tagged]) -> HeadConfig:
        """One output for each tag, and scores of their sequences."""
        from hanmo.models.heads import HeadConfig

        return HeadConfig("token-classification", label_names(train), crf=True)

    def objective(self, rows: RowMaker, head: HeadConfig, *parts: Sequence[Tagged]) -> Objective[Any, Any]:
        """The likelihood of sequences of tags."""
        from hanmo.training.objectives.supervised import Tagging

        train, checked = (Tagging.prepare(records, rows, head).examples for records in parts)
        return Tagging(train, checked, batch_size=BATCH, micro_batch=BATCH, seed=self.seed)

    def system(self, encoder: TextEncoder) -> System[Tagged, Tags]:
        """A network with a head."""
        return TaggerNetwork(encoder)


def checkable(record: Record, known: set[str]) -> bool:
    """Whether a network that knows some labels can be checked on a record."""
    return getattr(record, "tokens", True) != () and known.issuperset(labels_in(record))


def held_out(records: list[R], seed: int) -> tuple[list[R], list[R]]:
    """Records to learn from and to check on; the same ones for both where there is but one text."""
    if len({leak_keys(record)[0] for record in records}) < 2:
        return records, records
    split = split_records(records, Shares(validation=VALIDATION_SHARE, test=0.0), seed)
    known = {label for record in split.train for label in labels_in(record)}
    checked = [record for record in split.validation if checkable(record, known)]
    apart = set(map(id, checked))
    return [record for record in records if id(record) not in apart] or records, checked or list(split.train)


def loop(steps: int, seed: int) -> Any:
    """What the trainer needs to know: AdamW, a rate that falls to nothing."""
    from hanmo.training.fit import FitSettings
    from hanmo.training.optimizer import OptimizerSettings
    from hanmo.training.schedule import Schedule

    optimizer = OptimizerSettings(
        embedding_rate=RATE, vector_rate=RATE, weight_decay=0.01, betas=(0.9, 0.999), muon=False, eps=1e-8
    )
    return FitSettings(
        optimizer,
        max_steps=steps,
        checkpoint_every=steps,
        schedule=Schedule(cooldown=1.0, final=0.0),
        seed=seed,
        evaluations=6,
    )
