"""The network's formulas against real modules, its configuration, and what `build` refuses."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hanmo.errors import ModelError
from hanmo.models.cache import KVCache
from hanmo.models.cost import forward_flops_per_token, kv_cache_bytes, num_parameters
from hanmo.models.kernels import native
from hanmo.models.transformer import Transformer, TransformerConfig, build

CONFIG = TransformerConfig(67, 32, 3, 4, 2, 8, 48, 64)
VARIANTS = [
    dataclasses.replace(
        CONFIG,
        tie_embeddings=tie,
        qk_norm=qk,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        num_kv_heads=kv,
        model_type="qwen3" if qk else "llama",
    )
    for tie, qk, bias, kv in itertools.product([True, False], [True, False], [True, False], [1, 4])
]


@pytest.mark.parametrize("config", VARIANTS)
def test_the_parameter_formula_counts_every_parameter(config: TransformerConfig) -> None:
    assert num_parameters(config) == sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, num_kv_heads=4, qk_norm=True)])
def test_the_flop_formula_equals_the_counted_products(
    config: TransformerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its fused kernel, torch computes attention without regard to causality: twice what the formula counts."""
    monkeypatch.setattr(native, "usable", lambda *_: False)  # torch counts only what it computes itself
    length = 32
    model = Transformer(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * length * length
    assert counter.get_total_flops() == forward_flops_per_token(config, length) * length + attention


def test_the_cache_formula_counts_its_bytes() -> None:
    cache = KVCache(CONFIG, batch_size=1, max_length=20)
    assert kv_cache_bytes(CONFIG, 20) == 4 * (cache.keys.numel() + cache.values.numel())


def test_a_cache_that_is_full_says_so() -> None:
    model = Transformer(CONFIG)
    cache = KVCache(CONFIG, batch_size=1, max_length=4)
    model(torch.zeros(1, 4, dtype=torch.long), cache=cache)
    with pytest.raises(ModelError, match="holds 4 positions, 5 were needed"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_selecting_rows_keeps_what_they_hold() -> None:
    model = Transformer(CONFIG)
    model.initialize(0)
    ids = torch.arange(12).view(3, 4)
    cache = KVCache(CONFIG, batch_size=3, max_length=8)
    model(ids, cache=cache)
    cache.select(torch.tensor([2, 0]))
    alone = model(torch.cat([ids[[2, 0]], torch.tensor([[5], [6]])], dim=1))[:, -1:]
    torch.testing.assert_close(model(torch.tensor([[5], [6]]), cache=cache), alone)


@pytest.mark.parametrize("config", VARIANTS)
def test_configuration_survives_the_hugging_face_form(config: TransformerConfig) -> None:
    if config.qk_norm:  # Qwen3 has no bias in the feed-forward
        config = dataclasses.replace(config, mlp_bias=False)
    assert TransformerConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "cannot be shared"),
        ({"head_dim": 7}, "even"),
        ({"vocab_size": 0}, "vocab_size must be a positive whole number"),
        ({"num_layers": 2.0}, "num_layers must be a positive whole number"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "unknown rotary scaling 'dynamic'"),
    ],
)
def test_contradictory_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "the architecture 'mamba' is not known"),
        ({"hidden_act": "mish"}, "the activation 'mish' is not known"),
        ({"vocab_size": None}, "the key 'vocab_size' is missing"),
        ({"vocab_size": 0}, "vocab_size must be"),
    ],
)
def test_unknown_architectures_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        TransformerConfig.from_hf({**CONFIG.to_hf(), **changes})


def state() -> dict[str, torch.Tensor]:
    model = Transformer(CONFIG)
    model.initialize(1)
    return dict(model.state_dict())


def test_build_gives_the_same_logits() -> None:
    model = Transformer(CONFIG)
    model.initialize(1)
    ids = torch.randint(0, 67, (2, 9))
    assert torch.equal(build(CONFIG, model.state_dict())(ids), model.eval()(ids))


def test_build_names_the_tensor_that_is_wrong() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    missing = state()
    del missing[name]
    with pytest.raises(ModelError, match=rf"missing.*{name}.*\(48, 32\)"):
        build(CONFIG, missing)
    with pytest.raises(ModelError, match=r"do not belong.*lm_head\.bias"):
        build(CONFIG, {**state(), "lm_head.bias": torch.zeros(67)})
    with pytest.raises(ModelError, match=rf"{name}.*shape \(32, 48\), expected \(48, 32\)"):
        build(CONFIG, {**state(), name: torch.zeros(32, 48)})
    with pytest.raises(ModelError, match=rf"{name}.*NaN"):
        build(CONFIG, {**state(), name: torch.full((48, 32), float("nan"))})


def test_large_finite_weights_are_not_taken_for_infinite() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    build(CONFIG, {**state(), name: torch.full((48, 32), 3e38)})


def test_a_fresh_model_predicts_nearly_uniformly_and_depends_on_its_seed() -> None:
    models = [Transformer(CONFIG) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.initialize(seed)
    ids = torch.randint(0, 67, (4, 16))
    loss = models[0].loss(ids, ids.roll(-1, 1)) / ids.numel()
    assert abs(float(loss.detach()) - torch.tensor(67.0).log()) < 0.1
    assert torch.equal(models[0](ids), models[1](ids)) and not torch.equal(models[0](ids), models[2](ids))
