"""Small decoders of every layout that the native engine computes, with weights that make each part matter."""

from __future__ import annotations

from typing import Any

import torch

from hanmo.models.transformer import Transformer, TransformerConfig

BASE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 84,
    "max_position_embeddings": 128,
}
GEMMA: dict[str, Any] = {
    "norm": "rms+1",
    "norm_placement": "sandwich",
    "activation": "gelu_tanh",
    "sliding_window": 7,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"attention_bias": True, "tie_embeddings": False},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "mistral": {"sliding_window": 9, "num_kv_heads": 6},
    "gemma2": {
        **GEMMA,
        "attention_softcap": 5.0,
        "logit_softcap": 3.0,
        "sliding_layers": (True, False, True),
    },
    "gemma3": {
        **GEMMA,
        "qk_norm": True,
        "embedding_scale": 48**0.5,
        "sliding_layers": (True, True, False),
        "rope_local_theta": 1e4,
        "rope_theta": 1e6,
        "attention_scale": 0.3,
        "num_kv_heads": 1,
        "head_dim": 20,
    },
    "gpt2": {
        "norm": "layer",
        "norm_bias": True,
        "positions": "learned",
        "gated": False,
        "activation": "gelu_tanh",
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "num_kv_heads": 6,
    },
    "partly rotated": {"rotary_dim": 4, "num_heads": 2, "head_dim": 80, "num_kv_heads": 1, "lm_bias": True},
    "odd sizes": {
        "num_heads": 26,
        "head_dim": 4,
        "hidden_size": 33,
        "activation": "gelu",
        "logit_scale": 0.5,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "llama3": {
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
        "mlp_bias": True,
        "activation": "relu",
    },
}


def decoder(layout: str, **changes: Any) -> Transformer:
    """A random network of a layout; all of its norms, biases and sublayers differ from their first values."""
    return shaken(Transformer(TransformerConfig(**{**BASE, **LAYOUTS[layout], **changes})))


def shaken(model: Transformer) -> Transformer:
    """The network with random weights that make each part matter."""
    model.eval().initialize(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.copy_(noise * weight.size(1) ** -0.5)
            else:
                spread = float(weight.std()) if weight.dim() > 1 and float(weight.std()) > 0 else 1.0
                weight.add_(0.15 * noise * spread)
    return model
