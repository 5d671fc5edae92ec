"""Objectives: how a dataset becomes batches, and a batch a loss; see ``base.py`` for what all have in common."""

from hanmo.training.objectives.base import WHOLE, Batch, ExampleObjective, Objective, Order, Pick, Share
from hanmo.training.objectives.causal import CausalLanguageModeling, PackedBatch, TruncatedBackpropagation

__all__ = [
    "WHOLE",
    "Batch",
    "CausalLanguageModeling",
    "ExampleObjective",
    "Objective",
    "Order",
    "PackedBatch",
    "Pick",
    "Share",
    "TruncatedBackpropagation",
]
