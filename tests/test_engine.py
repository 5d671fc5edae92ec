"""The engine's law: what a request gets depends on the request alone. Not on its company, the cache, the pieces in
which its prompt was read, guesses, or the number of threads; on the native engine to the last bit."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hanmo.errors import HanmoError, ModelError, ResourceError, UsageError
from hanmo.inference import engine as engine_module
from hanmo.inference.constraints import OneOf
from hanmo.inference.engine import Chunk
from hanmo.inference.graphs import Graphs
from hanmo.inference.language_model import Completion, LanguageModel
from hanmo.inference.native import library
from hanmo.inference.native.decoder import NativeDecoder, Weights, prepare
from hanmo.inference.native.network import NativeNetwork
from hanmo.inference.sampling import Sampling
from hanmo.inference.speculation import PromptLookup
from hanmo.models.adapters.attach import adapter_parameters, add_adapter, merge
from hanmo.models.adapters.files import load_adapter, save_adapter
from hanmo.models.adapters.lora import LoraConfig
from hanmo.models.transformer import Transformer
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.training import train_bpe

from .native_cases import decoder

NATIVE = library.load()[0] is not None
needs_native = pytest.mark.skipif(not NATIVE, reason=f"no native engine: {library.load()[1]}")
CONTEXT = 256
NEW = 24
TEXTS = [
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "The quick brown fox jumps over the lazy dog; the lazy dog sleeps.",
    "从前有座山，山里有座庙，庙里有个老和尚在讲故事。",
    "a a a a a a a a b b b b a a a a a a a a b b b b",
    "def add(x, y):\n    return x + y\n",
]
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 7}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "history": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 4},
    "sampled with history": {**SAMPLED, "repetition_penalty": 1.1, "min_p": 0.02},
}


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS * 3, 330)


def network_of(tokenizer: Tokenizer, layout: str = "llama") -> Transformer:
    """A random network whose texts run in circles soon, so that guesses are right at times."""
    model = decoder(layout, vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT)
    with torch.no_grad():
        model.output_weight.mul_(8)
    return model


def language_model(tokenizer: Tokenizer, form: str, **options: Any) -> LanguageModel:
    """The random network as "torch", or as "fp32", "int8", "int4" of the native engine."""
    model = network_of(tokenizer)
    if form == "torch":
        return LanguageModel(model, tokenizer, **options)
    threads = options.pop("threads", 1)
    parts = prepare(model.config, Weights.of_state(model.state_dict()), form)
    return LanguageModel(
        NativeNetwork(NativeDecoder(model.config, parts, threads=threads, rows=64)), tokenizer, **options
    )


@pytest.fixture(params=["torch", *(["fp32", "int8", "int4"] if NATIVE else [])])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(tokenizer: Tokenizer, form: str) -> LanguageModel:
    return language_model(tokenizer, form)


def prompts_of(tokenizer: Tokenizer) -> list[list[int]]:
    """Prompts of 1 to about 180 tokens."""
    texts = [*TEXTS, "春", TEXTS[1] * 3, TEXTS[0] + TEXTS[1] * 2, TEXTS[3] * 4]
    return [tokenizer.encode(text)[: CONTEXT - NEW] for text in texts]


def plain(tokenizer: Tokenizer, form: str) -> Callable[..., Completion]:
    """One request at a time, with a cache of its own, and no guesses."""
    model = language_model(tokenizer, form, speculate=False)

    def one(prompt: list[int], **options: Any) -> Completion:
        for kept in [*model.engine.kept]:
            model.engine.forget(kept)
        return model.generate([prompt], max_new_tokens=NEW, ignore_eos=True, logprobs=2, **options)[0]

    return one


def same(found: Completion, expected: Completion, form: str) -> None:
    """The same tokens; and on the native engine the same numbers."""
    assert found.ids == expected.ids
    assert found.text == expected.text
    if form != "torch":
        assert found.logprobs == expected.logprobs


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_request_gets_the_same_whatever_happens_around_it(tokenizer: Tokenizer, form: str, kind: str) -> None:
    options, prompts, one = OPTIONS[kind], prompts_of(tokenizer), plain(tokenizer, form)
    expected = [one(prompt, **options) for prompt in prompts]
    every = {"max_new_tokens": NEW, "ignore_eos": True, "logprobs": 2, **options}
    model = language_model(tokenizer, form)
    for size in (1, 2, 8):
        order = random.Random(size).sample(range(len(prompts)), len(prompts))
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            for row, found in zip(rows, model.generate([prompts[row] for row in rows], **every), strict=True):
                same(found, expected[row], form)
    assert model.engine.read_tokens < sum(3 * (len(prompt) + NEW) for prompt in prompts), "prompts were read again"
    for piece in (1, 7, 33):
        model = language_model(tokenizer, form)
        model.network.piece = piece
        for found, wanted in zip(model.generate(prompts, **every), expected, strict=True):
            same(found, wanted, form)


@needs_native
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_number_of_threads_changes_nothing(tokenizer: Tokenizer, precision: str) -> None:
    prompts = prompts_of(tokenizer)
    every = {"max_new_tokens": NEW, "ignore_eos": True, "logprobs": 2, **SAMPLED}
    expected = language_model(tokenizer, precision, threads=1).generate(prompts, **every)
    assert language_model(tokenizer, precision, threads=2).generate(prompts, **every) == expected
    assert language_model(tokenizer, precision, threads=3).generate(prompts, **every) == expected


@pytest.mark.parametrize("kind", OPTIONS)
def test_guesses_save_steps_and_change_nothing(tokenizer: Tokenizer, form: str, kind: str) -> None:
    prompt, one = tokenizer.encode(TEXTS[3] * 3), plain(tokenizer, form)
    expected = one(prompt, **OPTIONS[kind])
    model = language_model(tokenizer, form)
    every = {"max_new_tokens": NEW, "ignore_eos": True, "logprobs": 2, **OPTIONS[kind]}
    same(model.generate([prompt], **every)[0], expected, form)
    if kind == "greedy":
        assert model.engine.right_tokens > 0
        reading = -(-len(prompt) // model.network.piece)
        assert model.engine.steps == reading - 1 + NEW - model.engine.right_tokens
    drafted = language_model(tokenizer, form, draft=language_model(tokenizer, form))
    same(drafted.generate([prompt], **every)[0], expected, form)
    if kind == "greedy":
        assert drafted.engine.right_tokens == drafted.engine.guessed_tokens > NEW / 2  # it guesses itself
        assert drafted.engine.steps < NEW / 3
    other = language_model(tokenizer, form, draft=LanguageModel(network_of(tokenizer, "qwen3"), tokenizer))
    same(other.generate([prompt], **every)[0], expected, form)


def test_a_draft_model_of_other_tokens_is_refused(model: LanguageModel) -> None:
    other = train_bpe(TEXTS * 3, 300)
    with pytest.raises(UsageError, match="other tokens"):
        model.guesser_of(LanguageModel(network_of(other), other))


def test_a_prompt_that_begins_like_an_earlier_one_reads_only_the_rest(model: LanguageModel) -> None:
    beginning = model.tokenizer.encode(TEXTS[1] * 2)
    first = model.generate([beginning], max_new_tokens=4, ignore_eos=True)[0]
    assert first.reused_tokens == 0
    again = model.generate([beginning], max_new_tokens=4, ignore_eos=True)[0]
    assert again.reused_tokens == len(beginning) - 1 and again.ids == first.ids
    turn = model.generate([beginning + first.ids + beginning[:5]], max_new_tokens=4, ignore_eos=True)[0]
    assert turn.reused_tokens == len(beginning) + 3  # the last token that was written was never read
    assert model.generate(["春眠"], max_new_tokens=4)[0].reused_tokens == 0


def test_choices_share_the_reading_of_their_prompt(model: LanguageModel) -> None:
    prompt = model.tokenizer.encode(TEXTS[1] * 2)
    options = {**SAMPLED, "max_new_tokens": 9, "ignore_eos": True}
    choices = model.generate([prompt], n=3, **options)
    assert model.engine.read_tokens < len(prompt) + 3 * 9 + model.engine.guessed_tokens
    alone = [model.generate([prompt], **{**options, "seed": 7 + choice})[0].ids for choice in range(3)]
    assert [choice.ids for choice in choices] == alone


def test_long_prompts_do_not_stop_those_who_write(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BUSY_PIECE", 16)
    monkeypatch.setattr(model.engine, "new_guesser", None)
    writer = model.stream("春眠", max_new_tokens=40, ignore_eos=True)
    chunks = [next(writer)]
    prompt = model.tokenizer.encode(TEXTS[1] * 3)[:100]
    reader = model.engine.submit(prompt, engine_module.Sampling(), room=5)
    while not reader.chunks:
        before = model.engine.steps
        chunks.append(next(writer))
        assert model.engine.steps - before <= 1
    assert len(chunks) == 1 + -(-len(prompt) // 16)
    writer.close()
    assert [len(chunk.ids) for chunk in model.engine.chunks([reader])] == [1] * 5


@needs_native
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_prompt_of_400_tokens_in_one_piece_and_in_small_ones(tokenizer: Tokenizer, precision: str) -> None:
    """In one piece each of two threads has so many rows that it expands the weights before it multiplies."""
    network = decoder("llama", vocab_size=tokenizer.vocab_size, max_position_embeddings=640)
    parts = prepare(network.config, Weights.of_state(network.state_dict()), precision)
    prompt = (tokenizer.encode(" ".join(TEXTS)) * 9)[:400]
    found = []
    for threads, rows in ((2, 512), (2, 32), (1, 32), (3, 130)):
        engine = NativeNetwork(NativeDecoder(network.config, parts, threads=threads, rows=rows))
        model = LanguageModel(engine, tokenizer, speculate=False)
        done = model.generate([prompt], max_new_tokens=NEW, ignore_eos=True, logprobs=5)[0]
        assert model.engine.steps == NEW - 1 + -(-len(prompt) // rows)
        found.append((done.ids, done.logprobs, model.prompt_logprobs(prompt, 2)))
    assert all(each == found[0] for each in found)


def pages_in_use(model: LanguageModel) -> int:
    """Slots or pages that somebody holds."""
    network: Any = model.network
    if isinstance(network, NativeNetwork):
        return sum(map(bool, network.pages.users))
    return len(network.pool.taken)


def test_nothing_is_left_behind_in_a_storm(tokenizer: Tokenizer, form: str) -> None:
    one, prompts = plain(tokenizer, form), prompts_of(tokenizer)
    model = language_model(tokenizer, form)
    dice = random.Random(1)
    expected: dict[tuple[int, bool], Completion] = {}
    running: list[tuple[int, bool, Iterator[Chunk], list[int]]] = []
    for _ in range(400):
        action = dice.random()
        if action < 0.15 and len(running) < 6:
            row, greedy = dice.randrange(len(prompts)), dice.random() < 0.5
            options: dict[str, Any] = {} if greedy else SAMPLED
            if (row, greedy) not in expected:
                expected[row, greedy] = one(prompts[row], **options)
            stream = model.stream(prompts[row], max_new_tokens=NEW, ignore_eos=True, **options)
            running.append((row, greedy, stream, []))
        elif action < 0.2 and running:
            running.pop(dice.randrange(len(running)))[2].close()
        elif running:
            row, greedy, stream, ids = dice.choice(running)
            for chunk in stream:
                ids += chunk.ids
                if dice.random() < 0.7:
                    break
            assert ids == expected[row, greedy].ids[: len(ids)]
    for row, greedy, stream, ids in running:
        ids += [id for chunk in stream for id in chunk.ids]
        assert ids in (expected[row, greedy].ids, [])
    assert not model.engine.rows and not model.engine.waiting
    for kept in [*model.engine.kept]:
        model.engine.forget(kept)
    assert pages_in_use(model) == 0


def test_threads_share_the_engine(model: LanguageModel, form: str, tokenizer: Tokenizer) -> None:
    one, prompts = plain(tokenizer, form), prompts_of(tokenizer)
    expected = [one(prompt).ids for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        streams = [model.stream(prompt, max_new_tokens=NEW, ignore_eos=True) for prompt in prompts]
        found = list(pool.map(lambda stream: [id for chunk in stream for id in chunk.ids], streams))
    assert found == expected
    score = model.logprobs(prompts[0])
    with ThreadPoolExecutor(2) as pool:  # scoring waits for the steps of others
        writing = pool.submit(model.generate, prompts, max_new_tokens=NEW, ignore_eos=True)
        assert torch.allclose(pool.submit(model.logprobs, prompts[0]).result(), score, atol=1e-5)
        assert [completion.ids for completion in writing.result()] == expected


def test_an_error_ends_those_who_take_part_and_no_others(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    good = model.generate("春眠", max_new_tokens=5, ignore_eos=True)[0].ids
    read = model.network.read

    def broken(_: Any) -> torch.Tensor:
        raise ModelError("told to fail")

    monkeypatch.setattr(model.network, "read", broken)
    first = model.stream("春眠", max_new_tokens=5)
    with pytest.raises(ModelError, match="told to fail"):
        next(first)
    monkeypatch.setattr(model.network, "read", read)
    assert model.generate("春眠", max_new_tokens=5, ignore_eos=True)[0].ids == good
    poisoned = model.tokenizer.encode(TEXTS[1])

    def nan_for_one(pieces: Any) -> torch.Tensor:
        logits = read(pieces)
        places = [place for place, piece in enumerate(pieces) for _ in range(piece.wanted)]
        for row, place in enumerate(places):
            if pieces[place].text.length >= len(poisoned):
                logits[row] = float("nan")
        return logits

    monkeypatch.setattr(model.network, "read", nan_for_one)
    monkeypatch.setattr(model.engine, "new_guesser", None)
    bad = model.engine.submit(poisoned, engine_module.Sampling(), room=5)
    assert model.generate("春眠", max_new_tokens=5, ignore_eos=True)[0].ids == good
    with pytest.raises(ModelError, match="NaN"):
        list(model.engine.chunks([bad]))
    assert not model.engine.rows


@needs_native
def test_more_than_memory_holds_waits_or_is_refused(tokenizer: Tokenizer) -> None:
    model = language_model(tokenizer, "fp32")
    network: Any = model.network
    network.cache.pages = 9  # of 32 positions
    prompts = [tokenizer.encode(TEXTS[1] * 2)[:60] for _ in range(4)]
    expected = [plain(tokenizer, "fp32")(prompt).ids for prompt in prompts]
    found = model.generate(prompts, max_new_tokens=NEW, ignore_eos=True)
    assert [completion.ids for completion in found] == expected
    network.cache.pages = 3
    with pytest.raises(ResourceError, match="memory for the keys and values of 32 tokens"):
        model.generate(prompts[:1], max_new_tokens=NEW)
    assert len(model.generate([prompts[0][:9]], max_new_tokens=9, ignore_eos=True)[0].ids) == 9


def test_requests_with_several_adapters_and_none_share_the_steps(
    tokenizer: Tokenizer, form: str, tmp_path: Path
) -> None:
    base, generator, folders = network_of(tokenizer), torch.Generator().manual_seed(4), {}
    expected: dict[str | None, list[list[int]]] = {}
    prompts, every = prompts_of(tokenizer), {"max_new_tokens": NEW, "ignore_eos": True, "logprobs": 1}
    for name in ("mail", "poems"):
        add_adapter(base, name, LoraConfig(rank=3, alpha=6.0))
        for weight in adapter_parameters(base, name).values():
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        folders[name] = tmp_path / name
        save_adapter(folders[name], base, name)
    model = language_model(tokenizer, form)
    for name, folder in folders.items():
        assert model.add_adapter(folder) == name
        alone = language_model(tokenizer, form, speculate=False)
        alone.add_adapter(folder, name)
        expected[name] = [alone.generate([prompt], adapter=name, **every)[0].ids for prompt in prompts]
    expected[None] = [language_model(tokenizer, form).generate([prompt], **every)[0].ids for prompt in prompts]
    assert len({str(ids) for ids in expected.values()}) == 3
    names = [None, "mail", "poems", None, "poems", "mail", "poems", "mail", None]
    for _ in range(2):  # the second time prompts are in the cache, with the adapter that read them
        requests = [
            model._submit(row, prompt, Sampling(**every, adapter=name))
            for row, (prompt, name) in enumerate(zip(prompts, names, strict=True))
        ]
        found: dict[int, list[int]] = {row: [] for row in range(len(prompts))}
        for chunk in model.engine.chunks(requests):
            found[chunk.index] += chunk.ids
        assert found == {row: expected[name][row] for row, name in enumerate(names)}
    if form in ("torch", "fp32"):
        merged = network_of(tokenizer)
        load_adapter(folders["mail"], merged, "mail")
        merge(merged)
        by_hand = LanguageModel(merged, tokenizer)
        assert [by_hand.generate([prompt], **every)[0].ids for prompt in prompts] == expected["mail"]
    with pytest.raises(UsageError, match="no adapter 'novels'"):
        model.generate("a", adapter="novels")
    with pytest.raises(UsageError, match="is taken"):
        model.add_adapter(folders["mail"])


def test_log_probabilities_are_those_of_the_network(model: LanguageModel) -> None:
    prompt = model.tokenizer.encode(TEXTS[2])
    done = model.generate([prompt], max_new_tokens=6, ignore_eos=True, logprobs=3, **SAMPLED)[0]
    expected = torch.from_numpy(model.score(np.array([prompt + done.ids])))[0, len(prompt) - 1 :].float()
    assert done.logprobs is not None
    torch.testing.assert_close(torch.tensor([item.logprob for item in done.logprobs]), expected, atol=1e-4, rtol=1e-4)
    for item, id in zip(done.logprobs, done.ids, strict=True):
        values = [value for _, value in item.top]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert dict(item.top).get(id, item.logprob) == item.logprob
    assert model.generate([prompt], max_new_tokens=2)[0].logprobs is None
    with pytest.raises(UsageError, match="logprobs must be"):
        model.generate([prompt], logprobs=-1)


def test_a_constraint_decides_what_can_be_written(model: LanguageModel) -> None:
    answers = ["春眠不觉晓", "春风", "The lazy dog", "Then"]
    constraint = OneOf(model, answers)
    prompts = ["", "春", TEXTS[1], "abc"]
    for completion in model.generate(prompts, constraint=constraint, max_new_tokens=40):
        assert completion.text in answers and completion.finish_reason == "stop"
    drawn = {c.text for c in model.generate("春", constraint=constraint, n=16, temperature=5.0, seed=1)}
    assert drawn <= set(answers) and len(drawn) > 1
    with pytest.raises(UsageError):
        OneOf(model, ["", "a"])
    with pytest.raises(UsageError, match="constraint must be"):
        model.generate("春", constraint=3)


class Allowing:
    """A constraint that answers what it was given, from the third token on."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def allowed(self, ids: list[int]) -> Any:
        if len(ids) < 2:
            return None
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    "answer", [[-1], [10**4], [2**70], [5, 0.5], [float("nan")], [True], [[5]], "ab", 5, KeyError("mine")]
)
def test_a_constraint_that_fails_ends_its_own_request_and_no_other(model: LanguageModel, answer: Any) -> None:
    good = model.generate("春眠", max_new_tokens=NEW, ignore_eos=True, **SAMPLED)[0]
    other = model.stream("春眠", max_new_tokens=NEW, ignore_eos=True, **SAMPLED)
    chunks = [next(other)]
    expected = KeyError if isinstance(answer, KeyError) else UsageError
    with pytest.raises(expected, match="mine" if isinstance(answer, KeyError) else "no token"):
        model.generate("春眠", constraint=Allowing(answer), max_new_tokens=NEW, ignore_eos=True, **SAMPLED)
    chunks += other
    assert [id for chunk in chunks for id in chunk.ids] == good.ids
    for fine in (None, [5], (5, 5), {5}, range(model.vocabulary_size), np.array([5])):
        model.generate("春眠", constraint=Allowing(fine), max_new_tokens=4, ignore_eos=True)
    assert len(model.generate("春眠", constraint=Allowing([]), max_new_tokens=4, ignore_eos=True)[0].ids) == 2


