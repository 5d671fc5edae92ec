"""From a name to a model: what is tried in which order, what is read with it, and real weights against transformers."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hanmo
from hanmo import catalog
from hanmo.errors import HanmoError, ModelError, NetworkError, ResourceError, UsageError
from hanmo.inference.language_model import LanguageModel
from hanmo.inference.loading import choose_device, find, load, set_threads
from hanmo.inference.native import library
from hanmo.models.checkpoints.save import save_folder
from hanmo.models.device import one_thread
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.text.tokenizer import Tokenizer, default_threads
from hanmo.text.training import train_char

from .stories import FIRST_WORDS, build_gguf


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char(["床前明月光，疑是地上霜。" * 3])


@pytest.fixture(scope="module")
def network(tokenizer: Tokenizer) -> Transformer:
    network = Transformer(TransformerConfig(tokenizer.vocab_size, 16, 1, 2, 1, 8, 24, 32))
    network.initialize(1)
    return network


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with an empty cache and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HANMO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HANMO_OFFLINE", "1")
    return tmp_path


def save(target: Path, network: Transformer, tokenizer: Tokenizer, **provenance: object) -> Path:
    save_folder(target, network, tokenizer, provenance=dict(provenance))
    return target


# What a name stands for ----------------------------------------------------------------------------------------------


def test_a_path_a_run_and_a_run_by_its_name(place: Path, network: Transformer, tokenizer: Tokenizer) -> None:
    model = save(place / "runs" / "poems" / "model", network, tokenizer)
    for name in (str(model), "runs/poems/model", "runs/poems", "poems", str(place / "runs" / "poems")):
        assert find(name).resolve() == model
    assert load("poems").name == "poems"
    assert hanmo.load("poems").context_length == 32


def test_a_path_comes_before_a_run_and_a_run_before_the_catalog(
    place: Path, network: Transformer, tokenizer: Tokenizer
) -> None:
    name = catalog.ENTRIES[0].name
    run = save(place / "runs" / name / "model", network, tokenizer)
    assert find(name).resolve() == run
    folder = save(place / name, network, tokenizer)
    assert find(name).resolve() == folder


def test_a_catalog_name_is_fetched(
    place: Path, network: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = catalog.ENTRIES[0].name
    with pytest.raises(NetworkError, match="network is not to be used"):
        load(name)
    asked = []
    model = save(place / "fetched", network, tokenizer)
    monkeypatch.setattr(catalog, "fetch", lambda name, *, offline: asked.append((name, offline)) or model)
    assert load(name, offline=True).tokenizer.vocab_size == tokenizer.vocab_size
    assert asked == [(name, True)]


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("smollm2-135m-instrukt", "did you mean 'smollm2-135m-instruct'?"),
        ("peoms", "did you mean 'poems'?"),
        ("qqqqqq", "known: all-minilm-l6-v2, poems, smollm2-135m-instruct"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(
    place: Path, network: Transformer, tokenizer: Tokenizer, name: str, fix: str
) -> None:
    save(place / "runs" / "poems" / "model", network, tokenizer)
    with pytest.raises(ModelError, match=f"there is no model '{name}'") as caught:
        load(name)
    assert caught.value.fix == fix
    assert name in caught.value.zh


def test_a_place_without_a_model_is_an_error_that_says_what_is_missing(place: Path) -> None:
    (place / "empty").mkdir()
    with pytest.raises(ModelError, match="the folder holds no model") as caught:
        load("empty")
    assert "config.json" in caught.value.why
    (place / "notes.md").write_text("x")
    with pytest.raises(ModelError, match="this file is not a model"):
        load("notes.md")
    for name in ("a.gguf", "b.gguf"):
        (place / "empty" / name).write_bytes(b"")
    with pytest.raises(ModelError, match="holds 2 GGUF files") as caught:
        load("empty")
    assert "empty/a.gguf" in caught.value.fix


def test_an_altered_model_is_not_loaded(place: Path, network: Transformer, tokenizer: Tokenizer) -> None:
    model = save(place / "m", network, tokenizer)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load("m")


# What is read with the weights ---------------------------------------------------------------------------------------


def test_our_own_folders_say_what_a_prompt_begins_with(place: Path, network: Transformer, tokenizer: Tokenizer) -> None:
    save(place / "base", network, tokenizer, prompt_prefix=[0])
    save(place / "none", network, tokenizer, prompt_prefix=[])
    base = load("base")
    assert base.encode_prompt("明月") == [0, *tokenizer.encode("明月")]
    assert load("none").encode_prompt("明月") == tokenizer.encode("明月")
    assert set(base.eos_ids) == {0, tokenizer.special_tokens["<|im_end|>"]}
    with torch.inference_mode():
        expected = network(torch.tensor([base.encode_prompt("明月")]))[0, -1].argmax()
    assert base.generate("明月", max_new_tokens=1)[0].ids == [int(expected)]


@pytest.mark.parametrize("prefix", [7, [10**6], ["a"], [True]])
def test_an_impossible_prefix_is_refused(
    place: Path, network: Transformer, tokenizer: Tokenizer, prefix: object
) -> None:
    save(place / "m", network, tokenizer, prompt_prefix=prefix)
    with pytest.raises(ModelError, match="prompt_prefix must be a list of token ids"):
        load("m")


@pytest.mark.parametrize("adds", [True, False])
def test_other_folders_begin_with_bos_where_their_tokenizer_says_so(
    place: Path, network: Transformer, tokenizer: Tokenizer, adds: bool
) -> None:
    model = save(place / "m", network, tokenizer)
    (model / "hanmo.json").unlink()
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": adds}))
    assert load("m").prompt_prefix == ([tokenizer.bos_id] if adds else [])


def test_half_precision_weights_are_computed_in_float32_on_a_cpu(
    place: Path, network: Transformer, tokenizer: Tokenizer
) -> None:
    half = Transformer(network.config)
    half.load_state_dict(network.state_dict())
    save(place / "m", half.to(torch.bfloat16), tokenizer)
    assert load("m", device="cpu", engine="torch").model.output_weight.dtype == torch.float32


# Device and threads --------------------------------------------------------------------------------------------------


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("tpu", "meta", "cuda:x", "cpu;rm"):
        with pytest.raises(UsageError, match="is not a device"):
            choose_device(name)
    with pytest.raises(ResourceError, match="no device 'cuda:99'") as caught:
        load("anything", device="cuda:99")
    assert "--device cpu" in caught.value.fix


def test_auto_prefers_cuda_then_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto").type == "cuda"
    with pytest.raises(ResourceError):
        choose_device("cuda:1")


def test_threads_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("HANMO_THREADS", "1")
        set_threads()
        assert torch.get_num_threads() == 1
        for value in ("0", "-1", "many", "²", "10000", "1.5", "9" * 5000):
            monkeypatch.setenv("HANMO_THREADS", value)
            for asks in (set_threads, default_threads):
                with pytest.raises(UsageError, match="HANMO_THREADS must be"):
                    asks()
    finally:
        torch.set_num_threads(before)


def test_one_thread_gives_the_others_back_whatever_happens() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_thread():
        assert torch.get_num_threads() == 1
        _ = 1 / 0
    assert torch.get_num_threads() == before


def test_importing_hanmo_does_not_import_torch() -> None:
    code = "import sys, hanmo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Real models ---------------------------------------------------------------------------------------------------------


def assert_same_greedy_ids(model: LanguageModel, theirs: LlamaForCausalLM, prompts: list[str], tokens: int) -> None:
    """Ours, all prompts in one batch, against transformers, one prompt at a time; near-ties are not hidden."""
    for prompt, written in zip(prompts, model.generate(prompts, max_new_tokens=tokens, ignore_eos=True), strict=True):
        ids = torch.tensor([model.encode_prompt(prompt)])
        result = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        top = torch.cat(result.logits).topk(2, dim=1).values
        assert float((top[:, 0] - top[:, 1]).min()) > 1e-4
        assert written.ids == result.sequences[0, ids.size(1) :].tolist()


def in_transformers(model: LanguageModel) -> LlamaForCausalLM:
    """The same weights in transformers."""
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**model.model.config.to_hf(), attn_implementation="eager"))
    theirs.load_state_dict(model.model.state_dict(), strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    return theirs.eval()


@pytest.fixture(scope="module")
def stories_file(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (shared_data / "stories260k").is_dir():
        pytest.skip("stories260k is not in the shared data")
    return build_gguf(shared_data, tmp_path_factory.mktemp("stories") / "stories.gguf")


@pytest.fixture(scope="module", params=["native", "torch"])
def stories(stories_file: Path, request: pytest.FixtureRequest) -> LanguageModel:
    return computed_by(request.param, stories_file)


def computed_by(engine: str, path: Path | str) -> LanguageModel:
    """A model in float32, by one of the engines."""
    if engine == "native" and library.load()[0] is None:
        pytest.skip(f"no native engine: {library.load()[1]}")
    return load(path, device="cpu", precision="fp32", engine=engine, offline=True)


def test_a_small_real_model_tells_its_known_story(stories: LanguageModel) -> None:
    assert stories.prompt_prefix == [1]
    for prompt in ("", "Once upon a time"):
        text = prompt + stories.generate(prompt, max_new_tokens=80)[0].text
        assert text.strip().startswith(FIRST_WORDS)
    chunks = stories.stream("", max_new_tokens=80)
    assert "".join(chunk.text for chunk in chunks).strip().startswith(FIRST_WORDS)


def test_a_small_real_model_writes_what_transformers_writes(stories: LanguageModel, stories_file: Path) -> None:
    theirs = in_transformers(computed_by("torch", stories_file))
    prompts = ["", "Lily and Tom went to", "从前有座山", "The dog", "One day, a cat and a bird"]
    assert_same_greedy_ids(stories, theirs, prompts, 60)


def test_a_sensible_text_is_more_probable_than_its_words_shuffled(stories: LanguageModel) -> None:
    sense = "Once upon a time, there was a little girl named Lily."
    nonsense = "girl a time, little Lily there upon was Once a named."
    mean = [float(stories.logprobs(stories.tokenizer.encode(text)).mean()) for text in (sense, nonsense)]
    assert mean[0] > -1.0 > -2.5 > mean[1]


@pytest.fixture(scope="module", params=["native", "torch"])
def smollm2(request: pytest.FixtureRequest) -> LanguageModel:
    """SmolLM2-135M-Instruct where it was fetched before; tests never download."""
    try:
        return computed_by(request.param, "smollm2-135m-instruct")
    except HanmoError as error:
        pytest.skip(f"SmolLM2 is not in the cache: {error.what}")


def test_smollm2_answers_and_writes_what_transformers_writes(smollm2: LanguageModel) -> None:
    answer = smollm2.chat([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=16)[0]
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    prompts = ["The capital of France is", "从前有座山，"]
    theirs = in_transformers(computed_by("torch", "smollm2-135m-instruct"))
    assert_same_greedy_ids(smollm2, theirs, prompts, 8)


@pytest.mark.parametrize("kept", ["fp32", "fp16", "int8", None])
def test_keys_and_values_are_kept_as_asked(place: Path, network: Transformer, tokenizer: Tokenizer, kept: str) -> None:
    if library.load()[0] is None:
        pytest.skip("the native engine is not built")
    network = copy.deepcopy(network)
    with torch.no_grad():
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.5)  # a fresh network adds nothing to what it reads
    folder = save(place / "model", network, tokenizer)
    model, reference = load(folder, device="cpu", kv_cache=kept), load(folder, device="cpu")
    assert model.network.decoder.cache == (kept or "fp32")
    ids_BT = np.array([tokenizer.encode("床前明月光，疑是地上霜")])
    scores, expected = model.score(ids_BT), reference.score(ids_BT)
    assert np.array_equal(scores, expected) == (kept in (None, "fp32"))
    np.testing.assert_allclose(scores, expected, atol=0.2)


def test_a_cache_that_cannot_be_had_is_refused(place: Path, network: Transformer, tokenizer: Tokenizer) -> None:
    folder = save(place / "model", network, tokenizer)
    with pytest.raises(UsageError, match="--kv-cache int8 needs the native engine") as caught:
        load(folder, device="cpu", engine="torch", kv_cache="int8")
    assert "--kv-cache int8" in (caught.value.zh or "")
    (place / "tiny.arpa").write_text("\\data\\\nngram 1=3\n\n\\1-grams:\n-0.5\t<s>\n-0.5\t</s>\n-0.5\ta\n\n\\end\\\n")
    with pytest.raises(UsageError, match="is for decoders in the native engine"):
        load("tiny.arpa", kv_cache="int8")
    if library.load()[0] is not None:
        with pytest.raises(UsageError, match="cannot be kept as 'int4'"):
            load(folder, device="cpu", kv_cache="int4")
