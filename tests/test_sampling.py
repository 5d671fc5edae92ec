"""Sampling settings, logit processors equal to those of transformers bit for bit, and the draw."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hanmo.errors import UsageError
from hanmo.inference import sampling as ours
from hanmo.inference.sampling import Sampling, draw, process

# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_new_tokens", 0, "from 1 to 1000000"),
        ("max_new_tokens", 2.5, "whole number"),
        ("max_new_tokens", True, "whole number"),
        ("temperature", -0.1, "from 0 to 10"),
        ("temperature", math.nan, "from 0 to 10"),
        ("temperature", math.inf, "from 0 to 10"),
        ("temperature", "hot", "a number"),
        ("top_k", -1, "from 0"),
        ("top_p", 1.01, "from 0 to 1"),
        ("min_p", -0.5, "from 0 to 1"),
        ("repetition_penalty", 0, "from 0.1 to 10"),
        ("no_repeat_ngram_size", -1, "from 0"),
        ("seed", -1, "from 0"),
        ("seed", 2**63, "from 0"),
        ("seed", 2**64, "from 0"),
        ("logprobs", 10**9, "from 0 to 20"),
        ("logprobs", True, "whole number"),
        ("top_p", math.nan, "from 0 to 1"),
        ("min_p", math.nan, "from 0 to 1"),
        ("repetition_penalty", math.nan, "from 0.1 to 10"),
        ("max_new_tokens", 10**9, "from 1 to 1000000"),
        ("max_new_tokens", math.nan, "whole number"),
        ("n", 0, "from 1 to 16"),
        ("n", 1_000_000, "from 1 to 16"),
        ("ignore_eos", 1, "true or false"),
        ("stop", ["a"] * 17, "at most 16 texts"),
        ("stop", [""], "1 to 64 characters"),
        ("stop", ["x" * 65], "1 to 64 characters"),
        ("stop", [7], "1 to 64 characters"),
        ("stop", 7, "at most 16 texts"),
    ],
)
def test_bad_values_are_refused_with_field_range_and_fix(name: str, value: Any, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**{name: value})
    assert caught.value.what.startswith(f"{name} must be ")
    assert expected in caught.value.what
    assert caught.value.fix.startswith(f"give {name} as ")
    assert name in caught.value.zh


def test_an_unknown_option_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="temprature") as caught:
        Sampling.from_options({"temprature": 1})
    assert "temperature" in caught.value.fix


def test_one_stop_string_may_be_given_without_a_list() -> None:
    assert Sampling(stop="。").stop == ["。"]  # type: ignore[arg-type]


def test_settings_can_be_imported_without_torch() -> None:
    code = "import sys, hanmo.inference.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Processors ----------------------------------------------------------------------------------------------------------


def example(seed: int, vocabulary: int, length: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of logits (some removed, many equal, or all equal) and their histories."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, vocabulary, generator=generator) * 4
    if kind == "ties":
        logits = logits.round()
    elif kind == "removed":
        logits[torch.rand(2, vocabulary, generator=generator) < 0.5] = -math.inf
        logits[:, int(torch.randint(vocabulary, (), generator=generator))] = 1.0
    elif kind == "flat":
        logits = torch.zeros(2, vocabulary)
    elif kind == "peaked":
        logits[:, 0] = 200.0
    return logits, torch.randint(vocabulary, (2, length), generator=generator)


examples = st.builds(
    example,
    st.integers(0, 2**32),
    st.sampled_from([2, 3, 17, 300]),
    st.integers(1, 40),
    st.sampled_from(["plain", "ties", "removed", "flat", "peaked"]),
)
fast = settings(max_examples=60, deadline=None)
share = st.sampled_from([0.0, 1e-6, 0.05, 0.3, 0.5, 0.9, 0.999])


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, ``-inf`` included."""
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@fast
@given(examples, st.sampled_from([0.5, 0.9, 1.1, 1.3, 3.0]))
def test_repetition_penalty(case: tuple[torch.Tensor, torch.Tensor], penalty: float) -> None:
    logits, ids = case
    check(ours.repetition_penalty(logits, ids, penalty), RepetitionPenaltyLogitsProcessor(penalty)(ids, logits))


@fast
@given(examples, st.integers(1, 5))
def test_no_repeat_ngram(case: tuple[torch.Tensor, torch.Tensor], size: int) -> None:
    logits, ids = case
    ids = ids % 3  # so that n-grams do repeat
    check(ours.no_repeat_ngram(logits, ids, size), NoRepeatNGramLogitsProcessor(size)(ids, logits))


