"""The transformer: one decoder block, configured, and the formulas of its size and cost.

Choices this file knows:

- pre-norm residual blocks with RMSNorm (Zhang and Sennrich 2019);
- rotary positions (Su et al. 2021), with the linear and Llama-3 rescalings of long-context models;
- grouped-query attention (Ainslie et al. 2023); one group is multi-query, as many groups as heads is multi-head;
- optional RMSNorm of queries and keys (Henry et al. 2020), as Qwen3 has it;
- SwiGLU feed-forward (Shazeer 2020);
- tied or separate output embedding.

Parameter names are those of Hugging Face's Llama, so a state dict is a checkpoint. Tensor names carry their shape:

=====  ==============================================
B      batch
T      new positions in this call
S      all positions, cached ones included
D      hidden size
H, K   query heads, key/value heads
N      size of one head
F      feed-forward size
V      vocabulary
=====  ==============================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanmo.errors import ModelError

KNOWN_MODEL_TYPES = ("llama", "qwen3")


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that decides the shape of a decoder.

    Raises:
        ModelError: sizes that contradict each other.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int  # the context length, in tokens
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None  # Hugging Face's "linear" or "llama3" description
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qk_norm: bool = False  # RMSNorm of each query and key head before the rotation
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "intermediate_size", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ModelError(f"{name} must be a positive whole number, not {value!r}", where="config.json")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.num_heads} query heads cannot be shared by {self.num_kv_heads} key/value heads",
                where="config.json",
                fix="the number of query heads must be a multiple of the number of key/value heads",
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim must be even for rotary positions, not {self.head_dim}", where="config.json")
        kind = (self.rope_scaling or {}).get("rope_type", "default")
        if kind not in ("default", "linear", "llama3"):
            raise ModelError(
                f"unknown rotary scaling '{kind}'", where="config.json", fix="known: default, linear, llama3"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """Read a Hugging Face ``config.json`` of the Llama family.

        Raises:
            ModelError: an architecture this file does not know, or a key that is missing.
        """
        kind = config.get("model_type")
        if kind not in KNOWN_MODEL_TYPES:
            raise ModelError(
                f"the architecture '{kind}' is not known",
                where="config.json",
                fix="known architectures: " + ", ".join(KNOWN_MODEL_TYPES),
                zh=f"不认识的模型结构 '{kind}'，目前支持：" + "、".join(KNOWN_MODEL_TYPES),
            )
        if config.get("hidden_act", "silu") != "silu":
            raise ModelError(
                f"the activation '{config['hidden_act']}' is not known", where="config.json", fix="known: silu"
            )
        if config.get("use_sliding_window"):
            raise ModelError("sliding-window attention is not known for this architecture", where="config.json")
        rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        theta = config.get("rope_theta", rope.pop("rope_theta", 10_000.0))
        if "type" in rope:  # the name before transformers 4.43
            rope["rope_type"] = rope.pop("type")
        try:
            heads = config["num_attention_heads"]
            return cls(
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                intermediate_size=config["intermediate_size"],
                max_position_embeddings=config["max_position_embeddings"],
                rope_theta=float(theta),
                rope_scaling=rope if rope.get("rope_type", "default") != "default" else None,
                norm_eps=config.get("rms_norm_eps", 1e-6),
                tie_embeddings=bool(config.get("tie_word_embeddings", False)),
                qk_norm=kind == "qwen3",
                attention_bias=bool(config.get("attention_bias", False)),
                mlp_bias=bool(config.get("mlp_bias", False)),
            )
        except KeyError as missing:
            raise ModelError(f"the key {missing} is missing", where="config.json") from None

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` with which ``transformers`` builds the same network."""
        qwen = self.qk_norm
        rope = self.rope_scaling or {"rope_type": "default"}
        return {
            "architectures": ["Qwen3ForCausalLM" if qwen else "LlamaForCausalLM"],
            "model_type": "qwen3" if qwen else "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": self.attention_bias,
            "hidden_act": "silu",
            "torch_dtype": "float32",
            **({"use_sliding_window": False} if qwen else {"mlp_bias": self.mlp_bias}),
        }


