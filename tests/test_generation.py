"""The engine against transformers: same weights, float32, equal logits, equal greedy ids, equal seeded samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from hanmo.errors import DataError, ModelError, UsageError
from hanmo.inference import decoders, engine, networks
from hanmo.inference.language_model import Completion, LanguageModel
from hanmo.models.architectures import take_over
from hanmo.models.cache import KVCache
from hanmo.models.transformer import TransformerConfig, build
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.training import train_bpe

CONTEXT = 64
NEW = 12
BLOCK = 16
EN = [
    "Once upon a time",
    "The history of",
    "def main():",
    "In the year 1492",
    "Dear",
    "Water boils at",
    "She said",
    "To be",
]
EN_ENDS = [" a little girl", " the old man", " of China", "", " 100 degrees, and", "\n\n", " 'I am here'"]
ZH = ["从前有座山", "春眠不觉晓", "中国的首都", "床前明月光", "人工智能", "他说：“", "第１章", "今天天气"]
ZH_ENDS = ["", "，处处闻啼鸟。", "是北京", "里有座庙", "👩‍👩‍👧很好", "\n\n", " and English"]
PROMPTS = [a + b for a in EN for b in EN_ENDS] + [a + b for a in ZH for b in ZH_ENDS]

FAMILIES: dict[str, Callable[[int], PreTrainedModel]] = {
    "llama-gqa-llama3-rope": lambda vocabulary: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            max_position_embeddings=CONTEXT,
            rope_theta=500.0,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            tie_word_embeddings=False,
        )
    ),
    "qwen3-tied-wide-heads": lambda vocabulary: Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=24,
            intermediate_size=96,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
        )
    ),
    "llama-biases-linear-rope": lambda vocabulary: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=CONTEXT,
            rope_scaling={"rope_type": "linear", "factor": 2.0},
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
        )
    ),
}


@dataclasses.dataclass
class Pair:
    """The same weights in transformers and in our engine."""

    theirs: PreTrainedModel
    ours: LanguageModel

    def their_logits(self, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.theirs(torch.tensor([ids])).logits[0]

    def their_ids(self, prompt: list[int], **options: Any) -> tuple[list[int], torch.Tensor]:
        """What transformers generates (without an end token), and the raw logits of each step."""
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "top_k": 0, "eos_token_id": None, "pad_token_id": 1, "use_cache": True}
        result = self.theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            return_dict_in_generate=True,
            output_logits=True,
            **{**settings, "max_new_tokens": NEW, **options},
        )
        return result.sequences[0, len(prompt) :].tolist(), torch.cat(result.logits)


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(PROMPTS * 3, 400)


def make_pair(family: str, tokenizer: Tokenizer) -> Pair:
    """A random model whose logits are sharp, so that the most probable token is never a near-tie."""
    torch.manual_seed(20)
    theirs = FAMILIES[family](tokenizer.vocab_size).eval()
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
            else:
                parameter.normal_(0, 1.0 if "embed" in name or "lm_head" in name else 2 * parameter.size(1) ** -0.5)
    config = TransformerConfig.from_hf(theirs.config.to_dict())
    return Pair(theirs, LanguageModel(build(*take_over(config, dict(theirs.state_dict()))), tokenizer, name=family))


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Pair:
    return make_pair(request.param, tokenizer)


@pytest.fixture(scope="module")
def llama(tokenizer: Tokenizer) -> Pair:
    return make_pair("llama-gqa-llama3-rope", tokenizer)


@pytest.fixture
def model(llama: Pair) -> LanguageModel:
    return llama.ours


def random_ids(model: LanguageModel, length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, model.network.vocab_size, (length,), generator=generator).tolist()  # type: ignore[no-any-return]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within 1e-4 of the largest logit of each position."""
    scale = expected.abs().amax(dim=-1, keepdim=True)
    assert float(((actual - expected).abs() / scale).max()) < 1e-4


# Logits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, CONTEXT])
def test_logits_equal_transformers_with_and_without_cache_and_padding(pair: Pair, length: int) -> None:
    network, ids = pair.ours.model, random_ids(pair.ours, length)
    expected = pair.their_logits(ids)
    with torch.inference_mode():
        assert_close(network(torch.tensor([ids]))[0], expected)

        cache = KVCache(network.config, 1, length)
        pieces = [network(piece.unsqueeze(0), cache=cache)[0] for piece in torch.tensor(ids).split(BLOCK)]
        assert_close(torch.cat(pieces), expected)

        padding = 5
        padded = torch.tensor([[0] * padding + ids])
        positions = (torch.arange(padding + length) - padding).clamp(min=0).unsqueeze(0)
        mask = torch.arange(padding + length).unsqueeze(0) >= padding
        assert_close(network(padded, positions_BT=positions, mask_BS=mask)[0, padding:], expected)


