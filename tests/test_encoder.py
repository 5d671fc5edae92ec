"""Networks that read texts, against `transformers` and `tokenizers`; control tokens, windows, and refusals."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from hanmo import catalog
from hanmo.errors import DataError, ModelError, UsageError
from hanmo.inference.encoder import TextEncoder
from hanmo.inference.pooling import Pooling, read_pooling
from hanmo.inference.spans import best_span, stitch, word_windows
from hanmo.models.architectures import default_head, read_config, with_head
from hanmo.models.checkpoints.huggingface import load_folder
from hanmo.models.checkpoints.marian import is_marian_tokenizer, load_marian_tokenizer
from hanmo.models.heads import HeadConfig
from hanmo.models.recurrent import RecurrentConfig, RecurrentEncoder
from hanmo.models.transformer import Transformer, build
from hanmo.text.rows import shorten, windows
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.wrapping import read_processor, source_wrapping, wrapping_of

CORPUS = [
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "The bright moon shines before my bed; is it frost upon the ground?",
    "北京是中国的首都。Paris is the capital of France, and London of England.",
    "He doesn't like unaffordable apartments, but she does not mind the price of 3.14 dollars.",
    "机器学习模型需要很多数据，数据越多，模型越好。",
] * 4
TEXTS = [
    "",
    " ",
    "明月",
    "The moon",
    "  two  spaces\tand\na line ",
    "床前 bright 明月光 moon，3.14！",
    "naïve café — ﬁne Ａ１ ½",
    "🙂👩‍👩‍👧 emoji 𠀀𠮷",
    "unaffordable " * 5,
]
MARKUP = ["[CLS] [SEP] [MASK] [PAD] [UNK]", "<s></s><mask> <pad> <unk>", "a</s>b<mask>c"]


# Tokenizers ----------------------------------------------------------------------------------------------------------


def wordpiece() -> tokenizers.Tokenizer:
    """As BERT's, for Chinese and English."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=220, special_tokens=special))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.decoder = decoders.WordPiece()
    return made


def unigram(kind: str) -> tokenizers.Tokenizer:
    """As XLM-R's or T5's."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if kind == "xlm-r" else ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>"))
    if kind == "xlm-r":
        made.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    else:
        made.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
    made.decoder = decoders.Metaspace()
    return made


def byte_level(kind: str) -> tokenizers.Tokenizer:
    """As RoBERTa's or ModernBERT's."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    roberta = kind == "roberta"
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if roberta else ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=360, special_tokens=special, initial_alphabet=alphabet)
    )
    made.add_special_tokens([tokenizers.AddedToken(special[-1], lstrip=True)])
    made.post_processor = (
        processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        if roberta
        else processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
                ),
            ]
        )
    )
    made.decoder = decoders.ByteLevel()
    return made


def bert_processing() -> tokenizers.Tokenizer:
    made = wordpiece()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


MAKERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "bert": wordpiece,
    "bert-processing": bert_processing,
    "xlm-r": lambda: unigram("xlm-r"),
    "t5": lambda: unigram("t5"),
    "roberta": lambda: byte_level("roberta"),
    "modernbert": lambda: byte_level("modernbert"),
}
MADE = {name: make() for name, make in MAKERS.items()}
OURS = {name: Tokenizer.from_json(made.to_str()) for name, made in MADE.items()}
NAMES = {
    "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]",
             "unk_token": "[UNK]"},
    "roberta": {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>",
                "mask_token": "<mask>", "pad_token": "<pad>", "unk_token": "<unk>"},
}  # fmt: skip
NAMES |= {"xlm-r": NAMES["roberta"], "modernbert": NAMES["bert"]}


@pytest.mark.parametrize("name", MADE)
def test_wrapped_ids_are_those_of_the_tokenizers_library(name: str) -> None:
    made, ours = MADE[name], OURS[name]
    wrapping = wrapping_of(ours)
    for text in TEXTS:
        expected = made.encode(text)
        single = wrapping.wrap(ours.encode(text))
        assert single.ids == expected.ids
        assert single.types == expected.type_ids
        assert wrapping.prefix + ours.encode(text) + wrapping.suffix == expected.ids
        for other in TEXTS:
            expected = made.encode(text, other)
            pair = wrapping.wrap(ours.encode(text), ours.encode(other))
            assert pair.ids == expected.ids
            assert pair.types == expected.type_ids
            first, second = pair.starts
            assert pair.ids[first : first + len(ours.encode(text))] == ours.encode(text)
            assert pair.ids[second : second + len(ours.encode(other))] == ours.encode(other)
            assert wrapping.overhead(pair=True) == len(pair.ids) - len(ours.encode(text)) - len(ours.encode(other))


@pytest.mark.parametrize("name", MADE)
def test_control_tokens_never_come_from_text(name: str) -> None:
    ours = OURS[name]
    control = set(ours.special_tokens.values()) - {ours.special_tokens.get("[UNK]"), ours.special_tokens.get("<unk>")}
    for text in MARKUP:
        assert not control & set(ours.encode(text))
        assert not control & set(ours.encode_with_offsets(text)[0])
    if ours.mask_id is not None:
        mask = next(token for token, id in ours.special_tokens.items() if id == ours.mask_id)
        ids = ours.encode_masked(f"The {mask} moon, [CLS] <s> </s> [SEP] {mask}")
        assert [id for id in ids if id in control] == [ours.mask_id] * 2


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=60, deadline=None, database=None)
@given(text=st.text(st.sampled_from("明月 moon'.,，\n\tﬁ½é🙂𠮷Ａ-3"), max_size=30))
def test_offsets_cover_the_text(name: str, text: str) -> None:
    made, ours = MADE[name], OURS[name]
    ids, offsets = ours.encode_with_offsets(text)
    assert ids == ours.encode(text) == made.encode(text, add_special_tokens=False).ids
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    assert offsets == sorted(offsets)
    covered = {place for start, end in offsets for place in range(start, end)}
    assert all(place in covered or character.isspace() for place, character in enumerate(text))


