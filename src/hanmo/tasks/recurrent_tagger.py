"""A tagger trained from nothing: a bidirectional LSTM under a conditional random field (Huang et al. 2015).

It learns with the trainer and the objective that fine-tuning uses, on pieces of words that it finds in its own records.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hanmo.data.splits import Shares
from hanmo.data.tasks.splits import label_names, split_records
from hanmo.data.tasks.types import Tagged
from hanmo.tasks.base import System
from hanmo.tasks.tagging import Network, Tags, with_tokens

VOCABULARY = 6000  # pieces of words
EMBEDDING, HIDDEN = 128, 128  # sizes; the hidden one of each direction
DROPOUT = 0.3
RATE = 3e-3
BATCH = 32  # sentences of a step
EPOCHS, LEAST_STEPS = 8, 200
LONGEST = 512  # pieces of a sentence that training reads
VALIDATION_SHARE = 0.1  # kept to choose the best weights by, where no validation records are given


class RecurrentTagger(System[Tagged, Tags]):
    """A BiLSTM-CRF that learns from the records it is given.

    Args:
        epochs: passes over the records; small data are read until there are a few hundred steps.
        seed: of weights, order and noise.
    """

    kind, learns = "recurrent", True

    def __init__(self, *, epochs: float = EPOCHS, seed: int = 0) -> None:
        self.name, self.epochs, self.seed = "BiLSTM-CRF", epochs, seed
        self.network: Network | None = None

    def fit(self, train: Sequence[Tagged], validation: Sequence[Tagged] = ()) -> None:
        """Train; the weights that predict the validation records best are kept (a tenth, where none are given)."""
        import torch

        from hanmo.inference.encoder import TextEncoder
        from hanmo.models.heads import HeadConfig
        from hanmo.models.recurrent import RecurrentConfig, RecurrentEncoder
        from hanmo.text.training import train_bpe
        from hanmo.training.fit import Trainer
        from hanmo.training.objectives.rows import RowMaker
        from hanmo.training.objectives.supervised import Tagging

        labels = label_names(with_tokens(train))
        known = set(labels)
        checked = [record for record in validation if record.tokens and known.issuperset(record.tags)]
        chosen = with_tokens(train)
        if not checked:
            chosen, checked = held_out(chosen, self.seed)
        tokenizer = train_bpe((record.text for record in chosen), VOCABULARY)
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
            model = RecurrentEncoder(config, HeadConfig("token-classification", labels, crf=True))
        model.initialize(self.seed)
        rows = RowMaker.of(model, tokenizer, max_length=LONGEST, truncate=True)
        head = model.head.config
        prepared = [Tagging.prepare(records, rows, head).examples for records in (chosen, checked)]
        objective = Tagging(prepared[0], prepared[1], batch_size=BATCH, micro_batch=BATCH, seed=self.seed)
        steps = max(LEAST_STEPS, round(self.epochs * len(chosen) / BATCH))
        with tempfile.TemporaryDirectory() as run:
            Trainer(model, objective, loop(steps, self.seed), Path(run), device=torch.device("cpu")).fit()
        self.network = Network(TextEncoder(model, tokenizer, name=self.name))

    def answer(self, records: Sequence[Tagged]) -> list[Tags]:
        """The likeliest sequence of tags."""
        assert self.network is not None, "fit it first"
        return self.network.answer(records)

    def save(self, folder: Path) -> Path:
        """Write the network."""
        from hanmo.models.checkpoints.recurrent import save_recurrent

        assert self.network is not None, "fit it first"
        encoder = self.network.encoder
        save_recurrent(folder, encoder.model, encoder.tokenizer, {"kind": "model", "task": "tagging"})
        return folder


def held_out(records: list[Tagged], seed: int) -> tuple[list[Tagged], list[Tagged]]:
    """Records to learn from and to check on; the same ones for both where there is but one text."""
    if len({record.tokens for record in records}) < 2:
        return records, records
    split = split_records(records, Shares(validation=VALIDATION_SHARE, test=0.0), seed)
    known = {tag for record in split.train for tag in record.tags}
    checked = [record for record in split.validation if known.issuperset(record.tags)]
    return [record for record in records if record not in checked] or records, checked or split.train


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
