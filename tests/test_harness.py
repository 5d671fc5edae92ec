"""The lm-evaluation-harness: what its own model ``hf`` answers is what Hanmo's model and Hanmo's server answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="pip install 'hanmo[harness]'")
transformers = pytest.importorskip("transformers")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model, model_registry  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI  # noqa: E402

from hanmo.errors import DataError, HanmoError, ModelError, UsageError  # noqa: E402
from hanmo.evaluation import harness, harness_name  # noqa: E402
from hanmo.evaluation.continuations import score_continuations  # noqa: E402
from hanmo.evaluation.harness import HanmoLM  # noqa: E402
from hanmo.inference.loading import load  # noqa: E402
from hanmo.models.checkpoints.ngram import save_ngram  # noqa: E402
from hanmo.models.checkpoints.recurrent import save_recurrent  # noqa: E402
from hanmo.models.ngram import NGramModel  # noqa: E402
from hanmo.models.recurrent import RecurrentConfig, RecurrentModel  # noqa: E402
from hanmo.text.chat import CHATML_TEMPLATE  # noqa: E402
from hanmo.text.tokenizer import Tokenizer  # noqa: E402
from hanmo.text.training import train_bpe  # noqa: E402

from .serving_fakes import running_server  # noqa: E402

ROOT = Path(__file__).parents[1]
CONTEXT = 160
CHINESE = ["床前明月光，疑是地上霜。举头望明月，低头思故乡。", "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"]
ENGLISH = ["The quick brown fox jumps over the lazy dog. ", "What is the capital of France? It is Paris. 🌸"]
SHOTS = "Question: which city? Answer: Paris\n问题：哪座城市？回答：北京\n"
SHAPE: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LENGTHS = {"max_position_embeddings": CONTEXT, "initializer_range": 0.15}


def trained() -> Tokenizer:
    return train_bpe((CHINESE + ENGLISH) * 6, 450, chat_template=CHATML_TEMPLATE)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama; nothing stands before its texts."""
    folder, tokenizer = tmp_path_factory.mktemp("llama"), trained()
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, **SHAPE, **LENGTHS, num_key_value_heads=2, bos_token_id=None, eos_token_id=0
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random GPT-2 whose tokenizer puts BOS before every text; its vocabulary is padded with rows of zeros."""
    folder, tokenizer = tmp_path_factory.mktemp("gpt2"), trained()
    definition = json.loads(tokenizer.to_json())
    start = {"id": "<|im_start|>", "ids": [2], "tokens": ["<|im_start|>"]}
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": start},
    }
    text = json.dumps(definition, ensure_ascii=False)
    Tokenizer.from_json(text, bos_token="<|im_start|>", eos_token="<|endoftext|>").save(folder)
    torch.manual_seed(2)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.vocab_size + 7,
        n_positions=CONTEXT,
        n_embd=48,
        n_layer=2,
        n_head=4,
        initializer_range=0.15,
        bos_token_id=2,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.transformer.wte.weight.data[tokenizer.vocab_size :] = 0
    model.save_pretrained(folder)
    return folder


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, place) for place, given in enumerate(arguments)]


def choices() -> list[tuple[str, str]]:
    """Choices in two languages: shared contexts, shared beginnings, empty contexts, texts longer than the context."""
    pairs = []
    for text in CHINESE + ENGLISH:
        half = len(text) // 2
        for context in (text[:half], SHOTS + text[:half], text * 9, ""):
            pairs += [(context, text[half:]), (context, " a cat"), (context, "，不是"), (context, "a")]
    return [
        *pairs,
        ("a context that ends with spaces  ", "and a word"),
        ("<|im_start|>user\n你好<|im_end|>\n", "你好！<|im_end|>"),
        ("", "<|endoftext|>the separator first"),
        ("", "<|im_start|>BOS first"),
    ]


def documents() -> list[tuple[str]]:
    return [("",), ("短。",), *((text * times,) for times in (1, 15) for text in CHINESE + ENGLISH)]


def contexts() -> list[tuple[str, dict[str, Any]]]:
    greedy: dict[str, Any] = {"until": ["。", "\n\n"], "max_gen_toks": 20, "do_sample": False}
    ended: dict[str, Any] = {"until": "<|im_end|>", "max_gen_toks": 30, "temperature": 0.0, "num_beams": 1}
    texts = [text * times for text in CHINESE + ENGLISH for times in (1, 10)]
    return [(text, options) for text in texts for options in (greedy, ended)]


def near(found: list[Any], expected: list[Any]) -> bool:
    """Log-likelihoods equal within 1e-4, and the same about what is greedy.

    ``hf`` adds up in single precision, where numbers beyond 500 nats lie 6e-5 apart: so much more is allowed to them.
    """
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        (value, greedy), (other, also) = (each if isinstance(each, tuple) else (each, None) for each in (ours, theirs))
        assert greedy == also
        assert abs(value - other) < 1e-4 + (2**-23 * abs(other) if abs(other) > 500 else 0), (value, other)
    return True


def ask(lm: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """All that a task can ask."""
    return (
        lm.loglikelihood(instances("loglikelihood", choices()), disable_tqdm=True),
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", documents()), disable_tqdm=True),
        lm.generate_until(instances("generate_until", contexts()), disable_tqdm=True),
    )


@pytest.fixture(scope="session")
def expected(llama: Path, gpt2: Path) -> dict[str, tuple[list[Any], list[Any], list[Any]]]:
    """The answers of ``hf``."""
    folders = {"llama": llama, "gpt2": gpt2}
    return {
        name: ask(HFLM(str(folder), device="cpu", dtype="float32", batch_size=4)) for name, folder in folders.items()
    }


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_answers_are_those_of_hf(
    name: str, engine: str, request: pytest.FixtureRequest, expected: dict[str, Any]
) -> None:
    lm = HanmoLM(str(request.getfixturevalue(name)), dtype="fp32", batch=5, engine=engine, device="cpu")
    likelihoods, rolling, texts = ask(lm)
    assert near(likelihoods, expected[name][0])
    assert near(rolling, expected[name][1])
    assert texts == expected[name][2]


def test_what_is_greedy_is_said(llama: Path) -> None:
    """Of three tokens that the model would write, and of those with the last one changed."""
    theirs, ours = HFLM(str(llama), device="cpu", dtype="float32"), HanmoLM(str(llama), device="cpu")
    prompts = [ours.tok_encode(text) for text in CHINESE + ENGLISH]
    written = [ours.model.generate([ids], max_new_tokens=3, ignore_eos=True)[0].ids for ids in prompts]
    asked = [(None, ids, more) for ids, more in zip(prompts, written, strict=True)]
    asked += [(None, ids, [*more[:2], (more[2] + 1) % 400]) for _, ids, more in asked]
    found = ours._loglikelihood_tokens(asked, disable_tqdm=True)
    assert near(found, theirs._loglikelihood_tokens(asked, disable_tqdm=True))
    assert [greedy for _, greedy in found] == [True] * 4 + [False] * 4


def test_options_change_what_hf_changes(gpt2: Path) -> None:
    """BOS off, another prefix, a shorter context: as for ``hf``."""
    options: dict[str, Any] = {"add_bos_token": False, "prefix_token_id": 3, "max_length": 40}
    theirs = HFLM(str(gpt2), device="cpu", dtype="float32", **options)
    ours = HanmoLM(str(gpt2), device="cpu", **options)
    asked = instances("loglikelihood", choices())
    assert near(ours.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True))
    asked = instances("loglikelihood_rolling", documents())
    assert near(ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked))


def test_batches_and_shared_beginnings_change_nothing(llama: Path) -> None:
    model = load(llama, device="cpu", engine="native")
    ids = model.tokenizer.encode
    shots = ids(SHOTS)
    pairs = [(shots + ids(text[:5]), ids(end)) for text in CHINESE + ENGLISH for end in (text[5:20], "a", " the dog")]
    pairs += [(ids(text), ids("a")) for text in CHINESE] + [([1], [])]
    alone = [next(iter(score_continuations(model, [pair]))).logprob for pair in pairs]
    for batch in (1, 3, 64):
        found = {score.place: score.logprob for score in score_continuations(model, pairs, batch=batch)}
        assert [found[place] for place in range(len(pairs))] == pytest.approx(alone, abs=1e-5)
    together = model.choice_logprobs(pairs[0][0], [pairs[0][1], pairs[1][1]])
    assert [float(each.sum()) for each in together] == pytest.approx(alone[:2], abs=1e-5)
    pages = model.network.pages
    assert not model.engine.busy and len(pages.free) == model.network.cache.pages
    with pytest.raises(DataError, match="continuation 0 has 200 tokens"):
        list(score_continuations(model, [([1], [1] * 200)]))
    with pytest.raises(UsageError, match="outside the vocabulary"):
        list(score_continuations(model, [([1], [10_000])]))


def test_every_kind_of_language_model(tmp_path: Path) -> None:
    """Recurrent and n-gram models, of which ``hf`` knows nothing: the tokens' own log-probabilities, added up."""
    tokenizer = trained()
    torch.manual_seed(3)
    network = RecurrentModel(RecurrentConfig("lstm", tokenizer.vocab_size, 24, 24, 2))
    save_recurrent(tmp_path / "lstm", network, tokenizer, {"kind": "model"})
    documents = [[*tokenizer.encode(text), 0] for text in CHINESE + ENGLISH]
    ngram = NGramModel.train(documents, 3, tokenizer.vocab_size, bos_id=0, eos_id=0)
    save_ngram(tmp_path / "ngram", ngram, tokenizer, {"kind": "model"})
    for name in ("lstm", "ngram"):
        lm = HanmoLM(str(tmp_path / name), device="cpu", batch=3, max_length=100)
        pairs = [(SHOTS + text[:half], text[half : half + 9]) for text in CHINESE + ENGLISH for half in (5, 11)]
        answers = lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
        for pair, (value, _) in zip(pairs, answers, strict=True):
            context, continuation = lm._encode_pair(*pair)
            scores = lm.model.score(np.array([[*context, *continuation]]))[0]
            assert value == pytest.approx(scores[-len(continuation) :].sum(), abs=1e-4)
        assert lm.generate_until(instances("generate_until", [("春眠", {"until": [], "max_gen_toks": 5})]))


