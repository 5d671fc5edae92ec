"""Attention: the native kernel and torch's way against attention written out in float64, values and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hanmo.errors import ModelError
from hanmo.models.kernels import attention as module
from hanmo.models.kernels import native, torch_attention
from hanmo.models.kernels.attention import attention
from hanmo.models.positions import attention_mask

needs_native = pytest.mark.skipif(native.library() is None, reason=native.load()[1])


def allowed(T: int, S: int, causal: bool, window: int | None, segments_BT: Tensor | None) -> Tensor:
    """Who sees whom, position by position, ``[B or 1, T, S]``: the definition, written as loops."""
    rows = [None] if segments_BT is None else segments_BT.tolist()
    seen = torch.zeros(len(rows), T, S, dtype=torch.bool)
    for b, row in enumerate(rows):
        for t, s in itertools.product(range(T), range(S)):
            near = window is None or (t - window < s if causal else abs(t - s) <= window)
            same = row is None or len(set(row[min(t, s) : max(t, s) + 1])) == 1
            seen[b, t, s] = near and same and (s <= t or not causal)
    return seen


def reference(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    groups = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bthn,bshn->bhts", q, k) * (q.size(3) ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhts,bshn->bthn", weights, v)


def draw(B: int, T: int, H: int, K: int, N: int, S: int | None = None, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, H, N), (B, S or T, K, N), (B, S or T, K, N))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def text_lengths(B: int, T: int, lengths: list[int]) -> Tensor:
    """Segments of texts of these lengths, over and over; each row begins somewhere else; the rest is padding."""
    rows = []
    for b in range(B):
        order = lengths[b % len(lengths) :] + lengths[: b % len(lengths)]
        numbers = [number for number, length in enumerate(order * T, 1) for _ in range(length)][: T - 3 * b]
        rows.append(numbers + [0] * (T - len(numbers)))
    return torch.tensor(rows)


def compare(inputs: list[Tensor], causal: bool, window: int | None = None, segments_BT: Tensor | None = None) -> None:
    """Values and gradients of float32 attention against float64."""
    y = attention(*inputs, causal=causal, window=window, segments_BT=segments_BT)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference(*exact, allowed(inputs[0].size(1), inputs[1].size(1), causal, window, segments_BT))
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=5e-6)
    for mine, true in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        torch.testing.assert_close(mine, true.float(), rtol=1e-5, atol=2e-5)


def gradients(inputs: list[Tensor], **how: object) -> list[Tensor]:
    y = attention(*inputs, **how)  # type: ignore[arg-type]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 64, 65, 200, 257])
def test_lengths(T: int) -> None:
    compare(draw(2, T, 2, 1, 16), causal=True)
    compare(draw(1, T, 2, 2, 8), causal=False)


@pytest.mark.parametrize("N", [4, 8, 12, 16, 20, 24, 32, 36, 64, 80, 96, 100, 128, 248, 256, 264])
def test_head_sizes(N: int) -> None:
    compare(draw(1, 70, 2, 1, N), causal=True)
    compare(draw(1, 21, 1, 1, N), causal=False)


@pytest.mark.parametrize(("B", "H", "K"), [(1, 1, 1), (2, 6, 6), (3, 6, 3), (1, 6, 1), (20, 2, 1)])
def test_groups_of_heads(B: int, H: int, K: int) -> None:
    compare(draw(B, 67, H, K, 8), causal=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 5, 64, 100, 500])
def test_windows(window: int, causal: bool) -> None:
    compare(draw(1, 150, 2, 1, 8), causal=causal, window=window)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[300], [1], [20, 1, 2, 33], [64, 16, 17], [70, 140]])
def test_segments(lengths: list[int], causal: bool) -> None:
    compare(draw(3, 140, 2, 1, 8), causal, segments_BT=text_lengths(3, 140, lengths))
    compare(draw(1, 140, 1, 1, 8), causal, window=9, segments_BT=text_lengths(1, 140, lengths))


def test_a_number_that_comes_again_is_another_text() -> None:
    compare(draw(1, 6, 1, 1, 8), causal=True, segments_BT=torch.tensor([[1, 1, 0, 0, 1, 1]], dtype=torch.int32))


@pytest.mark.parametrize(
    ("T", "S", "window"), [(3, 100, None), (100, 3, None), (65, 130, 20), (200, 10, 15), (1, 1, 0)]
)
def test_cross_attention(T: int, S: int, window: int | None) -> None:
    compare(draw(2, T, 2, 1, 8, S), causal=False, window=window)


def test_masks_say_who_sees_whom() -> None:
    segments_BT = text_lengths(2, 20, [7, 4])
    for causal, window, segments in itertools.product((True, False), (None, 1, 3, 50), (None, segments_BT)):
        how = {"causal": causal, "window": window, "segments_BT": segments}
        mask = attention_mask(20, 20, torch.device("cpu"), **how)  # type: ignore[arg-type]
        assert torch.equal(mask, allowed(20, 20, causal, window, segments))
        if segments is None:  # those who come after a cache of 15
            later = attention_mask(5, 20, torch.device("cpu"), causal=causal, window=window, start=15)
            assert torch.equal(later, mask[:, 15:])
    padded = attention_mask(3, 3, torch.device("cpu"), causal=True, mask_BS=torch.tensor([[False, True, True]]))
    assert padded.int().tolist() == [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]


@needs_native
def test_the_native_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(module, "by_torch", refuse)
    inputs = draw(1, 20, 2, 1, 16)
    y = attention(*inputs, causal=True, window=4, segments_BT=text_lengths(1, 20, [5]))
    y.sum().backward()
    for how in ({"softcap": 5.0}, {"dropout": 0.5}):
        with pytest.raises(AssertionError):
            attention(*inputs, causal=True, **how)  # type: ignore[arg-type]


@needs_native
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", [(1, 257, 1, 1, 8), (1, 300, 4, 2, 16), (4, 130, 8, 4, 8)])
@pytest.mark.parametrize("packed", [True, False])
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, int, int, int, int], packed: bool) -> None:
    inputs, results = draw(*shape), []
    segments_BT = text_lengths(shape[0], shape[1], [20, 3, 90]) if packed else None
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(inputs, causal=True, segments_BT=segments_BT))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_slices_of_one_tensor_and_other_strides() -> None:
    B, T, H, K, N = 2, 50, 4, 2, 16
    fused = torch.randn(B, T, (H + 2 * K) * N)
    parts = [x.unflatten(-1, (-1, N)).requires_grad_() for x in fused.split((H * N, K * N, K * N), dim=-1)]
    assert not parts[0].is_contiguous()
    expected = gradients([x.detach().contiguous().requires_grad_() for x in parts], causal=True)
    for inputs in (
        parts,
        [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in parts],  # heads outermost
        [x.detach().repeat_interleave(2, 3)[..., ::2].requires_grad_() for x in parts],  # every second value
    ):
        for a, b in zip(gradients(inputs, causal=True), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_of_other_strides() -> None:
    inputs = draw(2, 20, 2, 1, 8)
    y = attention(*inputs, causal=True)
    whole = torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), inputs, retain_graph=True), whole))
    tall = torch.randn(2, 2, 20, 8)
    swapped = torch.autograd.grad(y, inputs, tall.transpose(1, 2), retain_graph=True)
    assert all(map(torch.equal, swapped, torch.autograd.grad(y, inputs, tall.transpose(1, 2).contiguous())))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_wanted(wanted: tuple[bool, ...]) -> None:
    inputs = draw(1, 90, 2, 1, 8)
    expected = gradients(inputs, causal=True)[1:]
    part = [x.detach().requires_grad_(need) for x, need in zip(inputs, wanted, strict=True)]
    y = attention(*part, causal=True)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    for x, gradient, need in zip(part, expected, wanted, strict=True):
        assert (x.grad is not None and torch.equal(x.grad, gradient)) if need else x.grad is None


def test_without_gradients_the_values_are_the_same() -> None:
    inputs = draw(1, 70, 2, 1, 16)
    with torch.no_grad():
        y = attention(*inputs, causal=True)
    assert not y.requires_grad
    assert torch.equal(y, attention(*inputs, causal=True))


def test_large_scores_stay_finite() -> None:
    q, k, v = (x.detach() for x in draw(1, 130, 2, 1, 16))
    inputs = [x.requires_grad_() for x in (q * 30, k * 30, v)]
    for causal in (True, False):
        results = gradients(inputs, causal=causal)
        assert all(x.isfinite().all() for x in results)
        expected = reference(*(x.double() for x in inputs), allowed(130, 130, causal, None, None))
        torch.testing.assert_close(results[0], expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_of_one_sign_far_from_zero(sign: float) -> None:
    q, k, v = (x.detach() for x in draw(1, 80, 1, 1, 8))
    y = attention(q.abs() * 100 * sign, k.abs() * 100, v, causal=True)
    expected = reference(
        (q.abs() * 100 * sign).double(), (k.abs() * 100).double(), v.double(), allowed(80, 80, True, None, None)
    )
    torch.testing.assert_close(y, expected.float(), rtol=2e-2, atol=2e-2)


@needs_native
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_is_not_hidden(place: int) -> None:
    inputs = [x.detach() for x in draw(1, 70, 1, 1, 16)]
    inputs[place][0, 40, 0, 3] = torch.nan
    y = attention(*inputs, causal=True)
    assert y[0, 40].isnan().any()
    assert y[0, :36].isfinite().all()


@pytest.mark.parametrize("other_value", [5.0, pytest.param(torch.inf, marks=needs_native)])
def test_a_text_cannot_see_another(other_value: float) -> None:
    segments_BT = text_lengths(1, 100, [20, 1, 37])
    inputs = draw(1, 100, 2, 1, 16)
    for causal in (True, False):
        before = gradients(inputs, causal=causal, segments_BT=segments_BT)
        first, other = segments_BT[0] == 3, segments_BT[0] != 3
        changed = [x.detach().clone() for x in inputs]
        for x in changed:
            x[:, first] = other_value
        after = gradients([x.requires_grad_() for x in changed], causal=causal, segments_BT=segments_BT)
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[:, other], b[:, other])
            assert not torch.equal(a[:, first], b[:, first])


def test_a_packed_text_is_computed_as_if_it_were_alone() -> None:
    lengths = [30, 70, 1, 19]
    inputs = draw(1, sum(lengths), 2, 1, 16)
    packed = gradients(inputs, causal=True, segments_BT=text_lengths(1, sum(lengths), lengths))
    grad = torch.randn(packed[0].shape, generator=torch.Generator().manual_seed(1))
    for begin, length in zip(itertools.accumulate([0, *lengths]), lengths, strict=False):
        alone = [x.detach()[:, begin : begin + length].requires_grad_() for x in inputs]
        y = attention(*alone, causal=True)
        results = [y, *torch.autograd.grad(y, alone, grad[:, begin : begin + length])]
        for a, b in zip(packed, results, strict=True):
            torch.testing.assert_close(a[:, begin : begin + length], b.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("causal", "window", "packed", "softcap", "scale"),
    [
        (True, None, False, None, None),
        (False, None, False, None, 0.3),
        (True, 5, False, None, None),
        (False, 5, True, None, None),
        (True, None, True, 2.0, None),
        (True, None, False, 2.0, 0.3),
    ],
)
def test_by_torch(causal: bool, window: int | None, packed: bool, softcap: float | None, scale: float | None) -> None:
    inputs = [x.detach().double().requires_grad_() for x in draw(2, 20, 4, 2, 6)]  # float64: not the kernel
    segments_BT = text_lengths(2, 20, [7, 4]) if packed else None
    seen = allowed(20, 20, causal, window, segments_BT)
    y = attention(
        *inputs, causal=causal, window=window, segments_BT=segments_BT, softcap=softcap, scale=scale, dropout=0.0
    )
    grad = torch.randn_like(y)
    expected = reference(*inputs, seen, scale, softcap)
    torch.testing.assert_close(y, expected)
    for a, b in zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("softcap", "window"), [(None, None), (2.0, 30)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("way", ["by_texts", "by_tiles", "dense"])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_texts_of_a_row_by_torch(
    way: str, causal: bool, softcap: float | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each text by itself, FlexAttention's tiles, a mask of all pairs: the same values and gradients."""
    B, T = 2, 150
    segments_BT = text_lengths(B, T, [40, 25, 2])
    monkeypatch.setattr(torch_attention, "CALL_PAIRS", 10 if way == "by_texts" else 1 << 20)
    monkeypatch.setattr(torch_attention, "flex_pays", lambda *_: way == "by_tiles")
    others = [other for other in ("by_texts", "by_tiles") if other != way]
    for other in others:
        monkeypatch.setattr(torch_attention, other, None)
    inputs = [x.detach().double().requires_grad_(way != "by_tiles") for x in draw(B, T, 4, 2, 16)]
    how = {"causal": causal, "window": window, "segments_BT": segments_BT}
    y = attention(*inputs, **how, softcap=softcap)  # type: ignore[arg-type]
    expected = reference(*inputs, allowed(T, T, causal, window, segments_BT), softcap=softcap)
    torch.testing.assert_close(y, expected)
    if way != "by_tiles":  # uncompiled, it has no gradients on the CPU
        grad = torch.randn_like(y)
        pairs = zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b)


