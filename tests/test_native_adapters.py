"""Adapters in the native engine: each row is changed by its own, as in the network of torch with that adapter in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hanmo.errors import ModelError
from hanmo.inference.native import library
from hanmo.inference.native.adapters import changes_of_network
from hanmo.inference.native.decoder import NativeDecoder, PagedCache, Weights, prepare
from hanmo.models.adapters import LoraConfig, add_adapter, base_state, merge, remove_adapter, save_adapter, set_active
from hanmo.models.transformer import Transformer

from .native_cases import decoder

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason=f"no native engine: {library.load()[1]}")

IDS = torch.randint(0, 101, (60,), generator=torch.Generator().manual_seed(0)).tolist()
CONFIGS = {
    "all": LoraConfig(rank=5),
    "attention": LoraConfig(rank=20, alpha=10, targets=("q_proj", "v_proj", "o_proj"), rslora=True),
    "mlp": LoraConfig(rank=3, targets=("up_proj", "down_proj")),
}


def with_adapters(layout: str) -> Transformer:
    """A network with an adapter of each configuration, in which B is not zero."""
    model = decoder(layout)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        add_adapter(model, name, config, seed)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("lora_B"):
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def native(model: Transformer, precision: str, threads: int = 2) -> NativeDecoder:
    """The network without its adapters."""
    parts = prepare(model.config, Weights.of_state(base_state(model)), precision)
    return NativeDecoder(model.config, parts, threads=threads, rows=256)


def alone(native_decoder: NativeDecoder, adapter: int) -> torch.Tensor:
    """Logits of one text, a few tokens at a time."""
    cache, out = PagedCache(native_decoder, 2), []
    for start in range(0, 60, 6):
        positions = range(start, start + 6)
        out.append(cache.forward(IDS[start : start + 6], [0] * 6, positions, [[1, 0]], range(6), [adapter] * 6))
    return torch.cat(out)


@pytest.mark.parametrize("layout", ["llama", "qwen2", "gemma3", "gpt2", "odd sizes"])
def test_logits_are_those_of_the_network_with_the_adapter(layout: str) -> None:
    model = with_adapters(layout)
    decoder = native(model, "fp32")
    numbers = {name: decoder.add_adapter(changes_of_network(model, name)) for name in CONFIGS}
    set_active(model, {})
    with torch.inference_mode():
        plain = model(torch.tensor([IDS]))[0]
    for name, number in numbers.items():
        set_active(model, {name: 1.0})
        with torch.inference_mode():
            expected = model(torch.tensor([IDS]))[0]
        assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
        for got in (
            alone(decoder, number),
            PagedCache(decoder, 2).forward(IDS, [0] * 60, range(60), [[0, 1]], range(60), [number] * 60),
        ):
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_rows_of_several_adapters_have_the_bits_they_have_alone(precision: str) -> None:
    model = with_adapters("llama")
    decoder, single = native(model, precision), native(model, precision, threads=1)
    plain = alone(single, -1)
    numbers = [decoder.add_adapter(changes_of_network(model, name)) for name in CONFIGS]
    assert [single.add_adapter(changes_of_network(model, name)) for name in CONFIGS] == numbers == [0, 1, 2]
    expected = {number: alone(single, number) for number in (-1, *numbers)}
    assert torch.equal(expected[-1], plain)
    assert not torch.equal(expected[0], plain)
    chosen = [-1, 0, 2, 1]
    cache = PagedCache(decoder, 8)
    tables = [[2 * text, 2 * text + 1] for text in range(4)]
    for start, stop in ((0, 40), (40, 41), (41, 43), (43, 60)):
        count = stop - start
        texts = [text for text in range(4) for _ in range(count)]
        adapters = [chosen[text] for text in texts]
        got = cache.forward(
            IDS[start:stop] * 4, texts, [*range(start, stop)] * 4, tables, range(4 * count), adapters
        ).split(count)
        for text, number in enumerate(chosen):
            assert torch.equal(got[text], expected[number][start:stop])


def test_quantised_weights_with_an_adapter_are_near_the_merged_network() -> None:
    model = with_adapters("llama")
    decoder = native(model, "int8")
    got = alone(decoder, decoder.add_adapter(changes_of_network(model, "all")))
    merge(model, ["all"])
    with torch.inference_mode():
        expected = model(torch.tensor([IDS]))[0]
    assert (got - expected).abs().max() <= 0.1 * expected.abs().max()


def test_folders_are_read_and_numbers_given_again(tmp_path: Path) -> None:
    model = with_adapters("qwen2")
    decoder = native(model, "fp32")
    expected = {}
    for name in CONFIGS:
        save_adapter(tmp_path / name, model, name, base="a model")
        expected[name] = alone(decoder, decoder.add_adapter(changes_of_network(model, name)))
        decoder.remove_adapter(0)
    for number, name in enumerate(CONFIGS):
        assert decoder.add_adapter(tmp_path / name) == number
        assert torch.equal(alone(decoder, number), expected[name])
    decoder.remove_adapter(1)
    with pytest.raises(ModelError, match="no adapter"):
        alone(decoder, 1)
    with pytest.raises(ModelError, match="no adapter"):
        decoder.remove_adapter(1)
    assert decoder.add_adapter(tmp_path / "mlp") == 1
    assert torch.equal(alone(decoder, 1), expected["mlp"])


def test_what_is_more_than_low_rank_matrices_is_refused(tmp_path: Path) -> None:
    model = decoder("qwen2")
    engine = native(model, "fp32")
    for name, config, message in (
        ("dora", LoraConfig(rank=2, dora=True), "DoRA"),
        ("whole", LoraConfig(rank=2, modules_to_save=("lm_head",)), "whole"),
        ("head", LoraConfig(rank=2, targets=("lm_head", "q_proj")), "lm_head"),
    ):
        add_adapter(model, name, config)
        save_adapter(tmp_path / name, model, name)
        with pytest.raises(ModelError, match=message):
            engine.add_adapter(tmp_path / name)
        with pytest.raises(ModelError, match=message):
            engine.add_adapter(changes_of_network(model, name))
        remove_adapter(model, name)
    assert not engine.adapters


def test_adapters_of_other_networks_are_refused(tmp_path: Path) -> None:
    model = with_adapters("llama")
    engine = native(model, "fp32")
    (changes := dict(changes_of_network(model, "all")))["model.layers.0.self_attn.q_proj"] = (
        torch.ones(2, 48),
        torch.ones(48, 3),
    )
    with pytest.raises(ModelError, match="do not fit"):
        engine.add_adapter(changes)
    infinite = {"model.layers.0.mlp.down_proj": (torch.full((2, 84), torch.inf), torch.ones(48, 2))}
    with pytest.raises(ModelError, match="infinite"):
        engine.add_adapter(infinite)
    with pytest.raises(ModelError, match="nothing"):
        engine.add_adapter({})
    save_adapter(tmp_path / "all", model, "all")
    path = tmp_path / "all" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4}))
    with pytest.raises(ModelError):
        engine.add_adapter(tmp_path / "all")
    assert not engine.adapters
    with pytest.raises(ModelError, match="no adapter"):
        alone(engine, 0)