@pytest.mark.parametrize("name", MADE)
def test_texts_come_back(name: str) -> None:
    ours = OURS[name]
    for text in ("The bright moon shines", "北京是中国的首都。"):
        spaced = " ".join(text) if name.startswith("bert") and "北" in text else text
        wanted = spaced.lower() if name.startswith("bert") else spaced
        assert ours.decode(ours.encode(text)) == wanted
        assert ours.decode(wrapping_of(ours).wrap(ours.encode(text)).ids) == wanted


def test_names_stand_in_for_a_post_processor(tmp_path: Path) -> None:
    made = wordpiece()
    definition = {**json.loads(made.to_str()), "post_processor": None}
    old = Tokenizer.from_json(json.dumps(definition))  # names nothing: the usual spelling is recognised
    assert (old.cls_id, old.sep_id, old.mask_id) == (2, 3, 4)
    assert wrapping_of(old).wrap([9], [8]) == wrapping_of(OURS["bert"]).wrap([9], [8])
    assert wrapping_of(old, causal=True).wrap([9]).ids == [9]
    definition = {**json.loads(byte_level("roberta").to_str()), "post_processor": None}
    names = {key: value for key, value in NAMES["roberta"].items() if key != "unk_token"}
    named = Tokenizer.from_json(json.dumps(definition), **names)
    assert wrapping_of(named).wrap([9], [8]) == wrapping_of(OURS["roberta"]).wrap([9], [8])
    ends = Tokenizer.from_json(json.dumps(definition), bos_token="<s>", eos_token="</s>")
    assert wrapping_of(ends).wrap([9], [8]).ids == [0, 9, 2, 8, 2]
    none = Tokenizer.from_json(json.dumps(definition))
    assert wrapping_of(none).wrap([9], [8]).ids == [9, 8]
    named.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.cls_id, again.sep_id, again.mask_id) == (0, 2, 4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).mask_token == "<mask>"


def test_a_damaged_table_of_characters_is_no_panic() -> None:
    definition = json.loads(unigram("t5").to_str())
    definition["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    with pytest.raises(ModelError, match="this is not a tokenizer"):
        Tokenizer.from_json(json.dumps(definition))


def test_unknown_post_processors_are_refused() -> None:
    with pytest.raises(ModelError, match="'Novelty' is not known"):
        read_processor({"type": "Novelty"})
    with pytest.raises(ModelError, match="'TemplateProcessing with KeyError"):
        read_processor({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}]})
    definition = json.loads(wordpiece().to_str())
    definition["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [9999]
    with pytest.raises(ModelError, match="adds the token 9999"):
        wrapping_of(Tokenizer.from_json(json.dumps(definition)))


def test_sources_of_encoder_decoders() -> None:
    assert source_wrapping(OURS["t5"], {"decoder_start_token_id": 0}) == ([], [1], 0)
    assert source_wrapping(OURS["t5"], {"pad_token_id": 5}) == ([], [1], 5)
    assert source_wrapping(OURS["roberta"], {"decoder_start_token_id": 2, "bos_token_id": 0}) == ([0], [2], 2)
    definition = {**json.loads(unigram("t5").to_str()), "post_processor": None}
    marian = Tokenizer.from_json(json.dumps(definition), eos_token="</s>", pad_token="<pad>", bos_token="<unk>")
    assert source_wrapping(marian, {}) == ([], [1], 0)
    with pytest.raises(ModelError, match="from which token an answer starts"):
        source_wrapping(OURS["t5"], {})


# Networks ------------------------------------------------------------------------------------------------------------

CONTEXT = 40
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "bert", {**COMMON, "max_position_embeddings": CONTEXT, "pad_token_id": 0}),
    "roberta": (
        "Roberta",
        "roberta",
        {**COMMON, "max_position_embeddings": CONTEXT + 2, "pad_token_id": 1, "type_vocab_size": 1},
    ),
    "xlm-r": (
        "XLMRoberta",
        "xlm-r",
        {**COMMON, "max_position_embeddings": CONTEXT + 2, "pad_token_id": 1, "type_vocab_size": 1},
    ),
    "distilbert": (
        "DistilBert",
        "bert",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": CONTEXT},
    ),
    "modernbert": (
        "ModernBert",
        "modernbert",
        {**COMMON, "max_position_embeddings": CONTEXT, "local_attention": 8, "pad_token_id": 3, "bos_token_id": None,
         "eos_token_id": None, "cls_token_id": 1, "sep_token_id": 2},
    ),
}  # fmt: skip


def make(family: str, task: str, folder: Path, **options: Any) -> tuple[Any, Any, TextEncoder]:
    """A random network of `transformers`, its tokenizer, and the same folder as ours."""
    name, kind, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(vocab_size=MADE[kind].get_vocab_size(), **sizes, **options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{task}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else 1.5 / parameter.size(1) ** 0.5
            parameter.copy_((parameter if parameter.dim() == 1 else 0) + torch.randn_like(parameter) * scale)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=MADE[kind], **NAMES[kind])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, ours(folder)


def ours(folder: Path, **options: Any) -> TextEncoder:
    loaded = load_folder(folder)
    return TextEncoder.from_loaded(loaded, build(loaded.config, loaded.state), folder, name="reader", **options)


