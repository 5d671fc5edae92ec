"""Instruction tuning: which tokens are learned under every kind of template, packing without leaks, and the loss."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanmo.data.tasks.types import Dialogue, Pair
from hanmo.errors import DataError, ModelError
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.text.chat import CHATML_TEMPLATE, render_chat
from hanmo.text.chat_targets import ChatTargets, completion_row, with_chat_tokens
from hanmo.text.report import SAMPLES
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.training import train_bpe, train_char
from hanmo.training.fit import FitSettings, Trainer
from hanmo.training.objectives.base import IGNORED, Share
from hanmo.training.objectives.instructions import (
    InstructionTuning,
    collate_rows,
    prepare_rows,
    widen,
)
from hanmo.training.optimizer import OptimizerSettings
from hanmo.training.schedule import Schedule

from .test_chat_template import EXTRA, TEMPLATES, with_template
from .test_chat_template import tokenizer as tokenizer_fixture

CPU = torch.device("cpu")
tokenizer = tokenizer_fixture  # a fixture; every control token of TEMPLATES is in its vocabulary

CHATS = {
    "en": [
        {"role": "user", "content": "What is 2 < 3?"},
        {"role": "assistant", "content": "True. Numbers grow."},
        {"role": "user", "content": "And 3 < 2?\n"},
        {"role": "assistant", "content": "False,\n\nof course"},
    ],
    "zh": [
        {"role": "system", "content": "你是诗人。"},
        {"role": "user", "content": "  写一句关于月亮的诗"},
        {"role": "assistant", "content": "举头望明月，低头思故乡。🌕"},
        {"role": "user", "content": "再来"},
        {"role": "assistant", "content": "海上生明月"},
        {"role": "user", "content": "谢谢"},
    ],
}
STOPS = {  # of each template, and what it puts before an answer that the prompt for one lacks
    "chatml": ("<|im_end|>", ""),
    "smollm": ("<|im_end|>", ""),
    "llama3": ("<|eot_id|>", ""),
    "qwen3": ("<|im_end|>", ""),
    "mistral": ("<|endoftext|>", " "),
    "gemma": ("<end_of_turn>", None),  # writes "assistant" otherwise than its prompts say it, below
    "phi": ("<|eot_id|>", ""),
    "plain": ("<|endoftext|>", ""),
}
MORE = {
    # Ends a conversation with EOS only where no answer is asked for, so a prefix of it is not a prefix of more.
    "phi": "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content + '<|eot_id|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% else %}{{ eos_token }}{% endif %}",
    # Words, where others have control tokens; only the end is one.
    "plain": "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' Answer: ' + m.content + eos_token }}"
    "{% else %}{{ 'Text: ' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %} Answer: {% endif %}",
}
ALL = {**TEMPLATES, **MORE}


def learned(tokenizer: Tokenizer, row: Any) -> list[str]:
    """The learned runs of a row as text."""
    runs: list[list[int]] = []
    before = False
    for index, trained in zip(row.ids, row.trained, strict=True):
        if trained and not before:
            runs.append([])
        if trained:
            runs[-1].append(index)
        before = trained
    return [tokenizer.decode(run, skip_special=False) for run in runs]


# Which tokens are learned --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", CHATS)
@pytest.mark.parametrize("name", STOPS)
def test_exactly_the_answers_and_their_stop_tokens_are_learned(tokenizer: Tokenizer, name: str, language: str) -> None:
    chat = CHATS[language]
    if name == "mistral":
        chat = chat[: 5 if language == "zh" else 4]
    targets = ChatTargets(with_template(tokenizer, ALL[name]))
    (row,) = targets.rows(chat)
    stop, lead = STOPS[name]
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    assert learned(tokenizer, row) == [f"{lead or ''}{answer}{stop}" for answer in answers]
    assert targets.stop_ids == {tokenizer.special_tokens[stop]}
    assert row.ids[-1] == tokenizer.special_tokens[stop] and row.trained[-1] and not row.trained[0]
    at = 0
    for index, message in enumerate(chat):  # in front of each answer stands what inference will be given
        if message["role"] == "assistant":
            prompt = render_chat(tokenizer, chat[:index])
            at = len(prompt)
            assert row.ids[:at] == prompt and row.trained[at] and not row.trained[at - 1]
    (last,) = targets.rows(chat, last_only=True)
    assert last.ids == row.ids and learned(tokenizer, last) == learned(tokenizer, row)[-1:]
    assert ChatTargets(tokenizer, last_only=True).rows(chat) == [last]


@pytest.mark.parametrize("name", ["chatml", "smollm", "llama3", "mistral", "phi"])
def test_the_ids_are_those_of_transformers(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    with_template(tokenizer, ALL[name]).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    (row,) = ChatTargets(tokenizer).rows(CHATS["en"])
    expected = theirs.apply_chat_template(CHATS["en"], return_dict=False)
    assert row.ids == expected[: len(row.ids)]
    rest = [tokenizer.decode([index], skip_special=False) for index in expected[len(row.ids) :]]
    assert rest in ([], ["\n"], ["\n", "<|endoftext|>"])  # after the last stop token nothing is left to learn


def test_a_template_that_cuts_thoughts_out_gives_each_answer_its_own_prompt(tokenizer: Tokenizer) -> None:
    chat = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n2"},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"},
        {"role": "user", "content": "3 + 3?"},
        {"role": "assistant", "content": "6"},
    ]
    targets = ChatTargets(with_template(tokenizer, TEMPLATES["qwen3"]))
    rows = targets.rows(chat)
    assert targets.rewritten == 1
    assert [learned(tokenizer, row) for row in rows] == [
        ["<think>\neasy\n</think>\n\n2<|im_end|>"],
        ["<think>\nhm\n</think>\n\n4<|im_end|>"],
        ["6<|im_end|>"],
    ]
    for row, turn in zip(rows, (1, 3, 5), strict=True):
        prompt = render_chat(tokenizer, chat[:turn])
        assert row.ids[: len(prompt)] == prompt and not any(row.trained[: len(prompt)])
    assert "easy" not in tokenizer.decode(rows[1].ids) and "hm" not in tokenizer.decode(rows[2].ids)
    plain = [*chat[:1], {"role": "assistant", "content": "2"}, *chat[2:]]  # now the second answer goes on in one row
    assert [len(learned(tokenizer, row)) for row in targets.rows(plain)] == [2, 1]


def test_the_notice_of_rewritten_turns(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    chat = (CHATS["en"][0], {"role": "assistant", "content": "<think>\na\n</think>\nb"}, *CHATS["en"][2:])
    targets = ChatTargets(with_template(tokenizer, TEMPLATES["qwen3"]))
    prepared = prepare_rows([Dialogue(chat, file="a", line=1)] * 2, targets, context=200)
    assert len(prepared) == 4
    assert "changes earlier turns of 2 conversations" in capsys.readouterr().err


def test_where_the_answer_would_melt_into_the_prompt_the_prompt_stays_as_in_use() -> None:
    """The last token of the prompt and the first of the answer are one token of the whole text."""
    words = ["ab ab abc abc abcabc Q: x A: abc\n\n\n\n"] * 30
    made = train_bpe(words, 300)
    made.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    chat = [{"role": "user", "content": "x a"}, {"role": "assistant", "content": "bc"}]
    (row,) = ChatTargets(made).rows(chat)
    assert row.ids == [*made.encode("x a"), *made.encode("bc"), made.eos_id]
    assert row.ids != [*made.encode("x abc"), made.eos_id]
    assert row.trained == [False] * len(made.encode("x a")) + [True] * (len(made.encode("bc")) + 1)


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "mistral", "gemma", "phi", "plain"])
@settings(max_examples=15, deadline=None)
@given(
    said=st.lists(
        st.lists(
            st.sampled_from([*EXTRA, "<|im_end|>", "<|im_start|>", "<|endoftext|>", "a", "月", "\n", " ", "|>", "<|"]),
            min_size=1,
            max_size=6,
        ).map("".join),
        min_size=4,
        max_size=4,
    )
)
def test_no_message_can_inject_a_control_token(tokenizer: Tokenizer, name: str, said: list[str]) -> None:
    if name == "qwen3":  # reads <think> and <tool_response> in messages, as markup of the model's own making
        said = [text.replace("think>", "t>").replace("tool_response>", "t>") for text in said]
    targets = ChatTargets(with_template(tokenizer, ALL[name]))
    roles = ("user", "assistant", "user", "assistant")
    harmless = [{"role": role, "content": "x"} for role in roles]
    chat = [{"role": role, "content": f"x{text}x"} for role, text in zip(roles, said, strict=True)]
    control = set(tokenizer.special_tokens.values())
    (row,), (expected,) = targets.rows(chat), targets.rows(harmless)
    for only in (False, True):
        found, wanted = (
            [index for index, trained in zip(r.ids, r.trained, strict=True) if index in control and trained >= only]
            for r in (row, expected)
        )
        assert found == wanted
    lead = " " if name == "mistral" else ""
    runs = [run.removesuffix(tokenizer.decode([row.ids[-1]], skip_special=False)) for run in learned(tokenizer, row)]
    assert runs == [f"{lead}{message['content']}" for message in chat[1::2]]


def test_private_characters_in_later_messages_change_nothing(tokenizer: Tokenizer) -> None:
    chat = [*CHATS["en"][:3], {"role": "assistant", "content": "\U0010fffd\U0010fffc\ue000 <|im_end|>"}]
    (row,) = ChatTargets(with_template(tokenizer, CHATML_TEMPLATE)).rows(chat)
    assert learned(tokenizer, row) == [
        "True. Numbers grow.<|im_end|>",
        "\U0010fffd\U0010fffc\ue000 <|im_end|><|im_end|>",
    ]
    assert row.ids.count(tokenizer.special_tokens["<|im_end|>"]) == 4


def test_answers_that_nothing_precedes_and_blank_ones_are_read_not_learned(tokenizer: Tokenizer) -> None:
    targets = ChatTargets(with_template(tokenizer, CHATML_TEMPLATE))
    greeting = {"role": "assistant", "content": "Hello!"}
    (row,) = targets.rows([greeting, *CHATS["en"]])
    assert learned(tokenizer, row) == ["True. Numbers grow.<|im_end|>", "False,\n\nof course<|im_end|>"]
    assert targets.rows([greeting]) == [] and targets.rows(CHATS["en"][:1]) == []
    (row,) = targets.rows([CHATS["en"][0], {"role": "assistant", "content": " \n"}, *CHATS["en"][2:]])
    assert learned(tokenizer, row) == ["False,\n\nof course<|im_end|>"]


NEVER_STOPS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
LEAVES_OUT = "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_end|>' }}{% endfor %}"
OTHER_PROMPT = CHATML_TEMPLATE.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NEVER_STOPS, "does not end an answer"),
        (LEAVES_OUT, "does not end an answer"),
        (OTHER_PROMPT, "in another way than the prompt"),
    ],
)
def test_templates_that_cannot_be_trained_on(tokenizer: Tokenizer, template: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        ChatTargets(with_template(tokenizer, template)).rows(CHATS["en"][:2])
    assert caught.value.zh and caught.value.fix


def test_models_without_a_template_get_that_of_chatml() -> None:
    ours = train_bpe(list(SAMPLES.values()), 400)
    same, added = with_chat_tokens(ours)  # its own tokenizers have the tokens
    assert same.chat_template == CHATML_TEMPLATE and added == [] and same.vocab_size == ours.vocab_size
    definition = json.loads(ours.to_json())
    definition["added_tokens"] = [entry for entry in definition["added_tokens"] if "im_" not in entry["content"]]
    vocabulary = definition["model"]["vocab"]
    for place, token in enumerate(("<|im_start|>", "<|im_end|>")):  # a foreign one: other tokens have these ids
        vocabulary[f"ĀĀ{place}"] = vocabulary.pop(token)
    foreign = Tokenizer.from_json(json.dumps(definition), eos_token="<|endoftext|>", pad_token="<|pad|>")
    wider, added = with_chat_tokens(foreign)
    assert added == ["<|im_start|>", "<|im_end|>"] and wider.vocab_size == foreign.vocab_size + 2
    assert (wider.eos_id, wider.pad_id, wider.bos_id) == (foreign.eos_id, foreign.pad_id, None)
    assert wider.encode("The <|im_end|>") == foreign.encode("The <|im_end|>")
    (row,) = ChatTargets(wider).rows(CHATS["zh"][:3])
    assert learned(wider, row) == ["举头望明月，低头思故乡。🌕<|im_end|>"] and row.ids[-1] == foreign.vocab_size + 1
    assert with_chat_tokens(wider) == (wider, [])


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_of_the_embedding_begin_as_the_mean(tied: bool) -> None:
    model = network("qk-norm", vocab_size=40, tied=tied)
    ids = torch.arange(12).view(1, 12)
    before, table = model(ids), model.output_weight.detach().clone()
    assert widen(model, 40) == 0 and widen(model, 42) == 2
    after = model(ids)
    assert after.shape == (1, 12, 42) and model.config.vocab_size == 42
    torch.testing.assert_close(after[..., :40], before)
    torch.testing.assert_close(model.output_weight[40:], table.mean(0).expand(2, -1))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in Transformer(model.config).parameters())
    model.loss(ids, ids + 30).backward()
    assert model.output_weight.grad is not None and model.output_weight.grad[41].abs().sum() > 0


def test_prompt_and_completion_without_a_template() -> None:
    made = train_bpe(["The moon is bright. "] * 5 + list(SAMPLES.values()), 500)
    row = completion_row(made, "The moon", " is bright")
    split = len(made.encode("The moon"))
    assert row.ids == [*made.encode("The moon"), *made.encode(" is bright"), made.eos_id]
    assert row.trained == [False] * split + [True] * (len(row.ids) - split)
    with_prefix = completion_row(made, "The moon", " is bright", prefix=[0])
    assert with_prefix.ids == [0, *row.ids] and with_prefix.trained == [False, *row.trained]
    prepared = prepare_rows([Pair("The moon", " is bright"), Pair("a", " \n", file="p", line=2)], made, context=30)
    (only,) = prepared
    assert only.inputs.tolist() == row.ids[:-1] and only.learned == len(made.encode(" is bright")) + 1
    assert prepared.dropped == 1 and prepared.reasons == ["p:2: there is no answer to learn"]
    with pytest.raises(ModelError, match="no EOS"):
        completion_row(Tokenizer.from_json(made.to_json()), "a", "b")
    with pytest.raises(DataError, match="needs a chat template") as caught:
        prepare_rows([Dialogue(tuple(CHATS["en"]), file="d", line=3)], made, context=99)
    assert caught.value.where == "d:3"


def test_a_prefix_space_is_not_put_inside_a_text() -> None:
    """SentencePiece puts a space before a text; the completion is not the beginning of one."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    library.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "</s>"]
    library.train_from_iterator(["hello world " * 4, "the moon"] * 9, trainers.BpeTrainer(special_tokens=special))
    made = Tokenizer.from_json(library.to_str(), eos_token="</s>")
    assert made.adds_prefix_space
    row = completion_row(made, "hello", " world")
    assert made.decode(row.ids) == "hello world" and row.ids[:-1] == made.encode("hello world")
    glued = completion_row(made, "hello", "world")
    assert made.decode(glued.ids) == "helloworld"


