"""GPT-2 (Radford et al. 2019): learned positions, layer norms, fused projections stored [in, out]."""

from __future__ import annotations

from typing import Any

from hanmo.models.architectures.mapping import Architecture, Raw, refuse
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


KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "activation": "activation_function",
}
USUAL = {"norm_eps": 1e-5, "activation": "gelu_new", "tie_embeddings": True, "dropout": 0.1}
CONSTANTS = {
    **{"norm": "layer", "norm_bias": True, "positions": "learned", "gated": False},
    **{"attention_bias": True, "output_bias": True, "mlp_bias": True},
}


def read(raw: Raw) -> dict[str, Any]:
    """What the keys do not give directly."""
    refuse(raw, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return {"intermediate_size": raw.get("n_inner") or 4 * raw["n_embd"]}


def write(config: TransformerConfig) -> dict[str, Any]:
    """The same backwards; older readers know the tanh form of GELU under its first name only."""
    new = {"activation_function": "gelu_new"} if config.activation == "gelu_tanh" else {}
    return {"n_inner": config.intermediate_size, **new}


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
    keys=KEYS,
    usual=USUAL,
    constants=CONSTANTS,
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    read=read,
    write=write,
    names=names,
    fused={"transformer.h.{}.attn.c_attn": tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv")},
    transposed=("c_attn", "c_proj", "c_fc"),
    ignored=(
        ".attn.bias",
        ".attn.masked_bias",
        "head.summary.weight",
        "head.summary.bias",
    ),  # masks; GPT2DoubleHeadsModel
    pooling="last",
    head_bias={"sequence-classification": False},
)
