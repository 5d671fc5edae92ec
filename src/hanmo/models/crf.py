"""The linear-chain conditional random field as a layer: the best path of labels, its loss and its marginals.

The score of labels y1..yn is ``start[y1] + sum of emissions[t, yt] + sum of transitions[y(t-1), yt] + end[yn]`` and
its probability the softmax over all label sequences of that length (Lafferty, McCallum and Pereira, "Conditional
Random Fields", ICML 2001). The sum over sequences runs in log space by the forward algorithm, the best sequence comes
from Viterbi's, the marginals from forward and backward scores. The layer stands on an encoder (``models/heads.py``),
and ``models/crf_tagger.py`` decodes with it too.

Letters in names: B sequences, T positions, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hanmo.errors import ModelError

BROKEN_RULE = -1e6  # nats that a transition against the constraints costs: finite, so that no gradient becomes NaN


class Constraints(NamedTuple):
    """Which labels may begin (bool [L]), follow one another (bool [L, L], from and to) and end (bool [L])."""

    start: Tensor
    transitions: Tensor
    end: Tensor


def span_constraints(labels: Sequence[str]) -> Constraints:
    """What a sequence of span labels must obey, for IOB2 (``B-X I-X O``) and for BMES or BIOES (``B-X M-X E-X S-X``).

    The scheme is told from the labels: where there is an E, a span that begins must end with it.

    Raises:
        ModelError: a label that belongs to none of these schemes.

    >>> span_constraints(["O", "B-PER", "I-PER"]).transitions.tolist()
    [[True, True, False], [True, True, True], [True, True, True]]
    """
    parts = [label.partition("-")[::2] for label in labels]
    for label, (kind, _) in zip(labels, parts, strict=True):
        if kind not in ("O", "B", "I", "M", "E", "S"):
            raise ModelError(
                f"the label {label!r} is no span label",
                why="constraints are known for IOB2 (B-, I-, O) and BMES or BIOES (B-, M- or I-, E-, S-, O)",
                fix="train without constraints",
                zh=f"标签 {label!r} 不属于 IOB2、BMES 或 BIOES 标注体系；请不加约束训练",
            )
    closed = any(kind == "E" for kind, _ in parts)
    inside = [kind in ("I", "M", "E") for kind, _ in parts]
    open_ended = [kind in ("B", "I", "M") for kind, _ in parts]  # a label that can be continued
    rows = []
    for before, (_, kind_of_span) in enumerate(parts):
        same = [kind_of_span == other for _, other in parts]
        rows.append(
            [
                open_ended[before] and same[after] if inside[after] else not (closed and open_ended[before])
                for after in range(len(parts))
            ]
        )
    return Constraints(
        torch.tensor([not value for value in inside]),
        torch.tensor(rows),
        torch.tensor([not (closed and value) for value in open_ended]),
    )


class LinearChainCRF(nn.Module):
    """A linear-chain CRF over emissions from anywhere.

    Parameters: ``transitions`` [L, L] (from, to), ``start`` [L], ``end`` [L]; they begin at zero, where every label is
    independent of its neighbours. Half-precision emissions are scored in float32.

    Args:
        num_labels: L.
        constraints: transitions that must not happen (not part of the weights); a path against them costs
            :data:`BROKEN_RULE`.

    >>> crf = LinearChainCRF(2)
    >>> emissions_BTL = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.0, 9.0]]])
    >>> mask_BT = torch.tensor([[True, True, False]])
    >>> crf.decode(emissions_BTL, mask_BT)
    [[1, 0]]
    """

    forbidden: Tensor | None  # [L + 2, L]: rows of transitions, then start, then end; 0 or BROKEN_RULE

    def __init__(self, num_labels: int, constraints: Constraints | None = None) -> None:
        super().__init__()
        if num_labels < 1:
            raise ModelError("a CRF needs at least one label", where="num_labels", zh="CRF 至少需要一个标签")
        self.num_labels = num_labels
        self.transitions = nn.Parameter(torch.zeros(num_labels, num_labels))
        self.start = nn.Parameter(torch.zeros(num_labels))
        self.end = nn.Parameter(torch.zeros(num_labels))
        forbidden = None
        if constraints is not None:
            allowed = torch.cat([constraints.transitions, constraints.start[None], constraints.end[None]])
            if allowed.shape != (num_labels + 2, num_labels):
                raise ModelError(
                    f"the constraints are for {allowed.shape[-1]} labels, the CRF has {num_labels}",
                    zh="约束的标签数与 CRF 的标签数不符",
                )
            forbidden = torch.zeros(allowed.shape).masked_fill(~allowed, BROKEN_RULE)
        self.register_buffer("forbidden", forbidden, persistent=False)

    def forward(self, emissions_BTL: Tensor, tags_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """The negative log-likelihood of the tags, summed over the batch, in nats; a sequence without positions is 0.

        Args:
            emissions_BTL: scores of the labels at each position.
            tags_BT: integers below L; what stands at positions outside the mask does not matter.
            mask_BT: True at the positions that count, which come first in each row; None if all do.

        Raises:
            ModelError: shapes that do not fit, a mask with gaps, a tag that is no label.
        """
        emissions_BTL, mask_BT = self.check(emissions_BTL, mask_BT)
        if tags_BT.shape != mask_BT.shape:
            raise shape_error("tags", tags_BT, mask_BT.shape)
        tags_BT = tags_BT.masked_fill(~mask_BT, 0)
        if ((tags_BT < 0) | (tags_BT >= self.num_labels)).any():
            raise ModelError(
                f"a tag is outside 0..{self.num_labels - 1}",
                where="tags",
                fix="leave positions without a label out of the mask",
                zh="标签编号越界；没有标签的位置请不要放进掩码",
            )
        if emissions_BTL.shape[1] == 0:
            return emissions_BTL.sum()  # nothing to score: 0, and still part of the graph
        transitions_LL, start_L, end_L = self.scores(emissions_BTL)
        log_partition_B = torch.logsumexp(self.alphas(emissions_BTL, mask_BT)[-1] + end_L, dim=-1)
        gold_BT = emissions_BTL.gather(2, tags_BT[:, :, None])[:, :, 0]
        gold_BT = gold_BT + torch.cat([start_L[tags_BT[:, :1]], transitions_LL[tags_BT[:, :-1], tags_BT[:, 1:]]], dim=1)
        last_B = tags_BT.gather(1, (mask_BT.sum(1, keepdim=True) - 1).clamp(min=0))[:, 0]
        gold_B = torch.where(mask_BT, gold_BT, 0.0).sum(1) + end_L[last_B]
        return torch.where(mask_BT[:, 0], log_partition_B - gold_B, 0.0).sum()

    @torch.no_grad()
    def decode(self, emissions_BTL: Tensor, mask_BT: Tensor | None = None) -> list[list[int]]:
        """The best labels of each sequence, as long as its mask (Viterbi 1967); of equals, the lowest label.

        Raises:
            ModelError: as :meth:`forward`.
        """
        emissions_BTL, mask_BT = self.check(emissions_BTL, mask_BT)
        B, T, L = emissions_BTL.shape
        if T == 0:
            return [[] for _ in range(B)]
        transitions_LL, start_L, end_L = self.scores(emissions_BTL)
        best_BL = start_L + emissions_BTL[:, 0]
        stay_BL = torch.arange(L, device=best_BL.device).expand(B, L)
        came_from = []
        for t in range(1, T):
            scores_BL, before_BL = (best_BL[:, :, None] + transitions_LL).max(dim=1)
            inside_B1 = mask_BT[:, t, None]
            came_from.append(torch.where(inside_B1, before_BL, stay_BL))  # after the end, a path stays where it is
            best_BL = torch.where(inside_B1, scores_BL + emissions_BTL[:, t], best_BL)
        labels_B = (best_BL + end_L).argmax(dim=-1)
        path = [labels_B]
        for before_BL in reversed(came_from):
            labels_B = before_BL.gather(1, labels_B[:, None])[:, 0]
            path.append(labels_B)
        paths: list[list[int]] = torch.stack(path[::-1], dim=1).tolist()
        lengths: list[int] = mask_BT.sum(1).tolist()
        return [labels[:length] for labels, length in zip(paths, lengths, strict=True)]

    @torch.no_grad()
    def marginals(self, emissions_BTL: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """The probability of each label at each position, [B, T, L]; zero outside the mask.

        Raises:
            ModelError: as :meth:`forward`.
        """
        emissions_BTL, mask_BT = self.check(emissions_BTL, mask_BT)
        if emissions_BTL.shape[1] == 0:
            return torch.zeros_like(emissions_BTL)
        transitions_LL, _, end_L = self.scores(emissions_BTL)
        beta_BL = end_L.expand(emissions_BTL.shape[0], -1)  # log-sum of the scores of what can follow
        betas = [beta_BL]
        for t in range(emissions_BTL.shape[1] - 1, 0, -1):
            after_BL = torch.logsumexp(transitions_LL + (emissions_BTL[:, t] + beta_BL)[:, None, :], dim=-1)
            beta_BL = torch.where(mask_BT[:, t, None], after_BL, beta_BL)
            betas.append(beta_BL)
        joint_BTL = torch.stack(self.alphas(emissions_BTL, mask_BT), dim=1) + torch.stack(betas[::-1], dim=1)
        return torch.where(mask_BT[:, :, None], joint_BTL.softmax(dim=-1), 0.0)

    def alphas(self, emissions_BTL: Tensor, mask_BT: Tensor) -> list[Tensor]:
        """For each position, [B, L]: the log-sum of the scores of all paths that end there in each label.

        Past its end a sequence keeps its last values, so that the last entry is right for every length.
        """
        transitions_LL, start_L, _ = self.scores(emissions_BTL)
        alpha_BL = start_L + emissions_BTL[:, 0]
        alphas = [alpha_BL]
        for t in range(1, emissions_BTL.shape[1]):
            next_BL = torch.logsumexp(alpha_BL[:, :, None] + transitions_LL, dim=1) + emissions_BTL[:, t]
            alpha_BL = torch.where(mask_BT[:, t, None], next_BL, alpha_BL)
            alphas.append(alpha_BL)
        return alphas

    def scores(self, emissions_BTL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Transitions [L, L], start [L] and end [L] with the constraints, in the emissions' type."""
        dtype = emissions_BTL.dtype
        transitions_LL, start_L, end_L = self.transitions.to(dtype), self.start.to(dtype), self.end.to(dtype)
        if self.forbidden is None:
            return transitions_LL, start_L, end_L
        forbidden = self.forbidden.to(dtype)
        return transitions_LL + forbidden[:-2], start_L + forbidden[-2], end_L + forbidden[-1]

    def check(self, emissions_BTL: Tensor, mask_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """Emissions in at least float32 and a mask that fits them."""
        if emissions_BTL.dim() != 3 or emissions_BTL.shape[2] != self.num_labels:
            raise shape_error("emissions", emissions_BTL, ("sequences", "positions", self.num_labels))
        if emissions_BTL.dtype in (torch.float16, torch.bfloat16):
            emissions_BTL = emissions_BTL.float()
        if mask_BT is None:
            mask_BT = torch.ones(emissions_BTL.shape[:2], dtype=torch.bool, device=emissions_BTL.device)
        if mask_BT.shape != emissions_BTL.shape[:2]:
            raise shape_error("mask", mask_BT, emissions_BTL.shape[:2])
        mask_BT = mask_BT.bool()
        if (mask_BT[:, 1:] & ~mask_BT[:, :-1]).any():
            raise ModelError(
                "the mask of a CRF must be True first and False after",
                where="mask",
                why="a gap would join two positions that are no neighbours, silently",
                fix="pad at the right",
                zh="CRF 的掩码必须先全为真、后全为假（右侧填充）",
            )
        # what an encoder computed for padding may be NaN, and 0 times NaN would reach the gradient
        return emissions_BTL.masked_fill(~mask_BT[:, :, None], 0.0), mask_BT


def shape_error(name: str, tensor: Tensor, expected: Sequence[object]) -> ModelError:
    """The error for a tensor of the wrong shape."""
    shown = "[" + ", ".join(map(str, expected)) + "]"
    return ModelError(
        f"the {name} have shape {list(tensor.shape)}, expected {shown}",
        where=name,
        zh=f"张量 {name} 的形状为 {list(tensor.shape)}，应为 {shown}",
    )