# The command line ----------------------------------------------------------------------------------------------------

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task over local data."""
    rows = [{"context": text[:8], "choices": [text[8:20], " a cat", "，不是"]} for text in CHINESE + ENGLISH]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TASK.replace("DATA", str(data)), encoding="utf-8")
    return folder


def test_the_command_knows_the_model(llama: Path, tasks: Path, tmp_path: Path) -> None:
    """``lm_eval --model hanmo``, as it is after an installation: the line of ``hanmo_lm_eval.pth`` is read."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "hanmo_lm_eval.pth").write_bytes((ROOT / "hanmo_lm_eval.pth").read_bytes())
    (site / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(site)!r})\n")
    paths = [str(site), str(ROOT / "src")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(tmp_path / "cache")}
    command = [str(Path(sys.executable).with_name("lm_eval")), "--model", "hanmo", "--tasks", "tiny_choice"]
    command += ["--model_args", f"pretrained={llama},dtype=fp32,batch=8", "--include_path", str(tasks)]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hanmo (" in done.stdout and "tiny_choice" in done.stdout
    (samples,) = (tmp_path / "out").rglob("samples_tiny_choice*.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["doc_id"])
    asked = [tuple(each.values()) for row in rows for each in row["arguments"].values()]
    answers = HFLM(str(llama), device="cpu", dtype="float32").loglikelihood(
        instances("loglikelihood", asked), disable_tqdm=True
    )
    found = [(float(each[0][0]), str(each[0][1]) == "True") for row in rows for each in row["resps"]]
    assert near(found, answers)


def test_registration_is_lazy_and_names_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'[project.entry-points."lm_eval.models"]\nhanmo = "{harness_name.TARGET}"' in declared
    assert f"{HanmoLM.__module__}:{HanmoLM.__name__}" == harness_name.TARGET
    assert get_model("hanmo") is HanmoLM
    monkeypatch.delitem(model_registry._objs, "hanmo")
    harness_name.register()
    harness_name.register()
    assert model_registry._objs["hanmo"] == harness_name.TARGET and "hf" in model_registry
    assert get_model("hanmo") is HanmoLM


def test_the_module_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``python -m hanmo.evaluation.harness``: errors of ours without a traceback, with their exit code."""

    def command() -> None:
        HanmoLM(pretrained="nowhere/at-all")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", command)
    with pytest.raises(SystemExit) as caught:
        harness.main()
    assert caught.value.code == ModelError.exit_code
    assert "hanmo: there is no model 'nowhere/at-all'" in capsys.readouterr().err


def test_the_line_of_the_installation_does_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs at every start of Python: only the harness's command is told."""
    line = (ROOT / "hanmo_lm_eval.pth").read_text()
    assert line.startswith("import sys; ") and line.count("\n") == 1  # other lines would be taken for paths
    calls: list[str] = []
    monkeypatch.setattr(harness_name, "register", lambda: calls.append("called"))
    for given, times in (
        (["python", "/usr/bin/lm_eval", "--model", "hf"], 1),
        (["python", r"C:\Scripts\lm-eval.exe", "run"], 1),
        (["python", "-m", "lm_eval"], 1),
        (["python", "-m", "pip", "install", "lm_eval"], 0),
        (["python"], 0),
    ):
        calls.clear()
        monkeypatch.setattr(sys, "orig_argv", given)
        exec(line, {})
        assert len(calls) == times, given


# Generation and templates --------------------------------------------------------------------------------------------


def test_sampling_is_reproducible_and_repeats_differ(llama: Path) -> None:
    lm = HanmoLM(str(llama), device="cpu", seed=7)
    options = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_gen_toks": 12, "until": []}
    asked = instances("generate_until", [("春眠", options)] * 3)
    first, again = lm.generate_until(asked, disable_tqdm=True), lm.generate_until(asked, disable_tqdm=True)
    assert first == again and len(set(first)) == 3
    assert HanmoLM(str(llama), device="cpu", seed=70).generate_until(asked, disable_tqdm=True) != first


def test_more_stop_strings_than_the_engine_takes(llama: Path) -> None:
    lm = HanmoLM(str(llama), device="cpu")
    free = lm.generate_until(instances("generate_until", [("The", {"max_gen_toks": 30, "until": []})]))[0]
    last = free[len(free) // 2]
    until = [f"no such text {number}" for number in range(20)] + ["x" * 100, last]
    cut = lm.generate_until(instances("generate_until", [("The", {"max_gen_toks": 30, "until": until})]))[0]
    assert len(free) > 4 and cut == free.split(last)[0]


def test_chat_templates_are_those_of_hf(llama: Path) -> None:
    theirs, ours = HFLM(str(llama), device="cpu"), HanmoLM(str(llama), device="cpu")
    talk = [{"role": "system", "content": "答得简短。"}, {"role": "user", "content": " 你好 <|im_end|> {{ x }} "}]
    for history, prompt in ((talk, True), ([*talk, {"role": "assistant", "content": "The answer is "}], False)):
        assert ours.apply_chat_template(history, prompt) == theirs.apply_chat_template(history, prompt)
        rendered = ours.apply_chat_template(history, prompt)
        assert ours.tok_encode(rendered) == theirs.tok_encode(rendered)
    assert ours.chat_template(True) == theirs.chat_template(True) == CHATML_TEMPLATE
    assert "hanmo" in ours.tokenizer_name and ours.get_model_info()["model_engine"]


def test_answers_reach_the_cache(llama: Path) -> None:
    class Hook:
        def __init__(self) -> None:
            self.kept: list[tuple[str, Any, Any]] = []

        def add_partial(self, kind: str, asked: Any, answer: Any) -> None:
            self.kept.append((kind, asked, answer))

    lm = HanmoLM(str(llama), device="cpu")
    hook = Hook()
    lm.set_cache_hook(hook)
    pairs = choices()[:3]
    answers = lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    total = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(CHINESE[0] * 15,)]), disable_tqdm=True)
    text = lm.generate_until(instances("generate_until", contexts()[:1]), disable_tqdm=True)
    assert sorted(hook.kept[:3], key=str) == sorted(
        [("loglikelihood", pair, answer) for pair, answer in zip(pairs, answers, strict=True)], key=str
    )
    assert [(kind, answer) for kind, _, answer in hook.kept[3:]] == [
        ("loglikelihood_rolling", total[0]),
        ("generate_until", text[0]),
    ]


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "no model is named"),
        ({"pretrained": "nowhere/at-all"}, "there is no model"),
        ({"batchsize": 4}, "no model argument 'batchsize'"),
        ({"dtype": "bf16"}, "no dtype 'bf16'"),
        ({"engine": "fast"}, "no engine 'fast'"),
        ({"batch": "many"}, "batch is a whole number"),
        ({"max_length": 1}, "max_length is a whole number from 2"),
        ({"prefix_token_id": 9999}, "there is no token 9999"),
        ({"pretrained": "openai:gpt@http://127.0.0.1:1"}, "remote model gives no likelihoods"),
    ],
)
def test_bad_arguments_are_named(llama: Path, given: dict[str, Any], message: str) -> None:
    arguments = {"device": "cpu", **({"pretrained": str(llama)} if given else {}), **given}
    with pytest.raises(HanmoError, match=message) as caught:
        HanmoLM.create_from_arg_obj(arguments).loglikelihood(instances("loglikelihood", [("", "a")]))
    assert caught.value.fix and caught.value.zh


