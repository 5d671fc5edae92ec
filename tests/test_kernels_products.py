"""Matrix products: float32 and 8-bit integers, against torch in float64, with every gradient."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanmo.errors import UsageError
from hanmo.models.kernels import int8, native, products

native_only = pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")


def relative_error(value: Tensor, expected: Tensor) -> float:
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())


def layouts(rows: int, columns: int) -> Iterator[Tensor]:
    """Matrices of one size that lie differently in memory."""
    yield torch.randn(rows, columns)
    yield torch.randn(columns, rows).t()
    yield torch.randn(rows + 3, columns + 5)[2 : 2 + rows, 1 : 1 + columns]
    yield torch.randn(columns + 5, rows + 7)[1 : 1 + columns, 3 : 3 + rows].t()
    yield torch.randn(2 * rows, 2 * columns)[::2, ::2]
    yield torch.randn(1, columns).expand(rows, columns)
    yield torch.randn(rows, 1).expand(rows, columns)


def with_threads(count: int, compute: Callable[[], Tensor]) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return compute()
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of tests already take the ways that are meant for large ones."""
    monkeypatch.setattr(products, "SMALLEST_PRODUCT", 1 << 19)


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of computing: with the native kernels and oneDNN, and with plain torch."""
    if request.param == "torch":
        monkeypatch.setattr(native, "load", lambda: (None, "switched off"))
        monkeypatch.setattr(products, "onednn_is_best", lambda: False)
    elif native.library() is None:
        pytest.skip("the native kernels are not built")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [(130, 96, 101), (64, 257, 256), (3, 5, 2), (1, 70, 300)])
def test_matmul_is_right_for_every_layout(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    rows, inner, columns = size
    for a, b in itertools.product(layouts(rows, inner), layouts(inner, columns)):
        product = products.matmul(a, b)
        assert relative_error(product, a.double() @ b.double()) < 3e-6, (a.stride(), b.stride())
        out = torch.full((rows, columns), torch.nan)
        assert products.matmul(a, b, out=out) is out
        assert torch.equal(out, product)
        strided = torch.full((columns, rows), torch.nan).t()
        assert torch.equal(products.matmul(a, b, out=strided), product)


def test_matmul_of_other_types_and_wrong_shapes() -> None:
    a, b = torch.randn(200, 90, dtype=torch.float64), torch.randn(90, 80, dtype=torch.float64)
    assert torch.equal(products.matmul(a, b), a @ b)
    with pytest.raises(RuntimeError):
        products.matmul(torch.randn(200, 90), torch.randn(91, 80))
    weight = torch.randn(90, 80, requires_grad=True)
    assert not products.matmul(torch.randn(200, 90), weight).requires_grad
    assert products.matmul(torch.randn(0, 90), torch.randn(90, 80)).shape == (0, 80)


@native_only
@pytest.mark.parametrize("size", [(1000, 130, 203), (129, 16, 64), (7, 200, 1), (1, 3, 1500), (300, 385, 400)])
def test_transposed_product(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    depth, rows, columns = size
    a, b = torch.randn(depth, rows + 3)[:, 2 : 2 + rows], torch.randn(depth, columns + 1)[:, 1:]
    one, two = (with_threads(count, lambda: products._transposed(a, b, None)) for count in (1, 2))
    assert torch.equal(one, two)
    assert relative_error(one, a.double().t() @ b.double()) < 3e-6


LINEAR_CASES = [((3, 70, 96), 130, True), ((257, 65), 129, False), ((2, 3, 50, 128), 64, True), ((1, 96), 130, True)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("shape", "outputs", "with_bias"), LINEAR_CASES)
def test_linear_matches_torch(shape: tuple[int, ...], outputs: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(outputs, shape[-1]), torch.randn(outputs) if with_bias else None
    given = [None if t is None else t.requires_grad_() for t in (x, weight, bias)]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in given]
    y, y_exact = products.linear(*given), F.linear(*exact)
    assert relative_error(y, y_exact) < 1e-6
    gradient = torch.randn(*shape[:-1], outputs)
    y.backward(gradient)
    y_exact.backward(gradient.double())
    for mine, theirs in zip(given, exact, strict=True):
        if mine is not None and theirs is not None:
            assert relative_error(mine.grad, theirs.grad) < 2e-6
            assert mine.grad.is_contiguous()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layer", [products.linear, int8.int8_linear])
def test_only_the_gradients_that_are_needed(layer: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(200, 96), torch.randn(130, 96), torch.randn(130)
    for needed in itertools.product([False, True], repeat=3):
        given = [t.clone().requires_grad_(need) for t, need in zip((x, weight, bias), needed, strict=True)]
        y = layer(*given)
        assert y.requires_grad == any(needed)
        if any(needed):
            y.sum().backward()  # a gradient whose values all lie at one address
        assert [t.grad is not None for t in given] == list(needed)
    with torch.no_grad():
        assert not layer(x, weight.requires_grad_(), bias).requires_grad


@pytest.mark.usefixtures("way")
def test_irregular_inputs_autocast_and_float64() -> None:
    torch.manual_seed(0)
    weight = torch.randn(130, 96)
    x = torch.randn(96, 3, 70).permute(1, 2, 0)
    for layer, bound in ((products.linear, 1e-6), (int8.int8_linear, 0.02)):
        assert relative_error(layer(x, weight), F.linear(x, weight)) < bound
        assert relative_error(layer(x, weight.t().contiguous().t()), F.linear(x, weight)) < bound
        assert torch.equal(layer(x.double(), weight.double()), F.linear(x.double(), weight.double()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x, weight).dtype == torch.bfloat16


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("shape", "outputs", "with_bias"), [*LINEAR_CASES[:3], ((1030, 67), 70, True)])
def test_int8_is_near_float32(shape: tuple[int, ...], outputs: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(outputs, shape[-1]), torch.randn(outputs) if with_bias else None
    given = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    exact = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    y, y_exact = int8.int8_linear(*given), F.linear(*exact)
    assert 1e-4 < relative_error(y, y_exact) < 0.015
    gradient = torch.randn(*shape[:-1], outputs)
    y.backward(gradient)
    y_exact.backward(gradient)
    bounds = {
        "x": (1e-4, 0.015),
        "weight": (1e-4, 0.015),
        "bias": (0, 2e-6),
    }
    for (low, high), mine, theirs in zip(bounds.values(), given, exact, strict=True):
        if mine is not None and theirs is not None:
            assert low <= relative_error(mine.grad, theirs.grad) < high


def test_both_ways_of_int8_quantise_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library() is None:
        pytest.skip("the native kernels are not built")
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1030, 67) * torch.randn(67).exp(), torch.randn(70, 67), torch.randn(70)
    x[5], weight[3] = 0.0, 0.0

    def compute() -> list[Tensor]:
        given = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = int8.int8_linear(*given)
        y.backward(torch.arange(y.numel()).reshape(y.shape).sin())
        return [y.detach(), *(t.grad for t in given if t.grad is not None)]

    kernels = compute()
    monkeypatch.setattr(native, "load", lambda: (None, "switched off"))
    # A value next to a half may round differently: one step of 254 in a few values, nothing more.
    for mine, theirs in zip(kernels, compute(), strict=True):
        assert relative_error(mine, theirs) < 1e-4


@native_only
@pytest.mark.parametrize("size", [(1, 4, 64), (5, 7, 70), (100, 130, 65), (13, 1000, 3), (700, 33, 200)])
def test_integers_are_multiplied_exactly(size: tuple[int, int, int]) -> None:
    """Rows that hold 127 have scale 1: then nothing is rounded, and every sum must be right to the last bit."""
    torch.manual_seed(0)
    rows, inner, columns = size
    x, weight = (torch.randint(-127, 128, (n, inner)).float() for n in (rows, columns))
    x[:, 0], weight[:, -1], weight[-1] = -127.0, 127.0, 127.0
    bias = torch.arange(columns).float()
    exact = (x.double() @ weight.double().t() + bias.double()).float()
    results = [with_threads(n, lambda: int8.product(x, int8.pack_rows(weight), bias)) for n in (1, 2)]
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], exact, rtol=1e-6, atol=1e-6 * 127**2)
    columnwise = int8.product(x, int8.pack_columns(weight.t().contiguous()), bias)
    assert torch.equal(columnwise, results[0])
    gradient = torch.randint(-127, 128, (rows, columns)).float()
    gradient[0], x[0] = 127.0, 127.0
    for start in range(0, rows, int8.BLOCK_ROWS):
        gradient[start], x[start] = 127.0, -127.0
    results = [with_threads(n, lambda: int8.transposed_product(gradient, x)) for n in (1, 2)]
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0].double(), gradient.double().t() @ x.double(), rtol=1e-6, atol=0.2)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_reach_the_result(bad: float) -> None:
    torch.manual_seed(0)
    for spoilt in range(2):
        given = [torch.randn(600, 97).requires_grad_(), torch.randn(130, 97).requires_grad_()]
        with torch.no_grad():
            given[spoilt][17, 3] = bad
        y = int8.int8_linear(given[0], given[1])
        row = y[17] if spoilt == 0 else y[:, 17]
        assert row.isnan().all()
        assert y.isnan().sum() == row.numel()
        y.backward(torch.randn(y.shape))
        gradients = [t.grad for t in given if t.grad is not None]
        assert gradients[1 - spoilt].isnan().any()
    x = torch.randn(600, 97, requires_grad=True)
    gradient = torch.randn(600, 130)
    gradient[3, 5] = bad
    int8.int8_linear(x, torch.randn(130, 97)).backward(gradient)
    assert x.grad is not None
    assert x.grad[3].isnan().all()
    assert x.grad.isnan().sum() == 97


@pytest.mark.usefixtures("way")
def test_tiny_values_and_zeros_stay_finite() -> None:
    x, weight = torch.full((200, 96), 1e-38), torch.zeros(130, 96)
    x[0], x[1, 0] = 0.0, 1e34
    for value in (0.0, 1e-40, 1e-20):
        y = int8.int8_linear(x, weight + value, torch.ones(130))
        assert y.isfinite().all()
        assert y[0].tolist() == [1.0] * 130


def test_linear_layer_is_torchs_but_for_the_computation() -> None:
    torch.manual_seed(0)
    layer, plain = products.Linear(96, 130), nn.Linear(96, 130)
    assert list(layer.state_dict()) == list(plain.state_dict())
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(200, 96)
    assert relative_error(layer(x), plain(x)) < 1e-6
    empty = products.Linear(96, 130, device="meta")
    empty.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))
    products.set_precision(layer, "int8")
    copied = copy.deepcopy(layer)
    assert copied.precision == "int8"
    assert torch.equal(copied(x), layer(x))
    assert relative_error(layer(x), plain(x)) > 1e-4
    assert relative_error(layer.eval()(x), plain(x)) < 1e-6


def test_set_precision() -> None:
    network = nn.Sequential(products.Linear(4, 4), nn.ReLU(), nn.Sequential(products.Linear(4, 4), nn.Linear(4, 4)))
    assert products.set_precision(network, "int8") == 2
    assert [part.precision for part in network.modules() if isinstance(part, products.Linear)] == ["int8"] * 2
    with pytest.raises(UsageError, match="int4"):
        products.set_precision(network, "int4")


@pytest.mark.parametrize("layer", [products.linear, int8.int8_linear])
def test_the_same_bits_for_any_number_of_threads(layer: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    x, weight, gradient = torch.randn(700, 96), torch.randn(230, 96), torch.randn(700, 230)

    def weight_gradient() -> Tensor:
        leaf = weight.clone().requires_grad_()
        layer(x, leaf).backward(gradient)
        assert leaf.grad is not None
        return leaf.grad

    if native.load()[1] == "avx512" and products.onednn_is_best():
        assert torch.equal(with_threads(1, weight_gradient), with_threads(2, weight_gradient))
    if layer is int8.int8_linear:
        assert torch.equal(with_threads(1, lambda: layer(x, weight)), with_threads(2, lambda: layer(x, weight)))


def test_a_small_network_learns_as_well_in_int8() -> None:
    def final_loss(precision: str) -> float:
        torch.manual_seed(0)
        network = nn.Sequential(products.Linear(64, 96), nn.GELU(), products.Linear(96, 64))
        products.set_precision(network, precision)
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        target = torch.randn(64, 64)
        for step in range(60):
            x = torch.randn(256, 64, generator=torch.Generator().manual_seed(step))
            loss = F.mse_loss(network(x), torch.tanh(x @ target))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    exact, quantised = final_loss("fp32"), final_loss("int8")
    assert exact != quantised
    assert quantised == pytest.approx(exact, rel=0.01)
