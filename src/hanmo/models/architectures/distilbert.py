"""DistilBERT (Sanh et al. 2019): BERT without segments, under names of its own."""

from __future__ import annotations

from typing import Any

from hanmo.models.architectures.mapping import Architecture, Raw, get_activation, theirs
from hanmo.models.heads import TransformConfig
from hanmo.models.transformer import TransformerConfig

LAYER, THEIRS = "model.layers.{}.", "distilbert.transformer.layer.{}."
NAMES = {
    "model.embed_positions": "distilbert.embeddings.position_embeddings",
    "model.embed_norm": "distilbert.embeddings.LayerNorm",
    LAYER + "self_attn.q_proj": THEIRS + "attention.q_lin",
    LAYER + "self_attn.k_proj": THEIRS + "attention.k_lin",
    LAYER + "self_attn.v_proj": THEIRS + "attention.v_lin",
    LAYER + "self_attn.o_proj": THEIRS + "attention.out_lin",
    LAYER + "attention_output_norm": THEIRS + "sa_layer_norm",
    LAYER + "mlp.up_proj": THEIRS + "ffn.lin1",
    LAYER + "mlp.down_proj": THEIRS + "ffn.lin2",
    LAYER + "mlp_output_norm": THEIRS + "output_layer_norm",
    "lm_transform.dense": "vocab_transform",
    "lm_transform.norm": "vocab_layer_norm",
    "lm_head": "vocab_projector",
    "lm_bias": "vocab_projector.bias",
    "head.transform.dense": "pre_classifier",
}


def names(config: TransformerConfig) -> dict[str, str | tuple[str, ...]]:
    """Our modules to theirs."""
    words = "distilbert.embeddings.word_embeddings"
    span = config.head is not None and config.head.task == "span-extraction"
    return {
        **NAMES,
        "model.embed_tokens": (words, "vocab_projector") if config.tie_embeddings else words,
        "head.output": "qa_outputs" if span else "classifier",
    }


def read(raw: Raw) -> dict[str, Any]:
    """``config.json`` to our fields."""
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["dim"],
        "num_layers": raw["n_layers"],
        "num_heads": raw["n_heads"],
        "num_kv_heads": raw["n_heads"],
        "head_dim": raw["dim"] // raw["n_heads"],
        "intermediate_size": raw["hidden_dim"],
        "max_position_embeddings": raw["max_position_embeddings"],
        "tie_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "activation": get_activation(raw, "activation", "gelu"),
        "dropout": float(raw.get("dropout", 0.1)),
        **{"norm_eps": 1e-12, "norm": "layer", "norm_bias": True, "norm_placement": "post", "final_norm": False},
        **{"causal": False, "positions": "learned", "embedding_norm": True, "gated": False, "lm_bias": True},
        **{"attention_bias": True, "output_bias": True, "mlp_bias": True},
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """Our fields to ``config.json``."""
    return {
        "vocab_size": config.vocab_size,
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "hidden_dim": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "activation": theirs(config.activation),
        **dict.fromkeys(("dropout", "attention_dropout"), config.dropout),
        **({"seq_classif_dropout": config.head.dropout} if config.head else {}),
    }


ARCHITECTURE = Architecture(
    model_types=("distilbert",),
    classes={
        "masked-lm": "{}ForMaskedLM",
        "sequence-classification": "{}ForSequenceClassification",
        "token-classification": "{}ForTokenClassification",
        "span-extraction": "{}ForQuestionAnswering",
        "embedding": "{}Model",
    },
    families={"distilbert": "DistilBert"},
    prefix="distilbert.",
    read=read,
    write=write,
    names=names,
    transform=lambda config: TransformConfig(config.activation),
    head_transform=lambda config, task: (  # noqa: ARG005 - one form
        TransformConfig("relu", norm=False) if task == "sequence-classification" else None
    ),
)