# Greedy --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(pair: Pair) -> list[list[int]]:
    """The ids of transformers for all prompts, one prompt at a time; no step may be a near-tie."""
    ids, margins = [], []
    for prompt in PROMPTS:
        written, logits = pair.their_ids(pair.ours.encode_prompt(prompt))
        top = logits.topk(2, dim=1).values
        margins.append(float((top[:, 0] - top[:, 1]).min()))
        ids.append(written)
    assert min(margins) > 1e-4, "choose another seed: a near-tie would make the comparison a lottery"
    return ids


def test_greedy_ids_equal_transformers_whatever_the_batch(
    pair: Pair, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(PROMPTS) >= 100
    options = {"max_new_tokens": NEW, "ignore_eos": True}

    def ids(completions: list[Completion]) -> list[list[int]]:
        return [completion.ids for completion in completions]

    one_by_one = [pair.ours.generate(prompt, **options)[0].ids for prompt in PROMPTS]
    assert one_by_one == expected
    order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, len(order), 8):
        mixed = order[start : start + 8]
        assert ids(pair.ours.generate([PROMPTS[i] for i in mixed], **options)) == [expected[i] for i in mixed]
    monkeypatch.setattr(pair.ours.network, "piece", 24)
    assert ids(pair.ours.generate(PROMPTS, **options)) == expected


def test_greedy_ids_equal_those_without_a_cache(pair: Pair, expected: list[list[int]]) -> None:
    for prompt, written in list(zip(PROMPTS, expected, strict=True))[::10]:
        ids = pair.ours.encode_prompt(prompt)
        for id in written:
            with torch.inference_mode():
                assert int(pair.ours.model(torch.tensor([ids]), last_only=True).argmax()) == id
            ids.append(id)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, CONTEXT - 1])
def test_prompts_around_the_border_of_a_piece(llama: Pair, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.ours.network, "piece", BLOCK)
    ids = random_ids(llama.ours, length)
    completion = llama.ours.generate([ids], max_new_tokens=NEW, ignore_eos=True)[0]
    room = min(NEW, CONTEXT - length)
    assert completion.ids == llama.their_ids(ids, max_new_tokens=room)[0]
    assert completion.finish_reason == "length"
    assert completion.prompt_tokens == length


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
def test_greedy_with_processors_equals_transformers(llama: Pair, options: dict[str, Any]) -> None:
    prompts = PROMPTS[::9]
    together = llama.ours.generate(prompts, max_new_tokens=NEW, ignore_eos=True, **options)
    for prompt, completion in zip(prompts, together, strict=True):
        assert completion.ids == llama.their_ids(llama.ours.encode_prompt(prompt), **options)[0]


# Sampling ------------------------------------------------------------------------------------------------------------

SAMPLED = {"temperature": 3.0, "top_k": 40, "top_p": 0.95, "min_p": 0.01}


def test_a_seeded_sample_equals_transformers(llama: Pair) -> None:
    for seed, prompt in enumerate(PROMPTS[::12]):
        torch.manual_seed(seed)
        written, _ = llama.their_ids(llama.ours.encode_prompt(prompt), do_sample=True, **SAMPLED)
        ours = llama.ours.generate(prompt, max_new_tokens=NEW, ignore_eos=True, seed=seed, **SAMPLED)[0]
        assert ours.ids == written


def test_choices_differ_and_each_equals_a_request_of_its_own_seed(model: LanguageModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "ignore_eos": True, **SAMPLED}
    several = model.generate(PROMPTS[:3], n=4, seed=7, **options)
    assert [(c.index, c.choice) for c in several] == [(i, c) for i in range(3) for c in range(4)]
    for completion in several:
        alone = model.generate(PROMPTS[completion.index], seed=7 + completion.choice, **options)[0]
        assert completion.ids == alone.ids
    assert len({tuple(completion.ids) for completion in several}) == len(several)


def test_without_a_seed_every_call_draws_anew(model: LanguageModel) -> None:
    texts = {tuple(model.generate("春", max_new_tokens=NEW, ignore_eos=True, temperature=9.0)[0].ids) for _ in range(3)}
    assert len(texts) == 3


# Where a text ends ---------------------------------------------------------------------------------------------------


def with_ends(model: LanguageModel, *eos_ids: int) -> LanguageModel:
    return LanguageModel(model.model, model.tokenizer, eos_ids=eos_ids)


