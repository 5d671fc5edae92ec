"""Norms, rotary positions and activations: native and plain ways against float64, forwards and backwards."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hanmo.errors import ModelError
from hanmo.models.kernels import elementwise, native

pytestmark = pytest.mark.usefixtures("way")  # every test in every way
WAYS = ["torch", *(level for level, needed in native.LEVELS.items() if needed <= native.processor_flags())]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each library that this machine runs, and none."""
    level, library = request.param, None
    if level != "torch":
        built = list(Path(native.__file__).parent.glob(f"_{level}.*so"))
        if not built:
            pytest.skip(f"the {level} library is not built")
        library = ctypes.CDLL(str(built[0]))
    monkeypatch.setattr(native, "load", lambda: (library, level))
    native.kernel.cache_clear()
    yield level
    native.kernel.cache_clear()


def gradients(function: Callable[..., Any], inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Results of a function and the gradients of its inputs, for fixed random gradients of the results."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    wanted = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    torch.autograd.backward(outputs, wanted)
    found = [*outputs, *(tensor.grad for tensor in inputs)]
    assert all(tensor is not None for tensor in found)
    return [tensor.detach() for tensor in found]


def check(function: Callable[..., Any], exact: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Values and gradients of a function in float32 against another in float64."""
    found = gradients(function, inputs)
    wanted = gradients(exact, [tensor.double() for tensor in inputs])
    for mine, true in zip(found, wanted, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == true.shape
        scale = true.abs().max().clamp(min=0.1)
        assert ((mine - true).abs().max() / scale).item() < 3e-6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, offset: float = 0.0) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * (offset + weight)


def exact_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A pair (a, b) becomes (a cos - b sin, b cos + a sin); each half has angles of its own."""
    half = cos.size(-1) // 2
    a, b = x[..., :half], x[..., half : 2 * half]
    (c, d), (s, t) = ((angle[..., :half].unsqueeze(2), angle[..., half:].unsqueeze(2)) for angle in (cos, sin))
    return torch.cat((a * c - b * s, b * d + a * t, x[..., 2 * half :]), -1)


def angles(B: int, T: int, R: int) -> tuple[Tensor, Tensor]:
    turns = normal(B, T, R // 2, seed=7).repeat(1, 1, 2)
    return turns.cos() * 1.2, turns.sin() * 1.2  # as long as YaRN's


@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 3, 7), (5, 16), (70, 33), (4, 9, 384), (200, 200)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(shape: tuple[int, ...], offset: float) -> None:
    inputs = [normal(*shape) * 3, normal(shape[-1], seed=2)]
    check(lambda x, w: elementwise.rms_norm(x, w, 1e-5, offset), lambda x, w: exact_norm(x, w, 1e-5, offset), inputs)
    without = elementwise.rms_norm(inputs[0], None, 1e-5, offset)
    torch.testing.assert_close(without, exact_norm(inputs[0], torch.ones(shape[-1])), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("B", "T", "H", "N", "R"), [(1, 1, 1, 2, 2), (2, 5, 3, 16, 16), (3, 4, 2, 20, 12), (2, 33, 6, 64, 64)]
)
@pytest.mark.parametrize("shared", [True, False])
def test_rotations(B: int, T: int, H: int, N: int, R: int, shared: bool) -> None:
    cos, sin = angles(1 if shared else B, T, R)
    exact = (cos.double(), sin.double())
    inputs = [normal(B, T, H, N), normal(N, seed=2)]
    check(lambda x: elementwise.rotate(x, cos, sin), lambda x: exact_rotation(x, *exact), inputs[:1])
    for offset in (0.0, 1.0):
        check(
            lambda x, w, offset=offset: elementwise.norm_rotate(x, w, 1e-6, cos, sin, offset),
            lambda x, w, offset=offset: exact_rotation(exact_norm(x, w, 1e-6, offset), *exact),
            inputs,
        )


def test_halves_with_angles_of_their_own() -> None:
    cos, sin = normal(1, 3, 10, seed=4), normal(1, 3, 10, seed=5)
    exact = (cos.double(), sin.double())
    check(lambda x: elementwise.rotate(x, cos, sin), lambda x: exact_rotation(x, *exact), [normal(2, 3, 2, 10)])


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (7, 3, 16), (40, 1001)])
def test_activations(name: str, shape: tuple[int, ...]) -> None:
    exact, inputs = ACTIVATIONS[name], [normal(*shape) * 4, normal(*shape, seed=3)]
    check(lambda x: elementwise.activate(x, name), exact, inputs[:1])
    check(lambda g, u: elementwise.gated(g, u, name), lambda g, u: exact(g) * u, inputs)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_every_number_is_close(way: str, name: str) -> None:
    """The largest error of a value or slope anywhere in a range, not relative to the largest value."""
    x = torch.linspace(-12, 12, 100_003)
    (at, exact_at), results = (x.clone().requires_grad_(), x.double().requires_grad_()), []
    for function, place in ((lambda v: elementwise.activate(v, name), at), (ACTIVATIONS[name], exact_at)):
        y = function(place)
        results += [y.detach().double(), torch.autograd.grad(y.sum(), place)[0]]
    mine, slope, true, true_slope = results
    assert ((mine - true).abs() / x.abs().clamp(min=1)).max() < 4e-7
    assert (slope - true_slope).abs().max() < 1.5e-6
    if way != "torch":  # also relative to the value itself, deep in the tail where torch's own has lost it
        tail = (x > -6) & (x < -1)
        assert ((mine - true).abs() / true.abs())[tail].max() < (2e-6 if name == "gelu" else 5e-6)


