"""BERT (Devlin et al. 2019), MiniLM, RoBERTa (Liu et al. 2019) and XLM-R: post-norm encoders with learned positions."""

from __future__ import annotations

from typing import Any

from hanmo.models.architectures.mapping import COMMON_KEYS, Architecture, Raw, refuse
from hanmo.models.heads import TransformConfig
from hanmo.models.transformer import TransformerConfig

LAYER, THEIRS = "model.layers.{}.", "encoder.layer.{}."
BODY: dict[str, str] = {
    "model.embed_tokens": "embeddings.word_embeddings",
    "model.embed_positions": "embeddings.position_embeddings",
    "model.embed_types": "embeddings.token_type_embeddings",
    "model.embed_norm": "embeddings.LayerNorm",
    LAYER + "self_attn.q_proj": THEIRS + "attention.self.query",
    LAYER + "self_attn.k_proj": THEIRS + "attention.self.key",
    LAYER + "self_attn.v_proj": THEIRS + "attention.self.value",
    LAYER + "self_attn.o_proj": THEIRS + "attention.output.dense",
    LAYER + "attention_output_norm": THEIRS + "attention.output.LayerNorm",
    LAYER + "mlp.up_proj": THEIRS + "intermediate.dense",
    LAYER + "mlp.down_proj": THEIRS + "output.dense",
    LAYER + "mlp_output_norm": THEIRS + "output.LayerNorm",
}
BERT_HEADS: dict[str, str | tuple[str, ...]] = {
    "lm_transform.dense": "cls.predictions.transform.dense",
    "lm_transform.norm": "cls.predictions.transform.LayerNorm",
    "lm_bias": ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    "head.transform.dense": "bert.pooler.dense",
    "head.output": "classifier",
}
ROBERTA_HEADS: dict[str, str | tuple[str, ...]] = {
    "lm_transform.dense": "lm_head.dense",
    "lm_transform.norm": "lm_head.layer_norm",
    "lm_bias": ("lm_head.bias", "lm_head.decoder.bias"),
    "head.transform.dense": "classifier.dense",
}


def names(config: TransformerConfig) -> dict[str, str | tuple[str, ...]]:
    """Our modules to theirs."""
    bert, task = config.model_type == "bert", config.head.task if config.head else ""
    body: dict[str, str | tuple[str, ...]] = {
        ours: ("bert." if bert else "roberta.") + name for ours, name in BODY.items()
    }
    heads = dict(BERT_HEADS if bert else ROBERTA_HEADS)
    if not bert:
        heads["head.output"] = "classifier.out_proj" if task == "sequence-classification" else "classifier"
    if task == "span-extraction":
        heads["head.output"] = "qa_outputs"
    both = (str(body["model.embed_tokens"]), "cls.predictions.decoder" if bert else "lm_head.decoder")
    return {**body, **heads, "model.embed_tokens": both}


KEYS = {
    **{ours: key for ours, key in COMMON_KEYS.items() if ours != "max_position_embeddings"},
    "token_types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
}
USUAL = {"token_types": 2, "norm_eps": 1e-12, "activation": "gelu", "tie_embeddings": True, "dropout": 0.1}

CONSTANTS = {
    **{"causal": False, "norm": "layer", "norm_bias": True, "norm_placement": "post", "final_norm": False},
    **{"positions": "learned", "embedding_norm": True, "gated": False, "lm_bias": True},
    **{"attention_bias": True, "output_bias": True, "mlp_bias": True},
}


def read(raw: Raw) -> dict[str, Any]:
    """What the keys do not give directly: RoBERTa's positions begin after the row of the padding token."""
    refuse(raw, position_embedding_type="absolute", is_decoder=False, tie_word_embeddings=True)
    padding = 1 if raw.get("pad_token_id") is None else raw["pad_token_id"]
    offset = 0 if raw["model_type"] == "bert" else padding + 1
    return {"max_position_embeddings": raw["max_position_embeddings"] - offset, "position_offset": offset}


def transform(config: TransformerConfig) -> TransformConfig:
    """The layer before the output; RoBERTa's activation is always GELU."""
    return TransformConfig(config.activation if config.model_type == "bert" else "gelu", norm_eps=config.norm_eps)


def write(config: TransformerConfig) -> dict[str, Any]:
    """The same backwards."""
    padding = {"pad_token_id": config.position_offset - 1} if config.position_offset else {}
    return {"max_position_embeddings": config.max_position_embeddings + config.position_offset, **padding}


ARCHITECTURE = Architecture(
    model_types=("bert", "roberta", "xlm-roberta"),
    classes={
        "masked-lm": "{}ForMaskedLM",
        "sequence-classification": "{}ForSequenceClassification",
        "token-classification": "{}ForTokenClassification",
        "span-extraction": "{}ForQuestionAnswering",
        "embedding": "{}Model",
    },
    families={"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"},
    prefix={"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta."},
    keys=KEYS,
    usual=USUAL,
    constants=CONSTANTS,
    dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    read=read,
    write=write,
    names=names,
    ignored=("pooler.dense.weight", "pooler.dense.bias", "cls.seq_relationship.weight", "cls.seq_relationship.bias"),
    transform=transform,
    head_transform=lambda config, task: (  # noqa: ARG005 - the same for every member of the family
        TransformConfig("tanh", norm=False) if task == "sequence-classification" else None
    ),
)
