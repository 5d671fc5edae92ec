"""Tiny tasks for the tests of objectives: tokenizers, records, and for every objective a network and its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

from hanmo.data.tasks import types
from hanmo.models.heads import HeadConfig
from hanmo.models.recurrent import RecurrentConfig, RecurrentEncoder
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.text.tokenizer import Tokenizer
from hanmo.training.objectives import CausalLanguageModeling
from hanmo.training.objectives.base import Objective
from hanmo.training.objectives.contrastive import Contrastive
from hanmo.training.objectives.distillation import Distillation
from hanmo.training.objectives.extraction import SpanExtraction
from hanmo.training.objectives.masked import MaskedLanguageModeling, Masking, Sentences
from hanmo.training.objectives.rows import RowMaker
from hanmo.training.objectives.seq2seq import SequenceToSequence, SourceRowMaker
from hanmo.training.objectives.supervised import Classification, Tagging
from hanmo.training.objectives.words import word_beginnings

CHINESE = [
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "北京是中国的首都，机器学习模型需要很多数据。",
    "我们在学校学习自然语言处理，老师非常喜欢这本书。",
]
ENGLISH = [
    "The bright moon shines before my bed; is it frost upon the ground?",
    "Paris is the capital of France, and London of England.",
    "He doesn't like unaffordable apartments, but she does not mind the price.",
]
CORPUS = (CHINESE + ENGLISH) * 4
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CONTEXT = 48


# Records -------------------------------------------------------------------------------------------------------------


def at(where: str) -> dict[str, Any]:
    file, _, line = where.rpartition(":")
    return {"file": file, "line": int(line)}


def Text(text: str, where: str = "a.jsonl:1") -> types.Text:
    return types.Text(text, **at(where))


def Labelled(text: str, labels: tuple[str, ...], pair: str | None = None, where: str = "a.jsonl:1") -> types.Labelled:
    return types.Labelled(text, labels, pair, **at(where))


def Tagged(tokens: tuple[str, ...], tags: tuple[str, ...], where: str = "a.conll:1") -> types.Tagged:
    return types.Tagged(tokens, tags, **at(where))


def Pair(source: str, target: str, where: str = "a.tsv:1") -> types.Pair:
    return types.Pair(source, target, **at(where))


def QuestionAnswer(
    id: str, context: str, question: str, answers: tuple[types.Answer, ...], where: str = "a.json:1"
) -> types.QuestionAnswer:
    return types.QuestionAnswer(id, context, question, answers, **at(where))


def Similar(
    anchor: str, positive: str, negative: str | None = None, where: str = "a.jsonl:1", score: float | None = None
) -> types.Similar:
    return types.Similar(anchor, positive, negative, score, **at(where))


# Tokenizers ----------------------------------------------------------------------------------------------------------


@cache
def bert_tokenizer() -> Tokenizer:
    """As BERT's, for Chinese and English."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.decoder = decoders.WordPiece()
    return Tokenizer.from_json(made.to_str(), pad_token="[PAD]")


@cache
def byte_tokenizer() -> Tokenizer:
    """Byte-level, with spaces in the tokens of words."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["</s>", "<pad>", "<mask>"]
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=360, special_tokens=special, initial_alphabet=alphabet)
    )
    return Tokenizer.from_json(made.to_str(), eos_token="</s>", pad_token="<pad>")


# Networks ------------------------------------------------------------------------------------------------------------


def encoder_config(head: HeadConfig | None = None, *, lm: bool = False, dropout: float = 0.0) -> TransformerConfig:
    """A small BERT."""
    return TransformerConfig(
        bert_tokenizer().vocab_size, 32, 2, 4, 4, 8, 48, CONTEXT, model_type="bert", causal=False, norm="layer",
        norm_bias=True, norm_placement="post", final_norm=False, positions="learned", embedding_norm=True, gated=False,
        activation="gelu", lm=lm, token_types=2, head=head, dropout=dropout,
    )  # fmt: skip


def drawn(model: nn.Module, seed: int = 5) -> Any:
    """A network whose weights are all drawn, none of them neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.dim() == 1 else parameter.size(1) ** -0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + (parameter.dim() == 1))
    return model


def encoder(head: HeadConfig | None = None, *, lm: bool = False, dropout: float = 0.0) -> Transformer:
    if head is not None:
        head = replace(head, dropout=dropout)
    return drawn(Transformer(encoder_config(head, lm=lm, dropout=dropout)))  # type: ignore[no-any-return]


