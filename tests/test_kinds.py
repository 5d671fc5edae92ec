"""`hanmo.load` on every kind of model, and the engine over networks that are not transformers of ours."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import hanmo
from hanmo.errors import ModelError, ResourceError, UsageError
from hanmo.inference.language_model import LanguageModel
from hanmo.inference.loading import load_language_model
from hanmo.models.architectures.bart import original_transformer
from hanmo.models.checkpoints.ngram import save_ngram
from hanmo.models.checkpoints.recurrent import save_recurrent
from hanmo.models.checkpoints.save import save_folder
from hanmo.models.ngram import NGramModel
from hanmo.models.recurrent import RecurrentConfig, RecurrentModel
from hanmo.models.transformer import Transformer
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.training import train_bpe, train_char

TEXTS = [
    "从前有座山，山里有座庙。",
    "Once upon a time there was a hill, and a temple on it.",
    "床前明月光，疑是地上霜。",
] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char(TEXTS)


@pytest.fixture
def ngram(tmp_path: Path, tokenizer: Tokenizer) -> LanguageModel:
    documents = [[*tokenizer.encode(text), 0] for text in TEXTS]
    model = NGramModel.train(documents, 4, tokenizer.vocab_size, bos_id=0, eos_id=0)
    save_ngram(tmp_path / "ngram", model, tokenizer, {"kind": "model"})
    loaded = hanmo.load(tmp_path / "ngram")
    assert isinstance(loaded, LanguageModel)
    return loaded


@pytest.fixture
def lstm(tmp_path: Path, tokenizer: Tokenizer) -> LanguageModel:
    network = RecurrentModel(RecurrentConfig("lstm", tokenizer.vocab_size, 24, 24, 2))
    network.initialize(0)
    with torch.no_grad():
        network.embed_tokens.weight.mul_(20)
    save_recurrent(tmp_path / "lstm", network, tokenizer, {"kind": "model"})
    loaded = hanmo.load(tmp_path / "lstm")
    assert isinstance(loaded, LanguageModel)
    return loaded


def mamba(folder: Path, tokenizer: Tokenizer) -> Path:
    """A folder of an architecture that is not ours: no attention at all."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=24, num_hidden_layers=2, state_size=4, bos_token_id=0,
        eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    model = transformers.MambaForCausalLM(config)
    with torch.no_grad():
        model.backbone.embeddings.weight.normal_(0, 1)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def olmo(folder: Path, tokenizer: Tokenizer) -> Path:
    """A folder of an attention decoder that is not ours."""
    torch.manual_seed(0)
    config = transformers.OlmoConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=64, bos_token_id=0, eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    model = transformers.OlmoForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 1)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


FOREIGN = {"mamba": mamba, "olmo": olmo}
PROMPTS = ["从前", "Once upon", "床前明月光，疑是"]


def check_contract(model: LanguageModel) -> None:
    """What every language model promises, whatever its network."""
    alone = [model.generate(prompt, max_new_tokens=8, ignore_eos=True)[0] for prompt in PROMPTS]
    together = model.generate(PROMPTS, max_new_tokens=8, ignore_eos=True)
    assert [item.ids for item in together] == [item.ids for item in alone]
    assert [len(item.ids) for item in alone] == [8, 8, 8]
    streamed = list(model.stream(PROMPTS[0], max_new_tokens=8, ignore_eos=True))
    assert "".join(chunk.text for chunk in streamed) == alone[0].text
    several = model.generate(PROMPTS[:2], n=3, temperature=1.0, seed=5, max_new_tokens=6)
    one_by_one = [model.generate(prompt, n=3, temperature=1.0, seed=5, max_new_tokens=6) for prompt in PROMPTS[:2]]
    assert [item.text for item in several] == [item.text for items in one_by_one for item in items]
    # the greedy ids are the most probable ones by the model's own log-probabilities
    ids = model.encode_prompt(PROMPTS[0])[len(model.prompt_prefix) :]
    written = ids + alone[0].ids
    scores = model.logprobs(written)
    assert scores.shape == (len(written),) and bool((scores <= 1e-5).all())
    for place in range(len(ids), len(written)):
        rivals = [model.logprobs([*written[:place], other])[-1] for other in (2, 5, 9)]
        assert float(scores[place]) >= max(map(float, rivals)) - 1e-4
    rows = np.array([[0, *written], [0, *written[::-1]]])
    np.testing.assert_allclose(model.score(rows)[0], scores.double().numpy(), atol=1e-4)


def test_an_ngram_model_is_a_language_model(ngram: LanguageModel) -> None:
    check_contract(ngram)
    assert "山里有座庙" in ngram.generate("从前有座山，", max_new_tokens=8)[0].text
    text = ngram.tokenizer.encode("从前有座山")
    direct = ngram.model.logprobs(text)  # type: ignore[union-attr]
    np.testing.assert_allclose(ngram.logprobs(text).numpy(), direct, rtol=1e-5)


