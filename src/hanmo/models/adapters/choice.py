"""Which parameters are trained, and a fingerprint of those that are not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from hanmo.errors import UsageError
from hanmo.models.adapters.attach import base_state
from hanmo.models.transformer import Transformer

OUTPUTS = ("head", "lm_head", "lm_transform", "lm_bias")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train_only(
    model: Transformer, *, last_layers: int | None = None, head: bool = True, embeddings: bool = False
) -> int:
    """Freeze everything but a part of a network.

    Args:
        model: has no adapters.
        last_layers: blocks nearest to the output, with the final norm; 0: none; None: all, those of an encoder beside
            the decoder too.
        head: the task's head, or the output over the vocabulary where it has weights of its own.
        embeddings: of words, positions and segments, with their norm. An output tied to them is trained with them.

    Returns:
        The number of parameters that are trained.

    Raises:
        UsageError: more layers than there are, nothing left to train, or the network has adapters.
    """
    layers = model.config.num_layers
    if last_layers is not None and (type(last_layers) is not int or not 0 <= last_layers <= layers):
        raise UsageError(
            f"the last {last_layers} layers cannot be trained: the network has {layers}",
            fix=f"choose a number from 0 to {layers}",
            zh=f"网络只有 {layers} 层，无法训练最后 {last_layers} 层",
        )
    if any(".adapters." in name for name, _ in model.named_parameters()):
        raise UsageError(
            "layers are frozen or adapted, not both",
            fix="merge or remove the adapters first",
            zh="网络带有适配器：请先合并或移除，再选择要训练的层",
        )
    first = 0 if last_layers is None else layers - last_layers
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if is_chosen(name, first, layers, every=last_layers is None, head=head, embeddings=embeddings)
    }
    if not chosen:
        raise UsageError(
            "nothing would be trained",
            why="the output of this network has no weights of its own" if head else "",
            fix="train at least one layer, or the embeddings",
            zh="没有可训练的参数：请至少训练一层，或训练词嵌入",
        )
    model.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return sum(parameter.numel() for parameter in chosen.values())


def is_chosen(name: str, first: int, layers: int, *, every: bool, head: bool, embeddings: bool) -> bool:
    """Whether a parameter belongs to the part that :func:`train_only` describes."""
    stack, _, rest = name.partition(".")
    if stack in OUTPUTS:
        return head
    if rest.startswith("embed_"):
        return embeddings
    if every:
        return True
    if rest.startswith("layers."):
        return stack == "model" and int(rest.split(".")[1]) >= first
    return stack == "model" and rest.startswith("norm.") and first < layers


def weights_fingerprint(model: nn.Module, *, without: Iterable[str] = ()) -> str:
    """A hash of the names, shapes and values of a network's own parameters, adapters left out.

    Values are compared as float32, so that weights stored in bfloat16 and the same weights read as float32 agree.

    Args:
        without: names of modules to leave out.

    Returns:
        64 hex digits.
    """
    left_out = tuple(f"{name}." for name in without) or ("\0",)
    digest = hashlib.sha256()
    for name, tensor in sorted(base_state(model).items()):
        if name.startswith(left_out):
            continue
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