# Records to rows -----------------------------------------------------------------------------------------------------


def dialogues(count: int = 24, seed: int = 0) -> list[Dialogue]:
    generator = np.random.default_rng(seed)
    words = ("moon", "明月", "sun", "hello", "是", "4", "frost 霜")
    records = []
    for number in range(count):
        messages = []
        for turn in range(2 * int(generator.integers(1, 4))):
            text = " ".join(str(word) for word in generator.choice(words, generator.integers(1, 4)))
            messages.append({"role": ("user", "assistant")[turn % 2], "content": text})
        records.append(Dialogue(tuple(messages), file="d.jsonl", line=number + 1))
    return records


def small_tokenizer() -> Tokenizer:
    return train_char(["moon明月sunhello是4frost 霜assistantuser\nquestion"], chat_template=CHATML_TEMPLATE)


def test_what_is_too_long_is_refused_with_its_line_or_cut_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    made = small_tokenizer()
    short = (
        {"role": "user", "content": "sun"},
        {"role": "assistant", "content": "moon"},
    )
    room = len(ChatTargets(made).rows(short)[0].ids) - 1
    long_answer = (short[0], {"role": "assistant", "content": "moon moon moon"})
    long_question = ({"role": "user", "content": "sun " * 20}, short[1])
    records = [Dialogue(m, file="d", line=n) for n, m in enumerate((short, long_answer, long_question), 1)]
    with pytest.raises(DataError, match=f"context holds {room}") as caught:
        prepare_rows(records, ChatTargets(made), context=room)
    assert caught.value.where == "d:2" and "--truncate" in caught.value.fix
    prepared = prepare_rows(records, ChatTargets(made), context=room, truncate=True)
    assert [row.where for row in prepared] == ["d:1", "d:2"]
    assert (prepared.truncated, prepared.dropped) == (2, 1)
    assert prepared.reasons == ["d:3: no token of an answer fits into the context"]
    whole, cut = prepared
    stop = made.special_tokens["<|im_end|>"]
    assert whole.targets[-1] == stop and len(whole.inputs) == room
    assert stop not in cut.targets and made.decode([*cut.targets[cut.targets >= 0]]) == "moon "
    assert "2 records are longer" in capsys.readouterr().err


