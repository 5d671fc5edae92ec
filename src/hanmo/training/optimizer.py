"""The optimizer: Muon for the matrices inside the blocks, AdamW for embeddings, norms and biases.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest semi-orthogonal matrix, found by five
Newton-Schulz steps, so that all directions of an update are equally large. On small models it needs about half of
AdamW's steps for the same loss. Embeddings are looked up, not multiplied, so AdamW (Loshchilov and Hutter 2019) suits
them better.

The whole state is a flat dictionary of tensors: it is stored as safetensors and restored bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hanmo.models.kernels.products import matmul

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steepest at zero, singular values end in about [0.7, 1.2]
MUON_TO_ADAMW = 0.3  # AdamW's rate for embeddings, norms and biases beside Muon's for matrices
UPDATE_NUMBERS = 1 << 24  # of matrices that Muon updates at once: their copies must not outweigh the activations


@dataclass(frozen=True)
class OptimizerSettings:
    """Learning rates at the peak of the schedule and the constants that rarely change.

    Args:
        matrix_rate: Muon's rate for block matrices, in units of the update's spectral norm.
        embedding_rate: AdamW's rate for embeddings.
        vector_rate: AdamW's rate for norm weights and biases.
        weight_decay: decoupled decay of the block matrices, per step and unit of rate; without Muon, of all matrices.
        momentum: Muon's Nesterov momentum.
        betas: AdamW's two averages.
        muon: update block matrices with Muon; False: every parameter with AdamW, matrices at ``embedding_rate``.
        head_rate: AdamW's rate for a task's head, which starts from nothing; None: like the other parameters.
        eps: AdamW's smallest denominator.
    """

    matrix_rate: float = 0.02
    embedding_rate: float = 0.01
    vector_rate: float = 0.01
    weight_decay: float = 0.05
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    muon: bool = True
    head_rate: float | None = None
    eps: float = 1e-10

    @property
    def peak_rate(self) -> float:
        """The rate that is shown: that of the matrices."""
        return self.matrix_rate if self.muon else self.embedding_rate


def orthogonalize(gradients_LMN: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, approximately, of each matrix in a stack ``[L, M, N]``."""
    a, b, c = NEWTON_SCHULZ
    x = gradients_LMN
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if fast_product(x):
        x = torch.stack([orthogonalized_one(matrix, steps) for matrix in x])
        return x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def fast_product(x_LMN: Tensor) -> bool:
    """Whether :func:`~hanmo.models.kernels.products.matmul` is faster than torch's products of a whole stack."""
    return x_LMN.device.type == "cpu" and x_LMN.dtype == torch.float32 and x_LMN.size(1) ** 2 * x_LMN.size(2) >= 1 << 23


def orthogonalized_one(x_MN: Tensor, steps: int) -> Tensor:
    """The steps of :func:`orthogonalize` on one matrix that is not tall."""
    a, b, c = NEWTON_SCHULZ
    if x_MN.size(1) >= 2 * x_MN.size(0):  # each step multiplies by a polynomial of x x^T, which is the smaller matrix
        gram, whole = matmul(x_MN, x_MN.t()), None
        for left in reversed(range(steps)):
            factor = matmul(gram, gram).mul_(c).add_(gram, alpha=b)
            factor.diagonal().add_(a)
            whole = factor if whole is None else matmul(factor, whole)
            if left:
                gram = matmul(matmul(factor, gram), factor)
        return x_MN if whole is None else matmul(whole, x_MN)
    for _ in range(steps):
        gram = matmul(x_MN, x_MN.t())
        x_MN = matmul(matmul(gram, gram).mul_(c).add_(gram, alpha=b), x_MN).add_(x_MN, alpha=a)
    return x_MN


class Optimizer:
    """Muon and AdamW over the parameters of one model.

    Args:
        model: its parameters that require gradients are trained.
        settings: rates and constants.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        orthogonalized: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ) -> None:
        self.settings = settings
        self.orthogonalized = orthogonalized or (lambda us: list(orthogonalize(torch.stack(us)).unbind()))
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.matrices = {  # low-rank factors are no matrices of their own: their product is
            n: p
            for n, p in named.items()
            if settings.muon and p.dim() == 2 and ".layers." in f".{n}" and ".adapters." not in n
        }
        self.others = {n: p for n, p in named.items() if n not in self.matrices}
        self.momentum = {n: torch.zeros_like(p) for n, p in self.matrices.items()}
        self.by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, parameter in self.matrices.items():
            self.by_shape.setdefault(tuple(parameter.shape), []).append(name)
        decay = 0.0 if settings.muon else settings.weight_decay
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in self.others.items():
            rate = settings.embedding_rate if parameter.dim() >= 2 else settings.vector_rate
            if settings.head_rate is not None and name.startswith("head."):
                rate = settings.head_rate
            groups.setdefault((rate, decay if parameter.dim() >= 2 else 0.0), []).append(parameter)
        self.adamw = torch.optim.AdamW(
            [
                {"params": parameters, "peak": rate, "weight_decay": decay}
                for (rate, decay), parameters in groups.items()
            ]
            or [{"params": [nn.Parameter(torch.zeros(0))], "peak": 0.0}],
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update every parameter with ``scale`` times its peak rate, then drop the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * scale
        self.adamw.step()
        rate, momentum = self.settings.matrix_rate * scale, self.settings.momentum
        gradients = {n: p.grad for n, p in self.matrices.items() if p.grad is not None}
        if gradients:
            torch._foreach_lerp_([self.momentum[n] for n in gradients], list(gradients.values()), 1 - momentum)
        for (rows, columns), names in self.by_shape.items():
            present = [n for n in names if n in gradients]
            # a tall matrix gets a proportionally larger step, so that its outputs change as much per input
            step = rate * max(1.0, rows / columns) ** 0.5
            at_once = max(1, UPDATE_NUMBERS // (rows * columns))
            for begin in range(0, len(present), at_once):
                chosen = present[begin : begin + at_once]
                updates = [gradients[n].lerp(self.momentum[n], momentum) for n in chosen]
                parameters: list[Tensor] = [self.matrices[n] for n in chosen]
                torch._foreach_mul_(parameters, 1 - self.settings.weight_decay * rate)
                torch._foreach_add_(parameters, self.orthogonalized(updates), alpha=-step)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in (*self.matrices.values(), *self.others.values()):
            parameter.grad = None

    def layout(self) -> dict[str, Tensor]:
        """The parameter that each state tensor belongs to and is laid out like; step counts are left out."""
        tensors: dict[str, Tensor] = {f"muon.{name}": parameter for name, parameter in self.matrices.items()}
        for name, parameter in self.others.items():
            tensors |= {f"adamw.{key}.{name}": parameter for key in ("exp_avg", "exp_avg_sq")}
        return tensors

    def state_tensors(self) -> dict[str, Tensor]:
        """All moments and step counts, by parameter name."""
        tensors = {f"muon.{name}": tensor for name, tensor in self.momentum.items()}
        for name, parameter in self.others.items():
            for key, value in self.adamw.state.get(parameter, {}).items():
                tensors[f"adamw.{key}.{name}"] = value
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_tensors` gave."""
        for name, tensor in self.momentum.items():
            tensor.copy_(tensors[f"muon.{name}"])
        for name, parameter in self.others.items():
            state = {key: tensors.get(f"adamw.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if all(value is not None for value in state.values()):
                self.adamw.state[parameter] = {
                    key: value.to(parameter.device, copy=True) for key, value in state.items() if value is not None
                }
