"""Quantisation of a decoder to 4 bits by what it does with some text: which inputs its matrices meet, and how much each
of their outputs matters for what it predicts.

For every matrix of a layer two passes over the text give ``H = sum over tokens of s x x^T``, by which ``rounding.py``
rounds it:

1. Forwards and backwards: s, the squared gradient of the loss by the outputs of the matrix for a token, summed up. The
   loss is that of tokens drawn from the network's own predictions, so that s estimates Fisher information: it says how
   far errors of these outputs move the predicted distributions, in Kullback-Leibler divergence, to second order (as
   in GuidedQuant, Kim et al. 2025, arXiv:2505.07004; here all outputs of a matrix share their s). Only s is kept.
2. Layer by layer: x, the inputs of its matrices, from which H is summed up. Then the matrices are rounded, and their
   floats and H are let go: never is there more than the moments of one layer.

Letters in names: B windows, T tokens of a window, D hidden size, K inputs of a product, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hanmo.errors import ModelError
from hanmo.inference.native.layout import Quantized, all_finite
from hanmo.inference.native.rounding import round_to_int4
from hanmo.language import pick
from hanmo.models.kernels.loss import token_loss
from hanmo.models.transformer import Transformer
from hanmo.progress import Progress

ROWS = 128  # tokens whose predictions are drawn at once
BACKWARD_SHARE = 0.6  # of the whole time, that of the first pass


@dataclass
class Trace:
    """What the first pass leaves.

    Attributes:
        states_BTD: what enters the first layer.
        views: what else each layer is called with.
        weights: of each layer and matrix, s of every token ``[B, T]``.
    """

    states_BTD: Tensor
    views: list[tuple[Any, ...]]
    weights: list[dict[str, Tensor]]


def calibrate(model: Transformer, tokens_BT: Tensor, *, seed: int = 0, progress: bool = False) -> dict[str, Quantized]:
    """Quantise the matrices of all layers to 4 bits with a minimum per group; embedding and output stay as they are.

    The network's floats are let go layer by layer: it cannot be used any more.

    Args:
        model: a decoder in float32 on the CPU.
        tokens_BT: int64, windows of text; about 16,000 tokens are enough, in all languages that it will be used for.
        seed: of the draws.
        progress: whether to show how far the work is.

    Returns:
        matrices by the names of :mod:`hanmo.models.transformer`, such as ``model.layers.0.mlp.up_proj.weight``.

    Raises:
        ModelError: the network computes NaN or infinite values.
    """
    model.eval().requires_grad_(False)
    bar = Progress(pick("calibrating", "校准"), tokens_BT.numel(), "tokens") if progress else None

    def show(share: float) -> None:
        if bar:
            bar.update(share * tokens_BT.numel())

    trace = backward_pass(model, tokens_BT, seed, lambda share: show(BACKWARD_SHARE * share))
    matrices: dict[str, Quantized] = {}
    for layer, block in enumerate(model.model.layers):
        moments = forward_pass(block, trace, layer)
        for name, linear in linears_of(block):
            matrices[f"model.layers.{layer}.{name}.weight"] = round_to_int4(linear.weight, moments.pop(name))
            linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        show(BACKWARD_SHARE + (1 - BACKWARD_SHARE) * (layer + 1) / len(model.model.layers))
    if bar:
        bar.close()
    return matrices


def linears_of(block: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The matrices of a layer by name, as ``mlp.up_proj``."""
    return [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]


@contextmanager
def hooks() -> Iterator[list[torch.utils.hooks.RemovableHandle]]:
    """A list of hooks that are removed in the end."""
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def backward_pass(model: Transformer, tokens_BT: Tensor, seed: int, on_progress: Callable[[float], None]) -> Trace:
    """Read the windows one by one, forwards and backwards."""
    generator = torch.Generator().manual_seed(seed)
    B, T = tokens_BT.shape
    layers = model.model.layers
    trace = Trace(
        torch.empty(B, T, model.config.hidden_size),
        [() for _ in layers],
        [{name: torch.zeros(B, T) for name, _ in linears_of(block)} for block in layers],
    )
    row = 0

    def enter(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            trace.views[layer] = inputs[1:]
            if layer == 0:
                trace.states_BTD[row] = inputs[0][0].detach()
                inputs[0].requires_grad_()  # the weights need no gradients; from here on the states have them

        return hook

    def leave(weights_BT: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def add(gradient_1TN: Tensor) -> None:
            weights_BT[row] = gradient_1TN[0].square().sum(dim=-1)

        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    with hooks() as handles:
        for layer, block in enumerate(layers):
            handles.append(block.register_forward_pre_hook(enter(layer)))
            for name, linear in linears_of(block):
                handles.append(linear.register_forward_hook(leave(trace.weights[layer][name])))
        for row, ids_T in enumerate(tokens_BT):
            with torch.enable_grad():
                states_TD = model.hidden(ids_T[None])[0]
            targets_T = drawn(model, states_TD.detach(), generator)
            with torch.enable_grad():
                loss = token_loss(states_TD, model.output_weight, targets_T, **model.output_form())
                loss.backward()  # type: ignore[no-untyped-call]
            on_progress((row + 1) / B)
    return trace


@torch.no_grad()
def drawn(model: Transformer, states_TD: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each state, drawn from what the network predicts there.

    Raises:
        ModelError: the predictions are no numbers.
    """
    tokens = []
    for states in torch.split(states_TD, ROWS):
        logits = model.logits(states)
        if not all_finite(logits):
            raise not_finite("its predictions")
        tokens.append(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0])
    return torch.cat(tokens)


@torch.no_grad()
def forward_pass(block: nn.Module, trace: Trace, layer: int) -> dict[str, Tensor]:
    """Bring all windows through a layer.

    Returns:
        of each matrix the moments of its inputs ``[K, K]``. The trace's states are those that leave the layer.
    """
    moments: dict[str, Tensor] = {}
    row = 0

    def enter(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x_TK = inputs[0][0]
            if name not in moments:
                moments[name] = torch.zeros(x_TK.size(1), x_TK.size(1))
            weighted_TK = x_TK * trace.weights[layer][name][row].sqrt()[:, None]
            moments[name].addmm_(weighted_TK.t(), weighted_TK)

        return hook

    with hooks() as handles:
        for name, linear in linears_of(block):
            handles.append(linear.register_forward_pre_hook(enter(name)))
        for row, states_TD in enumerate(trace.states_BTD):
            trace.states_BTD[row] = block(states_TD[None], *trace.views[layer])[0]
    for name, moments_KK in moments.items():
        if not all_finite(moments_KK):
            raise not_finite(f"the inputs of '{name}' in layer {layer}")
    return moments


def not_finite(what: str) -> ModelError:
    """The error for a network whose numbers overflow."""
    return ModelError(
        f"the network computes NaN or infinite values: {what}",
        where="calibration",
        why="what matters to it cannot be measured",
        fix="--no-calibration rounds the weights without it; is the model whole?",
        zh=f"网络算出了 NaN 或无穷大（{what}），无法校准。可用 --no-calibration 不校准直接量化；请检查模型是否完整",
    )