def test_bad_messages_are_named_with_their_line() -> None:
    targets = ChatTargets(small_tokenizer())
    for messages, place in (
        (({"role": "user", "content": "a"}, {"role": "bot", "content": "b"}), "d:7: messages[1]"),
        (({"role": "user", "content": 3},), "d:7: messages[0]"),
        ((), "d:7"),
    ):
        with pytest.raises(DataError) as caught:
            prepare_rows([Dialogue(messages, file="d", line=7)], targets, context=99)  # type: ignore[arg-type]
        assert caught.value.where == place
    alternating = train_bpe(list(SAMPLES.values()), 400, chat_template=TEMPLATES["mistral"])
    with pytest.raises(DataError, match="must alternate") as caught:
        prepare_rows(
            [Dialogue((*CHATS["en"][:1], *CHATS["en"][2:]), file="d", line=9)],
            ChatTargets(alternating),
            context=99,
        )
    assert caught.value.where == "d:9"


def test_pairs_are_questions_and_answers_for_a_model_with_a_template() -> None:
    targets = ChatTargets(small_tokenizer())
    said = ({"role": "user", "content": "sun"}, {"role": "assistant", "content": "明月"})
    (one,), (two,) = (
        prepare_rows([record], targets, context=50) for record in (Pair("sun", "明月"), Dialogue(said, file="x"))
    )
    assert one.inputs.tolist() == two.inputs.tolist() and one.targets.tolist() == two.targets.tolist()


