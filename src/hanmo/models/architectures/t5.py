"""T5 (Raffel et al. 2020), its v1.1 and FLAN form, and mT5: relative positions, RMS norms, no biases, no scaling.

Whether the output is tied to the embedding has been told by the configuration in several ways over the years; the file
knows (:func:`reconcile`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hanmo.models.architectures.mapping import Architecture, Raw, refuse
from hanmo.models.transformer import TransformerConfig


def names(config: TransformerConfig) -> dict[str, str | tuple[str, ...]]:
    """Our modules to theirs."""
    found: dict[str, str | tuple[str, ...]] = {}
    for ours, theirs, feed in (("encoder", "encoder", 1), ("model", "decoder", 2)):
        layer, block = f"{ours}.layers.{{}}.", f"{theirs}.block.{{}}.layer."
        found |= {layer + f"self_attn.{x}_proj": f"{block}0.SelfAttention.{x}" for x in "qkvo"}
        found |= {layer + f"cross_attn.{x}_proj": f"{block}1.EncDecAttention.{x}" for x in "qkvo"}
        found[layer + "input_layernorm"] = block + "0.layer_norm"
        found[layer + "cross_attention_norm"] = block + "1.layer_norm"
        found[layer + "post_attention_layernorm"] = f"{block}{feed}.layer_norm"
        dense = f"{block}{feed}.DenseReluDense."
        found[layer + "mlp.gate_proj"] = dense + "wi_0"
        found[layer + "mlp.up_proj"] = dense + ("wi_1" if config.gated else "wi")
        found[layer + "mlp.down_proj"] = dense + "wo"
        found[f"{ours}.relative_bias"] = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias"
        found[f"{ours}.norm"] = f"{theirs}.final_layer_norm"
    words = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", *(("lm_head",) if config.tie_embeddings else ()))
    return {**found, "model.embed_tokens": words}


def read(raw: Raw) -> dict[str, Any]:
    """``config.json`` to our fields."""
    kind = raw.get("feed_forward_proj") or "relu"
    tied = raw.get("tie_word_embeddings") is not False
    gated = kind.startswith("gated-")
    act = kind.removeprefix("gated-")
    fields: dict[str, Any] = {
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["d_model"],
        "num_layers": raw["num_layers"],
        "num_heads": raw["num_heads"],
        "num_kv_heads": raw["num_heads"],
        "head_dim": raw["d_kv"],
        "intermediate_size": raw["d_ff"],
        "max_position_embeddings": raw.get("n_positions") or 512,
        "norm_eps": raw.get("layer_norm_epsilon", 1e-6),
        "relative_buckets": raw.get("relative_attention_num_buckets", 32),
        "relative_distance": raw.get("relative_attention_max_distance", 128),
        "activation": "gelu_tanh" if gated and act == "gelu" else act,
        "dropout": float(raw.get("dropout_rate", 0.1)),
        **{"positions": "relative", "attention_scale": 1.0, "gated": gated},
    }
    encoder = TransformerConfig(**fields, causal=False, lm=False, shared_embedding=True, model_type=raw["model_type"])
    scaled = raw["model_type"] == "t5" and raw.get("scale_decoder_outputs", tied)  # mT5 never does
    scale = raw["d_model"] ** -0.5 if scaled else 1.0
    layers = raw.get("num_decoder_layers") or raw["num_layers"]
    return {**fields, "num_layers": layers, "encoder": encoder, "tie_embeddings": tied, "logit_scale": scale}


def reconcile(config: TransformerConfig, given: Mapping[str, Tensor]) -> TransformerConfig:
    """Tied exactly if the file holds no output of its own."""
    output, words = given.get("lm_head.weight"), given.get("shared.weight")
    own = output is not None and (words is None or not torch.equal(output, words))
    return replace(config, tie_embeddings=not own)


def write(config: TransformerConfig) -> dict[str, Any]:
    """Our fields to ``config.json``."""
    encoder = config.encoder or replace(config, causal=False)
    act = "gelu" if config.activation == "gelu_tanh" else config.activation
    refuse({"feed_forward_proj": act} if config.gated and config.activation == "gelu" else {}, feed_forward_proj="relu")
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "num_layers": encoder.num_layers,
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.intermediate_size,
        "n_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "feed_forward_proj": ("gated-" if config.gated else "") + act,
        "dropout_rate": config.dropout,
        "scale_decoder_outputs": config.logit_scale != 1,
        "is_encoder_decoder": True,
    }


ARCHITECTURE = Architecture(
    model_types=("t5", "mt5"),
    classes={"seq2seq-lm": "{}ForConditionalGeneration"},
    families={"t5": "T5", "mt5": "MT5"},
    prefix="\0",  # every file has the same names
    read=read,
    write=write,
    names=names,
    reconcile=reconcile,
)
