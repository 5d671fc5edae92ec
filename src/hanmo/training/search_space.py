"""What a search varies: the settings that matter and that the user left to the dial, near the dial's values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hanmo.errors import missing_package

LOWEST_RATE = 1 / 4  # times that of the scaling rule
HIGHEST_RATE = {False: 2.0, True: 4.0}  # by whether trials are whole runs: short ones favour rates that are too high
DECAY_FACTOR = 4  # the effect of weight decay is small and shows late: smaller differences would be noise


def require_optuna() -> Any:
    """The package that proposes and prunes.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise missing_package("optuna", "search", "--search") from error
    return optuna


@dataclass(frozen=True)
class Dimension:
    """A setting that is varied.

    Args:
        name: of the setting.
        values: what is tried, in order.
        default: the one among them that the run would have without a search.
        lengthens: a trial takes time in proportion to it.
    """

    name: str
    values: tuple[Any, ...]
    default: Any
    lengthens: bool = False


def rates_around(default: float, least: float, most: float) -> tuple[float, ...]:
    """Values from ``least`` to ``most`` times the default, each sqrt(2) times the one before, two digits each.

    >>> rates_around(0.02, 0.5, 2)
    (0.01, 0.014, 0.02, 0.028, 0.04)
    """
    low, high = round(2 * math.log2(least)), round(2 * math.log2(most))
    values = [default if power == 0 else float(f"{default * 2 ** (power / 2):.2g}") for power in range(low, high + 1)]
    return tuple(sorted(set(values)))


def neighbours(name: str, default: Any, factor: int, *, most: float = math.inf) -> list[Dimension]:
    """A setting with its value, a ``factor`` less and a ``factor`` more; none where nothing else is allowed.

    >>> neighbours("batch_size", 8, 2, most=12)[0].values
    (4, 8)
    """
    kind = type(default)
    values = sorted({kind(default / factor), default, kind(default * factor)})
    allowed = tuple(value for value in values if value == default or 0 < value <= most)
    return [Dimension(name, allowed, default, lengthens=name == "epochs")] if len(allowed) > 1 else []


def usual_dimensions(
    settings: Any, computed: Mapping[str, str], share: float, *, most_examples: int, adapters: bool = False
) -> list[Dimension]:
    """What matters and was left to the dial: rate, batch, weight decay; for adapters their rank; for whole runs the
    number of passes.

    Args:
        settings: of the run, settled.
        computed: which of them the user did not choose.
        share: of the whole run that a trial gets. Short trials favour rates that are too high for the run.
        most_examples: a batch cannot be larger.
    """
    found: list[Dimension] = []
    if "learning_rate" in computed:
        rate = settings.learning_rate
        found.append(Dimension("learning_rate", rates_around(rate, LOWEST_RATE, HIGHEST_RATE[share >= 1]), rate))
    if "batch_size" in computed and settings.max_steps is None:  # with as many steps, a larger batch is a longer run
        found += neighbours("batch_size", settings.batch_size, 2, most=most_examples)
    if "weight_decay" in computed:
        found += neighbours("weight_decay", settings.weight_decay, DECAY_FACTOR)
    if adapters and "rank" in computed:
        found += neighbours("rank", settings.rank, 2)
    if "epochs" in computed and share >= 1:
        found += neighbours("epochs", settings.epochs, 2)
    return found
