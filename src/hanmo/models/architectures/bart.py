"""BART (Lewis et al. 2020), Marian (Junczys-Dowmunt et al. 2018), and through it the original Transformer.

The network of Vaswani et al. (2017) is Marian's with ReLU: post-norm, sinusoidal positions, scaled and tied embeddings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hanmo.models.architectures.mapping import Architecture, Raw, get_activation, refuse, theirs
from hanmo.models.transformer import TransformerConfig

POST = {"norm": "layer", "norm_bias": True, "norm_placement": "post", "final_norm": False}
BIASES = {"attention_bias": True, "output_bias": True, "mlp_bias": True, "lm_bias": True}


def original_transformer(
    vocab_size: int, hidden_size: int = 512, layers: int = 6, heads: int = 8, intermediate_size: int = 2048, **more: Any
) -> TransformerConfig:
    """The Transformer of Vaswani et al. (2017), their base size by default; stored as Marian."""
    config = {"vocab_size": vocab_size, "d_model": hidden_size, "activation_function": "relu", "scale_embedding": True}
    for side in ("encoder", "decoder"):
        config |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": intermediate_size}
    return TransformerConfig(**read({"model_type": "marian", **config, **more}), model_type="marian")


def names(config: TransformerConfig) -> dict[str, str | tuple[str, ...]]:
    """Our modules to theirs."""
    found: dict[str, str | tuple[str, ...]] = {"lm_bias": "final_logits_bias"}
    for ours, side in (("encoder", "model.encoder"), ("model", "model.decoder")):
        layer, block = f"{ours}.layers.{{}}.", f"{side}.layers.{{}}."
        for attention, name in (("self_attn", "self_attn"), ("cross_attn", "encoder_attn")):
            found |= {f"{layer}{attention}.{x}_proj": f"{block}{name}.{x}_proj" for x in "qkv"}
            found[f"{layer}{attention}.o_proj"] = f"{block}{name}.out_proj"
        found[layer + "attention_output_norm"] = block + "self_attn_layer_norm"
        found[layer + "cross_attention_output_norm"] = block + "encoder_attn_layer_norm"
        found[layer + "mlp.up_proj"] = block + "fc1"
        found[layer + "mlp.down_proj"] = block + "fc2"
        found[layer + "mlp_output_norm"] = block + "final_layer_norm"
        found[f"{ours}.embed_positions"] = f"{side}.embed_positions"
        found[f"{ours}.embed_norm"] = f"{side}.layernorm_embedding"
    words = ("model.shared", "model.decoder.embed_tokens", "model.encoder.embed_tokens")
    return {**found, "model.embed_tokens": (*words, "lm_head") if config.tie_embeddings else words}


def read(raw: Raw) -> dict[str, Any]:
    """``config.json`` to our fields."""
    marian = raw["model_type"] == "marian"
    refuse(raw, share_encoder_decoder_embeddings=True, normalize_before=False, normalize_embedding=not marian)
    refuse(raw, decoder_vocab_size=raw["vocab_size"])
    fields: dict[str, Any] = {
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["d_model"],
        "max_position_embeddings": raw.get("max_position_embeddings", 1024),
        "activation": get_activation(raw, "activation_function", "gelu"),
        "embedding_scale": raw["d_model"] ** 0.5 if raw.get("scale_embedding") else 1.0,
        "dropout": float(raw.get("dropout", 0.1)),
        **{"positions": "sinusoidal" if marian else "learned", "position_offset": 0 if marian else 2},
        **{**POST, **BIASES, "embedding_norm": not marian, "gated": False},
    }

    def side(name: str) -> dict[str, Any]:
        heads = raw[f"{name}_attention_heads"]
        sizes = {"num_layers": raw[f"{name}_layers"], "num_heads": heads, "num_kv_heads": heads}
        return {**sizes, "head_dim": raw["d_model"] // heads, "intermediate_size": raw[f"{name}_ffn_dim"]}

    encoder = {**fields, **side("encoder"), "lm_bias": False, "model_type": raw["model_type"]}
    source = TransformerConfig(**encoder, causal=False, lm=False, shared_embedding=True)
    return {
        **fields,
        **side("decoder"),
        "encoder": source,
        "tie_embeddings": bool(raw.get("tie_word_embeddings", True)),
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """Our fields to ``config.json``."""
    raw: dict[str, Any] = {}
    for side, stack in (("encoder", config.encoder or replace(config, causal=False)), ("decoder", config)):
        raw |= {f"{side}_layers": stack.num_layers, f"{side}_attention_heads": stack.num_heads}
        raw[f"{side}_ffn_dim"] = stack.intermediate_size
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        **raw,
        "num_hidden_layers": raw["encoder_layers"],
        "max_position_embeddings": config.max_position_embeddings,
        "activation_function": theirs(config.activation),
        "scale_embedding": config.embedding_scale != 1,
        "dropout": config.dropout,
        "is_encoder_decoder": True,
    }


ARCHITECTURE = Architecture(
    model_types=("bart", "marian"),
    classes={"seq2seq-lm": "{}ForConditionalGeneration"},
    families={"bart": "Bart", "marian": "Marian"},
    irregular={("marian", "seq2seq-lm"): "MarianMTModel"},
    prefix="\0",  # every file has the same names
    read=read,
    write=write,
    names=names,
    ignored=("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"),  # Marian's sinusoids
)