@fast
@given(examples, st.sampled_from([0.01, 0.3, 0.7, 1.7, 10.0]))
def test_temperature(case: tuple[torch.Tensor, torch.Tensor], value: float) -> None:
    logits, ids = case
    check(ours.temperature(logits, value), TemperatureLogitsWarper(value)(ids, logits))


@fast
@given(examples, st.sampled_from([1, 2, 5, 50, 10_000]))
def test_top_k(case: tuple[torch.Tensor, torch.Tensor], k: int) -> None:
    logits, ids = case
    check(ours.top_k(logits, k), TopKLogitsWarper(k)(ids, logits))


def test_top_k_keeps_ties_with_the_kth() -> None:
    kept = ours.top_k(torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]]), 2).isfinite()
    assert kept.tolist() == [[True, True, True, True, False]]


@fast
@given(examples, share)
def test_top_p(case: tuple[torch.Tensor, torch.Tensor], mass: float) -> None:
    logits, ids = case
    check(ours.top_p(logits, mass), TopPLogitsWarper(mass)(ids, logits))


@fast
@given(examples, st.one_of(share, st.just(1.0)))
def test_min_p(case: tuple[torch.Tensor, torch.Tensor], part: float) -> None:
    logits, ids = case
    check(ours.min_p(logits, part), MinPLogitsWarper(part)(ids, logits))


@fast
@given(
    examples,
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.7, 1.0, 1.5]),
        top_k=st.sampled_from([0, 1, 3, 40]),
        top_p=st.sampled_from([1.0, 0.95, 0.5]),
        min_p=st.sampled_from([0.0, 0.05, 0.4]),
        repetition_penalty=st.sampled_from([1.0, 1.2]),
        no_repeat_ngram_size=st.sampled_from([0, 2]),
    ),
)
def test_the_whole_chain_in_the_order_of_transformers(
    case: tuple[torch.Tensor, torch.Tensor], sampling: Sampling
) -> None:
    logits, ids = case
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.no_repeat_ngram_size:
        chain.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    if sampling.temperature > 0:
        chain.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            chain.append(TopKLogitsWarper(sampling.top_k))
        chain.append(TopPLogitsWarper(sampling.top_p)) if sampling.top_p < 1 else None
        chain.append(MinPLogitsWarper(sampling.min_p)) if sampling.min_p else None
    expected = chain(ids, logits)
    if expected.isneginf().all(dim=1).any():
        return  # every token forbidden: no distribution is left to compare (the engine ends such a row)
    check(process(logits, ids, sampling), expected)


@fast
@given(examples, st.integers(1, 9), st.integers(1, 3))
def test_left_padding_of_the_history_changes_nothing(
    case: tuple[torch.Tensor, torch.Tensor], padding: int, size: int
) -> None:
    logits, ids = case
    ids = ids % 3
    padded = torch.cat((torch.full((2, padding), logits.size(1)), ids), dim=1)
    check(ours.repetition_penalty(logits, padded, 1.3), ours.repetition_penalty(logits, ids, 1.3))
    check(ours.no_repeat_ngram(logits, padded, size), ours.no_repeat_ngram(logits, ids, size))


# The draw ------------------------------------------------------------------------------------------------------------


def test_a_seed_draws_what_the_global_generator_of_torch_draws() -> None:
    for seed in range(20):
        logits, _ = example(seed, 300, 1, "plain")
        torch.manual_seed(seed)
        expected = [int(torch.multinomial(logits[:1].softmax(-1), 1)) for _ in range(20)]
        generator = torch.Generator().manual_seed(seed)
        assert [draw(logits[:1], [generator])[0] for _ in range(20)] == expected


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    logits, _ = example(3, 300, 1, "plain")
    together = draw(logits, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    alone = [draw(logits[row : row + 1], [torch.Generator().manual_seed(row + 1)])[0] for row in (0, 1)]
    assert together == alone


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    generator = torch.Generator().manual_seed(0)
    count = 20_000
    logits = probabilities.log().expand(count, -1)
    counts = torch.bincount(torch.tensor(draw(logits, [generator] * count)), minlength=5)
    expected = probabilities[:4] * count
    assert counts[4] == 0
    assert float(((counts[:4] - expected) ** 2 / expected).sum()) < 16.3  # chi-squared, 3 degrees of freedom, p = 0.001


def test_without_generators_the_most_probable_token_is_taken() -> None:
    assert draw(torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]]), None) == [1, 0]
