"""GPT-2 (Radford et al. 2019): learned positions, layer norms, fused projections stored [in, out]."""

from __future__ import annotations

from typing import Any

from hanmo.models.architectures.mapping import Architecture, Raw, get_activation, refuse
from hanmo.models.transformer import TransformerConfig

NAMES: dict[str, str | tuple[str, ...]] = {
    "model.embed_positions": "transformer.wpe",
    "model.layers.{}.input_layernorm": "transformer.h.{}.ln_1",
    "model.layers.{}.self_attn.o_proj": "transformer.h.{}.attn.c_proj",
    "model.layers.{}.post_attention_layernorm": "transformer.h.{}.ln_2",
    "model.layers.{}.mlp.up_proj": "transformer.h.{}.mlp.c_fc",
    "model.layers.{}.mlp.down_proj": "transformer.h.{}.mlp.c_proj",
    "model.norm": "transformer.ln_f",
}


def names(config: TransformerConfig) -> dict[str, str | tuple[str, ...]]:
    """Our modules to theirs."""
    scores = config.head is not None and config.head.task == "sequence-classification"
    words = ("transformer.wte", "lm_head") if config.tie_embeddings else "transformer.wte"
    return {**NAMES, "model.embed_tokens": words, "head.output": "score" if scores else "classifier"}


def read(raw: Raw) -> dict[str, Any]:
    """``config.json`` to our fields."""
    refuse(raw, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    D, heads = raw["n_embd"], raw["n_head"]
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": D,
        "num_layers": raw["n_layer"],
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": D // heads,
        "intermediate_size": raw.get("n_inner") or 4 * D,
        "max_position_embeddings": raw.get("n_positions") or raw["n_ctx"],
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "dropout": float(raw.get("resid_pdrop", 0.1)),
        "activation": get_activation(raw, "activation_function", "gelu_new"),
        **{"norm": "layer", "norm_bias": True, "positions": "learned", "gated": False},
        **{"attention_bias": True, "output_bias": True, "mlp_bias": True},
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """Our fields to ``config.json``."""
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "n_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else config.activation,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
    }


ARCHITECTURE = Architecture(
    model_types=("gpt2",),
    classes={
        "causal-lm": "{}LMHeadModel",
        "sequence-classification": "{}ForSequenceClassification",
        "token-classification": "{}ForTokenClassification",
        "embedding": "{}Model",
    },
    families={"gpt2": "GPT2"},
    prefix="transformer.",
    read=read,
    write=write,
    names=names,
    fused={"transformer.h.{}.attn.c_attn": tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv")},
    transposed=("c_attn", "c_proj", "c_fc"),
    ignored=(".attn.bias", ".attn.masked_bias"),
    pooling="last",
    head_bias={"sequence-classification": False},
)
