"""Gemma 2 and Gemma 3 (text): sandwich norms stored around zero, scaled embeddings, local and global layers, caps."""

from __future__ import annotations

from typing import Any

from hanmo.models.architectures.mapping import (
    COMMON_KEYS,
    Architecture,
    Raw,
    read_layer_types,
    read_rope,
    refuse,
    write_layer_types,
    write_rope,
)
from hanmo.models.transformer import TransformerConfig

NAMES = {
    "model.layers.{}.attention_output_norm": "model.layers.{}.post_attention_layernorm",
    "model.layers.{}.post_attention_layernorm": "model.layers.{}.pre_feedforward_layernorm",
    "model.layers.{}.mlp_output_norm": "model.layers.{}.post_feedforward_layernorm",
    "head.output": "score",
}


KEYS = {
    **COMMON_KEYS,
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "attention_bias": "attention_bias",
    "activation": "hidden_activation",
    "sliding_window": "sliding_window",
}
USUAL = {
    **{"head_dim": 256, "norm_eps": 1e-6, "attention_bias": False, "activation": "gelu_pytorch_tanh"},
    **{"sliding_window": 4096, "tie_embeddings": True},
}


def read(raw: Raw) -> dict[str, Any]:
    """What the keys do not give directly."""
    refuse(raw, use_bidirectional_attention=False)
    third = raw["model_type"] == "gemma3_text"
    every = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or (6 if third else 2)
    rope = read_rope(raw)
    if third:
        both = raw.get("rope_parameters") or {}
        new = "full_attention" in both
        rope = read_rope({**raw, "rope_parameters": both["full_attention"]} if new else raw, 1_000_000.0)
        local = both["sliding_attention"]["rope_theta"] if new else raw.get("rope_local_base_freq", 10_000.0)
        rope["rope_local_theta"] = float(local)
        refuse(raw, attn_logit_softcapping=None)  # transformers reads the key and does nothing with it
    return {
        **rope,
        "output_bias": raw["attention_bias"],
        "sliding_layers": read_layer_types(raw, lambda layer: (layer + 1) % every != 0),
        "attention_scale": raw.get("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": None if third else raw.get("attn_logit_softcapping", 50.0),
        "logit_softcap": raw.get("final_logit_softcapping", None if third else 30.0),
        "embedding_scale": raw["hidden_size"] ** 0.5,
        **{"norm": "rms+1", "norm_placement": "sandwich", "qk_norm": third},
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """The same backwards."""
    rope = write_rope(config)
    if config.rope_local_theta:
        slow = {"rope_type": "default", "rope_theta": config.rope_local_theta}
        rope["rope_parameters"] = {"full_attention": rope["rope_parameters"], "sliding_attention": slow}
        rope["rope_local_base_freq"] = config.rope_local_theta
    scalar = round((config.attention_scale or config.head_dim**-0.5) ** -2, 6)
    return {
        **rope,
        "layer_types": write_layer_types(config),
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


ARCHITECTURE = Architecture(
    model_types=("gemma2", "gemma3_text"),
    classes={
        "causal-lm": "{}ForCausalLM",
        "sequence-classification": "{}ForSequenceClassification",
        "embedding": "{}Model",
    },
    families={"gemma2": "Gemma2", "gemma3_text": "Gemma3Text"},
    irregular={("gemma3_text", "causal-lm"): "Gemma3ForCausalLM"},
    prefix="model.",
    keys=KEYS,
    usual=USUAL,
    dropouts=("attention_dropout",),
    read=read,
    write=write,
    names=lambda config: NAMES,  # noqa: ARG005 - one table for all tasks
    pooling="last",
    head_bias={"sequence-classification": False},
)