def takes(model: Any, batch: Any) -> dict[str, Any]:
    """The inputs that a network has; RoBERTa and DistilBERT know no segments."""
    segments = getattr(model.config, "type_vocab_size", 0) > 1
    return {key: value for key, value in batch.items() if key != "token_type_ids" or segments}


LONG = "明月 moon 光 " * 40
SENTENCES = ["明月光", "", "The bright moon shines before my bed.", LONG, "北京是中国的首都。", "x"]
PAIRS = [("明月", "The moon"), ("", "x"), (LONG, "short"), ("short", LONG), (LONG, LONG)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_classes_and_pairs_have_the_probabilities_of_transformers(family: str, tmp_path: Path) -> None:
    labels = {0: "否", 1: "yes", 2: "maybe"}
    model, tokenizer, encoder = make(family, "ForSequenceClassification", tmp_path, id2label=labels)
    assert encoder.task == "sequence-classification"
    assert encoder.labels == ("否", "yes", "maybe")
    for given_texts in (SENTENCES, PAIRS):
        found = encoder.predict_proba(given_texts, batch_size=3)
        for text, row in zip(given_texts, found, strict=True):
            parts = (text,) if isinstance(text, str) else text
            batch = tokenizer(
                *parts, return_token_type_ids=True, return_tensors="pt", truncation=True, max_length=CONTEXT
            )
            expected = model(**takes(model, batch)).logits.softmax(-1)[0].numpy()
            np.testing.assert_allclose(row, expected, atol=1e-5)
        assert np.ptp(found, axis=0).max() > 0.005
    assert encoder.truncated == 3
    best = encoder.classify(SENTENCES)[2]
    assert list(best.values()) == sorted(best.values(), reverse=True)
    alone = encoder.predict_proba(SENTENCES[2])[0].tolist()
    assert best == pytest.approx(dict(zip(encoder.labels, alone, strict=True)), abs=1e-5)


@torch.no_grad()
def test_independent_and_single_labels_are_sigmoids(tmp_path: Path) -> None:
    for folder, options in {
        "many": {"problem_type": "multi_label_classification", "id2label": {0: "体育", 1: "news", 2: "art"}},
        "one": {"id2label": {0: "relevance"}},
    }.items():
        model, tokenizer, encoder = make("bert", "ForSequenceClassification", tmp_path / folder, **options)
        expected = model(**tokenizer(["明月", "moo"], return_tensors="pt", padding=True)).logits.sigmoid().numpy()
        np.testing.assert_allclose(encoder.predict_proba(["明月", "moo"]), expected, atol=1e-5)


@torch.no_grad()
def test_decoders_with_a_head_read_the_last_token(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=MADE["roberta"].get_vocab_size(), n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, id2label={0: "a", 1: "b"}, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.GPT2ForSequenceClassification(config).eval()
    definition = {**json.loads(MADE["roberta"].to_str()), "post_processor": None}
    made = tokenizers.Tokenizer.from_str(json.dumps(definition))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **NAMES["roberta"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = ours(tmp_path)
    texts = ["明月光", "The bright moon shines"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(-1).numpy()
    np.testing.assert_allclose(encoder.predict_proba(texts), expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_embeddings_are_means_whatever_else_is_in_the_batch(family: str, tmp_path: Path) -> None:
    model, tokenizer, encoder = make(family, "Model", tmp_path)
    together = encoder.embed(SENTENCES)
    assert together.dtype == np.float32
    for batch_size in (1, 2, 5):
        np.testing.assert_allclose(encoder.embed(SENTENCES, batch_size=batch_size), together, atol=1e-5)
    np.testing.assert_allclose(encoder.embed(SENTENCES[::-1])[::-1], together, atol=1e-5)
    raw = encoder.embed(SENTENCES, normalize=False)
    for text, vector, unit in zip(SENTENCES, raw, together, strict=True):
        batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=CONTEXT)
        expected = model(**takes(model, batch)).last_hidden_state.mean(1)[0].numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-5)
        np.testing.assert_allclose(unit, expected / np.linalg.norm(expected), atol=1e-5)
    assert encoder.embed("明月光").shape == (1, 32)
    assert encoder.embed([]).shape == (0, 32)


@pytest.mark.parametrize("family", ["bert", "xlm-r"])
@torch.no_grad()
def test_words_have_the_scores_of_transformers(family: str, tmp_path: Path) -> None:
    labels = {0: "O", 1: "B-人", 2: "I-人"}
    model, tokenizer, encoder = make(family, "ForTokenClassification", tmp_path, id2label=labels)
    for words in (["床", "前", "明", "月", "光"], ["unaffordable", "apartments", ",", "明月", "x", "doesn't"]):
        batch = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        logits = model(**takes(model, batch)).logits[0]
        owners = batch.word_ids()
        first = [owners.index(index) for index in range(len(words))]
        expected = logits[first].softmax(-1).numpy()
        found = encoder.tag_probabilities(words)
        assert [word for word, _ in found] == words
        np.testing.assert_allclose([list(row.values()) for _, row in found], expected, atol=1e-5)
        tags = [labels[label] for label in logits[first].argmax(-1).tolist()]
        assert encoder.tag(words) == list(zip(words, tags, strict=True))
    assert [word for word, _ in encoder.tag("床前 bright moon，don't!")] == [
        "床", "前", "bright", "moon", "，", "don't", "!",
    ]  # fmt: skip
    assert encoder.tag("") == encoder.tag([]) == encoder.tag_probabilities(" ") == []


@torch.no_grad()
def test_byte_level_words_are_read_as_they_stand_in_a_text(tmp_path: Path) -> None:
    model, tokenizer, encoder = make("modernbert", "ForTokenClassification", tmp_path, id2label={0: "O", 1: "B"})
    text = "The bright moon shines, doesn't the moon shine?"
    batch = tokenizer(text, return_tensors="pt")
    logits = model(**takes(model, batch)).logits[0]
    words, pieces = encoder._pieces(text)
    assert [id for piece in pieces for id in piece] == encoder.tokenizer.encode(text)
    first = [1 + sum(len(piece) for piece in pieces[:index]) for index in range(len(words))]
    expected = logits[first].softmax(-1).tolist()
    found = [list(row.values()) for _, row in encoder.tag_probabilities(text)]
    assert words == ["The", "bright", "moon", "shines", ",", "doesn't", "the", "moon", "shine", "?"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    listed = [list(row.values()) for _, row in encoder.tag_probabilities(["The", "bright", "moon"])]
    np.testing.assert_allclose(
        listed, [list(row.values()) for _, row in encoder.tag_probabilities("The bright moon")], atol=1e-6
    )


@torch.no_grad()
def test_long_sentences_lose_no_word(tmp_path: Path) -> None:
    _, _, encoder = make("bert", "ForTokenClassification", tmp_path, id2label={0: "O", 1: "B", 2: "I"})
    words = [f"{character}" for character in "床前明月光疑是地上霜" * 30]
    found = encoder.tag(words)
    assert [word for word, _ in found] == words
    room = CONTEXT - 2
    # A word far from every cut has the scores of the window that holds it.
    start = room - room // 2
    window = encoder.tag_probabilities(words[start : start + room])
    whole = encoder.tag_probabilities(words)
    middle = start + room // 2
    assert list(whole[middle][1].values()) == pytest.approx(list(window[middle - start][1].values()), abs=1e-5)
    giant = encoder.tag(["月", "unaffordable" * 40, "光"])
    assert [word for word, _ in giant] == ["月", "unaffordable" * 40, "光"]
    odd = encoder.tag(["月", "\u200b", "", "光"])  # words of which the tokenizer leaves nothing keep their place
    assert [word for word, _ in odd] == ["月", "\u200b", "", "光"]


def with_crf(folder: Path) -> TextEncoder:
    base, _, _ = make("bert", "Model", folder)
    config = read_config(base.config.to_dict() | {"architectures": ["BertModel"]})
    config = with_head(config, default_head(config, "token-classification", ("O", "B", "I"), crf=True))
    model = Transformer(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        scale = 1.0 if parameter.dim() == 1 else 1.5 / parameter.size(1) ** 0.5
        torch.nn.init.normal_(parameter, std=scale, generator=generator)
    return TextEncoder(model, Tokenizer.load(folder))


@torch.no_grad()
def test_a_crf_chooses_the_best_path_over_all_windows(tmp_path: Path) -> None:
    encoder = with_crf(tmp_path)
    assert encoder.model.head is not None
    words = [*"床前明月光", "unaffordable", "moon"]
    ids = [encoder.tokenizer.encode(word) for word in words]
    first = [1 + sum(len(piece) for piece in ids[:index]) for index in range(len(ids))]
    row = torch.tensor([[2, *(id for piece in ids for id in piece), 3]])
    emissions = encoder.model(row)[:, first]
    path = encoder.model.head.crf.decode(emissions)[0]
    assert encoder.tag(words) == [(word, ("O", "B", "I")[label]) for word, label in zip(words, path, strict=True)]
    marginals = encoder.model.head.crf.marginals(emissions)[0].tolist()
    for (_, found), expected in zip(encoder.tag_probabilities(words), marginals, strict=True):
        assert list(found.values()) == pytest.approx(expected, abs=1e-5)
        assert sum(found.values()) == pytest.approx(1, abs=1e-4)
    assert len(encoder.tag(words * 20)) == len(words) * 20


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_answers_are_the_best_spans_of_transformers(family: str, tmp_path: Path) -> None:
    model, tokenizer, encoder = make(family, "ForQuestionAnswering", tmp_path)
    for question, context in {
        "moon?": "The bright moon shines before my bed.",
        "首都": "北京是中国的首都。",
        "long": "Paris is the capital of France, 北京是中国的首都。 " * 6,
    }.items():
        batch = tokenizer(
            question, context, return_tensors="pt", truncation="only_second", max_length=CONTEXT, padding=True,
            stride=min(128, (CONTEXT - len(encoder.wrapping.wrap(encoder.tokenizer.encode(question), []).ids)) // 2),
            return_overflowing_tokens=True, return_token_type_ids=True, return_offsets_mapping=True,
        )  # fmt: skip
        offsets = batch.pop("offset_mapping").tolist()
        batch.pop("overflow_to_sample_mapping")
        out = model(**takes(model, batch))
        best, null = (-math.inf, 0, 0, 0.0), math.inf
        for index in range(len(offsets)):
            start, end = out.start_logits[index], out.end_logits[index]
            inside = [place for place, part in enumerate(batch.sequence_ids(index)) if part == 1]
            null = min(null, float(start[0] + end[0]))
            allowed = torch.tensor([0, *inside])
            for first in inside:
                for last in range(first, min(first + 30, inside[-1] + 1)):
                    score = float(start[first] + end[last])
                    if score > best[0]:
                        p = start[first] - start[allowed].logsumexp(0) + end[last] - end[allowed].logsumexp(0)
                        best = score, offsets[index][first][0], offsets[index][last][1], float(p.exp())
        found = encoder.answer(question, context)
        assert found.score == pytest.approx(best[0], abs=1e-4)
        assert found.no_answer_score == pytest.approx(null, abs=1e-4)
        assert found.probability == pytest.approx(best[3], abs=1e-5)
        assert found.text == context[best[1] : best[2]].strip() == context[found.start : found.end]
        assert found.answerable == (found.score > found.no_answer_score)
    one = encoder.answer("moon?", "The bright moon shines before my bed.", max_answer_tokens=1)
    assert len(encoder.tokenizer.encode(one.text)) <= 2
    assert encoder.answer("moon?", "").text == ""
    with pytest.raises(UsageError, match=r"the question has \d+ tokens; at most"):
        encoder.answer(LONG, "x")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_masks_are_filled_as_by_transformers(family: str, tmp_path: Path) -> None:
    model, tokenizer, encoder = make(family, "ForMaskedLM", tmp_path)
    mask = tokenizer.mask_token
    for text in (f"The {mask} moon shines", f"{mask}前明{mask}光", f"床前明{mask}"):
        batch = tokenizer(text, return_tensors="pt")
        places = (batch["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0].tolist()
        expected = model(**takes(model, batch)).logits[0, places].softmax(-1)
        found = encoder.fill(text, n=4)
        assert len(found) == len(places) == text.count(mask)
        ordinary = torch.tensor([id for id in range(len(tokenizer)) if id not in tokenizer.all_special_ids])
        for row, candidates in zip(expected, found, strict=True):
            values, order = row[ordinary].sort(descending=True)
            assert [candidate.id for candidate in candidates] == ordinary[order[:4]].tolist()
            np.testing.assert_allclose([item.probability for item in candidates], values[:4], atol=1e-5)
            assert all(item.text == encoder.tokenizer.decode([item.id]).strip() for item in candidates)
    other = "<mask>" if mask == "[MASK]" else "[MASK]"
    assert encoder.fill(f"床前明{other}") == encoder.fill(f"床前明{mask}")
    assert len(encoder.fill(f"{LONG}{mask}{LONG}{mask}")) == 2
    with pytest.raises(UsageError, match=f"there is no .*{mask[1:-1]}"):
        encoder.fill("nothing to fill in")
    every = encoder.fill(mask, n=10_000)[0]
    assert not {item.id for item in every} & set(encoder.tokenizer.special_tokens.values())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pseudo_likelihood_masks_each_token_in_turn(family: str, tmp_path: Path) -> None:
    model, tokenizer, encoder = make(family, "ForMaskedLM", tmp_path)
    text = "The bright 明月光 [MASK] <mask>"
    ids = encoder.tokenizer.encode(text)
    assert tokenizer.mask_token_id not in ids
    wrapped = encoder.wrapping.wrap(ids)
    expected = []
    for place, id in enumerate(ids, start=wrapped.starts[0]):
        row = torch.tensor([wrapped.ids])
        row[0, place] = tokenizer.mask_token_id
        expected.append(float(model(input_ids=row).logits[0, place].log_softmax(-1)[id]))
    np.testing.assert_allclose(encoder.pseudo_logprobs(text), expected, atol=1e-4)
    assert encoder.pseudo_logprobs("").shape == (0,)
    long = encoder.pseudo_logprobs(LONG)
    assert len(long) == len(encoder.tokenizer.encode(LONG)) and (long < 0).all()


# A recurrent network, and refusals -----------------------------------------------------------------------------------


def recurrent(head: HeadConfig) -> TextEncoder:
    config = RecurrentConfig("lstm", OURS["bert"].vocab_size, 16, 16, 1, tie_embeddings=False, bidirectional=True)
    model = RecurrentEncoder(config, head)
    model.initialize(3)
    return TextEncoder(model, OURS["bert"], name="lstm")


def test_a_recurrent_network_classifies_tags_and_embeds() -> None:
    classifier = recurrent(HeadConfig("sequence-classification", ("差", "good"), pooling="mean"))
    alone = np.concatenate([classifier.predict_proba(text) for text in SENTENCES])
    np.testing.assert_allclose(classifier.predict_proba(SENTENCES), alone, atol=1e-6)
    np.testing.assert_allclose(alone.sum(1), 1, atol=1e-5)
    assert classifier.embed(SENTENCES).shape == (len(SENTENCES), 32)
    tagger = recurrent(HeadConfig("token-classification", ("O", "B", "I"), crf=True))
    assert [word for word, _ in tagger.tag("明月 moon")] == ["明", "月", "moon"]
    assert recurrent(HeadConfig("span-extraction", ("start", "end"))).answer("谁", "明月光").text in "明月光"


def test_a_tokenizer_without_control_tokens_still_reads_an_empty_text() -> None:
    definition = {**json.loads(unigram("t5").to_str()), "post_processor": None}
    plain = Tokenizer.from_json(json.dumps(definition))
    config = RecurrentConfig("gru", plain.vocab_size, 8, 8, 1, tie_embeddings=False, bidirectional=True)
    encoder = TextEncoder(RecurrentEncoder(config, HeadConfig()), plain)
    assert encoder.predict_proba(["", "x"]).shape == (2, 2)


def test_what_a_model_cannot_do_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, encoder = make("bert", "Model", tmp_path)
    calls: dict[str, tuple[Callable[[], object], str]] = {
        "classify": (lambda: encoder.classify(["x"]), "SequenceClassification"),
        "tag": (lambda: encoder.tag("x"), "TokenClassification"),
        "answer": (lambda: encoder.answer("x", "y"), "QuestionAnswering"),
        "fill": (lambda: encoder.fill("[MASK]"), "MaskedLM"),
        "pseudo_logprobs": (lambda: encoder.pseudo_logprobs("x"), "MaskedLM"),
    }
    for method, (call, ending) in calls.items():
        with pytest.raises(UsageError, match=f"this model cannot {method}: it gives vectors only") as caught:
            call()
        assert f"...For{ending}" in caught.value.fix
        assert "(embed)" in caught.value.fix
        monkeypatch.setenv("HANMO_LANG", "zh")
        assert f"该模型不能 {method}" in str(caught.value) and ending in str(caught.value)
        monkeypatch.setenv("HANMO_LANG", "en")
    assert encoder.labels == ()


def test_bad_input_is_refused_with_its_place(tmp_path: Path) -> None:
    _, _, encoder = make("bert", "ForSequenceClassification", tmp_path, id2label={0: "a", 1: "b"})
    assert encoder.classify([]) == []
    for bad in (None, 3, b"bytes", {"a": 1}):
        with pytest.raises(UsageError, match="expected a text, not"):
            encoder.classify(bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="text 1: expected a text, not int"):
        encoder.embed(["x", 3])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="text 0: expected a text, not tuple"):
        encoder.embed([("a", "b")])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="text 0: expected a text, not tuple"):
        encoder.classify([("a", "b", "c")])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="batch_size must be a positive whole number"):
        encoder.embed(["x"], batch_size=0)
    for call in (encoder.embed, encoder.classify):
        with pytest.raises(DataError, match="text 1: character 0 of the text is a lone surrogate"):
            call(["fine", "\ud800"])


def test_bad_words_questions_and_masks_are_refused(tmp_path: Path) -> None:
    _, _, tagger = make("bert", "ForTokenClassification", tmp_path / "tag", id2label={0: "a", 1: "b"})
    with pytest.raises(UsageError, match="item 1: expected a text, not NoneType"):
        tagger.tag(["a", None])  # type: ignore[list-item]
    with pytest.raises(DataError, match="lone surrogate"):
        tagger.tag(["a", "\udfff"])
    _, _, reader = make("bert", "ForQuestionAnswering", tmp_path / "answer")
    with pytest.raises(UsageError, match="item 1: expected a text, not int"):
        reader.answer("a", 3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_answer_tokens must be at least 1"):
        reader.answer("a", "b", max_answer_tokens=0)
    with pytest.raises(DataError, match="lone surrogate"):
        reader.answer("a", "\udfff")
    _, _, filler = make("bert", "ForMaskedLM", tmp_path / "fill")
    with pytest.raises(UsageError, match="n must be at least 1"):
        filler.fill("[MASK]", n=0)
    with pytest.raises(DataError, match="lone surrogate"):
        filler.fill("[MASK]\ud800")
    with pytest.raises(DataError, match="lone surrogate"):
        filler.pseudo_logprobs("\ud800")


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    _, _, encoder = make("bert", "Model", tmp_path)
    with torch.no_grad():
        next(encoder.model.parameters()).fill_(math.inf)
    with pytest.raises(ModelError, match="infinite"):
        encoder.embed(["x"])


def test_a_model_without_a_mask_says_so(tmp_path: Path) -> None:
    _, _, encoder = make("bert", "ForMaskedLM", tmp_path)
    encoder.tokenizer.mask_id = None
    for call in (encoder.fill, encoder.pseudo_logprobs):
        with pytest.raises(ModelError, match="the tokenizer has no mask token"):
            call("明")


def test_networks_that_write_are_refused(tmp_path: Path) -> None:
    raw = transformers.LlamaConfig(
        vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    ).to_dict()
    with pytest.raises(ModelError, match="this network writes texts"):
        TextEncoder(Transformer(read_config(raw)), OURS["roberta"])
    _, _, encoder = make("bert", "Model", tmp_path)
    assert isinstance(encoder.model, Transformer)
    with pytest.raises(ModelError, match="leave no room"):
        TextEncoder(encoder.model, encoder.tokenizer, max_length=3)


def test_cutting_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, encoder = make("bert", "Model", tmp_path)
    capsys.readouterr()
    encoder.embed(["short", "明"])
    assert encoder.truncated == 0
    assert not capsys.readouterr().err
    encoder.embed([LONG, "short", LONG])
    assert "reader: 2 of 3 texts are longer than 40 tokens" in capsys.readouterr().err
    assert encoder.truncated == 2
    encoder.embed([LONG])
    assert not capsys.readouterr().err
    assert encoder.truncated == 1


def test_many_texts_pass_in_bounded_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("bert", "Model", tmp_path)
    encoder = ours(tmp_path, engine="torch")
    monkeypatch.setattr("hanmo.inference.encoder.BLOCK", 50)
    monkeypatch.setattr("hanmo.inference.reading.BATCH_TOKENS", 100)
    shapes = []
    hidden = encoder.reader.hidden

    def watched(rows: Any) -> Any:
        result = hidden(rows)
        shapes.append(result[0].shape[:2])
        return result

    monkeypatch.setattr(encoder.reader, "hidden", watched)
    texts = [("moon " * (index * 7 % 90)) for index in range(130)]
    found = encoder.embed(texts)
    assert max(rows * columns for rows, columns in shapes) <= 100
    assert sum(rows for rows, _ in shapes) == 130
    np.testing.assert_allclose(found[77:78], encoder.embed(texts[77]), atol=1e-5)


# Pooling -------------------------------------------------------------------------------------------------------------


def sentence_files(folder: Path, modes: dict[str, Any], **settings_: Any) -> None:
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    kinds = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(steps)
    ]
    (folder / "modules.json").write_text(json.dumps(kinds))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings_))


@torch.no_grad()
def test_pooling_files_decide(tmp_path: Path) -> None:
    model, tokenizer, _ = make("bert", "Model", tmp_path)
    expected: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "cls_token": lambda h: h[0],
        "mean_tokens": lambda h: h.mean(0),
        "max_tokens": lambda h: h.amax(0),
        "mean_sqrt_len_tokens": lambda h: h.sum(0) / len(h) ** 0.5,
        "weightedmean_tokens": lambda h: (
            (h * torch.arange(1, len(h) + 1)[:, None]).sum(0) * 2 / (len(h) * (len(h) + 1))
        ),
        "lasttoken": lambda h: h[-1],
    }
    texts = ["明月", "The bright moon shines before my bed."]
    hidden = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    for mode, pool in expected.items():
        sentence_files(tmp_path, {f"pooling_mode_{mode}": True, "pooling_mode_other": False})
        found = ours(tmp_path).embed(texts, normalize=False)
        np.testing.assert_allclose(found, torch.stack([pool(h) for h in hidden]), atol=1e-5)
    sentence_files(tmp_path, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True})
    both = ours(tmp_path).embed(texts, normalize=False)
    np.testing.assert_allclose(both[0], torch.cat((hidden[0][0], hidden[0].mean(0))), atol=1e-5)
    sentence_files(tmp_path, {"pooling_mode": "cls"}, max_seq_length=6, do_lower_case=True)
    assert read_pooling(tmp_path) == Pooling(("first",), 6, True)
    encoder = ours(tmp_path)
    encoder.embed(["床前明月光", "床前明月"])
    assert encoder.truncated == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modules.json", '[{"type": "x.models.Dense", "path": "2"}]', "the step 'Dense' .* is not known"),
        ("modules.json", '{"a": 1}', "expected a list of JSON objects"),
        ("modules.json", "[{", "not valid JSON"),
        ("modules.json", '[{"type": "a.Pooling", "path": "../elsewhere"}]', "lies outside the model folder"),
        ("modules.json", '[{"type": "a.Pooling", "path": "9_Pooling"}]', "the file is missing"),
        ("1_Pooling/config.json", '{"pooling_mode_novel": true}', "the pooling 'pooling_mode_novel' is not known"),
        ("1_Pooling/config.json", "{}", "no pooling is chosen"),
        ("1_Pooling/config.json", "[]", "expected a JSON object"),
        ("sentence_bert_config.json", '{"max_seq_length": "long"}', "max_seq_length must be a positive whole number"),
    ],
)
def test_damaged_pooling_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    sentence_files(tmp_path, {"pooling_mode_mean_tokens": True})
    assert read_pooling(tmp_path) == Pooling()
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_pooling(tmp_path)
    assert str(tmp_path) in caught.value.where


