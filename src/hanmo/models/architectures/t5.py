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

from hanmo.models.architectures.mapping import Architecture, Raw
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


KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "relative_buckets": "relative_attention_num_buckets",
    "relative_distance": "relative_attention_max_distance",
}
USUAL = {
    **{"max_position_embeddings": 512, "norm_eps": 1e-6, "relative_buckets": 32, "relative_distance": 128},
    **{"tie_embeddings": True, "dropout": 0.1},
}


def read(raw: Raw) -> dict[str, Any]:
    """What the keys do not give directly, the encoder above all."""
    kind = raw.get("feed_forward_proj") or "relu"
    gated, act = kind.startswith("gated-"), kind.removeprefix("gated-")
    scaled = raw["model_type"] == "t5" and raw.get("scale_decoder_outputs", raw["tie_embeddings"])  # mT5 never does
    fields: dict[str, Any] = {
        **{ours: raw[ours] for ours in (*KEYS, "dropout", "model_type")},
        **{"positions": "relative", "attention_scale": 1.0, "gated": gated},
        "activation": "gelu_tanh" if gated and act == "gelu" else act,
        "num_kv_heads": raw["num_heads"],
        "num_layers": raw["num_layers"],
    }
    return {
        **fields,
        "encoder": TransformerConfig(**fields, causal=False, lm=False, shared_embedding=True),
        "num_layers": raw.get("num_decoder_layers") or raw["num_layers"],
        "logit_scale": raw["d_model"] ** -0.5 if scaled else 1.0,
    }


def reconcile(config: TransformerConfig, given: Mapping[str, Tensor]) -> TransformerConfig:
    """Tied exactly if the file holds no output of its own."""
    output, words = given.get("lm_head.weight"), given.get("shared.weight")
    own = output is not None and (words is None or not torch.equal(output, words))
    return replace(config, tie_embeddings=not own)


def write(config: TransformerConfig) -> dict[str, Any]:
    """The same backwards."""
    encoder = config.encoder or replace(config, causal=False)
    act = "gelu" if config.activation == "gelu_tanh" else config.activation
    return {
        "num_layers": encoder.num_layers,
        "num_decoder_layers": config.num_layers,
        "feed_forward_proj": ("gated-" if config.gated else "") + act,
        "scale_decoder_outputs": config.logit_scale != 1,
        "is_encoder_decoder": True,
    }


ARCHITECTURE = Architecture(
    model_types=("t5", "mt5"),
    classes={"seq2seq-lm": "{}ForConditionalGeneration"},
    families={"t5": "T5", "mt5": "MT5"},
    prefix="\0",  # every file has the same names
    keys=KEYS,
    usual=USUAL,
    dropouts=("dropout_rate",),
    read=read,
    write=write,
    names=names,
    ignored=("EncDecAttention.relative_attention_bias.weight",),  # in the first files; no version uses it
    reconcile=reconcile,
)
