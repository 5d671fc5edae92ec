"""Llama 2 and 3 (SmolLM2, TinyLlama...), Mistral, Qwen2 and 2.5, Qwen3: one layout, whose names are our own."""

from __future__ import annotations

from typing import Any

from hanmo.models.architectures.mapping import (
    COMMON_KEYS,
    Architecture,
    Raw,
    read_layer_types,
    read_rope,
    write_layer_types,
    write_rope,
)
from hanmo.models.transformer import TransformerConfig

MISTRAL_WINDOW = 4096  # where the key is absent


KEYS = {
    **COMMON_KEYS,
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
}
USUAL = {"norm_eps": 1e-6, "activation": "silu", "tie_embeddings": False}


def read(raw: Raw) -> dict[str, Any]:
    """What the keys do not give directly."""
    kind, window, layers = raw["model_type"], None, None
    if kind == "mistral":
        window = raw.get("sliding_window", MISTRAL_WINDOW)
    elif kind.startswith("qwen") and raw.get("use_sliding_window") and raw.get("sliding_window"):
        window = raw["sliding_window"]
        layers = read_layer_types(raw, lambda layer: layer >= raw.get("max_window_layers", 28))
    bias = kind == "qwen2" or bool(raw.get("attention_bias", False))
    return {
        **read_rope(raw),
        "num_kv_heads": raw.get("num_key_value_heads") or raw["num_heads"],
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // raw["num_heads"],
        "qk_norm": kind == "qwen3",
        "attention_bias": bias,
        "output_bias": bias and kind != "qwen2",
        "mlp_bias": bool(raw.get("mlp_bias", False)),
        "sliding_window": window,
        "sliding_layers": layers,
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """The same backwards."""
    kind, window = config.model_type, config.sliding_window
    raw = {"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, **write_rope(config)}
    if kind != "qwen2":
        raw["attention_bias"] = config.attention_bias
    if kind == "llama":
        raw["mlp_bias"] = config.mlp_bias
    elif kind == "mistral":
        raw["sliding_window"] = window
    else:
        raw |= {"use_sliding_window": window is not None, "sliding_window": window}
        raw |= {} if window is None else {"layer_types": write_layer_types(config)}
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
    keys=KEYS,
    usual=USUAL,
    dropouts=("attention_dropout",),
    read=read,
    write=write,
    names=lambda config: {"head.output": "score"},  # noqa: ARG005 - one name for all tasks
    pooling="last",
    head_bias={"sequence-classification": False},
)
