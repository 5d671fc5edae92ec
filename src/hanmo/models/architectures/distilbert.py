"""DistilBERT (Sanh et al. 2019): BERT without segments, under names of its own."""

from __future__ import annotations

from typing import Any

from hanmo.models.architectures.mapping import Architecture, Raw
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


KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "max_position_embeddings": "max_position_embeddings",
    "activation": "activation",
}
USUAL = {"activation": "gelu", "tie_embeddings": True, "dropout": 0.1}

CONSTANTS = {
    **{"causal": False, "norm": "layer", "norm_bias": True, "norm_placement": "post", "final_norm": False},
    "norm_eps": 1e-12,
    **{"positions": "learned", "embedding_norm": True, "gated": False, "lm_bias": True},
    **{"attention_bias": True, "output_bias": True, "mlp_bias": True},
}


def read(raw: Raw) -> dict[str, Any]:  # noqa: ARG001 - the keys give everything
    """Nothing is left to read."""
    return {}


def write(config: TransformerConfig) -> dict[str, Any]:
    """What the keys do not give directly."""
    return {"seq_classif_dropout": config.head.dropout} if config.head else {}


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
    keys=KEYS,
    usual=USUAL,
    constants=CONSTANTS,
    dropouts=("dropout", "attention_dropout"),
    read=read,
    write=write,
    names=names,
    transform=lambda config: TransformConfig(config.activation),
    head_transform=lambda config, task: (  # noqa: ARG005 - one form
        TransformConfig("relu", norm=False) if task == "sequence-classification" else None
    ),
)