# Size and cost -------------------------------------------------------------------------------------------------------


def matrix_parameters(config: TransformerConfig) -> int:
    """Weights of all matrices inside the blocks (what each token is multiplied with, the output embedding left out)."""
    attention = 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def num_parameters(config: TransformerConfig) -> int:
    """All parameters of the network; asserted against the real module in the tests."""
    D, N = config.hidden_size, config.head_dim
    norms = config.num_layers * (2 * D + (2 * N if config.qk_norm else 0)) + D
    biases = 0
    if config.attention_bias:
        biases += config.num_layers * (N * (config.num_heads + 2 * config.num_kv_heads) + D)
    if config.mlp_bias:
        biases += config.num_layers * (2 * config.intermediate_size + D)
    embeddings = config.vocab_size * D * (1 if config.tie_embeddings else 2)
    return embeddings + matrix_parameters(config) + norms + biases


def forward_flops_per_token(config: TransformerConfig, length: int) -> float:
    """Floating-point operations to process one token among ``length`` (two per weight, plus causal attention)."""
    weights = matrix_parameters(config) + config.vocab_size * config.hidden_size
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * length  # half of 4: causal
    return 2.0 * weights + attention


def training_flops_per_token(config: TransformerConfig, length: int) -> float:
    """Forward and backward: three times the forward pass (Kaplan et al. 2020, section 2.1)."""
    return 3.0 * forward_flops_per_token(config, length)


