"""BART (Lewis et al. 2020), Marian (Junczys-Dowmunt et al. 2018), and through it the original Transformer.

The network of Vaswani et al. (2017) is Marian's with ReLU: post-norm, sinusoidal positions, scaled and tied embeddings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hanmo.models.architectures.mapping import ACTIVATION_NAMES, Architecture, Raw, read_fields, refuse
from hanmo.models.transformer import TransformerConfig

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "max_position_embeddings": "max_position_embeddings",
    "activation": "activation_function",
}
USUAL = {"max_position_embeddings": 1024, "activation": "gelu", "tie_embeddings": True, "dropout": 0.1}
CONSTANTS = {
    **{"norm": "layer", "norm_bias": True, "norm_placement": "post", "final_norm": False, "gated": False},
    **{"attention_bias": True, "output_bias": True, "mlp_bias": True, "lm_bias": True},
}


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
    """What the keys do not give directly, the encoder above all."""
    marian = raw["model_type"] == "marian"
    refuse(raw, share_encoder_decoder_embeddings=True, normalize_before=False, normalize_embedding=not marian)
    refuse(raw, decoder_vocab_size=raw["vocab_size"])
    name = raw.get("activation_function") or "gelu"
    own = {
        "activation": ACTIVATION_NAMES.get(name, name),
        "embedding_scale": raw["d_model"] ** 0.5 if raw.get("scale_embedding") else 1.0,
        "positions": "sinusoidal" if marian else "learned",
        "position_offset": 0 if marian else 2,
        "embedding_norm": not marian,
    }

    def side(name: str) -> dict[str, Any]:
        heads = raw[f"{name}_attention_heads"]
        sizes = {"num_layers": raw[f"{name}_layers"], "num_heads": heads, "num_kv_heads": heads}
        return {**sizes, "head_dim": raw["d_model"] // heads, "intermediate_size": raw[f"{name}_ffn_dim"]}

    shared = {
        ours: raw[ours] for ours in ("vocab_size", "hidden_size", "max_position_embeddings", "dropout", "model_type")
    }
    source = {**CONSTANTS, **shared, **own, **side("encoder"), "causal": False, "lm": False, "lm_bias": False}
    return {**own, **side("decoder"), "encoder": TransformerConfig(**source, shared_embedding=True)}


def write(config: TransformerConfig) -> dict[str, Any]:
    """The same backwards."""
    raw: dict[str, Any] = {}
    for side, stack in (("encoder", config.encoder or replace(config, causal=False)), ("decoder", config)):
        raw |= {f"{side}_layers": stack.num_layers, f"{side}_attention_heads": stack.num_heads}
        raw[f"{side}_ffn_dim"] = stack.intermediate_size
    hidden = {"num_hidden_layers": raw["encoder_layers"], "is_encoder_decoder": True}
    return {**raw, **hidden, "scale_embedding": config.embedding_scale != 1}


ARCHITECTURE = Architecture(
    model_types=("bart", "marian"),
    classes={"seq2seq-lm": "{}ForConditionalGeneration"},
    families={"bart": "Bart", "marian": "Marian"},
    irregular={("marian", "seq2seq-lm"): "MarianMTModel"},
    prefix="model.",
    keys=KEYS,
    usual=USUAL,
    constants=CONSTANTS,
    read=read,
    write=write,
    names=names,
    ignored=("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"),  # Marian's sinusoids
    optional=("final_logits_bias",),
)


def original_transformer(
    vocab_size: int, hidden_size: int = 512, layers: int = 6, heads: int = 8, intermediate_size: int = 2048
) -> TransformerConfig:
    """The Transformer of Vaswani et al. (2017), their base size by default; stored as Marian."""
    raw = {"model_type": "marian", "vocab_size": vocab_size, "d_model": hidden_size}
    raw |= {"activation_function": "relu", "scale_embedding": True}
    for side in ("encoder", "decoder"):
        raw |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": intermediate_size}
    return TransformerConfig(**read_fields(ARCHITECTURE, raw))
