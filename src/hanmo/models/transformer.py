"""The transformer: one block, configured. Its angles and masks are in ``positions.py``, its cost in ``cost.py``.

Every architecture Hanmo knows is a :class:`TransformerConfig` of this one file; ``architectures/`` maps the names and
configurations of other tools to it. The choices the block knows:

- kind: decoder (causal), encoder (bidirectional), encoder-decoder (cross-attention; Vaswani et al. 2017);
- norm: layer norm (Ba et al. 2016), RMSNorm (Zhang and Sennrich 2019), the same with weights around zero (Gemma);
  before the sublayer (pre), after the residual sum (post), or on both sides of the sublayer (sandwich); of queries and
  keys (Henry et al. 2020); of the embeddings;
- positions: rotary (Su et al. 2021), also for a part of each head, with linear, Llama 3, YaRN (Peng et al. 2023) and
  LongRoPE (Ding et al. 2024) rescaling, and another base in sliding layers; learned; sinusoidal; relative bias (T5);
- attention: multi-head, grouped, single key/value head (Ainslie et al. 2023); full or sliding window, layer by layer;
  soft caps of scores and logits (Gemma 2);
- feed-forward: plain or gated (Shazeer 2020) with ReLU, GELU, its tanh form, or SiLU;
- output: tied or separate embedding, scaled, with bias, after a transform (masked language models), or a task's head.

Parameter names follow Hugging Face's Llama; a block has ``attention_output_norm`` and ``mlp_output_norm`` where norms
stand after a sublayer. Tensor names carry their shape:

=====  ==============================================
B      batch
T      new positions in this call
S      all positions, cached ones included; in cross-attention, those of the source
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
from hanmo.models.cache import KVCache, Memory
from hanmo.models.config_checks import check_config
from hanmo.models.heads import Head, HeadConfig, Transform, TransformConfig
from hanmo.models.kernels.attention import attention
from hanmo.models.kernels.elementwise import activate, gated, norm_rotate, rms_norm, rotate
from hanmo.models.kernels.loss import token_logprobs, token_loss
from hanmo.models.kernels.products import Linear
from hanmo.models.positions import (
    Rotary,
    View,
    attention_mask,
    key_distances,
    relative_buckets,
    segment_positions,
    sinusoids,
)
from hanmo.models.tensors import check_tensors


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that decides the shape of a network; what has a default is Llama's choice.

    Raises:
        ModelError: sizes that contradict each other, or a choice that is not known.
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
    rope_scaling: dict[str, Any] | None = None  # Hugging Face's description, "rope_type" being one of SCALINGS
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qk_norm: bool = False  # norm of each query and key head before the rotation
    attention_bias: bool = False  # of queries, keys and values
    mlp_bias: bool = False
    model_type: str = "llama"  # the architecture as which it is stored
    causal: bool = True
    norm: str = "rms"
    norm_bias: bool = False
    norm_placement: str = "pre"
    first_norm: bool = True  # ModernBERT has none before its first attention: the embeddings are normed already
    final_norm: bool = True
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    positions: str = "rotary"
    position_offset: int = 0  # row of position 0 in a learned table (RoBERTa and BART begin at 2)
    rotary_dim: int | None = None  # dimensions of each head that are rotated; None: all
    rope_local_theta: float | None = None  # rotary base of the sliding layers, which are never rescaled; None: the same
    relative_buckets: int = 32
    relative_distance: int = 128
    token_types: int = 0  # segment embeddings (BERT)
    sliding_window: int | None = None  # keys a position sees: so many up to itself, or on each side where not causal
    sliding_layers: tuple[bool, ...] | None = None  # which layers slide; None: all, if there is a window
    attention_scale: float | None = None  # of the scores; None: 1/sqrt(head_dim)
    attention_softcap: float | None = None
    output_bias: bool = False  # of the attention's output projection
    gated: bool = True
    activation: str = "silu"
    lm: bool = True  # has an output over the vocabulary
    lm_transform: TransformConfig | None = None
    lm_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    head: HeadConfig | None = None
    encoder: TransformerConfig | None = None  # the stack this one attends to
    shared_embedding: bool = False  # of an encoder: it reads with the token embedding of its decoder
    dropout: float = 0.0  # of embeddings, attention and sublayer outputs, in training

    def __post_init__(self) -> None:
        check_config(self)

    def slides(self, layer: int) -> bool:
        """Whether a layer sees only a window."""
        return self.sliding_window is not None and (self.sliding_layers is None or self.sliding_layers[layer])

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """Read a Hugging Face ``config.json``; see :func:`hanmo.models.architectures.read_config`."""
        from hanmo.models.architectures import read_config

        return read_config(config)

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` with which ``transformers`` builds the same network."""
        from hanmo.models.architectures import write_config

        return write_config(self)


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension and scale by ``offset`` + weight."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)


