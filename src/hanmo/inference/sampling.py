"""How the next token is chosen: sampling settings, logit processors, the draw.

The order and the formulas are those of ``transformers`` (``GenerationMixin._get_logits_processor`` and
``logits_process.py``), and the results are equal to it bit for bit: repetition penalty, no-repeat n-gram, and only when
sampling: temperature, top-k, top-p, min-p. What is removed becomes ``-inf``.

Tensors are used through their methods alone, so this file can be imported (for the settings) without loading torch.
Letters in names: B rows, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

from hanmo.errors import UsageError, nearest
from hanmo.language import pick

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GREEDY_BELOW = 1e-5  # a temperature under this would only overflow the division; vLLM uses the same border
MAX_STOPS = 16
MAX_STOP_LENGTH = 64
MAX_LOGPROBS = 20  # alternatives to a token; as many as OpenAI gives


class Constraint(Protocol):
    """Says which tokens may come next; one object may serve many texts."""

    def allowed(self, ids: Sequence[int]) -> Sequence[int] | None:
        """The tokens that may follow ``ids``, the tokens written so far; None: all; none: the text ends here."""
        ...


@dataclass
class Sampling:
    """Everything that decides which tokens are chosen and when to stop.

    Attributes:
        max_new_tokens: at most so many tokens are generated per choice.
        temperature: logits are divided by it; 0 (below 1e-5) takes the most probable token every time.
        top_k: sample from the k most probable tokens (ties with the k-th stay); 0 is off.
        top_p: sample from the smallest set of tokens that holds this much probability; 1 is off.
        min_p: remove tokens less probable than this share of the most probable one; 0 is off.
        repetition_penalty: tokens already in the prompt or the output become less likely; 1 is off.
        no_repeat_ngram_size: no sequence of so many tokens occurs twice, prompt included; 0 is off.
        seed: the same seed gives the same text; None draws a new one each time.
        stop: texts that end the generation; they are cut from the output.
        n: choices per prompt; choice i is drawn with ``seed + i``.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: give the log-probability of each token, and so many of the most probable ones; None gives none.
        constraint: says which tokens may come next (:mod:`hanmo.inference.constraints`).
        adapter: the name of an adapter that was added to the model; None: the model as it is.

    Raises:
        UsageError: a value of the wrong type or out of its range; the message names the field and the range.

    >>> Sampling(temperature=0.8, stop="\\n").stop
    ['\\n']
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    n: int = 1
    ignore_eos: bool = False
    logprobs: int | None = None
    constraint: Constraint | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        whole_number("max_new_tokens", self.max_new_tokens, 1, 1_000_000)
        real_number("temperature", self.temperature, 0, 10, "0 is greedy, 0.8 is usual for free text")
        whole_number("top_k", self.top_k, 0, 1_000_000, "0 is off")
        real_number("top_p", self.top_p, 0, 1, "1 is off")
        real_number("min_p", self.min_p, 0, 1, "0 is off")
        real_number("repetition_penalty", self.repetition_penalty, 0.1, 10, "1 is off, 1.1 is usual")
        whole_number("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, 1_000, "0 is off")
        if self.seed is not None:
            whole_number("seed", self.seed, 0, 2**63 - 1)
        whole_number("n", self.n, 1, 16)
        if self.logprobs is not None:
            whole_number("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.constraint is not None and not callable(getattr(self.constraint, "allowed", None)):
            raise refusal("constraint", "an object with a method allowed(ids)", self.constraint)
        if not isinstance(self.ignore_eos, bool):
            raise refusal("ignore_eos", "true or false", self.ignore_eos)
        self.stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(self.stop, list | tuple) or len(self.stop) > MAX_STOPS:
            raise refusal("stop", f"at most {MAX_STOPS} texts", self.stop)
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise refusal("stop", f"texts of 1 to {MAX_STOP_LENGTH} characters", text)
        self.stop = list(self.stop)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Sampling:
        """Make settings from keyword options.

        Raises:
            UsageError: an unknown name (the nearest known one is given) or a bad value.
        """
        known = [item.name for item in fields(cls)]
        for name in options:
            if name not in known:
                raise UsageError(
                    f"unknown sampling option '{name}'", fix=nearest(name, known), zh=f"未知的采样选项 '{name}'"
                )
        return cls(**options)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken instead of drawing one."""
        return self.temperature < GREEDY_BELOW

    @property
    def simple(self) -> bool:
        """Whether the most probable token is taken as the network has it."""
        return self.greedy and not self.needs_history and self.constraint is None

    @property
    def needs_history(self) -> bool:
        """Whether a choice depends on the tokens before it in other ways than through the network."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0

    @property
    def processing(self) -> tuple[float, ...]:
        """What :func:`process` does: rows for which this is equal may be processed together."""
        filters = (self.temperature, self.top_k, self.top_p, self.min_p)
        return (*filters, self.repetition_penalty, self.no_repeat_ngram_size)


def refusal(name: str, wanted: str, value: object, hint: str = "") -> UsageError:
    """The error for a field that cannot have this value."""
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    note = f" ({hint})" if hint else ""
    return UsageError(
        f"{name} must be {wanted}, not {shown}",
        fix=f"give {name} as {wanted}{note}",
        zh=f"{name} 的值 {shown} 不合要求，应为 {wanted}{note}",
    )


def whole_number(name: str, value: object, low: int, high: int, hint: str = "") -> None:
    """Check that a field is an integer in ``low..high``."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise refusal(name, pick(f"a whole number from {low} to {high}", f"{low} 到 {high} 的整数"), value, hint)


def real_number(name: str, value: object, low: float, high: float, hint: str = "") -> None:
    """Check that a field is a number in ``low..high``; NaN is not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise refusal(name, pick(f"a number from {low} to {high}", f"{low} 到 {high} 的数"), value, hint)


# Processors: float32 logits [B, V] in, new float32 logits [B, V] out -------------------------------------------------


def mark(ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
    """Bool ``[B, V]``: which ids stand in each row. Ids of V and above are padding and mark nothing."""
    B, V = logits_BV.shape
    marks = logits_BV.new_zeros((B, V + 1)).bool()  # the spare column takes the padding
    return marks.scatter_(1, ids_BT.clamp(max=V), True)[:, :V]


def repetition_penalty(logits_BV: Tensor, ids_BT: Tensor, penalty: float) -> Tensor:
    """Make tokens of the row's history less likely: positive logits are divided, negative ones multiplied (CTRL 4.1).

    ``ids_BT`` is prompt and output, int64 ``[B, T]``; each distinct id counts once, ids >= V are padding.
    """
    penalised = (logits_BV * penalty).where(logits_BV < 0, logits_BV / penalty)
    return penalised.where(mark(ids_BT, logits_BV), logits_BV)


def no_repeat_ngram(logits_BV: Tensor, ids_BT: Tensor, size: int) -> Tensor:
    """Remove every token that would complete an n-gram of ``size`` tokens already in the row (prompt included)."""
    V, T = logits_BV.size(1), ids_BT.size(1)
    if size > T:
        return logits_BV
    ngrams_BMn = ids_BT.unfold(1, size, 1)
    tail_B1n = ids_BT[:, T - size + 1 :].unsqueeze(1)
    seen_BM = (ngrams_BMn[..., :-1] == tail_B1n).all(dim=2)
    completions_BM = ngrams_BMn[..., -1].masked_fill(~seen_BM, V)
    return logits_BV.masked_fill(mark(completions_BM, logits_BV), -math.inf)


def temperature(logits_BV: Tensor, value: float) -> Tensor:
    """Flatten (``value`` > 1) or sharpen (< 1) the distribution."""
    return logits_BV / value


def top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row, and all that are equal to the k-th."""
    kth_B1 = logits_BV.topk(min(k, logits_BV.size(1)), dim=1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)


def top_p(logits_BV: Tensor, mass: float) -> Tensor:
    """Keep the most probable tokens until they hold ``mass``, at least one (nucleus sampling, Holtzman et al. 2020)."""
    if logits_BV.device.type == "cpu":
        import numpy as np  # here, so that the settings above are imported in no time

        # NumPy sorts values up to forty times as fast as torch sorts with indices
        ascending_BV = logits_BV.new_tensor(np.sort(logits_BV.numpy(), axis=1))
        count_B1 = nucleus_tail(ascending_BV, mass).sum(dim=1, keepdim=True)
        remove_BV = logits_BV < ascending_BV.gather(1, count_B1)
        if (remove_BV.sum(dim=1, keepdim=True) == count_B1).all():  # no tie at the border: the values decide
            return logits_BV.masked_fill(remove_BV, -math.inf)
    ascending_BV, order_BV = logits_BV.sort(dim=1)
    tail_BV = nucleus_tail(ascending_BV, mass)
    return logits_BV.masked_fill(tail_BV.scatter(1, order_BV, tail_BV), -math.inf)


def nucleus_tail(ascending_BV: Tensor, mass: float) -> Tensor:
    """Bool ``[B, V]``: the least probable tokens, which together hold at most ``1 - mass``; never the last."""
    tail_BV = ascending_BV.softmax(dim=1).cumsum(dim=1) <= 1 - mass
    tail_BV[:, -1] = False
    return tail_BV


def min_p(logits_BV: Tensor, share: float) -> Tensor:
    """Keep tokens at least ``share`` times as probable as the most probable one (Nguyen et al. 2024)."""
    probabilities_BV = logits_BV.softmax(dim=1)
    return logits_BV.masked_fill(probabilities_BV < share * probabilities_BV.amax(dim=1, keepdim=True), -math.inf)


def process(logits_BV: Tensor, ids_BT: Tensor, sampling: Sampling) -> Tensor:
    """Apply every processor that is switched on, in the order of ``transformers``.

    Args:
        logits_BV: float32 logits of the next token.
        ids_BT: prompt and output of each row, int64; ids >= V are padding.
        sampling: the settings.

    Returns:
        float32 logits ``[B, V]``; removed tokens are ``-inf``.
    """
    if sampling.repetition_penalty != 1:
        logits_BV = repetition_penalty(logits_BV, ids_BT, sampling.repetition_penalty)
    if sampling.no_repeat_ngram_size:
        logits_BV = no_repeat_ngram(logits_BV, ids_BT, sampling.no_repeat_ngram_size)
    if sampling.greedy:
        return logits_BV
    if sampling.temperature != 1:
        logits_BV = temperature(logits_BV, sampling.temperature)
    if sampling.top_k:
        logits_BV = top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = top_p(logits_BV, sampling.top_p)
    if sampling.min_p > 0:
        logits_BV = min_p(logits_BV, sampling.min_p)
    return logits_BV


def draw(logits_BV: Tensor, generators: Sequence[torch.Generator] | None) -> list[int]:
    """Choose one token per row: the most probable, or one drawn with the row's own generator.

    A row draws only from its own generator, so its tokens do not depend on who else is in the batch.
    """
    if generators is None:
        return logits_BV.argmax(dim=1).tolist()
    probabilities_BV = logits_BV.softmax(dim=1)
    return [
        int(row.multinomial(1, generator=generator))
        for row, generator in zip(probabilities_BV, generators, strict=True)
    ]