def test_a_model_without_likelihoods_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=400, **SHAPE, max_position_embeddings=32)
    transformers.BertModel(config).save_pretrained(tmp_path)
    train_bpe(CHINESE * 2, 300).save(tmp_path)
    with pytest.raises(ModelError, match="gives no likelihood of a text"):
        HanmoLM(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_gen_toks": 500}, "500 tokens are to be written"),
        ({"num_beams": 4}, "option 'num_beams=4' is not known"),
        ({"temprature": 1}, "did you mean 'temperature'"),
    ],
)
def test_bad_generation_options_are_named(llama: Path, options: dict[str, Any], message: str) -> None:
    lm = HanmoLM(str(llama), device="cpu")
    with pytest.raises(UsageError) as caught:
        lm.generate_until(
            instances("generate_until", [("a", {"until": [], "max_gen_toks": 9, **options})]), disable_tqdm=True
        )
    assert message in str(caught.value)


# Over HTTP -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(llama: Path) -> Iterator[str]:
    with running_server(load(llama, device="cpu", precision="fp32"), "tiny") as address:
        yield address


@pytest.mark.parametrize("backend", ["remote", "huggingface"])
def test_the_server_answers_as_hf(llama: Path, address: str, backend: str) -> None:
    """The client keeps two tokens of the context for itself; ``hf`` is told so."""
    options: dict[str, Any] = {"tokenizer_backend": backend, "max_length": CONTEXT, "batch_size": 7}
    if backend == "huggingface":
        options["tokenizer"] = str(llama)
    server = LocalCompletionsAPI(f"{address}/v1/completions", model="tiny", max_retries=1, **options)
    theirs = HFLM(str(llama), device="cpu", dtype="float32", max_length=CONTEXT - 2)
    asked = instances("loglikelihood", choices())
    assert near(server.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True))
    if backend == "remote":
        asked = instances("loglikelihood_rolling", documents())
        assert near(server.loglikelihood_rolling(asked, disable_tqdm=True), theirs.loglikelihood_rolling(asked))
    short = [(context, {"until": ["。"], "max_gen_toks": 9}) for context, _ in contexts()[::4]]
    asked = instances("generate_until", short)
    assert server.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_the_harness_finds_the_tokenizer_of_the_server(address: str, llama: Path) -> None:
    """``tokenizer_backend=auto`` asks for the routes that vLLM has."""
    server = LocalCompletionsAPI(f"{address}/v1/completions", model="tiny")
    assert server.tokenizer_backend == "remote"
    assert server.prefix_token_id == server.eot_token_id == 0 and server.eos_string == "<|endoftext|>"
    ids = server.tok_encode("春眠不觉晓 a <|im_end|>")
    assert ids == Tokenizer.load(llama).encode("春眠不觉晓 a <|im_end|>", special=True)
    assert server.decode_batch([ids]) == ["春眠不觉晓 a <|im_end|>"]