def recurrent(head: HeadConfig, *, dropout: float = 0.0) -> RecurrentEncoder:
    config = RecurrentConfig("lstm", bert_tokenizer().vocab_size, 16, 16, 1, tie_embeddings=False, bidirectional=True)
    return drawn(RecurrentEncoder(config, replace(head, dropout=dropout)))  # type: ignore[no-any-return]


def decoder(head: HeadConfig | None = None, *, dropout: float = 0.0, hidden: int = 32, seed: int = 5) -> Transformer:
    head = None if head is None else replace(head, dropout=dropout)
    size = byte_tokenizer().vocab_size
    config = TransformerConfig(
        size, hidden, 2, 4, 2, 8, 48, CONTEXT, model_type="qwen3", qk_norm=True, lm=head is None, head=head,
        dropout=dropout,
    )  # fmt: skip
    return drawn(Transformer(config), seed)  # type: ignore[no-any-return]


def seq2seq_network(*, dropout: float = 0.0) -> Transformer:
    size = byte_tokenizer().vocab_size
    reader = TransformerConfig(size, 32, 1, 4, 4, 8, 48, CONTEXT, causal=False, shared_embedding=True, dropout=dropout)
    return drawn(  # type: ignore[no-any-return]
        Transformer(TransformerConfig(size, 32, 1, 4, 4, 8, 48, CONTEXT, encoder=reader, dropout=dropout))
    )


# Tasks ---------------------------------------------------------------------------------------------------------------

GOOD, BAD = ("喜欢", "bright", "首都"), ("故乡", "frost", "price")
FILLERS = ("the", "moon", "is", "在", "学校", "and", "数据", "he")
LABELS = ("bad", "good", "mixed")
TAGS = ("O", "B-X", "I-X")


def sentence(generator: np.random.Generator, *words: str) -> list[str]:
    """Some fillers, and among them the words."""
    chosen = [str(word) for word in generator.choice(FILLERS, generator.integers(2, 8))]
    for word in words:
        chosen.insert(int(generator.integers(0, len(chosen) + 1)), word)
    return chosen


def labelled(count: int, seed: int, *, multi: bool = False) -> list[types.Labelled]:
    """Good words make a text good, bad ones bad, both mixed."""
    generator = np.random.default_rng(seed)
    records = []
    for number in range(count):
        kind = int(generator.integers(0, 4))  # good is twice as frequent as any other
        good, bad = kind != 0, kind in (0, 1)
        words = [str(generator.choice(GOOD))] * good + [str(generator.choice(BAD))] * bad
        labels = ("good",) * good + ("bad",) * bad if multi else (LABELS[2 if good and bad else int(good)],)
        pair = " ".join(sentence(generator)) if kind == 2 else None
        records.append(Labelled(" ".join(sentence(generator, *words)), labels, pair, f"l.jsonl:{number + 1}"))
    return records


def tagged(count: int, seed: int) -> list[types.Tagged]:
    """A span is a good word and all bad words after it."""
    generator = np.random.default_rng(seed)
    records = []
    for number in range(count):
        words = sentence(generator, str(generator.choice(GOOD)))
        place = next(index for index, word in enumerate(words) if word in GOOD)
        words[place + 1 : place + 1] = [str(word) for word in generator.choice(BAD, generator.integers(0, 3))]
        tags, inside = [], False
        for word in words:
            tags.append("B-X" if word in GOOD else "I-X" if word in BAD and inside else "O")
            inside = tags[-1] != "O"
        records.append(Tagged(tuple(words), tuple(tags), f"t.conll:{number + 1}"))
    return records


def questions(count: int, seed: int) -> list[types.QuestionAnswer]:
    """What stands after the bright moon? Sometimes nothing does."""
    generator = np.random.default_rng(seed)
    records = []
    for number in range(count):
        answer = str(generator.choice(["frost", "price", "故乡"]))
        context = " ".join(sentence(generator, f"bright {answer}") if number % 4 else sentence(generator))
        answers = ((answer, context.index(answer)),) if number % 4 else ()
        records.append(QuestionAnswer(str(number), context, "bright?", answers, f"q.json:{number + 1}"))
    return records


def pairs(count: int, seed: int) -> list[types.Pair]:
    """The target is the source's last word, said twice."""
    generator = np.random.default_rng(seed)
    records = []
    for number in range(count):
        words = sentence(generator)
        records.append(Pair(" ".join(words), f"{words[-1]} {words[-1]}", f"p.tsv:{number + 1}"))
    return records