def test_extremes_and_nan() -> None:
    x = torch.tensor([float("nan"), 1e30, -1e30, 0.0, 88.0, -88.0, 200.0, -200.0]).repeat(3)
    for name in elementwise.ACTIVATIONS:
        y = elementwise.activate(x, name)
        assert y[0].isnan() and y[8].isnan()
        torch.testing.assert_close(y[1:8], F.relu(x[1:8]), rtol=1e-6, atol=1e-6)
    assert elementwise.rms_norm(torch.tensor([[1.0, float("nan")], [1.0, 1.0]]), None, 0.0)[0].isnan().all()


def test_nothing_is_written_beside_the_result(way: str) -> None:
    """Odd sizes: what lies after the tensors in memory stays as it is."""
    if way == "torch":
        pytest.skip("torch's own")
    room = torch.full((3 * 5 + 40,), 7.0)
    out, x = room[20:35].view(3, 5), normal(3, 5)
    native.call("activate", "ipppl", 2, x, x, out, 15)
    assert (room[:20] == 7).all() and (room[35:] == 7).all() and (out != 7).all()


def test_results_larger_than_the_caches(way: str) -> None:
    """They are written by other instructions; the values are those of two halves."""
    if way == "torch":
        pytest.skip("torch's own")
    gate, up = normal((1 << 22) + 3), normal((1 << 22) + 3, seed=1)
    for first, end in ((0, 1 << 21), (1 << 21, len(gate))):
        found = []
        for place in (slice(None), slice(first, end)):
            inputs = [tensor[place].clone().requires_grad_() for tensor in (gate, up)]
            out = elementwise.gated(*inputs, "silu")
            found.append([out.detach(), *torch.autograd.grad(out, inputs, up[place])])
        assert all(torch.equal(whole[first:end], half) for whole, half in zip(*found, strict=True))


def test_strided_inputs_and_broadcasts() -> None:
    x, w = normal(6, 5, seed=1).t(), normal(12)[::2]
    torch.testing.assert_close(elementwise.rms_norm(x, w, 1e-5), exact_norm(x, w), rtol=2e-6, atol=1e-6)
    wide = normal(2, 3, 4, 32)
    cos, sin = angles(1, 3, 16)
    torch.testing.assert_close(elementwise.rotate(wide[..., ::2], cos, sin), exact_rotation(wide[..., ::2], cos, sin))
    check(
        lambda g, u: elementwise.gated(g.t(), u, "silu"), lambda g, u: F.silu(g.t()) * u, [normal(5, 3), normal(3, 5)]
    )
    check(lambda g, u: elementwise.gated(g, u, "silu"), lambda g, u: F.silu(g) * u, [normal(5, 3), normal(1, 3)])
    with pytest.raises(RuntimeError, match="shape"):
        elementwise.rms_norm(normal(4, 8), normal(1), 1e-5)
    assert elementwise.rms_norm(normal(0, 8), normal(8), 1e-5).shape == (0, 8)
    assert elementwise.gated(normal(0), normal(0), "gelu").shape == (0,)


def test_only_the_weight_or_only_the_input_learns() -> None:
    x, w = normal(40, 8), normal(8, seed=2)
    both = gradients(lambda x, w: elementwise.rms_norm(x, w, 1e-5), [x, w])
    assert torch.equal(gradients(lambda x: elementwise.rms_norm(x, w, 1e-5), [x])[1], both[1])
    assert torch.equal(gradients(lambda w: elementwise.rms_norm(x, w, 1e-5), [w])[1], both[2])
    with torch.no_grad():
        assert torch.equal(elementwise.rms_norm(x, w, 1e-5), both[0])


def test_a_graph_can_be_walked_twice() -> None:
    x, w = normal(4, 8).requires_grad_(), normal(8).requires_grad_()
    loss = elementwise.rms_norm(x, w, 1e-5).pow(2).sum()
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_same_bits_with_any_number_of_threads(way: str) -> None:
    if way == "torch":
        pytest.skip("torch promises nothing here")
    cos, sin = angles(1, 300, 32)
    cases: list[tuple[Callable[..., Any], list[Tensor]]] = [
        (lambda x, w: elementwise.rms_norm(x, w, 1e-5), [normal(900, 64), normal(64)]),
        (lambda x, w: elementwise.norm_rotate(x, w, 1e-5, cos, sin), [normal(2, 300, 3, 40), normal(40)]),
        (lambda x: elementwise.rotate(x, cos, sin), [normal(2, 300, 3, 40)]),
        (lambda g, u: elementwise.gated(g, u, "gelu"), [normal(300, 301), normal(300, 301, seed=1)]),
    ]
    threads = torch.get_num_threads()
    try:
        for function, inputs in cases:
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(gradients(function, inputs))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_torch(dtype: torch.dtype) -> None:
    x, w = normal(3, 8).to(dtype), normal(8).to(dtype)
    assert torch.equal(elementwise.rms_norm(x, w, 1e-5), F.rms_norm(x, (8,), w, 1e-5))
    assert torch.equal(elementwise.gated(x, x, "silu"), F.silu(x) * x)
    cos, sin = (angle.to(dtype) for angle in angles(1, 3, 8))
    assert elementwise.norm_rotate(x.view(1, 3, 1, 8), w, 1e-5, cos, sin, 1.0).dtype == dtype


def test_compiled_graphs_use_torch() -> None:
    compiled = torch.compile(lambda x, w: elementwise.rms_norm(x, w, 1e-5), backend="eager", fullgraph=True)
    x, w = normal(3, 8), normal(8)
    torch.testing.assert_close(compiled(x, w), elementwise.rms_norm(x, w, 1e-5))


def test_an_unknown_activation_is_refused() -> None:
    for call in (
        lambda: elementwise.activate(normal(3), "swish9"),
        lambda: elementwise.gated(normal(3), normal(3), "x"),
    ):
        with pytest.raises(ModelError, match="not known"):
            call()
