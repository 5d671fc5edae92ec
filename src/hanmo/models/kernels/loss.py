"""Softmax cross-entropy of the next token, from hidden states, without ever holding all logits.

The logits of a chunk of positions are computed, turned into their own gradients where they lie, and used up by the
products that give the gradients of the hidden states and of the output embedding. So a chunk's logits are never
computed twice, and are gone before the next chunk (as in Liger's fused loss, Hsu et al. 2024).

Letters in names: M positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hanmo.errors import ModelError
from hanmo.models.kernels import native
from hanmo.models.kernels.elementwise import differentiable
from hanmo.models.kernels.products import matmul

CHUNK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 26}  # of a chunk: 32 MB, 256 MB
FEWEST_ROWS = 256  # of a chunk: each one reads the output embedding twice and adds to its gradient


@dataclass(frozen=True)
class Settings:
    """What decides the scores beside the tensors: ``softcap * tanh((scale * hidden @ weight.T + bias) / softcap)``."""

    scale: float
    softcap: float | None
    rows: int  # positions in a chunk


def token_loss(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    weights_M: Tensor | None = None,
) -> Tensor:
    """Sum of the negative log-likelihoods of the targets, in nats; a scalar, float32 (float64 from float64).

    Args:
        hidden_MD: states after the final norm.
        weight_VD: the output embedding.
        targets_M: token ids; positions with a target below zero are left out, and nothing is computed for them.
        bias: of the scores, ``[V]``.
        scale: of the hidden states.
        softcap: scores are squeezed into (-softcap, softcap) by tanh (Gemma 2).
        chunk: positions computed at once; by default so many that their logits stay in the processor's cache.
        weights_M: a factor for each position's loss, a constant: no gradient goes to it.

    Raises:
        ModelError: shapes that do not fit, or a target outside the vocabulary.

    >>> token_loss(torch.zeros(3, 4), torch.zeros(8, 4), torch.tensor([1, -1, 2]))  # 2 ln 8
    tensor(4.1589)
    """
    check(hidden_MD, weight_VD, targets_M, bias, weights_M)
    settings = Settings(scale, softcap, chunk or default_rows(hidden_MD, weight_VD))
    if differentiable(hidden_MD, weight_VD, bias):
        return Loss.apply(hidden_MD, weight_VD, bias, targets_M, weights_M, settings)  # type: ignore[no-untyped-call, no-any-return]
    return run_loss(hidden_MD, weight_VD, bias, targets_M, weights_M, settings, (False, False, False))[0]


def token_logprobs(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Log-probability of each target, in nats, ``[M]``; 0 where the target is below zero.

    Arguments and errors as for :func:`token_loss`. The backward pass computes the logits a second time: their gradients
    are not known before those of the result.
    """
    check(hidden_MD, weight_VD, targets_M, bias, None)
    settings = Settings(scale, softcap, chunk or default_rows(hidden_MD, weight_VD))
    if differentiable(hidden_MD, weight_VD, bias):
        return LogProbabilities.apply(hidden_MD, weight_VD, bias, targets_M, settings)  # type: ignore[no-untyped-call, no-any-return]
    return run_logprobs(hidden_MD, weight_VD, bias, targets_M, settings)[0]


def check(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, bias_V: Tensor | None, weights_M: Tensor | None
) -> None:
    """Refuse what the kernels must not see."""
    M, V = len(hidden_MD), len(weight_VD)
    fits = hidden_MD.dim() == weight_VD.dim() == 2 and hidden_MD.shape[1:] == weight_VD.shape[1:]
    fits = fits and targets_M.shape == (M,) and (bias_V is None or bias_V.shape == (V,))
    if not fits or (weights_M is not None and weights_M.shape != (M,)):
        shapes = [None if x is None else tuple(x.shape) for x in (hidden_MD, weight_VD, targets_M, bias_V, weights_M)]
        raise ModelError(
            "the shapes of hidden states, output embedding, targets, bias and weights do not fit: "
            + ", ".join(map(str, shapes)),
            fix="they must be [M, D], [V, D], [M], [V] or none, and [M] or none",
            zh="隐藏状态、输出嵌入、目标、偏置与权重的形状不相容：" + "、".join(map(str, shapes)),
        )
    # On a GPU the check would wait for the device, and gather checks there by itself.
    if hidden_MD.device.type == "cpu" and M and not torch.compiler.is_compiling():
        largest = int(targets_M.max())
        if largest >= V:
            raise ModelError(
                f"a target is token {largest}, the vocabulary has {V}",
                why="the text was encoded with another tokenizer than the network's",
                fix="encode it with the tokenizer of the model's folder",
                zh=f"目标词元编号 {largest} 超出词表大小 {V}；请使用模型目录中的分词器",
            )