def test_what_is_no_prompt_and_no_token_is_refused(model: LanguageModel) -> None:
    V = model.network.vocab_size
    nothing: Any
    for nothing in (None, 5, 0.5, [None], [1.5], [[1, "a"]], [V], [2**31], [2**63], [-(2**70)], object()):
        with pytest.raises(UsageError):
            model.generate(nothing, max_new_tokens=2)
        with pytest.raises(UsageError):
            model.stream(nothing, max_new_tokens=2)
    for score in (model.logprobs, model.logits, model.prompt_logprobs, lambda ids: model.score(np.array([ids]))):
        for nothing in ([1.5], [float("nan")], ["1"], [None], [V], [-1], [2**63], [2**70], [1] * (CONTEXT + 2)):
            with pytest.raises(UsageError):
                score(nothing)
    for top in (-1, V + 1, 10**9, 1.5, None):
        with pytest.raises(UsageError, match="top must be"):
            model.prompt_logprobs([1, 2], top)  # type: ignore[arg-type]


def test_streams_may_be_dropped_anywhere(model: LanguageModel) -> None:
    """Closed by their reader or by another thread, forgotten, or never begun."""
    good = model.generate("春眠", max_new_tokens=5, ignore_eos=True)[0].ids
    chance = random.Random(3)
    for turn in range(40):
        stream = model.stream(TEXTS[:2], max_new_tokens=9, n=chance.choice([1, 3]), temperature=1.0)
        for _ in range(chance.randint(0, 12)):
            next(stream, None)
        if turn % 3 == 0:
            stream.close()  # type: ignore[attr-defined]
        elif turn % 3 == 1:
            closing = threading.Thread(target=stream.close)  # type: ignore[attr-defined]
            closing.start()
            closing.join()
        del stream
    gc.collect()
    assert model.generate("春眠", max_new_tokens=5, ignore_eos=True)[0].ids == good
    for kept in [*model.engine.kept]:
        model.engine.forget(kept)
    assert pages_in_use(model) == 0


