"""What a transformer costs: parameters, operations, cache and training memory, from its configuration alone.

Every formula is asserted against real modules in the tests.
"""

from __future__ import annotations

from hanmo.models.heads import TransformConfig
from hanmo.models.transformer import TransformerConfig


def matrix_parameters(config: TransformerConfig) -> int:
    """Weights of all matrices in the blocks of one stack: what each token is multiplied with, without embeddings."""
    D = config.hidden_size
    attention = 2 * D * config.head_dim * (config.num_heads + config.num_kv_heads)
    attentions = 2 if config.encoder else 1
    return config.num_layers * (attentions * attention + (3 if config.gated else 2) * D * config.intermediate_size)


def num_parameters(config: TransformerConfig) -> int:
    """All parameters of the network; asserted against the real module in the tests."""
    D, N, H, K = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
    L, V = config.num_layers, config.vocab_size
    each = 2 if config.norm == "layer" and config.norm_bias else 1  # parameters of a norm, for each value
    sublayers = 3 if config.encoder else 2
    norms = L * sublayers * (2 if config.norm_placement == "sandwich" else 1)
    norms -= not config.first_norm and config.norm_placement != "post"
    total = matrix_parameters(config) + each * D * (norms + config.final_norm + config.embedding_norm)
    total += L * (sublayers - 1) * 2 * N * each * config.qk_norm
    total += L * (sublayers - 1) * (config.attention_bias * N * (H + 2 * K) + config.output_bias * D)
    total += L * config.mlp_bias * ((2 if config.gated else 1) * config.intermediate_size + D)
    total += V * D * (not config.shared_embedding) + config.token_types * D
    total += V * D * (config.lm and not config.tie_embeddings) + V * (config.lm and config.lm_bias)
    total += (config.positions == "learned") * (config.max_position_embeddings + config.position_offset) * D
    total += (config.positions == "relative") * config.relative_buckets * H
    if config.lm and config.lm_transform:
        total += transform_parameters(D, config.lm_transform)
    if config.head:
        outputs = len(config.head.labels)
        total += outputs * (D + config.head.bias) + config.head.crf * outputs * (outputs + 2)
        total += transform_parameters(D, config.head.transform) if config.head.transform else 0
    return total + (num_parameters(config.encoder) if config.encoder else 0)


def transform_parameters(D: int, config: TransformConfig) -> int:
    """Parameters of the dense layer and the norm before an output."""
    return D * D + D * config.bias + config.norm * D * (1 + config.norm_bias)


def forward_flops_per_token(config: TransformerConfig, length: int, source_length: int = 0) -> float:
    """Floating-point operations to process one token among ``length``, two per weight, attention included.

    Causal attention sees half of the positions on average, a sliding layer at most its window. In an encoder-decoder
    this is the cost of one token of the decoder; that of a source token is ``forward_flops_per_token(config.encoder,
    source_length)`` and the keys and values that every decoder layer computes of it.
    """
    V, D, heads = config.vocab_size, config.hidden_size, config.num_heads * config.head_dim
    weights = matrix_parameters(config) + config.lm * V * D
    weights += D * D * (config.lm and config.lm_transform is not None)
    if config.encoder:  # keys and values are computed once for each source token
        weights -= config.num_layers * 2 * D * config.num_kv_heads * config.head_dim
    seen = 0.0
    for layer in range(config.num_layers):
        window = (config.sliding_window or 0) * (1 if config.causal else 2)
        seen += min(length / 2, window) if config.slides(layer) else length / (2 if config.causal else 1)
    return 2.0 * weights + 4 * heads * (seen + config.num_layers * source_length * (config.encoder is not None))


def training_flops_per_token(config: TransformerConfig, length: int) -> float:
    """Forward and backward: three times the forward pass (Kaplan et al. 2020, section 2.1)."""
    return 3.0 * forward_flops_per_token(config, length)


def kv_cache_bytes(config: TransformerConfig, tokens: int, bytes_per_value: int = 4, source_tokens: int = 0) -> int:
    """Bytes that the keys and values of ``tokens`` positions take, and those of ``source_tokens`` of an encoder."""
    positions = tokens + (source_tokens if config.encoder else 0)
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * positions * bytes_per_value


def training_memory_bytes(config: TransformerConfig, batch_size: int, length: int) -> int:
    """Peak bytes of one fp32 training step: weights, gradients, two optimizer moments, activations, logits.

    The activations kept for the backward pass are counted tensor by tensor: per token and layer 7 of the hidden size
    (block input, two norms and their inputs, attention output, residual), the rotated and unrotated heads, and 4 of the
    feed-forward size (3 where it is not gated). Logits are held once as values and once as gradients.
    """
    tokens = batch_size * length
    heads = config.head_dim * (2 * config.num_heads + 3 * config.num_kv_heads)
    layer = 7 * config.hidden_size + heads + (4 if config.gated else 3) * config.intermediate_size
    if config.encoder:
        layer += 3 * config.hidden_size + heads
    outputs = 3 * config.vocab_size if config.lm else 0
    activations = tokens * (config.num_layers * layer + 2 * config.hidden_size + outputs)
    if config.encoder:
        activations += training_memory_bytes(config.encoder, batch_size, length) // 4
        activations -= 4 * num_parameters(config.encoder)  # counted with the whole network
    return 4 * (4 * num_parameters(config) + activations)
