"""Which transformers there can be: choices that are known, and sizes that fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hanmo.errors import ModelError, nearest
from hanmo.models.heads import activation

if TYPE_CHECKING:
    from hanmo.models.transformer import TransformerConfig

NORMS = ("rms", "rms+1", "layer")  # "rms+1": the stored weight is the difference from one
PLACEMENTS = ("pre", "post", "sandwich")
POSITIONS = ("rotary", "learned", "sinusoidal", "relative")
SCALINGS = ("default", "linear", "llama3", "yarn", "longrope")


def contradiction(what: str, zh: str, fix: str = "") -> ModelError:
    """The error for a configuration that no network can have."""
    return ModelError(what, where="config.json", fix=fix, zh=zh)


def check_config(config: TransformerConfig) -> None:
    """Refuse a configuration that no network can have.

    Raises:
        ModelError: sizes that contradict each other, or a choice that is not known.
    """
    sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    for name in (*sizes, "intermediate_size", "max_position_embeddings"):
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise contradiction(
                f"{name} must be a positive whole number, not {value!r}", f"{name} 应为正整数，而不是 {value!r}"
            )
    if config.num_heads % config.num_kv_heads:
        raise contradiction(
            f"{config.num_heads} query heads cannot be shared by {config.num_kv_heads} key/value heads",
            f"{config.num_heads} 个查询头不能由 {config.num_kv_heads} 个键值头均分",
            "the number of query heads must be a multiple of the number of key/value heads",
        )
    if config.positions == "rotary" and (config.rotary_dim or config.head_dim) % 2:
        raise contradiction(
            f"head_dim must be even for rotary positions, not {config.rotary_dim or config.head_dim}",
            "旋转位置编码要求 head_dim 为偶数",
        )
    if (config.rotary_dim or 0) > config.head_dim:
        raise contradiction(
            f"{config.rotary_dim} rotated dimensions are more than a head has ({config.head_dim})",
            f"旋转维数 {config.rotary_dim} 超过头的维数 {config.head_dim}",
        )
    if config.sliding_layers is not None and len(config.sliding_layers) != config.num_layers:
        raise contradiction(
            f"there are {config.num_layers} layers, the list of layer types has {len(config.sliding_layers)}",
            f"共有 {config.num_layers} 层，而层类型列表有 {len(config.sliding_layers)} 项",
        )
    factors = [(config.rope_scaling or {}).get(name) or () for name in ("short_factor", "long_factor")]
    if any(len(numbers) not in (0, (config.rotary_dim or config.head_dim) // 2) for numbers in factors):
        raise contradiction(
            f"LongRoPE needs {(config.rotary_dim or config.head_dim) // 2} factors, "
            f"there are {len(factors[0])} short and {len(factors[1])} long ones",
            "LongRoPE 的缩放因子个数与头的维数不符",
        )
    exact = config.relative_buckets // (2 if config.causal else 4)
    if config.positions == "relative" and not 0 < exact < config.relative_distance:
        raise contradiction(
            f"{config.relative_buckets} buckets cannot hold distances up to {config.relative_distance}",
            f"{config.relative_buckets} 个桶无法表示 {config.relative_distance} 以内的相对距离",
        )
    if config.encoder is not None and config.encoder.hidden_size != config.hidden_size:
        raise contradiction("encoder and decoder differ in hidden size", "编码器与解码器的 hidden_size 不同")
    choices = {
        "rotary scaling": ((config.rope_scaling or {}).get("rope_type", "default"), SCALINGS),
        "norm": (config.norm, NORMS),
        "norm placement": (config.norm_placement, PLACEMENTS),
        "kind of positions": (config.positions, POSITIONS),
    }
    for name, (choice, known) in choices.items():
        if choice not in known:
            raise contradiction(
                f"unknown {name} '{choice}'",
                f"不认识的 {name} '{choice}'",
                f"known: {', '.join(known)}. {nearest(str(choice), known)}",
            )
    activation(config.activation)
