"""The optimizer: Muon for the matrices inside the blocks, AdamW for embeddings, norms and biases.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest semi-orthogonal matrix, found by five
Newton-Schulz steps, so that all directions of an update are equally large. On small models it needs about half of
AdamW's steps for the same loss. Embeddings are looked up, not multiplied, so AdamW (Loshchilov and Hutter 2019) suits
them better.

The whole state is a flat dictionary of tensors: it is stored as safetensors and restored bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steepest at zero, singular values end in about [0.7, 1.2]


@dataclass(frozen=True)
class OptimizerSettings:
    """Learning rates at the peak of the schedule and the constants that rarely change.

    Args:
        matrix_rate: Muon's rate for block matrices, in units of the update's spectral norm.
        embedding_rate: AdamW's rate for embeddings.
        vector_rate: AdamW's rate for norm weights and biases.
        weight_decay: decoupled decay of the block matrices, per step and unit of rate.
        momentum: Muon's Nesterov momentum.
        betas: AdamW's two averages.
        muon: update block matrices with Muon; False: every parameter with AdamW, matrices at ``embedding_rate``.
    """

    matrix_rate: float = 0.02
    embedding_rate: float = 0.01
    vector_rate: float = 0.01
    weight_decay: float = 0.05
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    muon: bool = True


def orthogonalize(gradients_LMN: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, approximately, of each matrix in a stack ``[L, M, N]``."""
    a, b, c = NEWTON_SCHULZ
    x = gradients_LMN
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizer:
    """Muon and AdamW over the parameters of one model.

    Args:
        model: its parameters that require gradients are trained.
        settings: rates and constants.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings) -> None:
        self.settings = settings
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.matrices = {n: p for n, p in named.items() if settings.muon and p.dim() == 2 and ".layers." in f".{n}"}
        self.others = {n: p for n, p in named.items() if n not in self.matrices}
        self.momentum = {n: torch.zeros_like(p) for n, p in self.matrices.items()}
        self.by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, parameter in self.matrices.items():
            self.by_shape.setdefault(tuple(parameter.shape), []).append(name)
        embeddings = [p for p in self.others.values() if p.dim() == 2]
        vectors = [p for p in self.others.values() if p.dim() != 2]
        groups = [
            {"params": embeddings, "peak": settings.embedding_rate},
            {"params": vectors, "peak": settings.vector_rate},
        ]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=0.0, betas=settings.betas, eps=1e-10, weight_decay=0.0, fused=True
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
            if not present:
                continue
            update = torch.stack([gradients[n].lerp(self.momentum[n], momentum) for n in present])
            # a tall matrix gets a proportionally larger step, so that its outputs change as much per input
            step = rate * max(1.0, rows / columns) ** 0.5
            parameters: list[Tensor] = [self.matrices[n] for n in present]
            torch._foreach_mul_(parameters, 1 - self.settings.weight_decay * rate)
            torch._foreach_add_(parameters, list(orthogonalize(update).unbind()), alpha=-step)
        for parameter in (*self.matrices.values(), *self.others.values()):
            parameter.grad = None

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
