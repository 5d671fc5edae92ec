"""What the values of a ``config.json`` may be: a file from elsewhere is checked key by key before it is used.

The same key means the same in every architecture, so that one table serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from hanmo.errors import ModelError

MAX_SIZE, MAX_LAYERS, MAX_LABELS = 1 << 31, 1 << 14, 1 << 20


def whole(least: int, most: int = MAX_SIZE) -> Callable[[Any], bool]:
    """A test for whole numbers of a range."""
    return lambda value: type(value) is int and least <= value <= most


def real(least: float, most: float = 1e30) -> Callable[[Any], bool]:
    """A test for numbers above ``least`` (and not NaN)."""
    return lambda value: type(value) in (int, float) and least < value <= most


def share(value: Any) -> bool:
    """Whether a value is a probability."""
    return type(value) in (int, float) and 0 <= value <= 1


def kind(name: type) -> Callable[[Any], bool]:
    """A test for one type."""
    return lambda value: type(value) is name


def factors(value: Any) -> bool:
    """Whether a value is a list of positive numbers."""
    return isinstance(value, list) and len(value) <= MAX_SIZE and all(map(real(0), value))


LAYERS = "num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers decoder_layers"
SIZES = (
    "vocab_size hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size max_position_embeddings "
    "n_embd n_head n_positions n_inner dim n_heads hidden_dim d_model d_kv d_ff num_heads decoder_vocab_size "
    "relative_attention_num_buckets relative_attention_max_distance encoder_attention_heads decoder_attention_heads "
    "encoder_ffn_dim decoder_ffn_dim original_max_position_embeddings global_attn_every_n_layers "
    "sliding_window_pattern _sliding_window_pattern sliding_window"
)
REALS = (
    "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps attn_logit_softcapping final_logit_softcapping "
    "query_pre_attn_scalar"
)
BASES = "rope_theta global_rope_theta local_rope_theta rope_local_base_freq"
SHARES = (
    "attention_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout_prob attention_probs_dropout_prob dropout "
    "dropout_rate mlp_dropout embedding_dropout classifier_dropout"
)
FLAGS = (
    "tie_word_embeddings attention_bias mlp_bias norm_bias use_sliding_window scale_embedding scale_decoder_outputs "
    "decoder_bias hanmo_crf"
)
TEXTS = "hidden_act hidden_activation activation activation_function feed_forward_proj problem_type classifier_pooling"
KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(LAYERS.split(), (whole(1, MAX_LAYERS), f"a whole number from 1 to {MAX_LAYERS}")),
    **dict.fromkeys(SIZES.split(), (whole(1), "a positive whole number")),
    **dict.fromkeys(REALS.split(), (real(0), "a number above 0")),
    **dict.fromkeys(BASES.split(), (real(1), "a number above 1")),
    **dict.fromkeys(SHARES.split(), (share, "a number from 0 to 1")),
    **dict.fromkeys(FLAGS.split(), (kind(bool), "true or false")),
    **dict.fromkeys(TEXTS.split(), (kind(str), "a text")),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "id2label"), (kind(dict), "a JSON object")),
    **dict.fromkeys(("layer_types", "architectures"), (kind(list), "a list")),
    **dict.fromkeys(("type_vocab_size", "max_window_layers"), (whole(0), "a whole number from 0")),
    "local_attention": (whole(2), "a whole number from 2"),
    "num_labels": (whole(1, MAX_LABELS), f"a whole number from 1 to {MAX_LABELS}"),
    "pad_token_id": (whole(-1), "a token id"),
    "partial_rotary_factor": (lambda value: share(value) and value > 0, "a number above 0, at most 1"),
}
ROPE_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("rope_type", "type"), (kind(str), "a text")),
    **dict.fromkeys(("factor", "attention_factor", "beta_fast", "beta_slow"), (real(0), "a number above 0")),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), (real(0), "a number above 0")),
    **dict.fromkeys(("mscale", "mscale_all_dim"), (lambda value: value == 0 or real(0)(value), "a number from 0")),
    **dict.fromkeys(("short_factor", "long_factor"), (factors, "a list of positive numbers")),
    "original_max_position_embeddings": (real(1), "a number above 1"),
    "rope_theta": (real(1), "a number above 1"),
    "partial_rotary_factor": KEYS["partial_rotary_factor"],
    "truncate": (kind(bool), "true or false"),
}
NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


def check_values(raw: Mapping[str, Any], keys: Mapping[str, tuple[Callable[[Any], bool], str]] = KEYS) -> None:
    """Refuse values that no model has; a key that is absent or null is left to its reader.

    Raises:
        ModelError: the message names the key and says what it may be.
    """
    for key, value in raw.items():
        if key in keys and value is not None and not keys[key][0](value):
            raise wrong(key, value, keys[key][1])


def check_rope(rope: Mapping[str, Any], rope_type: Any) -> None:
    """The same for a description of rotary positions, which must have what its kind needs."""
    check_values(rope, ROPE_KEYS)
    for key in NEEDED.get(rope_type, ()):
        if rope.get(key) is None:
            raise wrong(key, None, ROPE_KEYS[key][1])
    if rope_type == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise wrong("low_freq_factor", rope["low_freq_factor"], "below high_freq_factor")


def wrong(key: str, value: Any, wanted: str) -> ModelError:
    """The error for one value."""
    shown = "NaN" if isinstance(value, float) and math.isnan(value) else ascii_of(value)
    return ModelError(
        f"{key} must be {wanted}, not {shown}", where="config.json", zh=f"{key} 的值 {shown} 不合要求（{wanted}）"
    )


def ascii_of(value: Any) -> str:
    """A value as it is shown in a message, never long."""
    if isinstance(value, int) and abs(value) > MAX_SIZE:  # thousands of digits cannot even be printed
        return "a number far too large" if value > 0 else "a number far too small"
    text = repr(value) if not isinstance(value, list | dict) else type(value).__name__ + f" of {len(value)}"
    return text if len(text) <= 60 else text[:57] + "..."