def test_a_recurrent_network_is_a_language_model(lstm: LanguageModel) -> None:
    check_contract(lstm)
    network = lstm.model
    assert isinstance(network, RecurrentModel)
    ids = lstm.tokenizer.encode(TEXTS[1])
    logits, _ = network(torch.tensor([[0, *ids[:-1]]]))
    expected = torch.log_softmax(logits[0], -1)[torch.arange(len(ids)), torch.tensor(ids)]
    torch.testing.assert_close(lstm.logprobs(ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FOREIGN)
def test_other_architectures_run_through_transformers(
    name: str, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hanmo.load(FOREIGN[name](tmp_path / name, tokenizer))
    assert f"the architecture '{name}' is not one of Hanmo's own; transformers" in capsys.readouterr().err
    check_contract(model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
    ids = torch.tensor([[0, *tokenizer.encode("从前有座山")]])
    expected = theirs.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None)[0, ids.size(1) :].tolist()
    assert model.generate([ids[0].tolist()], max_new_tokens=12, ignore_eos=True)[0].ids == expected


def test_without_transformers_the_known_architectures_are_listed(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mamba(tmp_path / "mamba", tokenizer)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # noqa: ARG005
    with pytest.raises(ResourceError, match="the architecture 'mamba' is not one of Hanmo's own") as caught:
        hanmo.load(folder)
    assert "llama" in caught.value.fix and "pip install transformers" in caught.value.fix and caught.value.zh


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "names code to be run"),
        ({"_attn_implementation_internal": "someone/kernel"}, "names code to be run"),
        ({"model_type": "nothing-of-that-name"}, "neither Hanmo nor transformers"),
        ({"model_type": None}, "neither Hanmo nor transformers"),
    ],
)
def test_a_foreign_folder_is_data_only(
    change: dict[str, Any], message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = mamba(tmp_path / "mamba", tokenizer)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(ModelError, match=message) as caught:
        hanmo.load(folder)
    assert caught.value.zh and str(folder) in caught.value.where


def test_an_arpa_file_is_a_language_model(tmp_path: Path) -> None:
    from hanmo.text.training import train_words

    lines = [["we", "drink", "tea"], ["we", "drink", "<unk>"], ["我们", "喝", "茶"]]
    words = train_words(lines)
    documents = [[*words.encode(" ".join(line)), 0] for line in lines]
    NGramModel.train(documents, 3, words.vocab_size, bos_id=0, eos_id=0).to_arpa(tmp_path / "tea.arpa", words)
    model = hanmo.load(tmp_path / "tea.arpa")
    assert model.generate("我们 喝", max_new_tokens=4)[0].text.strip() == "茶"
    direct = NGramModel.train(documents, 3, words.vocab_size, bos_id=0, eos_id=0).logprobs(words.encode("we drink tea"))
    found = model.logprobs(model.tokenizer.encode("we drink tea"))
    np.testing.assert_allclose(found.numpy(), direct, atol=1e-5)


def test_an_encoder_decoder_writes_from_its_source(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 300)
    config = original_transformer(tokenizer.vocab_size, 32, 2, 4, 64)
    network = Transformer(config)
    network.initialize(0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2 * parameter.size(1) ** -0.5)
    save_folder(tmp_path / "m", network, tokenizer, provenance={}, generation={"decoder_start_token_id": 1})
    model = hanmo.load(tmp_path / "m")
    assert isinstance(model, LanguageModel)
    alone = [model.generate(prompt, max_new_tokens=7, ignore_eos=True)[0].ids for prompt in PROMPTS]
    assert [item.ids for item in model.generate(PROMPTS, max_new_tokens=7, ignore_eos=True)] == alone
    theirs = transformers.MarianMTModel.from_pretrained(tmp_path / "m")
    for prompt, ids in zip(PROMPTS, alone, strict=True):
        source = torch.tensor([model.encode_prompt(prompt)])
        expected = theirs.generate(
            source, do_sample=False, num_beams=1, max_new_tokens=7, eos_token_id=None, decoder_start_token_id=1,
            bad_words_ids=None, forced_eos_token_id=None,
        )  # fmt: skip
        assert expected[0, 1:].tolist() == ids
    scores = model.answer_logprobs(PROMPTS[0], alone[0])
    assert scores.shape == (7,) and math.isfinite(float(scores.sum()))
    with pytest.raises(UsageError, match="an encoder-decoder scores an answer to a source"):
        model.logprobs([3, 4])


def test_only_language_models_write(tmp_path: Path, tokenizer: Tokenizer) -> None:
    raw = {**transformers.BertConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1,
                                     num_attention_heads=2, intermediate_size=16).to_dict()}  # fmt: skip
    from hanmo.models.architectures import read_config

    network = Transformer(read_config(raw))
    network.initialize(0)
    save_folder(tmp_path / "bert", network, tokenizer, provenance={})
    with pytest.raises(UsageError, match="writes no text"):
        load_language_model(tmp_path / "bert")
    with pytest.raises(ModelError, match="this network reads texts and writes none"):
        LanguageModel(network, tokenizer)


def test_large_weights_are_stored_in_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = transformers.GPT2Config(vocab_size=tokenizer.vocab_size, n_embd=16, n_layer=3, n_head=2, n_positions=32,
                                     bos_token_id=0, eos_token_id=0)  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    tokenizer.save(tmp_path / "theirs")
    ours = hanmo.load(tmp_path / "theirs", engine="torch")
    save_folder(tmp_path / "ours", ours.model, tokenizer, provenance={}, max_shard_bytes=9_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs.eval()(ids).logits)
        torch.testing.assert_close(hanmo.load(tmp_path / "ours", engine="torch").model(ids), theirs(ids).logits)


def test_a_tensor_of_the_wrong_shape_is_named_with_its_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**state, name: state[name][:-1].contiguous()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"q_proj.weight' has shape \(15, 16\), expected \(16, 16\)") as caught:
        hanmo.load(folder)
    assert caught.value.where == str(folder) and "download the folder again" in caught.value.fix
