"""From the engine's form back to the weights of a network: for machines and devices on which torch computes."""

from __future__ import annotations

import torch
from torch import Tensor

from hanmo.inference.native.decoder import LoadedParts, norm_offset
from hanmo.inference.native.layout import PANEL, Packed, unpack
from hanmo.inference.native.model import LAYER_VECTORS, Parts
from hanmo.models.checkpoints.weights import LoadedModel
from hanmo.models.transformer import TransformerConfig


def unpacked(loaded: LoadedParts) -> LoadedModel:
    """The same model with float32 weights, for :func:`hanmo.models.transformer.build`."""
    state = state_of(loaded.config, loaded.parts)
    return LoadedModel(loaded.config, state, loaded.tokenizer, dict(loaded.generation), loaded.source)


def state_of(config: TransformerConfig, parts: Parts) -> dict[str, Tensor]:
    """The inverse of :func:`hanmo.inference.native.decoder.prepare`.

    Rows of a position table before the first position come back as zeros: nothing reads them.
    """
    state = {"model.embed_tokens.weight": matrix(parts["embedding"])}
    if not config.tie_embeddings:
        state["lm_head.weight"] = matrix(parts["head"])
    for name, target in (("norm.weight", "model.norm.weight"), ("norm.bias", "model.norm.bias")):
        if name in parts:
            state[target] = vector(parts[name]) / config.logit_scale - norm_offset(config, name)
    if "head.bias" in parts:
        state["lm_bias"] = vector(parts["head.bias"])
    if "positions" in parts:
        table = vector(parts["positions"]).view(-1, config.hidden_size)
        state["model.embed_positions.weight"] = torch.cat(
            [table.new_zeros(config.position_offset, config.hidden_size), table]
        )
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        for name, part in layer_state(config, parts, prefix).items():
            state[f"model.{prefix}{name}"] = part
    return state


def layer_state(config: TransformerConfig, parts: Parts, prefix: str) -> dict[str, Tensor]:
    """The parameters of one layer."""
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    widths = [count * config.head_dim for count in heads]
    state = {
        "self_attn.o_proj.weight": matrix(parts[prefix + "output"]),
        "mlp.down_proj.weight": matrix(parts[prefix + "down"]),
    }
    rows = {"weight": matrix(parts[prefix + "qkv"])}
    inner = {"weight": matrix(parts[prefix + "gate_up"])}
    for fused, name in ((rows, "qkv.bias"), (inner, "gate_up.bias")):
        if prefix + name in parts:
            fused["bias"] = vector(parts[prefix + name])
    for kind, values in rows.items():
        for letter, part in zip("qkv", torch.split(values, widths), strict=True):
            state[f"self_attn.{letter}_proj.{kind}"] = part
    for kind, values in inner.items():
        if config.gated:
            pairs = values.view(-1, 2, PANEL, *values.shape[1:])
            state[f"mlp.gate_proj.{kind}"] = pairs[:, 0].flatten(0, 1)[: config.intermediate_size]
            values = pairs[:, 1].flatten(0, 1)
        state[f"mlp.up_proj.{kind}"] = values[: config.intermediate_size]
    for name, target in (("output.bias", "self_attn.o_proj.bias"), ("down.bias", "mlp.down_proj.bias")):
        if prefix + name in parts:
            state[target] = vector(parts[prefix + name])
    for name in LAYER_VECTORS[:10]:
        if prefix + name in parts:
            state[name] = vector(parts[prefix + name]) - norm_offset(config, name)
    return state


def matrix(part: Packed | Tensor) -> Tensor:
    """The weights of a matrix, float32."""
    assert isinstance(part, Packed)
    return unpack(part)


def vector(part: Packed | Tensor) -> Tensor:
    """A norm, bias or table."""
    assert isinstance(part, Tensor)
    return part