def test_texts_are_computed_alone_only_where_that_is_less_work() -> None:
    assert torch_attention.text_lengths(text_lengths(2, 400, [50])) == [[50] * 8, [50] * 7 + [47, 3]]
    assert not torch_attention.text_lengths(text_lengths(2, 400, [1]))  # too many calls
    assert not torch_attention.text_lengths(torch.ones(2, 400, dtype=torch.long))  # nothing to divide
    assert not torch_attention.text_lengths(text_lengths(2, 60, [30]))  # too short


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("additive", [True, False])
def test_masks_of_their_own(softcap: float | None, additive: bool) -> None:
    """Bool masks and additive biases, for keys that come before the queries too."""
    q, k, v = draw(2, 3, 4, 2, 16, S=9)
    mask = attention_mask(3, 9, torch.device("cpu"), causal=True, start=6, mask_BS=text_lengths(2, 9, [9]) > 0)
    given = torch.zeros(2, 1, 3, 9).masked_fill(~mask.unsqueeze(1), -torch.inf) if additive else mask.unsqueeze(1)
    y = attention(q, k, v, causal=False, mask=given, softcap=softcap)
    torch.testing.assert_close(y, reference(q, k, v, mask, softcap=softcap), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_dropout_keeps_the_mean(softcap: float | None) -> None:
    torch.manual_seed(0)
    inputs = [x.detach() for x in draw(400, 4, 1, 1, 8)]
    inputs = [x[:1].expand(400, -1, -1, -1) for x in inputs]
    y = attention(*inputs, causal=True, dropout=0.5, softcap=softcap)
    exact = attention(*(x[:1] for x in inputs), causal=True, softcap=softcap)
    assert not torch.allclose(y[0], y[1])
    assert (y.mean(0) - exact[0]).abs().max() < 0.4


def test_other_types() -> None:
    inputs = [x.detach() for x in draw(1, 30, 2, 1, 16)]
    y = attention(*(x.bfloat16() for x in inputs), causal=True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), attention(*inputs, causal=True), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("rows", "length"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_attend_to(rows: int, length: int) -> None:
    for segments_BT in (None, torch.zeros(rows, length, dtype=torch.long)):
        inputs = [torch.zeros(rows, length, 2, 8, requires_grad=True) for _ in range(3)]
        y = attention(*inputs, causal=True, segments_BT=segments_BT)
        assert y.shape == (rows, length, 2, 8)
        y.sum().backward()
        assert all(x.grad is not None and x.grad.shape == x.shape for x in inputs)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_padding_only(causal: bool) -> None:
    segments_BT = torch.cat((torch.zeros(1, 70, dtype=torch.long), text_lengths(1, 70, [70])))
    compare(draw(2, 70, 2, 1, 16), causal, segments_BT=segments_BT)


@pytest.mark.parametrize("causal", [True, False])
def test_denormal_numbers(causal: bool) -> None:
    q, k, v = (x.detach() for x in draw(1, 70, 2, 1, 16))
    compare([x.requires_grad_() for x in (q * 1e-40, k.clone(), v.clone())], causal)
    tiny = gradients([x.requires_grad_() for x in (q.clone(), k.clone(), v * 1e-39)], causal=causal)
    assert all(x.isfinite().all() for x in tiny)


def test_huge_scores_choose_one_key() -> None:
    """Scores up to 1e37: the softmax is that of the largest, no number is infinite or missing."""
    q, k, v = (x.detach() for x in draw(1, 90, 1, 1, 16))
    found = gradients([(x).requires_grad_() for x in (q * 1e18, k * 1e18, v)], causal=True)
    assert all(x.isfinite().all() for x in found[:1]) and found[0].abs().max() <= v.abs().max()


@pytest.mark.parametrize(
    ("shapes", "how", "said"),
    [
        (((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)), {"causal": True}, "cannot be computed"),
        (((1, 4, 2, 8), (1, 4, 2, 8), (1, 5, 2, 8)), {"causal": False}, "cannot be computed"),
        (((2, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)), {"causal": True}, "cannot be computed"),
        (((1, 4, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)), {"causal": True}, "same positions"),
        (((1, 4, 2, 8),) * 3, {"causal": True, "window": 0}, "shows a query nothing"),
        (((1, 4, 2, 8),) * 3, {"causal": False, "segments_BT": torch.zeros(1, 3)}, "segments are"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], how: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        attention(*(torch.zeros(shape) for shape in shapes), **how)  # type: ignore[arg-type]
