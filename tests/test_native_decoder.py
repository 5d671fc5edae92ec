"""The native engine computes what the network of torch computes, and the same bits whatever the company of a row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hanmo.errors import ModelError
from hanmo.inference.native import library
from hanmo.inference.native.decoder import NativeDecoder, PagedCache, Weights, prepare, reason_against
from hanmo.inference.native.quantize import quantize_int4, quantize_int8
from hanmo.models.transformer import Transformer

from .native_cases import LAYOUTS, decoder

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason=f"no native engine: {library.load()[1]}")

ERRORS = {"fp32": 3e-6, "fp16": 4e-3, "int8": 0.1, "int4": 0.1}  # of the largest logit, with the same weights
PIECES = (1, 1, 3, 8, 20, 1, 30, 7)
IDS = torch.randint(0, 101, (100,), generator=torch.Generator().manual_seed(0)).tolist()


def native(model: Transformer, precision: str = "fp32", *, threads: int = 2) -> NativeDecoder:
    """The same network in the native engine."""
    parts = prepare(model.config, Weights.of_state(model.state_dict()), precision)
    return NativeDecoder(model.config, parts, threads=threads, rows=256)


def rounded(model: Transformer, precision: str) -> Transformer:
    """The network with the weights that the engine has: what differs then is its arithmetic."""
    state = {}
    for name, weight in model.state_dict().items():
        edge = name in ("model.embed_tokens.weight", "lm_head.weight")
        if not (name.endswith("proj.weight") or edge) or precision in ("fp32", "fp16"):
            state[name] = weight
        elif precision == "int8" or edge:
            state[name] = quantize_int8(weight).dequantize()
        else:
            state[name] = quantize_int4(weight).dequantize()
    copy = Transformer(model.config).eval()
    copy.load_state_dict(state)
    return copy


def read(cache: PagedCache, ids: Sequence[int], start: int, pages: Sequence[int]) -> Tensor:
    """Logits of all tokens of a piece of one text."""
    count = len(ids)
    return cache.forward(ids, [0] * count, range(start, start + count), [pages], range(count))


@pytest.mark.parametrize(("layout", "precision"), itertools.product(LAYOUTS, ERRORS))
def test_logits_are_those_of_the_network(layout: str, precision: str) -> None:
    model = decoder(layout)
    assert reason_against(model.config) is None
    with torch.inference_mode():
        expected = rounded(model, precision)(torch.tensor([IDS]))[0]
    got = read(PagedCache(native(model, precision), 4), IDS, 0, [2, 0, 3, 1])
    assert (got - expected).abs().max() <= ERRORS[precision] * expected.abs().max()


@pytest.mark.parametrize(("layout", "precision"), itertools.product(LAYOUTS, ERRORS))
def test_bits_do_not_depend_on_company_pieces_or_threads(layout: str, precision: str) -> None:
    model = decoder(layout)
    whole = read(PagedCache(native(model, precision), 4), IDS, 0, range(4))
    cache = PagedCache(native(model, precision, threads=1), 8)
    start = 0
    for count in PIECES:
        piece = read(cache, IDS[start : start + count], start, [7, 6, 5, 4])
        assert torch.equal(piece, whole[start : start + count])
        start += count
    both = cache.forward(IDS[:40] * 2, [0] * 40 + [1] * 40, [*range(40)] * 2, [[0, 1], [2, 3]], range(80))
    assert torch.equal(both[:40], whole[:40])
    assert torch.equal(both[40:], whole[:40])


def test_impossible_requests_are_refused() -> None:
    cache = PagedCache(native(decoder("llama")), 2)
    for ids, texts, positions, tables, wanted in (
        ([101], [0], [0], [[0]], [0]),  # a token outside the vocabulary
        ([-1], [0], [0], [[0]], [0]),
        ([1], [0], [128], [[0, 1, 0, 1, 0]], [0]),  # a position outside the context
        ([1], [0], [-1], [[0]], [0]),
        ([1], [0], [32], [[0]], [0]),  # a page that the text does not have
        ([1], [0], [0], [[2]], [0]),  # a page that is not there
        ([1], [0], [0], [[-1]], [0]),
        ([1], [1], [0], [[0]], [0]),  # a text that is not there
        ([1, 2], [0, 0], [0, 2], [[0]], [0]),  # a gap
        ([1], [0], [0], [[0]], [1]),  # a row that is not there
        ([], [], [], [[0]], []),
        ([1] * 257, [0] * 257, range(257), [[0] * 9], [0]),  # more rows than there is memory for
    ):
        with pytest.raises(ModelError):
            cache.forward(ids, texts, positions, tables, wanted)


def test_missing_and_misshapen_weights_are_refused() -> None:
    model = decoder("llama")
    state = dict(model.state_dict())
    parts = prepare(model.config, Weights.of_state(state))
    short = {name: part for name, part in parts.items() if name != "layers.1.down"}
    with pytest.raises(ModelError, match="missing"):
        read(PagedCache(NativeDecoder(model.config, short), 1), [1], 0, [0])
    with pytest.raises(ModelError, match="size"):
        NativeDecoder(model.config, {**parts, "layers.1.down": parts["layers.1.output"]})
