"""Word perplexity in the conventional way.

``exp`` of the mean negative log-likelihood per token: every word of the text counts, ``<unk>`` like any other, and so
does the end of each line, ``<eos>``. What a model sees before a word is that of the literature, too: an n-gram model
the words of the sentence (as KenLM and SRILM do), a recurrent network the whole text up to there, its state carried on
from line to line (Mikolov et al. 2010; Zaremba et al. 2014), a transformer as many of the tokens before as its context
holds. Only the very first word is seen after an ``<eos>`` instead of after the text before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hanmo.evaluation.likelihood import Floats, Likelihood, WindowModel, describe_unit, summarise
from hanmo.evaluation.windows import token_logprobs
from hanmo.language import pick
from hanmo.models.ngram import NGramModel
from hanmo.models.recurrent import RecurrentModel, State

STREAM_TOKENS = 1024  # tokens that pass a recurrent network at once; changes no result


@dataclass(frozen=True)
class WordPerplexity:
    """The word perplexity of a model on one text.

    ``likelihood`` holds the sums; its intervals resample blocks of about 1,000 tokens, since neighbouring sentences
    depend on one another. ``sentences`` and ``unknown`` count lines and ``<unk>`` tokens.
    """

    split: str
    likelihood: Likelihood
    sentences: int
    unknown: int

    @property
    def perplexity(self) -> float:
        """exp of nats per token, the ends of lines included."""
        return self.likelihood.perplexity

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the perplexity; None where the text is too short for one."""
        loss = self.likelihood.loss_interval
        return None if loss is None else (math.exp(loss.low), math.exp(loss.high))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "split": self.split,
            "name": self.likelihood.name,
            "perplexity": self.perplexity,
            "interval": None if self.interval is None else list(self.interval),
            "loss": self.likelihood.loss,
            "nats": self.likelihood.nats,
            "tokens": self.likelihood.tokens,
            "sentences": self.sentences,
            "unknown": self.unknown,
            "bits_per_byte": self.likelihood.bits_per_byte,
            "resampled": self.likelihood.unit,
            "units": self.likelihood.units,
            "resamples": self.likelihood.resamples,
        }


def word_perplexity(
    model: RecurrentModel | NGramModel | WindowModel,
    ids: NDArray[Any],
    *,
    name: str,
    split: str,
    eos_id: int,
    counts: dict[str, int],
) -> WordPerplexity:
    """Score a text of sentences that each end with ``eos_id``.

    Args:
        model: how it reads the text is said at the top of this file.
        ids: the whole text, [T].
        name, split: what model and text are called.
        counts: ``sentences``, ``unknown`` and ``bytes`` of the text, as a word corpus reports them.

    Raises:
        DataError: there is nothing to score.
        ModelError: the model gives NaN.
    """
    logprobs = word_logprobs(model, ids, eos_id)
    likelihood = summarise(name, logprobs, [0, ids.size], [counts["bytes"]])
    return WordPerplexity(split, likelihood, counts["sentences"], counts["unknown"])


def word_logprobs(model: RecurrentModel | NGramModel | WindowModel, ids: NDArray[Any], eos_id: int) -> Floats:
    """The log-probability of each token, float64 [T]."""
    if isinstance(model, NGramModel):
        return model.logprobs(ids)
    if isinstance(model, RecurrentModel):
        return stream_logprobs(model, ids, eos_id)
    return token_logprobs(
        model.score, ids, start_id=eos_id, context_length=model.context_length, stride=None, progress=True
    )


@torch.inference_mode()
def stream_logprobs(model: RecurrentModel, ids: NDArray[Any], start_id: int) -> Floats:
    """Log P(ids[t] | start_id, ids[:t]) from a recurrent network that reads the text in one go, float64 [T]."""
    training, device = model.training, model.output_weight.device
    model.eval()
    state: State | None = None
    logprobs, last = np.empty(ids.size), start_id
    for begin in range(0, ids.size, STREAM_TOKENS):
        targets = np.asarray(ids[begin : begin + STREAM_TOKENS]).astype(np.int64)
        inputs = torch.from_numpy(np.concatenate([[last], targets[:-1]])).to(device)
        logits_1TV, state = model(inputs.unsqueeze(0), state)
        chosen = logits_1TV[0].log_softmax(-1).gather(1, torch.from_numpy(targets).to(device).unsqueeze(1))
        logprobs[begin : begin + targets.size] = chosen.squeeze(1).double().cpu().numpy()
        last = int(targets[-1])
    model.train(training)
    return logprobs


def describe_words(rows: Sequence[WordPerplexity]) -> str:
    """The perplexities for people, a line each, and what was counted."""
    lines = []
    for row in rows:
        interval = row.interval
        spread = pick("too short for an interval", "文本太短，没有置信区间")
        if interval is not None:
            shown = f"{interval[0]:,.2f} - {interval[1]:,.2f}"
            spread = pick(f"95% CI {shown}", f"95% 置信区间 {shown}")
        counted = pick(
            f"{row.likelihood.tokens:,} tokens: {row.sentences:,} ends of lines, {row.unknown:,} <unk>",
            f"{row.likelihood.tokens:,} 个词元，其中行尾 {row.sentences:,}、<unk> {row.unknown:,}",
        )
        label = pick(f"{row.split} word perplexity", f"{row.split} 词困惑度")
        lines.append(f"{label} {row.perplexity:,.2f}  ({spread}; {counted})")
    if rows:
        unit, unit_zh = describe_unit(rows[0].likelihood.unit)
        resamples = rows[0].likelihood.resamples
        lines.append(
            pick(
                f"per token, ends of lines and <unk> count; intervals: bootstrap over {unit}, {resamples:,} resamples",
                f"按词元计，含行尾与 <unk>；区间：对{unit_zh.removeprefix('个')}做自助法，重抽样 {resamples:,} 次",
            )
        )
    return "\n".join(lines)
