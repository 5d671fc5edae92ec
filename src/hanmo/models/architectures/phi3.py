"""Phi-3 and Phi-3.5 (Abdin et al. 2024): Llama's network with fused projections and LongRoPE."""

from __future__ import annotations

from typing import Any

from hanmo.models.architectures.mapping import (
    Architecture,
    Raw,
    get_activation,
    read_rope,
    theirs,
    write_rope,
)
from hanmo.models.transformer import TransformerConfig


def read(raw: Raw) -> dict[str, Any]:
    """``config.json`` to our fields."""
    heads = raw["num_attention_heads"]
    head_dim = raw["hidden_size"] // heads
    rope = read_rope(raw)
    if (rope["rope_scaling"] or {}).get("rope_type") in ("su", "yarn"):  # what LongRoPE was called at first
        rope["rope_scaling"]["rope_type"] = "longrope"
        original = raw.get("original_max_position_embeddings", 4096)
        rope["rope_scaling"].setdefault("original_max_position_embeddings", original)
    share = raw.get("partial_rotary_factor") or (raw.get("rope_parameters") or {}).get("partial_rotary_factor") or 1.0
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "intermediate_size": raw["intermediate_size"],
        "max_position_embeddings": raw["max_position_embeddings"],
        **rope,
        "rotary_dim": int(head_dim * share) if share != 1 else None,
        "norm_eps": raw.get("rms_norm_eps", 1e-5),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "activation": get_activation(raw, "hidden_act", "silu"),
        "sliding_window": raw.get("sliding_window"),
        "dropout": float(raw.get("resid_pdrop") or 0.0),
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """Our fields to ``config.json``."""
    share = (config.rotary_dim or config.head_dim) / config.head_dim
    rope = write_rope(config)
    rope["rope_parameters"]["partial_rotary_factor"] = share
    original = (config.rope_scaling or {}).get("original_max_position_embeddings", config.max_position_embeddings)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "original_max_position_embeddings": original,
        **rope,
        "partial_rotary_factor": share,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": theirs(config.activation),
        "sliding_window": config.sliding_window,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attention_dropout"), config.dropout),
        "pad_token_id": None,  # Phi-3's own lies beyond most other vocabularies
    }


ARCHITECTURE = Architecture(
    model_types=("phi3",),
    classes={
        "causal-lm": "{}ForCausalLM",
        "sequence-classification": "{}ForSequenceClassification",
        "token-classification": "{}ForTokenClassification",
        "embedding": "{}Model",
    },
    families={"phi3": "Phi3"},
    prefix="model.",
    read=read,
    write=write,
    names=lambda config: {"head.output": "score"},  # noqa: ARG005 - one name for all tasks
    fused={
        "model.layers.{}.self_attn.qkv_proj": tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"),
        "model.layers.{}.mlp.gate_up_proj": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    },
    pooling="last",
    head_bias={"sequence-classification": False},
)
