"""The chunked loss: native and plain ways against torch's cross-entropy in float64, values and gradients."""

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
from hanmo.models.kernels import native
from hanmo.models.kernels.loss import token_logprobs, token_loss

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


def problem(M: int, D: int, V: int, masked: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output embedding, bias and targets, some of which are left out."""
    generator = torch.Generator().manual_seed(M + D + V)
    hidden, weight = (torch.randn(rows, D, generator=generator) for rows in (M, V))
    targets = torch.randint(0, V, (M,), generator=generator)
    targets[torch.rand(M, generator=generator) < masked] = -1
    return hidden, weight * 2 / D**0.5, torch.randn(V, generator=generator), targets


def exact_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: Any = None,
) -> Tensor:
    """As the transformer computes it: all logits at once."""
    scores = F.linear(hidden * scale, weight, bias)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return -F.cross_entropy(scores, targets, reduction="none", ignore_index=-1)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    result = function(*inputs)
    return [result.detach(), *torch.autograd.grad(result, inputs)]


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float = 2e-6) -> None:
    for mine, true in zip(found, wanted, strict=True):
        assert mine.shape == true.shape
        assert ((mine - true).abs().max() / true.abs().max().clamp(min=0.1)).item() < tolerance


SHAPES = [(1, 1, 2), (5, 3, 7), (9, 16, 16), (40, 8, 33), (13, 24, 1003)]
OPTIONS: list[dict[str, Any]] = [{}, {"softcap": 3.0}, {"scale": 0.4}, {"scale": 1.7, "softcap": 2.0}]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss(shape: tuple[int, int, int], options: dict[str, Any], chunk: int | None, weighted: bool) -> None:
    hidden, weight, bias, targets = problem(*shape)
    weights = torch.rand(len(targets)) if weighted else None

    def mine(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return token_loss(h, w, targets, bias=b, chunk=chunk, weights_M=weights, **options) / 7

    def true(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        logprobs = exact_logprobs(h, w, targets, bias=b, **options)
        return -(logprobs if weights is None else logprobs * weights.double()).sum() / 7

    for inputs in ((hidden, weight, bias), (hidden, weight)):
        found = with_gradients(mine, *inputs)
        assert all(tensor.dtype == torch.float32 for tensor in found)
        close(found, with_gradients(true, *(tensor.double() for tensor in inputs)))
        with torch.no_grad():
            torch.testing.assert_close(mine(*inputs), found[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_logprobs(shape: tuple[int, int, int], options: dict[str, Any]) -> None:
    hidden, weight, bias, targets = problem(*shape)
    signs = torch.randn(len(targets), generator=torch.Generator().manual_seed(3))

    def preference(logprobs: Tensor) -> Tensor:  # not linear, as that of DPO
        return F.logsigmoid((logprobs * signs).sum())

    for count in (2, 3):
        inputs = (hidden, weight, bias)[:count]
        close(
            with_gradients(
                lambda h, w, b=None: preference(token_logprobs(h, w, targets, bias=b, chunk=6, **options)), *inputs
            ),
            with_gradients(
                lambda h, w, b=None: preference(exact_logprobs(h, w, targets, bias=b, **options)),
                *(tensor.double() for tensor in inputs),
            ),
            4e-6,
        )
    found = token_logprobs(hidden, weight, targets, **options)
    assert found.dtype == torch.float32 and (found[targets < 0] == 0).all() and (found <= 0).all()
    torch.testing.assert_close(-found.sum(), token_loss(hidden, weight, targets, **options), rtol=1e-5, atol=1e-5)


def test_both_are_zero_where_nothing_counts() -> None:
    hidden, weight, bias, targets = problem(6, 4, 9, masked=1.0)
    for function in (token_loss, token_logprobs):
        for M in (6, 0):
            found = with_gradients(
                lambda h, w, b, M=M: function(h[:M], w, targets[:M], bias=b).sum(),  # noqa: B023
                *(hidden, weight, bias),
            )
            assert all((tensor == 0).all() for tensor in found)


def test_what_is_masked_is_not_computed() -> None:
    hidden, weight, _, targets = problem(8, 4, 9)
    spoiled = torch.where((targets < 0).unsqueeze(1), torch.nan, hidden)
    for found, wanted in zip(
        with_gradients(lambda h, w: token_loss(h, w, targets), spoiled, weight),
        with_gradients(lambda h, w: token_loss(h, w, targets), hidden, weight),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_only_what_learns_gets_a_gradient() -> None:
    hidden, weight, bias, targets = problem(20, 8, 33)
    _, *both = with_gradients(lambda h, w, b: token_loss(h, w, targets, bias=b), hidden, weight, bias)
    for function in (token_loss, lambda *a, **k: -token_logprobs(*a, **k).sum()):
        alone = [
            with_gradients(lambda h: function(h, weight, targets, bias=bias), hidden)[1],  # noqa: B023
            with_gradients(lambda w: function(hidden, w, targets, bias=bias), weight)[1],  # noqa: B023
            with_gradients(lambda b: function(hidden, weight, targets, bias=b), bias)[1],  # noqa: B023
        ]
        close(alone, both)


def test_a_graph_can_be_walked_twice_and_gradients_add_up() -> None:
    hidden, weight, _, targets = problem(20, 8, 33)
    hidden.requires_grad_(), weight.requires_grad_()
    for loss in (token_loss(hidden, weight, targets), token_logprobs(hidden, weight, targets).sum()):
        first = torch.autograd.grad(loss * 0.5, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(loss, (hidden, weight))
        close([2 * gradient for gradient in first], list(second))
    for _ in range(2):
        token_loss(hidden, weight, targets).backward()
    close(
        [hidden.grad, weight.grad],
        [gradient * 2 for gradient in with_gradients(lambda h, w: token_loss(h, w, targets), hidden, weight)[1:]],
    )  # type: ignore[list-item]


def test_large_scores_and_nan() -> None:
    hidden, weight, targets = (
        torch.tensor([[100.0], [-100.0]]),
        torch.tensor([[1.0], [-3.0], [2.0]]),
        torch.tensor([2, 0]),
    )
    found = with_gradients(lambda h, w: token_loss(h, w, targets), hidden, weight)
    close(found, with_gradients(lambda h, w: -exact_logprobs(h, w, targets).sum(), hidden.double(), weight.double()))
    for bad in (float("nan"), float("inf")):
        hidden[0, 0] = bad
        assert not token_loss(hidden, weight, targets).isfinite()
    impossible = torch.tensor([0.0, -torch.inf, 0.0])  # a token that is switched off
    hidden[0, 0] = 1.0
    result = with_gradients(lambda h, w: token_loss(h, w, targets, bias=impossible), hidden, weight)
    assert all(tensor.isfinite().all() for tensor in result) and result[2][1].abs().max() < 1e-30


def test_same_bits_with_any_number_of_threads(way: str) -> None:
    if way == "torch":
        pytest.skip("torch promises nothing here")
    from hanmo.models.kernels.loss import softmax_step

    logits, targets = torch.randn(77, 1001) * 3, torch.randint(0, 1001, (77,))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(softmax_step(logits.clone(), None, targets, None, 5.0, gradients=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("function", [token_loss, token_logprobs])
def test_float64_and_bfloat16(function: Callable[..., Tensor]) -> None:
    hidden, weight, bias, targets = problem(30, 16, 50)

    def exact(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return exact_logprobs(h, w, targets, bias=b, softcap=4.0).sum() * (-1 if function is token_loss else 1)

    def mine(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return function(h, w, targets, bias=b, softcap=4.0, chunk=7).sum()

    wide = [tensor.double() for tensor in (hidden, weight, bias)]
    true = with_gradients(exact, *wide)
    found = with_gradients(mine, *wide)
    assert found[0].dtype == torch.float64
    close(found, true, 1e-12)
    narrow = with_gradients(mine, *(tensor.bfloat16() for tensor in (hidden, weight, bias)))
    assert narrow[0].dtype == torch.float32 and narrow[1].dtype == torch.bfloat16
    close([tensor.double() for tensor in narrow], true, 0.03)
    with torch.autocast("cpu", torch.bfloat16):
        cast = with_gradients(mine, hidden, weight, bias)
    assert all(tensor.dtype == torch.float32 for tensor in cast)
    close(cast, true, 0.03)


def test_it_compiles() -> None:
    hidden, weight, _, targets = problem(12, 8, 20)
    compiled = torch.compile(lambda h, w: token_loss(h, w, targets, chunk=5), backend="aot_eager")
    close(
        with_gradients(compiled, hidden, weight), with_gradients(lambda h, w: token_loss(h, w, targets), hidden, weight)
    )


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, bias, targets = problem(6, 4, 9)
    targets[2] = 9
    with pytest.raises(ModelError, match="token 9, the vocabulary has 9"):
        token_loss(hidden, weight, targets)
    targets[2] = 0
    for bad in (
        lambda: token_loss(hidden, weight[:, :3], targets),
        lambda: token_loss(hidden.view(2, 3, 4), weight, targets),
        lambda: token_loss(hidden, weight, targets[:5]),
        lambda: token_loss(hidden, weight, targets, bias=bias[:8]),
        lambda: token_loss(hidden, weight, targets, weights_M=torch.ones(5)),
        lambda: token_logprobs(hidden, weight, targets, bias=bias[:8]),
    ):
        with pytest.raises(ModelError, match="do not fit"):
            bad()
