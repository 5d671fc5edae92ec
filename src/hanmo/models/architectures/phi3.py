"""Phi-3 and Phi-3.5 (Abdin et al. 2024): Llama's network with fused projections and LongRoPE."""

from __future__ import annotations

from typing import Any

from hanmo.models.architectures.mapping import (
    COMMON_KEYS,
    Architecture,
    Raw,
    read_rope,
    write_rope,
)
from hanmo.models.architectures.values import check_rope
from hanmo.models.transformer import TransformerConfig

KEYS = {
    **COMMON_KEYS,
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "sliding_window": "sliding_window",
}
USUAL = {"norm_eps": 1e-5, "activation": "silu", "sliding_window": None, "tie_embeddings": False}


def read(raw: Raw) -> dict[str, Any]:
    """What the keys do not give directly."""
    head_dim = raw["hidden_size"] // raw["num_heads"]
    rope = read_rope(raw)
    if (rope["rope_scaling"] or {}).get("rope_type") in ("su", "yarn"):  # what LongRoPE was called at first
        rope["rope_scaling"]["rope_type"] = "longrope"
        original = raw.get("original_max_position_embeddings", 4096)
        rope["rope_scaling"].setdefault("original_max_position_embeddings", original)
        check_rope(rope["rope_scaling"], "longrope")
    share = raw.get("partial_rotary_factor") or (raw.get("rope_parameters") or {}).get("partial_rotary_factor") or 1.0
    return {
        **rope,
        "num_kv_heads": raw.get("num_key_value_heads") or raw["num_heads"],
        "rotary_dim": int(head_dim * share) if share != 1 else None,
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """The same backwards."""
    share = (config.rotary_dim or config.head_dim) / config.head_dim
    rope = write_rope(config)
    rope["rope_parameters"]["partial_rotary_factor"] = share
    original = (config.rope_scaling or {}).get("original_max_position_embeddings", config.max_position_embeddings)
    return {
        **rope,
        "num_key_value_heads": config.num_kv_heads,
        "original_max_position_embeddings": original,
        "partial_rotary_factor": share,
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
    keys=KEYS,
    usual=USUAL,
    dropouts=("resid_pdrop", "embd_pdrop", "attention_dropout"),
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
