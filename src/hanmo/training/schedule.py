"""The learning rate over a run, as a share of its peak."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Warm-up, a plateau, and a linear fall: WSD (Hu et al. 2024). A cool-down of 1 is the linear schedule of BERT.

    Args:
        warmup_steps: steps over which the rate rises.
        warmup: the same as a share of the horizon; the longer of both counts.
        cooldown: the last share of the horizon, in which the rate falls.
        final: share of the peak at the end.

    >>> schedule = Schedule()
    >>> schedule.scale(0.3, 500), round(schedule.scale(1.0, 900), 2)
    (1.0, 0.02)
    """

    warmup_steps: int = 20  # short: blocks that start as identities bear full rates early
    warmup: float = 0.0
    cooldown: float = 0.6
    final: float = 0.02

    def scale(self, fraction: float, step: int) -> float:
        """Share of the peak rate.

        Args:
            fraction: of the horizon that is done.
            step: optimizer steps done.
        """
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.warmup > 0:  # the first step must not be empty: a fraction of zero would train nothing
            rise = min(rise, max(fraction, 0.02 * self.warmup) / self.warmup)
        fall = min(1.0, (1 - fraction) / self.cooldown) if self.cooldown > 0 else 1.0
        return max(0.0, rise) * max(self.final, fall)
