"""What a transformer costs: parameters, operations, cache and activations, from its configuration alone.

Every formula is asserted against real modules in the tests.
"""

from __future__ import annotations

from hanmo.models.heads import TransformConfig
from hanmo.models.transformer import TransformerConfig

VALUE = 4  # bytes of a float32


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


def attention_values(config: TransformerConfig, keys: int, ratio: float = 1.0, *, cross: bool = False) -> float:
    """Numbers that one attention keeps for the backward pass, per query.

    Args:
        keys: positions that a query could see.
        ratio: keys and values for each query.
        cross: attention to an encoder, which has no relative positions.
    """
    queries, shared = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    biased = config.positions == "relative" and not cross
    if not (biased or config.attention_softcap or config.dropout):
        # queries, keys, values, the result, and one normaliser per head: the weights are computed again
        return 2 * queries + 2 * ratio * shared + config.num_heads
    # torch keeps the weights: after the softmax, before a cap, and with dropout its noise and what it leaves; keys and
    # values are repeated for each query head
    weights = 1 + bool(config.attention_softcap) + 2 * (config.dropout > 0)
    return 2 * queries + 2 * ratio * queries + weights * config.num_heads * keys


def norm_values(config: TransformerConfig, size: int, *, fused: bool) -> int:
    """Numbers that a norm of ``size`` values keeps: its input and one or two statistics; without the native kernels
    an RMSNorm also what it multiplies by its weight."""
    if config.norm == "layer":
        return size + 2
    return size + 1 if fused else 2 * size + 1


def block_values(config: TransformerConfig, length: int, source_length: int = 0, *, fused: bool = True) -> float:
    """Numbers that a block keeps for the backward pass, per token; tested against what autograd really holds.

    Args:
        length: tokens of a row.
        source_length: of the encoder's row.
        fused: the native kernels compute norms, rotations and activations.
    """
    D, heads = config.hidden_size, config.num_heads + config.num_kv_heads
    sublayers = 3 if config.encoder else 2
    norms = sublayers * (2 if config.norm_placement == "sandwich" else 1)
    values: float = norms * norm_values(config, D, fused=fused)
    values += sublayers * D  # what the first products of a sublayer read
    values += sublayers * D * (config.dropout > 0)  # noise on its output
    values += attention_values(config, length)
    if config.qk_norm:  # of each head, before the rotation
        values += heads * norm_values(config, config.head_dim, fused=fused)
    if config.encoder:
        values += attention_values(config, source_length, source_length / max(1, length), cross=True)
    # gate and up-projection and what the last product reads; torch by itself also keeps the activated gate
    return values + config.intermediate_size * ((3 if fused else 4) if config.gated else 2)


def activation_bytes(
    config: TransformerConfig,
    rows: int,
    length: int,
    source_length: int = 0,
    *,
    layers: int | None = None,
    recomputed: bool = False,
    fused: bool = True,
) -> int:
    """Bytes that a forward pass in float32 keeps for the backward pass, weights, loss and head left out.

    Args:
        rows: of ``length`` tokens each, and of ``source_length`` for the encoder of an encoder-decoder.
        layers: gradients reach only so many blocks, those nearest to the output; None: all, and the embedding.
        recomputed: blocks keep only their input, and are computed again one by one.
        fused: see :func:`block_values`.
    """
    D, each = config.hidden_size, block_values(config, length, source_length, fused=fused)
    count = config.num_layers if layers is None else max(1, layers)
    values = count * D + each if recomputed else count * each
    norms = config.final_norm + config.embedding_norm
    norms -= layers is None and not config.first_norm and config.norm_placement != "post"
    values += norms * norm_values(config, D, fused=fused)
    values += D * (config.dropout > 0)
    total = VALUE * rows * length * values
    if config.positions == "rotary":  # cosines and sines, which all rows share
        kinds = {config.slides(layer) for layer in range(config.num_layers)}
        total += VALUE * 2 * length * len(kinds) * (config.rotary_dim or config.head_dim)
    if config.encoder and layers is None:
        total += activation_bytes(config.encoder, rows, source_length, recomputed=recomputed, fused=fused)
        total += VALUE * rows * source_length * D  # what every layer of the decoder reads
    return round(total)
