"""The network's formulas against real modules, its configuration, and what `build` refuses."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hanmo.errors import ModelError
from hanmo.models.cache import CachePool, KVCache
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


@pytest.mark.parametrize("config", VARIANTS)
def test_texts_of_different_lengths_share_a_pool(config: TransformerConfig) -> None:
    model = Transformer(config).eval()
    model.initialize(0)
    pool = CachePool(config, torch.float32, torch.device("cpu"))
    texts = [[5, 1, 2, 3, 4], [7, 8], [9, 6, 5]]
    slots = [pool.take(columns) for columns in (3, 8, 4)]  # it grows, and keeps what it holds
    for ids, slot in zip(texts, slots, strict=True):
        model(torch.tensor([ids[:-1]]), cache=pool.view([slot], [0], len(ids) - 1))
    pool.copy(slots[1], slots[0], 1)
    texts[0] = [7, 2]
    order = [2, 0, 1]
    view = pool.view([slots[row] for row in order], [len(texts[row]) - 1 for row in order], 1)
    last = torch.tensor([texts[row][-1:] for row in order])
    together = model(last, cache=view, positions_BT=view.places_BT)
    for row, logits in zip(order, together, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([texts[row]]))[0, -1:], atol=1e-5, rtol=1e-4)


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


# Other ways to compute: compiled, in other types, transformed by torch ------------------------------------------------

WIDE = TransformerConfig(101, 64, 2, 4, 2, 16, 96, 64, qk_norm=True, model_type="qwen3")
SEGMENTS = torch.tensor([[1] * 20 + [2] * 30 + [0] * 14, [1] * 64])


def wide_model() -> Transformer:
    """A network none of whose weights is zero."""
    model = Transformer(WIDE)
    model.initialize(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def loss_and_gradient(
    model: Transformer, segments: torch.Tensor | None, loss: Any = None
) -> tuple[float, torch.Tensor]:
    ids = torch.randint(0, 101, (2, 64), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    value = (loss or model.loss)(ids, ids.roll(-1, 1), segments_BT=segments)
    value.backward()
    return value.item(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
def test_a_compiled_network_is_the_network(segments: torch.Tensor | None) -> None:
    model = wide_model()
    value, gradient = loss_and_gradient(model, segments)
    compiled = torch.compile(model.loss, backend="aot_eager")
    again, compiled_gradient = loss_and_gradient(model, segments, compiled)
    assert again == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(compiled_gradient, gradient, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        ids = torch.arange(64).view(1, 64)
        whole = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(whole(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("way", ["bfloat16", "float64", "autocast"])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_other_types(way: str, segments: torch.Tensor | None) -> None:
    model = wide_model()
    value, gradient = loss_and_gradient(model, segments)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        if way != "autocast":
            model = model.to(getattr(torch, way))
        other, other_gradient = loss_and_gradient(model, segments)
    tolerance = 1e-5 if way == "float64" else 0.05
    assert other == pytest.approx(value, rel=tolerance)
    assert float((other_gradient - gradient).norm() / gradient.norm()) < tolerance


def test_gradients_of_gradients_are_refused() -> None:
    model, ids = wide_model(), torch.arange(64).view(1, 64)
    for loss in (model.loss(ids, ids), *((model(ids).logsumexp(-1).sum(),) if native.library() is not None else ())):
        with pytest.raises(ModelError, match="no gradients of their own"):
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True, allow_unused=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functions_of_torch_transform_the_network() -> None:
    model, ids = wide_model(), torch.randint(0, 101, (3, 10), generator=torch.Generator().manual_seed(3))
    weights = dict(model.named_parameters())

    def score(weights: dict[str, torch.Tensor], ids_T: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (ids_T[None],)).logsumexp(-1).sum()

    each = torch.func.vmap(torch.func.grad(score), (None, 0))(weights, ids)
    score(weights, ids[1]).backward()
    for name, parameter in weights.items():
        torch.testing.assert_close(each[name][1], parameter.grad, rtol=1e-3, atol=1e-4)


def test_a_copy_computes_the_same() -> None:
    model, ids = wide_model(), torch.arange(64).view(1, 64)
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))


def test_the_cache_continues_any_window() -> None:
    """Read at once and then one by one: as without a cache, with a window shorter and longer than what was read."""
    for window in (3, 6, 50):
        model = Transformer(dataclasses.replace(WIDE, sliding_window=window, sliding_layers=(True, False)))
        model.load_state_dict(wide_model().state_dict())
        ids = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(4))
        cache = KVCache(model.config, 2, 12)
        with torch.no_grad():
            parts = [model(part, cache=cache) for part in ids.split((6, 3, 1, 1, 1), 1)]
            torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-4, atol=1e-4)
