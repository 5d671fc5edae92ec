"""Heads: what turns the hidden states of any encoder into the answer of a task.

One class serves transformers and recurrent networks, for three kinds of answer: one label for a text, one for each
token (independently, or as the best path of a conditional random field), or the two ends of a span.

Letters in names: B texts, T tokens, D hidden size, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanmo.errors import ModelError, nearest

TASKS = ("sequence-classification", "token-classification", "span-extraction")
POOLINGS = ("first", "last", "mean")


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016), as GPT-2, Gemma and T5 v1.1 have it."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """An elementwise function by its name.

    Raises:
        ModelError: none of that name.
    """
    if name not in ACTIVATIONS:
        raise ModelError(
            f"the activation '{name}' is not known",
            where="config.json",
            fix="known: " + ", ".join(ACTIVATIONS),
            zh=f"不认识的激活函数 '{name}'，目前支持：" + "、".join(ACTIVATIONS),
        )
    return ACTIVATIONS[name]


@dataclass(frozen=True)
class TransformConfig:
    """A dense layer of the hidden size, an activation and, if ``norm``, a layer norm."""

    activation: str = "gelu"
    bias: bool = True
    norm: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-12


@dataclass(frozen=True)
class HeadConfig:
    """What the head answers and how it is built.

    Raises:
        ModelError: an unknown task or pooling, too few labels, or a CRF where there is no sequence of labels.
    """

    task: str = "sequence-classification"  # one of TASKS
    labels: tuple[str, ...] = ("0", "1")  # names, in the order of the outputs; for spans ("start", "end")
    pooling: str = "first"  # which hidden state stands for a text: one of POOLINGS; used by sequence-classification
    transform: TransformConfig | None = None  # between the hidden state and the output
    bias: bool = True
    crf: bool = False  # token-classification: score whole sequences of labels
    multi_label: bool = False  # sequence-classification: any number of labels can hold at once
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for value, known, name in ((self.task, TASKS, "task"), (self.pooling, POOLINGS, "pooling")):
            if value not in known:
                raise ModelError(
                    f"the {name} '{value}' of the head is not known",
                    where="config.json",
                    fix=nearest(value, known),
                    zh=f"任务头的 {name} '{value}' 不认识。{nearest(value, known)}",
                )
        if not self.labels or len(set(self.labels)) != len(self.labels):
            raise ModelError(
                f"a head needs labels that differ, not {list(self.labels)}",
                where="config.json",
                zh=f"任务头需要互不相同的标签，而不是 {list(self.labels)}",
            )
        if self.task == "span-extraction" and len(self.labels) != 2:
            raise ModelError(
                f"a span has two ends, the head has {len(self.labels)} outputs",
                where="config.json",
                zh=f"抽取片段需要两个输出，而这里有 {len(self.labels)} 个",
            )
        if self.crf and self.task != "token-classification":
            raise ModelError(
                f"a CRF scores sequences of labels; '{self.task}' has none",
                where="config.json",
                fix="use it with token-classification",
                zh=f"CRF 只用于 token-classification，不用于 {self.task}",
            )


class Transform(nn.Module):
    """Dense layer, activation, norm: the step before the output in BERT's heads."""

    def __init__(self, size: int, config: TransformConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(size, size, bias=config.bias)
        self.activation = activation(config.activation)
        if config.norm:
            self.norm: nn.LayerNorm | None = nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias)
        else:
            self.norm = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.dense(x))
        return x if self.norm is None else self.norm(x)


class Head(nn.Module):
    """Hidden states to label scores.

    Args:
        hidden_size: D of the network below.
        config: task, labels and structure.

    >>> head = Head(8, HeadConfig("token-classification", ("O", "B-PER", "I-PER")))
    >>> head(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 5, 3])
    """

    def __init__(self, hidden_size: int, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.transform = None if config.transform is None else Transform(hidden_size, config.transform)
        self.output = nn.Linear(hidden_size, len(config.labels), bias=config.bias)
        self.crf: Any = None
        if config.crf:
            from hanmo.models.crf import LinearChainCRF

            self.crf = LinearChainCRF(len(config.labels))

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Scores before softmax: ``[B, L]`` for one label a text, else ``[B, T, L]``.

        With a CRF these are its emissions; ``head.crf`` turns them into a loss or the best path.

        Args:
            hidden_BTD: what the network computed.
            mask_BT: bool, True for real tokens; default all.
        """
        x = hidden_BTD
        if self.config.task == "sequence-classification":
            x = pool(hidden_BTD, mask_BT, self.config.pooling)
        if self.transform is not None:
            x = self.transform(x)
        return self.output(F.dropout(x, self.config.dropout, self.training))  # type: ignore[no-any-return]


def pool(hidden_BTD: Tensor, mask_BT: Tensor | None, kind: str) -> Tensor:
    """One vector for each text, ``[B, D]``: its first or last real token, or the mean of them."""
    if mask_BT is None:
        mask_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.bool, device=hidden_BTD.device)
    if kind == "mean":
        weights_BT1 = mask_BT.to(hidden_BTD.dtype).unsqueeze(-1)
        return (hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)
    places_T = torch.arange(mask_BT.size(1), device=mask_BT.device)
    if kind == "first":
        at_B = torch.where(mask_BT, places_T, mask_BT.size(1)).amin(1).clamp(max=mask_BT.size(1) - 1)
    else:
        at_B = torch.where(mask_BT, places_T, 0).amax(1)
    return hidden_BTD[torch.arange(len(at_B), device=at_B.device), at_B]