@pytest.mark.parametrize(
    "route, body, status, message",
    [
        ("tokenize", {}, 400, "the field 'prompt' is missing"),
        ("tokenize", {"prompt": 5}, 400, "'prompt' should be a valid string"),
        ("tokenize", {"prompt": "a", "promt": "b"}, 400, "unknown field 'promt'"),
        ("tokenize", {"prompt": "a", "model": "other"}, 404, "'other' does not exist here"),
        ("detokenize", {"tokens": [1, 9999]}, 400, "the token id 9999 at position 1 is outside the vocabulary"),
        ("detokenize", {"tokens": ["a"]}, 400, "'tokens[0]' should be a valid integer"),
    ],
)
def test_bad_requests_for_ids(address: str, route: str, body: dict[str, Any], status: int, message: str) -> None:
    answer = httpx.post(f"{address}/{route}", json=body)
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_ids_with_what_stands_before_a_text(gpt2: Path) -> None:
    with running_server(load(gpt2, device="cpu"), "tiny") as address:
        answer = httpx.post(f"{address}/tokenize", json={"prompt": "The 山", "return_token_strs": True}).json()
        assert answer["tokens"][0] == 2 and answer["token_strs"][0] == "<|im_start|>"
        assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), CONTEXT)
        assert httpx.post(f"{address}/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_chat_over_http(address: str, llama: Path) -> None:
    server = LocalChatCompletion(f"{address}/v1/chat/completions", model="tiny", max_retries=1)
    talk = [{"role": "user", "content": "你好"}]
    asked = [(server.apply_chat_template(talk), {"until": ["。"], "max_gen_toks": 12})]
    expected = load(llama, device="cpu").chat(talk, max_new_tokens=12, stop=["。"])[0].text
    assert server.generate_until(instances("generate_until", asked)) == [expected]