# Windows -------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, database=None)
@given(st.integers(0, 200), st.integers(2, 40), st.data())
def test_windows_cover_everything_and_overlap(length: int, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size // 2))
    spans = windows(length, size, overlap)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(0 < end - start <= size for start, end in spans if length)
    assert all(before[1] - after[0] == overlap for before, after in pairwise(spans))
    assert all(before[1] < after[1] for before, after in pairwise(spans))


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.integers(1, 12), max_size=60), st.integers(12, 30), st.data())
def test_words_stay_whole_in_their_windows(sizes: list[int], room: int, data: st.DataObject) -> None:
    spans = word_windows(sizes, room, data.draw(st.integers(0, room // 2)))
    assert spans[0][0] == 0 and spans[-1][1] == len(sizes)
    assert all(sum(sizes[start:end]) <= room for start, end in spans)
    assert all(a[0] < b[0] <= a[1] < b[1] for a, b in pairwise(spans))
    pieces = [torch.arange(start, end)[:, None].float() for start, end in spans]
    assert stitch(spans, pieces, len(sizes))[:, 0].tolist() == list(range(len(sizes)))


def test_each_word_is_taken_far_from_the_cuts() -> None:
    spans = [(0, 6), (3, 9), (6, 12)]
    pieces = [torch.full((end - start, 1), float(index)) for index, (start, end) in enumerate(spans)]
    assert stitch(spans, pieces, 12)[:, 0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


@settings(max_examples=100, deadline=None, database=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31))
def test_the_best_span_is_the_best(count: int, longest: int, seed: int) -> None:
    scores = torch.randn(count + 5, 2, generator=torch.Generator().manual_seed(seed))
    found = best_span(scores, 3, count, longest)
    inner = scores[3 : 3 + count]
    every = {(i, j): float(inner[i, 0] + inner[j, 1]) for i in range(count) for j in range(i, min(count, i + longest))}
    assert found.score == pytest.approx(max(every.values()))
    assert every[found.first, found.last] == pytest.approx(found.score)
    assert found.no_answer_score == pytest.approx(float(scores[0].sum()))
    assert 0 < found.probability <= 1


@settings(max_examples=100, deadline=None, database=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 40))
def test_pairs_are_cut_as_the_tokenizers_library_does(first: int, second: int, room: int) -> None:
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.enable_truncation(room) if room else None
    kept = shorten([first, second], room)
    assert sum(kept) == min(room, first + second)
    if room:
        ids = made.encode("a " * first, "b " * second).ids
        assert [ids.count(0), ids.count(1)] == kept


# The real thing ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Path:
    """all-MiniLM-L6-v2, where it is on this machine: in the catalog's cache or where HANMO_MINILM says."""
    named = os.environ.get("HANMO_MINILM")
    folder = Path(named) if named else catalog.cache_folder("all-minilm-l6-v2")
    if not (folder / "model.safetensors").is_file():
        pytest.skip("all-minilm-l6-v2 is not on this machine")
    return folder


@torch.no_grad()
def test_minilm_gives_the_vectors_of_transformers(minilm: Path) -> None:
    encoder = ours(minilm)
    assert (encoder.task, encoder.pooling.max_length) == ("embedding", 256)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.BertModel.from_pretrained(minilm).eval()
    texts = [
        "",
        "word",
        "A man is eating food.",
        "床前明月光，疑是地上霜。",
        "[CLS] is text",
        "moon " * 255,
        "明月" * 400,
    ]
    found = encoder.embed(texts)
    assert encoder.truncated == 2
    for text, vector in zip(texts, found, strict=True):
        plain = text.replace("[CLS]", "[ CLS ]")  # what ordinary text means by it
        batch = tokenizer(plain, return_tensors="pt", truncation=True, max_length=256)
        expected = torch.nn.functional.normalize(model(**batch).last_hidden_state.mean(1))[0].numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_minilm_knows_a_paraphrase(minilm: Path) -> None:
    vectors = ours(minilm).embed(
        [
            "A man is eating food.",
            "Someone is having a meal.",
            "The stock market fell sharply.",
            "Shares lost much value.",
        ]
    )
    similar = vectors @ vectors.T
    assert min(similar[0, 1], similar[2, 3]) > 0.4
    assert max(similar[:2, 2:].flatten()) < 0.2


# Marian --------------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def sentencepiece(pieces: list[tuple[str, float, int]], kind: int = 1, charsmap: bytes = b"") -> bytes:
    """A SentencePiece model by the published description of its format."""
    parts = [
        message(1, message(1, piece.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + b"\x18" + varint(type_))
        for piece, score, type_ in pieces
    ]
    trainer = message(2, b"\x18" + varint(kind) + message(1, b"corpus.txt"))
    return b"".join(parts) + trainer + message(3, message(1, b"nmt_nfkc") + message(2, charsmap) + b"\x18\x01")


def marian(folder: Path, **choices: Any) -> tokenizers.Tokenizer:
    """Marian's files of a Unigram model with its plain original; the target has pieces of its own."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        [text for text in CORPUS if text.isascii()],
        trainers.UnigramTrainer(vocab_size=90, special_tokens=["<unk>"], unk_token="<unk>"),
    )
    pieces = [(piece, score) for piece, score in json.loads(made.to_str())["model"]["vocab"] if piece != "<unk>"]
    source = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((p, score, 1) for p, score in pieces)]
    (folder / "source.spm").write_bytes(sentencepiece(source, **choices))
    (folder / "target.spm").write_bytes(sentencepiece([("▁明月", -1.0, 1)]))
    names = ["</s>", "<unk>", *(piece for piece, _ in pieces), "▁明月", "光", ">>zho<<", "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: id for id, name in enumerate(names)}))
    return made


def test_marian_pieces_are_those_of_the_source_model(tmp_path: Path) -> None:
    made = marian(tmp_path)
    assert is_marian_tokenizer(tmp_path)
    found = load_marian_tokenizer(tmp_path)
    ids = json.loads((tmp_path / "vocab.json").read_text())
    names = {id: name for name, id in ids.items()}
    for text in ("The bright moon", "  shines   before\nmy bed; ", "", "frost upon the ground? 3.14", "unaffordable"):
        expected = made.encode(text, add_special_tokens=False).tokens
        assert [names[id] for id in found.encode(text)] == [name if name in ids else "<unk>" for name in expected]
    assert found.decode(found.encode("The bright moon")) == "The bright moon"
    assert found.decode([ids["▁明月"], ids["光"], ids["</s>"]]) == "明月光"
    assert ids["<unk>"] in found.encode("moon 霜")
    assert not {ids["</s>"], ids["<pad>"], ids[">>zho<<"]} & set(found.encode("</s> <pad> >>zho<< moon"))
    assert found.special_tokens[">>zho<<"] == ids[">>zho<<"]
    assert source_wrapping(found, {"decoder_start_token_id": ids["<pad>"]}) == ([], [ids["</s>"]], ids["<pad>"])
    (tmp_path / "again").mkdir()
    found.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").encode("The moon") == found.encode("The moon")
    assert not is_marian_tokenizer(tmp_path / "again")


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_marian_files_load_or_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    marian(tmp_path) if not (tmp_path / "source.spm").exists() else None
    whole = (tmp_path / "source.spm").read_bytes()
    content = bytearray(whole[: data.draw(st.integers(1, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "source.spm").write_bytes(bytes(content))
    try:
        load_marian_tokenizer(tmp_path).encode("The moon 明月")
    except ModelError as error:
        assert str(tmp_path) in error.where
    finally:
        (tmp_path / "source.spm").write_bytes(whole)


@pytest.mark.parametrize(
    ("choices", "vocabulary", "what"),
    [
        ({"kind": 2}, None, "of another kind than Unigram"),
        ({"charsmap": b"\xff\xff\xff\xff"}, None, "the table of its normaliser is cut off"),
        ({}, {"</s>": 0, "<unk>": 2}, "are not 0, 1, 2"),
        ({}, {"</s>": 0}, "the piece '<unk>' is missing"),
        ({}, {"</s>": 0, "<unk>": 1, "nothing": 2}, "none of its pieces is in vocab.json"),
        ({}, ["</s>"], "are not 0, 1, 2"),
    ],
)
def test_other_marian_files_are_refused(tmp_path: Path, choices: dict[str, Any], vocabulary: Any, what: str) -> None:
    marian(tmp_path, **choices)
    if vocabulary is not None:
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ModelError, match=what) as caught:
        load_marian_tokenizer(tmp_path)
    assert caught.value.fix