def similar(count: int, seed: int, *, negatives: bool = False) -> list[types.Similar]:
    """A text and its partner share a word."""
    generator = np.random.default_rng(seed)
    words = (*GOOD, *BAD, *"明月光地上霜低头思乡")
    records = []
    for number in range(count):
        word, other = (str(word) for word in generator.choice(words, 2, replace=False))
        negative = " ".join(sentence(generator, other)) if negatives and number % 3 else None
        anchor, positive = (" ".join(sentence(generator, word)) for _ in range(2))
        records.append(Similar(anchor, positive, negative, f"s.jsonl:{number + 1}"))
    return records


def token_corpus(tokenizer: Tokenizer, separator: int, repeat: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Documents end to end, each closed by a separator, and which tokens begin a word."""
    ids: list[int] = []
    begins: list[bool] = []
    for text in (CHINESE + ENGLISH) * repeat:
        found, marks = word_beginnings(tokenizer, text)
        ids += [*found, separator]
        begins += [*marks.tolist(), True]
    return np.array(ids, dtype=np.uint16), np.array(begins)


@dataclass(frozen=True)
class Case:
    """A network and an objective over its data."""

    model: Callable[..., Any]
    objective: Callable[..., Objective[Any, Any]]


SEED = {"seed": 3}


def labels_head(**options: Any) -> HeadConfig:
    return HeadConfig("sequence-classification", LABELS[: options.pop("count", 3)], **options)


def classification(
    head: HeadConfig, model: Any, tokenizer: Callable[[], Tokenizer] = bert_tokenizer, **options: Any
) -> Callable[..., Any]:
    def make(micro_batch: int, batch_size: int = 12, count: int = 48) -> Classification:
        rows = RowMaker.of(model(), tokenizer())
        data = [
            Classification.prepare(labelled(n, s, multi=head.multi_label), rows, head) for n, s in ((count, 1), (20, 2))
        ]
        return Classification(*data, head, batch_size=batch_size, micro_batch=micro_batch, **SEED, **options)

    return make


def tagging(head: HeadConfig, model: Any) -> Callable[..., Any]:
    def make(micro_batch: int, batch_size: int = 12, count: int = 48) -> Tagging:
        rows = RowMaker.of(model(), bert_tokenizer())
        data = [Tagging.prepare(tagged(n, s), rows, head) for n, s in ((count, 1), (20, 2))]
        return Tagging(*data, batch_size=batch_size, micro_batch=micro_batch, **SEED)

    return make


SPANS = HeadConfig("span-extraction", ("start", "end"))


def extraction(micro_batch: int, batch_size: int = 12, count: int = 48) -> SpanExtraction:
    rows = RowMaker.of(encoder(SPANS), bert_tokenizer(), max_length=24)
    data = [SpanExtraction.prepare(questions(n, s), rows, SPANS, overlap=4) for n, s in ((count, 1), (20, 2))]
    return SpanExtraction(*data, batch_size=batch_size, micro_batch=micro_batch, **SEED)


def sequence_to_sequence(smoothing: float = 0.0) -> Callable[..., Any]:
    def make(micro_batch: int, batch_size: int = 12, count: int = 48) -> SequenceToSequence:
        rows = SourceRowMaker.of(seq2seq_network(), byte_tokenizer(), {"decoder_start_token_id": 1})
        data = [SequenceToSequence.prepare(pairs(n, s), rows) for n, s in ((count, 1), (20, 2))]
        return SequenceToSequence(*data, batch_size=batch_size, micro_batch=micro_batch, smoothing=smoothing, **SEED)

    return make


def contrastive(*, negatives: bool = False, symmetric: bool = False) -> Callable[..., Any]:
    def make(micro_batch: int, batch_size: int = 3, count: int = 48, group: int = 5) -> Contrastive:
        rows = RowMaker.of(encoder(), bert_tokenizer())
        data = [Contrastive.prepare(similar(n, s, negatives=negatives), rows) for n, s in ((count, 1), (21, 2))]
        return Contrastive(
            *data, group=group, batch_size=batch_size, micro_batch=micro_batch, symmetric=symmetric, **SEED
        )

    return make


def masked_corpus(micro_batch: int, batch_size: int = 8, context: int = 24) -> MaskedLanguageModeling:
    tokenizer = bert_tokenizer()
    ids, begins = token_corpus(tokenizer, 0)
    cut = len(ids) * 3 // 4
    return MaskedLanguageModeling.over_corpus(
        (ids[:cut], begins[:cut]), (ids[cut:], begins[cut:]), tokenizer, context=context, separator=0,
        batch_size=batch_size, micro_batch=micro_batch, **SEED,
    )  # fmt: skip


def masked_sentences(micro_batch: int, batch_size: int = 5) -> MaskedLanguageModeling:
    rows = RowMaker.of(encoder(lm=True), bert_tokenizer(), truncate=True)
    records = [Text(text, f"t.txt:{line}") for line, text in enumerate(CHINESE + ENGLISH + ["月", "The moon."])]
    data = Sentences(Sentences.prepare(records, rows))
    return MaskedLanguageModeling(
        data, data, Masking.of(bert_tokenizer()), batch_size=batch_size, micro_batch=micro_batch, **SEED
    )


def causal(micro_batch: int, batch_size: int = 6) -> CausalLanguageModeling:
    ids, _ = token_corpus(byte_tokenizer(), 0)
    return CausalLanguageModeling(
        ids[:700], ids[700:], context=16, batch_size=batch_size, micro_batch=micro_batch, separator=0, **SEED
    )


def distilled(case: Case, teacher: Callable[[], Any], **options: Any) -> Callable[..., Any]:
    def make(micro_batch: int, **sizes: Any) -> Distillation:
        like = next(case.model().parameters())
        taught = teacher().to(like.dtype)
        return Distillation(case.objective(micro_batch, **sizes), taught, case.model(), **options)

    return make


SINGLE, MULTI = labels_head(), labels_head(count=2, multi_label=True)
LAST, MEAN = labels_head(pooling="last"), labels_head(pooling="mean")
PLAIN_TAGS, CRF_TAGS = (HeadConfig("token-classification", TAGS, crf=crf) for crf in (False, True))


def with_head(make: Callable[..., Any], head: HeadConfig) -> Callable[..., Any]:
    return lambda **options: make(head, **options)


def masked_network(**options: Any) -> Transformer:
    return encoder(lm=True, **options)


CASES: dict[str, Case] = {
    "masked": Case(masked_network, masked_corpus),
    "masked-sentences": Case(masked_network, masked_sentences),
    "seq2seq": Case(seq2seq_network, sequence_to_sequence()),
    "seq2seq-smoothed": Case(seq2seq_network, sequence_to_sequence(0.1)),
    "classes": Case(with_head(encoder, SINGLE), classification(SINGLE, with_head(encoder, SINGLE))),
    "classes-balanced": Case(
        with_head(encoder, SINGLE), classification(SINGLE, with_head(encoder, SINGLE), balanced=True)
    ),
    "classes-multi": Case(with_head(encoder, MULTI), classification(MULTI, with_head(encoder, MULTI))),
    "classes-decoder": Case(
        with_head(decoder, LAST), classification(LAST, with_head(decoder, LAST), byte_tokenizer)
    ),
    "classes-recurrent": Case(with_head(recurrent, MEAN), classification(MEAN, with_head(recurrent, MEAN))),
    "tags": Case(with_head(encoder, PLAIN_TAGS), tagging(PLAIN_TAGS, with_head(encoder, PLAIN_TAGS))),
    "tags-crf": Case(with_head(encoder, CRF_TAGS), tagging(CRF_TAGS, with_head(encoder, CRF_TAGS))),
    "tags-recurrent": Case(with_head(recurrent, CRF_TAGS), tagging(CRF_TAGS, with_head(recurrent, CRF_TAGS))),
    "spans": Case(with_head(encoder, SPANS), extraction),
    "contrastive": Case(encoder, contrastive()),
    "contrastive-hard": Case(encoder, contrastive(negatives=True, symmetric=True)),
}  # fmt: skip
CASES["distilled"] = Case(decoder, distilled(Case(decoder, causal), lambda: decoder(hidden=48, seed=8)))
CASES["distilled-masked"] = Case(masked_network, distilled(CASES["masked"], lambda: drawn(masked_network(), 8)))
CASES["distilled-seq2seq"] = Case(seq2seq_network, distilled(CASES["seq2seq"], lambda: drawn(seq2seq_network(), 8)))
CASES["distilled-classes"] = Case(
    CASES["classes"].model, distilled(CASES["classes-balanced"], lambda: drawn(encoder(SINGLE), 8))
)
CASES["distilled-multi"] = Case(
    CASES["classes-multi"].model, distilled(CASES["classes-multi"], lambda: drawn(encoder(MULTI), 8))
)