def test_any_of_several_end_tokens_ends_a_row_and_the_others_go_on(model: LanguageModel) -> None:
    free = model.generate(PROMPTS[:8], max_new_tokens=NEW, ignore_eos=True)
    ends = {free[0].ids[2], free[1].ids[6]}
    ending = with_ends(model, *ends)
    stopped = 0
    for before, after in zip(free, ending.generate(PROMPTS[:8], max_new_tokens=NEW), strict=True):
        first = next((place for place, id in enumerate(before.ids) if id in ending.eos_ids), None)
        assert after.ids == (before.ids if first is None else before.ids[: first + 1])  # the end token is kept in ids
        assert after.finish_reason == ("length" if first is None else "stop")
        assert after.text == model.tokenizer.decode(after.ids if first is None else after.ids[:-1])  # but has no text
        stopped += first is not None
    assert 2 <= stopped < 8
    ignoring = ending.generate(PROMPTS[:8], max_new_tokens=NEW, ignore_eos=True)
    assert [completion.ids for completion in ignoring] == [completion.ids for completion in free]


def test_a_stop_string_cuts_the_text_and_ends_the_row(model: LanguageModel) -> None:
    for prompt in PROMPTS[:6]:
        text = model.generate(prompt, max_new_tokens=NEW, ignore_eos=True)[0].text
        stop = text[len(text) // 2 :][:2]
        cut = model.generate(prompt, max_new_tokens=NEW, ignore_eos=True, stop=[stop, "never met"])[0]
        assert cut.text == text[: text.index(stop)]
        assert (cut.finish_reason, cut.stop_string) == ("stop", stop)
        assert len(cut.ids) <= NEW


def test_generation_ends_at_the_end_of_the_context(model: LanguageModel) -> None:
    prompts = [random_ids(model, length, seed=length) for length in (CONTEXT - 1, CONTEXT - 5, 3)]
    completions = model.generate(prompts, max_new_tokens=1000, ignore_eos=True)
    assert [len(completion.ids) for completion in completions] == [1, 5, CONTEXT - 3]
    assert {completion.finish_reason for completion in completions} == {"length"}


def test_a_row_for_which_every_token_is_forbidden_ends(model: LanguageModel) -> None:
    small = dataclasses.replace(model.model.config, vocab_size=8, max_position_embeddings=32)
    state = {name: t[:8] if "embed" in name or "lm_head" in name else t for name, t in model.model.state_dict().items()}
    tiny = LanguageModel(build(small, state), model.tokenizer)
    for temperature in (0.0, 1.0):
        options: dict[str, Any] = {"no_repeat_ngram_size": 1, "ignore_eos": True, "temperature": temperature, "seed": 0}
        long, short = tiny.generate([[4], [4, 5, 6]], max_new_tokens=20, **options)
        assert sorted([4, *long.ids]) == list(range(8)) == sorted([4, 5, 6, *short.ids])
        assert long.finish_reason == short.finish_reason == "stop"


def test_tokens_that_no_tokenizer_id_stands_for_are_never_written(llama: Pair, tokenizer: Tokenizer) -> None:
    network = llama.ours.model
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    extra = 50  # embeddings rounded up, as many exporters do
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat((state[name], 9 * state[name][:extra]))
    config = dataclasses.replace(network.config, vocab_size=network.config.vocab_size + extra)
    padded = LanguageModel(build(config, state), tokenizer)
    options: dict[str, Any] = {"max_new_tokens": NEW, "ignore_eos": True}
    assert [c.ids for c in padded.generate(PROMPTS[:8], **options)] == [
        c.ids for c in llama.ours.generate(PROMPTS[:8], **options)
    ]


# Streaming -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stop": ["e", "。"]}, {"n": 3, "temperature": 5.0, "seed": 1, "stop": ["a"]}])
def test_a_stream_adds_up_to_the_text_given_at_once(model: LanguageModel, options: dict[str, Any]) -> None:
    for prompt in PROMPTS[::8]:
        whole = model.generate(prompt, max_new_tokens=NEW, **options)
        chunks = list(model.stream(prompt, max_new_tokens=NEW, **options))
        for completion in whole:
            mine = [chunk for chunk in chunks if chunk.choice == completion.choice]
            assert "".join(chunk.text for chunk in mine) == completion.text
            assert [id for chunk in mine for id in chunk.ids] == completion.ids
            assert [chunk.finish_reason for chunk in mine[:-1]] == [None] * (len(mine) - 1)
            assert mine[-1].finish_reason == completion.finish_reason
            assert mine[-1].stop_string == completion.stop_string


def test_the_text_is_what_the_tokenizer_decodes(model: LanguageModel) -> None:
    for completion in model.generate(PROMPTS, max_new_tokens=NEW, ignore_eos=True):
        assert completion.text == model.tokenizer.decode(completion.ids)


def reads(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What the network will read: the numbers of tokens of the pieces of each step."""
    seen: list[list[int]] = []
    read = model.network.read
    monkeypatch.setattr(
        model.network, "read", lambda pieces: seen.append([len(piece.ids) for piece in pieces]) or read(pieces)
    )
    monkeypatch.setattr(model.engine, "new_guesser", None)
    return seen


def test_closing_a_stream_stops_the_work(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = reads(model, monkeypatch)
    stream = model.stream("春", max_new_tokens=NEW, ignore_eos=True)
    next(stream), next(stream)
    stream.close()
    assert [len(pieces) for pieces in seen] == [1, 1]
    assert not model.engine.rows
    assert not torch.is_inference_mode_enabled()  # nothing leaks to the caller between two chunks


def test_finished_rows_leave_and_waiting_ones_take_their_place(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = reads(model, monkeypatch)
    monkeypatch.setattr(engine, "MAX_ROWS", 2)
    prompts = [random_ids(model, length) for length in (CONTEXT - 6, CONTEXT - 4, CONTEXT - 2)]
    model.generate(prompts, max_new_tokens=10, ignore_eos=True)
    sizes = [len(pieces) for pieces in seen]
    assert sizes == [2] * 6  # 6, 4 and 2 tokens: the third joins when the second has finished
    assert seen[0] == [CONTEXT - 6, CONTEXT - 4]
    assert not model.engine.rows


def test_no_more_texts_are_written_at_once_than_there_is_memory_for(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [random_ids(model, length) for length in (5, 40, 6)]
    together = model.generate(prompts, max_new_tokens=3, n=2)
    seen = reads(model, monkeypatch)
    monkeypatch.setattr(decoders, "CACHE_BYTES", 1)
    alone = model.generate(prompts, max_new_tokens=3)
    assert all(len(pieces) == 1 for pieces in seen)
    assert [one.ids for one in alone] == [one.ids for one in together if one.choice == 0]


def test_streams_of_several_threads_do_not_disturb_each_other(model: LanguageModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "ignore_eos": True, "seed": 3, **SAMPLED}
    expected = [model.generate(prompt, **options)[0].ids for prompt in PROMPTS[:12]]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: [c.ids[0] for c in model.stream(prompt, **options)], PROMPTS[:12]))
    assert together == expected


def test_chat_goes_through_the_template_and_ends_with_the_turn(llama: Pair) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = train_bpe(PROMPTS * 3, 400, chat_template=template)
    model = LanguageModel(llama.ours.model, tokenizer, prompt_prefix=[0])
    messages = [{"role": "user", "content": "春眠 <|im_end|>"}]
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    ids = model.chat_ids(messages)
    assert (ids[0], ids.count(start), ids.count(end)) == (start, 2, 1)  # what the user wrote stays text; no prefix
    assert end in model.eos_ids
    answers = model.chat(messages, max_new_tokens=4, n=2, temperature=1.0, seed=0)
    assert [answer.prompt_tokens for answer in answers] == [len(ids)] * 2
    assert answers[0].ids == model.generate(ids, max_new_tokens=4, temperature=1.0, seed=0)[0].ids


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "what", "fix"),
    [
        (list(range(4, 4 + CONTEXT)), "the prompt has 64 tokens; this model's context holds 64", "1 tokens or more"),
        ("春眠不觉晓，处处闻啼鸟。" * 100, "this model's context holds 64", "shorten the prompt"),
        ([5, 10**6], "the id 1000000 at position 1 is outside the vocabulary", "ids are 0 to 399"),
        ([-1], "the id -1 at position 0 is outside the vocabulary", "ids are 0 to 399"),
        ("a\ud800", "character 1 of the text is a lone surrogate", "decode the source again"),
    ],
)
def test_a_bad_prompt_is_refused_before_any_work(model: LanguageModel, prompt: Any, what: str, fix: str) -> None:
    for call in (model.generate, model.stream):
        with pytest.raises((UsageError, DataError)) as caught:
            call(prompt)
        assert what in caught.value.what
        assert fix in caught.value.fix
        assert caught.value.zh


def test_what_is_no_prompt_is_refused(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="not NoneType"):
        model.generate([None])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="not NoneType"):
        model.stream(["a", None])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="unknown sampling option"):
        model.generate("a", max_tokens=3)
    assert model.generate([]) == []


def test_a_network_that_computes_nan_is_an_error_and_not_a_text(llama: Pair, tokenizer: Tokenizer) -> None:
    state = {name: tensor.clone() for name, tensor in llama.ours.model.state_dict().items()}
    state["model.norm.weight"].fill_(3e38)
    broken = LanguageModel(build(llama.ours.model.config, state), tokenizer, name="broken")
    with pytest.raises(ModelError, match=r"broken: the network computes NaN"):
        broken.generate("a", temperature=1.0)


# What a prompt begins with -------------------------------------------------------------------------------------------


def test_a_text_prompt_gets_the_prefix_and_ids_do_not(model: LanguageModel) -> None:
    text, ids = "春眠", model.tokenizer.encode("春眠")
    assert model.encode_prompt(text) == ids
    prefixed = LanguageModel(model.model, model.tokenizer, prompt_prefix=[0])
    assert prefixed.encode_prompt(text) == [0, *ids]
    assert prefixed.encode_prompt(ids) == ids
    assert prefixed.encode_prompt("") == [0] == model.encode_prompt("") == model.encode_prompt([])
    assert len(model.generate("", max_new_tokens=1)) == 1
    assert prefixed.generate(text, max_new_tokens=1)[0].prompt_tokens == len(ids) + 1


def test_ids_may_come_as_numpy(model: LanguageModel) -> None:
    ids = np.array(random_ids(model, 6))
    assert model.generate(ids, max_new_tokens=3)[0].ids == model.generate(ids.tolist(), max_new_tokens=3)[0].ids


# Scoring -------------------------------------------------------------------------------------------------------------


def test_logprobs_equal_transformers_and_begin_after_the_separator(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(pair.ours, 50)
    logits = pair.their_logits([0, *ids[:-1]])  # 0: the document separator
    expected = logits.log_softmax(dim=-1)[torch.arange(50), torch.tensor(ids)]
    assert_close(pair.ours.logprobs(ids), expected)
    monkeypatch.setattr(networks, "LOGIT_VALUES", 7 * pair.ours.network.vocab_size)  # seven positions at a time
    assert_close(pair.ours.logprobs(ids), expected)
    assert pair.ours.logprobs([]).shape == (0,)


def test_scores_of_right_padded_rows_do_not_depend_on_the_padding(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [random_ids(model, length, seed=length) for length in (5, 30, CONTEXT + 1)]
    padded = np.zeros((3, CONTEXT + 1), dtype=np.uint16)
    for row, ids in enumerate(rows):
        padded[row, : len(ids)] = ids
    scores = model.score(padded)
    assert scores.shape == (3, CONTEXT)
    assert scores.dtype == np.float64
    for row, ids in enumerate(rows):
        np.testing.assert_allclose(scores[row, : len(ids) - 1], model.score(np.array([ids]))[0], atol=1e-4)
    monkeypatch.setattr(networks, "SCORE_TOKENS", CONTEXT)
    monkeypatch.setattr(networks, "LOGIT_VALUES", 10 * model.network.vocab_size)
    np.testing.assert_allclose(model.score(padded), scores, atol=1e-4)


def test_without_a_separator_the_first_token_counts_as_one_of_all(llama: Pair) -> None:
    tokenizer = train_bpe(PROMPTS * 3, 400)
    tokenizer.bos_id = tokenizer.eos_id = None
    model = LanguageModel(llama.ours.model, tokenizer)
    ids = random_ids(model, 10)
    scores = model.logprobs(ids)
    assert float(scores[0]) == pytest.approx(-np.log(400))
    np.testing.assert_allclose(scores[1:], model.score(np.array([ids]))[0], atol=1e-5)
    with pytest.raises(UsageError, match="no token to start from"):
        model.generate("")


def test_bad_ids_are_refused_when_scoring(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="the id 400 at position 0 is outside"):
        model.logprobs([400])
    with pytest.raises(UsageError, match="the id -3 at position 1"):
        model.score(np.array([[5, -3, 6]]))
    with pytest.raises(UsageError, match="66 tokens are to be scored"):
        model.logprobs([5] * 66)
    with pytest.raises(UsageError, match="65 tokens are to be scored"):
        model.score(np.full((1, CONTEXT + 2), 5))
    with pytest.raises(UsageError, match="shape"):
        model.score(np.array([5, 6]))
    assert model.score(np.zeros((2, 1), dtype=np.int64)).shape == (2, 0)