def test_steps_as_a_gpu_records_them_write_the_same(tokenizer: Tokenizer) -> None:
    one, prompts = plain(tokenizer, "torch"), prompts_of(tokenizer)
    model = language_model(tokenizer, "torch", speculate=False)
    network: Any = model.network
    network.graphs = Graphs(network.model, network.pool, record=False)
    for _ in range(2):
        found = model.generate(prompts, max_new_tokens=NEW, ignore_eos=True)
        assert [completion.ids for completion in found] == [one(prompt).ids for prompt in prompts]
    assert set(network.graphs.steps) <= {1, 2, 4, 8, 16}


def test_guesses_are_what_followed_the_same_tokens() -> None:
    guesser = PromptLookup()
    assert guesser.guess([1, 2, 3, 4, 5], 8) == []
    assert guesser.guess([1, 2, 3, 4, 5, 1, 2, 3], 8) == [4, 5, 1, 2]
    guesser.learn(4, 4)
    assert guesser.guess([1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3], 3) == [4, 5, 1]
    for _ in range(20):
        guesser.learn(2, 0)
    ids = [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3]
    assert guesser.guess(ids, 8) == [], "who is always wrong pauses"
    assert any(guesser.guess(ids, 8) for _ in range(40)), "and tries again"


def test_what_cannot_be_is_refused(model: LanguageModel) -> None:
    size = model.network.vocab_size
    for prompt in ([size], [-1], [0] * (CONTEXT + 1), [0] * CONTEXT):
        with pytest.raises(HanmoError):
            model.generate([prompt])
    last = model.generate([[1] * (CONTEXT - 1)], max_new_tokens=9, ignore_eos=True)[0]
    assert len(last.ids) == 1 and last.finish_reason == "length"
