"""What the use of a remote model has cost so far: requests, tokens, seconds, and money where the prices are known."""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass, field
from typing import Any

from hanmo.errors import UsageError
from hanmo.language import pick

Prices = tuple[float, float]  # of a million prompt tokens and of a million completion tokens, in any one currency
VARIABLE = "HANMO_PRICES"


@dataclass
class Usage:
    """Counters that several threads may add to.

    Attributes:
        requests: calls that were begun; their repetitions count as ``retries``.
        uncounted: answers that came without a token count, for example streams that were stopped early.
        seconds: time spent in calls, waiting for retries included; parallel calls add up.

    >>> usage = Usage(prices=(2.5, 10.0))
    >>> usage.add(requests=1, prompt_tokens=1000, completion_tokens=200)
    >>> usage.cost
    0.0045
    """

    prices: Prices | None = None
    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **amounts: float) -> None:
        """Add to counters by their names."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    @property
    def cost(self) -> float | None:
        """In the currency of the prices; None where the prices or the tokens of some answer are unknown."""
        return None if self.uncounted else self.counted_cost

    @property
    def counted_cost(self) -> float | None:
        """The cost of the tokens that were counted; None without prices."""
        if self.prices is None:
            return None
        return (self.prompt_tokens * self.prices[0] + self.completion_tokens * self.prices[1]) / 1e6

    def as_dict(self) -> dict[str, Any]:
        """The counters and the cost as plain data."""
        names = ("requests", "retries", "prompt_tokens", "completion_tokens", "uncounted", "seconds")
        return {**{name: getattr(self, name) for name in names}, "cost": self.cost}

    def describe(self) -> str:
        """One line for people."""
        en = f"{self.requests} requests, {self.retries} retries, "
        en += f"{self.prompt_tokens} + {self.completion_tokens} tokens, {self.seconds:.1f} s, "
        zh = f"{self.requests} 次请求，{self.retries} 次重试，"
        zh += f"{self.prompt_tokens} + {self.completion_tokens} 个词元，{self.seconds:.1f} 秒，"
        if self.counted_cost is None:
            return pick(en + "cost unknown (no prices given)", zh + "费用未知（未给出价格）")
        if self.uncounted:
            more_en = f"cost at least {self.counted_cost:.6g}: {self.uncounted} answers came without token counts"
            more_zh = f"费用至少 {self.counted_cost:.6g}：{self.uncounted} 个回答没有给出词元数"
            return pick(en + more_en, zh + more_zh)
        return pick(en + f"cost {self.counted_cost:.6g}", zh + f"费用 {self.counted_cost:.6g}")


def known_prices(given: Prices | None) -> Prices | None:
    """Checked prices: those given, else those in ``HANMO_PRICES`` (such as ``2.5,10``), else None.

    Raises:
        UsageError: not two numbers of at least 0.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        values = tuple(float(price) for price in (given if given is not None else text.split(",") if text else ()))
    except (TypeError, ValueError):
        values = (math.nan,)
    if not values:
        return None
    if len(values) == 2 and all(0 <= price < math.inf for price in values):
        return values[0], values[1]
    raise UsageError(
        "prices are two numbers of at least 0: of a million prompt tokens, and of a million completion tokens",
        where=VARIABLE if given is None else "prices",
        fix=f"for example  {VARIABLE}=2.5,10  or leave it out: the cost is then unknown",
        zh=f"价格应为两个不小于 0 的数：每百万提示词元与每百万生成词元的价格，例如 {VARIABLE}=2.5,10；不知道就不要设置",
    )