def kv_cache_bytes(config: TransformerConfig, tokens: int, bytes_per_value: int = 4) -> int:
    """Bytes that the keys and values of ``tokens`` positions take."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * tokens * bytes_per_value


def training_memory_bytes(config: TransformerConfig, batch_size: int, length: int) -> int:
    """Peak bytes of one fp32 training step: weights, gradients, two optimizer moments, activations, logits.

    The activations kept for the backward pass are counted tensor by tensor: per token and layer 7 of the hidden size
    (block input, two norms and their inputs, attention output, residual), the rotated and unrotated heads, and 4 of the
    feed-forward size. Logits are held once as values and once as gradients.
    """
    tokens = batch_size * length
    heads = config.head_dim * (2 * config.num_heads + 3 * config.num_kv_heads)
    layer = 7 * config.hidden_size + heads + 4 * config.intermediate_size
    activations = tokens * (config.num_layers * layer + 2 * config.hidden_size + 3 * config.vocab_size)
    return 4 * (4 * num_parameters(config) + activations)


# The network ---------------------------------------------------------------------------------------------------------


def rotary_frequencies(config: TransformerConfig) -> Tensor:
    """Angle per position of each pair of head dimensions, float32 ``[N/2]``, rescaled as the model asks."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies: Tensor = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return frequencies / float(scaling["factor"])
    if kind == "llama3":  # slow rotations are stretched, fast ones kept, those between are blended
        wavelength = 2 * math.pi / frequencies
        old = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        blend: Tensor = ((old / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * frequencies / float(scaling["factor"]) + blend * frequencies
    return frequencies


def rotate(x_BTHN: Tensor, cos_BTN: Tensor, sin_BTN: Tensor) -> Tensor:
    """Rotate each pair (n, n + N/2) of every head by the angle of its position."""
    left, right = x_BTHN.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return x_BTHN * cos_BTN.unsqueeze(2) + turned * sin_BTN.unsqueeze(2)


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension and scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


class KVCache:
    """Keys and values of every layer for positions already processed, preallocated: ``[B, K, max_length, N]``.

    Args:
        config: the model's shape.
        batch_size: number of rows that decode together.
        max_length: positions to make room for.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.max_length = max_length
        self.length = 0

    def append(self, layer: int, keys_BKTN: Tensor, values_BKTN: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of one layer and return all of its keys and values, ``[B, K, S, N]``."""
        stop = self.length + keys_BKTN.size(2)
        if stop > self.max_length:
            raise ModelError(f"the cache holds {self.max_length} positions, {stop} were needed")
        self.keys[layer, :, :, self.length : stop] = keys_BKTN
        self.values[layer, :, :, self.length : stop] = values_BKTN
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def select(self, rows: Tensor) -> None:
        """Keep only (or repeat) the given batch rows, an index tensor."""
        keys, values = self.keys[:, rows, :, : self.length], self.values[:, rows, :, : self.length]
        shape = (self.keys.size(0), len(rows), *self.keys.shape[2:])
        self.keys, self.values = self.keys.new_zeros(shape), self.values.new_zeros(shape)
        self.keys[..., : self.length, :], self.values[..., : self.length, :] = keys, values


class Attention(nn.Module):
    """Causal self-attention with rotary positions; queries share keys and values in groups."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D, H, K, N = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.heads, self.kv_heads, self.head_dim = H, K, N
        self.q_proj = nn.Linear(D, H * N, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, K * N, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, K * N, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * N, D, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(N, config.norm_eps)
            self.k_norm = RMSNorm(N, config.norm_eps)
        self.qk_norm = config.qk_norm

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_BTS: Tensor | None,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTHN = self.q_proj(x_BTD).view(B, T, self.heads, self.head_dim)
        k_BTKN = self.k_proj(x_BTD).view(B, T, self.kv_heads, self.head_dim)
        v_BKTN = self.v_proj(x_BTD).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.qk_norm:
            q_BTHN, k_BTKN = self.q_norm(q_BTHN), self.k_norm(k_BTKN)
        q_BHTN = rotate(q_BTHN, *rotary).transpose(1, 2)
        k_BKSN = rotate(k_BTKN, *rotary).transpose(1, 2)
        v_BKSN = v_BKTN
        if cache is not None:
            k_BKSN, v_BKSN = cache.append(layer, k_BKSN, v_BKTN)
        y_BHTN = F.scaled_dot_product_attention(
            q_BHTN,
            k_BKSN,
            v_BKSN,
            attn_mask=None if mask_BTS is None else mask_BTS.unsqueeze(1),
            is_causal=mask_BTS is None and T > 1,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.o_proj(y_BHTN.transpose(1, 2).reshape(B, T, self.heads * self.head_dim))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU: a gate decides, elementwise, how much of the up-projection passes."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream after a norm of its input."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_BTS: Tensor | None,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotary, mask_BTS, cache, layer)
        x_BTD = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return x_BTD


class Decoder(nn.Module):
    """Embedding, blocks and the final norm: token ids to hidden states."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Transformer(nn.Module):
    """A decoder language model.

    >>> config = TransformerConfig(11, 8, 1, 2, 1, 4, 16, 32)
    >>> Transformer(config)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 11])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("frequencies", rotary_frequencies(config), persistent=False)
        self.frequencies: Tensor

    @property
    def output_weight(self) -> Tensor:
        """The output embedding, ``[V, D]``; the input embedding itself where they are tied."""
        return self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def initialize(self, seed: int) -> None:
        """Draw all weights: normal with 1/sqrt(fan-in), zero where a block writes into the residual stream.

        With zero output projections each block starts as the identity, which lets small models train at high rates.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if parameter.dim() < 2:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                elif name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.zero_()
                else:
                    scale = 0.02 if "embed" in name or "lm_head" in name else parameter.size(1) ** -0.5
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        cache: KVCache | None = None,
        positions_BT: Tensor | None = None,
        mask_BS: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, ``[B, T, D]``. Arguments as in :meth:`forward`."""
        T = ids_BT.size(1)
        start = cache.length if cache is not None else 0
        if positions_BT is None:
            positions_BT = torch.arange(start, start + T, device=ids_BT.device).unsqueeze(0)
        angles_BTN = (positions_BT.unsqueeze(-1).float() * self.frequencies).repeat(1, 1, 2)
        x_BTD = self.model.embed_tokens(ids_BT)
        rotary = (angles_BTN.cos().to(x_BTD.dtype), angles_BTN.sin().to(x_BTD.dtype))
        mask_BTS = attention_mask(T, start, mask_BS, ids_BT.device)
        for index, block in enumerate(self.model.layers):
            x_BTD = block(x_BTD, rotary, mask_BTS, cache, index)
        if cache is not None:
            cache.length = start + T
        return self.model.norm(x_BTD)  # type: ignore[no-any-return]

    def forward(
        self,
        ids_BT: Tensor,
        *,
        cache: KVCache | None = None,
        positions_BT: Tensor | None = None,
        mask_BS: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the next token after each position.

        Args:
            ids_BT: token ids, int64 ``[B, T]``.
            cache: keys and values of earlier positions; the T new ones are appended to it.
            positions_BT: rotary positions; by default they go on from the cache.
            mask_BS: bool over all S = cached + T keys, False where a row is padded.
            last_only: compute the logits of the last position only.

        Returns:
            float32 logits ``[B, T, V]`` (``[B, 1, V]`` with ``last_only``).
        """
        x_BTD = self.hidden(ids_BT, cache=cache, positions_BT=positions_BT, mask_BS=mask_BS)
        if last_only:
            x_BTD = x_BTD[:, -1:]
        return F.linear(x_BTD, self.output_weight).float()

    def loss(self, ids_BT: Tensor, targets_BT: Tensor, chunk: int = 2048) -> Tensor:
        """Summed negative log-likelihood of the targets, in nats; targets below zero are left out.

        Logits are computed for ``chunk`` positions at a time, so that the softmax works on what the cache still holds.
        """
        x_MD = self.hidden(ids_BT).flatten(0, 1)
        targets_M = targets_BT.flatten()
        total = x_MD.new_zeros(())
        for x_D, target in zip(torch.split(x_MD, chunk), torch.split(targets_M, chunk), strict=True):
            logits = F.linear(x_D, self.output_weight).float()
            total = total + F.cross_entropy(logits, target, reduction="sum", ignore_index=-1)
        return total


def attention_mask(T: int, start: int, mask_BS: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys each new position may see, bool ``[B or 1, T, S]``; None where plain causal attention suffices.

    A padded position sees itself, so that its (unused) softmax stays finite.
    """
    if mask_BS is None and (start == 0 or T == 1):
        return None
    S = start + T
    query = torch.arange(start, S, device=device).unsqueeze(1)
    key = torch.arange(S, device=device).unsqueeze(0)
    causal_TS = key <= query
    if mask_BS is None:
        return causal_TS.unsqueeze(0)
    return (causal_TS & mask_BS.unsqueeze(1)) | (key == query)


def build(config: TransformerConfig, state: Mapping[str, Tensor]) -> Transformer:
    """Make a model from a checkpoint without initialising weights first.

    Raises:
        ModelError: a tensor is missing, unexpected, of the wrong shape, or holds NaN; the message names it.
    """
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    given = dict(state)
    if config.tie_embeddings:
        given.pop("lm_head.weight", None)
    for name in [n for n in given if n.endswith("rotary_emb.inv_freq")]:  # stored by old exporters, computed here
        del given[name]
    missing, extra = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing:
        raise ModelError(f"{len(missing)} tensors are missing, the first is '{missing[0]}' {expected[missing[0]]}")
    if extra:
        raise ModelError(f"{len(extra)} tensors do not belong to this architecture, the first is '{extra[0]}'")
    for name, tensor in given.items():
        if tuple(tensor.shape) != expected[name]:
            raise ModelError(f"the tensor '{name}' has shape {tuple(tensor.shape)}, expected {expected[name]}")
        if not tensor.sum().isfinite() and not tensor.isfinite().all():  # the sum is cheap but may overflow
            raise ModelError(f"the tensor '{name}' holds NaN or infinite values")
    model.load_state_dict(given, strict=True, assign=True)
    model.frequencies = rotary_frequencies(config)
    return model.eval()