# The objective -------------------------------------------------------------------------------------------------------

NETWORKS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "learned": {"positions": "learned", "norm": "layer", "norm_bias": True, "gated": False, "activation": "gelu_tanh",
                "attention_bias": True, "output_bias": True, "mlp_bias": True, "model_type": "gpt2"},
    "sliding": {"sliding_window": 7, "sliding_layers": (True, False), "model_type": "gemma3_text"},
    "qk-norm": {"qk_norm": True, "model_type": "qwen3"},
    "softcap": {"attention_softcap": 5.0, "logit_softcap": 3.0, "norm_placement": "sandwich"},
}  # fmt: skip


def network(name: str = "qk-norm", *, vocab_size: int = 0, tied: bool = True, dropout: float = 0.0) -> Transformer:
    size = vocab_size or small_tokenizer().vocab_size
    kv_heads = 4 if name == "learned" else 2
    config = TransformerConfig(
        size, 32, 2, 4, kv_heads, 8, 48, 200, tie_embeddings=tied, dropout=dropout, **NETWORKS[name]
    )
    model = Transformer(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() < 2))
    return model


def objective(micro_batch: int, *, packed: bool = True, count: int = 24, batch_size: int = 3) -> InstructionTuning:
    targets = ChatTargets(small_tokenizer())
    train, validation = (prepare_rows(dialogues(n, s), targets, context=150) for n, s in ((count, 1), (9, 2)))
    return InstructionTuning(
        train, validation, context=150, batch_size=batch_size, micro_batch=micro_batch, seed=3, packed=packed
    )


