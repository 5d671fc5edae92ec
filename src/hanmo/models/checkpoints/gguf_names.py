"""What llama.cpp calls things: architectures, their fixed choices, and the names of tensors.

The same tables serve reading and writing, so that what one writes the other reads.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hanmo.errors import ModelError
from hanmo.models.transformer import TransformerConfig

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "position_embd.weight": "model.embed_positions.weight",
    "output_norm.weight": "model.norm.weight",
    "output_norm.bias": "model.norm.bias",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FUSED = "attn_qkv"  # queries, keys and values of a layer in one tensor
FUSED_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ROTARY_FACTORS = "rope_freqs.weight"  # how Llama 3's rescaled rotary frequencies are stored
LLAMA3_PARAMETERS = "hanmo.rope.llama3"  # our own entry: factor, low and high frequency factor, original context


@dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp.

    Attributes:
        model_types: our names for it; the first is what a file of it is read as.
        fixed: the fields of :class:`TransformerConfig` that it prescribes, where they are not the default.
        free: the other fields that may differ from model to model, besides :data:`FREE`.
        interleaved: query and key rows are stored in the order of llama.cpp's rotation.
        fused: queries, keys and values are one tensor.
        square: the heads together are as wide as the hidden state.
        epsilon: the key of the norm's epsilon.
    """

    model_types: tuple[str, ...]
    fixed: dict[str, Any] = field(default_factory=dict)
    free: tuple[str, ...] = ()
    interleaved: bool = False
    fused: bool = False
    square: bool = False
    epsilon: str = "attention.layer_norm_rms_epsilon"


GPT2_FIXED = {
    "norm": "layer",
    "norm_bias": True,
    "positions": "learned",
    "gated": False,
    "activation": "gelu_tanh",
    **dict.fromkeys(("attention_bias", "output_bias", "mlp_bias"), True),
}
FAMILIES = {
    "llama": Family(("llama", "mistral"), free=("attention_bias", "output_bias", "mlp_bias"), interleaved=True),
    "qwen2": Family(("qwen2",), fixed={"attention_bias": True}, square=True),
    "qwen3": Family(("qwen3",), fixed={"qk_norm": True}),
    "gpt2": Family(("gpt2",), GPT2_FIXED, fused=True, square=True, epsilon="attention.layer_norm_epsilon"),
}
SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
FREE = (*SIZES, "max_position_embeddings", "norm_eps", "tie_embeddings", "model_type", "dropout")
ROTARY = ("rope_theta", "rope_scaling")
WINDOW = ("sliding_window", "sliding_layers")  # the writer shortens the context instead


def family_of(config: TransformerConfig) -> str:
    """llama.cpp's architecture for a network.

    Raises:
        ModelError: it has none for this kind, or not with every choice of this network; the message names it.
    """
    kinds = [name for name, family in FAMILIES.items() if config.model_type in family.model_types]
    if not kinds or not config.causal or not config.lm or config.encoder is not None or config.head is not None:
        refuse_kind(config.model_type if config.lm and config.head is None else f"{config.model_type} with a head")
    family = FAMILIES[kinds[0]]
    rotary = ROTARY if config.positions == "rotary" else ROTARY[:1]  # without rotation the base means nothing
    for item in dataclasses.fields(TransformerConfig):
        value, usual = getattr(config, item.name), family.fixed.get(item.name, item.default)
        if item.name not in (*FREE, *family.free, *rotary, *WINDOW) and value != usual:
            refuse_variant(kinds[0], item.name, value, usual)
    if family.square and config.num_heads * config.head_dim != config.hidden_size:
        refuse_variant(kinds[0], "head_dim", config.head_dim, config.hidden_size // config.num_heads)
    scaling = (config.rope_scaling or {}).get("rope_type", "default")
    known = ("default", "linear", "llama3") if kinds[0] == "llama" else ("default", "linear")
    if scaling not in known:
        refuse_variant(kinds[0], "rotary scaling", scaling, " or ".join(known))
    return kinds[0]


def refuse_kind(kind: str) -> None:
    """Raise the error for a network that has no GGUF form here."""
    known = ", ".join(name for family in FAMILIES.values() for name in family.model_types)
    raise ModelError(
        f"a model of the kind '{kind}' cannot be written to a GGUF file",
        why="GGUF is written for decoders that llama.cpp runs",
        fix=f"kinds that can: {known}; any kind can be exported as a folder (give a target without .gguf)",
        zh=f"'{kind}' 类模型无法写入 GGUF。可写入的有：{known}；其他模型可导出为文件夹（目标名不带 .gguf）",
    )


def refuse_variant(architecture: str, name: str, value: Any, usual: Any) -> None:
    """Raise the error for a choice that llama.cpp's architecture does not have."""
    raise ModelError(
        f"llama.cpp's architecture '{architecture}' cannot express {name} = {value!r}, only {usual!r}",
        fix="export the model as a folder instead (give a target without .gguf)",
        zh=f"llama.cpp 的 '{architecture}' 结构不支持 {name} = {value!r}（只支持 {usual!r}）。请改为导出文件夹",
    )
