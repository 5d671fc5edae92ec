"""Rounding to 4 bits so that what a matrix computes changes least, rather than its weights.

Which inputs a matrix meets, and which of its errors matter, is told by their second moments ``H = sum of s x x^T`` over
some tokens, s being the weight of a token. What is made small is the squared error of the outputs, for a row of weights
with errors e: ``e H e^T``. Two steps bring it down:

1. The inputs are rounded one after the other, and the error of each is made up for, as far as it can be, by those that
   are not rounded yet (Optimal Brain Surgeon, Hassibi and Stork 1993; GPTQ, Frantar et al. 2022, arXiv:2210.17323). A
   group's scale and minimum are fitted when its turn comes, to the weights as they are then.
2. Sweeps over all groups: each integer is set to the best one given all others (coordinate descent), then the group's
   scale and minimum to the best ones given all integers (the normal equations of two unknowns for each row).

Letters in names: N outputs, K inputs, G groups of 32 inputs, J inputs of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hanmo.inference.native.layout import GROUP, Quantized
from hanmo.inference.native.quantize import UNEVEN_RANGES, quantize_int4

DAMPING = 0.05  # of the mean of H's diagonal, added to it: other texts have other moments
SWEEPS = 2  # further ones gain little
LEVELS = 15


def round_to_int4(weights_NK: Tensor, moments_KK: Tensor, *, sweeps: int = SWEEPS) -> Quantized:
    """16 levels with a minimum per group, chosen for the least error of the outputs.

    Args:
        weights_NK: the matrix, floats.
        moments_KK: second moments of its inputs, finite, symmetric; an input that never occurs has zeros.
        sweeps: of the second step.

    >>> weights, inputs = torch.randn(4, 64), torch.randn(200, 64)
    >>> round_to_int4(weights, inputs.T @ inputs).size
    (4, 64)
    """
    damped_KK = damped(moments_KK)
    rounded = Rounded(weights_NK, damped_KK)
    rounded.compensate(inverse_factor(damped_KK))
    for _ in range(sweeps):
        rounded.sweep()
    return rounded.quantized()


def damped(moments_KK: Tensor) -> Tensor:
    """The moments, float32, with something added to the diagonal; the identity where there are none at all."""
    moments_KK = moments_KK.float()
    mean = float(moments_KK.diagonal().mean())
    if not mean > 0:
        return torch.eye(len(moments_KK))
    return moments_KK / mean + DAMPING * torch.eye(len(moments_KK))


def inverse_factor(damped_KK: Tensor) -> Tensor:
    """Upper triangular U with ``U^T U`` the inverse of the moments.

    More is added to their diagonal where rounding errors of float32 have made them indefinite.
    """
    moments_KK, more = damped_KK.clone(), DAMPING
    while True:
        lower_KK, failed = torch.linalg.cholesky_ex(moments_KK)
        if not int(failed):
            upper_KK: Tensor
            upper_KK, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_KK), upper=True)
            if not int(failed):
                return upper_KK
        moments_KK.diagonal().add_(more)
        more *= 4


class Rounded:
    """A matrix on its way to 4 bits. Its tensors have an input for each row: what is done to one input of all outputs
    reads memory in order.

    Attributes:
        integers_KN: 0 to 15, as floats.
        scales_GN, minima_GN: of half precision's values, as floats.
    """

    def __init__(self, weights_NK: Tensor, damped_KK: Tensor) -> None:
        self.weights_KN, self.damped_KK = weights_NK.float().t().contiguous(), damped_KK
        K, N = self.weights_KN.shape
        self.integers_KN = torch.zeros(K, N)
        self.scales_GN, self.minima_GN = torch.zeros(-(-K // GROUP), N), torch.zeros(-(-K // GROUP), N)

    def groups(self) -> list[slice]:
        """The inputs of each group; the last may have fewer than 32."""
        K = len(self.weights_KN)
        return [slice(first, min(first + GROUP, K)) for first in range(0, K, GROUP)]

    def compensate(self, upper_KK: Tensor) -> None:
        """Round one input after the other; its error changes those after it."""
        left_KN, importance_K = self.weights_KN.clone(), self.damped_KK.diagonal()
        for group, inputs in enumerate(self.groups()):
            left_JN, upper_JJ = left_KN[inputs], upper_KK[inputs, inputs]
            fitted = quantize_int4(left_JN.t(), importance_K[inputs], ranges=UNEVEN_RANGES)
            assert fitted.minima_NG is not None
            scale_N, minimum_N = fitted.scales_NG[:, 0].float(), fitted.minima_NG[:, 0].float()
            divisor_N = scale_N.clamp_min(1e-12)
            errors_JN = torch.empty_like(left_JN)
            for j, left_N in enumerate(left_JN):
                integer_N = ((left_N - minimum_N) / divisor_N).round_().clamp_(0, LEVELS)
                errors_JN[j] = (left_N - torch.addcmul(minimum_N, integer_N, scale_N)) / upper_JJ[j, j]
                left_JN[j + 1 :] -= upper_JJ[j, j + 1 :, None] * errors_JN[j]
                self.integers_KN[inputs.start + j] = integer_N
            left_KN[inputs.stop :].addmm_(upper_KK[inputs, inputs.stop :].t(), errors_JN, alpha=-1)
            self.scales_GN[group], self.minima_GN[group] = scale_N, minimum_N

    def lost(self) -> Tensor:
        """What rounding has taken from the weights, ``[K, N]``."""
        K = len(self.weights_KN)
        scales, minima = (x_GN.repeat_interleave(GROUP, 0)[:K] for x_GN in (self.scales_GN, self.minima_GN))
        return self.weights_KN - torch.addcmul(minima, self.integers_KN, scales)

    def sweep(self) -> None:
        """Improve each group, given the others."""
        gradient_KN = self.damped_KK @ self.lost()
        for group, inputs in enumerate(self.groups()):
            change_JN = self.improve(group, inputs, gradient_KN[inputs].clone())
            gradient_KN.addmm_(self.damped_KK[:, inputs], change_JN, alpha=-1)

    def improve(self, group: int, inputs: slice, gradient_JN: Tensor) -> Tensor:
        """Better integers, then a better scale and minimum of one group.

        Args:
            gradient_JN: H times what is lost, at the group's inputs; changed in place.

        Returns:
            what has been added to the rounded weights, ``[J, N]``.
        """
        moments_JJ = self.damped_KK[inputs, inputs]
        q_JN, scale_N, minimum_N = self.integers_KN[inputs], self.scales_GN[group], self.minima_GN[group]
        divisor_N = scale_N.clamp_min(1e-12)
        change_JN = torch.empty_like(q_JN)
        for j, q_N in enumerate(q_JN):
            better_N = (q_N + gradient_JN[j] / (moments_JJ[j, j] * divisor_N)).round_().clamp_(0, LEVELS)
            torch.mul(better_N - q_N, scale_N, out=change_JN[j])
            gradient_JN -= moments_JJ[:, j, None] * change_JN[j]
            q_N.copy_(better_N)
        # d, m: the changes of scale and minimum that minimise (e - q d - m) H (e - q d - m)
        moments_q_JN = moments_JJ @ q_JN
        qq_N, q1_N, all_moments = (q_JN * moments_q_JN).sum(0), moments_q_JN.sum(0), moments_JJ.sum()
        qe_N, e1_N = (q_JN * gradient_JN).sum(0), gradient_JN.sum(0)
        determinant_N = qq_N * all_moments - q1_N * q1_N
        safe_N = determinant_N.clamp_min(1e-12)
        new_scale_N = (scale_N + (qe_N * all_moments - e1_N * q1_N) / safe_N).half().float()
        new_minimum_N = (minimum_N + (e1_N * qq_N - qe_N * q1_N) / safe_N).half().float()
        step_JN = q_JN * (new_scale_N - scale_N) + (new_minimum_N - minimum_N)
        gain_N = 2 * (step_JN * gradient_JN).sum(0) - (step_JN * (moments_JJ @ step_JN)).sum(0)
        usable_N = (determinant_N > 1e-6 * qq_N * all_moments) & (new_scale_N > 0) & (gain_N > 0)
        scale_N.copy_(torch.where(usable_N, new_scale_N, scale_N))
        minimum_N.copy_(torch.where(usable_N, new_minimum_N, minimum_N))
        return change_JN + torch.where(usable_N, step_JN, 0)

    def quantized(self) -> Quantized:
        """The result."""
        K, N = self.integers_KN.shape
        G = len(self.scales_GN)
        integers_KN = torch.nn.functional.pad(self.integers_KN, (0, 0, 0, G * GROUP - K)).to(torch.uint8)
        integers_NGI = integers_KN.t().contiguous().view(N, G, GROUP)
        scales_NG, minima_NG = (x_GN.t().contiguous().half() for x_GN in (self.scales_GN, self.minima_GN))
        return Quantized("int4-minimum", integers_NGI, scales_NG, minima_NG, K)
