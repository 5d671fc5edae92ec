"""Llama 2 and 3 (SmolLM2, TinyLlama...), Mistral, Qwen2 and 2.5, Qwen3: one layout, whose names are our own."""

from __future__ import annotations

from typing import Any

from hanmo.models.architectures.mapping import (
    Architecture,
    Raw,
    get_activation,
    read_layer_types,
    read_rope,
    refuse,
    theirs,
    write_layer_types,
    write_rope,
)
from hanmo.models.transformer import TransformerConfig

MISTRAL_WINDOW = 4096  # where the key is absent


def read(raw: Raw) -> dict[str, Any]:
    """``config.json`` to our fields."""
    kind, heads = raw["model_type"], raw["num_attention_heads"]
    window, layers = None, None
    if kind == "mistral":
        window = raw.get("sliding_window", MISTRAL_WINDOW)
    elif kind.startswith("qwen") and raw.get("use_sliding_window") and raw.get("sliding_window"):
        window = raw["sliding_window"]
        layers = read_layer_types(raw, lambda layer: layer >= raw.get("max_window_layers", 28))
    bias = kind == "qwen2" or bool(raw.get("attention_bias", False))
    refuse(raw, pretraining_tp=1)
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "intermediate_size": raw["intermediate_size"],
        "max_position_embeddings": raw["max_position_embeddings"],
        **read_rope(raw),
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "qk_norm": kind == "qwen3",
        "attention_bias": bias,
        "output_bias": bias and kind != "qwen2",
        "mlp_bias": bool(raw.get("mlp_bias", False)),
        "activation": get_activation(raw, "hidden_act", "silu"),
        "sliding_window": window,
        "sliding_layers": layers,
        "dropout": float(raw.get("attention_dropout") or 0.0),
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """Our fields to ``config.json``."""
    kind = config.model_type
    raw = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        **write_rope(config),
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": config.dropout,
        "hidden_act": theirs(config.activation),
    }
    if kind != "qwen2":
        raw["attention_bias"] = config.attention_bias
    if kind == "llama":
        raw["mlp_bias"] = config.mlp_bias
    elif kind == "mistral":
        raw["sliding_window"] = config.sliding_window
    else:
        slides = config.sliding_window is not None
        raw |= {"use_sliding_window": slides, "sliding_window": config.sliding_window}
        raw |= {"layer_types": write_layer_types(config)} if slides else {}
    return raw


ARCHITECTURE = Architecture(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    classes={
        "causal-lm": "{}ForCausalLM",
        "sequence-classification": "{}ForSequenceClassification",
        "token-classification": "{}ForTokenClassification",
        "embedding": "{}Model",
    },
    families={"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"},
    prefix="model.",
    read=read,
    write=write,
    names=lambda config: {"head.output": "score"},  # noqa: ARG005 - one name for all tasks
    pooling="last",
    head_bias={"sequence-classification": False},
)