def token_losses(model: Transformer, ids: Any, targets: Any, segments: Any = None) -> torch.Tensor:
    return -model.target_logprobs(ids, targets, segments_BT=segments)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_packed_and_unpacked_conversations_have_the_same_loss_token_for_token(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = network(name).to(dtype)
    goal = objective(3)
    assert goal.packing.waste < 0.1 and len(goal.train) < 12
    total = 0.0
    for batch in goal.micro_batches(0):
        assert batch.segments is not None and batch.segments.max() > 2
        packed = token_losses(model, batch.ids, batch.targets, batch.segments)
        for row, losses in enumerate(packed):
            for number in range(1, int(batch.segments[row].max()) + 1):
                places = (batch.segments[row] == number).nonzero().flatten()
                alone = token_losses(model, batch.ids[row, places][None], batch.targets[row, places][None])[0]
                torch.testing.assert_close(losses[places], alone, rtol=tolerance, atol=10 * tolerance)
        loss = goal.loss(model, batch)
        torch.testing.assert_close(loss, packed.sum(), rtol=tolerance, atol=0)
        total += float(loss.detach())
    assert total > 1


def test_packed_and_unpacked_objectives_agree_on_a_whole_pass(tmp_path: Path) -> None:
    """Over all conversations: the same tokens count, and the same loss is measured."""
    model = network().double()
    found = [
        Trainer(model, objective(2, packed=packed), FitSettings(OptimizerSettings()), tmp_path, device=CPU).validate()
        for packed in (True, False)
    ]
    assert math.isclose(found[0]["loss"], found[1]["loss"], rel_tol=1e-6)  # logits are float32
    assert found[0]["accuracy"] == found[1]["accuracy"]
    packed, unpacked = objective(2, batch_size=99), objective(2, packed=False, batch_size=99)
    assert packed.step_weight(0) == unpacked.step_weight(0) > 0
    assert packed.tokens_in(0) == unpacked.tokens_in(0)


def test_the_loss_is_that_of_transformers_with_masked_labels() -> None:
    transformers = pytest.importorskip("transformers")
    made = small_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=made.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=200, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = Transformer(TransformerConfig(made.vocab_size, 32, 2, 4, 2, 8, 48, 200))
    state = {name.removeprefix("_"): value for name, value in theirs.state_dict().items() if name != "lm_head.weight"}
    ours.load_state_dict(state)
    targets = ChatTargets(made)
    records = dialogues(6, 5)
    total, count = 0.0, 0
    for record in records:
        (row,) = targets.rows(record.messages)
        labels = torch.tensor([row.ids]).where(torch.tensor([row.trained]), -100)
        counted = int((labels[:, 1:] >= 0).sum())
        total += float(theirs(torch.tensor([row.ids]), labels=labels).loss) * counted
        count += counted
    rows = prepare_rows(records, targets, context=200)
    goal = InstructionTuning(rows, rows, context=200, batch_size=9, micro_batch=9, seed=0)
    (batch,) = goal.micro_batches(0)
    assert batch.weight == count
    assert math.isclose(float(goal.loss(ours, batch)), total, rel_tol=1e-5)


def test_measures_are_the_loss_and_the_share_of_right_tokens() -> None:
    model, goal = network(), objective(3)
    for batch in goal.validation_batches():
        measures = goal.measure(model, batch)
        counted = batch.targets >= 0
        guesses = model(batch.ids, segments_BT=batch.segments).argmax(-1)
        assert measures["accuracy"] == (float((guesses == batch.targets)[counted].sum()), batch.weight)
        assert math.isclose(measures["loss"][0], float(goal.loss(model, batch)), rel_tol=1e-5)
        assert batch.weight == counted.sum()


def gradient(goal: InstructionTuning) -> torch.Tensor:
    model = network().double().train()
    for batch in goal.micro_batches(4):
        (goal.loss(model, batch) / goal.step_weight(4)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("packed", [True, False])
def test_any_micro_batch_gives_the_same_gradient(packed: bool) -> None:
    whole = gradient(objective(99, packed=packed, batch_size=5))
    assert whole.norm() > 0.01
    for micro_batch in (1, 2):
        parts = gradient(objective(micro_batch, packed=packed, batch_size=5))
        assert float((whole - parts).norm() / whole.norm()) < 1e-5


def test_batches_are_a_function_of_seed_and_step_and_processes_divide_them() -> None:
    a, b = objective(1), objective(1)
    for step in (0, 5, 2):
        first, second = list(a.micro_batches(step)), list(b.micro_batches(step))
        parts = [list(a.micro_batches(step, Share(rank, 2))) for rank in range(2)]
        for number, (left, right) in enumerate(zip(first, second, strict=True)):
            assert torch.equal(left.ids, right.ids) and torch.equal(left.targets, right.targets)
            assert torch.equal(left.ids, parts[number % 2][number // 2].ids)
        assert sum(batch.weight for batch in first) == a.step_weight(step)
    assert a.origin(0).startswith("d.jsonl:")
    assert not torch.equal(next(a.micro_batches(0)).ids, next(a.micro_batches(1)).ids)


def test_a_row_of_one_text_without_padding_needs_no_segments() -> None:
    rows = prepare_rows(dialogues(3), ChatTargets(small_tokenizer()), context=150)
    assert collate_rows([[rows[0]]]).segments is None
    two = collate_rows([[rows[0], rows[1]], [rows[2]]])
    assert two.segments is not None and two.segments[0].max() == 2 and two.weight == sum(row.learned for row in rows)
    assert (two.targets[two.segments == 0] == IGNORED).all()
    ends = len(rows[0].inputs)
    assert two.targets[0, ends - 1] == small_tokenizer().special_tokens["<|im_end|>"]  # not the next text's first token
    with pytest.raises(DataError, match="context holds 5") as caught:
        InstructionTuning(rows, rows, context=5, batch_size=1, micro_batch=1, seed=0)
    assert caught.value.where.startswith("d.jsonl:")


def fit_settings(steps: int) -> FitSettings:
    optimizer = OptimizerSettings(0.01, 0.01, 0.01, muon=False)
    return FitSettings(optimizer, max_steps=steps, schedule=Schedule(), seed=1, evaluations=2, checkpoint_every=3)


def test_stop_and_resume_equal_one_run_bit_for_bit(tmp_path: Path) -> None:
    def start(folder: str, *, resume: bool = False) -> Trainer[Any]:
        return Trainer(
            network(dropout=0.1), objective(2), fit_settings(7), tmp_path / folder, device=CPU, resume=resume
        )

    whole, parts = start("whole"), start("parts")
    result = whole.fit()
    original = parts.step

    def killed(done: float) -> float:
        if parts.state.step == 5:  # two steps after a checkpoint
            raise KeyboardInterrupt
        return original(done)

    parts.step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        parts.fit()
    again = start("parts", resume=True)
    assert again.fit().validation_loss == result.validation_loss
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def test_a_network_learns_to_answer_and_to_stop(tmp_path: Path) -> None:
    from hanmo.inference.language_model import LanguageModel

    made = small_tokenizer()
    answers = {"sun": "moon", "moon": "sun", "明": "月", "hello": "hello 4"}
    records = [
        Dialogue(({"role": "user", "content": q}, {"role": "assistant", "content": a}), file="x", line=1)
        for q, a in answers.items()
    ]
    rows = prepare_rows(records * 2, ChatTargets(made), context=60)
    goal = InstructionTuning(rows, rows, context=60, batch_size=4, micro_batch=4, seed=0)
    model = Transformer(replace(network().config))
    model.initialize(0)
    result = Trainer(model, goal, fit_settings(60), tmp_path, device=CPU).fit()
    assert result.measures["accuracy"] == 1 and result.measures["loss"] < 0.05
    engine = LanguageModel(model.eval(), made)
    for question, answer in answers.items():
        (reply,) = engine.chat([{"role": "user", "content": question}], temperature=0, max_new_tokens=20)
        assert (reply.text, reply.finish_reason) == (answer, "stop")