class Embedding(nn.Embedding):
    """A table of vectors. Without values (torch's "meta" device) it draws none: that would load torch's compiler."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def make_norm(config: TransformerConfig, size: int | None = None) -> nn.Module:
    """The norm of an architecture, over the hidden size by default."""
    if config.norm == "layer":
        return nn.LayerNorm(size or config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
    return RMSNorm(size or config.hidden_size, config.norm_eps, 1.0 if config.norm == "rms+1" else 0.0)


class Attention(nn.Module):
    """Attention to earlier or all positions, or to an encoder's states; queries share keys and values in groups."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D, H, K, N = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.heads, self.kv_heads, self.head_dim = H, K, N
        self.scale, self.softcap, self.dropout = config.attention_scale, config.attention_softcap, config.dropout
        self.causal = config.causal
        self.q_proj = Linear(D, H * N, bias=config.attention_bias)
        self.k_proj = Linear(D, K * N, bias=config.attention_bias)
        self.v_proj = Linear(D, K * N, bias=config.attention_bias)
        self.o_proj = Linear(H * N, D, bias=config.output_bias)
        self.q_norm = make_norm(config, N) if config.qk_norm else None
        self.k_norm = make_norm(config, N) if config.qk_norm else None

    def heads_of(
        self, x_BSD: Tensor, projection: nn.Module, heads: int, norm: nn.Module | None, view: View | None
    ) -> Tensor:
        """The heads of a projection, normed and rotated as the network asks, ``[B, S, heads, N]``."""
        x_BSHN: Tensor = projection(x_BSD).view(*x_BSD.shape[:2], heads, self.head_dim)
        if view is None or view.rotary is None:
            return x_BSHN if norm is None else norm(x_BSHN)
        if isinstance(norm, RMSNorm):
            return norm_rotate(x_BSHN, norm.weight, norm.eps, *view.rotary, offset=norm.offset)
        return rotate(x_BSHN if norm is None else norm(x_BSHN), *view.rotary)

    def keys_values(self, x_BSD: Tensor, view: View | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of some states, ``[B, S, K, N]`` each."""
        k_BSKN = self.heads_of(x_BSD, self.k_proj, self.kv_heads, self.k_norm, view)
        return k_BSKN, self.heads_of(x_BSD, self.v_proj, self.kv_heads, None, None)

    def forward(self, x_BTD: Tensor, view: View, cache: KVCache | None, layer: int) -> Tensor:
        """Self-attention."""
        k_BSKN, v_BSKN = self.keys_values(x_BTD, view)
        if cache is not None:
            cached = cache.append(layer, k_BSKN, v_BSKN)
            if cache.length:  # else the new positions are all, and lie better in memory
                k_BSKN, v_BSKN = cached
        causal = self.causal and view.mask is None and k_BSKN.size(1) == x_BTD.size(1)
        return self.attend(x_BTD, k_BSKN, v_BSKN, view, causal=causal)

    def attend(self, x_BTD: Tensor, k_BSKN: Tensor, v_BSKN: Tensor, view: View, *, causal: bool) -> Tensor:
        """The answer to the queries of ``x_BTD``."""
        q_BTHN = self.heads_of(x_BTD, self.q_proj, self.heads, self.q_norm, view)
        y_BTHN = attention(
            q_BTHN,
            k_BSKN,
            v_BSKN,
            causal=causal,
            scale=self.scale,
            window=view.window,
            segments_BT=view.segments_BT,
            mask=view.mask,
            softcap=self.softcap,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.o_proj(y_BTHN.flatten(2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Two matrices with an activation between them, or three: a gate decides how much of the up-projection passes."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D, F_, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(D, F_, bias=bias) if config.gated else None
        self.up_proj = Linear(D, F_, bias=bias)
        self.down_proj = Linear(F_, D, bias=bias)
        self.activation = config.activation

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(activate(self.up_proj(x_BTD), self.activation))  # type: ignore[no-any-return]
        return self.down_proj(gated(self.gate_proj(x_BTD), self.up_proj(x_BTD), self.activation))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Self-attention, cross-attention if there is an encoder, and feed-forward, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        self.normed_sum, self.dropout, self.layer = config.norm_placement == "post", config.dropout, layer

        def norm(wanted: bool) -> nn.Module | None:
            return make_norm(config) if wanted else None

        self.input_layernorm = norm(before and (config.first_norm or layer > 0))
        self.self_attn = Attention(config)
        self.attention_output_norm = norm(after)
        if config.encoder:
            self.cross_attention_norm = norm(before)
            self.cross_attn = Attention(config)
            self.cross_attention_output_norm = norm(after)
        self.post_attention_layernorm = norm(before)
        self.mlp = FeedForward(config)
        self.mlp_output_norm = norm(after)

    def add(self, x_BTD: Tensor, y_BTD: Tensor, norm: nn.Module | None) -> Tensor:
        """Add a sublayer's output to the residual stream, normed before (sandwich) or after (post) the sum."""
        y_BTD = F.dropout(y_BTD, self.dropout, self.training)
        if norm is None:
            return x_BTD + y_BTD
        return norm(x_BTD + y_BTD) if self.normed_sum else x_BTD + norm(y_BTD)  # type: ignore[no-any-return]

    def forward(self, x_BTD: Tensor, view: View, cache: KVCache | None, memory: Memory | None) -> Tensor:
        y_BTD = x_BTD if self.input_layernorm is None else self.input_layernorm(x_BTD)
        layer = 0 if cache is None else self.layer  # blocks that do not look at their number share what is compiled
        x_BTD = self.add(x_BTD, self.self_attn(y_BTD, view, cache, layer), self.attention_output_norm)
        if memory is not None:
            y_BTD = x_BTD if self.cross_attention_norm is None else self.cross_attention_norm(x_BTD)
            y_BTD = self.look_up(y_BTD, memory, cache)
            x_BTD = self.add(x_BTD, y_BTD, self.cross_attention_output_norm)
        y_BTD = x_BTD if self.post_attention_layernorm is None else self.post_attention_layernorm(x_BTD)
        return self.add(x_BTD, self.mlp(y_BTD), self.mlp_output_norm)

    def look_up(self, x_BTD: Tensor, memory: Memory, cache: KVCache | None) -> Tensor:
        """Attend to the encoder's states; their keys and values are computed once per cache."""
        found = None if cache is None else cache.source.get(self.layer)
        if found is None:
            found = self.cross_attn.keys_values(memory.states_BSD)
            if cache is not None:
                cache.source[self.layer] = found
        mask = None if memory.mask_BS is None else memory.mask_BS[:, None, None, :]
        return self.cross_attn.attend(x_BTD, *found, View(mask=mask), causal=False)


class Stack(nn.Module):
    """Embeddings, blocks and the final norm: token ids to hidden states."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_size
        if not config.shared_embedding:
            self.embed_tokens = Embedding(config.vocab_size, D)
        if config.positions == "learned":
            self.embed_positions = Embedding(config.max_position_embeddings + config.position_offset, D)
        if config.positions == "relative":
            self.relative_bias = Embedding(config.relative_buckets, config.num_heads)
        if config.token_types:
            self.embed_types = Embedding(config.token_types, D)
        self.embed_norm = make_norm(config) if config.embedding_norm else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config) if config.final_norm else None
        self.kinds = sorted({config.slides(layer) for layer in range(config.num_layers)})  # of layers: sliding or not
        rotary = {str(local): Rotary(config, local=local) for local in self.kinds if config.positions == "rotary"}
        self.rotary = nn.ModuleDict(rotary) if rotary else None

    def forward(
        self,
        ids_BT: Tensor,
        embedding_VD: Tensor,
        *,
        cache: KVCache | None = None,
        positions_BT: Tensor | None = None,
        mask_BS: Tensor | None = None,
        types_BT: Tensor | None = None,
        memory: Memory | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``[B, T, D]``; arguments as in :meth:`Transformer.forward`."""
        T, start = ids_BT.size(1), cache.length if cache is not None else 0
        if segments_BT is not None:
            positions_BT, mask_BS = segment_positions(segments_BT), None
        elif positions_BT is None and mask_BS is not None:  # counted from each row's first real token
            positions_BT = (mask_BS.long().cumsum(1) - 1).clamp(min=0)[:, start:]
        elif positions_BT is None:
            positions_BT = torch.arange(start, start + T, device=ids_BT.device).unsqueeze(0)
        x_BTD = self.embed(ids_BT, embedding_VD, positions_BT, types_BT)
        reach_B1, places_BT = (None, None) if cache is None else (cache.reach_B1, cache.places_BT)
        views = {}
        for local in self.kinds:
            rotary = self.rotary[str(local)](positions_BT, x_BTD.dtype, reach_B1) if self.rotary is not None else None
            views[local] = self.view(x_BTD, start, mask_BS, segments_BT, rotary, local=local, places_BT=places_BT)
        for layer, block in enumerate(self.layers):
            x_BTD = block(x_BTD, views[self.config.slides(layer)], cache, memory)
        if cache is not None:
            cache.length = start + T
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def embed(self, ids_BT: Tensor, embedding_VD: Tensor, positions_BT: Tensor, types_BT: Tensor | None) -> Tensor:
        """The states that enter the first block."""
        config = self.config
        x_BTD = F.embedding(ids_BT, embedding_VD)
        if config.embedding_scale != 1:
            x_BTD = x_BTD * config.embedding_scale
        if config.positions == "learned":
            x_BTD = x_BTD + self.embed_positions(positions_BT + config.position_offset)
        elif config.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoids(positions_BT, config.hidden_size).to(x_BTD.dtype)
        if config.token_types:
            x_BTD = x_BTD + self.embed_types(torch.zeros_like(ids_BT) if types_BT is None else types_BT)
        if self.embed_norm is not None:
            x_BTD = self.embed_norm(x_BTD)
        return F.dropout(x_BTD, config.dropout, self.training)

    def view(
        self,
        x_BTD: Tensor,
        start: int,
        mask_BS: Tensor | None,
        segments_BT: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        *,
        local: bool,
        places_BT: Tensor | None = None,
    ) -> View:
        """What T positions from ``start`` on (or at ``places_BT``) see in the full or the sliding layers; a mask only
        where one is needed."""
        config, T, S = self.config, x_BTD.size(1), start + x_BTD.size(1)
        window = config.sliding_window if local else None
        relative = config.positions == "relative"
        if start == 0 and mask_BS is None and not relative:
            return View(rotary, None, window, segments_BT)
        within = window is not None and window < S
        mask = None
        ragged = places_BT is not None
        if mask_BS is not None or segments_BT is not None or within or ragged or (config.causal and T > 1):
            seen: dict[str, Any] = {"window": window, "mask_BS": mask_BS, "segments_BT": segments_BT}
            seen["places_BT"] = places_BT
            mask = attention_mask(T, S, x_BTD.device, causal=config.causal, start=start, **seen).unsqueeze(1)
        if relative:
            distances_BTS = key_distances(T, S, x_BTD.device, start, places_BT)
            bias_BTSH = self.relative_bias(relative_buckets(distances_BTS, config))
            bias_BHTS: Tensor = bias_BTSH.permute(0, 3, 1, 2).to(x_BTD.dtype)
            mask = bias_BHTS if mask is None else bias_BHTS.masked_fill(~mask, -math.inf)
        return View(rotary, mask)


class Transformer(nn.Module):
    """A decoder, an encoder or both, with an output over the vocabulary, a task's head, or neither.

    >>> config = TransformerConfig(11, 8, 1, 2, 1, 4, 16, 32)
    >>> Transformer(config)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 11])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Stack(config)
        self.encoder = Stack(config.encoder) if config.encoder else None
        if config.lm and config.lm_transform:
            self.lm_transform = Transform(config.hidden_size, config.lm_transform)
        if config.lm and not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.lm and config.lm_bias else None
        self.head = Head(config.hidden_size, config.head) if config.head else None

    @property
    def output_weight(self) -> Tensor:
        """The output embedding, ``[V, D]``; the input embedding itself where they are tied (or there is no output)."""
        tied = self.config.tie_embeddings or not self.config.lm
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def initialize(self, seed: int) -> None:
        """Draw all weights: normal with 1/sqrt(fan-in), zero where a block writes into the residual stream.

        With zero output projections each block starts as the identity, which lets small models train at high rates.
        """
        generator = torch.Generator().manual_seed(seed)
        norms = {id(module.weight): 1.0 - module.offset for module in self.modules() if isinstance(module, RMSNorm)}
        norms |= {id(module.weight): 1.0 for module in self.modules() if isinstance(module, nn.LayerNorm)}
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if parameter.dim() < 2:
                    parameter.fill_(norms.get(id(parameter), 0.0))
                elif name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.zero_()
                else:
                    small = "embed" in name or name.startswith(("lm_head", "head."))
                    scale = 0.02 / self.config.logit_scale if small else parameter.size(1) ** -0.5
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)

    def encode(self, ids_BS: Tensor, *, mask_BS: Tensor | None = None, segments_BS: Tensor | None = None) -> Memory:
        """The encoder's states of some source texts, for ``memory`` of :meth:`forward`.

        Args:
            ids_BS: token ids of the sources.
            mask_BS: bool, False where a row is padded; or
            segments_BS: 1 for tokens, 0 for padding on the right, which is faster in training.

        Raises:
            ModelError: the network has no encoder beside its decoder.
        """
        if self.encoder is None:
            raise ModelError("this network has no encoder beside its decoder", zh="该网络没有独立的编码器")
        weight = (self.model if self.encoder.config.shared_embedding else self.encoder).embed_tokens.weight
        states_BSD = self.encoder(ids_BS, weight, mask_BS=mask_BS, segments_BT=segments_BS)
        return Memory(states_BSD, mask_BS if segments_BS is None else segments_BS > 0)

    def hidden(self, ids_BT: Tensor, **inputs: Any) -> Tensor:
        """Hidden states after the final norm, ``[B, T, D]``. Arguments as in :meth:`forward`."""
        return self.model(ids_BT, self.model.embed_tokens.weight, **inputs)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 scores of the vocabulary from hidden states, ``[..., D]`` to ``[..., V]``."""
        config = self.config
        if config.lm_transform:
            hidden = self.lm_transform(hidden)
        if config.logit_scale != 1:
            hidden = hidden * config.logit_scale
        scores = F.linear(hidden, self.output_weight, self.lm_bias).float()
        if config.logit_softcap is not None:
            scores = config.logit_softcap * torch.tanh(scores / config.logit_softcap)
        return scores

    def forward(
        self,
        ids_BT: Tensor,
        *,
        cache: KVCache | None = None,
        positions_BT: Tensor | None = None,
        mask_BS: Tensor | None = None,
        types_BT: Tensor | None = None,
        memory: Memory | None = None,
        segments_BT: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the next token after each position; of the token itself where the network is not causal.

        Args:
            ids_BT: token ids, int64 ``[B, T]``.
            cache: keys and values of earlier positions; the T new ones are appended to it.
            positions_BT: by default they count from each row's first real token and go on from the cache.
            mask_BS: bool over all S = cached + T keys, False where a row is padded.
            types_BT: segment of each token, where the network has segments; default 0.
            memory: what the encoder of an encoder-decoder made of the source.
            segments_BT: int64, the text that each position belongs to, where rows hold several; padding is 0. Texts are
                contiguous, none sees another, and positions count from the beginning of each. Not with a cache.
            last_only: compute the logits of the last position only.

        Returns:
            float32 logits ``[B, T, V]`` (``[B, 1, V]`` with ``last_only``); the scores of the head if there is one;
            the hidden states ``[B, T, D]`` of a network that has neither.
        """
        x_BTD = self.hidden(
            ids_BT,
            cache=cache,
            positions_BT=positions_BT,
            mask_BS=mask_BS,
            types_BT=types_BT,
            memory=memory,
            segments_BT=segments_BT,
        )
        if self.head is not None:
            return self.head(x_BTD, mask_BS if segments_BT is None else segments_BT > 0).float()  # type: ignore[no-any-return]
        if last_only:
            x_BTD = x_BTD[:, -1:]
        return self.logits(x_BTD) if self.config.lm else x_BTD

    def loss(self, ids_BT: Tensor, targets_BT: Tensor, *, chunk: int | None = None, **inputs: Any) -> Tensor:
        """Summed negative log-likelihood of the targets, in nats; targets below zero are left out.

        Logits are computed for ``chunk`` positions at a time, never all at once; by default so many that they stay in
        the cache. Other arguments as in :meth:`forward`.
        """
        return token_loss(*self.loss_inputs(ids_BT, targets_BT, **inputs), chunk=chunk, **self.output_form())

    def target_logprobs(self, ids_BT: Tensor, targets_BT: Tensor, **inputs: Any) -> Tensor:
        """Log probability of each target in nats, ``[B, T]``; zero where a target is below zero."""
        rows = self.hidden(ids_BT, **inputs).flatten(0, 1)
        if self.config.lm_transform:
            rows = self.lm_transform(rows)
        found = token_logprobs(rows, self.output_weight, targets_BT.flatten(), **self.output_form())
        return found.view(targets_BT.shape)

    def loss_inputs(self, ids_BT: Tensor, targets_BT: Tensor, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states of the positions that count, the output embedding, and their targets."""
        x_MD, targets_M = self.hidden(ids_BT, **inputs).flatten(0, 1), targets_BT.flatten()
        if self.config.lm_transform:
            counted_M = targets_M >= 0
            x_MD, targets_M = self.lm_transform(x_MD[counted_M]), targets_M[counted_M]
        return x_MD, self.output_weight, targets_M

    def output_form(self) -> dict[str, Any]:
        """How logits are made of hidden states and the output embedding."""
        config = self.config
        return {"bias": self.lm_bias, "scale": config.logit_scale, "softcap": config.logit_softcap}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's tensors, by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def build(config: TransformerConfig, state: Mapping[str, Tensor], *, checked: bool = False) -> Transformer:
    """Make a model from a checkpoint without initialising weights first; the tensors are taken as they are, uncopied.

    Args:
        checked: their names, shapes and values were checked when they were read.

    Raises:
        ModelError: a tensor is missing, unexpected, of the wrong shape, or holds NaN; the message names it.
    """
    with torch.device("meta"):
        model = Transformer(config)
    if not checked:
        check_tensors(shapes_of(model), state)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()
