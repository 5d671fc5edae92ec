"""Hanmo (翰墨): from a person's own text to a language model that is measured, explained and served.

>>> import hanmo
>>> model = hanmo.load("runs/my-texts")                      # doctest: +SKIP
>>> model.generate(["从前有座山"], max_new_tokens=20)[0].text  # doctest: +SKIP
>>> hanmo.task("spam", "runs/my-spam")("You won a prize!")     # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["TextClassifier", "__version__", "load", "task"]


def __getattr__(name: str) -> Any:
    """Import the engine only when it is asked for: ``import hanmo`` stays instant."""
    if name == "load":
        from hanmo.inference.loading import load

        return load
    # by their names: these stand above other rooms, and all rooms import the version from here
    if name == "TextClassifier":
        return importlib.import_module("hanmo.estimators").TextClassifier
    if name == "task":
        return importlib.import_module("hanmo.tasks.predictor").task
    raise AttributeError(f"module 'hanmo' has no attribute {name!r}")
