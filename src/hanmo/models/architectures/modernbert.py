"""ModernBERT (Warner et al. 2024): rotary, gated, pre-norm encoders that alternate local and global attention."""

from __future__ import annotations

from typing import Any

from hanmo.models.architectures.mapping import (
    COMMON_KEYS,
    Architecture,
    Raw,
    read_layer_types,
    refuse,
    write_layer_types,
)
from hanmo.models.heads import TransformConfig
from hanmo.models.transformer import TransformerConfig

LAYER, THEIRS = "model.layers.{}.", "model.layers.{}."
NAMES = {
    "model.embed_norm": "model.embeddings.norm",
    LAYER + "input_layernorm": THEIRS + "attn_norm",
    LAYER + "self_attn.o_proj": THEIRS + "attn.Wo",
    LAYER + "post_attention_layernorm": THEIRS + "mlp_norm",
    LAYER + "mlp.down_proj": THEIRS + "mlp.Wo",
    "model.norm": "model.final_norm",
    "lm_transform.dense": "head.dense",
    "lm_transform.norm": "head.norm",
    "lm_head": "decoder",
    "lm_bias": "decoder.bias",
    "head.transform.dense": "head.dense",
    "head.transform.norm": "head.norm",
    "head.output": "classifier",
}


def names(config: TransformerConfig) -> dict[str, str | tuple[str, ...]]:
    """Our modules to theirs."""
    words = "model.embeddings.tok_embeddings"
    return {**NAMES, "model.embed_tokens": (words, "decoder") if config.tie_embeddings else words}


KEYS = {
    **COMMON_KEYS,
    "norm_eps": "norm_eps",
    "norm_bias": "norm_bias",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "activation": "hidden_activation",
}
USUAL = {
    **{"norm_eps": 1e-5, "norm_bias": False, "attention_bias": False, "mlp_bias": False},
    **{"activation": "gelu", "tie_embeddings": True},
}


def read(raw: Raw) -> dict[str, Any]:
    """What the keys do not give directly."""
    refuse(raw, classifier_bias=False, classifier_activation="gelu")
    rope, every = raw.get("rope_parameters") or {}, raw.get("global_attn_every_n_layers", 3)
    theta = {  # of the global and of the local layers
        kind: float((rope.get(f"{new}_attention") or {}).get("rope_theta") or raw.get(f"{kind}_rope_theta") or usual)
        for kind, new, usual in (("global", "full", 160_000.0), ("local", "sliding", 10_000.0))
    }
    return {
        "rope_theta": theta["global"],
        "rope_local_theta": theta["local"],
        "output_bias": raw["attention_bias"],
        "lm_bias": bool(raw.get("decoder_bias", True)),
        "sliding_window": raw.get("local_attention", 128) // 2,
        "sliding_layers": read_layer_types(raw, lambda layer: layer % every != 0),
        **{"causal": False, "norm": "layer", "embedding_norm": True, "first_norm": False},
    }


def transform(config: TransformerConfig) -> TransformConfig:
    """The layer before every output."""
    return TransformConfig("gelu", bias=False, norm_bias=config.norm_bias, norm_eps=config.norm_eps)


def write(config: TransformerConfig) -> dict[str, Any]:
    """The same backwards."""
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": config.rope_theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_local_theta},
    }
    return {
        "rope_parameters": rope,
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": config.rope_local_theta,
        "decoder_bias": config.lm_bias or not config.lm,
        "local_attention": 2 * (config.sliding_window or 64),
        "layer_types": write_layer_types(config),
        **dict.fromkeys(("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id", "pad_token_id")),
    }


ARCHITECTURE = Architecture(
    model_types=("modernbert",),
    classes={
        "masked-lm": "{}ForMaskedLM",
        "sequence-classification": "{}ForSequenceClassification",
        "token-classification": "{}ForTokenClassification",
        "span-extraction": "{}ForQuestionAnswering",
        "embedding": "{}Model",
    },
    families={"modernbert": "ModernBert"},
    prefix="model.",
    keys=KEYS,
    usual=USUAL,
    dropouts=("mlp_dropout", "attention_dropout", "embedding_dropout"),
    read=read,
    write=write,
    names=names,
    fused={
        "model.layers.{}.attn.Wqkv": tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"),
        "model.layers.{}.mlp.Wi": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    },
    transform=transform,
    head_transform=lambda config, task: transform(config),  # noqa: ARG005 - one form
)