def default_rows(hidden_MD: Tensor, weight_VD: Tensor) -> int:
    """Positions in a chunk, by measurement: enough for the products, few enough for the cache."""
    logits = CHUNK_LOGITS.get(hidden_MD.device.type, CHUNK_LOGITS["cuda"])
    return max(FEWEST_ROWS, logits // max(1, weight_VD.size(0)))


@dataclass
class Operands:
    """What the products read: the positions that count, in the type of the products.

    Under autocast that is autocast's type, else the hidden states' own.
    """

    hidden_MD: Tensor  # scaled
    weight_VD: Tensor
    bias_V: Tensor | None
    targets_M: Tensor
    kept_M: Tensor | None  # which of the given positions these are; None: all

    @classmethod
    def of(
        cls, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_M: Tensor, scale: float
    ) -> Operands:
        device, kept_M = hidden_MD.device.type, None
        if not torch.compiler.is_compiling():  # (a graph needs shapes that do not depend on the data)
            counted_M = targets_M >= 0
            if not bool(counted_M.all()):
                kept_M = counted_M.nonzero().squeeze(1)
                hidden_MD, targets_M = hidden_MD[kept_M], targets_M[kept_M]
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
        if scale != 1:
            hidden_MD = hidden_MD * scale
        bias_V = None if bias_V is None else bias_V.to(logit_type(dtype)).contiguous()
        targets_M = targets_M.long().contiguous()
        return cls(hidden_MD.to(dtype), weight_VD.to(dtype), bias_V, targets_M, kept_M)

    def chunks(self, rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Place, logits (a tensor of their own) and targets of each chunk."""
        for start in range(0, len(self.targets_M), rows):
            place = slice(start, start + rows)
            logits_MV = matmul(self.hidden_MD[place], self.weight_VD.t())
            yield place, logits_MV.to(logit_type(logits_MV.dtype)), self.targets_M[place]


def logit_type(dtype: torch.dtype) -> torch.dtype:
    """In what the softmax is computed: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def softmax_step(
    logits_MV: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    coefficients_M: Tensor | None,
    softcap: float | None,
    *,
    lse_M: Tensor | None = None,
    gradients: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets, the logs of the sums of exponentials, and what the logits became.

    With ``gradients`` that is the gradient, by the logits before bias and cap, of ``coefficients_M`` (default 1) times
    minus the log-probabilities; without, nothing of use. ``lse_M``: these logs, if they are known already.
    """
    cap = softcap or 0.0
    if native.usable(logits_MV, bias_V, coefficients_M, lse_M):
        sums_M = logits_MV.new_empty(len(targets_M)) if lse_M is None else lse_M.contiguous()
        logprobs_M = torch.empty_like(sums_M)
        coefficients_M = None if coefficients_M is None else coefficients_M.contiguous()
        logits_MV, targets_M = logits_MV.contiguous(), targets_M.contiguous()
        given, how = (logits_MV, bias_V, targets_M, coefficients_M), (cap, *logits_MV.shape)
        flags = (int(lse_M is not None), int(gradients))
        native.call("token_loss", "ppppflliipp", *given, *how, *flags, sums_M, logprobs_M)
        return logprobs_M, sums_M, logits_MV
    scores_MV = logits_MV if bias_V is None else logits_MV + bias_V
    if cap:
        scores_MV = cap * torch.tanh(scores_MV / cap)
    sums_M = torch.logsumexp(scores_MV, -1) if lse_M is None else lse_M
    index_M1, counted_M1 = targets_M.clamp(min=0).unsqueeze(1), (targets_M >= 0).unsqueeze(1)
    logprobs_M = (scores_MV.gather(1, index_M1).squeeze(1) - sums_M) * counted_M1.squeeze(1)
    if gradients:
        logits_MV = (scores_MV - sums_M.unsqueeze(1)).exp()
        logits_MV = logits_MV.scatter_add(1, index_M1, logits_MV.new_full(index_M1.shape, -1.0)) * counted_M1
        if cap:
            logits_MV = logits_MV * (1 - (scores_MV / cap) ** 2)
        if coefficients_M is not None:
            logits_MV = logits_MV * coefficients_M.unsqueeze(1)
    return logprobs_M, sums_M, logits_MV


class Gradients:
    """The gradients of hidden states, output embedding and bias, as wanted, from the chunks' gradients by logits."""

    def __init__(self, operands: Operands, shape: torch.Size, wanted: tuple[bool, bool, bool]) -> None:
        self.operands, self.shape, self.wanted = operands, shape, wanted
        like_MD = operands.hidden_MD
        self.hidden_MD = like_MD.new_empty(like_MD.shape) if wanted[0] else None
        self.weight_VD: Tensor | None = None
        self.bias_V: Tensor | None = None

    def add(self, place: slice, gradient_MV: Tensor) -> None:
        """What one chunk contributes."""
        if self.wanted[2]:
            total_V = gradient_MV.sum(0)
            self.bias_V = total_V if self.bias_V is None else self.bias_V + total_V
        gradient_MV = gradient_MV.to(self.operands.hidden_MD.dtype)
        if self.hidden_MD is not None:
            self.hidden_MD[place] = matmul(gradient_MV, self.operands.weight_VD)
        if self.wanted[1]:  # summed in float32 at least
            part_VD = matmul(gradient_MV.t(), self.operands.hidden_MD[place])
            part_VD = part_VD.to(logit_type(part_VD.dtype))
            self.weight_VD = part_VD if self.weight_VD is None else self.weight_VD.add_(part_VD)

    def results(self, scale: float, likes: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor | None, ...]:
        """All three, shaped and typed like the tensors they belong to; ``scale`` is that of the hidden states."""
        d_hidden_MD, kept_M = self.hidden_MD, self.operands.kept_M
        if d_hidden_MD is not None:
            d_hidden_MD = d_hidden_MD if scale == 1 else d_hidden_MD * scale
            if kept_M is not None:
                d_hidden_MD = d_hidden_MD.new_zeros(self.shape).index_copy_(0, kept_M, d_hidden_MD)
        found = (d_hidden_MD, self.weight_VD, self.bias_V)
        return tuple(
            None if like is None or not wanted else torch.zeros_like(like) if tensor is None else tensor.to(like.dtype)
            for wanted, tensor, like in zip(self.wanted, found, likes, strict=True)
        )


def run_loss(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    weights_M: Tensor | None,
    settings: Settings,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The loss and the wanted gradients."""
    device, exact = hidden_MD.device.type, torch.float32 if hidden_MD.device.type == "mps" else torch.float64
    operands = Operands.of(hidden_MD, weight_VD, bias_V, targets_M, settings.scale)
    if weights_M is not None:
        weights_M = weights_M.detach().to(logit_type(hidden_MD.dtype))
        weights_M = weights_M if operands.kept_M is None else weights_M[operands.kept_M]
    loss = torch.zeros((), dtype=exact, device=hidden_MD.device)
    gradients = Gradients(operands, hidden_MD.shape, wanted)
    with torch.autocast(device, enabled=False):
        for place, logits_MV, targets in operands.chunks(settings.rows):
            factors = None if weights_M is None else weights_M[place]
            logprobs, _, gradient_MV = softmax_step(
                logits_MV, operands.bias_V, targets, factors, settings.softcap, gradients=any(wanted)
            )
            loss = loss - (logprobs if factors is None else logprobs * factors).sum(dtype=exact)
            if any(wanted):
                gradients.add(place, gradient_MV)
    return loss.to(logit_type(hidden_MD.dtype)), gradients.results(settings.scale, (hidden_MD, weight_VD, bias_V))


class Loss(Function):
    """``token_loss``: the forward pass computes the gradients, the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        weights_M: Tensor | None,
        settings: Settings,
    ) -> Tensor:
        loss, gradients = run_loss(
            hidden_MD, weight_VD, bias_V, targets_M, weights_M, settings, ctx.needs_input_grad[:3]
        )
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @native.first_derivative
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if gradient is None else gradient * factor.to(gradient.dtype) for gradient in ctx.saved_tensors)
        return (*scaled, None, None, None)


def run_logprobs(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_M: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets, and the logs of the sums of exponentials of the positions that count."""
    operands = Operands.of(hidden_MD, weight_VD, bias_V, targets_M, settings.scale)
    logprobs, sums = [hidden_MD.new_zeros(0, dtype=logit_type(hidden_MD.dtype))], []
    with torch.autocast(hidden_MD.device.type, enabled=False):
        for _, logits_MV, targets in operands.chunks(settings.rows):
            found, sum_of, _ = softmax_step(logits_MV, operands.bias_V, targets, None, settings.softcap)
            logprobs.append(found)
            sums.append(sum_of)
    logprobs_M = torch.cat(logprobs)
    lse_M = torch.cat(sums) if sums else logprobs_M
    if operands.kept_M is not None:
        logprobs_M = logprobs_M.new_zeros(hidden_MD.size(0)).index_copy_(0, operands.kept_M, logprobs_M)
    return logprobs_M, lse_M


class LogProbabilities(Function):
    """``token_logprobs``."""

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_M: Tensor, settings: Settings
    ) -> Tensor:
        logprobs_M, lse_M = run_logprobs(hidden_MD, weight_VD, bias_V, targets_M, settings)
        ctx.save_for_backward(hidden_MD, weight_VD, bias_V, targets_M, lse_M)
        ctx.settings, device = settings, hidden_MD.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return logprobs_M

    @staticmethod
    @native.first_derivative
    def backward(ctx: Any, factors_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MD, weight_VD, bias_V, targets_M, lse_M = ctx.saved_tensors
        settings, (device, dtype, enabled) = ctx.settings, ctx.autocast
        with torch.autocast(device, dtype, enabled):  # the same products as in the forward pass
            operands = Operands.of(hidden_MD, weight_VD, bias_V, targets_M, settings.scale)
        if operands.kept_M is not None:
            factors_M = factors_M[operands.kept_M]
        gradients = Gradients(operands, hidden_MD.shape, ctx.needs_input_grad[:3])
        with torch.autocast(device, enabled=False):
            for place, logits_MV, targets in operands.chunks(settings.rows):
                given = (operands.bias_V, targets, -factors_M[place], settings.softcap)
                gradients.add(place, softmax_step(logits_MV, *given, lse_M=lse_M[place], gradients=True)[2])
        return (*gradients.results(settings.scale, (hidden_MD, weight_VD, bias_V)), None, None)
